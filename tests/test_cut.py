"""The exact cut against a full sort of the concatenated tables."""

from __future__ import annotations

import math
import pickle
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynams_stream import schema, storage
from dynams_stream.cut import CutResult, ScorePart, exact_cut
from dynams_stream.cut_part import NOT_SCORED, key_score, random_keys, score_keys
from dynams_stream.errors import ScoresIncompleteError, SelectionError, StoreError, UsageError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.selection import Selection
from dynams_stream.strategy import Strategy

DISTANCE = Strategy.parse("distance")

# few distinct values, so that most examples have ties at the threshold
AWKWARD = [0.0, -0.0, 1.0, 1.0, -1.0, math.nan, None, math.inf, -math.inf, 1e-45, -1e-45, 5e-39, 3.4e38, -3.4e38, 0.25]
scores_values = st.one_of(st.sampled_from(AWKWARD), st.sampled_from([0.0, 1.0]), st.floats(width=32))
shard_tables = st.lists(st.lists(scores_values, max_size=12), min_size=1, max_size=8)
written_fractions = st.one_of(
    st.sampled_from(["0", "1", "0.07", "0.5", "1.0", "0.1", "1e-9"]),
    st.decimals(0, 1, allow_nan=False, places=4).map(str),
)


def write_part(
    url: str, first_shard: int, shards: list[list[float | None]], labels: list[int | None] | None = None, **columns: Any
) -> None:
    """A score table with the given distances; other columns null unless given."""
    shard = [first_shard + i for i, scores in enumerate(shards) for _ in scores]
    row = [r for scores in shards for r in range(len(scores))]
    values: dict[str, Any] = {name: [None] * len(row) for name in schema.SCORES_SCHEMA.names}
    values |= {"shard": shard, "row": row, "key": [f"{s}/{r}" for s, r in zip(shard, row, strict=True)]}
    values["distance"] = [score for scores in shards for score in scores]
    values["label"] = labels if labels is not None else [None] * len(row)
    values |= columns
    arrays = [pa.array(values[field.name], type=field.type) for field in schema.SCORES_SCHEMA]
    with (
        storage.atomic_writer(url) as file,
        pq.ParquetWriter(
            file,
            schema.SCORES_SCHEMA,
            use_dictionary=False,
            compression="zstd",
            column_encoding=schema.encodings(schema.SCORES_SCHEMA),
        ) as writer,
    ):
        writer.write_table(pa.table(arrays, schema=schema.SCORES_SCHEMA), row_group_size=7)


def write_parts(folder: Path, shards: list[list[float | None]], shards_per_part: int) -> list[ScorePart]:
    parts = []
    for number, first in enumerate(range(0, len(shards), shards_per_part)):
        url = str(folder / f"part-{number:06d}.parquet")
        mine = shards[first : first + shards_per_part]
        write_part(url, first, mine)
        parts.append(ScorePart(url, number, first, np.array([len(s) for s in mine], dtype=np.int64)))
    return parts


def full_sort(shards: list[list[float | None]], fraction: str) -> tuple[list[list[int]], int]:
    """The rows of each shard by NumPy's lexsort over everything, and how many samples have a score."""
    flat = [
        (np.float32(score), shard, row)
        for shard, scores in enumerate(shards)
        for row, score in enumerate(scores)
        if score is not None and not math.isnan(score)
    ]
    everything = sum(len(scores) for scores in shards)
    k = min(math.ceil(Fraction(fraction) * everything), len(flat))
    rows: list[list[int]] = [[] for _ in shards]
    if flat:
        score, shard, row = (np.array(column) for column in zip(*flat, strict=True))
        order = np.lexsort((row, shard, score + np.float32(0)))[:k]
        for at in order:
            rows[shard[at]].append(int(row[at]))
    return [sorted(r) for r in rows], len(flat)


