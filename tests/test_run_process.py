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

import pipeline.run_process
from pipeline.run_process import Ended, run_process

WAITS = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_status_is_the_commands() -> None:
    program = "import sys; sys.exit(int(sys.argv[1]))"
    assert [run_process(command(program, status)) for status in ("0", "3")] == [Ended(0), Ended(3)]
    assert run_process(command("import os; os.kill(os.getpid(), 9)")) == Ended(-9)
    with pytest.raises(OSError, match="no-such"):
        run_process(["/no-such"])


def test_a_run_that_lasts_too_long_is_stopped(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = run_process(command(WAITS, str(tmp_path / "begun")), max_seconds=1)
    assert ended == Ended(-signal.SIGTERM, too_long=True)
    assert time.monotonic() - began < 30


class Stopped(Exception):  # noqa: N818
    """What a signal's handler raises."""


def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.run_process, "STOP_SECONDS", 0.5)

    def stop(*_: object) -> None:
        raise Stopped

    def send() -> None:
        wait_for(tmp_path / "begun")
        os.kill(os.getpid(), signal.SIGUSR1)

    usual, thread = signal.signal(signal.SIGUSR1, stop), threading.Thread(target=send)
    before = psutil.Process().children()
    thread.start()
    try:
        with pytest.raises(Stopped):
            run_process(command(DEAF, str(tmp_path / "begun")))
    finally:
        signal.signal(signal.SIGUSR1, usual)
        thread.join()
    assert psutil.Process().children() == before


RUNS = """
import sys
from pipeline.run_process import run_process
from tools.command import Terminated, _terminate
import signal
signal.signal(signal.SIGTERM, _terminate)
try:
    run_process([sys.executable, "-c", *sys.argv[1:]])
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
