"""One tar header block, field by field: numbers, names, checksums and PAX records, as Python's tarfile reads them."""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

BLOCK: Final = 512
FILES: Final = frozenset({b"0", b"\0", b"7"})
"""Types of regular files: today's, the old format's, contiguous ones."""
WITHOUT_DATA: Final = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})
"""Links, devices, directories and pipes: no data follows, whatever their size says."""
LONG_NAME, LONG_LINK, SPARSE, PAX_GLOBAL = b"L", b"K", b"S", b"g"
EXTENSIONS: Final = frozenset({LONG_NAME, LONG_LINK, SPARSE, PAX_GLOBAL, b"x", b"X"})
"""Types that say something of the members after them."""
PAX_SPARSE: Final = "GNU.sparse."
_PAX_LENGTH_DIGITS: Final = 20


class Common(NamedTuple):
    """What the headers of a shard mostly have in common.

    Attributes:
        kind: type of the member.
        prefix: USTAR's leading folders, with a slash; or empty.
        total: sum of the bytes after the checksum.
    """

    kind: bytes
    prefix: str
    total: int


@functools.lru_cache(maxsize=64)
def read_common(rest: bytes) -> Common:
    """Of a header without name, size, time and checksum (24 bytes before them, 356 after them).

    Raises:
        ValueError: when mode, user, group or device is no number; tarfile wants them valid.
    """
    owner, after = rest[:24], rest[24:]
    for numbers in (owner[:8], owner[8:16], owner[16:], after[173:181], after[181:189]):
        number(numbers)
    prefix = text(after[189:344])
    return Common(after[:1], f"{prefix}/" if prefix else "", sum(after))


@functools.lru_cache(maxsize=4096)  # times, checksums and the sizes of small members come again and again
def number(field: bytes) -> int:
    """A numeric header field: octal digits, or base 256 when its first byte says so.

    Raises:
        ValueError: when it is neither.
    """
    try:
        return int(field.rstrip(b"\0 "), 8)
    except ValueError:
        if field[0] in (0x80, 0xFF):
            return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def signed_checksum(header: bytes) -> int:
    """The sum of signed bytes that some old programs write, the checksum itself taken as spaces."""
    counted = header[:148] + header[156:]
    return sum(counted) - 256 * sum(byte > 127 for byte in counted) + 8 * 32


def text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def pax_fields(content: bytes) -> dict[str, str]:
    """The records `<length> <keyword>=<value>\n` of a PAX header.

    Raises:
        ValueError: when they are not well-formed.
    """
    fields: dict[str, str] = {}
    start = 0
    while start < len(content):
        space = content.find(b" ", start, start + _PAX_LENGTH_DIGITS)
        digits = content[start:space] if space > 0 else b""
        stop = start + int(digits) if digits.isdigit() else start
        if not space < stop <= len(content) or content[stop - 1] != 0x0A:
            raise ValueError(f"no record at its byte {start}")
        keyword, equals, value = content[space + 1 : stop - 1].partition(b"=")
        if not equals or not keyword:
            raise ValueError(f"no keyword at its byte {start}")
        fields[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = stop
    return fields
