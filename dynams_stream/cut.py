"""The exact cut: the k samples with the smallest (score, shard, row) of a whole dataset, in three reads of each part.

A score becomes a uint32 key whose order is the score's. Then, whatever the number of samples:

    pass 1   histogram of the keys' high 16 bits, summed over the parts   → the bin that holds the k-th smallest key
    pass 2   histogram of the low 16 bits inside that bin                 → the k-th smallest key itself, the threshold
    pass 3   each part's positions below the threshold, and its first ties at it

The parts come back in order, so the driver gives the remaining ties to the first samples by (shard, row) and writes
the selection part by part. It holds two histograms and a few parts' results; a task holds one part's columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.errors import ScoresIncompleteError, SelectionError, StoreError
from dynams_stream.ordered_map import OrderedMap
from dynams_stream.selection import selected_count, selection_writer
from dynams_stream.strategy import Strategy

NOT_SCORED = np.uint32(0xFFFFFFFF)
"""The key of a null or NaN score: above the key of every score, +inf included."""
MOST_CLASSES = 100_000
"""With more distinct labels than this, they are no classes and are not counted."""

_BINS = 1 << 16
_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_Keys = npt.NDArray[np.uint32]
_Counts = npt.NDArray[np.int64]
_Labels = npt.NDArray[np.int32] | npt.NDArray[np.int64]


# ---- public values ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScorePart:
    """Where the scores of one part lie, and which samples they must be of. Small and picklable.

    Attributes:
        url: path or URL of the part's score table; None for a random order, which needs none.
        number: number of the part.
        first_shard: number of its first shard.
        counts: int64, shape (shards of the part,): samples in each of its shards.
    """

    url: str | None
    number: int
    first_shard: int
    counts: _Counts

    @property
    def samples(self) -> int:
        """How many samples the part holds."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class CutResult:
    """What a cut selected.

    Attributes:
        fraction: the fraction asked for, as written.
        strategy: canonical text of the strategy.
        threshold: the largest selected score, the k-th smallest; may be infinite. None when nothing is selected.
        ties: how many samples have exactly the threshold's score; 0 when nothing is selected.
        ties_taken: how many of them are selected: the first by (shard, row).
        samples: all samples.
        scored: samples with a score that can be ranked: neither null nor NaN.
        selected: selected samples.
        per_class: for each label, how many samples have it ("all") and how many of them are selected ("selected").
            Empty without labels, for a random order, and with more than `MOST_CLASSES` labels.
        sha256: digest of `selection.parquet`, in hex.
    """

    fraction: str
    strategy: str
    threshold: float | None
    ties: int
    ties_taken: int
    samples: int
    scored: int
    selected: int
    per_class: Mapping[int, Mapping[str, int]]
    sha256: str

    @property
    def failed(self) -> int:
        """Samples without a score that can be ranked; they are never selected."""
        return self.samples - self.scored

    def for_manifest(self) -> dict[str, Any]:
        """The entries of `round.json` that a cut settles; JSON has no infinity, so such a threshold is a string."""
        finite = self.threshold is None or math.isfinite(self.threshold)
        return {
            "strategy": self.strategy,
            "fraction": self.fraction,
            "threshold": self.threshold if finite else str(self.threshold),
            "ties": {"at_threshold": self.ties, "taken": self.ties_taken},
            "counts": {
                "all": self.samples,
                "scored": self.scored,
                "failed": self.failed,
                "selected": self.selected,
            },
            "classes": {str(label): dict(counts) for label, counts in sorted(self.per_class.items())},
            "selection": {"sha256": self.sha256},
        }


# ---- keys ------------------------------------------------------------------------------------------------------------


def score_keys(scores: npt.NDArray[np.float32]) -> _Keys:
    """uint32 keys in the order of float32 `scores`: −0.0 and +0.0 share one, NaN becomes `NOT_SCORED`.

    Positive floats are ordered as their bits are, negative ones in reverse: flip the sign bit of the former and all
    bits of the latter. Done on integers, so that denormal scores keep their order whatever the processor's float mode.
    """
    bits = np.ascontiguousarray(scores, dtype=np.float32).view(np.uint32)
    keys = bits | _SIGN  # of −0.0 as well, which so gets the key of +0.0
    if bits.max(initial=0) > _INFINITY:  # else all are scored and none is negative: the usual case of a distance
        np.invert(bits, out=keys, where=bits > _SIGN)
        keys[(bits & ~_SIGN) > _INFINITY] = NOT_SCORED
    return keys


