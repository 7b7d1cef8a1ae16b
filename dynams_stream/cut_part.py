"""The cut's work on one part: its scores as integer keys, their histograms, and the samples below a threshold.

Every function here reads one score table, returns something small and can be pickled, so that it can run anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.errors import ScoresIncompleteError, SelectionError, StoreError
from dynams_stream.strategy import Strategy

NOT_SCORED = np.uint32(0xFFFFFFFF)
"""The key of a null or NaN score: above the key of every score, +inf included."""
BINS = 1 << 16
"""Bins of a histogram over one half of the keys' bits."""

MOST_CLASSES = 100_000
"""With more distinct labels than this, they are no classes, and are neither counted nor balanced."""

_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
Keys = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ScorePart:
    """Where the scores of one part lie, and which samples they must be of. Small and picklable.

    Attributes:
        url: path or URL of the part's score table; None for a random order, which needs none.
        number: number of the part.
        first_shard: number of its first shard.
        counts: int64, shape (shards of the part,): samples in each of its shards.
        excluded: uint32, ascending positions in the part that must not be selected; None for none.
    """

    url: str | None
    number: int
    first_shard: int
    counts: Counts
    excluded: npt.NDArray[np.uint32] | None = None

    @property
    def samples(self) -> int:
        """How many samples the part holds."""
        return int(self.counts.sum())


def task_bytes(part: ScorePart, strategy: Strategy, weight: Strategy | None, by_class: bool) -> int:
    """About how many bytes a task on a part takes at most, with its result: as measured, rounded up.

    Args:
        part: which.
        strategy: what is ranked by.
        weight: the expression of the weights.
        by_class: whether classes have quotas.
    """
    a_row = 64 + 32 * by_class
    if weight is not None or strategy.text not in strategy.columns:  # a bare column is not computed with
        a_row += 16 * len({*strategy.columns, *(weight.columns if weight is not None else ())})
    return a_row * part.samples


# ---- keys ------------------------------------------------------------------------------------------------------------


def score_keys(scores: npt.NDArray[np.float32]) -> Keys:
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


def random_keys(seed: int, first_shard: int, counts: Counts) -> Keys:
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


def _rows_of(counts: Counts) -> Counts:
    """The row of each sample: 0 … n − 1 for each shard in turn."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(starts, counts)


# ---- tasks -----------------------------------------------------------------------------------------------------------

NO_LABEL = -(2**40)
"""Stands for a missing label: outside int32."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Non-empty bins of one part's keys, and how many of its samples are scored."""

    bins: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.uint32]
    scored: int


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest key, how many samples have it, and how many of those are selected."""

    selected: int
    scored: int
    key: int = 0
    ties: int = 0
    ties_taken: int = 0


@dataclass(frozen=True, eq=False)
class Candidates:
    """The samples of one part that are below the threshold or among its first ties at it.

    Attributes:
        positions: uint32, ascending places in the part.
        ties: uint32, which of `positions` are ties.
        tie_labels: the label of each tie, or `NO_LABEL`.
        all_labels: distinct labels of the part, and how often each occurs.
        below_labels: the same for the samples below the threshold.
    """

    positions: npt.NDArray[np.uint32]
    ties: npt.NDArray[np.uint32]
    tie_labels: Labels
    all_labels: tuple[Counts, Counts]
    below_labels: tuple[Counts, Counts]


@dataclass(frozen=True, eq=False)
class PartSelection:
    """What is selected of one part.

    Attributes:
        positions: uint32, ascending places in the part.
        all_labels: distinct labels of the part, and how often each occurs.
        selected_labels: the same for what is selected, in one or several counts.
        weights: float32, of each of `positions`; None without weights.
    """

    positions: npt.NDArray[np.uint32]
    all_labels: tuple[Counts, Counts]
    selected_labels: tuple[tuple[Counts, Counts], ...]
    weights: npt.NDArray[np.float32] | None = None


def high_histogram(part: ScorePart, strategy: Strategy) -> Histogram:
    """Pass 1: how many keys have each value of the high 16 bits. Checks the part's lines as well."""
    if strategy.seed is not None:
        keys = part_keys(part, strategy)
    else:
        table = _read(part, (*strategy.columns, "shard", "row"))
        _require_lines(part, table)
        keys = _table_keys(part, table, strategy)
    # What is not scored fills the last bin, behind any key that is looked for.
    return _compact(np.bincount(keys >> np.uint32(16), minlength=BINS), count_scored(part, keys, strategy))


def count_scored(part: ScorePart, keys: Keys, strategy: Strategy) -> int:
    """How many of a part's samples can be selected; in a random order one of them may have the key `NOT_SCORED`."""
    if strategy.seed is not None:
        return len(keys) - (0 if part.excluded is None else len(part.excluded))
    return int(np.count_nonzero(keys != NOT_SCORED))


def low_histogram(part: ScorePart, strategy: Strategy, high: int) -> Histogram:
    """Pass 2: the low 16 bits of the keys whose high bits are `high`."""
    keys = part_keys(part, strategy)
    inside = keys[keys >> np.uint32(16) == high] & np.uint32(0xFFFF)
    return _compact(np.bincount(inside, minlength=BINS), len(inside))


