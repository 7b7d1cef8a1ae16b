"""What one scored part reports. It travels back to the driver, and stays in the score table's metadata."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = ("read", "decode", "forward", "write")
"""Where the time of a scoring job goes."""


@dataclass(frozen=True)
class BadShard:
    """A shard that was left out of a round, since it could not be read twice.

    Attributes:
        shard: its number in the dataset.
        url: as it was indexed.
        reason: why it could not be read.
    """

    shard: int
    url: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    """What one scored part reports; it is kept in the table's metadata.

    Attributes:
        part: number of the part.
        samples: lines written, one per sample.
        failed: lines without scores.
        unread: how many of them belong to bad shards: nobody has looked at these samples.
        labelled: lines with a label.
        seconds: read, decode, forward, write (thread seconds, so their sum can exceed the wall time).
        errors: the first failed samples, each with shard, row, key and reason; none of bad shards.
        bad_shards: those of the part that could not be read.
        provenance: what is recorded but does not decide the scores: checkpoint's path, epoch, start.
    """

    part: int
    samples: int
    failed: int
    labelled: int
    seconds: Mapping[str, float]
    errors: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unread: int = 0
    bad_shards: tuple[BadShard, ...] = ()

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """The receipt that a score table's metadata holds.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        found = json.loads(text)
        bad_shards = tuple(BadShard(**shard) for shard in found.pop("bad_shards", ()))
        return cls(**{**found, "errors": tuple(found["errors"]), "bad_shards": bad_shards})


def bad_shards(receipts: Iterable[Receipt]) -> tuple[BadShard, ...]:
    """The shards that some parts were scored without, in their order."""
    return tuple(sorted((shard for receipt in receipts for shard in receipt.bad_shards), key=lambda bad: bad.shard))


def failed_samples(receipts: Iterable[Receipt]) -> int:
    """Samples that were looked at and have no scores."""
    return sum(receipt.failed - receipt.unread for receipt in receipts)


def allowed_failures(max_errors: int | None, samples: int) -> int:
    """How many of a dataset's samples may fail: as many as is asked for, or 1 % and at least 10."""
    return max(10, samples // 100) if max_errors is None else max_errors


def first_errors(receipts: Iterable[Receipt]) -> tuple[str, ...]:
    """The first failed samples of a round."""
    return tuple(error for receipt in sorted(receipts, key=lambda one: one.part) for error in receipt.errors)[:20]


def name_bad_shards(shards: Iterable[BadShard]) -> str:
    """The first bad shards and why they are, a line each."""
    return "".join(f"\n  shard {bad.shard}: {bad.reason}" for bad in list(shards)[:50])


def total_seconds(receipts: Iterable[Receipt]) -> dict[str, float]:
    """Seconds of each step, added up over parts."""
    totals = dict.fromkeys(STEPS, 0.0)
    for receipt in receipts:
        for name, seconds in receipt.seconds.items():
            totals[name] += seconds
    return totals


class Clock:
    """Seconds of each step, added up from several threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self._lock = threading.Lock()

    def timed(self, name: str) -> _Timed:
        """A context manager whose duration is added to step `name`."""
        return _Timed(self, name)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to step `name`."""
        with self._lock:
            self.seconds[name] += seconds


class _Timed:
    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._clock.add(self._name, time.perf_counter() - self._started)
