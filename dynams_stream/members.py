"""Where the members of samples lie: the member index in memory, compact, piece by piece and bounded.

    (shard, row) ──piece of `INDEX_GROUP_ROWS` rows──► Found: offsets, spans, bounds, keys and kinds as arrays

Looking up costs a few array operations for each piece, none for each sample, and what is kept holds no Python object
for a sample: about 50 bytes and its key.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dynams_stream.dataset import Dataset
from dynams_stream.errors import StoreError
from dynams_stream.index import ShardIndex, read_rows
from dynams_stream.schema import INDEX_GROUP_ROWS
from dynams_stream.store import Store

Integers = npt.NDArray[np.int64]

BUDGET: Final = 64 << 20
"""Bytes of pieces that are kept, unless told otherwise."""
_BLOCK: Final = 512  # tar data begins at its multiples, which lets offsets up to 1 TiB fit in 32 bits
_GAP_BYTES: Final = 64 << 10  # members further apart than headers explain are read one by one
_KEY_START, _KEY_STOP, _KIND, _OFFSET, _SPAN, _MEMBER = range(6)
_FIELDS: Final = 6


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive samples of one shard.

    Attributes:
        shard: number of the shard.
        first: row of its first sample.
        keys: all keys, one after another.
        table: int32 (int64 when a number needs it), shape (rows, 6): where the key starts and stops in `keys`, position
            in `kinds`, first byte of the first member in blocks of 512, bytes from there to the end of the last member
            (negative when they lie far apart), number of the first member.
        bounds: int32 or int64, shape (members, 2): where each member begins and ends, counted from its sample's first
            byte.
        kinds: the distinct tuples of extensions.
    """

    shard: int
    first: int
    keys: str
    table: npt.NDArray[np.integer]
    bounds: npt.NDArray[np.integer]
    kinds: tuple[tuple[str, ...], ...]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return len(self.keys) + self.table.nbytes + self.bounds.nbytes + 1000


@dataclass(frozen=True, eq=False)
class Found:
    """Samples that were looked up, in the order asked for; n of them, m members together.

    Attributes:
        pieces: the pieces that hold them.
        piece: int64, shape (n,), position in `pieces`.
        key_starts, key_stops: integers, shape (n,), where the key lies in the piece's `keys`.
        offsets: int64, shape (n,), first byte of the first member.
        spans: int64, shape (n,), bytes up to the end of the last member; negative when the members lie so far apart
            that they are to be read one by one.
        kinds: the distinct tuples of extensions.
        kind: integers, shape (n,), position in `kinds`.
        lengths: int64, shape (n,), how many members.
        bounds: integers, shape (m, 2), begin and end of each sample's members from its first byte on, one sample after
            the other.
    """

    pieces: list[Piece]
    piece: Integers
    key_starts: npt.NDArray[np.integer]
    key_stops: npt.NDArray[np.integer]
    offsets: Integers
    spans: Integers
    kinds: list[tuple[str, ...]]
    kind: npt.NDArray[np.integer]
    lengths: Integers
    bounds: npt.NDArray[np.integer]

    def only(self, numbers: Integers) -> Found:
        """The samples of these numbers, int64, ascending."""
        starts = np.cumsum(self.lengths) - self.lengths
        return Found(
            pieces=self.pieces,
            piece=self.piece[numbers],
            key_starts=self.key_starts[numbers],
            key_stops=self.key_stops[numbers],
            offsets=self.offsets[numbers],
            spans=self.spans[numbers],
            kinds=self.kinds,
            kind=self.kind[numbers],
            lengths=self.lengths[numbers],
            bounds=self.bounds[_members(starts[numbers], self.lengths[numbers])],
        )

    def sums(self, of_members: npt.NDArray[np.integer]) -> Integers:
        """int64, shape (n,): the sum of what each sample's members have; of_members has shape (m,)."""
        totals = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(of_members)])
        ends = np.cumsum(self.lengths)
        sums: Integers = totals[ends] - totals[ends - self.lengths]
        return sums