def _compact(histogram: npt.NDArray[np.intp], scored: int) -> Histogram:
    bins = np.flatnonzero(histogram)
    return Histogram(bins.astype(np.uint16), histogram[bins].astype(np.uint32), scored)


def candidates(part: ScorePart, strategy: Strategy, threshold: int, quota: int) -> Candidates:
    """Pass 3: the samples with a key below `threshold`, and the first `quota` with exactly that key."""
    labels: Labels = np.empty(0, dtype=np.int64)
    if strategy.seed is not None:
        keys = part_keys(part, strategy)
    else:
        table = _read(part, (*strategy.columns, "label"))
        keys = _table_keys(part, table, strategy)
        labels = _labels(table["label"])
    below = keys < threshold
    tied = np.flatnonzero(keys == threshold)[:quota]
    chosen = below.copy()
    chosen[tied] = True
    positions = np.flatnonzero(chosen)
    return Candidates(
        positions=positions.astype(np.uint32),
        ties=np.searchsorted(positions, tied).astype(np.uint32),
        tie_labels=labels[tied] if len(labels) else np.full(len(tied), NO_LABEL, dtype=np.int64),
        all_labels=count_labels(labels),
        below_labels=count_labels(labels[below] if len(labels) else labels),
    )


def with_weights(of: tuple[ScorePart, PartSelection], weight: Strategy) -> PartSelection:
    """After pass 3, where weights are wanted: the value of an expression for each selected sample.

    Raises:
        SelectionError: a value that is no weight (negative, infinite or not there); names the shard and row.
    """
    part, found = of
    table = _read(part, weight.columns)
    weights = weight.evaluate({name: table[name].to_numpy()[found.positions] for name in weight.columns})
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        position = int(found.positions[wrong[0]])
        shard = int(np.searchsorted(np.cumsum(part.counts), position, side="right"))
        raise SelectionError(
            f"sample_weight {weight} is {weights[wrong[0]]} for shard {part.first_shard + shard}, row "
            f"{_rows_of(part.counts)[position]}, and for {len(wrong) - 1} more of the part's {len(weights)} selected "
            f"samples; write an expression that is finite and not negative for every selected sample"
        )
    return replace(found, weights=weights)


def _labels(column: pa.ChunkedArray) -> Labels:
    """The label of each line, or `NO_LABEL`; empty when no line has one."""
    if column.null_count == len(column):
        return np.empty(0, dtype=np.int64)
    if column.null_count == 0:
        return column.to_numpy()  # type: ignore[no-any-return]
    return column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy()  # type: ignore[no-any-return]


def count_labels(labels: Labels) -> tuple[Counts, Counts]:
    """Distinct labels, ascending, and how often each occurs; `NO_LABEL` is left out."""
    if len(labels) and labels.min() == NO_LABEL:
        labels = labels[labels != NO_LABEL]
    if len(labels) and labels.min() >= 0 and labels.max() < BINS * 16:
        histogram = np.bincount(labels)  # linear, where `unique` sorts
        values = np.flatnonzero(histogram)
        return values, histogram[values].astype(np.int64)
    values, counts = np.unique(labels, return_counts=True)
    return values.astype(np.int64), counts.astype(np.int64)


def part_keys(part: ScorePart, strategy: Strategy) -> Keys:
    """The key of each sample; `NOT_SCORED` of those that are excluded, too."""
    if strategy.seed is None:
        return _table_keys(part, _read(part, strategy.columns), strategy)
    keys = random_keys(strategy.seed, part.first_shard, part.counts)
    if part.excluded is not None:
        np.minimum(keys, NOT_SCORED - np.uint32(1), out=keys)  # an order that no sample shares with the excluded ones
        keys[part.excluded] = NOT_SCORED
    return keys


def checked_keys(part: ScorePart, strategy: Strategy) -> tuple[Keys, Labels]:
    """Key and label (or `NO_LABEL`) of each sample; no labels where none has one. Checks which samples they are."""
    if strategy.seed is not None:
        return part_keys(part, strategy), np.empty(0, dtype=np.int64)
    table = _read(part, (*strategy.columns, "label", "shard", "row"))
    _require_lines(part, table)
    return _table_keys(part, table, strategy), _labels(table["label"])


def labelled_keys(part: ScorePart, strategy: Strategy, *, check_lines: bool = False) -> tuple[Keys, Counts]:
    """Key and label (or `NO_LABEL`) of each sample, by an expression; `check_lines` checks which samples they are."""
    places = ("shard", "row") if check_lines else ()
    table = _read(part, (*strategy.columns, "label", *places))
    if check_lines:
        _require_lines(part, table)
    labels = table["label"].cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
    return _table_keys(part, table, strategy), labels


def _table_keys(part: ScorePart, table: pa.Table, strategy: Strategy) -> Keys:
    keys = score_keys(strategy.evaluate({name: table[name].to_numpy() for name in strategy.columns}))
    if part.excluded is not None:
        keys[part.excluded] = NOT_SCORED
    return keys


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
