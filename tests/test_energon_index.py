"""Energon's `.tar.idx`: against an index made with tarfile, as Energon makes it; and wrong ones, each an error."""

from __future__ import annotations

import json
import os
import re
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_index_job import contents
from test_tar import GLOBALS, entries, writable
from typer.testing import CliRunner

from builders import (
    BLOCK,
    END,
    FORMATS,
    HARD_CASES,
    A,
    B,
    Entry,
    header,
    indexed_samples,
    padded,
    pax_record,
    plain_entries,
    tar_bytes,
    webdataset_samples,
)
from dynams_stream import Store, energon_index, index, schema, storage, tar
from dynams_stream.errors import BadShardsError, DuplicateMemberError, EnergonIndexError, ShardError, UsageError
from dynams_stream.index import IndexedShard, index_shard
from pipeline.energon_job import write_energon_indexes
from pipeline.index_job import build_index
from tools.index_shards import app


def energon_entries(path: str | Path) -> list[int]:
    """The entries of a shard's index, found as Energon finds them: with tarfile, by its two regular expressions."""
    found: list[int] = []
    last = None
    with tarfile.open(path, mode="r:") as shard:
        for member in shard:
            if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
                continue
            name = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
            if name is None:
                continue
            if name.group(1) != last:
                last = name.group(1)
                found.append(member.offset)
        return [*found, shard.offset]


def write_index(url: str, values: list[int]) -> None:
    """An index beside a shard, written as Energon writes it."""
    Path(energon_index.index_url(url)).write_bytes(np.array(values, dtype="<u8").tobytes())


def same(one: IndexedShard, other: IndexedShard) -> bool:
    """Whether two indexes say the same of one shard."""
    a, b = one.index, other.index
    return (
        (one.bytes, one.fingerprint, one.repeated_keys) == (other.bytes, other.fingerprint, other.repeated_keys)
        and (a.keys.to_pylist(), a.extensions) == (b.keys.to_pylist(), b.extensions)
        and index.part_digest(0, [a]) == index.part_digest(0, [b])
    )


def outcome(work: Callable[[], IndexedShard]) -> IndexedShard | ShardError:
    try:
        return work()
    except ShardError as error:
        return error


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars")


