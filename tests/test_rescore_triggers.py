"""Runs of a trigger as real processes: what their ends mean, and when none is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dynams_stream import Store
from dynams_stream.errors import UsageError
from pipeline.lease import store_lease
from pipeline.run_records import last_run
from tools.rescore_triggers import Runs


@pytest.fixture
def stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A shell script that is started in Python's place: importing PyTorch for each exit status would take long."""

    def write(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(path))

    return write


def test_wrong_usage_ends_a_trigger_at_its_very_first_run_alone(
    digit_store: Store, stands_in: Callable[[str], None]
) -> None:
    stands_in('for last; do :; done; test "$last" = --once && exit 2')
    run = Runs(digit_store, ["--store=x"], waits=False, max_runtime=None)
    with pytest.raises(UsageError, match="no later one would do better"):
        run("ckpt")
    assert run("ckpt") == "failed"


def test_no_process_is_started_while_another_job_holds_the_store(
    digit_store: Store, stands_in: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stands_in("exit 2")
    run = Runs(digit_store, [], waits=False, max_runtime=None)
    with store_lease(digit_store, "score"):
        assert [run("ckpt"), run("ckpt")] == ["busy", "busy"]
    assert capsys.readouterr().err.count("is busy: score (process") == 1
    with pytest.raises(UsageError):
        run("ckpt")


def test_a_run_that_lasts_too_long_has_failed(digit_store: Store, stands_in: Callable[[str], None]) -> None:
    stands_in("exec sleep 60")
    run = Runs(digit_store, [], waits=False, max_runtime="0.5s")
    assert [run("ckpt"), run("ckpt/1.pt")] == ["failed", "failed"]
    ran = last_run(digit_store)
    assert ran is not None
    assert (ran.ending, ran.failures, ran.checkpoint) == ("failed", 2, "ckpt/1.pt")
    assert ran.error == "lasted longer than --max-runtime 0.5s, and was stopped"


def test_a_run_that_cannot_be_started_has_failed(digit_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no-such/python")
    assert Runs(digit_store, [], waits=False, max_runtime=None)("ckpt/1.pt") == "failed"
    assert "could not be started" in str(last_run(digit_store))
