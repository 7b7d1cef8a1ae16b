"""How far rounds are behind checkpoints: it rises while nothing is scored, whatever a trainer does with its files."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynams_stream import Store
from dynams_stream.errors import CheckpointError
from pipeline.checkpoints import checkpoints
from pipeline.freshness import Freshness, freshness
from pipeline.run_records import Ending, last_run, recorded_run
from pipeline.stopping import Terminated

HOUR = 3600.0


class Rounds:
    """As much of a store as is looked at: one round, its checkpoint and when its scoring began."""

    def __init__(self, checkpoint: Path, age: float):
        started = datetime.fromtimestamp(time.time() - age, UTC).isoformat(timespec="seconds")
        self._round = SimpleNamespace(manifest={"checkpoint": {"path": str(checkpoint)}, "started": started})

    def rounds(self) -> list[SimpleNamespace]:
        return [self._round]


def put(path: Path, age: float) -> Path:
    path.write_text(f"{path} {age}")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def about(seconds: float | None) -> float:
    """To the next 10 minutes: the machine may be slow."""
    assert seconds is not None
    return round(seconds / 600) * 600


def told(store: Rounds | Store, place: Path) -> Freshness:
    records = store if isinstance(store, Store) else None
    return freshness(store, str(place), None if records is None else last_run(records))  # type: ignore[arg-type]


def test_a_trainer_that_keeps_its_last_three_is_waited_for_no_less(tmp_path: Path) -> None:
    for name, age in (("142.pt", 1300), ("143.pt", 700), ("144.pt", 100)):
        put(tmp_path / name, age)
    found = told(Rounds(tmp_path / "0.pt", 24 * HOUR), tmp_path)
    assert (about(found.behind_seconds), about(found.round_behind_seconds)) == (24 * HOUR, 24 * HOUR)


def test_so_is_one_that_overwrites_its_file(tmp_path: Path) -> None:
    path = put(tmp_path / "last.pt", 100)
    assert about(told(Rounds(path, 24 * HOUR), path).behind_seconds) == 24 * HOUR


def run(store: Store, folder: Path, how: Ending | BaseException) -> None:
    try:
        with recorded_run(store, "{epoch}.pt") as record:
            record.checkpoint = checkpoints(str(folder), "{epoch}.pt")[-1]
            if isinstance(how, BaseException):
                raise how
            record.ended(how)
    except (RuntimeError, Terminated):
        pass


def test_a_run_that_fails_or_is_stopped_takes_nothing_back(tmp_path: Path) -> None:
    folder, store = tmp_path / "ckpt", Store(tmp_path / "store")
    folder.mkdir()
    for epoch in range(4, 13):
        put(folder / f"{epoch}.pt", (12 - epoch) * HOUR)
    assert about(told(store, folder).behind_seconds) == 8 * HOUR  # since the first that waits
    run(store, folder, "not due")
    put(folder / "last.pt", 0)  # a name that runs pass over
    for ending in ("not due", RuntimeError("a fault"), Terminated()):
        run(store, folder, ending)  # type: ignore[arg-type]
        assert told(store, folder).behind_seconds == 0
    put(folder / "12.pt", 2 * HOUR)
    put(folder / "13.pt", HOUR)
    run(store, folder, "published")
    put(folder / "14.pt", 60)
    run(store, folder, RuntimeError("a fault"))
    assert about(told(store, folder).behind_seconds) == HOUR
    assert told(store, folder).round_behind_seconds is None
    with pytest.raises(CheckpointError, match="no such folder"):
        told(store, tmp_path / "none")
