"""Megatron-Energon's index of a shard, `<shard>.tar.idx` beside it: read, checked and written.

It is an array of little-endian uint64, nothing before it: for each sample the offset of its first header, and at the
end that of the zeros that end the tar (or, without them, the file's length).

    shard    [__meta__/x][a.jpg][a.cls][README][PAX][b.jpg][b.cls][zeros]
    entries              0                     1                  2

As tarfile has it, a member begins with the PAX and long-name headers about it alone. Samples are grouped as here, but
those that `__bad__` drops have entries, too. Energon itself never reads entry 0: for it the first sample begins at 0.

The format has no checksum, so nothing in it tells that the shard was written again since. Here it only says where the
walk over the headers may be cut, so that several ranges are read at once. Each range has to end exactly where the next
one begins, which makes the members those of one walk; and in the end each entry has to be where a sample was found.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt

from dynams_stream import index, storage, tar
from dynams_stream.errors import EnergonIndexError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.tar_headers import BLOCK

Integers = npt.NDArray[np.int64]

SUFFIX: Final = ".tar.idx"
_ENTRY: Final = np.dtype("<u8")
_SHORTEST, _LONGEST = 16 << 20, 256 << 20
"""Bytes of a range: a walk begins with small reads, and its members are held in memory until they are wanted."""
_RANGES_EACH: Final = 4
"""Ranges for each of those read at once, since some take longer than others."""
_AGAIN: Final = (
    "if the shard is as it should be, write its index again with `dynams index --to-energon` "
    "(or `energon prepare --tar-index-only`), or index it without --from-energon"
)


def index_url(url: str) -> str:
    """Where Energon looks for a shard's index: beside it, with `.tar.idx` for its name's last suffix."""
    folder, slash, name = url.rpartition("/")
    return f"{folder}{slash}{PurePosixPath(name).with_suffix(SUFFIX)}"


# ---- reading ---------------------------------------------------------------------------------------------------------


def index_shard(url: str, ranges_at_once: int = 1) -> index.IndexedShard:
    """Index one shard, its headers read in several ranges at once where Energon's index says that samples begin.

    The index is that of `index.index_shard`, which a shard without one of Energon's is left to.

    Args:
        url: the shard.
        ranges_at_once: how many threads read it; with one of them, Energon's index is only checked.

    Raises:
        EnergonIndexError: Energon's index is not this shard's, or cannot be read.
        ShardError: as `index.index_shard`.
    """
    entries = read_entries(url)
    if entries is None:
        return index.index_shard(url)
    indexed = index.index_shard(url, partial(_read_samples, entries=entries, ranges_at_once=ranges_at_once))
    return replace(indexed, by_energon=True)


def read_entries(url: str) -> npt.NDArray[np.uint64] | None:
    """The entries of a shard's index, shape (samples + 1,), as the file has them; None when there is no such file.

    Raises:
        EnergonIndexError: it cannot be read, or holds something else.
    """
    data = _read(url)
    if data is None:
        return None
    if not data or len(data) % _ENTRY.itemsize:
        raise _refusal(url, f"it has {len(data)} bytes, and should have 8 for each sample and 8 more")
    return np.frombuffer(data, dtype=_ENTRY).astype(np.uint64)


def _read(url: str) -> bytes | None:
    place = index_url(url)
    try:
        return storage.read_bytes(place)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EnergonIndexError(
            f"{place}, Energon's index of {url}, cannot be read ({error}); see that it may be read, or remove it, or "
            f"index without --from-energon",
            shard=url,
        ) from error


def _read_samples(
    reader: storage.Reader, url: str, *, entries: npt.NDArray[np.uint64], ranges_at_once: int
) -> Iterator[tar.Sample]:
    """What `tar.read_samples` gives, by the entries of Energon's index, all of which are checked."""
    places = _places(url, entries, reader.size)
    begun = array("q")
    yield from tar.group_members(_read_members(reader, url, places, ranges_at_once), url, begun)
    _require_same(url, places[:-1], np.array(begun, dtype=np.int64))


def _read_members(reader: storage.Reader, url: str, places: Integers, ranges_at_once: int) -> Iterator[tar.Member]:
    def walk_range(span: tuple[int, int]) -> tuple[tar.Walk, int, list[tar.Member]]:
        start, stop = span
        walk = tar.Walk(reader, url, start)
        return walk, stop, list(tar.read_members(walk, stop))

    walk = tar.Walk(reader, url)
    cuts = _cuts(places, ranges_at_once)
    spans = pairwise([0, *cuts, int(places[-1])]) if cuts else ()
    # An error in a range counts once those before it have led to its beginning, as one walk's would.
    for walk, stop, members in ordered_thread_map(ranges_at_once)(walk_range, spans):
        yield from members
        if walk.offset != stop:
            entry = int(np.searchsorted(places, stop))
            raise _refusal(url, f"entry {entry} is byte {stop}, and the headers before it lead to byte {walk.offset}")
        if walk.reaches_on:  # as a global PAX header does that names all members to come: this walk alone can go on
            break
    yield from tar.read_members(walk)
    if walk.offset != places[-1]:
        raise _refusal(
            url, f"entry {len(places) - 1}, the last, is byte {places[-1]}, and the tar ends at byte {walk.offset}"
        )


