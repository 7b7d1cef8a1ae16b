"""Reads samples by byte range: which bytes of which shards, one positioned read each, then cut into members.

    (shard, index into its selected rows) ──member table──► Chunk: offsets, sizes, bounds ──pread──► {"__key__", …}

A chunk of samples is looked up with array operations, shard by shard; only the read, the cutting and the dict are done
sample by sample. A chunk keeps flat lists of integers: a tuple or two for each sample would make Python's garbage
collector the largest cost. A reader belongs to one process: it holds open files and the member tables of the shards in
use, both bounded, and grows with no epoch.
"""

from __future__ import annotations

import itertools
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dynams_stream import storage
from dynams_stream.errors import ShardChangedError, StoreError
from dynams_stream.index import ShardIndex, read_shard_index
from dynams_stream.selection import Selection
from dynams_stream.store import Dataset, Store

Sample = dict[str, Any]
Integers = npt.NDArray[np.int64]

_MOST_OPEN = 1024
_TABLE_BYTES: Final = 512 << 20  # member tables of about 10⁷ samples of three members
_GAP_BYTES: Final = 64 << 10  # members further apart than headers explain are read one by one


class Shared(NamedTuple):
    """What all samples of one shard share: its number, `__url__` (and `__local_path__` of a file), keys, table."""

    shard: int
    head: Sample
    keys: str
    table: _MemberTable


