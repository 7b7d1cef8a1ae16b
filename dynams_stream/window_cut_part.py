"""The one-read cut's work on one part: which samples lie below a window of keys, and which inside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dynams_stream.cut_part import Counts, Keys, Labels, ScorePart, checked_keys, count_labels, count_scored, part_keys
from dynams_stream.strategy import Strategy

NO_COUNTS: tuple[Counts, Counts] = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
"""Of no labels."""


@dataclass(frozen=True)
class Window:
    """Keys from `low` to `high`, both included; none is `NOT_SCORED`."""

    low: int
    high: int


@dataclass(frozen=True, eq=False)
class PartWindow:
    """One part as a window of keys splits it.

    Attributes:
        samples: how many it has.
        scored: how many of them can be selected.
        below_bits: uint8, one bit for each sample: whether its key is below the window.
        below_count: how many are.
        positions: uint32, ascending places in the part of those inside the window.
        keys: uint32, theirs.
        labels: theirs, or `NO_LABEL`; empty when the part has no labels.
        all_labels: distinct labels of the part, and how often each occurs.
        below_labels: the same for the samples below the window.
    """

    samples: int
    scored: int
    below_bits: npt.NDArray[np.uint8]
    below_count: int
    positions: npt.NDArray[np.uint32]
    keys: Keys
    labels: Labels
    all_labels: tuple[Counts, Counts]
    below_labels: tuple[Counts, Counts]

    @property
    def bytes(self) -> int:
        """What it takes without the counts of labels."""
        return self.below_bits.nbytes + self.positions.nbytes + self.keys.nbytes + self.labels.nbytes

    def without_label_counts(self) -> PartWindow:
        """The same without them: summed over the parts they are small, kept for each they are not."""
        return replace(self, all_labels=NO_COUNTS, below_labels=NO_COUNTS)

    def below(self) -> npt.NDArray[np.bool_]:
        """Whether each sample's key is below the window."""
        return np.unpackbits(self.below_bits, count=self.samples).view(np.bool_)


def sampled_keys(part: ScorePart, strategy: Strategy, most: int) -> Keys:
    """At most so many of the part's keys, at even ranks, ascending; those that are not scored are among them."""
    keys = np.sort(part_keys(part, strategy))
    return keys[np.linspace(0, len(keys) - 1, min(most, len(keys))).astype(np.int64)]


def split_by_window(part: ScorePart, strategy: Strategy, window: Window) -> PartWindow:
    """Read a part and split it. Checks the part's lines as well."""
    keys, labels = checked_keys(part, strategy)
    below = keys < window.low
    above_low = keys - np.uint32(window.low)  # keys below the window wrap around, to more than any above it
    inside = np.flatnonzero(above_low <= np.uint32(window.high - window.low)).astype(np.uint32)
    places = np.flatnonzero(below)
    return PartWindow(
        samples=len(keys),
        scored=count_scored(part, keys, strategy),
        below_bits=np.packbits(below),
        below_count=len(places),
        positions=inside,
        keys=keys[inside],
        labels=labels[inside] if len(labels) else labels,
        all_labels=count_labels(labels),
        below_labels=count_labels(labels[places] if len(labels) else labels),
    )