@pytest.fixture(scope="module", autouse=True)
def _small_ranges() -> Iterator[None]:
    """Cut shards of a few blocks, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energon_index, "_SHORTEST", BLOCK)
        yield


def write(place: Path, data: bytes) -> str:
    path = place / f"{uuid.uuid4().hex}.tar"
    path.write_bytes(data)
    return str(path)


# ---- the format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/data/train-000000.tar", "/data/train-000000.tar.idx"),
        ("s3://bucket/v1.0/a.b.tar", "s3://bucket/v1.0/a.b.tar.idx"),
        ("/v1.0/plain", "/v1.0/plain.tar.idx"),
        ("/data/a.TAR", "/data/a.tar.idx"),
    ],
)
def test_the_index_is_named_as_pathlib_names_it(url: str, name: str) -> None:
    assert energon_index.index_url(url) == name


MORE_CASES = {
    **HARD_CASES,
    "bad samples between others": tar_bytes(
        [Entry("a.jpg", A), Entry("b.jpg"), Entry("b.__bad__", b"1"), Entry("a.cls"), Entry("c.jpg")]
    ),
    "a bad sample at the end": tar_bytes([Entry("a.jpg", A), Entry("b.jpg"), Entry("b.__bad__", b"1")]),
    "members of no sample around": tar_bytes(
        [Entry("__m__/x.y"), Entry("README"), Entry("a.jpg", A), Entry("LICENSE", B), Entry("a.cls"), Entry("NOTES")]
    ),
    "global header between a member's own": (
        header(b"a.jpg", len(A))
        + padded(A)
        + header(b"././@LongLink", 9, b"L")
        + padded(b"long.jpg\0")
        + header(b"g", len(pax_record("comment", "x")), b"g")
        + padded(pax_record("comment", "x"))
        + header(b"b.jpg", 1)
        + padded(b"1")
        + END
    ),
    "global header before a member": b"".join(
        header(b"g", len(pax_record("comment", "x")), b"g")
        + padded(pax_record("comment", "x"))
        + header(b"%d.jpg" % row, 1)
        + padded(b"1")
        for row in range(8)
    )
    + END,
    "global path in the middle": tar_bytes(plain_entries(6))[: 6 * 5 * BLOCK]
    + header(b"g", len(pax_record("path", "all.x")), b"g")
    + padded(pax_record("path", "all.x"))
    + tar_bytes([Entry("a"), *(Entry(f"{row}.jpg", pax={"path": f"{row}.own"}) for row in range(8))], "pax"),
    "a usual shard": tar_bytes(plain_entries(40)),
    "a usual PAX shard": tar_bytes([Entry(f"{row}.{ext}", A, mtime=0.5) for row in range(9) for ext in "xy"], "pax"),
}


@pytest.mark.parametrize("ranges", [1, 2, 5])
@pytest.mark.parametrize("name", MORE_CASES)
@pytest.mark.filterwarnings("ignore")
def test_by_energons_index_a_hard_case_is_read_as_without(name: str, ranges: int, place: Path) -> None:
    url = write(place, MORE_CASES[name])
    plain, found = index_shard(url), energon_entries(url)
    write_index(url, found)
    by_energon = energon_index.index_shard(url, ranges)
    assert by_energon.by_energon
    assert not plain.by_energon
    assert same(plain, by_energon)
    assert indexed_samples(url, plain.index) == webdataset_samples(url)
    with_reader = energon_index.entries_of(storage.open_reader(url), url, plain.index)
    assert with_reader.tolist() == found


def test_the_hard_cases_hold_what_their_names_say(place: Path) -> None:
    places = {name: energon_entries(write(place, data)) for name, data in MORE_CASES.items()}
    assert places["no members"] == [0]
    assert places["a bad sample at the end"] == [0, 2048, 3584]
    assert places["global header between a member's own"] == [0, 2048, 5120]
    assert places["global header before a member"][:2] == [1024, 3072]
    assert places["global path in the middle"][6:8] == [16384, 16896]
    assert places["members of no sample around"] == [1024, 5632]
    assert len(places["bad samples between others"]) == 5


GOOD_AND_BAD = st.lists(entries(), max_size=12)


@given(GOOD_AND_BAD, st.sampled_from(sorted(FORMATS)), GLOBALS, st.integers(0, 2), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_any_tar_is_read_and_described_as_without_it(
    place: Path, made: list[Entry], format: str, globals_: dict[str, str], ends: int, ranges: int
) -> None:
    made = [entry for entry in made if writable(entry, format)]
    data = tar_bytes(made, format, globals_)
    url = write(place, padded(data.rstrip(b"\0")) + bytes(BLOCK * ends) or END)
    try:
        found = energon_entries(url)
    except tarfile.ReadError:
        return  # Energon makes no index of it
    plain = outcome(lambda: index_shard(url))
    write_index(url, found)
    by_energon = outcome(lambda: energon_index.index_shard(url, ranges))
    if isinstance(plain, ShardError):
        assert (type(by_energon), str(by_energon)) == (type(plain), str(plain))
        return
    assert not isinstance(by_energon, ShardError)
    assert same(plain, by_energon)
    assert energon_index.entries_of(storage.open_reader(url), url, plain.index).tolist() == found


# ---- wrong ones ------------------------------------------------------------------------------------------------------

MIXED = tar_bytes(
    [
        Entry("__meta__.json", B),
        Entry("d", kind=tarfile.DIRTYPE),
        *plain_entries(6),
        Entry("k" * 120 + ".jpg", A),
        Entry("README", B),
        *plain_entries(2),
    ]
)


@given(st.data(), st.integers(1, 4))
@settings(max_examples=120, deadline=None)
def test_entries_that_are_not_the_shards_are_refused_whatever_they_are(
    place: Path, data: st.DataObject, ranges: int
) -> None:
    url = write(place, MIXED)
    right = energon_entries(url)
    blocks = st.integers(0, len(MIXED) // BLOCK + 1).map(lambda block: block * BLOCK)
    wrong = list(right)
    for _ in range(data.draw(st.integers(1, 2))):
        position = data.draw(st.integers(0, len(wrong) - 1))
        change = data.draw(st.sampled_from(["set", "add", "remove", "shift"]))
        if change == "set":
            wrong[position] = data.draw(blocks)
        elif change == "add":
            wrong = sorted([*wrong, data.draw(blocks)])
        elif change == "shift":
            wrong[position] += BLOCK
        elif len(wrong) > 1:
            del wrong[position]
    write_index(url, wrong)
    if wrong == right:
        assert energon_index.index_shard(url, ranges).by_energon
        return
    with pytest.raises(EnergonIndexError, match=re.escape(url)) as caught:
        energon_index.index_shard(url, ranges)
    assert caught.value.shard == url
    assert "--to-energon" in str(caught.value)


SHARD = tar_bytes(plain_entries(8))  # a sample is 5 blocks: 0, 2560, …, 17920, and the end is 20480
RIGHT = [2560 * row for row in range(9)]
WRONG: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", r"it has 0 bytes, and should have 8 for each sample and 8 more"),
    "half an entry": (np.array(RIGHT, "<u8").tobytes()[:-3], r"it has 69 bytes"),
    "no multiples of 512": (np.array(RIGHT, "<u8").tobytes()[1:] + b"\0", "entry 1 is byte 10, and headers are at"),
    "big-endian": (np.array(RIGHT, ">u8").tobytes(), r"entry 8, the last, is byte \d+, and the shard has 30720"),
    "unordered": (
        np.array([0, 5120, 2560, *RIGHT[3:]], "<u8").tobytes(),
        r"entry 2 is byte 2560, and the one before it byte 5120",
    ),
    "twice the same": (np.array([0, 0, *RIGHT[1:]], "<u8").tobytes(), "entry 1 is byte 0, and the one before it"),
    "beyond the file": (
        np.array([*RIGHT[:-1], 1 << 40], "<u8").tobytes(),
        r"entry 8, the last, is byte 1099511627776, and the shard has 30720 bytes",
    ),
    "beyond what is signed": (np.array([*RIGHT[:-1], 2**64 - 512], "<u8").tobytes(), "entry 8, the last, is byte 184"),
    "in the middle of data": (
        np.array([*RIGHT[:4], RIGHT[4] + 512, *RIGHT[5:]], "<u8").tobytes(),
        r"entry 4 is byte 10752, and (the headers before it lead to byte|that sample begins at byte) (10240|11776)",
    ),
    "at the second member": (
        np.array([*RIGHT[:4], RIGHT[4] + 1536, *RIGHT[5:]], "<u8").tobytes(),
        r"entry 4 is byte 11776, and that sample begins at byte 10240",
    ),
    "the end at the last block": (
        np.array([*RIGHT[:-1], 30720], "<u8").tobytes(),
        r"entry 8(, the last,)? is byte 30720, and the (headers before it lead to|tar ends at) byte 20480",
    ),
    "cut after some entries": (
        np.array(RIGHT[:5], "<u8").tobytes(),
        r"entry 4, the last, is byte 10240, and the tar ends at byte 20480",
    ),
    "a sample too few": (
        np.array([*RIGHT[:-2], RIGHT[-1]], "<u8").tobytes(),
        r"it has entries for 7 samples, and the shard has 8",
    ),
}


@pytest.mark.parametrize("ranges", [1, 4])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_an_error_that_names_it_the_shard_and_the_entry(name: str, ranges: int, place: Path) -> None:
    url = write(place, SHARD)
    assert energon_entries(url) == RIGHT
    data, message = WRONG[name]
    Path(f"{url}.idx").write_bytes(data)
    with pytest.raises(EnergonIndexError, match=f"{url}.idx is not the index of {url}: {message}.*--from-energon"):
        energon_index.index_shard(url, ranges)


@pytest.mark.parametrize("ranges", [1, 4])
def test_an_index_that_is_older_than_its_shard_is_an_error(ranges: int, place: Path) -> None:
    url = write(place, SHARD)
    write_index(url, RIGHT)
    Path(url).write_bytes(tar_bytes(plain_entries(8, (("jpg", 200), ("cls", 1)))))
    with pytest.raises(EnergonIndexError, match="is not the index of"):
        energon_index.index_shard(url, ranges)


def test_a_header_that_says_more_of_a_member_belongs_to_it(place: Path) -> None:
    url = write(place, tar_bytes([Entry("a.jpg", A), Entry("k" * 120 + ".jpg", A), Entry("c.jpg", A)]))
    right = energon_entries(url)
    write_index(url, [right[0], right[1] + 2 * BLOCK, *right[2:]])
    for ranges in (1, 4):
        with pytest.raises(EnergonIndexError, match=r"entry 1 is byte 3072, and .* byte 2048"):
            energon_index.index_shard(url, ranges)


@pytest.mark.parametrize("ranges", [1, 4])
def test_what_is_wrong_with_a_shard_is_said_as_without_it(ranges: int, place: Path) -> None:
    url = write(place, tar_bytes([*plain_entries(5), Entry("x.jpg"), Entry("x.JPG"), *plain_entries(5)]))
    write_index(url, energon_entries(url))
    with pytest.raises(DuplicateMemberError, match="row 5, key 'x': two members"):
        energon_index.index_shard(url, ranges)


def test_an_index_that_cannot_be_read_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(place, SHARD)
    Path(f"{url}.idx").mkdir()
    with pytest.raises(EnergonIndexError, match=rf"{url}\.idx, Energon's index of {url}, cannot be read \(.*directory"):
        energon_index.index_shard(url)


# ---- how it is read --------------------------------------------------------------------------------------------------


def test_several_ranges_are_read_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(place, tar_bytes(plain_entries(40, (("mp4", 60_000), ("cls", 1)))))
    write_index(url, energon_entries(url))
    monkeypatch.setattr(energon_index, "_SHORTEST", 100_000)
    pread, lock = storage.LocalReader.pread, threading.Lock()
    under_way, most, reads = 0, 0, 0

    def slow(self: storage.LocalReader, offset: int, size: int) -> bytes:
        nonlocal under_way, most, reads
        with lock:
            under_way, reads = under_way + 1, reads + 1
            most = max(most, under_way)
        time.sleep(0.002)
        with lock:
            under_way -= 1
        return pread(self, offset, size)

    monkeypatch.setattr(storage.LocalReader, "pread", slow)
    plain = index_shard(url)
    alone, reads = reads, 0
    assert most == 1
    assert same(energon_index.index_shard(url, 4), plain)
    assert 3 <= most <= 4
    assert reads <= 1.5 * alone + 16


def test_ranges_lie_side_by_side_and_read_no_byte_of_each_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(place, tar_bytes(plain_entries(400, (("jpg", 900), ("cls", 1)))))
    right = energon_entries(url)
    write_index(url, right)
    reads: list[tuple[int, int]] = []
    pread = storage.LocalReader.pread
    monkeypatch.setattr(
        storage.LocalReader,
        "pread",
        lambda self, offset, size: reads.append((offset, offset + size)) or pread(self, offset, size),
    )
    energon_index.index_shard(url, 4)
    walked = sorted(read for read in reads if read != (0, 512))  # but for the fingerprint's
    assert walked[0][0] == 0
    assert all(stop <= start for (_, stop), (start, _) in pairwise(walked))
    assert len(set(right) & {start for start, _ in walked}) >= 16


def test_a_usual_shards_index_is_made_without_reading_its_headers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(place, tar_bytes(plain_entries(300)))
    indexed = index_shard(url).index
    reads: list[int] = []
    pread = storage.LocalReader.pread
    monkeypatch.setattr(
        storage.LocalReader, "pread", lambda self, offset, size: reads.append(offset) or pread(self, offset, size)
    )
    found = energon_index.entries_of(storage.open_reader(url), url, indexed)
    assert min(reads) == found[-1] == 300 * 5 * BLOCK
    assert found.tolist() == energon_entries(url)


# ---- the command -----------------------------------------------------------------------------------------------------


def dynams_index(*arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["--json", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def in_words(*arguments: Any) -> list[str]:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Five shards, one of each sort."""
    folder = tmp_path / "shards"
    folder.mkdir()
    sorts = ("a usual shard", "a usual PAX shard", "bad samples between others", "no members", "metadata members")
    paths = [folder / f"train-{number:06d}.tar" for number in range(len(sorts))]
    for path, sort in zip(paths, sorts, strict=True):
        path.write_bytes(MORE_CASES[sort])
    return [str(path) for path in paths]


