"""Selection and its file."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynams_stream import schema
from dynams_stream.errors import StoreError, UsageError
from dynams_stream.selection import Selection, recorded_fraction, selected_count
from dynams_stream.selection_file import selection_writer

sorted_rows = st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=8).map(sorted)
parts_of_shards = st.lists(st.lists(sorted_rows, min_size=1, max_size=5), max_size=5)


def write(url: str, parts: list[list[list[int]]], weights: bool = False) -> str:
    with selection_writer(url) as writer:
        for shards in parts:
            rows = np.array([row for shard in shards for row in shard], dtype=np.uint32)
            weight = (rows % 7 / 8).astype(np.float32) if weights else None
            writer.append(np.array([len(shard) for shard in shards]), rows, weight)
    return writer.digest


@settings(deadline=None)
@given(parts=parts_of_shards, weights=st.booleans())
def test_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]], weights: bool
) -> None:
    url = str(tmp_path_factory.mktemp("selection") / "selection.parquet")
    digest = write(url, parts, weights)
    shards = [shard for part in parts for shard in part]
    selection = Selection.read(url)
    assert selection.counts.tolist() == [len(shard) for shard in shards]
    assert selection.counts.dtype == np.int64
    assert selection.total == sum(len(shard) for shard in shards)
    for shard, rows in enumerate(shards):
        assert selection.rows(shard).tolist() == rows
        assert selection.rows(shard).dtype == np.uint32
        found = selection.weights(shard)
        if weights and selection.total:
            assert found is not None
            assert found.tolist() == [row % 7 / 8 for row in rows]
        else:
            assert found is None
    assert selection.digest == digest == hashlib.sha256(Path(url).read_bytes()).hexdigest()
    assert pq.read_table(url)["rows"].to_pylist() == shards


def test_bytes_are_the_same_each_time_and_name_no_place(tmp_path: Path) -> None:
    parts = [[[1, 2], []], [[0, 5, 9]]]
    first, second = tmp_path / "a" / "selection.parquet", tmp_path / "somewhere else.parquet"
    assert write(str(first), parts) == write(str(second), parts)
    assert first.read_bytes() == second.read_bytes()
    file = pq.ParquetFile(first)
    assert set(file.metadata.metadata) == {b"ARROW:schema", schema.FORMAT_KEY}
    assert file.schema_arrow.names == ["shard", "rows", "weights"]
    assert file.metadata.num_row_groups == 2
    rows = file.metadata.row_group(1).column(1)
    assert (rows.path_in_schema, rows.compression) == ("rows.list.element", "ZSTD")
    assert "DELTA_BINARY_PACKED" in rows.encodings


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with selection_writer(str(tmp_path / "selection.parquet")) as writer:
            writer.append(np.array([1]), np.array([3], dtype=np.uint32))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_everything_is_every_row_on_demand() -> None:
    counts = np.array([3, 0, 2**31], dtype=np.int64)
    selection = Selection.everything(counts, "d" * 64)
    assert selection.total == 3 + 2**31
    assert selection.rows(0).tolist() == [0, 1, 2]
    assert selection.rows(1).tolist() == []
    assert selection.rows(0).dtype == np.uint32
    assert selection.weights(0) is None
    assert selection.digest == Selection.everything(counts, "d" * 64).digest
    assert selection.digest not in ("d" * 64, Selection.everything(counts, "e" * 64).digest)


def test_crosses_to_a_worker_process(tmp_path: Path) -> None:
    write(str(tmp_path / "selection.parquet"), [[[4, 7], [1]]], weights=True)
    copy = pickle.loads(pickle.dumps(Selection.read(str(tmp_path / "selection.parquet"))))
    assert copy.rows(0).tolist() == [4, 7]
    assert copy.weights(1).tolist() == [0.125]


def test_memory_is_four_bytes_a_row(tmp_path: Path) -> None:
    rows = np.arange(0, 600_000, 3, dtype=np.uint32)
    with selection_writer(str(tmp_path / "selection.parquet")) as writer:
        for _ in range(5):
            writer.append(np.array([len(rows)]), rows)
    selection = Selection.read(str(tmp_path / "selection.parquet"))
    assert len(pickle.dumps(selection)) < 4.1 * selection.total
    assert len(pickle.dumps(selection)) > 4 * selection.total


# ---- malformed files -------------------------------------------------------------------------------------------------


def malformed(change: Callable[[dict[str, list[Any]]], None]) -> pa.Table:
    columns: dict[str, list[Any]] = {"shard": [0, 1, 2], "rows": [[1, 2], [], [0, 3]], "weights": [None, None, None]}
    change(columns)
    return pa.table(columns, schema=schema.SELECTION_SCHEMA)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.update(shard=[0, 2, 1]), "does not hold shards 0 to 2 in order"),
        (lambda c: c.update(shard=[1, 2, 3]), "does not hold shards 0 to 2 in order"),
        (lambda c: c.update(rows=[[1, 2], [], [3, 0]]), "the rows of shard 2 do not ascend"),
        (lambda c: c.update(rows=[[2, 1], [], [0, 3]]), "the rows of shard 0 do not ascend"),
        (lambda c: c.update(rows=[[1, 2], [5, 5], [0, 3]]), "the rows of shard 1 do not ascend"),
        (lambda c: c.update(rows=[[], [1, 2], [3, 0]]), "the rows of shard 2 do not ascend"),
        (lambda c: c.update(rows=[[3, 0], [1, 2], []]), "the rows of shard 0 do not ascend"),
        (lambda c: c.update(weights=[[0.5, 0.5], None, None]), "shard 2 has not one weight for each of its rows"),
        (lambda c: c.update(weights=[[0.5, 0.5, 0.5], None, [0.5]]), "shard 0 has not one weight for each of its rows"),
    ],
)
def test_a_malformed_selection_is_refused(
    tmp_path: Path, change: Callable[[dict[str, list[Any]]], None], complaint: str
) -> None:
    pq.write_table(malformed(change), tmp_path / "selection.parquet")
    with pytest.raises(StoreError, match=complaint) as caught:
        Selection.read(str(tmp_path / "selection.parquet"))
    assert str(tmp_path) in str(caught.value)


def test_shards_follow_each_other_over_row_groups(tmp_path: Path) -> None:
    good = malformed(lambda columns: None)
    pq.write_table(good, tmp_path / "good.parquet", row_group_size=1)
    assert Selection.read(str(tmp_path / "good.parquet")).rows(2).tolist() == [0, 3]
    pq.write_table(pa.concat_tables([good, good]), tmp_path / "bad.parquet", row_group_size=3)
    with pytest.raises(StoreError, match="row group 1 does not hold shards 3 to 5"):
        Selection.read(str(tmp_path / "bad.parquet"))
    weighted = malformed(lambda columns: columns.update(weights=[[0.5, 1], [], [0.5, 1]]))
    pq.write_table(pa.concat_tables([weighted.slice(0, 2), good.slice(2)]), tmp_path / "bad.parquet", row_group_size=2)
    with pytest.raises(StoreError, match="2 weights for 4 rows"):
        Selection.read(str(tmp_path / "bad.parquet"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "selection.parquet")
    with pytest.raises(StoreError, match="no such file"):
        Selection.read(url)
    Path(url).write_bytes(b"not parquet")
    with pytest.raises(StoreError, match="not a readable Parquet file"):
        Selection.read(url)
    pq.write_table(malformed(lambda columns: None).replace_schema_metadata({schema.FORMAT_KEY: b"99"}), url)
    with pytest.raises(StoreError, match="format 99, this version reads 1"):
        Selection.read(url)
    wrong = pa.schema([("shard", pa.int64())], metadata={schema.FORMAT_KEY: b"1"})
    pq.write_table(pa.table({"shard": [0]}, schema=wrong), url)
    with pytest.raises(StoreError, match="its columns are"):
        Selection.read(url)


# ---- how many --------------------------------------------------------------------------------------------------------


@given(digits=st.integers(0, 10**12), places=st.integers(12, 30), samples=st.integers(0, 10**10))
def test_selected_count_is_exact(digits: int, places: int, samples: int) -> None:
    written = f"{digits}e-{places}"
    assert selected_count(written, samples) == math.ceil(Fraction(digits * samples, 10**places))


@pytest.mark.parametrize(
    ("fraction", "samples", "expected"),
    [
        (0.07, 100, 7),
        (0.1, 30, 3),
        ("0.29", 100, 29),
        (0.57, 100, 57),
        (Decimal("1e-9"), 10**9, 1),
        (1e-9, 1, 1),
        (0, 5, 0),
        (1, 5, 5),
    ],
)
def test_selected_count_takes_the_decimal_as_written(fraction: Any, samples: int, expected: int) -> None:
    assert selected_count(fraction, samples) == expected


@pytest.mark.parametrize("fraction", [1.0000001, -1e-9, math.nan, math.inf, "half", None, True])
def test_selected_count_refuses_others(fraction: Any) -> None:
    with pytest.raises(UsageError, match="a fraction is a number from 0 to 1; got"):
        selected_count(fraction, 10)


@pytest.mark.parametrize("fraction", ["0.10000000000000000001", Decimal("0.12345678901234567890"), "1e-400"])
def test_a_fraction_that_no_float_carries_is_refused(fraction: Any) -> None:
    """It would be recorded as another one, whose round would be taken for its own."""
    with pytest.raises(UsageError, match="no more digits than a float carries; got"):
        selected_count(fraction, 1000)


def test_a_fraction_is_recorded_as_it_is_written() -> None:
    assert {recorded_fraction(one) for one in (0.07, "0.070", " 7e-2", np.float32(0.07), Decimal("0.07"))} == {0.07}
    assert recorded_fraction(1 / 3) == 1 / 3