def selected_rows(url: str) -> list[list[int]]:
    table = pq.read_table(url)
    assert table["shard"].to_pylist() == list(range(len(table)))
    assert table["weights"].null_count == len(table)
    rows: list[list[int]] = table["rows"].to_pylist()
    return rows


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=shard_tables, fraction=written_fractions, shards_per_part=st.integers(1, 8))
def test_selects_what_a_full_sort_selects(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[float | None]], fraction: str, shards_per_part: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    parts = write_parts(folder, shards, shards_per_part)
    destination = str(folder / "selection.parquet")

    result = exact_cut(parts, fraction=fraction, strategy=DISTANCE, destination=destination)

    expected, scored = full_sort(shards, fraction)
    assert selected_rows(destination) == expected
    selected = [shards[s][r] for s, rows in enumerate(expected) for r in rows]
    assert (result.samples, result.scored, result.selected) == (sum(map(len, shards)), scored, len(selected))
    assert result.failed == result.samples - scored
    if selected:
        largest = max(np.float32(score) for score in selected)
        assert result.threshold == largest
        assert result.ties == sum(s is not None and np.float32(s) == largest for scores in shards for s in scores)
        assert result.ties_taken == sum(np.float32(s) == largest for s in selected)
    else:
        assert (result.threshold, result.ties, result.ties_taken) == (None, 0, 0)
    assert result.sha256 == Selection.read(destination).digest


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [("0.07", 7), (0.07, 7), (Decimal("0.07"), 7), (np.float32(0.07), 7), ("0.0700000001", 8), (0, 0), (1, 100)],
)
def test_a_fraction_is_the_decimal_as_written(tmp_path: Path, fraction: Any, expected: int) -> None:
    scores: list[list[float | None]] = [[float(100 - i) for i in range(100)]]
    parts = write_parts(tmp_path, scores, 1)
    result = exact_cut(parts, fraction=fraction, strategy=DISTANCE, destination=str(tmp_path / "selection.parquet"))
    assert result.selected == expected
    assert selected_rows(str(tmp_path / "selection.parquet")) == [list(range(100 - expected, 100))]
    assert result.fraction == str(fraction)


@pytest.mark.parametrize("fraction", ["1.01", -0.1, "nan", "inf", "a third", "", True])
def test_other_fractions_are_refused(tmp_path: Path, fraction: Any) -> None:
    parts = write_parts(tmp_path, [[1.0]], 1)
    with pytest.raises(UsageError, match="from 0 to 1"):
        exact_cut(parts, fraction=fraction, strategy=DISTANCE, destination=str(tmp_path / "selection.parquet"))
    assert not (tmp_path / "selection.parquet").exists()


def random_shards(seed: int, shards: int) -> list[list[float | None]]:
    draw = np.random.default_rng(seed)
    return [
        [None if draw.random() < 0.05 else float(draw.integers(0, 40)) / 8 for _ in range(draw.integers(0, 60))]
        for _ in range(shards)
    ]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, random_shards(0, 40), 3)
    made = {}
    for workers in (0, 1, 2, 4):
        destination = str(tmp_path / f"selection-{workers}.parquet")
        ordered_map = ordered_thread_map(workers) if workers else map
        result = exact_cut(
            parts,
            fraction="0.3",
            strategy=DISTANCE,
            destination=destination,
            ordered_map=ordered_map,  # type: ignore[arg-type]
        )
        made[Path(destination).read_bytes()] = result
    assert len(made) == 1
    assert 0 < result.ties_taken < result.ties  # the case that an unordered driver would get wrong


def test_rows_do_not_depend_on_the_split_into_parts(tmp_path: Path) -> None:
    shards = random_shards(1, 30)
    rows = []
    for shards_per_part in (1, 4, 7, 30):
        folder = tmp_path / str(shards_per_part)
        parts = write_parts(folder, shards, shards_per_part)
        exact_cut(parts, fraction="0.4", strategy=DISTANCE, destination=str(folder / "selection.parquet"))
        rows.append(selected_rows(str(folder / "selection.parquet")))
    assert all(other == rows[0] for other in rows)
    assert rows[0] == full_sort(shards, "0.4")[0]


