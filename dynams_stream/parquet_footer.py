"""The end of a Parquet file, which says where everything in it lies: its digest settles which file it is."""

from __future__ import annotations

from dynams_stream import storage

_TRAILER_BYTES = 8  # length of the footer and "PAR1", at the end of every Parquet file
_GUESS_BYTES = 64 << 10  # most footers are shorter: one read is enough for them


def footer_bytes(tail: bytes) -> int:
    """Length of the footer, trailer included, that a file says which ends with `tail`; it may be nonsense."""
    return int.from_bytes(tail[-_TRAILER_BYTES:-4], "little") + _TRAILER_BYTES


def read_footer(url: str) -> bytes:
    """The footer of a Parquet file, trailer included; of a file that is none, some of its last bytes.

    Raises:
        OSError: the file cannot be opened or read.
    """
    with storage.open_random(url) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _GUESS_BYTES))
        tail = file.read(min(size, _GUESS_BYTES))
        length = footer_bytes(tail)
        if len(tail) < length <= size:
            file.seek(size - length)
            tail = file.read(length)
    return tail[-length:]
