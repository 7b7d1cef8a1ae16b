"""Python processes of our own: they find this library, and import what the caller could."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGES = ("dynams_stream", "pipeline", "tools")
"""Ours."""


def own_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours. The folder where it runs is not looked into first: see `-P`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def own_environment() -> dict[str, str]:
    """The environment of such a process: this one's, with this one's import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def import_from(folder: str) -> None:
    """Let modules be imported from a folder: first of all, but last where it has packages named like ours.

    Then a user's own `tools` or `pipeline` does not take the place of ours; theirs cannot be imported beside them.
    """
    if folder in sys.path:
        return
    root = Path(__file__).resolve().parents[1]
    if Path(folder).resolve() != root and any(
        Path(folder, name).is_dir() or Path(folder, f"{name}.py").exists() for name in PACKAGES
    ):
        sys.path += [str(root), folder]
    else:
        sys.path.insert(0, folder)
