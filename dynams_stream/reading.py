"""Reads samples by byte range: which bytes of which shards, read, then cut into members.

    (shard, index into its selected rows) ──MemberTables──► Chunk: offsets, spans, bounds ──bytes──► {"__key__", …}

A chunk of samples is looked up and announced with array operations; only the read, the cutting and the dict are done
sample by sample. A chunk keeps flat lists of integers: a tuple or two for each sample would make Python's garbage
collector the largest cost. A reader belongs to one process: it holds open files and pieces of the member index, both
bounded, and grows with no epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dynams_stream import storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import StoreError
from dynams_stream.local_shards import LocalShards
from dynams_stream.members import Found, MemberTables
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.remote_shards import Plan, RemoteShards, Wanted
from dynams_stream.sample_cache import SampleCache
from dynams_stream.selection import Selection
from dynams_stream.store import Store

Sample = dict[str, Any]
Integers = npt.NDArray[np.int64]

_CHUNK: Final = 2048
_ONE_READ: Final = 48 << 10  # bytes; the members of a longer sample are read one by one, which saves copying them


class Shared(NamedTuple):
    """What samples of one piece of the index share: shard, `__url__` (`__local_path__` too of a file), all keys."""

    shard: int
    head: Sample
    keys: str


class Place(NamedTuple):
    """Where one sample lies, and what it becomes.

    Attributes:
        shared: its shard and all keys.
        offset: first byte of its first member.
        span: bytes up to the end of its last member; negative when they lie far apart.
        key_start, key_stop: where its key is among the piece's.
        row: 0-based position in the shard.
        names: its extensions.
    """

    shared: Shared
    offset: int
    span: int
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
        bounds: for each member of each sample where it begins and ends, from the sample's first byte on, one after
            another.
        extras: further entries (`__weight__`, `__pad__`) by number in the chunk; empty when there are none.
        costs: int64, shape (n, 3): bytes of each sample's members, and bytes and reads that they take in a local file.
        plan: what is fetched for it from object stores.
    """

    columns: tuple[list[Any], ...]
    bounds: list[int]
    extras: dict[int, Sample]
    costs: Integers
    plan: Plan | None = None

    def __len__(self) -> int:
        """How many samples it has."""
        return len(self.columns[0])

    def place(self, number: int) -> Place:
        """Sample `number` of the chunk."""
        return Place(*(column[number] for column in self.columns))

    def bounds_from(self, number: int) -> Iterator[int]:
        """The bounds of sample `number` and those after it."""
        return iter(self.bounds[2 * sum(map(len, self.columns[-1][:number])) :] if number else self.bounds)

    def forget(self) -> None:
        """Fetch nothing more for it."""
        if self.plan is not None:
            self.plan.forget()


