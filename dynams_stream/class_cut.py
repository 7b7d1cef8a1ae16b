"""The exact cut with quotas: so many of the smallest scores of each class, then the smallest of what is left.

The same three reads of each part as `cut`, with counts kept by class:

    pass 1   counts of (class, high bits)       → each class's quota, its threshold's bin, the common threshold's bin
    pass 2   counts of (class, low bits) there  → each class's threshold, and the common one
    pass 3   each part's positions below them, and the ties at them, which the driver gives out in order

Counts are sparse: scores fill some thousands of the 65,536 bins, classes some hundreds each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dynams_stream.class_cut_part import (
    ClassThresholds,
    KeyCounts,
    class_candidates,
    high_counts,
    label_of,
    low_counts,
    rank_within,
)
from dynams_stream.class_quotas import ClassQuotas, settle_quotas
from dynams_stream.cut_part import MOST_CLASSES, NO_LABEL, Counts, PartSelection, ScorePart, count_labels
from dynams_stream.errors import UsageError
from dynams_stream.ordered_map import OrderedMap
from dynams_stream.strategy import Strategy

_PENDING = 1 << 22
"""Entries that are gathered, at least, before they are summed up."""


@dataclass(frozen=True, eq=False)
class ClassCut:
    """Where the cut lies.

    Attributes:
        thresholds: of each class, and the common one.
        ties_taken: int64, shape (classes,): how many of the ties at its threshold each class gives by its quota.
        common_ties, common_ties_taken: free samples with the common threshold's score, and how many of them are taken.
        scored: samples that can be selected.
        selected: k.
    """

    thresholds: ClassThresholds
    ties_taken: Counts
    common_ties: int
    common_ties_taken: int
    scored: int
    selected: int


def find_class_cut(
    parts: Sequence[ScorePart], strategy: Strategy, wanted: int, quotas: ClassQuotas, ordered_map: OrderedMap
) -> ClassCut:
    """Passes 1 and 2.

    Args:
        parts: all parts of the dataset, in order.
        strategy: an expression; a random order knows no classes.
        wanted: ⌈γN⌉.
        quotas: what is asked of the classes.
        ordered_map: as for `exact_cut`.

    Raises:
        UsageError: a random order, minima that are more than k, or labels that are no classes.
    """
    if strategy.seed is not None:
        raise UsageError("a random order reads no labels: class_balance and min_per_class need scores to select on")
    high, samples = _Sum(), _Sum()
    for found in ordered_map(partial(high_counts, strategy=strategy), parts):
        high.add(found.scored)
        samples.add(found.samples)
    labels, of_class = samples.result()
    if len(labels) > MOST_CLASSES:
        raise UsageError(f"{len(labels)} distinct labels are no classes to balance; at most {MOST_CLASSES} can be")
    entries, counts = high.result()
    slots, bins = np.searchsorted(labels, label_of(entries)), entries & 0xFFFF
    scored = np.bincount(slots, weights=counts, minlength=len(labels)).astype(np.int64)
    selected = min(wanted, int(counts.sum()))
    quota = settle_quotas(quotas, selected, of_class, scored, labels != NO_LABEL)
    rest = selected - int(quota.sum())

    class_bins, before = _kth(slots, bins, counts, quota)
    common_bin, common_before = _kth_free(bins, counts - _taken(slots, counts, quota), rest)
    low, common = _Sum(), _Sum()
    task = partial(low_counts, strategy=strategy, labels=labels, bins=class_bins, common_bin=common_bin)
    for inside in ordered_map(task, parts):
        low.add(inside.of_class)
        common.add(inside.common)
    entries, counts = low.result()
    slots, lows = np.searchsorted(labels, label_of(entries)), entries & 0xFFFF
    inside_quota = quota - before
    class_lows, before_inside = _kth(slots, lows, counts, inside_quota)
    keys = np.where(quota > 0, class_bins << 16 | class_lows, -1)
    # Free in the common bin: all of the classes that end before it, and what the quotas leave of those that end in it.
    shared = class_bins[slots] == common_bin
    free_counts = np.concatenate([common.result()[1], (counts - _taken(slots, counts, inside_quota))[shared]])
    free_lows = np.concatenate([common.result()[0], lows[shared]])
    common_low, common_before_inside = _kth_free(free_lows, free_counts, rest - common_before)
    return ClassCut(
        thresholds=ClassThresholds(labels, keys, common_bin << 16 | common_low if rest else -1),
        ties_taken=np.where(quota > 0, inside_quota - before_inside, 0),
        common_ties=int(free_counts[free_lows == common_low].sum()) if rest else 0,
        common_ties_taken=rest - common_before - common_before_inside if rest else 0,
        scored=int(scored.sum()),
        selected=selected,
    )


def positions_by_class(
    parts: Sequence[ScorePart], strategy: Strategy, cut: ClassCut, ordered_map: OrderedMap
) -> Iterator[PartSelection]:
    """Pass 3: what is selected of each part, in order."""
    task = partial(
        class_candidates, strategy=strategy, thresholds=cut.thresholds, ties=cut.ties_taken,
        common_ties=cut.common_ties_taken,
    )  # fmt: skip
    left, common_left = cut.ties_taken.copy(), cut.common_ties_taken
    at_common = cut.thresholds.keys == cut.thresholds.common
    for found in ordered_map(task, parts):
        by_quota = np.zeros(len(found.ties), dtype=np.bool_)
        own = np.flatnonzero(found.is_class_tie)
        by_quota[own] = rank_within(found.tie_slots[own]) < left[found.tie_slots[own]]
        left -= np.bincount(found.tie_slots[by_quota], minlength=len(left))
        competing = ~by_quota & (~found.is_class_tie | at_common[found.tie_slots])
        taken = by_quota.copy()
        taken[np.flatnonzero(competing)[:common_left]] = True
        common_left -= int((taken & ~by_quota).sum())
        positions = np.sort(np.concatenate([found.certain, found.ties[taken]])).astype(np.uint32)
        tie_labels = count_labels(cut.thresholds.labels[found.tie_slots[taken]])
        yield PartSelection(positions, found.all_labels, (found.certain_labels, tie_labels))


def _kth(slots: Counts, bins: Counts, counts: Counts, wanted: Counts) -> tuple[Counts, Counts]:
    """For each class the bin that holds its `wanted`-th entry (−1 for none wanted), and how many lie before that bin.

    Args:
        slots, bins, counts: entries, sorted by class and bin.
        wanted: by class, at most the class's sum.
    """
    totals = np.bincount(slots, weights=counts, minlength=len(wanted)).astype(np.int64)
    base = np.cumsum(totals) - totals
    cumulative = np.cumsum(counts)
    some = wanted > 0
    found, before = np.full(len(wanted), -1, dtype=np.int64), np.zeros(len(wanted), dtype=np.int64)
    places = np.searchsorted(cumulative, base[some] + wanted[some])
    found[some] = bins[places]
    before[some] = cumulative[places] - counts[places] - base[some]
    return found, before


def _taken(slots: Counts, counts: Counts, quota: Counts) -> Counts:
    """How many samples of each entry (sorted by class and bin) go to its class's quota."""
    totals = np.bincount(slots, weights=counts, minlength=len(quota)).astype(np.int64)
    base = np.cumsum(totals) - totals
    before = np.cumsum(counts) - counts - base[slots]
    taken: Counts = np.clip(quota[slots] - before, 0, counts)
    return taken