def test_the_command_reads_by_energons_index_and_makes_the_same_store(shards: list[str], tmp_path: Path) -> None:
    for url in shards[:-1]:
        write_index(url, energon_entries(url))
    plain = dynams_index(*shards, "--store", tmp_path / "plain")
    for workers in (1, 8):
        found = dynams_index(*shards, "--store", tmp_path / f"by-{workers}", "--from-energon", "--workers", workers)
        assert (found["energon_shards"], found["reused_shards"], found["shards"]) == (4, 0, 5)
        assert {**found, "energon_shards": 0, "seconds": 0} == {**plain, "seconds": 0}
        assert contents(Store(tmp_path / f"by-{workers}")) == contents(Store(tmp_path / "plain"))
    words = in_words(*shards, "--store", tmp_path / "words", "--from-energon")
    assert words[-1] == "5 shards were read, 4 of them by the .tar.idx beside them; the others have none"
    assert in_words(*shards, "--store", tmp_path / "words", "--from-energon") == [
        f"{tmp_path / 'words'}: dataset version 1 describes these 5 shards already"
    ]


def test_the_command_ends_with_the_error_of_a_wrong_index(shards: list[str], tmp_path: Path) -> None:
    write_index(shards[0], [*energon_entries(shards[0])[:-2], 10_000 * BLOCK])
    with pytest.raises(
        BadShardsError, match=rf"1 of 5 shards .*\n  {shards[0]}\.idx is not the index of {shards[0]}: "
    ):
        dynams_index(*shards, "--store", tmp_path / "store", "--from-energon")
    assert dynams_index(*shards, "--store", tmp_path / "store")["published"]


