"""Reads samples by byte range: which bytes of which shards, one positioned read each, then cut into members.

    (shard, index into its selected rows) ──member table──► Record: shard, offset, size, cuts ──pread──► {"__key__", …}

A chunk of samples is looked up with array operations, shard by shard; only the read, the cutting and the dict are done
sample by sample. A reader belongs to one process: it holds open files and the member tables of the shards in use, both
bounded, and grows with no epoch.
"""

from __future__ import annotations

import itertools
import resource
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
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


class Record(NamedTuple):
    """Where one sample lies, and what it becomes.

    Attributes:
        shard: number of its shard.
        offset: first byte of its first member.
        size: bytes up to the end of its last member; -1 when its members are read one by one.
        key: the sample's key.
        head: what all samples of the shard share: `__url__` as indexed, and `__local_path__` of a file.
        row: 0-based position in the shard.
        names: its extensions.
        cuts: for each extension the slice of the bytes read.
        extra: further entries of the sample (`__weight__`, `__pad__`), if any.
    """

    shard: int
    offset: int
    size: int
    key: str
    head: Sample
    row: int
    names: tuple[str, ...]
    cuts: tuple[slice, ...]
    extra: Sample | None


class SampleReader:
    """Reads the selected samples of one dataset version in one process.

    Args:
        store: where the index lies, and how shards have moved.
        dataset: the shards.
    """

    def __init__(self, store: Store, dataset: Dataset):
        self._store = store
        self._dataset = dataset
        self._moved = store.shards_at is not None
        self._tables: OrderedDict[int, _MemberTable] = OrderedDict()
        self._table_bytes = 0
        self._readers: OrderedDict[int, storage.LocalReader | storage.RemoteReader] = OrderedDict()
        self._most_open = min(_MOST_OPEN, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        self._preads: dict[int, Callable[[int, int], bytes]] = {}
        self._wanted: set[int] = set()

    def records(
        self, shards: Integers, places: Integers, selection: Selection, padded: npt.NDArray[np.bool_] | None = None
    ) -> list[Record]:
        """Look up samples.

        Args:
            shards: int64, shape (n,), shard numbers.
            places: int64, shape (n,), indices into each shard's selected rows.
            selection: the selected rows.
            padded: bool, shape (n,), which ones to mark `__pad__`.

        Returns:
            n records in the same order.

        Raises:
            StoreError: when the selection names a row that the index does not have.
        """
        if not len(shards):
            return []
        order = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[order])) + 1
        groups = np.split(order, borders)
        self._want(shards[[group[0] for group in groups]].tolist())
        found: list[Record] = []
        for group in groups:
            shard = int(shards[group[0]])
            rows, extras = self._rows(shard, places[group], selection)
            found += self._table(shard).records(shard, self._head(shard), rows, extras)
        result: list[Record] = [found[0]] * len(found)
        for place, record in zip(order.tolist(), found, strict=True):
            result[place] = record
        if padded is not None:
            for place in np.flatnonzero(padded).tolist():
                result[place] = result[place]._replace(extra={**(result[place].extra or {}), "__pad__": True})
        return result

    def read(self, record: Record) -> Sample:
        """One sample as `webdataset.WebDataset` yields it, and its row.

        Raises:
            ShardMissingError, ShardChangedError: when the shard is gone, or not what was indexed.
        """
        shard, offset, size, key, head, row, names, cuts, extra = record
        pread = self._preads.get(shard) or self._open(shard)
        data = pread(offset, size) if size >= 0 else self._gather(shard, row, pread)
        sample: Sample = {"__key__": key, **head}
        sample.update(zip(names, map(data.__getitem__, cuts)))  # noqa: B905 (strict= doubles the cost of this line)
        sample["__row__"] = row
        if extra is not None:
            sample.update(extra)
        return sample

    def close(self) -> None:
        """Give all file handles back; they are opened again when they are needed."""
        self._preads.clear()
        while self._readers:
            self._readers.popitem()[1].close()

    # ---- which rows --------------------------------------------------------------------------------------------------

    def _rows(self, shard: int, places: Integers, selection: Selection) -> tuple[Integers, list[Sample | None]]:
        selected = selection.rows(shard)
        if len(selected) and int(selected[-1]) >= self._dataset.counts[shard]:
            raise StoreError(
                f"the selection names row {selected[-1]} of {self._dataset.urls[shard]}, "
                f"which has {self._dataset.counts[shard]} samples; select again"
            )
        weights = selection.weights(shard)
        extras: list[Sample | None] = [None] * len(places)
        if weights is not None:
            extras = [{"__weight__": weight} for weight in weights[places].tolist()]
        return selected[places].astype(np.int64), extras

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
            while self._table_bytes > _TABLE_BYTES and len(self._tables) > 1:
                self._table_bytes -= self._tables.popitem(last=False)[1].nbytes
        self._tables.move_to_end(shard)
        return table

    # ---- open shards -------------------------------------------------------------------------------------------------

    def _want(self, shards: list[int]) -> None:
        """Shards of the coming chunk: the others are closed first."""
        self._wanted = set(shards)
        for shard in shards:
            if shard in self._readers:
                self._readers.move_to_end(shard)

    def _open(self, shard: int) -> Callable[[int, int], bytes]:
        while len(self._readers) >= self._most_open:
            # A chunk goes round its shards again and again: when they are too many, closing the newest keeps the rest.
            oldest = next(iter(self._readers))
            closed, reader = self._readers.popitem(last=oldest in self._wanted)
            del self._preads[closed]
            reader.close()
        reader = open_shard(self._store, self._dataset, shard, moved=self._moved)
        self._readers[shard] = reader
        self._preads[shard] = reader.pread
        return reader.pread

    def _gather(self, shard: int, row: int, pread: Callable[[int, int], bytes]) -> bytes:
        return b"".join(pread(offset, size) for offset, size in self._table(shard).scattered[row])


