"""Tar headers and the grouping of members, against webdataset on the same bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import uuid
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from builders import (
    BLOCK,
    END,
    FORMATS,
    HARD_CASES,
    A,
    Entry,
    data_of,
    header,
    indexed_samples,
    padded,
    pax_record,
    plain_entries,
    tar_bytes,
    webdataset_samples,
)
from dynams_stream import storage, tar, tar_headers
from dynams_stream.errors import DuplicateMemberError, ShardError, ShardFormatError, ShardMissingError
from dynams_stream.index import index_shard


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars")


def write(place: Path, data: bytes) -> str:
    path = place / f"{uuid.uuid4().hex}.tar"
    path.write_bytes(data)
    return str(path)


# ---- the same samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARD_CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_hard_case_is_read_as_webdataset_reads_it(name: str, place: Path) -> None:
    url = write(place, HARD_CASES[name])
    found = indexed_samples(url, index_shard(url).index)
    expected = webdataset_samples(url)
    assert found == expected
    assert [list(sample) for sample in found] == [list(sample) for sample in expected]


def test_the_hard_cases_hold_what_their_names_say(place: Path) -> None:
    def keys(name: str) -> list[object]:
        return [sample["__key__"] for sample in webdataset_samples(write(place, HARD_CASES[name]))]

    assert keys("keys that come again") == ["a", "b", "a"]
    assert keys("samples marked bad") == ["b"]
    assert keys("global PAX path") == ["g/all", "own"]
    assert keys("PAX path after a GNU long name") == ["pax"]
    assert keys("GNU long name after a PAX path") == ["long"]
    assert keys("hidden files") == ["a/", "a.b/c/"]
    assert keys("no members") == []
    assert keys("metadata members") == ["__info__", "x/__m__/a"]
    assert len(webdataset_samples(write(place, HARD_CASES["PAX size"]))[0]["jpg"]) == 1300  # type: ignore[arg-type]


KEYS = [
    "a",
    "b",
    "dir/a",
    "d.ot/a",
    "d.ot/e/",
    "",
    "./a",
    "__m__/a",
    "__m__",
    "ä",
    "x" * 120,
    "f/" * 70 + "k",
    "p" * 140 + "/k",
]
EXTENSIONS = ["jpg", "JPG", "cls", "seg.png", "", "__bad__", "ÄB", "l" * 90, "a/b", "x\n"]
NAMES = st.one_of(
    st.builds("{}.{}".format, st.sampled_from(KEYS), st.sampled_from(EXTENSIONS)),
    st.sampled_from(["README", "a", "__meta__", "d.ot", "a.b.c/d"]),
    st.text("ab._/\nÄ", min_size=1, max_size=9),
)
KINDS = st.sampled_from([b"0"] * 12 + [b"\0", b"7", b"5", b"2", b"1", b"6", b"V"])
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1024, 2000])
PAX = st.sampled_from([{}] * 6 + [{"path": "pax/na.me"}, {"path": "a.cls/"}, {"comment": "é"}, {"size": "3"}])


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kind = draw(KINDS)
    size = draw(SIZES) if kind in (b"0", b"\0", b"7", b"V") else 0
    pax = draw(PAX)
    if "size" in pax:
        kind, size = b"0", 3
    name = draw(NAMES)
    if kind == b"\0" and name[:100].endswith("/"):
        size = 0  # tarfile takes it for a directory, even when the name is only cut there, and its data for headers
    return Entry(name, data_of(size, size), kind, pax, draw(st.sampled_from([0, 0, 1.5, 7])))


def writable(entry: Entry, format: str) -> bool:
    try:
        tar_bytes([entry], format)
    except (ValueError, UnicodeError):
        return False  # ustar has no place for such a name
    return True


GLOBALS = st.sampled_from([{}] * 6 + [{"comment": "git"}, {"path": "g/all.x"}])


@given(st.lists(entries(), max_size=12), st.sampled_from(sorted(FORMATS)), GLOBALS, st.integers(0, 2))
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_any_tar_is_read_as_webdataset_reads_it(
    place: Path, made: list[Entry], format: str, globals_: dict[str, str], ends: int
) -> None:
    made = [entry for entry in made if writable(entry, format)]
    data = tar_bytes(made, format, globals_)
    data = padded(data.rstrip(b"\0")) + bytes(BLOCK * ends)
    url = write(place, data or END)
    try:
        expected = webdataset_samples(url)
    except ValueError as error:
        if "duplicate file name in tar file" not in str(error):
            raise
        with pytest.raises(DuplicateMemberError) as caught:
            index_shard(url)
        assert caught.value.shard == url
        return
    except tarfile.ReadError:
        with pytest.raises(ShardFormatError):
            index_shard(url)
        return
    indexed = index_shard(url)
    assert indexed_samples(url, indexed.index) == expected
    keys = [sample["__key__"] for sample in expected]
    assert indexed.repeated_keys == len(keys) - len(set(keys))


@given(st.text("ab._/\nÄ\u0130", max_size=14))
@settings(max_examples=2000, deadline=None)
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    key, extension = base_plus_ext(name)
    is_metadata = ("/" not in name and name.startswith("__") and name.endswith("__")) or re.match(
        r"__[^/]*__($|/)", name
    )
    assert tar.split_name(name) == (None if is_metadata or key is None else (key, extension.lower()))


def test_a_name_is_split_in_linear_time() -> None:
    assert tar.split_name("a/" * 1_000_000 + ".") is not None
    assert tar.split_name("a.b/" * 1_000_000 + ".x") is None


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_two_members_with_one_extension_are_refused_by_both(place: Path) -> None:
    url = write(place, tar_bytes([Entry("a.jpg", A), Entry("b.jpg"), Entry("b.cls"), Entry("b.JPG")]))
    with pytest.raises(ValueError, match="duplicate file name"):
        webdataset_samples(url)
    with pytest.raises(DuplicateMemberError, match=r"row 1, key 'b': two members .* extension 'jpg'") as caught:
        index_shard(url)
    assert (caught.value.shard, caught.value.row, caught.value.key) == (url, 1, "b")


@pytest.mark.parametrize("extension", ["__key__", "__url__", "__KEY__"])
def test_members_that_would_replace_webdatasets_fields_are_refused_by_both(extension: str, place: Path) -> None:
    url = write(place, tar_bytes([Entry(f"a.{extension}", b"1")]))
    with pytest.raises(ValueError, match="duplicate file name"):
        webdataset_samples(url)
    with pytest.raises(DuplicateMemberError, match=f"'{extension.lower()}', which is a field that webdataset sets"):
        index_shard(url)


def test_a_member_that_webdataset_would_replace_is_refused(place: Path) -> None:
    url = write(place, tar_bytes([Entry("a.__local_path__", b"1"), Entry("a.jpg")]))
    assert webdataset_samples(url)[0].keys() == {"__key__", "__url__", "jpg"}  # its own path took the member's place
    with pytest.raises(DuplicateMemberError, match="'__local_path__', which is a field that webdataset sets"):
        index_shard(url)


@pytest.mark.parametrize("extension", ["__row__", "__weight__", "__pad__"])
def test_members_that_the_loader_would_replace_are_refused(extension: str, place: Path) -> None:
    url = write(place, tar_bytes([Entry(f"a.{extension}", b"1")]))
    with pytest.raises(ShardFormatError, match=f"'{extension}', which is a field that the loader sets"):
        index_shard(url)


@pytest.mark.parametrize(
    ("name", "pack", "advice"),
    [
        ("gzip", gzip.compress, "run gunzip"),
        ("bzip2", bz2.compress, "run bunzip2"),
        ("xz", lzma.compress, "run unxz"),
        ("zstd", lambda data: b"\x28\xb5\x2f\xfd" + data, "run unzstd"),
    ],
)
@pytest.mark.parametrize("samples", [1, 40])
def test_compressed_shards_are_refused_with_the_way_out(name, pack, advice, samples: int, place: Path) -> None:  # type: ignore[no-untyped-def]
    url = write(place, pack(tar_bytes(plain_entries(samples))))
    with pytest.raises(ShardFormatError, match=f"byte 0: compressed with {name}.*{advice}") as caught:
        index_shard(url)
    assert caught.value.shard == url


SPARSE = (
    pax_record("GNU.sparse.major", "1")
    + pax_record("GNU.sparse.minor", "0")
    + pax_record("GNU.sparse.name", "holes.jpg")
)
GLOBAL_SIZE = pax_record("size", "5")
BROKEN_PAX = b"99 path=a\n"
REFUSED = {
    "empty file": (b"", "byte 0: the file is empty; download or write it again"),
    "a web page": (b"<!DOCTYPE html>" * 99, "byte 0: not a tar file, it begins with b'<!DOCTYPE html>"),
    "a few bytes": (b"hello", "byte 0: not a tar file"),
    "GNU sparse member": (header(b"holes.jpg", 512, b"S") + bytes(BLOCK) + END, "'holes.jpg' is a GNU sparse file"),
    "PAX sparse member": (
        header(b"x", len(SPARSE), b"x") + padded(SPARSE) + header(b"a.jpg", 3) + padded(b"abc") + END,
        "byte 1024: the member 'holes.jpg' is a GNU sparse file",
    ),
    "global PAX size": (
        header(b"g", len(GLOBAL_SIZE), b"g") + padded(GLOBAL_SIZE) + END,
        "sets the size of all members",
    ),
    "broken PAX header": (
        header(b"x", len(BROKEN_PAX), b"x") + padded(BROKEN_PAX) + END,
        "byte 0: a PAX header that cannot",
    ),
    "PAX size that is no number": (
        header(b"x", 12, b"x") + padded(b"12 size=1e3\n") + header(b"a.jpg", 3) + padded(b"abc") + END,
        "'a.jpg' has the PAX size '1e3'",
    ),
    "huge extension header": (
        header(b"x", 1 << 25, b"x") + bytes(1 << 25),
        "byte 0: an extension header of 33554432 bytes",
    ),
    "end after an extension header": (
        header(b"L", 3, b"L") + padded(b"a.b"),
        "byte 1024: the tar ends where the member",
    ),
    "zeros after an extension header": (
        header(b"L", 3, b"L") + padded(b"a.b") + END,
        "byte 1024: the tar ends where the member",
    ),
    "negative size": (header(b"a.jpg", b"\xff" * 12) + END, "the member 'a.jpg' has -1 bytes"),
    "size that is no number": (header(b"a.jpg", b"12x45678901\0") + END, "byte 0: not a tar file"),
    "mode that is no number": (
        header(b"a.jpg", 0) + header(b"b.jpg", 0, mode=b"rw-r--r-") + END,
        "byte 512: a block that is no",
    ),
    "checksum": (
        header(b"a.jpg", 0) + header(b"b.jpg", 0).replace(b"b.jpg", b"c.jpg"),
        "byte 512: a block that is no tar header",
    ),
    "old-type file whose long name is cut at a slash": (
        tar_bytes([Entry("d/" * 60 + "a.jpg", A, b"\0"), Entry("b.jpg")]),
        "byte 1536: a block that is no tar header",
    ),
    "name not in UTF-8": (tar_bytes([Entry("a.jpg"), Entry("a.\udcff")]), r"'a.\\udcff' is not UTF-8"),
    "data cut": (
        tar_bytes([Entry("a.jpg", A)])[:1000],
        r"'a.jpg' has 1300 bytes .* of 1000 bytes lacks some: it is truncated",
    ),
    "padding cut": (tar_bytes([Entry("a.jpg", A)])[: BLOCK + 1300], "it is truncated; download"),
    "header cut": (
        tar_bytes([Entry("a.jpg", A)])[: 4 * BLOCK] + header(b"b", 0)[:100],
        "byte 2048: a header .* ends after 100",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_tar_is_refused_in_words(name: str, place: Path) -> None:
    data, message = REFUSED[name]
    url = write(place, data)
    with pytest.raises(ShardFormatError, match=message) as caught:
        index_shard(url)
    assert caught.value.shard == url
    assert url in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardMissingError, match=r"gone\.tar: no such file"):
        index_shard(str(tmp_path / "gone.tar"))


def test_a_damaged_header_loses_samples_in_webdataset_and_is_an_error_here(place: Path) -> None:
    data = bytearray(tar_bytes(plain_entries(10)))
    data[5 * 3 * BLOCK + 3] ^= 1  # in the name of a member of sample 6
    url = write(place, bytes(data))
    assert len(webdataset_samples(url)) < 10
    with pytest.raises(ShardFormatError, match="byte 7680: a block that is no tar header"):
        index_shard(url)


def test_bytes_after_the_end_are_ignored_with_a_warning(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    index_shard(write(place, HARD_CASES["what follows the end"]))
    assert "the tar ends at byte 2048, what follows is ignored" in caplog.text
    caplog.clear()
    index_shard(write(place, tar_bytes(plain_entries(3))))
    assert not caplog.text


CUT = tar_bytes(
    [
        Entry("a.jpg", A),
        Entry("a.cls", b"1"),
        Entry("d/" * 70 + "b.jpg", A),
        Entry("c.jpg", b"", mtime=1.5),
        Entry("c.cls", b"2"),
    ],
    "pax",
)


@given(st.one_of(st.integers(0, len(CUT)), st.integers(0, len(CUT) // BLOCK).map(lambda block: block * BLOCK)))
@settings(max_examples=300, deadline=None)
def test_a_truncated_tar_is_refused_or_ends_between_members(place: Path, length: int) -> None:
    with tarfile.open(write(place, CUT)) as whole:
        members = whole.getmembers()
    end = members[-1].offset_data + BLOCK
    url = write(place, CUT[:length])
    try:
        index = index_shard(url).index
    except ShardError:
        assert length not in {member.offset for member in members[1:]}
        assert length < end + BLOCK
        return
    assert length >= end + BLOCK or length == end or length in {member.offset for member in members}
    assert indexed_samples(url, index) == webdataset_samples(url)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_only_headers_are_read_of_large_members(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(place, tar_bytes(plain_entries(20, (("mp4", 1_000_000), ("cls", 1)))))
    read: list[int] = []
    pread = storage.LocalReader.pread
    monkeypatch.setattr(
        storage.LocalReader, "pread", lambda self, offset, size: read.append(size) or pread(self, offset, size)
    )
    assert len(index_shard(url).index) == 20
    assert sum(read) < Path(url).stat().st_size / 100
    assert len(read) <= 2 + 2 * 20


def test_small_members_are_read_in_few_large_pieces(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(place, tar_bytes(plain_entries(500, (("jpg", 3000), ("cls", 1)))))
    read: list[int] = []
    pread = storage.LocalReader.pread
    monkeypatch.setattr(
        storage.LocalReader, "pread", lambda self, offset, size: read.append(size) or pread(self, offset, size)
    )
    assert len(index_shard(url).index) == 500
    assert sum(read) <= Path(url).stat().st_size + 64 * 1024
    assert len(read) < 50


def test_a_remote_shard_gives_the_same_index_in_few_requests(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tar_bytes(plain_entries(50, (("mp4", 3_000_000 // 50), ("jpg", 900), ("cls", 1))), "pax")
    local, remote = write(place, data), f"memory://tars/{uuid.uuid4().hex}.tar"
    fsspec.filesystem("memory").pipe_file(remote, data)
    requests: list[int] = []
    pread = storage.RemoteReader.pread
    monkeypatch.setattr(
        storage.RemoteReader, "pread", lambda self, offset, size: requests.append(size) or pread(self, offset, size)
    )
    expected, found = index_shard(local), index_shard(remote)
    assert found.bytes == expected.bytes == len(data)
    assert indexed_samples(remote, found.index) == [
        {**sample, "__url__": remote} for sample in indexed_samples(local, expected.index)
    ]
    assert len(requests) <= 8 + 150


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000017\0", 15),
        (b"     17 ", 15),
        (b"17\0junk!", 15),
        (b"\0" * 8, 0),
        (b"        ", 0),
        (b"\x80" + b"\0" * 6 + b"\x07", 7),
        (b"\xff" * 8, -1),
    ],
)
def test_numbers_are_read_as_tarfile_reads_them(field: bytes, value: int) -> None:
    assert tar_headers.number(field) == value == tarfile.nti(field)  # type: ignore[attr-defined]
