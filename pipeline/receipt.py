"""What one scored part reports. It travels back to the driver, and stays in the score table's metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = ("read", "decode", "forward", "write")
"""Where the time of a scoring job goes."""


@dataclass(frozen=True)
class Receipt:
    """What one scored part reports; it is kept in the table's metadata.

    Attributes:
        part: number of the part.
        samples: lines written, one per sample.
        failed: lines without scores.
        seconds: read, decode, forward, write (thread seconds, so their sum can exceed the wall time).
        errors: the first failed samples, each with shard, row, key and reason.
        provenance: what is recorded but does not decide the scores: checkpoint's path, epoch, start.
    """

    part: int
    samples: int
    failed: int
    seconds: Mapping[str, float]
    errors: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def total_seconds(receipts: Iterable[Receipt]) -> dict[str, float]:
    """Seconds of each step, added up over parts."""
    totals = dict.fromkeys(STEPS, 0.0)
    for receipt in receipts:
        for name, seconds in receipt.seconds.items():
            totals[name] += seconds
    return totals
