"""Benchmarks that nothing else runs go on working, on little data; what they measure is not looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SELECTION = Path(__file__).resolve().parents[1] / "benchmarks" / "selection.py"


def test_the_cut_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, SELECTION, "--rows", "25000", "--runs", "1", "--folder", tmp_path / "store"]
    done = subprocess.run([*command, "--only", "dynams, threads"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("25,000 rows, 3 tables")
    assert done.stdout.splitlines()[-1].endswith("| 7,500 |"), done.stdout