class MemberTables:
    """Looks samples up in the member index; belongs to one process and keeps a bounded number of bytes.

    Args:
        store: where the index lies.
        dataset: the shards.
        budget: bytes of pieces that may be kept; those of the samples looked up last are kept in any case.
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
        names = (shards << 32) | (rows // INDEX_GROUP_ROWS)
        order = np.argsort(names, kind="stable")
        names = names[order]
        starts = np.flatnonzero(np.diff(names, prepend=-1))
        return _gathered(self._load(names[starts].tolist()), [*starts.tolist(), len(names)], order, rows)

    def _load(self, names: list[int]) -> list[Piece]:
        for name in names:
            if name in self._pieces:
                self._pieces.move_to_end(name)
        missing: dict[int, list[int]] = {}
        for name in names:
            if name not in self._pieces:
                missing.setdefault(int(self._dataset.part_of_shard[name >> 32]), []).append(name)
        if not missing:
            return [self._pieces[name] for name in names]
        wanted = set(names)
        for part, absent in missing.items():
            for name, piece in zip(absent, self._read(part, absent), strict=True):
                self._pieces[name] = piece
                self.held += piece.nbytes
        while self.held > self.budget and next(iter(self._pieces)) not in wanted:
            self.held -= self._pieces.popitem(last=False)[1].nbytes
        pa.default_memory_pool().release_unused()  # a chunk that goes round many parts leaves it with 10 MB
        return [self._pieces[name] for name in names]

    def _read(self, part: int, names: list[int]) -> list[Piece]:
        firsts = [(name >> 32, (name & 0xFFFFFFFF) * INDEX_GROUP_ROWS) for name in names]
        url = self._store.path(self._dataset.parts[part].index_file)
        return make_pieces(firsts, *read_rows(url, [(shard, row, row + INDEX_GROUP_ROWS) for shard, row in firsts]))


def _gathered(pieces: list[Piece], cuts: list[int], order: Integers, rows: Integers) -> Found:
    """The samples `rows`, of which those numbered `order[cuts[i]:cuts[i + 1]]` are in `pieces[i]`."""
    kinds: dict[tuple[str, ...], int] = {}
    for piece in pieces:
        for kind in piece.kinds:
            kinds.setdefault(kind, len(kinds))
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    ordered = rows[order]
    runs = [ordered[start:stop] - piece.first for piece, (start, stop) in zip(pieces, pairwise(cuts), strict=True)]
    table = _taken([piece.table for piece in pieces], runs, cuts, _FIELDS)
    if len(kinds) > 1:
        for piece, (start, stop) in zip(pieces, pairwise(cuts), strict=True):
            names = np.array([kinds[kind] for kind in piece.kinds])
            table[start:stop, _KIND] = names[table[start:stop, _KIND]]
    table = table[back]
    if len(kinds) == 1:
        width = len(next(iter(kinds)))
        lengths = np.full(len(rows), width, dtype=np.int64)
        tables = [piece.bounds.reshape(len(piece.table), 2 * width) for piece in pieces]
        bounds = _taken(tables, runs, cuts, 2 * width)[back].reshape(-1, 2)
    else:
        lengths = np.array([len(kind) for kind in kinds], dtype=np.int64)[table[:, _KIND]]
        bounds = _ragged_bounds(pieces, cuts, order, table[:, _MEMBER].astype(np.int64), lengths)
    return Found(
        pieces=pieces,
        piece=np.repeat(np.arange(len(pieces)), np.diff(cuts))[back],
        key_starts=table[:, _KEY_START],
        key_stops=table[:, _KEY_STOP],
        offsets=table[:, _OFFSET].astype(np.int64) * _BLOCK,
        spans=table[:, _SPAN].astype(np.int64),
        kinds=list(kinds),
        kind=table[:, _KIND],
        lengths=lengths,
        bounds=bounds,
    )


def _taken(
    tables: list[npt.NDArray[np.integer]], runs: list[Integers], cuts: list[int], width: int
) -> npt.NDArray[np.integer]:
    """The rows `runs[i]` of each table, one after another."""
    kind = np.result_type(np.int32, *tables)
    taken: npt.NDArray[np.integer] = np.empty((cuts[-1], width), dtype=kind)
    for table, run, (start, stop) in zip(tables, runs, pairwise(cuts), strict=True):
        if table.dtype == kind:
            table.take(run, axis=0, out=taken[start:stop], mode="clip")  # else it would make a copy first
        else:
            taken[start:stop] = table[run]
    return taken


def _ragged_bounds(
    pieces: list[Piece], cuts: list[int], order: Integers, firsts: Integers, lengths: Integers
) -> Integers:
    """The bounds of samples that differ in how many members they have; `firsts` numbers each one's first member."""
    starts = np.cumsum(lengths) - lengths
    bounds = np.empty((int(lengths.sum()), 2), dtype=np.int64)
    for piece, (start, stop) in zip(pieces, pairwise(cuts), strict=True):
        run = order[start:stop]
        bounds[_members(starts[run], lengths[run])] = piece.bounds[_members(firsts[run], lengths[run])]
    return bounds