def test_the_command_writes_what_energon_writes_and_only_what_is_not_there(shards: list[str], tmp_path: Path) -> None:
    store = ["--store", tmp_path / "store"]
    found = dynams_index(*shards, *store, "--to-energon")
    assert (found["published"], found["energon_written"]) == (True, 5)
    for url in shards:
        assert np.fromfile(f"{url}.idx", "<u8").tolist() == energon_entries(url)
        assert energon_index.index_shard(url, 3).by_energon
    os.utime(f"{shards[1]}.idx", ns=(0, 0))
    Path(f"{shards[2]}.idx").write_bytes(b"anything")
    Path(f"{shards[3]}.idx").unlink()
    assert in_words(*store, "--to-energon", "--dry-run") == ["would write Energon's index beside 5 shards"]
    assert in_words(*store, "--to-energon") == [
        "Energon's index written beside 2 of 5 shards; beside the other 3 it is already"
    ]
    assert os.stat(f"{shards[1]}.idx").st_mtime_ns == 0
    assert np.fromfile(f"{shards[2]}.idx", "<u8").tolist() == energon_entries(shards[2])
    assert {path.name for path in Path(shards[0]).parent.iterdir()} == {
        name for url in shards for name in (Path(url).name, f"{Path(url).name}.idx")
    }
    again = dynams_index(*store, "--to-energon")
    assert (again["dataset"], again["shards"], again["energon_written"]) == (1, 5, 0)
    both = dynams_index(*store, "--refresh", "--from-energon", "--to-energon")
    assert (both["published"], both["energon_written"]) == (False, 0)


