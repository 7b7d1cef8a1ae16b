"""Looking samples up: the same members as the index has, whatever their number, size and place, within the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynams_stream import index, members, schema
from dynams_stream.dataset import Dataset, Part
from dynams_stream.errors import StoreError
from dynams_stream.index import ShardIndex
from dynams_stream.members import Found, MemberTables
from dynams_stream.store import Store

Sample = tuple[str, list[tuple[str, int, int]]]

extensions = st.sampled_from([("jpg", "cls"), ("jpg", "cls"), ("jpg", "cls"), ("cls", "jpg", "json"), ("png",)])
keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)


def samples_of(random: np.random.Generator, names: list[tuple[str, ...]], labels: list[str], step: int) -> list[Sample]:
    """Samples one after another in a tar, members in blocks of 512; every fifth has members that lie far apart."""
    offset = 512
    found = []
    for number, (kind, label) in enumerate(zip(names, labels, strict=True)):
        one = []
        for name in kind:
            size = int(random.integers(0, 3000))
            one.append((name, offset, size))
            offset += 512 + -(-size // 512) * 512 + (step if number % 5 == 4 else 0)
        found.append((label, one))
    return found


def index_of(samples: list[Sample]) -> ShardIndex:
    names: dict[str, int] = {}
    flat = [(names.setdefault(name, len(names)), offset, size) for _, each in samples for name, offset, size in each]
    return ShardIndex(
        keys=pa.array([key for key, _ in samples], pa.string()),
        starts=np.cumsum([0, *[len(each) for _, each in samples]], dtype=np.int64),
        extensions=tuple(names),
        extension_codes=np.array([code for code, _, _ in flat], dtype=np.int32),
        offsets=np.array([offset for _, offset, _ in flat], dtype=np.int64),
        sizes=np.array([size for _, _, size in flat], dtype=np.int64),
    )


def tables_of(folder: Path, shards: list[list[Sample]], budget: int = members.BUDGET) -> MemberTables:
    """Tables over a store with two parts."""
    store = Store(folder / "store")
    middle = len(shards) // 2
    parts = []
    for number, (first, own) in enumerate(((0, shards[:middle]), (middle, shards[middle:]))):
        path = index.write_part_index(store.url, number, first, [index_of(samples) for samples in own])
        parts.append(Part(number, first, len(own), sum(map(len, own)), path))
    counts = np.array([len(samples) for samples in shards])
    urls = tuple(f"data-{number}.tar" for number in range(len(shards)))
    dataset = Dataset(1, "d" * 64, urls, counts, urls, counts, tuple(part for part in parts if part.shards))
    return MemberTables(store, dataset, budget=budget)


def told(found: Found) -> list[Sample]:
    """What was found, as key and members."""
    bounds = iter(found.bounds.tolist())
    samples = []
    for number in range(len(found.spans)):
        piece = found.pieces[found.piece[number]]
        key = piece.keys[found.key_starts[number] : found.key_stops[number]]
        offset = int(found.offsets[number])
        own = [(name, next(bounds)) for name in found.kinds[found.kind[number]]]
        samples.append((key, [(name, offset + begin, end - begin) for name, (begin, end) in own]))
    return samples


@settings(max_examples=40, deadline=None)
@given(data=st.data(), group=st.integers(1, 6), seed=st.integers(0, 2**32), step=st.sampled_from([0, 400 * 512, 2**33]))
def test_what_is_found_is_what_was_indexed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, group: int, seed: int, step: int
) -> None:
    random = np.random.default_rng(seed)
    counts = data.draw(st.lists(st.integers(0, 14), min_size=2, max_size=5))
    shards = []
    for count in counts:
        names = data.draw(st.lists(extensions, min_size=count, max_size=count))
        labels = data.draw(st.lists(keys, min_size=count, max_size=count))
        shards.append(samples_of(random, names, labels, step))
    everything = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "INDEX_GROUP_ROWS", data.draw(st.sampled_from([group, 2 * group, 5])))
        patch.setattr(members, "INDEX_GROUP_ROWS", group)
        budget = data.draw(st.sampled_from([1, members.BUDGET]))
        tables = tables_of(tmp_path_factory.mktemp("members"), shards, budget)
        for _ in range(3):
            asked = data.draw(st.lists(st.sampled_from(everything), max_size=25)) if everything else []
            columns = np.array(asked, dtype=np.int64).reshape(-1, 2)
            found = tables.find(columns[:, 0], columns[:, 1])
            expected = [shards[shard][row] for shard, row in asked]
            assert told(found) == expected
            for number, (_, each) in enumerate(expected):
                apart = each[-1][1] + each[-1][2] - each[0][1] - sum(size for *_, size in each) > len(each) * 65536
                assert (found.spans[number] < 0) == apart
                if not apart:
                    assert found.spans[number] == each[-1][1] + each[-1][2] - each[0][1]
            own = np.flatnonzero(np.arange(len(asked)) % 2)
            assert told(found.only(own)) == expected[1::2]
            sizes = found.sums(found.bounds[:, 1] - found.bounds[:, 0])
            assert sizes.tolist() == [sum(size for *_, size in each) for _, each in expected]


def test_pieces_are_kept_within_the_budget_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "INDEX_GROUP_ROWS", 10)
    monkeypatch.setattr(members, "INDEX_GROUP_ROWS", 10)
    random = np.random.default_rng(0)
    shards = [samples_of(random, [("jpg", "cls")] * 100, [f"{row:03d}" for row in range(100)], 0) for _ in range(4)]
    reads: list[int] = []
    read_rows = members.read_rows

    def counting(url: str, wanted: list[tuple[int, int, int]]) -> tuple[ShardIndex, list[int]]:
        reads.append(len(wanted))
        return read_rows(url, wanted)

    monkeypatch.setattr(members, "read_rows", counting)
    tables = tables_of(tmp_path, shards, budget=8_000)
    rows = np.arange(0, 100, 10)
    tables.find(np.zeros(10, dtype=np.int64), rows)
    assert reads == [10]  # ten pieces of one part, at once
    assert tables.held > 8_000  # all that were asked for together stay
    tables.find(np.zeros(10, dtype=np.int64), rows)
    assert reads == [10]
    tables.find(np.full(2, 3), np.array([5, 55]))
    assert reads == [10, 2]
    assert tables.held <= 8_000
    assert sum(piece.nbytes for piece in tables._pieces.values()) == tables.held


def test_a_sample_takes_little_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = 4000
    shards = [samples_of(random, [("jpg", "cls", "json")] * rows, [f"{row:08d}" for row in range(rows)], 0), []]
    tables = tables_of(tmp_path, shards)
    tables.find(np.zeros(rows, dtype=np.int64), np.arange(rows))
    assert tables.held < 60 * rows


def test_an_offset_where_no_member_can_begin_is_refused(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, [[("a", [("jpg", 512, 5)]), ("b", [("jpg", 1500, 5)])], []])
    with pytest.raises(StoreError, match="key 'b' begins at byte 1500, where no tar member can"):
        tables.find(np.array([0]), np.array([0]))


def test_a_missing_part_of_the_index_is_named(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, [samples_of(np.random.default_rng(0), [("jpg",)], ["a"], 0)] * 2)
    (file,) = (tmp_path / "store" / "index").glob("part-000001-*")
    file.unlink()
    tables.find(np.array([0]), np.array([0]))
    with pytest.raises(StoreError, match=r"part-000001-.*this part of the member index is gone"):
        tables.find(np.array([1]), np.array([0]))