def open_shard(
    store: Store, dataset: Dataset, shard: int, *, moved: bool
) -> storage.LocalReader | storage.RemoteReader:
    """Open a shard and make sure that it holds the bytes that were indexed.

    Raises:
        ShardMissingError: when it is not there.
        ShardChangedError: when it is another file than the one that was indexed.
    """
    url = store.shard_url(dataset.urls[shard])
    reader = storage.open_reader(url)
    found = storage.fingerprint(reader)
    if not storage.same_bytes(dataset.fingerprints[shard], found, moved=moved):
        reader.close()
        raise ShardChangedError(
            f"{url}: not the shard that was indexed (it was {dataset.fingerprints[shard]}, now it is {found}); "
            f"restore it, or index the dataset again with `dynams index` and score a new round",
            shard=dataset.urls[shard],
        )
    return reader


@dataclass(frozen=True, eq=False)
class _MemberTable:
    """Every sample of one shard, in as few bytes as quick look-ups allow (about 60 a sample of three members).

    Attributes:
        keys: all keys, one after another.
        key_starts: int64, shape (rows + 1,), where each key starts in `keys`.
        offsets: int64, shape (rows,), first byte of each sample's first member.
        spans: int64, shape (rows,), bytes from there to the end of its last member; -1 when it is in `scattered`.
        starts: int64, shape (rows + 1,): members of row r are starts[r]:starts[r + 1].
        begins, ends: int32 or int64, where each member lies in the bytes read for its sample.
        kinds: the distinct tuples of extensions.
        kind_of_row: int32, shape (rows,), position in `kinds`; None when there is one kind only.
        scattered: for samples whose members lie far apart, the (offset, size) of each.
    """

    keys: str
    key_starts: Integers
    offsets: Integers
    spans: Integers
    starts: Integers
    begins: npt.NDArray[np.integer]
    ends: npt.NDArray[np.integer]
    kinds: tuple[tuple[str, ...], ...]
    kind_of_row: npt.NDArray[np.int32] | None
    scattered: dict[int, list[tuple[int, int]]]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        arrays = (self.key_starts, self.offsets, self.spans, self.starts, self.begins, self.ends)
        return len(self.keys) + sum(array.nbytes for array in arrays)

    def records(self, shard: int, head: Sample, rows: Integers, extras: list[Sample | None]) -> list[Record]:
        """Records of `rows`, int64, in that order."""
        if self.kind_of_row is None:
            return self._records_of_kind(self.kinds[0], shard, head, rows, extras)
        kinds = self.kind_of_row[rows]
        found: list[Record | None] = [None] * len(rows)
        for kind in np.unique(kinds).tolist():
            places = np.flatnonzero(kinds == kind).tolist()
            some = self._records_of_kind(self.kinds[kind], shard, head, rows[places], [extras[i] for i in places])
            for place, record in zip(places, some, strict=True):
                found[place] = record
        return [record for record in found if record is not None]

    def _records_of_kind(
        self, names: tuple[str, ...], shard: int, head: Sample, rows: Integers, extras: list[Sample | None]
    ) -> list[Record]:
        count = len(rows)
        keys = map(slice, self.key_starts[rows].tolist(), self.key_starts[rows + 1].tolist())
        members = self.starts[rows] + np.arange(len(names))[:, None]
        begins, ends = self.begins[members].tolist(), self.ends[members].tolist()
        cuts = [list(map(slice, *pair)) for pair in zip(begins, ends, strict=True)]
        return list(
            map(
                Record,
                [shard] * count,
                self.offsets[rows].tolist(),
                self.spans[rows].tolist(),
                map(self.keys.__getitem__, keys),
                [head] * count,
                rows.tolist(),
                [names] * count,
                zip(*cuts, strict=True),
                extras,
            )
        )


def _member_table(index: ShardIndex) -> _MemberTable:
    """The parts of a shard's index that reading needs, made compact."""
    starts = index.starts.astype(np.int64)
    counts = np.diff(starts)
    firsts, lasts = starts[:-1], starts[1:] - 1
    offsets = index.offsets[firsts]
    spans = index.offsets[lasts] + index.sizes[lasts] - offsets
    begins = index.offsets - np.repeat(offsets, counts)
    far_apart = spans - np.add.reduceat(index.sizes, firsts) > _GAP_BYTES * counts if len(counts) else counts > 0
    scattered: dict[int, list[tuple[int, int]]] = {}
    for row in np.flatnonzero(far_apart).tolist():
        members = slice(starts[row], starts[row + 1])
        scattered[row] = list(zip(index.offsets[members].tolist(), index.sizes[members].tolist(), strict=True))
        spans[row] = -1
        begins[members] = np.cumsum(index.sizes[members]) - index.sizes[members]
    ends = begins + index.sizes
    width = np.int32 if not len(ends) or ends.max() < 2**31 else np.int64
    kinds, kind_of_row = _kinds(index, starts)
    return _MemberTable(
        keys="".join(index.keys.to_pylist()),
        key_starts=np.concatenate(
            [np.zeros(1, np.int64), np.cumsum(pc.utf8_length(index.keys).to_numpy(), dtype=np.int64)]
        ),
        offsets=offsets,
        spans=spans,
        starts=starts,
        begins=begins.astype(width),
        ends=ends.astype(width),
        kinds=kinds,
        kind_of_row=kind_of_row,
        scattered=scattered,
    )


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