def test_it_is_written_of_the_shard_that_was_indexed_alone(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    build_index(store, shards)
    Path(shards[0]).write_bytes(SHARD)
    Path(shards[3]).unlink()
    write_bytes = storage.write_bytes

    def refuse_one(url: str, data: bytes) -> None:
        if url == f"{shards[1]}.idx":
            raise PermissionError(13, "Permission denied", url)
        write_bytes(url, data)

    monkeypatch.setattr(storage, "write_bytes", refuse_one)
    with pytest.raises(BadShardsError) as caught:
        write_energon_indexes(store)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("beside 3 of 5 shards Energon's index could not be written; beside the others it is")
    assert "not the shard that was indexed" in lines[1]
    assert f"{shards[1]}.idx cannot be written ([Errno 13]" in lines[2]
    assert "copy the shards" in lines[2]
    assert "no such file" in lines[3]
    assert [os.path.exists(f"{url}.idx") for url in shards] == [False, False, True, False, True]


def test_a_moved_shard_gets_its_index_where_it_is(shards: list[str], tmp_path: Path) -> None:
    build_index(Store(tmp_path / "store"), shards)
    moved = Path(shards[0]).parent.rename(tmp_path / "moved")
    report = write_energon_indexes(Store(tmp_path / "store", shards_at=moved))
    assert report.written == 5
    assert np.fromfile(moved / "train-000001.tar.idx", "<u8").tolist() == energon_entries(moved / "train-000001.tar")


def test_wrong_uses_are_refused(shards: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name them, or give --refresh"):
        dynams_index("--store", tmp_path / "store", "--from-energon", "--to-energon")
    with pytest.raises(EnergonIndexError, match=r"http://127\.0\.0\.1:9/a\.tar\.idx cannot be written \(nothing is"):
        energon_index.write_entries("http://127.0.0.1:9/a.tar", np.zeros(1, np.int64))
    other = shards[0].replace(".tar", ".bin")
    Path(other).write_bytes(SHARD)
    build_index(Store(tmp_path / "two"), [shards[0], other])
    with pytest.raises(UsageError, match=r"the index of 2 shards at .*/train-000000\.tar\.idx"):
        write_energon_indexes(Store(tmp_path / "two"))


def test_both_ways_in_an_object_store(s3_bucket: str, shards: list[str], tmp_path: Path) -> None:
    root, system = f"{s3_bucket}/energon", fsspec.filesystem("s3", use_listings_cache=False)
    remote = [f"{root}/{Path(url).name}" for url in shards]
    for url, copy in zip(shards, remote, strict=True):
        system.put_file(url, copy)
    found = dynams_index(*remote, "--store", tmp_path / "plain", "--to-energon")
    assert found["energon_written"] == 5
    for url, copy in zip(shards, remote, strict=True):
        assert np.frombuffer(storage.read_bytes(f"{copy}.idx"), "<u8").tolist() == energon_entries(url)
    storage.remove(f"{remote[1]}.idx")
    found = dynams_index(*remote, "--store", tmp_path / "by", "--from-energon")
    assert found["energon_shards"] == 4
    plain, by_energon = (contents(Store(tmp_path / name)) for name in ("plain", "by"))
    assert plain == by_energon
    assert schema.dataset_path(1) in plain
    assert dynams_index("--store", tmp_path / "by", "--to-energon")["energon_written"] == 1
    system.pipe_file(f"{remote[2]}.idx", b"12345678" * 3)
    with pytest.raises(BadShardsError, match=rf"{remote[2]}\.idx is not the index of {remote[2]}: entry 0 is byte"):
        dynams_index(*remote, "--store", tmp_path / "again", "--from-energon")


def test_a_walk_goes_on_where_it_stopped(place: Path) -> None:
    url = write(place, SHARD)
    walk = tar.Walk(storage.open_reader(url), url)
    whole = list(tar.read_members(tar.Walk(storage.open_reader(url), url)))
    assert [*tar.read_members(walk, RIGHT[3]), *tar.read_members(walk)] == whole
    assert walk.offset == RIGHT[-1]
