"""The exact cut in one read of each part, where a few parts tell beforehand between which scores the threshold lies.

    some parts   keys at even ranks       → a window of keys that holds the k-th smallest in all likelihood
    every part   keys below the window    → selected in any case: a bit for each sample
                 keys inside it           → kept, with place and label: some thousandths of all samples
    the driver   k-th smallest            → among the keys inside; the parts' rows follow without another read

Nothing rests on likelihood: how many keys lie below the window and inside it is counted, and where the k-th smallest is
not inside, or too much is, there is no result, and `cut` reads the parts three times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dynams_stream.class_counts import ClassCounts
from dynams_stream.cut_part import NOT_SCORED, PartSelection, ScorePart, Threshold, count_labels
from dynams_stream.ordered_map import OrderedMap
from dynams_stream.strategy import Strategy
from dynams_stream.window_cut_part import NO_COUNTS, PartWindow, Window, sampled_keys, split_by_window

SAMPLED_PARTS = 16
"""Parts that tell where the window lies."""
SAMPLED_KEYS = 4096
"""Keys that each of them gives."""
LEAST_PARTS = 4 * SAMPLED_PARTS
"""With fewer parts, looking at some of them beforehand saves little."""
MOST_BYTES = 256 << 20
"""What may be held of all parts together: the bits of 10⁹ samples, say, and 10⁷ samples inside the window. While the
threshold is looked for, two thirds more."""
_DEVIATIONS = 5.0
"""Half the window's width, in standard deviations of the share of samples below it, as the parts differ in that."""
_INSIDE_BYTES = 12
"""Of a sample inside the window: place, key, label."""


@dataclass(frozen=True, eq=False)
class WindowCut:
    """A cut whose threshold is settled, and what is selected by it.

    Attributes:
        threshold: the k-th smallest key.
        classes: counts of all samples, and of the selected ones below the window.
        parts: what was read, in order.
    """

    threshold: Threshold
    classes: ClassCounts
    parts: Sequence[PartWindow]

    def selections(self) -> Iterator[PartSelection]:
        """What is selected of each part, in order; labels of those inside the window alone, the others are counted."""
        left = self.threshold.ties_taken
        for part in self.parts:
            tied = np.flatnonzero(part.keys == self.threshold.key)[:left]
            left -= len(tied)
            chosen = part.keys < self.threshold.key
            chosen[tied] = True
            selected = part.below()
            selected[part.positions[chosen]] = True
            labels = count_labels(part.labels[chosen] if len(part.labels) else part.labels)
            yield PartSelection(np.flatnonzero(selected).astype(np.uint32), NO_COUNTS, (labels,))


def cut_by_window(
    parts: Sequence[ScorePart], strategy: Strategy, wanted: int, ordered_map: OrderedMap
) -> WindowCut | None:
    """The k smallest keys, found in one read of each part; None where they have to be looked for in three.

    Args:
        parts: all parts of the dataset, in order.
        strategy: what to rank by.
        wanted: k, if so many samples have a score.
        ordered_map: as for `cut.exact_cut`.
    """
    samples = sum(part.samples for part in parts)
    if len(parts) < LEAST_PARTS or wanted == 0 or samples / 8 > MOST_BYTES:
        return None
    window, inside = guess_window(parts, strategy, wanted / samples, ordered_map)
    if inside == 0 or samples * (1 / 8 + inside * _INSIDE_BYTES) > MOST_BYTES:
        return None
    return _cut_within(window, parts, strategy, wanted, ordered_map)


def guess_window(
    parts: Sequence[ScorePart], strategy: Strategy, share: float, ordered_map: OrderedMap
) -> tuple[Window, float]:
    """Where a few parts, evenly spread, have the key that `share` of all keys do not exceed.

    Returns:
        A window around that key, and which share of all samples it holds by those parts: 0 where they have no scores.
    """
    mean = sum(part.samples for part in parts) / len(parts)
    large = [part for part in parts if part.samples >= mean / 2]  # a short last part would tell little
    places = np.linspace(0, len(large) - 1, min(SAMPLED_PARTS, len(large))).astype(np.int64)
    chosen = [large[place] for place in places]
    sampled = list(ordered_map(partial(sampled_keys, strategy=strategy, most=SAMPLED_KEYS), chosen))
    sizes, lengths = np.array([part.samples for part in chosen]), np.array([len(some) for some in sampled])
    keys, weights = np.concatenate(sampled), np.repeat(sizes / lengths, lengths)
    order = np.argsort(keys, kind="stable")
    keys, shares = keys[order], np.cumsum(weights[order]) / sizes.sum()
    scored = int(np.searchsorted(keys, NOT_SCORED))
    if scored == 0:
        return Window(0, 0), 0.0
    middle = min(share, float(shares[scored - 1]))
    at = keys[_place(shares, middle)]
    of_parts = np.array([np.searchsorted(some, at, side="right") / len(some) for some in sampled])
    margin = _DEVIATIONS * float(of_parts.std()) / math.sqrt(len(chosen)) + 2 / float(lengths.min())
    low = 0 if middle <= margin else int(keys[_place(shares, middle - margin)])
    high = int(NOT_SCORED) - 1
    if middle + margin < shares[scored - 1]:
        high = int(keys[_place(shares, middle + margin)])
    first, stop = np.searchsorted(keys, low), np.searchsorted(keys, high, side="right")
    return Window(low, high), float(weights[order][first:stop].sum() / sizes.sum())


def _place(shares: np.ndarray, share: float) -> int:
    """The first key that so large a share of the keys does not exceed."""
    return min(int(np.searchsorted(shares, share)), len(shares) - 1)


def _cut_within(
    window: Window, parts: Sequence[ScorePart], strategy: Strategy, wanted: int, ordered_map: OrderedMap
) -> WindowCut | None:
    classes, held, room = ClassCounts(), [], MOST_BYTES
    scored = below = 0
    for found in ordered_map(partial(split_by_window, strategy=strategy, window=window), parts):
        room -= found.bytes
        if room < 0:
            return None
        scored += found.scored
        below += found.below_count
        classes.add(found.all_labels, found.below_labels)
        held.append(found.without_label_counts())
    selected = min(wanted, scored)
    threshold = _kth(selected, scored, below, held)
    return None if threshold is None else WindowCut(threshold, classes, held)


def _kth(selected: int, scored: int, below: int, held: Sequence[PartWindow]) -> Threshold | None:
    """The k-th smallest key, if it lies in the window."""
    keys = np.concatenate([part.keys for part in held])
    place = selected - below - 1
    if not 0 <= place < len(keys):
        return None
    keys.partition(place)
    key = int(keys[place])
    before = np.count_nonzero(keys < key)
    return Threshold(
        selected=selected,
        scored=scored,
        key=key,
        ties=int(np.count_nonzero(keys == key)),
        ties_taken=int(place + 1 - before),
    )