def key_score(key: int) -> float:
    """The float32 score whose key is `key`, as a Python float."""
    bits = key ^ 0x80000000 if key & 0x80000000 else ~key & 0xFFFFFFFF
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def random_keys(seed: int, first_shard: int, counts: _Counts) -> _Keys:
    """A uint32 key for every sample of some consecutive shards, a pure function of (seed, shard, row).

    The upper half of SplitMix64's output function (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators") applied in turn to seed, shard and row.
    """
    shards = np.arange(first_shard, first_shard + len(counts), dtype=np.uint64)
    of_seed = _mix(np.full(1, seed, dtype=np.uint64))
    of_shard = _mix(of_seed ^ shards)
    return (_mix(np.repeat(of_shard, counts) ^ _rows_of(counts).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _rows_of(counts: _Counts) -> _Counts:
    """The row of each sample: 0 … n − 1 for each shard in turn."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(starts, counts)


# ---- one part --------------------------------------------------------------------------------------------------------

_NO_LABEL = -(2**40)  # outside int32


@dataclass(frozen=True, eq=False)
class _Histogram:
    """Non-empty bins of one part's keys, and how many of its samples are scored."""

    bins: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.uint32]
    scored: int


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The samples of one part that are below the threshold or among its first ties at it.

    Attributes:
        positions: uint32, ascending places in the part.
        ties: uint32, which of `positions` are ties.
        tie_labels: the label of each tie, or `_NO_LABEL`.
        all_labels: distinct labels of the part, and how often each occurs.
        below_labels: the same for the samples below the threshold.
    """

    positions: npt.NDArray[np.uint32]
    ties: npt.NDArray[np.uint32]
    tie_labels: _Labels
    all_labels: tuple[_Counts, _Counts]
    below_labels: tuple[_Counts, _Counts]


def _high_histogram(part: ScorePart, strategy: Strategy) -> _Histogram:
    """Pass 1: how many keys have each value of the high 16 bits. Checks the part's lines as well."""
    if strategy.seed is not None:
        keys = random_keys(strategy.seed, part.first_shard, part.counts)
        return _compact(np.bincount(keys >> np.uint32(16), minlength=_BINS), len(keys))
    table = _read(part, (*strategy.columns, "shard", "row"))
    _require_lines(part, table)
    keys = _table_keys(table, strategy)
    scored = int(np.count_nonzero(keys != NOT_SCORED))  # the others fill the last bin, behind any that is looked for
    return _compact(np.bincount(keys >> np.uint32(16), minlength=_BINS), scored)


def _low_histogram(part: ScorePart, strategy: Strategy, high: int) -> _Histogram:
    """Pass 2: the low 16 bits of the keys whose high bits are `high`."""
    keys = _part_keys(part, strategy)
    inside = keys[keys >> np.uint32(16) == high] & np.uint32(0xFFFF)
    return _compact(np.bincount(inside, minlength=_BINS), len(inside))


def _compact(histogram: npt.NDArray[np.intp], scored: int) -> _Histogram:
    bins = np.flatnonzero(histogram)
    return _Histogram(bins.astype(np.uint16), histogram[bins].astype(np.uint32), scored)


def _candidates(part: ScorePart, strategy: Strategy, threshold: int, quota: int) -> _Candidates:
    """Pass 3: the samples with a key below `threshold`, and the first `quota` with exactly that key."""
    labels: _Labels = np.empty(0, dtype=np.int64)
    if strategy.seed is not None:
        keys = _part_keys(part, strategy)
    else:
        table = _read(part, (*strategy.columns, "label"))
        keys = _table_keys(table, strategy)
        labels = _labels(table["label"])
    below = keys < threshold
    tied = np.flatnonzero(keys == threshold)[:quota]
    chosen = below.copy()
    chosen[tied] = True
    positions = np.flatnonzero(chosen)
    return _Candidates(
        positions=positions.astype(np.uint32),
        ties=np.searchsorted(positions, tied).astype(np.uint32),
        tie_labels=labels[tied] if len(labels) else np.full(len(tied), _NO_LABEL, dtype=np.int64),
        all_labels=_count_labels(labels),
        below_labels=_count_labels(labels[below] if len(labels) else labels),
    )


def _labels(column: pa.ChunkedArray) -> _Labels:
    """The label of each line, or `_NO_LABEL`; empty when no line has one."""
    if column.null_count == len(column):
        return np.empty(0, dtype=np.int64)
    if column.null_count == 0:
        return column.to_numpy()  # type: ignore[no-any-return]
    return column.cast(pa.int64()).fill_null(_NO_LABEL).to_numpy()  # type: ignore[no-any-return]


def _count_labels(labels: _Labels) -> tuple[_Counts, _Counts]:
    """Distinct labels, ascending, and how often each occurs; `_NO_LABEL` is left out."""
    if len(labels) and labels.min() == _NO_LABEL:
        labels = labels[labels != _NO_LABEL]
    if len(labels) and labels.min() >= 0 and labels.max() < _BINS * 16:
        histogram = np.bincount(labels)  # linear, where `unique` sorts
        values = np.flatnonzero(histogram)
        return values, histogram[values].astype(np.int64)
    values, counts = np.unique(labels, return_counts=True)
    return values.astype(np.int64), counts.astype(np.int64)


def _part_keys(part: ScorePart, strategy: Strategy) -> _Keys:
    if strategy.seed is not None:
        return random_keys(strategy.seed, part.first_shard, part.counts)
    return _table_keys(_read(part, strategy.columns), strategy)


def _table_keys(table: pa.Table, strategy: Strategy) -> _Keys:
    return score_keys(strategy.evaluate({name: table[name].to_numpy() for name in strategy.columns}))


def _read(part: ScorePart, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part's score table, which must have one line for each of its samples."""
    url = part.url
    if url is None:
        raise SelectionError(f"part {part.number} has no score table; only a random strategy needs none")
    try:
        with storage.open_random(url) as source:
            file = pq.ParquetFile(source, pre_buffer=True)
            schema.require_format(file.schema_arrow.metadata, url)
            for name in columns:
                if name not in file.schema_arrow.names or not file.schema_arrow.field(name).type.equals(
                    schema.SCORES_SCHEMA.field(name).type
                ):
                    raise StoreError(f"{url}: no column {name!r} of the kind a score table has; score part again")
            if file.metadata.num_rows != part.samples:
                raise ScoresIncompleteError(
                    f"{url}: {file.metadata.num_rows} lines for the {part.samples} samples of part {part.number}; "
                    f"remove that file and run dynams score again"
                )
            return file.read(columns=list(columns), use_threads=False)
    except FileNotFoundError as error:
        raise ScoresIncompleteError(
            f"{url}: no score table of part {part.number}; run dynams score again, it makes what is missing"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(
            f"{url}: not a readable score table ({error}); remove it and run dynams score again"
        ) from error


def _require_lines(part: ScorePart, table: pa.Table) -> None:
    """The table's lines are the part's samples in the order (shard, row)."""
    shards, rows = table["shard"].to_numpy(), table["row"].to_numpy()
    filled = np.flatnonzero(part.counts)
    ends = np.cumsum(part.counts)[filled]
    starts = ends - part.counts[filled]
    steps = rows[1:] == rows[:-1] + 1
    steps[starts[1:] - 1] = True  # a new shard begins
    same = (
        steps.all()
        and not rows[starts].any()
        and np.array_equal(shards[starts], part.first_shard + filled)
        and np.array_equal(shards[ends - 1], part.first_shard + filled)
        and (shards[1:] >= shards[:-1]).all()
    )
    if not same:
        raise StoreError(
            f"{part.url}: its lines are not the samples of part {part.number} in the order of (shard, row); "
            f"remove that file and run dynams score again"
        )


# ---- all parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Threshold:
    """The k-th smallest key, how many samples have it, and how many of those are selected."""

    selected: int
    scored: int
    key: int = 0
    ties: int = 0
    ties_taken: int = 0


def exact_cut(
    parts: Sequence[ScorePart],
    *,
    fraction: float | str | Decimal,
    strategy: Strategy,
    destination: str,
    ordered_map: OrderedMap = map,
) -> CutResult:
    """Select the k samples with the smallest (score, shard, row) and write `selection.parquet`.

    k = min(⌈fraction · all samples⌉, scored samples). The bytes written depend on the scores alone, not on how
    `ordered_map` runs the tasks.

    Args:
        parts: all parts of the dataset, in order.
        fraction: from 0 to 1, taken as the decimal it is written as.
        strategy: what to rank by.
        destination: path or URL of the selection to write; it appears whole or not at all.
        ordered_map: like `map`; it is given picklable functions of one part and must keep the parts' order. Lazy, it
            keeps memory flat.

    Raises:
        UsageError: unless the fraction is in [0, 1].
        ScoresIncompleteError: a score table is missing or has too few or too many lines.
        StoreError: a score table is unreadable, holds other samples, or changed while it was cut.
    """
    samples = sum(part.samples for part in parts)
    wanted = selected_count(fraction, samples)
    _require_consecutive(parts)
    threshold = _find_threshold(parts, strategy, wanted, ordered_map)
    classes = _ClassCounts()
    with selection_writer(destination) as writer:
        left = threshold.ties_taken
        task = partial(_candidates, strategy=strategy, threshold=threshold.key, quota=threshold.ties_taken)
        for part, found in zip(parts, ordered_map(task, parts), strict=True):
            taken = min(left, len(found.ties))
            writer.append(*_rows_by_shard(part, np.delete(found.positions, found.ties[taken:])))
            classes.add(found, taken)
            left -= taken
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
        scored=threshold.scored,
        selected=threshold.selected,
        per_class=classes.result(),
        sha256=writer.digest,
    )


def _require_consecutive(parts: Sequence[ScorePart]) -> None:
    shard = 0
    for part in parts:
        if part.first_shard != shard:
            raise SelectionError(
                f"part {part.number} begins at shard {part.first_shard}, not {shard}; parts are missing"
            )
        shard += len(part.counts)


def _find_threshold(parts: Sequence[ScorePart], strategy: Strategy, wanted: int, ordered_map: OrderedMap) -> _Threshold:
    high, scored = _sum(ordered_map(partial(_high_histogram, strategy=strategy), parts))
    selected = min(wanted, scored)
    if selected == 0:
        return _Threshold(selected, scored)
    high_bin, before = _kth_bin(high, selected)
    low, _ = _sum(ordered_map(partial(_low_histogram, strategy=strategy, high=high_bin), parts))
    low_bin, before_inside = _kth_bin(low, selected - before)
    return _Threshold(
        selected=selected,
        scored=scored,
        key=high_bin << 16 | low_bin,
        ties=int(low[low_bin]),
        ties_taken=selected - before - before_inside,
    )


def _sum(histograms: Iterable[_Histogram]) -> tuple[_Counts, int]:
    total = np.zeros(_BINS, dtype=np.int64)
    scored = 0
    for histogram in histograms:
        total[histogram.bins] += histogram.counts
        scored += histogram.scored
    return total, scored


def _kth_bin(histogram: _Counts, k: int) -> tuple[int, int]:
    """The bin that holds the k-th smallest (k from 1 on), and how many lie in the bins before it."""
    cumulative = np.cumsum(histogram)
    place = int(np.searchsorted(cumulative, k))
    return place, int(cumulative[place] - histogram[place])


def _rows_by_shard(part: ScorePart, positions: npt.NDArray[np.uint32]) -> tuple[_Counts, npt.NDArray[np.uint32]]:
    """How many of a part's ascending positions fall into each shard, and the row of each."""
    ends = np.cumsum(part.counts)
    counts = np.diff(np.searchsorted(positions, ends), prepend=0).astype(np.int64)
    rows = positions - np.repeat(ends - part.counts, counts)
    return counts, rows.astype(np.uint32)


def _threshold_score(threshold: _Threshold, strategy: Strategy) -> float | None:
    if threshold.selected == 0:
        return None
    return key_score(threshold.key) if strategy.seed is None else threshold.key / 2**32


class _ClassCounts:
    """Samples and selected samples of each label, summed over the parts."""

    def __init__(self) -> None:
        self._counts: dict[int, dict[str, int]] = {}
        self._too_many = False

    def add(self, found: _Candidates, ties_taken: int) -> None:
        if self._too_many:
            return
        self._add("all", *found.all_labels)
        self._add("selected", *found.below_labels)
        self._add("selected", *_count_labels(found.tie_labels[:ties_taken]))
        if len(self._counts) > MOST_CLASSES:
            self._too_many = True
            self._counts.clear()

    def _add(self, which: str, labels: _Counts, counts: _Counts) -> None:
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            self._counts.setdefault(label, {"all": 0, "selected": 0})[which] += count

    def result(self) -> dict[int, dict[str, int]]:
        return dict(sorted(self._counts.items()))
