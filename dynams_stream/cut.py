"""The exact cut: the k samples with the smallest (score, shard, row) of a whole dataset.

A score becomes a uint32 key whose order is the score's. Of a dataset of many parts, some tell between which keys the
threshold must lie, and one read of each part is enough: `window_cut`. Where there are few parts, where the threshold
turns out to lie elsewhere, or what would have to be held takes too much memory, there are three reads of each part,
whatever the number of samples:

    pass 1   histogram of the keys' high 16 bits, summed over the parts   → the bin that holds the k-th smallest key
    pass 2   histogram of the low 16 bits inside that bin                 → the k-th smallest key itself, the threshold
    pass 3   each part's positions below the threshold, and its first ties at it

The parts come back in order, so the driver gives the remaining ties to the first samples by (shard, row) and writes
the selection part by part. It holds two histograms and a few parts' results, at most `window_cut.MOST_BYTES` after one
read; a task holds one part's columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dynams_stream.class_counts import ClassCounts
from dynams_stream.class_cut import ClassCut, find_class_cut, positions_by_class
from dynams_stream.class_quotas import ClassQuotas
from dynams_stream.cut_part import (
    BINS,
    Counts,
    Histogram,
    PartSelection,
    ScorePart,
    Threshold,
    candidates,
    count_labels,
    high_histogram,
    key_score,
    low_histogram,
    with_weights,
)
from dynams_stream.errors import SelectionError, StoreError
from dynams_stream.ordered_map import OrderedMap
from dynams_stream.selection import selected_count
from dynams_stream.selection_file import selection_writer
from dynams_stream.strategy import Strategy
from dynams_stream.window_cut import cut_by_window

__all__ = ["CutResult", "ScorePart", "exact_cut"]


@dataclass(frozen=True)
class CutResult:
    """What a cut selected.

    Attributes:
        fraction: the fraction asked for, as written.
        strategy: canonical text of the strategy.
        threshold: the largest selected score, the k-th smallest; may be infinite. None when nothing is selected.
        ties: how many samples have exactly the threshold's score; 0 when nothing is selected. With quotas, of the
            samples that no quota has taken, those that tie at the score up to which they are selected.
        ties_taken: how many of them are selected: the first by (shard, row).
        samples: all samples.
        scored: samples with a score that can be ranked: neither null nor NaN.
        excluded: of them, those that were excluded beforehand.
        selected: selected samples.
        per_class: for each label, how many samples have it ("all") and how many of them are selected ("selected").
            Empty without labels, for a random order, and with more than `cut_part.MOST_CLASSES` labels.
        selection: what the manifest says of `selection.parquet`: digests, and rows of each shard.
        sample_weight: canonical text of the expression that gave the weights; None without weights.
    """

    fraction: str
    strategy: str
    threshold: float | None
    ties: int
    ties_taken: int
    samples: int
    scored: int
    excluded: int
    selected: int
    per_class: Mapping[int, Mapping[str, int]]
    selection: Mapping[str, str]
    sample_weight: str | None = None

    @property
    def sha256(self) -> str:
        """Digest of `selection.parquet`, in hex."""
        return self.selection["sha256"]

    @property
    def failed(self) -> int:
        """Samples without a score that can be ranked; they are never selected."""
        return self.samples - self.scored

    def for_manifest(self) -> dict[str, Any]:
        """The entries of `round.json` that a cut settles; JSON has no infinity, so such a threshold is a string."""
        finite = self.threshold is None or math.isfinite(self.threshold)
        return {
            "strategy": self.strategy,
            "fraction": float(self.fraction),
            "threshold": self.threshold if finite else str(self.threshold),
            "ties": {"at_threshold": self.ties, "taken": self.ties_taken},
            "counts": {
                "all": self.samples,
                "scored": self.scored,
                "failed": self.failed,
                "selected": self.selected,
            },
            "classes": {str(label): dict(counts) for label, counts in sorted(self.per_class.items())},
            "selection": dict(self.selection),
            "sample_weight": self.sample_weight,
        }


def exact_cut(
    parts: Sequence[ScorePart],
    *,
    fraction: float | str | Decimal,
    strategy: Strategy,
    destination: str,
    quotas: ClassQuotas | None = None,
    sample_weight: Strategy | None = None,
    needs_scores: bool = False,
    ordered_map: OrderedMap = map,
) -> CutResult:
    """Select the k samples with the smallest (score, shard, row) and write `selection.parquet`.

    k = min(⌈fraction · all samples⌉, scored samples that are not excluded). The bytes written depend on the scores
    alone, not on how `ordered_map` runs the tasks.

    Args:
        parts: all parts of the dataset, in order.
        fraction: from 0 to 1, taken as the decimal it is written as.
        strategy: what to rank by.
        destination: path or URL of the selection to write; it appears whole or not at all.
        quotas: what each class gives in any case, its smallest scores; the k is the same.
        sample_weight: an expression whose value is written as the weight of each selected sample.
        needs_scores: refuse a selection of samples none of which can be ranked, instead of writing an empty one.
        ordered_map: like `map`; it is given picklable functions of one part and must keep the parts' order. Lazy, it
            keeps memory flat.

    Raises:
        UsageError: unless the fraction is in [0, 1]; quotas that k or the strategy does not allow.
        ScoresIncompleteError: a score table is missing or has too few or too many lines.
        SelectionError: the expression of the weights gives a selected sample none, or no sample can be ranked.
        StoreError: a score table is unreadable, holds other samples, or changed while it was cut.
    """
    samples = sum(part.samples for part in parts)
    wanted = selected_count(fraction, samples)
    _require_consecutive(parts)
    threshold, pieces, classes = _settled(parts, strategy, wanted, quotas, ordered_map)
    excluded = sum(0 if part.excluded is None else len(part.excluded) for part in parts)
    if needs_scores and wanted and threshold.scored + excluded == 0:
        raise SelectionError(
            f"{destination}: none of {samples} samples has a value of {strategy}; margin, loss and el2n need labels: "
            f"score with the right --label, or select on distance"
        )
    if sample_weight is not None:
        pieces = ordered_map(partial(with_weights, weight=sample_weight), zip(parts, pieces, strict=True))
    with selection_writer(destination) as writer:
        for part, found in zip(parts, pieces, strict=True):
            writer.append(*rows_by_shard(part.counts, found.positions), found.weights)
            classes.add(found.all_labels, *found.selected_labels)
        if writer.total != threshold.selected:
            raise StoreError(
                f"{destination}: found {writer.total} of {threshold.selected} samples again; "
                f"score tables changed while they were cut: select again once nothing writes to them"
            )
    return CutResult(
        fraction=str(fraction),
        strategy=str(strategy),
        threshold=_threshold_score(threshold, strategy),
        ties=threshold.ties,
        ties_taken=threshold.ties_taken,
        samples=samples,
        scored=threshold.scored + excluded,
        excluded=excluded,
        selected=threshold.selected,
        per_class=classes.result(),
        selection=writer.for_manifest(),
        sample_weight=None if sample_weight is None else str(sample_weight),
    )


def _settled(
    parts: Sequence[ScorePart],
    strategy: Strategy,
    wanted: int,
    quotas: ClassQuotas | None,
    ordered_map: OrderedMap,
) -> tuple[Threshold, Iterable[PartSelection], ClassCounts]:
    """The threshold, what is selected of each part, in order, and the counts of classes that those do not tell."""
    if quotas:
        by_class = find_class_cut(parts, strategy, wanted, quotas, ordered_map)
        return _largest_threshold(by_class), positions_by_class(parts, strategy, by_class, ordered_map), ClassCounts()
    by_window = cut_by_window(parts, strategy, wanted, ordered_map)
    if by_window is not None:
        return by_window.threshold, by_window.selections(), by_window.classes
    threshold = _find_threshold(parts, strategy, wanted, ordered_map)
    return threshold, _positions(parts, strategy, threshold, ordered_map), ClassCounts()


def _positions(
    parts: Sequence[ScorePart], strategy: Strategy, threshold: Threshold, ordered_map: OrderedMap
) -> Iterator[PartSelection]:
    """Pass 3: what is selected of each part; ties at the threshold go to the first by (shard, row)."""
    left = threshold.ties_taken
    task = partial(candidates, strategy=strategy, threshold=threshold.key, quota=threshold.ties_taken)
    for found in ordered_map(task, parts):
        taken = min(left, len(found.ties))
        left -= taken
        yield PartSelection(
            np.delete(found.positions, found.ties[taken:]),
            found.all_labels,
            (found.below_labels, count_labels(found.tie_labels[:taken])),
        )


def _largest_threshold(cut: ClassCut) -> Threshold:
    """The largest selected score and, where classes compete for it, its ties."""
    return Threshold(
        selected=cut.selected,
        scored=cut.scored,
        key=max(int(cut.thresholds.keys.max(initial=-1)), cut.thresholds.common),
        ties=cut.common_ties,
        ties_taken=cut.common_ties_taken,
    )


def _require_consecutive(parts: Sequence[ScorePart]) -> None:
    shard = 0
    for part in parts:
        if part.first_shard != shard:
            raise SelectionError(
                f"part {part.number} begins at shard {part.first_shard}, not {shard}; parts are missing"
            )
        shard += len(part.counts)


def _find_threshold(parts: Sequence[ScorePart], strategy: Strategy, wanted: int, ordered_map: OrderedMap) -> Threshold:
    high, scored = _sum(ordered_map(partial(high_histogram, strategy=strategy), parts))
    selected = min(wanted, scored)
    if selected == 0:
        return Threshold(selected, scored)
    high_bin, before = kth_bin(high, selected)
    low, _ = _sum(ordered_map(partial(low_histogram, strategy=strategy, high=high_bin), parts))
    low_bin, before_inside = kth_bin(low, selected - before)
    return Threshold(
        selected=selected,
        scored=scored,
        key=high_bin << 16 | low_bin,
        ties=int(low[low_bin]),
        ties_taken=selected - before - before_inside,
    )


def _sum(histograms: Iterable[Histogram]) -> tuple[Counts, int]:
    total = np.zeros(BINS, dtype=np.int64)
    scored = 0
    for histogram in histograms:
        total[histogram.bins] += histogram.counts
        scored += histogram.scored
    return total, scored


def kth_bin(histogram: Counts, k: int) -> tuple[int, int]:
    """The bin that holds the k-th smallest (k from 1 on), and how many lie in the bins before it."""
    cumulative = np.cumsum(histogram)
    place = int(np.searchsorted(cumulative, k))
    return place, int(cumulative[place] - histogram[place])


def rows_by_shard(shards: Counts, positions: npt.NDArray[np.uint32]) -> tuple[Counts, npt.NDArray[np.uint32]]:
    """How many of a part's ascending positions fall into each shard, and the row of each.

    Args:
        shards: int64, samples in each shard of the part.
        positions: uint32, counted through the part.
    """
    ends = np.cumsum(shards)
    counts = np.diff(np.searchsorted(positions, ends), prepend=0).astype(np.int64)
    rows = positions - np.repeat(ends - shards, counts)
    return counts, rows.astype(np.uint32)


def _threshold_score(threshold: Threshold, strategy: Strategy) -> float | None:
    if threshold.selected == 0:
        return None
    return key_score(threshold.key) if strategy.seed is None else threshold.key / 2**32
