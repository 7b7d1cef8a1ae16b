"""What `dynams rescore` leaves for those who watch over it: how its last run ended, and what starts the next one.

    control/rescore/last_run.json       written by each run at its end
    control/rescore/trigger.json        written by what starts runs, about twice a minute

They are told by `dynams status`. They are no part of the work: where they cannot be written, a warning says so.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from dynams_stream import schema, storage
from dynams_stream.errors import LeaseLostError, RoundExistsError, StoreBusyError, UsageError
from dynams_stream.store import Store

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
        failures: runs in a row that failed, this one included.
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
    """Keeps a trigger's file up to date."""

    def __init__(self, store: Store, when: str, checkpoints: str):
        self._store = store
        self._trigger = TriggerState(when, storage.absolute(checkpoints), began=_text(), seen=_text())

    def seen(self, next_run: datetime | None) -> None:
        """It is alive, and the next run is due then."""
        due = None if next_run is None else _text(next_run)
        self._trigger = replace(self._trigger, seen=_text(), next_run=due)
        _write(self._store, schema.TRIGGER_FILE, asdict(self._trigger))

    def ended(self) -> None:
        """It was stopped."""
        _write(self._store, schema.TRIGGER_FILE, asdict(replace(self._trigger, seen=_text(), ended=_text())))


class RunRecord:
    """What a run is at, for its record."""

    def __init__(self, store: Store):
        self._store, self._began = store, _text()
        self.checkpoint: str | None = None

    def ended(self, ending: Ending, *, round: int | None = None, error: str | None = None) -> None:
        """Write how the run ended."""
        before = last_run(self._store)
        failures = (0 if before is None else before.failures) + 1 if ending == "failed" else 0
        run = LastRun(self.checkpoint, ending, self._began, _text(), round=round, error=error, failures=failures)
        _write(self._store, schema.LAST_RUN_FILE, asdict(run))


@contextmanager
def recorded_run(store: Store) -> Iterator[RunRecord]:
    """Record that a run failed or was stopped when an error leaves the block; other endings are for the block to tell.

    A run that found the store busy leaves the record to the one that is at work, and wrong usage is no run.
    """
    record = RunRecord(store)
    try:
        yield record
    except (StoreBusyError, LeaseLostError, RoundExistsError, UsageError):
        raise
    except Exception as error:
        record.ended("failed", error=f"{error}"[:MOST_TEXT] or type(error).__name__)
        raise
    except BaseException:
        record.ended("stopped")
        raise


def record_crash(store: Store, checkpoint: str | None, status: int) -> None:
    """Record that a run's process was ended by a signal (a negative `status`), which it could not do itself."""
    record = RunRecord(store)
    record.checkpoint = checkpoint
    record.ended("failed", error=f"its process was ended by signal {-status} ({signal.Signals(-status).name})")


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
    except ValueError as error:
        logger.warning(f"{store.path(path)}: not JSON ({error}); it is written anew by the next run")
        return None
    return found if isinstance(found, dict) else None


def _write(store: Store, path: str, content: Mapping[str, Any]) -> None:
    try:
        storage.write_bytes(store.path(path), (json.dumps(content, indent=2) + "\n").encode(), durable=False)
    except Exception as error:  # noqa: BLE001 (whatever a store's client raises: the work itself goes on)
        logger.warning(f"{store.path(path)} could not be written: {error}")


def _text(time: datetime | None = None) -> str:
    return (time or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
