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
import numpy.typing as npt

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

_LEAST_WAITING, _MOST_WAITING = 1 << 16, 1 << 21
"""New entries that are gathered before they are summed up: half as many as there are, within these bounds."""
_BLOCK = 1 << 20
"""Entries that are looked at together."""


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
    all_samples = samples.result()
    labels, of_class = all_samples.keys, all_samples.counts
    if len(labels) > MOST_CLASSES:
        raise UsageError(f"{len(labels)} distinct labels are no classes to balance; at most {MOST_CLASSES} can be")
    entries = high.result()
    scored = _class_totals(entries, labels)
    selected = min(wanted, int(scored.sum()))
    quota = settle_quotas(quotas, selected, of_class, scored, labels != NO_LABEL)
    rest = selected - int(quota.sum())

    everywhere = np.ones(len(labels), dtype=np.bool_)
    class_bins, before, free = _settle(entries, labels, quota, scored, everywhere)
    del entries, high
    common_bin, common_before = _kth_free(free, rest)
    low, common = _Sum(), _Sum()
    task = partial(low_counts, strategy=strategy, labels=labels, bins=class_bins, common_bin=common_bin)
    for inside in ordered_map(task, parts):
        low.add(inside.of_class)
        common.add(inside.common)
    entries, inside_quota = low.result(), quota - before
    # Free in the common bin: all of the classes that end before it, and what the quotas leave of those that end in it.
    class_lows, before_inside, free = _settle(
        entries, labels, inside_quota, _class_totals(entries, labels), class_bins == common_bin
    )
    of_others = common.result()
    free[of_others.keys] += of_others.counts
    keys = np.where(quota > 0, class_bins << 16 | class_lows, -1)
    common_low, common_before_inside = _kth_free(free, rest - common_before)
    return ClassCut(
        thresholds=ClassThresholds(labels, keys, common_bin << 16 | common_low if rest else -1),
        ties_taken=np.where(quota > 0, inside_quota - before_inside, 0),
        common_ties=int(free[common_low]) if rest else 0,
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


def _blocks(entries: KeyCounts, labels: Counts) -> Iterator[tuple[Counts, Counts, Counts]]:
    """The class, as its place in `labels`, the bin and the count of each entry, by blocks: there are many entries."""
    for first in range(0, len(entries.keys), _BLOCK):
        keys = entries.keys[first : first + _BLOCK]
        yield np.searchsorted(labels, label_of(keys)), keys & 0xFFFF, entries.counts[first : first + _BLOCK]


def _class_totals(entries: KeyCounts, labels: Counts) -> Counts:
    """The samples of each class."""
    totals = np.zeros(len(labels), dtype=np.int64)
    for slots, _, counts in _blocks(entries, labels):
        totals += np.bincount(slots, weights=counts, minlength=len(labels)).astype(np.int64)
    return totals


def _settle(
    entries: KeyCounts, labels: Counts, quota: Counts, totals: Counts, is_free: npt.NDArray[np.bool_]
) -> tuple[Counts, Counts, Counts]:
    """Where each class's quota ends, and what the quotas leave.

    Args:
        entries: samples by label · 2¹⁶ + bin.
        labels: of the classes, ascending.
        quota: of each class, at most all its samples.
        totals: of each class, all its samples.
        is_free: the classes whose other samples are free to be taken whatever their class.

    Returns:
        For each class the bin that holds the last sample of its quota (−1 for no quota), and how many of its samples
        lie before that bin; and for each bin the free samples in it.
    """
    last, before = np.full(len(labels), -1, dtype=np.int64), np.zeros(len(labels), dtype=np.int64)
    free = np.zeros(1 << 16, dtype=np.int64)
    base, done = np.cumsum(totals) - totals, 0
    for slots, bins, counts in _blocks(entries, labels):
        earlier = done + np.cumsum(counts) - counts - base[slots]  # samples of the class in the bins before
        done += int(counts.sum())
        taken = np.clip(quota[slots] - earlier, 0, counts)
        ends = (taken > 0) & (earlier + counts >= quota[slots])
        last[slots[ends]], before[slots[ends]] = bins[ends], earlier[ends]
        free += np.bincount(bins, weights=(counts - taken) * is_free[slots], minlength=len(free)).astype(np.int64)
    return last, before, free


def _kth_free(free: Counts, k: int) -> tuple[int, int]:
    """The bin that holds the k-th of all free samples (−1 for k = 0), and how many lie before it."""
    if k == 0:
        return -1, 0
    cumulative = np.cumsum(free)
    place = int(np.searchsorted(cumulative, k))
    return place, int(cumulative[place] - free[place])


class _Sum:
    """Sparse counts by an int64, summed over parts.

    Most of a part's keys have come before, and are added in place. New ones wait, so that the others are moved seldom.
    """

    def __init__(self) -> None:
        self._keys = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._new: list[KeyCounts] = []
        self._waiting = 0

    def add(self, counts: KeyCounts) -> None:
        """Add what one part has."""
        places = np.searchsorted(self._keys, counts.keys)
        known = np.zeros(len(places), dtype=np.bool_)
        inside = places < len(self._keys)
        known[inside] = self._keys[places[inside]] == counts.keys[inside]
        self._counts[places[known]] += counts.counts[known]
        self._new.append(KeyCounts(counts.keys[~known], counts.counts[~known]))
        self._waiting += len(self._new[-1].keys)
        if self._waiting > min(max(len(self._keys) // 2, _LEAST_WAITING), _MOST_WAITING):
            self._take_in()

    def result(self) -> KeyCounts:
        """Distinct keys, ascending, and the sum of each."""
        self._take_in()
        return KeyCounts(self._keys, self._counts)

    def _take_in(self) -> None:
        new, self._new, self._waiting = _merged(self._new), [], 0
        places = np.searchsorted(self._keys, new.keys)
        self._keys = np.insert(self._keys, places, new.keys)
        self._counts = np.insert(self._counts, places, new.counts)


def _merged(several: Iterable[KeyCounts]) -> KeyCounts:
    """The sum of sparse counts."""
    found = list(several)
    keys = np.concatenate([np.zeros(0, dtype=np.int64), *(one.keys for one in found)])
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(one.counts for one in found)])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1)) if len(keys) else np.zeros(0, dtype=np.int64)
    return KeyCounts(keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts)