def _kth_free(bins: Counts, counts: Counts, k: int) -> tuple[int, int]:
    """The bin that holds the k-th of all entries by bin (−1 for k = 0), and how many lie before it."""
    if k == 0:
        return -1, 0
    dense = np.bincount(bins, weights=counts, minlength=1 << 16).astype(np.int64)
    cumulative = np.cumsum(dense)
    place = int(np.searchsorted(cumulative, k))
    return place, int(cumulative[place] - dense[place])


class _Sum:
    """Sparse counts by an int64, summed over parts."""

    def __init__(self) -> None:
        self._total = _merged([])
        self._pending: list[KeyCounts] = []
        self._entries = 0

    def add(self, counts: KeyCounts) -> None:
        self._pending.append(counts)
        self._entries += len(counts.keys)
        # As many as the sum has, so that a large one is not gone through for every part.
        if self._entries > max(_PENDING, len(self._total.keys)):
            self._compact()

    def result(self) -> tuple[Counts, Counts]:
        """Distinct keys, ascending, and the sum of each."""
        self._compact()
        return self._total.keys, self._total.counts

    def _compact(self) -> None:
        self._total = _merged([self._total, *self._pending])
        self._pending, self._entries = [], 0


def _merged(several: Iterable[KeyCounts]) -> KeyCounts:
    """The sum of sparse counts."""
    found = list(several)
    keys = np.concatenate([np.zeros(0, dtype=np.int64), *(one.keys for one in found)])
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(one.counts for one in found)])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1)) if len(keys) else np.zeros(0, dtype=np.int64)
    return KeyCounts(keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts)
