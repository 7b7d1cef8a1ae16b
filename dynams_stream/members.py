"""Where the members of samples lie: the member index in memory, compact, piece by piece and bounded.

    (shard, row) ──piece of the shard's index──► Found: offsets, spans, bounds, keys and kinds as arrays

A piece is one row group of a shard in its part's file. Everything is done with array operations, piece by piece; what
is kept holds no Python object for a sample.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dynams_stream.index import ShardIndex, read_shard_index
from dynams_stream.store import Dataset, Store

Integers = npt.NDArray[np.int64]

BUDGET: Final = 64 << 20
"""Bytes of pieces that are kept, unless told otherwise."""
_GAP_BYTES: Final = 64 << 10  # members further apart than headers explain are read one by one


@dataclass(frozen=True, eq=False)
class Piece:
    """The samples of one piece of a shard's index.

    Attributes:
        shard: number of the shard.
        first: row of its first sample.
        keys: all keys, one after another.
        key_starts: int32, shape (rows + 1,), where each key starts in `keys`.
        offsets: int64, shape (rows,), first byte of the first member.
        spans: int32 or int64, shape (rows,), bytes from there to the end of the last member; of a scattered sample -1.
        member_starts: int32, shape (rows + 1,), number of each sample's first member.
        bounds: int32 or int64, shape (members, 2): where each member begins and ends in the bytes read for its sample.
        kinds: the distinct tuples of extensions.
        kind_of_row: int32, shape (rows,), position in `kinds`; None when there is one kind only.
        scattered: by row, the (offset, size) of each member of a sample whose members lie far apart.
    """

    shard: int
    first: int
    keys: str
    key_starts: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    spans: npt.NDArray[np.integer]
    member_starts: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.integer]
    kinds: tuple[tuple[str, ...], ...]
    kind_of_row: npt.NDArray[np.int32] | None
    scattered: dict[int, list[tuple[int, int]]]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        arrays = (self.key_starts, self.offsets, self.spans, self.member_starts, self.bounds)
        kinds = 0 if self.kind_of_row is None else self.kind_of_row.nbytes
        return len(self.keys) + sum(array.nbytes for array in arrays) + kinds + 200 * len(self.scattered) + 1000


@dataclass(frozen=True, eq=False)
class Found:
    """Samples that were looked up, in the order asked for; n of them, m members together.

    Attributes:
        pieces: the pieces that hold them.
        piece: int64, shape (n,), position in `pieces`.
        offsets: int64, shape (n,), first byte of the first member.
        spans: int64, shape (n,), bytes up to the end of the last member; -1 when the members are to be read one by one
            (`Piece.scattered`).
        key_starts, key_stops: int64, shape (n,), where the key lies in the piece's `keys`.
        kinds: the distinct tuples of extensions.
        kind: int64, shape (n,), position in `kinds`.
        lengths: int64, shape (n,), how many members.
        bounds: int64, shape (m, 2), begin and end of each sample's members in the bytes read for it, one sample's after
            another's.
    """

    pieces: list[Piece]
    piece: Integers
    offsets: Integers
    spans: Integers
    key_starts: Integers
    key_stops: Integers
    kinds: list[tuple[str, ...]]
    kind: Integers
    lengths: Integers
    bounds: Integers


class MemberTables:
    """Looks samples up in the member index; belongs to one process and keeps a bounded number of bytes.

    Args:
        store: where the index lies.
        dataset: the shards.
        budget: bytes of pieces that may be kept; those of the samples that are being looked up are kept in any case.
    """

    def __init__(self, store: Store, dataset: Dataset, *, budget: int = BUDGET):
        self._store = store
        self._dataset = dataset
        self.budget = budget
        self.held = 0
        self._pieces: OrderedDict[int, Piece] = OrderedDict()

    def find(self, shards: Integers, rows: Integers) -> Found:
        """Look samples up.

        Args:
            shards: int64, shape (n,), shard numbers.
            rows: int64, shape (n,), rows of these shards; each has to exist.

        Raises:
            StoreError: when a part of the index is missing or damaged.
        """
        order = np.argsort(shards, kind="stable")
        cuts = [0, *(np.flatnonzero(np.diff(shards[order])) + 1).tolist(), len(shards)]
        runs = [order[a:b] for a, b in itertools.pairwise(cuts) if a < b]
        pieces = self._load([int(shards[run[0]]) for run in runs])
        return _gathered(pieces, runs, rows)

    def _load(self, names: list[int]) -> list[Piece]:
        for name in names:
            if name in self._pieces:
                self._pieces.move_to_end(name)
        found = []
        wanted = set(names)
        for name in names:
            piece = self._pieces.get(name)
            if piece is None:
                part = self._dataset.parts[self._dataset.part_of_shard[name]]
                piece = make_piece(name, 0, read_shard_index(self._store.path(part.index_file), name))
                self._pieces[name] = piece
                self.held += piece.nbytes
                while self.held > self.budget and next(iter(self._pieces)) not in wanted:
                    self.held -= self._pieces.popitem(last=False)[1].nbytes
            found.append(piece)
        return found


def _gathered(pieces: list[Piece], runs: list[Integers], rows: Integers) -> Found:
    """The samples `rows`, of which `runs[i]` are in `pieces[i]`."""
    count = len(rows)
    numbers = np.empty((5, count), dtype=np.int64)
    piece_of, offsets, spans, key_starts, key_stops = numbers
    kind, lengths = np.zeros(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    kinds: dict[tuple[str, ...], int] = {}
    firsts = np.empty(count, dtype=np.int64)
    for number, (piece, run) in enumerate(zip(pieces, runs, strict=True)):
        own = rows[run] - piece.first
        piece_of[run] = number
        offsets[run], spans[run] = piece.offsets[own], piece.spans[own]
        key_starts[run], key_stops[run] = piece.key_starts[own], piece.key_starts[own + 1]
        firsts[run] = first = piece.member_starts[own]
        lengths[run] = piece.member_starts[own + 1] - first
        names = [kinds.setdefault(each, len(kinds)) for each in piece.kinds]
        kind[run] = names[0] if piece.kind_of_row is None else np.array(names)[piece.kind_of_row[own]]
    starts = np.cumsum(lengths) - lengths
    bounds = np.empty((int(lengths.sum()), 2), dtype=np.int64)
    for piece, run in zip(pieces, runs, strict=True):
        bounds[_members(starts[run], lengths[run])] = piece.bounds[_members(firsts[run], lengths[run])]
    return Found(pieces, piece_of, offsets, spans, key_starts, key_stops, list(kinds), kind, lengths, bounds)


def _members(firsts: Integers, lengths: Integers) -> Integers:
    """firsts[0], firsts[0] + 1, … (lengths[0] numbers), firsts[1], …"""
    starts = np.cumsum(lengths) - lengths
    numbers: Integers = np.arange(int(lengths.sum())) + np.repeat(firsts - starts, lengths)
    return numbers


# ---- making a piece --------------------------------------------------------------------------------------------------


def make_piece(shard: int, first: int, index: ShardIndex) -> Piece:
    """What reading needs of consecutive rows of a shard's index, the first one numbered `first`."""
    starts, sizes = index.starts, index.sizes
    counts = np.diff(starts)
    firsts, lasts = starts[:-1], starts[1:] - 1
    offsets = index.offsets[firsts]
    spans = index.offsets[lasts] + sizes[lasts] - offsets
    begins = index.offsets - np.repeat(offsets, counts)
    far_apart = spans - np.add.reduceat(sizes, firsts) > _GAP_BYTES * counts if len(counts) else counts > 0
    scattered: dict[int, list[tuple[int, int]]] = {}
    for row in np.flatnonzero(far_apart).tolist():
        members = slice(starts[row], starts[row + 1])
        scattered[first + row] = list(zip(index.offsets[members].tolist(), sizes[members].tolist(), strict=True))
        spans[row] = -1
        begins[members] = np.cumsum(sizes[members]) - sizes[members]
    kinds, kind_of_row = _kinds(index)
    keys, key_starts = _joined(index.keys)
    return Piece(
        shard=shard,
        first=first,
        keys=keys,
        key_starts=key_starts,
        offsets=offsets,
        spans=_narrow(spans),
        member_starts=starts.astype(np.int32),
        bounds=_narrow(np.stack([begins, begins + sizes], axis=1)),
        kinds=kinds,
        kind_of_row=kind_of_row,
        scattered=scattered,
    )