class SampleReader:
    """Reads the selected samples of one dataset version in one process.

    Args:
        store: where the index lies, and how shards have moved.
        dataset: the shards.
        remote: what requests to object stores may cost.
        cache: keeps samples of remote shards on this machine.
        count: told how much was read, by the names of `Stats`.
    """

    def __init__(
        self,
        store: Store,
        dataset: Dataset,
        *,
        remote: RemoteOptions | None = None,
        cache: SampleCache | None = None,
        count: Callable[..., None] = lambda **_: None,
    ):
        self._store = store
        self._dataset = dataset
        self._count = count
        self._options = remote or RemoteOptions()
        self._cache = cache
        self.tables = MemberTables(store, dataset)
        self._local = LocalShards(store, dataset)
        self._is_remote = _remote(store, dataset)
        self._remote: RemoteShards | None = None
        if self._is_remote.any():
            self._remote = RemoteShards(store, dataset, self._options, cache, count)

    @property
    def fetches(self) -> bool:
        """Whether chunks should be begun before they are read, since their bytes have a long way."""
        return self._remote is not None

    @property
    def has_files(self) -> bool:
        """Whether some shards are files of this machine, whose reading is for one thread at a time."""
        return not self._is_remote.all()

    @property
    def shares(self) -> bool:
        """Whether workers of a rank can share what they fetch."""
        return self._remote is not None and self._cache is not None

    def chunk_length(self, wanted: int) -> int:
        """How many samples should be looked up at a time; two chunks of remote samples fit the bytes read ahead."""
        if self._remote is None:
            return max(_CHUNK, wanted)
        mean = int(self._dataset.sizes.sum()) // max(1, self._dataset.samples)
        return max(1, self._options.read_ahead // 2 // max(1, mean))

    # ---- looking up --------------------------------------------------------------------------------------------------

    def look_up(
        self,
        shards: Integers,
        places: Integers,
        selection: Selection,
        *,
        padded: npt.NDArray[np.bool_] | None = None,
        workers: Integers | None = None,
        worker: int = 0,
        skip: int = 0,
    ) -> Chunk:
        """Find samples in the index, and have those of object stores fetched.

        Args:
            shards: int64, shape (n,), shard numbers.
            places: int64, shape (n,), indices into each shard's selected rows.
            selection: the selected rows.
            padded: bool, shape (n,), which ones to mark `__pad__`.
            workers: int64, shape (n,), which worker of the rank needs each, when they share what they fetch; by default
                all are for this one.
            worker: which of them this one is.
            skip: so many of its first samples are planned for all, but not returned: it has yielded them before.

        Returns:
            The samples of this worker, in the same order.

        Raises:
            StoreError: when the selection names a row that the index does not have.
        """
        rows = self._rows(shards, places, selection)
        found = self.tables.find(shards, rows)
        plan = self._announce(shards, found, workers, worker)
        if workers is not None:
            own = np.flatnonzero(workers == worker)[skip:]
            shards, places, rows, found = shards[own], places[own], rows[own], found.only(own)
            padded = None if padded is None else padded[own]
        return Chunk(
            columns=self._columns(found, rows),
            bounds=found.bounds.ravel().tolist(),
            extras=self._extras(shards, places, selection, padded),
            costs=_costs(found, self._is_remote[shards]),
            plan=plan,
        )

    def _rows(self, shards: Integers, places: Integers, selection: Selection) -> Integers:
        rows = selection.rows_at(shards, places)
        wrong = np.flatnonzero(rows >= self._dataset.counts[shards])
        if len(wrong):
            shard = int(shards[wrong[0]])
            raise StoreError(
                f"the selection names row {rows[wrong[0]]} of {self._dataset.urls[shard]}, "
                f"which has {self._dataset.counts[shard]} samples; select again"
            )
        return rows

    def _announce(self, shards: Integers, found: Found, workers: Integers | None, worker: int) -> Plan | None:
        here = ~self._is_remote[shards]
        self._local.begin_chunk(shards[here], found.offsets[here], np.maximum(found.spans[here], 0))
        if self._remote is None:
            return None
        number, offsets, sizes = _spans(found)
        remote = self._is_remote[shards[number]]
        remote &= sizes > 0
        number, offsets, sizes = number[remote], offsets[remote], sizes[remote]
        whose = np.full(len(number), worker, dtype=np.int64) if workers is None else workers[number]
        return self._remote.plan(Wanted(shards[number], offsets, sizes, whose), worker)

    def _columns(self, found: Found, rows: Integers) -> tuple[list[Any], ...]:
        """The fields of `Place`, a list of each."""
        heads = {shard: self._head(shard) for shard in {piece.shard for piece in found.pieces}}
        shared = [Shared(piece.shard, heads[piece.shard], piece.keys) for piece in found.pieces]
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

    def _head(self, shard: int) -> Sample:
        url = self._dataset.urls[shard]
        path = self._store.shard_url(url)
        return {"__url__": url, "__local_path__": path} if storage.is_local(path) else {"__url__": url}

    @staticmethod
    def _extras(
        shards: Integers, places: Integers, selection: Selection, padded: npt.NDArray[np.bool_] | None
    ) -> dict[int, Sample]:
        extras: dict[int, Sample] = {}
        weights = selection.weights_at(shards, places)
        if weights is not None:
            extras = {number: {"__weight__": weight} for number, weight in enumerate(weights.tolist())}
        if padded is not None:
            for number in np.flatnonzero(padded).tolist():
                extras[number] = {**extras.get(number, {}), "__pad__": True}
        return extras

    # ---- reading -----------------------------------------------------------------------------------------------------

    def samples(self, chunk: Chunk, first: int = 0) -> Iterator[Sample]:
        """The samples of a chunk from number `first` on, as `webdataset.WebDataset` yields them, with their rows.

        Raises:
            ShardMissingError, ShardChangedError: when a shard is gone, or not what was indexed.
            ShardUnreadableError: when its bytes cannot be had.
        """
        columns = [column[first:] for column in chunk.columns] if first else chunk.columns
        places = zip(*columns, strict=True)
        return (self._from_anywhere if self._remote is not None else self._from_files)(chunk, places, first)

    def _from_files(self, chunk: Chunk, places: Iterator[tuple[Any, ...]], first: int) -> Iterator[Sample]:
        """Samples of local shards; what is done here is done for each sample, so it is little."""
        pread, descriptor_of, local = os.pread, self._local.descriptors.get, self._local
        bounds = chunk.bounds_from(first)
        for (shard, head, keys), offset, span, key_start, key_stop, row, names in places:
            descriptor = descriptor_of(shard)
            if descriptor is None:
                descriptor = local.open(shard)
            sample: Sample = {"__key__": keys[key_start:key_stop], **head}
            if 0 <= span <= _ONE_READ:
                try:
                    data = pread(descriptor, span, offset)
                except OSError:
                    data = b""
                if len(data) != span:
                    data = local.pread(shard, offset, span)  # once more, with all that can be said of the failure
                for name, begin, end in zip(names, bounds, bounds):  # noqa: B905 (they go on with the next sample's)
                    sample[name] = data[begin:end]
            else:
                for name, begin, end in zip(names, bounds, bounds):  # noqa: B905
                    sample[name] = local.pread(shard, offset + begin, end - begin)
            sample["__row__"] = row
            yield sample

    def _from_anywhere(self, chunk: Chunk, places: Iterator[tuple[Any, ...]], first: int) -> Iterator[Sample]:
        """Samples of remote shards, among which there may be local ones."""
        assert self._remote is not None
        from_remote = partial(self._remote.pread, plan=chunk.plan)
        bounds = chunk.bounds_from(first)
        for (shard, head, keys), offset, span, key_start, key_stop, row, names in places:
            sample: Sample = {"__key__": keys[key_start:key_stop], **head}
            is_remote = self._is_remote[shard]
            pread, at_once = (from_remote, span >= 0) if is_remote else (self._local.pread, 0 <= span <= _ONE_READ)
            data = pread(shard, offset, span) if at_once and span else b""
            for name, begin, end in zip(names, bounds, bounds):  # noqa: B905 (they go on with the next sample's)
                if at_once or begin == end:
                    sample[name] = data[begin:end]
                else:
                    sample[name] = pread(shard, offset + begin, end - begin)
            sample["__row__"] = row
            yield sample

    def account(self, chunk: Chunk, read: int) -> None:
        """Count the first `read` samples of a chunk, which have been read."""
        used, from_files, reads = chunk.costs[:read].sum(axis=0).tolist()
        self._count(samples=read, bytes_used=used, bytes_read=from_files, requests=reads)
        if self._remote is not None:
            self._count(wait_seconds=self._remote.take_waited())

    def close_files(self) -> None:
        """Give all files of this machine back; they are opened again when they are needed."""
        self._local.close()

    def close(self) -> None:
        """Give all files back, and fetch nothing more."""
        self.close_files()
        if self._remote is not None:
            self._remote.close()


def _remote(store: Store, dataset: Dataset) -> npt.NDArray[np.bool_]:
    """For each shard whether it lies in an object store."""
    if store.shards_at is not None:
        return np.full(len(dataset.urls), not storage.is_local(store.shards_at))
    return np.array(["://" in url and not storage.is_local(url) for url in dataset.urls], dtype=np.bool_)


def _spans(found: Found) -> tuple[Integers, Integers, Integers]:
    """Sample number, offset and size of what is read at once: whole samples, or members that lie far apart."""
    number = np.arange(len(found.spans), dtype=np.int64)
    if (found.spans >= 0).all():
        return number, found.offsets, found.spans
    owners = np.repeat(number, found.lengths)
    apart = found.spans[owners] < 0
    sizes = found.bounds[:, 1] - found.bounds[:, 0]
    members = np.flatnonzero(apart)
    whole = number[found.spans >= 0]
    numbers = np.concatenate([whole, owners[members]])
    offsets = np.concatenate([found.offsets[whole], found.offsets[owners[members]] + found.bounds[members, 0]])
    order = np.argsort(numbers, kind="stable")
    return numbers[order], offsets[order], np.concatenate([found.spans[whole], sizes[members]])[order]


def _costs(found: Found, remote: npt.NDArray[np.bool_]) -> Integers:
    used = found.sums(found.bounds[:, 1] - found.bounds[:, 0])
    at_once = (found.spans >= 0) & (found.spans <= _ONE_READ)
    from_files, reads = np.where(at_once, found.spans, used), np.where(at_once, 1, found.lengths)
    return np.stack([used, np.where(remote, 0, from_files), np.where(remote, 0, reads)], axis=1)
