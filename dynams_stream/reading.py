"""Reads samples by byte range: which bytes of which shards, one positioned read each, then cut into members.

    (shard, index into its selected rows) ──member table──► Chunk: offsets, sizes, bounds ──pread──► {"__key__", …}

A chunk of samples is looked up with array operations (`members`); only the read, the cutting and the dict are done
sample by sample. A chunk keeps flat lists of integers: a tuple or two for each sample would make Python's garbage
collector the largest cost. A reader belongs to one process: it holds open files and pieces of the member index, both
bounded, and grows with no epoch.
"""

from __future__ import annotations

import itertools
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dynams_stream import storage
from dynams_stream.errors import ShardChangedError, StoreError
from dynams_stream.members import Found, MemberTables, Piece
from dynams_stream.selection import Selection
from dynams_stream.store import Dataset, Store

Sample = dict[str, Any]
Integers = npt.NDArray[np.int64]

_MOST_OPEN = 1024


class Shared(NamedTuple):
    """What all samples of one piece share: its shard, `__url__` (and `__local_path__` of a file), keys, the piece."""

    shard: int
    head: Sample
    keys: str
    table: Piece


class Place(NamedTuple):
    """Where one sample lies, and what it becomes.

    Attributes:
        shared: its shard and its piece of the index.
        offset: first byte of its first member.
        size: bytes up to the end of its last member; -1 when its members are read one by one.
        key_start, key_stop: where its key is among the piece's.
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
        self.tables = MemberTables(store, dataset)
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
        cuts = [0, *(np.flatnonzero(np.diff(shards[order])) + 1).tolist(), len(shards)]
        runs = [(int(shards[order[a]]), order[a:b]) for a, b in itertools.pairwise(cuts) if a < b]
        self._want([shard for shard, _ in runs])
        rows = np.empty(len(shards), dtype=np.int64)
        for shard, run in runs:
            rows[run] = self._rows(shard, places[run], selection)
        found = self.tables.find(shards, rows)
        return Chunk(
            columns=self._columns(found, rows),
            bounds=found.bounds.ravel().tolist(),
            extras=self._extras(runs, places, selection, padded),
        )

    def _columns(self, found: Found, rows: Integers) -> tuple[list[Any], ...]:
        """The fields of `Place`, a list of each."""
        shared = [Shared(piece.shard, self._head(piece.shard), piece.keys, piece) for piece in found.pieces]
        kinds = found.kinds
        return (
            list(map(shared.__getitem__, found.piece.tolist())),
            found.offsets.tolist(),
            found.spans.tolist(),
            found.key_starts.tolist(),
            found.key_stops.tolist(),
            rows.tolist(),
            kinds * len(rows) if len(kinds) == 1 else [kinds[i] for i in found.kind.tolist()],
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
        runs: list[tuple[int, Integers]],
        places: Integers,
        selection: Selection,
        padded: npt.NDArray[np.bool_] | None,
    ) -> dict[int, Sample]:
        extras: dict[int, Sample] = {}
        for shard, run in runs:
            weights = selection.weights(shard)
            if weights is None:
                break  # either all shards have weights or none
            for number, weight in zip(run.tolist(), weights[places[run]].tolist(), strict=True):
                extras[number] = {"__weight__": weight}
        if padded is not None:
            for number in np.flatnonzero(padded).tolist():
                extras[number] = {**extras.get(number, {}), "__pad__": True}
        return extras

    def _head(self, shard: int) -> Sample:
        url = self._dataset.urls[shard]
        path = self._store.shard_url(url)
        return {"__url__": url, "__local_path__": path} if storage.is_local(path) else {"__url__": url}

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
        reader = open_shard(self._store, self._dataset.urls[shard], self._dataset.fingerprints[shard])
        self._readers[shard] = reader
        self._preads[shard] = reader.pread
        return reader.pread


def _gather(members: list[tuple[int, int]], pread: Callable[[int, int], bytes]) -> bytes:
    return b"".join(pread(offset, size) for offset, size in members)


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