def _narrow(values: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
    return values.astype(np.int32) if not values.size or values.max() < 2**31 else values


def _joined(keys: pa.StringArray) -> tuple[str, npt.NDArray[np.int32]]:
    """All keys as one text, and int32, shape (rows + 1,), where each one starts in it."""
    _, borders, data = keys.buffers()
    if data is None or not len(keys):
        return "", np.zeros(len(keys) + 1, dtype=np.int32)
    starts = np.frombuffer(borders, dtype=np.int32)[keys.offset : keys.offset + len(keys) + 1]
    text = bytes(data[starts[0] : starts[-1]]).decode()
    if text.isascii():
        return text, starts - starts[0]
    lengths = pc.utf8_length(keys).to_numpy()
    return text, np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])


def _kinds(index: ShardIndex) -> tuple[tuple[tuple[str, ...], ...], npt.NDArray[np.int32] | None]:
    """The distinct tuples of extensions, and which one each row has (None: all the first)."""
    codes, starts = index.extension_codes, index.starts
    rows = len(starts) - 1
    width = int(starts[1]) if rows else 0
    if (
        rows * width == len(codes)
        and (np.diff(starts) == width).all()
        and (codes.reshape(rows, width) == codes[:width]).all()
    ):
        return (tuple(index.extensions[code] for code in codes[:width]),), None
    numbers: dict[bytes, int] = {}
    bounds = starts.tolist()
    kind_of_row = [
        numbers.setdefault(codes[first:stop].tobytes(), len(numbers)) for first, stop in itertools.pairwise(bounds)
    ]
    kinds = tuple(tuple(index.extensions[code] for code in np.frombuffer(name, codes.dtype)) for name in numbers)
    return kinds, np.array(kind_of_row, dtype=np.int32)
