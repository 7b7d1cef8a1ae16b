"""Processes of our own beside packages of the user's that are named like ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.own_python import PACKAGES, import_from, own_environment

ROOT = Path(__file__).resolve().parents[1]
WHERE = (
    "import pipeline, tools, dynams_stream, my_models; "
    "print(*[module.__file__ for module in (pipeline, tools, dynams_stream, my_models)])"
)
HERE_AND_IN_A_CHILD = f"""
import os, subprocess, sys
from pipeline.own_python import import_from, own_environment
import_from(os.getcwd())
subprocess.run([sys.executable, "-P", "-c", {WHERE!r}], env=own_environment(), check=True)
{WHERE}
"""


@pytest.mark.parametrize("taken", [(), ("pipeline",), PACKAGES])
def test_a_users_own_packages_do_not_take_the_place_of_ours(tmp_path: Path, taken: tuple[str, ...]) -> None:
    (tmp_path / "my_models.py").touch()
    for name in taken:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-P", "-c", HERE_AND_IN_A_CHILD],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [[Path(file).parent for file in line.split()] for line in done.stdout.splitlines()]
    assert found == [[ROOT / "pipeline", ROOT / "tools", ROOT / "dynams_stream", tmp_path]] * 2


def test_a_folder_is_looked_into_first_unless_it_has_such_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    (other / f"{PACKAGES[1]}.py").touch()
    monkeypatch.setattr(sys, "path", ["", "/somewhere"])
    import_from(str(plain))
    import_from(str(other))
    import_from(str(plain))
    import_from(str(ROOT))
    assert sys.path == [str(plain), "", "/somewhere", str(ROOT), str(other)]
    monkeypatch.chdir(plain)
    assert own_environment()["PYTHONPATH"].split(os.pathsep) == [
        str(plain), str(plain), "/somewhere", str(ROOT), str(other),
    ]  # fmt: skip
