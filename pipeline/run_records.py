"""What `dynams rescore` leaves for those who watch over it: how its last run ended, and what starts the next one.

    control/rescore/last_run.json       written by each run at its end
    control/rescore/trigger.json        written by what starts runs, about twice a minute

They are told by `dynams status`. They are no part of the work: where they cannot be written, a warning says so.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from dynams_stream import schema, storage
from dynams_stream.errors import LeaseLostError, RoundExistsError, StoreBusyError
from dynams_stream.store import Store
from pipeline.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

MOST_TEXT = 2000
"""Characters of an error that are kept."""

Ending = Literal["published", "up to date", "not due", "failed", "stopped"]


@dataclass(frozen=True)
class LastRun:
    """The last run of `dynams rescore` that held the store, or tried to.

    Attributes:
        checkpoint: what it scored with; None when it found none.
        ending: how it ended.
        round: the checkpoint's round, where it has one.
        error: why it failed.
        failures: runs in a row that failed, this one included; one that was stopped is not counted.
        dealt_with: the last checkpoint that has its round, or that none was due for; failed runs leave it as it was.
        dealt_with_modified: when that one was written, in seconds since 1970.
        epoch_from: which names count as checkpoints (`--epoch-from`); None for all.
        began, ended: in UTC.
        host, pid: who ran.
    """

    checkpoint: str | None
    ending: Ending
    began: str
    ended: str
    round: int | None = None
    error: str | None = None
    failures: int = 0
    dealt_with: str | None = None
    dealt_with_modified: float | None = None
    epoch_from: str | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def __str__(self) -> str:
        what = f"{self.ending}, {self.ended}, {self.checkpoint or 'no checkpoint'}"
        if self.ending != "failed":
            return what
        return f"{what} ({self.failures} in a row): {self.error}"


@dataclass(frozen=True)
class TriggerState:
    """What starts runs of `dynams rescore`.

    Attributes:
        when: in words, such as "every 30m".
        checkpoints: the folder or file that runs take checkpoints from.
        began, seen: when it was started, and seen last, in UTC.
        next_run: when the next run is due, where that is known.
        ended: when it was stopped; None while it runs, or when it was killed.
        host, pid: where it runs.
    """

    when: str
    checkpoints: str
    began: str
    seen: str
    next_run: str | None = None
    ended: str | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def __str__(self) -> str:
        state = f"stopped {self.ended}" if self.ended else f"seen {self.seen}"
        due = f", next run {self.next_run}" if self.next_run and not self.ended else ""
        return f"{self.when} (process {self.pid} on {self.host}, {state}){due}"


class TriggerRecord:
    """Keeps a trigger's file up to date; several threads may tell of it."""

    def __init__(self, store: Store, when: str, checkpoints: str):
        self._store, self._lock = store, threading.Lock()
        self._trigger = TriggerState(when, storage.absolute(checkpoints), began=_text(), seen=_text())

    def seen(self, next_run: datetime | None) -> None:
        """It is alive, and the next run is due then; says nothing once it has ended."""
        with self._lock:
            if self._trigger.ended is None:
                due = None if next_run is None else _text(next_run)
                self._tell(replace(self._trigger, seen=_text(), next_run=due))

    def ended(self) -> None:
        """It was stopped."""
        with self._lock:
            self._tell(replace(self._trigger, seen=_text(), next_run=None, ended=_text()))

    def _tell(self, state: TriggerState) -> None:
        self._trigger = state
        _write(self._store, schema.TRIGGER_FILE, asdict(state))


class RunRecord:
    """What a run is at, for its record."""

    def __init__(self, store: Store, epoch_from: str | None = None):
        self._store, self._epoch_from, self._began = store, epoch_from, _text()
        self.checkpoint: Checkpoint | None = None

    def ended(self, ending: Ending, *, round: int | None = None, error: str | None = None) -> None:
        """Write how the run ended."""
        before, found = last_run(self._store), self.checkpoint
        known = _known(before) | {"epoch_from": self._epoch_from}
        if found is not None and ending in ("published", "up to date", "not due"):
            known |= {"dealt_with": found.url, "dealt_with_modified": found.modified}
        url, failures = None if found is None else found.url, _failures(ending, before)
        run = LastRun(url, ending, self._began, _text(), round=round, error=error, failures=failures, **known)
        _write(self._store, schema.LAST_RUN_FILE, asdict(run))


def _known(before: LastRun | None) -> dict[str, Any]:
    """What each run hands on to the next."""
    names = ("dealt_with", "dealt_with_modified", "epoch_from")
    return {} if before is None else {name: getattr(before, name) for name in names}


def _failures(ending: Ending, before: LastRun | None) -> int:
    earlier = 0 if before is None else before.failures
    return {"failed": earlier + 1, "stopped": earlier}.get(ending, 0)


@contextmanager
def recorded_run(store: Store, epoch_from: str | None = None) -> Iterator[RunRecord]:
    """Record that a run failed or was stopped when an error leaves the block; other endings are for the block to tell.

    A run that found the store busy leaves the record to the one that is at work.
    """
    record = RunRecord(store, epoch_from)
    try:
        yield record
    except (StoreBusyError, LeaseLostError, RoundExistsError):
        raise
    except Exception as error:
        record.ended("failed", error=f"{error}"[:MOST_TEXT] or type(error).__name__)
        raise
    except BaseException:
        record.ended("stopped")
        raise


def record_failure(store: Store, checkpoint: str | None, error: str) -> None:
    """Record that a run failed, where it could not do so itself."""
    before, now = last_run(store), _text()
    failures = _failures("failed", before)
    run = LastRun(checkpoint, "failed", now, now, error=error, failures=failures, **_known(before))
    _write(store, schema.LAST_RUN_FILE, asdict(run))


def last_run(store: Store) -> LastRun | None:
    """How the last run ended; None where none is recorded."""
    found = _read(store, schema.LAST_RUN_FILE)
    return None if found is None else _made(LastRun, found)


def trigger(store: Store) -> TriggerState | None:
    """What starts runs, or did last; None where none is recorded."""
    found = _read(store, schema.TRIGGER_FILE)
    return None if found is None else _made(TriggerState, found)


def _made(kind: Any, found: Mapping[str, Any]) -> Any:
    try:
        return kind(**found)
    except TypeError:  # of another version
        return None


def _read(store: Store, path: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(storage.read_bytes(store.path(path)))
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 (no JSON, or whatever a store's client raises: the work itself goes on)
        logger.warning(f"{store.path(path)} cannot be read: {error}; the next run writes it anew, where it can")
        return None
    return found if isinstance(found, dict) else None


def _write(store: Store, path: str, content: Mapping[str, Any]) -> None:
    try:
        storage.write_bytes(store.path(path), (json.dumps(content, indent=2) + "\n").encode(), durable=False)
    except Exception as error:  # noqa: BLE001 (whatever a store's client raises: the work itself goes on)
        logger.warning(f"{store.path(path)} could not be written: {error}")


def _text(time: datetime | None = None) -> str:
    return (time or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