class Place(NamedTuple):
    """Where one sample lies, and what it becomes.

    Attributes:
        shared: its shard.
        offset: first byte of its first member.
        size: bytes up to the end of its last member; -1 when its members are read one by one.
        key_start, key_stop: where its key is among the shard's.
        row: 0-based position in the shard.
        names: its extensions.
    """

    shared: Shared
    offset: int
    size: int
    key_start: int
    key_stop: int
    row: int
    names: tuple[str, ...]

    @property
    def url(self) -> str:
        """The shard's URL as it was indexed."""
        return str(self.shared.head["__url__"])

    @property
    def key(self) -> str:
        """The sample's key."""
        return self.shared.keys[self.key_start : self.key_stop]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some samples to read, in order: for each field of `Place` a list, for each member a begin and an end.

    Attributes:
        columns: the seven lists.
        bounds: for each member of each sample where it begins and ends in the bytes read, one after another.
        extras: further entries (`__weight__`, `__pad__`) by number in the chunk; empty when there are none.
    """

    columns: tuple[list[Any], ...]
    bounds: list[int]
    extras: dict[int, Sample]

    def place(self, number: int) -> Place:
        """Sample `number` of the chunk."""
        return Place(*(column[number] for column in self.columns))

    def bounds_from(self, number: int) -> Iterator[int]:
        """The bounds of sample `number` and those after it."""
        return iter(self.bounds[2 * sum(map(len, self.columns[-1][:number])) :])


class SampleReader:
    """Reads the selected samples of one dataset version in one process.

    Args:
        store: where the index lies, and how shards have moved.
        dataset: the shards.
    """

    def __init__(self, store: Store, dataset: Dataset):
        self._store = store
        self._dataset = dataset
        self._tables: OrderedDict[int, _MemberTable] = OrderedDict()
        self._table_bytes = 0
        self._readers: OrderedDict[int, storage.LocalReader | storage.RemoteReader] = OrderedDict()
        self._most_open = min(_MOST_OPEN, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        self._preads: dict[int, Callable[[int, int], bytes]] = {}
        self._wanted: set[int] = set()

    def look_up(
        self, shards: Integers, places: Integers, selection: Selection, padded: npt.NDArray[np.bool_] | None = None
    ) -> Chunk:
        """Find samples in the index.

        Args:
            shards: int64, shape (n,), shard numbers.
            places: int64, shape (n,), indices into each shard's selected rows.
            selection: the selected rows.
            padded: bool, shape (n,), which ones to mark `__pad__`.

        Returns:
            The n samples in the same order.

        Raises:
            StoreError: when the selection names a row that the index does not have.
        """
        order = np.argsort(shards, kind="stable")
        sorted_shards, sorted_places = shards[order], places[order]
        cuts = [0, *(np.flatnonzero(np.diff(sorted_shards)) + 1).tolist(), len(shards)]
        runs = [(int(sorted_shards[a]), slice(a, b)) for a, b in itertools.pairwise(cuts) if a < b]
        self._want([shard for shard, _ in runs])
        numbers = np.empty((len(shards), _NUMBERS), dtype=np.int64)
        kinds: dict[tuple[str, ...], int] = {}
        kind_of = np.zeros(len(shards), dtype=np.int64)
        shared: list[Shared] = []
        for shard, run in runs:
            table = self._table(shard)
            rows = self._rows(shard, sorted_places[run], selection)
            numbers[run] = table.numbers[rows]
            kind_of[run] = table.kinds_of(rows, kinds)
            shared += [Shared(shard, self._head(shard), table.keys, table)] * len(rows)
        names = list(kinds)
        lengths = np.array([len(each) for each in names], dtype=np.int64)[kind_of]
        bounds = _bounds(
            [shared[run.start].table for _, run in runs], [run for _, run in runs], numbers[:, _FIRST], lengths
        )
        back = np.argsort(order)  # from sorted by shard to the order asked for
        return Chunk(
            columns=(
                list(map(shared.__getitem__, back.tolist())),
                *numbers[back, : _NUMBERS - 1].T.tolist(),
                names * len(shards) if len(names) == 1 else [names[i] for i in kind_of[back].tolist()],
            ),
            bounds=_reordered(bounds, lengths, back),
            extras=self._extras(runs, order, sorted_places, selection, padded),
        )

    def read(self, place: tuple[Any, ...], bounds: Iterator[int]) -> Sample:
        """One sample as `webdataset.WebDataset` yields it, and its row.

        Args:
            place: a `Place`, or a plain tuple of its fields.
            bounds: gives begin and end of each of its members next.

        Raises:
            ShardMissingError, ShardChangedError: when the shard is gone, or not what was indexed.
        """
        (shard, head, keys, table), offset, size, key_start, key_stop, row, names = place
        pread = self._preads.get(shard) or self._open(shard)
        data = pread(offset, size) if size >= 0 else _gather(table.scattered[row], pread)
        sample: Sample = {"__key__": keys[key_start:key_stop], **head}
        for name, begin, end in zip(names, bounds, bounds):  # noqa: B905 (bounds go on with the next sample's)
            sample[name] = data[begin:end]
        sample["__row__"] = row
        return sample

    def close(self) -> None:
        """Give all file handles back; they are opened again when they are needed."""
        self._preads.clear()
        while self._readers:
            self._readers.popitem()[1].close()

    # ---- which rows --------------------------------------------------------------------------------------------------

    def _rows(self, shard: int, places: Integers, selection: Selection) -> Integers:
        selected = selection.rows(shard)
        if len(selected) and int(selected[-1]) >= self._dataset.counts[shard]:
            raise StoreError(
                f"the selection names row {selected[-1]} of {self._dataset.urls[shard]}, "
                f"which has {self._dataset.counts[shard]} samples; select again"
            )
        return selected[places].astype(np.int64)

    def _extras(
        self,
        runs: list[tuple[int, slice]],
        order: Integers,
        sorted_places: Integers,
        selection: Selection,
        padded: npt.NDArray[np.bool_] | None,
    ) -> dict[int, Sample]:
        extras: dict[int, Sample] = {}
        for shard, run in runs:
            weights = selection.weights(shard)
            if weights is None:
                break  # either all shards have weights or none
            for number, weight in zip(order[run].tolist(), weights[sorted_places[run]].tolist(), strict=True):
                extras[number] = {"__weight__": weight}
        if padded is not None:
            for number in np.flatnonzero(padded).tolist():
                extras[number] = {**extras.get(number, {}), "__pad__": True}
        return extras

    def _head(self, shard: int) -> Sample:
        url = self._dataset.urls[shard]
        path = self._store.shard_url(url)
        return {"__url__": url, "__local_path__": path} if storage.is_local(path) else {"__url__": url}

    def _table(self, shard: int) -> _MemberTable:
        table = self._tables.get(shard)
        if table is None:
            part = self._dataset.parts[self._dataset.part_of_shard[shard]]
            table = _member_table(read_shard_index(self._store.path(part.index_file), shard))
            self._tables[shard] = table
            self._table_bytes += table.nbytes
            while self._table_bytes > _TABLE_BYTES and next(iter(self._tables)) not in self._wanted:
                self._table_bytes -= self._tables.popitem(last=False)[1].nbytes
        return table

    # ---- open shards -------------------------------------------------------------------------------------------------

    def _want(self, shards: list[int]) -> None:
        """Shards of the coming chunk: the others are closed and forgotten first."""
        self._wanted = set(shards)
        for shard in shards:
            if shard in self._readers:
                self._readers.move_to_end(shard)
            if shard in self._tables:
                self._tables.move_to_end(shard)

    def _open(self, shard: int) -> Callable[[int, int], bytes]:
        while len(self._readers) >= self._most_open:
            # A chunk goes round its shards again and again: when they are too many, closing the newest keeps the rest.
            oldest = next(iter(self._readers))
            closed, reader = self._readers.popitem(last=oldest in self._wanted)
            del self._preads[closed]
            reader.close()
        reader = open_shard(self._store, self._dataset.urls[shard], self._dataset.fingerprints[shard])
        self._readers[shard] = reader
        self._preads[shard] = reader.pread
        return reader.pread


def _gather(members: list[tuple[int, int]], pread: Callable[[int, int], bytes]) -> bytes:
    return b"".join(pread(offset, size) for offset, size in members)


def _bounds(
    tables: list[_MemberTable], runs: list[slice], firsts: Integers, lengths: Integers
) -> npt.NDArray[np.int64]:
    """Begin and end of the members of samples that are sorted by shard, int64, shape (members, 2)."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    members = np.arange(starts[-1]) + np.repeat(firsts - starts[:-1], lengths)
    bounds = np.empty((len(members), 2), dtype=np.int64)
    for table, run in zip(tables, runs, strict=True):
        mine = slice(starts[run.start], starts[run.stop])
        bounds[mine] = table.bounds[members[mine]]
    return bounds