def _cuts(places: Integers, ranges_at_once: int) -> list[int]:
    """Where samples begin at about equal distances; nowhere when one walk will do."""
    if ranges_at_once == 1:
        return []
    end = int(places[-1])
    length = min(_LONGEST, max(_SHORTEST, end // (_RANGES_EACH * ranges_at_once)))
    begun = places[:-1]
    nearest = np.searchsorted(begun, np.arange(length, end, length))
    cuts: list[int] = np.unique(begun[nearest[nearest < len(begun)]]).tolist()
    return cuts


# ---- checks ----------------------------------------------------------------------------------------------------------


def _places(url: str, entries: npt.NDArray[np.uint64], size: int) -> Integers:
    """The entries as offsets that headers of a file of `size` bytes may have, each beyond the one before it."""
    astray, back = entries % BLOCK != 0, entries[1:] <= entries[:-1]
    if astray.any():
        entry = int(astray.argmax())
        raise _refusal(url, f"entry {entry} is byte {entries[entry]}, and headers are at multiples of {BLOCK}")
    if back.any():
        entry = int(back.argmax()) + 1
        raise _refusal(url, f"entry {entry} is byte {entries[entry]}, and the one before it byte {entries[entry - 1]}")
    if entries[-1] > size:
        raise _refusal(
            url, f"entry {len(entries) - 1}, the last, is byte {entries[-1]}, and the shard has {size} bytes"
        )
    return entries.astype(np.int64)


def _require_same(url: str, places: Integers, begun: Integers) -> None:
    """Refuse entries that are not where the samples of the shard begin."""
    both = min(len(places), len(begun))
    differ = places[:both] != begun[:both]
    if differ.any():
        entry = int(differ.argmax())
        raise _refusal(url, f"entry {entry} is byte {places[entry]}, and that sample begins at byte {begun[entry]}")
    if len(places) != len(begun):
        raise _refusal(url, f"it has entries for {len(places)} samples, and the shard has {len(begun)}")


def _refusal(url: str, reason: str) -> EnergonIndexError:
    return EnergonIndexError(f"{index_url(url)} is not the index of {url}: {reason}; {_AGAIN}", shard=url)


# ---- writing ---------------------------------------------------------------------------------------------------------


def entries_of(reader: storage.Reader, url: str, indexed: index.ShardIndex) -> Integers:
    """The entries of a shard's index, int64, shape (samples + 1,).

    Args:
        reader: the open shard; little of it is read where its members lie side by side.
        url: its name in errors.
        indexed: our index of the same bytes.
    """
    begun, end = _known_samples(indexed)
    walk = tar.Walk(reader, url, end)
    for _ in tar.group_members(tar.read_members(walk), url, begun):
        pass
    return np.array([*begun, walk.offset], dtype=np.int64)


def _known_samples(indexed: index.ShardIndex) -> tuple[array[int], int]:
    """Where the samples begin, and the end of the last one; nothing and 0 when other headers lie between members.

    They may be extension headers, which begin a sample, or of a sample that `__bad__` dropped; only reading tells.
    """
    headers = indexed.offsets - BLOCK
    ends = indexed.offsets + indexed.sizes + -indexed.sizes % BLOCK
    if not len(headers) or headers[0] or (headers[1:] != ends[:-1]).any():
        return array("q"), 0
    return array("q", headers[indexed.starts[:-1]].tolist()), int(ends[-1])


def write_entries(url: str, entries: Integers) -> bool:
    """Write a shard's index, atomically, unless the same one is there; whether it was written.

    Raises:
        EnergonIndexError: it cannot be written there.
        StoreFullError: there is no room for it.
    """
    place, data = index_url(url), entries.astype(_ENTRY).tobytes()
    try:
        if place.startswith(("http://", "https://")):  # fsspec would send a POST, which may do anything there
            raise PermissionError("nothing is written over HTTP")
        if _read(url) == data:
            return False
        storage.write_bytes(place, data)
    except OSError as error:
        raise EnergonIndexError(
            f"{place} cannot be written ({error}); Energon looks for it there alone: run this where the folder of the "
            f"shards may be written to, or copy the shards to such a place and index the copies",
            shard=url,
        ) from error
    return True