def test_a_row_group_for_each_part(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, random_shards(1, 10), 4)
    exact_cut(parts, fraction="0.4", strategy=DISTANCE, destination=str(tmp_path / "selection.parquet"))
    about = pq.ParquetFile(tmp_path / "selection.parquet").metadata
    assert [about.row_group(i).num_rows for i in range(about.num_row_groups)] == [4, 4, 2]


def test_reads_each_part_three_times(tmp_path: Path, reads: Counter[str]) -> None:
    parts = write_parts(tmp_path, [[1.0] * 50 for _ in range(12)], 3)
    exact_cut(parts, fraction="0.5", strategy=DISTANCE, destination=str(tmp_path / "selection.parquet"))
    assert reads == Counter({part.url: 3 for part in parts})


def test_holds_few_results_at_a_time(tmp_path: Path) -> None:
    """The driver consumes each part's result before the next is made, so memory does not grow with the parts."""
    parts = write_parts(tmp_path, [[float(i) for i in range(20)] for _ in range(30)], 1)
    alive = 0
    most = 0

    def counting(function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        nonlocal alive, most
        for item in items:
            alive += 1
            most = max(most, alive)
            result = function(item)
            assert len(pickle.dumps(result)) < 4000
            yield result
            del result
            alive -= 1

    exact_cut(
        parts,
        fraction="0.5",
        strategy=DISTANCE,
        destination=str(tmp_path / "selection.parquet"),
        ordered_map=counting,
    )
    assert most == 1


def test_sends_no_more_ties_than_can_be_taken(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [[0.0] * 3000 for _ in range(3)], 1)
    sizes = []

    def measured(function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        for item in items:
            result = function(item)
            sizes.append(len(pickle.dumps(result)))
            yield result

    destination = str(tmp_path / "selection.parquet")
    exact_cut(parts, fraction="0.002", strategy=DISTANCE, destination=destination, ordered_map=measured)
    assert selected_rows(destination) == [list(range(18)), [], []]
    assert max(sizes) < 4000


def test_tasks_can_be_pickled(tmp_path: Path) -> None:
    """As they must be to run on a cluster."""
    shards = random_shards(2, 6)
    parts = write_parts(tmp_path, shards, 2)

    def elsewhere(function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        for item in items:
            task = pickle.loads(pickle.dumps(function))
            yield pickle.loads(pickle.dumps(task(pickle.loads(pickle.dumps(item)))))

    destination = str(tmp_path / "selection.parquet")
    exact_cut(parts, fraction="0.5", strategy=DISTANCE, destination=destination, ordered_map=elsewhere)
    assert selected_rows(destination) == full_sort(shards, "0.5")[0]


def test_counts_of_each_class(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    shards: list[list[float | None]] = [[float(draw.integers(0, 5)) for _ in range(40)] for _ in range(4)]
    labels = [[None if draw.random() < 0.2 else int(draw.integers(-1, 4)) for _ in range(40)] for _ in range(4)]
    labels[3] = [None] * 39 + [2_000_000_000]
    parts = []
    for number in range(4):
        url = str(tmp_path / f"part-{number}.parquet")
        write_part(url, number, [shards[number]], labels=labels[number])
        parts.append(ScorePart(url, number, number, np.array([40])))
    destination = str(tmp_path / "selection.parquet")
    result = exact_cut(parts, fraction="0.5", strategy=DISTANCE, destination=destination)
    assert 0 < result.ties_taken < result.ties

    rows = full_sort(shards, "0.5")[0]
    everything = Counter(label for shard in labels for label in shard if label is not None)
    selected = Counter(labels[s][r] for s in range(4) for r in rows[s])
    assert result.per_class == {
        label: {"all": count, "selected": selected[label]} for label, count in sorted(everything.items())
    }
    assert result.for_manifest()["classes"]["2000000000"]["all"] == 1


def test_a_strategy_that_gives_no_number_does_not_select(tmp_path: Path) -> None:
    url = str(tmp_path / "part.parquet")
    write_part(url, 0, [[1.0, 1.0, 1.0, 1.0]], margin=[-3.0, None, 0.5, math.nan], loss=[0.0, 1.0, 2.0, 3.0])
    part = ScorePart(url, 0, 0, np.array([4]))
    destination = str(tmp_path / "selection.parquet")
    result = exact_cut([part], fraction=1, strategy=Strategy.parse("|margin| + loss"), destination=destination)
    assert selected_rows(destination) == [[0, 2]]
    assert (result.scored, result.failed, result.threshold) == (2, 2, 3.0)
    assert result.strategy == "abs(margin) + loss"


def test_an_infinite_threshold_goes_into_a_manifest(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [[math.inf, 1.0]], 1)
    result = exact_cut(parts, fraction=1, strategy=DISTANCE, destination=str(tmp_path / "selection.parquet"))
    assert result.threshold == math.inf
    assert float(result.for_manifest()["threshold"]) == math.inf


# ---- keys ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_keys_have_the_order_of_scores(scores: list[float]) -> None:
    values = np.array(scores, dtype=np.float32)
    keys = score_keys(values)
    for a in range(len(values)):
        assert ((keys < keys[a]) == (values < values[a])).all()
        assert ((keys == keys[a]) == (values == values[a])).all()
        assert key_score(int(keys[a])) == values[a]


def test_every_nan_is_not_scored() -> None:
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32)
    assert (score_keys(bits.view(np.float32)) == NOT_SCORED).all()
    assert score_keys(np.array([np.inf], dtype=np.float32))[0] < NOT_SCORED


# ---- random ----------------------------------------------------------------------------------------------------------


def splitmix(state: int) -> int:
    """SplitMix64's output for a state, in plain integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix_is_the_published_one() -> None:
    """First output of the reference implementation for seed 1234567."""
    assert splitmix(1234567) == 6457827717110365317


def random_cut(
    folder: Path, text: str, counts: list[int], shards_per_part: int, fraction: str
) -> tuple[CutResult, list[list[int]]]:
    destination = str(folder / "selection.parquet")
    parts = [
        ScorePart(None, number, first, np.array(counts[first : first + shards_per_part], dtype=np.int64))
        for number, first in enumerate(range(0, len(counts), shards_per_part))
    ]
    result = exact_cut(parts, fraction=fraction, strategy=Strategy.parse(text), destination=destination)
    return result, selected_rows(destination)


def test_random_is_a_pure_function_of_seed_shard_and_row(tmp_path: Path) -> None:
    counts = [30, 0, 50, 7]
    expected = {(s, r): splitmix(splitmix(splitmix(9) ^ s) ^ r) >> 32 for s, n in enumerate(counts) for r in range(n)}
    assert random_keys(9, 0, np.array(counts)).tolist() == list(expected.values())
    assert random_keys(9, 2, np.array(counts[2:])).tolist() == list(expected.values())[30:]
    result, rows = random_cut(tmp_path, "random:9", counts, 2, "0.3")
    smallest = sorted(sorted(expected, key=lambda place: (expected[place], place))[:27])
    assert [(s, r) for s, mine in enumerate(rows) for r in mine] == smallest
    assert (result.scored, result.failed, result.selected, result.per_class) == (87, 0, 27, {})
    assert result.threshold == max(expected[place] for place in smallest) / 2**32


def test_random_is_the_same_for_any_split_and_other_for_other_seeds(tmp_path: Path) -> None:
    counts = [100] * 20
    rows = {n: random_cut(tmp_path, "random:1", counts, n, "0.25")[1] for n in (1, 3, 20)}
    assert rows[1] == rows[3] == rows[20]
    other = random_cut(tmp_path, "random:2", counts, 3, "0.25")[1]
    shared = sum(len(set(a) & set(b)) for a, b in zip(rows[1], other, strict=True))
    assert 75 < shared < 175  # 125 expected of two independent quarters of 2,000; 5 standard deviations are 45
    in_shard = [len(mine) for mine in rows[1]]
    assert sum(in_shard) == 500
    assert 5 < min(in_shard) <= max(in_shard) < 45


# ---- trouble ---------------------------------------------------------------------------------------------------------


def cut_all(parts: list[ScorePart], folder: Path, strategy: Strategy = DISTANCE) -> None:
    exact_cut(parts, fraction="0.5", strategy=strategy, destination=str(folder / "selection.parquet"))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, random_shards(0, 6), 2)
    (tmp_path / "part-000001.parquet").unlink()
    with pytest.raises(ScoresIncompleteError, match=r"part-000001\.parquet"):
        cut_all(parts, tmp_path)
    assert not (tmp_path / "selection.parquet").exists()
    assert not [name for name in tmp_path.iterdir() if name.suffix == ".tmp"]


def test_a_line_for_each_sample_is_required(tmp_path: Path) -> None:
    write_parts(tmp_path, [[1.0, 2.0]], 1)
    part = ScorePart(str(tmp_path / "part-000000.parquet"), 0, 0, np.array([3]))
    with pytest.raises(ScoresIncompleteError, match="2 lines for the 3 samples"):
        cut_all([part], tmp_path)


@pytest.mark.parametrize("counts", [[1, 3], [3, 1], [4, 0], [0, 4]])
def test_lines_of_other_samples_are_refused(tmp_path: Path, counts: list[int]) -> None:
    write_parts(tmp_path, [[1.0, 2.0], [3.0, 4.0]], 2)
    part = ScorePart(str(tmp_path / "part-000000.parquet"), 0, 0, np.array(counts))
    with pytest.raises(StoreError, match="not the samples of part 0"):
        cut_all([part], tmp_path)


def test_a_table_of_another_format_is_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [[1.0, 2.0]], 1)
    table = pq.read_table(tmp_path / "part-000000.parquet")
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "part-000000.parquet")
    with pytest.raises(StoreError, match="format unknown"):
        cut_all(parts, tmp_path)
    pq.write_table(table.drop_columns(["distance"]), tmp_path / "part-000000.parquet")
    with pytest.raises(StoreError, match="no column 'distance'"):
        cut_all(parts, tmp_path)
    (tmp_path / "part-000000.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(StoreError, match="not a readable score table"):
        cut_all(parts, tmp_path)


def test_parts_must_follow_each_other(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, random_shards(0, 6), 2)
    with pytest.raises(SelectionError, match="begins at shard 4, not 2"):
        cut_all([parts[0], parts[2]], tmp_path)


def test_tables_that_change_meanwhile_are_noticed(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [[float(i) for i in range(20)]] * 4, 1)
    calls = 0

    def rewriting(function: Callable[[Any], Any], items: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            write_part(parts[0].url or "", 0, [[0.0] * 20])
        return map(function, items)

    with pytest.raises(StoreError, match="changed while they were cut"):
        exact_cut(
            parts,
            fraction="0.5",
            strategy=DISTANCE,
            destination=str(tmp_path / "selection.parquet"),
            ordered_map=rewriting,
        )
    assert not (tmp_path / "selection.parquet").exists()


def test_no_samples_at_all(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [[], []], 1)
    result = exact_cut(parts, fraction=1, strategy=DISTANCE, destination=str(tmp_path / "selection.parquet"))
    assert (result.samples, result.selected, result.threshold) == (0, 0, None)
    assert selected_rows(str(tmp_path / "selection.parquet")) == [[], []]


def test_key_score_of_the_smallest_and_largest() -> None:
    for value in (0.0, -math.inf, math.inf, 1e-45, struct.unpack("<f", b"\x00\x00\x80\x7f")[0]):
        assert key_score(int(score_keys(np.array([value], dtype=np.float32))[0])) == float(np.float32(value))