def _members(firsts: Integers, lengths: Integers) -> Integers:
    """firsts[0], firsts[0] + 1, … (lengths[0] numbers), firsts[1], …"""
    starts = np.cumsum(lengths) - lengths
    numbers: Integers = np.arange(int(lengths.sum())) + np.repeat(firsts - starts, lengths)
    return numbers


# ---- making a piece --------------------------------------------------------------------------------------------------


def make_pieces(firsts: list[tuple[int, int]], index: ShardIndex, cuts: list[int]) -> list[Piece]:
    """What reading needs of runs of consecutive rows.

    Args:
        firsts: shard, and row of the first sample, of each run.
        index: the rows of all runs, one after another.
        cuts: where each run starts in `index`, and where the last one ends.

    Raises:
        StoreError: when a sample begins where none can.
    """
    starts, sizes = index.starts, index.sizes
    counts = np.diff(starts)
    first_members, last_members = starts[:-1], starts[1:] - 1
    offsets = index.offsets[first_members]
    if (offsets % _BLOCK).any():
        row = int(np.argmax(offsets % _BLOCK > 0))
        raise StoreError(
            f"the member index says that key {index.keys[row].as_py()!r} begins at byte {offsets[row]}, where no tar "
            f"member can; restore the index, or remove it and index the dataset again"
        )
    spans = index.offsets[last_members] + sizes[last_members] - offsets
    begins = index.offsets - np.repeat(offsets, counts)
    bounds = np.stack([begins, begins + sizes], axis=1)
    far_apart = spans - np.add.reduceat(sizes, first_members) > _GAP_BYTES * counts if len(counts) else counts > 0
    kinds, kind_of_row = _kinds(index)
    keys, key_starts = _joined(index.keys)
    table = np.empty((len(counts), _FIELDS), dtype=np.int64)
    table[:, _KEY_START], table[:, _KEY_STOP] = key_starts[:-1], key_starts[1:]
    table[:, _KIND] = kind_of_row
    table[:, _OFFSET] = offsets // _BLOCK
    table[:, _SPAN] = np.where(far_apart, -1, spans)
    table[:, _MEMBER] = first_members
    pieces = []
    for (shard, first), (start, stop) in zip(firsts, pairwise(cuts), strict=True):
        own = table[start:stop].copy()
        key, member = int(key_starts[start]), int(starts[start])
        own[:, (_KEY_START, _KEY_STOP)] -= key
        own[:, _MEMBER] -= member
        own_bounds = bounds[member : int(starts[stop])]
        pieces.append(Piece(shard, first, keys[key : key_starts[stop]], _narrow(own), _narrow(own_bounds), kinds))
    return pieces


def _narrow(values: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
    """A copy, of half the size where the numbers allow it."""
    return values.astype(np.int32 if not values.size or values.max() < 2**31 else np.int64)


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


def _kinds(index: ShardIndex) -> tuple[tuple[tuple[str, ...], ...], npt.NDArray[np.int64]]:
    """The distinct tuples of extensions, and which one each row has."""
    codes, starts = index.extension_codes, index.starts
    rows = len(starts) - 1
    width = int(starts[1]) if rows else 0
    if (
        rows * width == len(codes)
        and (np.diff(starts) == width).all()
        and (codes.reshape(rows, width) == codes[:width]).all()
    ):
        return (tuple(index.extensions[code] for code in codes[:width]),), np.zeros(rows, dtype=np.int64)
    numbers: dict[bytes, int] = {}
    kind_of_row = [
        numbers.setdefault(codes[first:stop].tobytes(), len(numbers)) for first, stop in pairwise(starts.tolist())
    ]
    kinds = tuple(tuple(index.extensions[code] for code in np.frombuffer(name, codes.dtype)) for name in numbers)
    return kinds, np.array(kind_of_row, dtype=np.int64)
