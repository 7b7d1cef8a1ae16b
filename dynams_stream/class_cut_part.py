"""The work of a cut with class quotas on one part: sparse counts by class and bits of the key, and candidates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynams_stream.cut_part import BINS, NO_LABEL, NOT_SCORED, Counts, Keys, ScorePart, count_labels, labelled_keys
from dynams_stream.strategy import Strategy


@dataclass(frozen=True, eq=False)
class KeyCounts:
    """Distinct int64, ascending, and how often each occurs."""

    keys: Counts
    counts: Counts


@dataclass(frozen=True, eq=False)
class HighCounts:
    """Pass 1: samples by label, and scored samples by label · 2¹⁶ + high bits."""

    samples: KeyCounts
    scored: KeyCounts


@dataclass(frozen=True, eq=False)
class LowCounts:
    """Pass 2: samples by label · 2¹⁶ + low bits in their class's bin; by low bits alone in the common bin."""

    of_class: KeyCounts
    common: KeyCounts


@dataclass(frozen=True, eq=False)
class ClassThresholds:
    """Keys up to which is selected.

    Attributes:
        labels: int64, ascending, shape (classes,).
        keys: int64, the quota's last key of each class; −1 for no quota.
        common: the last key of what scores decide on, whatever the class; −1 for nothing.
    """

    labels: Counts
    keys: Counts
    common: int


@dataclass(frozen=True, eq=False)
class ClassCandidates:
    """Pass 3: what one part has.

    Attributes:
        certain: int64, ascending positions that are selected.
        ties: int64, ascending positions that may be.
        tie_slots: of each tie the number of its class.
        is_class_tie: whether it ties at its class's threshold; else at the common one.
        all_labels: distinct labels of the part, and how often each occurs.
        certain_labels: the same for `certain`.
    """

    certain: npt.NDArray[np.int64]
    ties: npt.NDArray[np.int64]
    tie_slots: npt.NDArray[np.int64]
    is_class_tie: npt.NDArray[np.bool_]
    all_labels: tuple[Counts, Counts]
    certain_labels: tuple[Counts, Counts]


def label_of(entries: Counts) -> Counts:
    """The label in `label · 2¹⁶ + bits`."""
    return entries >> 16


def high_counts(part: ScorePart, strategy: Strategy) -> HighCounts:
    """Pass 1 over one part. Checks its lines as well."""
    keys, labels = labelled_keys(part, strategy, check_lines=True)
    scored = keys != NOT_SCORED
    return HighCounts(_counted(labels), _counted((labels << 16 | _high(keys))[scored]))


def low_counts(part: ScorePart, strategy: Strategy, labels: Counts, bins: Counts, common_bin: int) -> LowCounts:
    """Pass 2 over one part.

    Args:
        labels: all labels of the dataset, ascending.
        bins: the bin of each class's threshold; −1 for no quota.
        common_bin: that of the common threshold; −1 for none.
    """
    keys, own = labelled_keys(part, strategy)
    high, low = _high(keys), (keys & np.uint32(0xFFFF)).astype(np.int64)
    bin_of_class = bins[class_slots(labels, own)]
    scored = keys != NOT_SCORED
    return LowCounts(
        _counted((own << 16 | low)[scored & (high == bin_of_class)]),
        _counted(low[scored & (high == common_bin) & (bin_of_class < common_bin)]),
    )


def class_candidates(
    part: ScorePart, strategy: Strategy, thresholds: ClassThresholds, ties: Counts, common_ties: int
) -> ClassCandidates:
    """Pass 3 over one part.

    Args:
        thresholds: where the cut lies.
        ties: how many ties at its threshold each class gives at most.
        common_ties: how many at the common one are given.
    """
    keys, labels = labelled_keys(part, strategy)
    slots = class_slots(thresholds.labels, labels)
    scored, key, own = keys != NOT_SCORED, keys.astype(np.int64), thresholds.keys[slots]
    certain = scored & ((key < own) | (key < thresholds.common))
    class_tie = scored & ~certain & (key == own)
    common_tie = scored & ~certain & ~class_tie & (key == thresholds.common)
    # No more than could be given: a class's own, and where its threshold is the common one those, too.
    most = ties + np.where(thresholds.keys == thresholds.common, common_ties, 0)
    places = np.flatnonzero(class_tie)
    kept = np.zeros(len(keys), dtype=np.bool_)
    kept[places[rank_within(slots[places]) < most[slots[places]]]] = True
    kept[np.flatnonzero(common_tie)[:common_ties]] = True
    chosen = np.flatnonzero(kept)
    return ClassCandidates(
        certain=np.flatnonzero(certain),
        ties=chosen,
        tie_slots=slots[chosen],
        is_class_tie=class_tie[chosen],
        all_labels=count_labels(labels),
        certain_labels=count_labels(labels[certain]),
    )


def class_slots(classes: Counts, labels: Counts) -> Counts:
    """The place of each label among the classes, ascending, that all of them belong to."""
    numbered = classes[classes != NO_LABEL]
    if len(numbered) and numbered[0] >= 0 and numbered[-1] < 16 * BINS:  # looked up, which searching takes long for
        places = np.zeros(int(numbered[-1]) + 2, dtype=np.int64)  # the first is that of `NO_LABEL`, which is below all
        places[numbered + 1] = np.arange(len(classes) - len(numbered), len(classes))
        found: Counts = places[np.maximum(labels, -1) + 1]
        return found
    return np.searchsorted(classes, labels)


def rank_within(slots: Counts) -> Counts:
    """For each entry, how many before it have its slot."""
    order = np.argsort(slots, kind="stable")
    ordered = slots[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(np.append(starts, len(ordered)))
    ranks = np.empty(len(slots), dtype=np.int64)
    ranks[order] = np.arange(len(slots)) - np.repeat(starts, lengths)
    return ranks


def _high(keys: Keys) -> Counts:
    return (keys >> np.uint32(16)).astype(np.int64)


def _counted(values: Counts) -> KeyCounts:
    keys, counts = np.unique(values, return_counts=True)
    return KeyCounts(keys, counts.astype(np.int64))
