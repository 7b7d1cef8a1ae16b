"""Tar files made in memory, their hard cases named; and what webdataset makes of a tar, to compare with."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import webdataset

from dynams_stream import storage
from dynams_stream.index import ShardIndex

BLOCK = 512
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@dataclass(frozen=True)
class Entry:
    """One member of a tar: its name, data, type, and PAX fields of its own."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    pax: dict[str, str] = field(default_factory=dict)
    mtime: float = 0


def data_of(seed: int, size: int) -> bytes:
    """`size` reproducible bytes that look random."""
    return random.Random(seed).randbytes(size)


def tar_bytes(entries: Iterable[Entry], format: str = "gnu", pax_headers: dict[str, str] | None = None) -> bytes:
    """A tar of `entries` as tarfile writes it; `pax_headers` are global ones."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format], pax_headers=pax_headers) as writer:
        for entry in entries:
            about = tarfile.TarInfo(entry.name)
            about.type, about.size, about.mtime = entry.kind, len(entry.data), entry.mtime
            about.pax_headers = entry.pax
            if entry.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                about.linkname = "elsewhere.jpg"
            writer.addfile(about, io.BytesIO(entry.data))
    return buffer.getvalue()


def header(
    name: bytes,
    size: int | bytes,
    kind: bytes = b"0",
    *,
    prefix: bytes = b"",
    mode: bytes = b"0000644\0",
    signed: bool = False,
    magic: bytes = b"ustar\x0000",
) -> bytes:
    """A header block, field by field, for what tarfile does not write."""
    size_field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(
        name.ljust(100, b"\0") + mode + b"0000000\0" * 2 + size_field + b"00000000000\0" + b" " * 8 + kind
        + b"\0" * 100 + magic + b"\0" * 64 + b"0000000\0" * 2 + prefix.ljust(155, b"\0") + b"\0" * 12
    )  # fmt: skip
    assert len(block) == BLOCK
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    """`data`, filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def base256(size: int) -> bytes:
    """A size field in base 256, as GNU tar writes sizes from 8 GiB on."""
    return b"\x80" + size.to_bytes(11, "big")


def pax_record(keyword: str, value: str) -> bytes:
    """`<length> <keyword>=<value>\\n`, the length counting itself."""
    text = f" {keyword}={value}\n".encode()
    length = len(text) + 1
    while len(str(length)) + len(text) != length:
        length += 1
    return str(length).encode() + text


def plain_entries(samples: int, sizes: Sequence[tuple[str, int]] = (("jpg", 700), ("cls", 1))) -> list[Entry]:
    """Samples of a usual shard."""
    return [
        Entry(f"{sample:06d}.{extension}", data_of(1000 * sample + place, size))
        for sample in range(samples)
        for place, (extension, size) in enumerate(sizes)
    ]


END = bytes(2 * BLOCK)
A, B = data_of(1, 1300), data_of(2, 513)

