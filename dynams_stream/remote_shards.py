"""Reads of shards that lie in an object store: planned for a whole chunk, fetched ahead, shared and kept in a cache.

    chunk of spans ──cache has it?──► no ──plan──► ranges ──► ReadAhead ──► Retries ──► Transport
                                └► yes ─────────────────────────────────► pread

Each request names the version of the shard that was indexed (`If-Match`). Where the version in a fingerprint cannot
be asked for (a moved copy, Google's interfaces, a store without entity tags, Azure through fsspec), each process checks
the shard's fingerprint once, before its first range (a moved copy's without the version). The version that answers then
is asked for from then on, where answers tell one. Through fsspec only S3 and HTTP do: with other protocols, and with a
store without entity tags, that check is all.

Workers of one rank that have a cache plan the same ranges over the samples of all of them. A range belongs to the
worker that needs its first sample; the others wait for it to put their samples into the cache. As batches are asked for
in order, nobody waits in a circle; who waits too long fetches for itself. Samples of shards without an entity tag are
not kept: a shard that was written anew may have the same fingerprint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dynams_stream import ranges, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import DynamsError, ShardChangedError
from dynams_stream.read_ahead import Range, ReadAhead
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.retries import Retries
from dynams_stream.sample_cache import SampleCache
from dynams_stream.store import Store
from dynams_stream.transport import Transport, refused, same_etag

Integers = npt.NDArray[np.int64]

_PATIENCE: Final = 5.0  # seconds for which a range of another worker is waited for
_NAP: Final = 0.002


class Wanted(NamedTuple):
    """What a chunk needs of its rank's shards, in the order of need; n spans.

    Attributes:
        shards, offsets, sizes: int64, shape (n,): which bytes of which shards.
        workers: int64, shape (n,): which worker of the rank needs each.
    """

    shards: Integers
    offsets: Integers
    sizes: Integers
    workers: Integers


class RemoteShards:
    """Ranges of remote shards, for one process.

    Args:
        store: knows where shards have moved.
        dataset: the shards.
        options: what requests may cost.
        cache: keeps samples on this machine; None for none.
        count: told how much was read, by the names of `Stats`.
    """

    def __init__(
        self,
        store: Store,
        dataset: Dataset,
        options: RemoteOptions,
        cache: SampleCache | None,
        count: Callable[..., None],
    ):
        self._store = store
        self._dataset = dataset
        self._options = options
        self._cache = cache
        self._count = count
        self._transport = Transport(options.timeout, options.in_flight)
        self._retries = Retries(options, count)
        self._ahead = ReadAhead(self._fetch, threads=options.in_flight, budget=options.read_ahead)
        self._etags: dict[int, str] = {}
        self._etag_locks: dict[int, threading.Lock] = {}
        self._failed_checks: dict[int, tuple[float, DynamsError]] = {}
        self._mutex = threading.Lock()

    # ---- before a chunk is read --------------------------------------------------------------------------------------

    def plan(self, wanted: Wanted, worker: int) -> Plan:
        """Have what `worker` needs fetched.

        Args:
            wanted: what all workers need that share a cache; else this one's needs alone.
            worker: which of them this one is.
        """
        wanted = self._for_own_or_cache(wanted, worker)
        gap, longest = self._options.gap_bytes, self._options.longest
        # who fetches what follows from all that is wanted, so that workers agree whatever each finds in the cache
        whole = ranges.plan(wanted.shards, wanted.offsets, wanted.sizes, gap=gap, longest=longest)
        firsts = np.full(len(whole), len(wanted.shards), dtype=np.int64)
        np.minimum.at(firsts, whole.range_of, np.arange(len(wanted.shards)))
        missing = np.flatnonzero(~self._cached(wanted.shards, wanted.offsets))
        shards, offsets, sizes, workers = (column[missing] for column in wanted)
        planned = ranges.plan(whole.range_of[missing], offsets, sizes, gap=gap, longest=longest)
        fetched_here = (wanted.workers[firsts][planned.shards] == worker).tolist()
        places = zip(
            whole.shards[planned.shards].tolist(), planned.starts.tolist(), planned.stops.tolist(), strict=True
        )
        made = [Range(*place) if own else None for place, own in zip(places, fetched_here, strict=True)]
        plan = Plan(self._ahead)
        spans = zip(shards.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
        mine = (workers == worker).tolist()
        for (shard, offset, size), number, own in zip(spans, planned.range_of.tolist(), mine, strict=True):
            plan.add(made[number], shard, offset, size, own)
        plan.fetched = [each for each in made if each is not None]
        self._ahead.submit(plan.fetched)
        return plan

    def _for_own_or_cache(self, wanted: Wanted, worker: int) -> Wanted:
        """What is wanted, less what others want and fetching it here would not bring them, as nothing keeps it."""
        kept = wanted.workers == worker
        if self._cache is not None and self._cache.keeps:
            kept |= self._cacheable[wanted.shards]
        return Wanted(*(column[kept] for column in wanted))

    def _adopt(self, plan: Plan) -> None:
        """Fetch here what another worker was to fetch, and does not bring."""
        places = np.array([(*place, size) for place, size in plan.shared.items()], dtype=np.int64)
        planned = ranges.plan(*places.T, gap=self._options.gap_bytes, longest=self._options.longest)
        columns = (planned.shards, planned.starts, planned.stops)
        made = [Range(*place) for place in zip(*(column.tolist() for column in columns), strict=True)]
        for (place, size), number in zip(plan.shared.items(), planned.range_of.tolist(), strict=True):
            plan.add(made[number], *place, size, True)
        plan.shared.clear()
        plan.fetched += made
        plan.ahead.submit(made)

    def _cached(self, shards: Integers, offsets: Integers) -> npt.NDArray[np.bool_]:
        if self._cache is None:
            return np.zeros(len(shards), dtype=np.bool_)
        names = np.empty(len(shards), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            run = np.flatnonzero(shards == shard)
            names[run] = self._names(shard, offsets[run].tolist())
        present = self._cache.present(names.tolist())
        return np.isin(names, np.fromiter(present, dtype=np.int64, count=len(present)))

    # ---- reading -----------------------------------------------------------------------------------------------------

    def pread(self, shard: int, offset: int, size: int, plan: Plan | None = None) -> bytes:
        """Exactly `size` bytes of a shard from `offset`.

        Args:
            plan: the plan of the chunk that they belong to.

        Raises:
            ShardMissingError, ShardChangedError: when the shard is gone, or not what was indexed.
            ShardUnreadableError: when it cannot be read before the deadline.
        """
        place = (shard, offset)
        if plan is not None and place in plan.ranges:
            return plan.ahead.take(plan.ranges.pop(place), offset)
        if self._cache is not None:
            shared = plan is not None and place in plan.shared
            found = self._from_cache(shard, offset, size, _PATIENCE if shared else 0.0)
            if found is not None:
                self._count(bytes_cached=size)
                if plan is not None:
                    plan.shared.pop(place, None)
                return found
            if plan is not None and shared:
                self._adopt(plan)
                return plan.ahead.take(plan.ranges.pop(place), offset)
        alone = Range(shard, offset, offset + size)
        alone.spans[offset] = size
        return bytes(self._fetch(alone))

    def take_waited(self) -> float:
        """Seconds in which bytes were waited for since this was asked last."""
        waited, self._ahead.waited = self._ahead.waited, 0.0
        return waited

    def close(self) -> None:
        """Fetch nothing of what was planned any more."""
        self._ahead.close()
        self._ahead = ReadAhead(self._fetch, threads=self._options.in_flight, budget=self._options.read_ahead)

    def _from_cache(self, shard: int, offset: int, size: int, patience: float) -> bytes | None:
        assert self._cache is not None
        (name,) = self._names(shard, [offset])
        began = time.monotonic()
        while True:
            found = self._cache.get(name, size) if name >= 0 else None
            waited = time.monotonic() - began
            if found is not None or waited >= patience or name < 0 or not self._cache.keeps:
                self._ahead.waited += waited if patience else 0.0
                return found
            time.sleep(_NAP)

    def _names(self, shard: int, offsets: list[int]) -> list[int]:
        assert self._cache is not None
        if not self._cacheable[shard]:
            return [-1] * len(offsets)
        return self._cache.ids(self._dataset.urls[shard], self._dataset.fingerprints[shard], offsets)

    @cached_property
    def _cacheable(self) -> npt.NDArray[np.bool_]:
        """For each shard whether its fingerprint tells it from all that are written in its place."""
        return np.array([bool(storage.etag_of(each)) for each in self._dataset.fingerprints], dtype=np.bool_)

    # ---- fetching, in the threads of the read-ahead ------------------------------------------------------------------

    def _fetch(self, wanted: Range) -> memoryview:
        url = self._store.shard_url(self._dataset.urls[wanted.shard])
        expected = self._etag(wanted.shard, url, wanted.stopped)
        answer = self._retries.until_done(
            lambda: self._transport.get(url, wanted.start, wanted.stop, expected),
            url,
            f"bytes {wanted.start} to {wanted.stop - 1}",
            wanted.stopped,
        )
        if not expected and answer.etag:
            self._agree(wanted.shard, url, answer.etag)
        self._count(bytes_read=wanted.size)
        data = memoryview(answer.data)
        if self._cache is not None:
            kept = {**wanted.spans, **wanted.others}
            names = self._names(wanted.shard, list(kept))
            self._cache.put(
                [
                    (name, data[offset - wanted.start : offset - wanted.start + size])
                    for name, (offset, size) in zip(names, kept.items(), strict=True)
                ]
            )
        return data

    def _etag(self, shard: int, url: str, stopped: threading.Event) -> str:
        """The version to ask for; checks the shard first where its fingerprint names none that could be asked for."""
        known = self._etags.get(shard)
        if known is not None:
            return known
        recorded = storage.etag_of(self._dataset.fingerprints[shard])
        comparable = "" if self._store.shards_at is not None else self._transport.comparable_etag(url, recorded)
        if not comparable:
            return self._checked(shard, url, stopped)
        self._etags[shard] = comparable
        return comparable

    def _checked(self, shard: int, url: str, stopped: threading.Event) -> str:
        """The version of a shard after its check, which one thread makes, for better or worse, for all that wait."""
        began = time.monotonic()
        with self._mutex:
            lock = self._etag_locks.setdefault(shard, threading.Lock())
        with lock:
            failed = self._failed_checks.get(shard)
            if failed is not None and failed[0] >= began:
                raise failed[1]
            if shard not in self._etags:
                try:
                    found = self._retries.until_done(lambda: self._check(shard, url), url, "its description", stopped)
                except DynamsError as error:
                    self._failed_checks[shard] = time.monotonic(), error
                    raise
                self._etags[shard] = self._transport.comparable_etag(url, found)
        return self._etags[shard]

    def _check(self, shard: int, url: str) -> str:
        """The version of a shard that holds what was indexed, "" where its store names none."""
        indexed = self._dataset.fingerprints[shard]
        try:
            reader = self._transport.open_reader(url)
            found = storage.fingerprint(reader)
        except DynamsError:
            raise
        except Exception as error:
            raise refused(error, url) from error
        self._count(requests=1)  # its description and its header are two
        if not storage.same_bytes(indexed, found, moved=self._store.shards_at is not None):
            raise ShardChangedError(storage.changed_message(url, indexed, found), shard=url)
        return reader.etag

    def _agree(self, shard: int, url: str, etag: str) -> None:
        """Take the version of the first answer for the shard's; several were asked for before any answered."""
        with self._mutex:
            known = self._etags[shard] = self._etags[shard] or etag
        if not same_etag(known, etag):
            raise ShardChangedError(storage.changed_message(url, known, etag), shard=url)


class Plan:
    """What is fetched for one chunk.

    Attributes:
        ranges: by (shard, offset) of a span, the range that holds it.
        shared: by (shard, offset) the size of the spans that another worker fetches, in the order of need.
        fetched: all ranges that are fetched here, for other workers alone among them.
        ahead: fetches the ranges; `RemoteShards.close` leaves it to the plans that were made before.
    """

    def __init__(self, ahead: ReadAhead):
        self.ranges: dict[tuple[int, int], Range] = {}
        self.shared: dict[tuple[int, int], int] = {}
        self.fetched: list[Range] = []
        self.ahead = ahead

    def add(self, holder: Range | None, shard: int, offset: int, size: int, own: bool) -> None:
        """A span, the range that holds it (None: another worker's), and whether it is this worker's own."""
        if holder is not None:
            (holder.spans if own else holder.others)[offset] = size
            if own:
                self.ranges[shard, offset] = holder
        elif own:
            self.shared[shard, offset] = size

    def forget(self) -> None:
        """Let go of what was not read."""
        self.ahead.forget(self.fetched)
        self.fetched.clear()
        self.ranges.clear()
        self.shared.clear()
