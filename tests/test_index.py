"""The member index: its file, reading it back by shard and whole, and the cut into parts."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import Entry, data_of, plain_entries, tar_bytes, webdataset_samples
from dynams_stream import schema, storage
from dynams_stream.errors import StoreError
from dynams_stream.index import (
    ShardIndex,
    assign_parts,
    index_shard,
    read_part_index,
    read_shard_index,
    repeated_keys,
    write_index,
    write_part_index,
)

Rows = list[tuple[str, list[tuple[str, int, int]]]]


def index_of(rows: Rows) -> ShardIndex:
    """The arrays of a shard, from its rows."""
    members = [member for _, found in rows for member in found]
    extensions = tuple(dict.fromkeys(extension for extension, _, _ in members))
    return ShardIndex(
        keys=pa.array([key for key, _ in rows], pa.string()),
        starts=np.cumsum([0, *(len(found) for _, found in rows)]).astype(np.int64),
        extensions=extensions,
        extension_codes=np.array([extensions.index(extension) for extension, _, _ in members], dtype=np.int32),
        offsets=np.array([offset for _, offset, _ in members], dtype=np.int64),
        sizes=np.array([size for _, _, size in members], dtype=np.int64),
    )


def rows_of(index: ShardIndex) -> Rows:
    return [(key, index.members(row)) for row, key in enumerate(index.keys.to_pylist())]


def many_rows(count: int, first: int = 0) -> Rows:
    return [
        (f"key-{row:07d}", [("jpg", 512 + 2048 * row, 1000), ("cls", 2048 * row + 2560, 1)])
        for row in range(first, first + count)
    ]


TEXT = st.text("abäß/.\0 ", max_size=6)
MEMBERS = st.lists(st.tuples(TEXT, st.integers(0, 2**50), st.integers(0, 2**50)), min_size=1, max_size=4)
SHARDS = st.lists(st.lists(st.tuples(TEXT, MEMBERS), max_size=6), min_size=1, max_size=5)


@given(SHARDS, st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, shards: list[Rows], first: int) -> None:
    store = tmp_path_factory.mktemp("store")
    url = str(store / write_part_index(str(store), 3, first, [index_of(rows) for rows in shards]))
    whole = read_part_index(url)
    assert list(whole) == list(range(first, first + len(shards)))
    for shard, rows in enumerate(shards, first):
        for found in (whole[shard], read_shard_index(url, shard)):
            assert rows_of(found) == rows
            assert len(found) == len(rows)
            assert (found.starts.dtype, found.extension_codes.dtype) == (np.int64, np.int32)
            assert (found.offsets.dtype, found.sizes.dtype) == (np.int64, np.int64)
            assert found.starts.shape == (len(rows) + 1,)


def test_the_file_is_plain_parquet_in_the_stores_schema(tmp_path: Path) -> None:
    shards = [many_rows(5), [], many_rows(2)]
    url = str(tmp_path / write_part_index(str(tmp_path), 0, 10, [index_of(rows) for rows in shards]))
    table = pq.read_table(url)
    assert table.schema.equals(schema.INDEX_SCHEMA)
    assert table.to_pylist() == [
        {
            "shard": shard,
            "row": row,
            "key": key,
            "members": [{"ext": extension, "offset": offset, "size": size} for extension, offset, size in members],
        }
        for shard, rows in enumerate(shards, 10)
        for row, (key, members) in enumerate(rows)
    ]
    metadata = pq.read_metadata(url)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    assert [group.column(0).statistics.min for group in groups] == [10, 12]
    assert {column.compression for group in groups for column in map(group.column, range(6))} == {"ZSTD"}


def test_a_large_shard_is_split_into_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "INDEX_GROUP_ROWS", 10)
    shards = [many_rows(25), many_rows(3)]
    url = str(tmp_path / write_part_index(str(tmp_path), 0, 0, [index_of(rows) for rows in shards]))
    metadata = pq.read_metadata(url)
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [10, 10, 5, 3]
    assert rows_of(read_shard_index(url, 0)) == shards[0]
    assert rows_of(read_part_index(url)[0]) == shards[0]


def test_the_name_says_the_content_and_the_bytes_are_reproducible(tmp_path: Path) -> None:
    shards = [index_of(many_rows(50)), index_of([])]
    path = write_part_index(str(tmp_path / "a"), 7, 3, shards)
    assert path == write_part_index(str(tmp_path / "b"), 7, 3, [index_of(many_rows(50)), index_of([])])
    assert path.startswith("index/part-000007-")
    assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    key, members = many_rows(50)[20]
    (extension, offset, size), *others = members
    changed = [
        (f"{key}x", members),
        (key, [("png", offset, size), *others]),
        (key, [(extension, offset + 1, size), *others]),
        (key, [(extension, offset, size + 1), *others]),
        (key, others),
    ]
    names = {path}
    for line in changed:
        rows = many_rows(50)
        rows[20] = line
        names.add(write_part_index(str(tmp_path / "a"), 7, 3, [index_of(rows), index_of([])]))
    names.add(write_part_index(str(tmp_path / "a"), 7, 4, shards))
    names.add(write_part_index(str(tmp_path / "a"), 7, 3, shards[:1]))
    names.add(write_part_index(str(tmp_path / "a"), 7, 3, shards[::-1]))
    assert len(names) == 1 + len(changed) + 3


def test_the_name_does_not_depend_on_where_the_arrays_come_from(tmp_path: Path) -> None:
    path = write_part_index(str(tmp_path), 0, 0, [index_of(many_rows(5)), index_of(many_rows(6, 5))])
    again = list(read_part_index(str(tmp_path / path)).values())
    assert write_part_index(str(tmp_path / "again"), 0, 0, again) == path


def test_an_index_that_the_newest_version_names_is_not_written_again_any_other_is(tmp_path: Path) -> None:
    name = write_part_index(str(tmp_path), 0, 0, [index_of(many_rows(5))])
    path = tmp_path / name
    os.utime(path, (1, 1))
    data = path.read_bytes()
    write_part_index(str(tmp_path), 0, 0, [index_of(many_rows(5))], named={name})
    assert path.stat().st_mtime == 1
    write_part_index(str(tmp_path), 0, 0, [index_of(many_rows(5))])
    assert path.stat().st_mtime > 1  # fresh, so that nobody takes it for garbage
    assert path.read_bytes() == data
    path.unlink()
    write_part_index(str(tmp_path), 0, 0, [index_of(many_rows(5))], named={name})
    assert path.read_bytes() == data


class CountingFile(io.FileIO):
    """A file that knows how many bytes were read from it."""

    read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        CountingFile.read_bytes += len(data or b"")
        return data or b""


def test_reading_a_shard_reads_little_more_than_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)

    def shard(rows: int) -> ShardIndex:
        offsets = random.integers(0, 2**40, rows)  # hard to compress
        return index_of([(f"{offset:x}", [("jpg", int(offset), int(offset % 9999))]) for offset in offsets])

    url = str(tmp_path / write_part_index(str(tmp_path), 0, 0, [shard(2000) for _ in range(20)]))
    monkeypatch.setattr(storage, "open_random", lambda url: CountingFile(url))
    CountingFile.read_bytes = 0
    first = read_shard_index(url, 4)
    assert len(first) == 2000
    size = Path(url).stat().st_size
    assert CountingFile.read_bytes < size / 20 + 65536 + 2000  # Arrow fetches 64 KiB to find the footer
    CountingFile.read_bytes = 0
    assert len(read_shard_index(url, 5)) == 2000
    assert CountingFile.read_bytes < size / 19


def test_a_footer_that_was_kept_is_not_used_for_another_file(tmp_path: Path) -> None:
    url = tmp_path / "part.parquet"
    for rows in (many_rows(5), many_rows(700), many_rows(9, 3)):
        with storage.atomic_writer(str(url)) as file:
            write_index(file, 0, [index_of(rows)])
        assert rows_of(read_shard_index(str(url), 0)) == rows


def test_what_is_no_index_is_refused_in_words(tmp_path: Path) -> None:
    url = str(tmp_path / write_part_index(str(tmp_path), 0, 5, [index_of(many_rows(5))] * 2))
    with pytest.raises(StoreError, match=r"holds shards 5 to 6, not 7; index the dataset again"):
        read_shard_index(url, 7)
    with pytest.raises(StoreError, match=r"gone\.parquet: this part of the member index is gone"):
        read_part_index(str(tmp_path / "gone.parquet"))
    Path(url).write_bytes(b"PAR1 broken PAR1")
    with pytest.raises(StoreError, match="cannot be read"):
        read_part_index(url)
    pq.write_table(pa.table({"shard": [1]}), url)
    with pytest.raises(StoreError, match="format unknown"):
        read_part_index(url)
    pq.write_table(pa.table({"shard": [1]}).replace_schema_metadata({schema.FORMAT_KEY: b"1"}), url)
    with pytest.raises(StoreError, match="no member index"):
        read_part_index(url)
    pq.write_table(pa.table({"shard": [1]}).replace_schema_metadata({schema.FORMAT_KEY: b"99"}), url)
    with pytest.raises(StoreError, match="format 99, this version reads 1"):
        read_shard_index(url, 1)


def test_a_remote_index_is_the_same(tmp_path: Path) -> None:
    shards = [index_of(many_rows(40)), index_of([]), index_of(many_rows(2))]
    path = write_part_index("memory://index-store", 0, 0, shards)
    assert path == write_part_index(str(tmp_path), 0, 0, shards)
    url = f"memory://index-store/{path}"
    assert storage.read_bytes(url) == (tmp_path / path).read_bytes()
    assert rows_of(read_shard_index(url, 2)) == many_rows(2)
    assert [len(index) for index in read_part_index(url).values()] == [40, 0, 2]


# ---- indexing a shard ------------------------------------------------------------------------------------------------


def test_an_indexed_shard_says_what_it_was_made_from(tmp_path: Path) -> None:
    entries = [*plain_entries(4), Entry("000001.txt", b"again"), Entry("000003.txt", b"again"), Entry("000001.jpg")]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(entries))
    indexed = index_shard(str(path))
    assert indexed.bytes == path.stat().st_size
    reader = storage.open_reader(str(path))
    assert indexed.fingerprint == storage.fingerprint(reader)
    keys = [sample["__key__"] for sample in webdataset_samples(path)]
    assert indexed.index.keys.to_pylist() == keys
    assert keys[4:] == ["000001", "000003", "000001"]
    assert indexed.repeated_keys == repeated_keys(indexed.index) == 3
    assert indexed.index.extensions == ("jpg", "cls", "txt")
    assert reader.pread(*indexed.index.members(4)[0][1:]) == b"again"


def test_a_shard_that_is_rewritten_while_it_is_read_keeps_its_old_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(plain_entries(4)))
    os.utime(path, (1, 1))
    before = storage.fingerprint(storage.open_reader(str(path)))
    fingerprint = storage.fingerprint

    def then_rewrite(reader: storage.LocalReader) -> str:
        found = fingerprint(reader)
        with path.open("r+b") as file:
            file.seek(600)
            file.write(data_of(9, 4))
        return found

    monkeypatch.setattr(storage, "fingerprint", then_rewrite)
    found = index_shard(str(path)).fingerprint
    monkeypatch.undo()
    assert found == before
    assert not storage.same_bytes(found, storage.fingerprint(storage.open_reader(str(path))), moved=False)


# ---- parts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 10**7)), min_size=1, max_size=300))
def test_parts_are_runs_of_shards_without_gaps(counts: list[int]) -> None:
    samples = np.array(counts, dtype=np.int64)
    parts = assign_parts(samples)
    assert parts.dtype == np.int32
    assert parts[0] == 0
    assert set(np.diff(parts)) <= {0, 1}
    total = int(samples.sum())
    length = max(-(-total // 2000), min(10**5, -(-total // 16)))
    held = np.bincount(parts, weights=samples).astype(np.int64)
    shards = np.bincount(parts)
    assert (held > 0).all() or total == 0
    assert len(held) == 1 or total > 0
    # No part is longer than it need be: of several shards, without the last one that has samples it is too short.
    for part in range(len(held)):
        own = [count for count in samples[parts == part].tolist() if count]
        if len(own) > 1:
            assert held[part] - length <= length - (held[part] - own[-1])
    assert (shards >= 1).all()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([10], [0]),
        ([0, 0, 0], [0, 0, 0]),
        ([0, 5, 0], [0, 0, 0]),
        ([1] * 16, list(range(16))),
        ([1] * 32, [shard // 2 for shard in range(32)]),
        ([3000] * 20, list(range(20))),
        ([100_000] * 20, list(range(20))),
        ([50_000] * 40, [shard // 2 for shard in range(40)]),
        ([10**6] * 1000, list(range(1000))),
        ([2 * 10**8, 1, 1], [0, 1, 1]),
    ],
)
def test_parts_of_known_datasets(counts: list[int], expected: list[int]) -> None:
    assert assign_parts(np.array(counts, dtype=np.int64)).tolist() == expected


def test_a_huge_dataset_has_about_2000_parts() -> None:
    parts = assign_parts(np.full(100_000, 10_000, dtype=np.int64))
    assert parts[-1] + 1 == 2000
    assert set(np.bincount(parts)) == {50}