HARD_CASES: dict[str, bytes] = {
    "multi-dot extensions": tar_bytes([Entry("a.seg.png", A), Entry("a.jpg", B), Entry("a.x.y.z", b"1")]),
    "folders in names": tar_bytes([Entry("train/dog/1.jpg", A), Entry("train/dog/1.cls", b"7"), Entry("val/1.jpg", B)]),
    "dotted folders": tar_bytes([Entry("v1.0/set.a/1.jpg", A), Entry("v1.0/set.a/1.cls", b"7"), Entry("v1.0/x", B)]),
    "leading ./ and ../": tar_bytes([Entry("./a.jpg", A), Entry("./a.cls", b"1"), Entry("../b.jpg", B)]),
    "absolute names": tar_bytes([Entry("/etc/a.jpg", A), Entry("//b.jpg", B)]),
    "no extension": tar_bytes([Entry("a.jpg", A), Entry("README"), Entry("a.cls", b"1"), Entry("Makefile", B)]),
    "only files without extension": tar_bytes([Entry("a"), Entry("b/c", A)]),
    "upper-case extensions": tar_bytes([Entry("A.JPG", A), Entry("A.Cls", b"3"), Entry("a.ÄÖ", B)], "pax"),
    "hidden files": tar_bytes([Entry(".x", A), Entry("a/.x", B), Entry("a.b/.x", A), Entry("a.b/c/.x.y", b"1")]),
    "empty extension": tar_bytes([Entry("a.", A), Entry("a..jpg", B)]),
    "line breaks in names": tar_bytes([Entry("a\nb.jpg", A), Entry("a.b\nc/d.jpg", A), Entry("x/y.z\n", B)]),
    "GNU long names": tar_bytes(
        [Entry("d/" * 90 + "a.jpg", A), Entry("d/" * 90 + "a.cls", b"1"), Entry("k" * 300 + ".x", B)]
    ),
    "PAX long and foreign names": tar_bytes([Entry("ü/" * 90 + "ä.jpg", A), Entry("ü/" * 90 + "ä.cls", b"1")], "pax"),
    "PAX time of every member": tar_bytes([Entry("a.jpg", A, mtime=1.5), Entry("a.cls", b"1", mtime=2.5)], "pax"),
    "ustar prefix": tar_bytes(
        [Entry("p" * 80 + "/" + "q" * 90 + ".jpg", A), Entry("p" * 80 + "/" + "q" * 90 + ".c", B)], "ustar"
    ),
    "a name of exactly 100 bytes": tar_bytes([Entry("n" * 96 + ".jpg", A), Entry("m" * 95 + ".jpeg", B)], "ustar"),
    "base-256 size": header(b"a.jpg", base256(len(A))) + padded(A) + header(b"b.jpg", 1) + padded(b"1") + END,
    "sizes with blanks": header(b"a.jpg", b"      2424 \0") + padded(A) + header(b"b.jpg", b" " * 12) + END,
    "signed checksum": header(b"\xc3\xa4.jpg", len(A), signed=True) + padded(A) + END,
    "PAX size": (
        header(b"x", len(pax_record("size", "1300")), b"x")
        + padded(pax_record("size", "1300"))
        + header(b"a.jpg", 0)
        + padded(A)
        + header(b"b.jpg", 1)
        + padded(b"1")
        + END
    ),
    "PAX size of an unknown type": (
        header(b"x", len(pax_record("size", "1300")), b"x")
        + padded(pax_record("size", "1300"))
        + header(b"a.vol", 0, b"V")
        + padded(A)
        + header(b"a.jpg", len(B))
        + padded(B)
        + END
    ),
    "global PAX headers": tar_bytes([Entry("a.jpg", A), Entry("a.cls", b"1")], "pax", {"comment": "made by hand"}),
    "global PAX path": tar_bytes(
        [Entry("a.jpg", A), Entry("b.jpg", b"1", pax={"path": "own.name"})], "pax", {"path": "g/all.x/"}
    ),
    "PAX path after a GNU long name": (
        header(b"x", len(pax_record("path", "pax.jpg")), b"x")
        + padded(pax_record("path", "pax.jpg"))
        + header(b"././@LongLink", 9, b"L")
        + padded(b"long.jpg\0")
        + header(b"a.jpg", len(A))
        + padded(A)
        + END
    ),
    "GNU long name after a PAX path": (
        header(b"././@LongLink", 9, b"L")
        + padded(b"long.jpg\0")
        + header(b"x", len(pax_record("path", "pax.jpg")), b"x")
        + padded(pax_record("path", "pax.jpg"))
        + header(b"a.jpg", len(A))
        + padded(A)
        + END
    ),
    "long link name": (
        header(b"././@LongLink", 600, b"K")
        + padded(b"l" * 600)
        + header(b"a.lnk", 0, b"2")
        + header(b"a.jpg", len(A))
        + padded(A)
        + END
    ),
    "directories and links": tar_bytes(
        [
            Entry("d.ir", kind=tarfile.DIRTYPE),
            Entry("d.ir/a.jpg", A),
            Entry("d.ir/a.png", kind=tarfile.SYMTYPE),
            Entry("d.ir/a.gif", kind=tarfile.LNKTYPE),
            Entry("d.ir/a.fifo", kind=tarfile.FIFOTYPE),
            Entry("d.ir/a.cls", b"1"),
        ]
    ),
    "a directory of the old format": header(b"old.dir/", 0, b"\0") + header(b"a.jpg", len(A), b"\0") + padded(A) + END,
    "contiguous and old-type files": header(b"a.jpg", len(A), b"7")
    + padded(A)
    + header(b"a.cls", 1, b"\0")
    + padded(b"1")
    + END,
    "unknown types": header(b"a.vol", len(A), b"V") + padded(A) + header(b"a.jpg", len(B), b"0") + padded(B) + END,
    "metadata members": tar_bytes(
        [
            Entry("__meta__", A),
            Entry("__meta__/a.json", A),
            Entry("__info__.json", B),
            Entry("__", A),
            Entry("x/__m__/a.jpg", B),
        ]
    ),
    "empty members": tar_bytes([Entry("a.jpg"), Entry("a.cls"), Entry("b.jpg")]),
    "keys that come again": tar_bytes([Entry("a.jpg", A), Entry("b.jpg", B), Entry("a.cls", b"1"), Entry("a.jpg", B)]),
    "samples marked bad": tar_bytes(
        [Entry("a.jpg", A), Entry("a.__bad__", b"1"), Entry("b.jpg", B), Entry("b.__bad__")]
    ),
    "no end-of-archive blocks": tar_bytes([Entry("a.jpg", A)])[: 4 * BLOCK],
    "one end-of-archive block": tar_bytes([Entry("a.jpg", A)])[: 5 * BLOCK],
    "no members": END,
    "what follows the end": tar_bytes([Entry("a.jpg", A)]) + tar_bytes([Entry("b.jpg", B)]),
    "names not in UTF-8 that are skipped": tar_bytes([Entry("\udcff", A), Entry("a.jpg", B)]),
}
"""Tars that are read as webdataset reads them."""


def webdataset_samples(url: str | Path) -> list[dict[str, object]]:
    """What `webdataset.WebDataset` yields for one shard."""
    samples = list(webdataset.WebDataset(str(url), shardshuffle=False, empty_check=False))
    for sample in samples:
        sample.pop("__local_path__", None)
    return samples


def indexed_samples(url: str | Path, index: ShardIndex) -> list[dict[str, object]]:
    """The same dicts, read by the byte ranges of an index."""
    reader = storage.open_reader(str(url))
    samples: list[dict[str, object]] = []
    for row, key in enumerate(index.keys.to_pylist()):
        sample: dict[str, object] = {"__key__": key, "__url__": str(url)}
        sample.update({extension: reader.pread(offset, size) for extension, offset, size in index.members(row)})
        samples.append(sample)
    return samples
