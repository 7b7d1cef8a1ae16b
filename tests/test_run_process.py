"""Runs in processes of their own: how they end, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline import run_process
from pipeline.run_process import RunProcess

WAITS = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_status_is_the_commands() -> None:
    process = RunProcess(command("import sys; sys.exit(int(sys.argv[1]))"))
    assert [process.run("0"), process.run("3")] == [0, 3]
    assert RunProcess(command("import os; os.kill(os.getpid(), 9)")).run() == -9


def test_a_run_that_lasts_too_long_is_stopped(tmp_path: Path) -> None:
    began = time.monotonic()
    assert RunProcess(command(WAITS), max_seconds=1).run(str(tmp_path / "begun")) == -signal.SIGTERM
    assert time.monotonic() - began < 30


def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_process, "STOP_SECONDS", 0.5)
    process, status = RunProcess(command(DEAF)), []
    thread = threading.Thread(target=lambda: status.append(process.run(str(tmp_path / "begun"))))
    thread.start()
    wait_for(tmp_path / "begun")
    process.stop()
    thread.join()
    assert status == [-signal.SIGKILL]
    assert process.run(str(tmp_path / "again")) == -signal.SIGTERM or not (tmp_path / "again").exists()


RUNS = """
import sys
from pipeline.run_process import RunProcess
from tools.command import Terminated, _terminate
import signal
signal.signal(signal.SIGTERM, _terminate)
try:
    RunProcess([sys.executable, "-c", sys.argv[1]]).run(sys.argv[2])
except Terminated:
    sys.exit(143)
"""


def test_who_is_told_to_stop_ends_the_run_and_who_is_killed_leaves_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for how, status, left in ((signal.SIGTERM, 143, False), (signal.SIGKILL, -9, True)):
        begun = tmp_path / how.name
        parent = subprocess.Popen([sys.executable, "-c", RUNS, WAITS, str(begun)], env=environment)
        wait_for(begun)
        (child,) = psutil.Process(parent.pid).children()
        parent.send_signal(how)
        assert parent.wait(timeout=30) == status
        try:
            assert (child.is_running() and child.status() != psutil.STATUS_ZOMBIE) or not left
            assert left or not child.is_running()
        finally:
            if child.is_running():
                child.kill()