def _reordered(bounds: npt.NDArray[np.int64], lengths: Integers, back: Integers) -> list[int]:
    """`bounds` of samples of `lengths` members each, with the samples in the order `back`, as one flat list."""
    starts = np.cumsum(lengths) - lengths
    wanted = lengths[back]
    members = np.arange(len(bounds)) + np.repeat(starts[back] - (np.cumsum(wanted) - wanted), wanted)
    found: list[int] = bounds[members].ravel().tolist()
    return found


def open_shard(store: Store, url: str, fingerprint: str) -> storage.LocalReader | storage.RemoteReader:
    """Open a shard and make sure that it holds the bytes that were indexed.

    Args:
        store: knows where shards have moved.
        url: the shard's URL as it was indexed.
        fingerprint: what identified it then.

    Raises:
        ShardMissingError: when it is not there.
        ShardChangedError: when it is another file than the one that was indexed.
    """
    place = store.shard_url(url)
    reader = storage.open_reader(place)
    found = storage.fingerprint(reader)
    if not storage.same_bytes(fingerprint, found, moved=store.shards_at is not None):
        reader.close()
        raise ShardChangedError(
            f"{place}: not the shard that was indexed (it was {fingerprint}, now it is {found}); "
            f"restore it, or index the dataset again with `dynams index` and score a new round",
            shard=url,
        )
    return reader


_NUMBERS: Final = 6  # columns of a member table: offset, size, key start, key stop, row, first member
_FIRST: Final = 5


@dataclass(frozen=True, eq=False)
class _MemberTable:
    """Every sample of one shard, so that looking one up takes few steps (about 90 bytes a sample of three members).

    Attributes:
        keys: all keys, one after another.
        numbers: int64, shape (rows, 6): first byte of the first member; bytes from there to the end of the last one, or
            -1 when it is in `scattered`; where the key starts and stops in `keys`; the row; its first member.
        bounds: int32 or int64, shape (members, 2): where each member begins and ends in the bytes read for its sample.
        kinds: the distinct tuples of extensions.
        kind_of_row: int32, shape (rows,), position in `kinds`; None when there is one kind only.
        scattered: for samples whose members lie far apart, the (offset, size) of each.
    """

    keys: str
    numbers: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.integer]
    kinds: tuple[tuple[str, ...], ...]
    kind_of_row: npt.NDArray[np.int32] | None
    scattered: dict[int, list[tuple[int, int]]]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return len(self.keys) + self.numbers.nbytes + self.bounds.nbytes

    def kinds_of(self, rows: Integers, known: dict[tuple[str, ...], int]) -> Integers | int:
        """Numbers of the kinds of `rows` among all `known`, to which new ones are added."""
        numbers = [known.setdefault(kind, len(known)) for kind in self.kinds]
        return numbers[0] if self.kind_of_row is None else np.array(numbers)[self.kind_of_row[rows]]


def _member_table(index: ShardIndex) -> _MemberTable:
    """The parts of a shard's index that reading needs."""
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
        scattered[row] = list(zip(index.offsets[members].tolist(), sizes[members].tolist(), strict=True))
        spans[row] = -1
        begins[members] = np.cumsum(sizes[members]) - sizes[members]
    bounds = np.stack([begins, begins + sizes], axis=1)
    kinds, kind_of_row = _kinds(index, starts)
    keys, key_starts = _joined(index.keys)
    return _MemberTable(
        keys=keys,
        numbers=np.stack([offsets, spans, key_starts[:-1], key_starts[1:], np.arange(len(counts)), firsts], axis=1),
        bounds=bounds.astype(np.int32) if not len(bounds) or bounds.max() < 2**31 else bounds,
        kinds=kinds,
        kind_of_row=kind_of_row,
        scattered=scattered,
    )


def _joined(keys: pa.StringArray) -> tuple[str, Integers]:
    """All keys as one text, and int64, shape (rows + 1,), where each one starts in it."""
    _, borders, data = keys.buffers()
    if data is None or not len(keys):
        return "", np.zeros(len(keys) + 1, dtype=np.int64)
    starts = np.frombuffer(borders, dtype=np.int32)[keys.offset : keys.offset + len(keys) + 1].astype(np.int64)
    text = bytes(data[starts[0] : starts[-1]]).decode()
    if text.isascii():
        return text, starts - starts[0]
    lengths = pc.utf8_length(keys).to_numpy()
    return text, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _kinds(index: ShardIndex, starts: Integers) -> tuple[tuple[tuple[str, ...], ...], npt.NDArray[np.int32] | None]:
    """The distinct tuples of extensions of a shard, and which one each row has (None: all the first)."""
    codes = index.extension_codes
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
