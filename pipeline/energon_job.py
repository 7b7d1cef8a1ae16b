"""Writes Megatron-Energon's index beside every shard of a store's newest dataset (see `energon_index`)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dynams_stream import energon_index, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import BadShardsError, UsageError
from dynams_stream.index import ShardIndex, read_part_index
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.store import Store
from pipeline.index_job import listed
from pipeline.shard_scan import attempt, worker_count


@dataclass(frozen=True)
class EnergonReport:
    """What `write_energon_indexes` did.

    Attributes:
        dataset: the dataset version whose shards they are.
        shards: how many it has; each has its index beside it now.
        written: for how many it was written: it was not there, or another one.
        seconds: how long it took.
    """

    dataset: int
    shards: int
    written: int
    seconds: float


def write_energon_indexes(
    store: Store, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> EnergonReport:
    """Write Energon's index beside each shard of the newest dataset version, unless it is there.

    Args:
        store: holds the index of the shards.
        workers: shards that are read at once; by default one per core, or 16 when some are remote.
        progress: called with the shards that are done and all of them.

    Raises:
        NotIndexedError: the store holds no dataset.
        UsageError: two shards would have one index.
        BadShardsError: lists every shard that is not the one that was indexed, or whose index cannot be written; the
            others' is.
    """
    started = time.monotonic()
    dataset = store.dataset()
    places = [store.shard_url(url) for url in dataset.urls]
    _require_one_each(places)
    threads = worker_count(workers, remote=not all(map(storage.is_local, places)))

    def write(found: tuple[int, ShardIndex]) -> bool | str:
        shard, indexed = found
        return attempt(places[shard], lambda: _write(store, dataset, shard, indexed))

    bad: list[str] = []
    written = 0
    for done, outcome in enumerate(ordered_thread_map(threads)(write, _shards(store, dataset)), 1):
        if isinstance(outcome, str):
            bad.append(outcome)
        else:
            written += outcome
        if progress is not None:
            progress(done, len(places))
    if bad:
        raise BadShardsError(
            f"beside {len(bad)} of {len(places)} shards Energon's index could not be written; beside the others it is. "
            f"Do what is said of each, and run again:\n{listed(bad)}"
        )
    return EnergonReport(dataset.version, len(places), written, time.monotonic() - started)


def _require_one_each(places: list[str]) -> None:
    index, times = Counter(map(energon_index.index_url, places)).most_common(1)[0]
    if times > 1:
        raise UsageError(f"Energon would look for the index of {times} shards at {index}; rename them, and index again")


def _shards(store: Store, dataset: Dataset) -> Iterator[tuple[int, ShardIndex]]:
    for part in dataset.parts:
        yield from read_part_index(store.path(part.index_file)).items()


def _write(store: Store, dataset: Dataset, shard: int, indexed: ShardIndex) -> bool:
    reader = store.open_shard(dataset.urls[shard], dataset.fingerprints[shard])
    try:
        place = store.shard_url(dataset.urls[shard])
        return energon_index.write_entries(place, energon_index.entries_of(reader, place, indexed))
    finally:
        reader.close()
