"""The installed version of dynams-stream."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """The installed version, or "unknown" where the code runs without being installed."""
    try:
        return version("dynams-stream")
    except PackageNotFoundError:
        return "unknown"
