"""Indexes a dataset: every shard's member index, the parts, and the dataset version that makes them known.

What is finished is kept in the store every second, under the shards' URLs and fingerprints; a run after a crash, or
with some shards more, indexes only the others.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import (
    BadShardsError,
    MissingExtraError,
    ShardError,
    ShardMissingError,
    StoreError,
    UsageError,
)
from dynams_stream.index import (
    IndexedShard,
    ShardIndex,
    assign_parts,
    read_part_index,
    read_shard_index,
    repeated_keys,
    write_index,
    write_part_index,
)
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.store import Store
from pipeline.shard_list import expand_shards
from pipeline.shard_scan import scan_shards, worker_count

__all__ = ["IndexReport", "build_index", "expand_shards"]

COMMIT_SECONDS = 1.0
"""How much work a crash may cost."""
COMMIT_MEMBERS = 10_000_000
"""Members of finished shards that are held in memory before they are written."""
BAD_SHARDS_LISTED = 50
_PART_THREADS = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class IndexReport:
    """What `build_index` did.

    Attributes:
        dataset: the dataset version that describes the shards.
        published: whether this run made it; False when it was there.
        shards: how many shards it has.
        samples: how many samples they hold.
        repeated_keys: samples whose key another sample of their shard had before; they are kept apart.
        reused_shards: shards that an earlier, perhaps interrupted run had indexed.
        energon_shards: of the others, those that were read by Energon's index.
        new_shards, changed_shards, removed_shards: against the newest dataset version before.
        seconds: how long it took.
    """

    dataset: Dataset
    published: bool
    shards: int
    samples: int
    repeated_keys: int
    reused_shards: int
    energon_shards: int
    new_shards: int
    changed_shards: int
    removed_shards: int
    seconds: float


def build_index(
    store: Store,
    urls: Sequence[str],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    drop_removed: bool = False,
    from_energon: bool = False,
) -> IndexReport:
    """Index shards and publish them as a new dataset version, unless the newest one describes exactly these bytes.

    Args:
        store: where the index goes.
        urls: the shards, in order; see `expand_shards`.
        workers: shards that are read at once; by default one per core, or 16 when some are remote.
        progress: called with the shards that are indexed and all of them.
        drop_removed: leave out shards that the newest dataset version has and that are gone, instead of refusing.
        from_energon: read shards by the `.tar.idx` beside them, where there is one; see `energon_index`.

    Raises:
        UsageError: for no shards, or one that is named twice; when all of them are gone.
        BadShardsError: lists every shard that cannot be used. Nothing is published; the others' index is kept.
        StoreError: when another job published a dataset version meanwhile.
    """
    started = time.monotonic()
    shards = [storage.absolute(url) for url in urls]
    if not shards or len(set(shards)) < len(shards):
        raise UsageError(f"got {len(shards)} shards, {len(set(shards))} of them different; name each once, and some")
    threads = worker_count(workers, remote=not all(map(storage.is_local, shards)))
    versions = store.dataset_versions()
    previous = store.dataset() if versions else None
    outcomes = zip(shards, ordered_thread_map(threads)(_fingerprint, shards), strict=True)
    prints = {url: found for url, found in outcomes if isinstance(found, str)}
    if drop_removed and previous is not None:
        shards = _without_removed(shards, prints, previous)

    job = _Job(store, previous, prints)
    reused = len(job.found)
    published = False
    if not (job.version_is_whole and _describes(previous, shards, prints)):
        _scan(job, shards, workers, progress, from_energon)
        try:
            table = _dataset_table(job, shards, min(threads, _PART_THREADS))
        except (StoreError, FileNotFoundError) as error:
            if store.dataset_versions() != versions:
                raise _overtaken(store) from error  # it removed what this run had kept
            raise
        published = previous is None or not _holds(store, previous, table)
        if published:
            _publish(store, table, versions[-1] + 1 if versions else 1)
    job.clear(everything=published)
    dataset = store.dataset()
    return IndexReport(
        dataset=dataset,
        published=published,
        shards=len(shards),
        samples=dataset.samples,
        repeated_keys=_repeated_keys(store, dataset),
        reused_shards=reused,
        energon_shards=job.energon_shards,
        **_changes(previous, dataset),
        seconds=time.monotonic() - started,
    )


def _fingerprint(url: str) -> str | None:
    """What identifies the shard's bytes; None when it cannot be opened, which indexing it will explain."""
    try:
        reader = storage.open_reader(url)
        try:
            return storage.fingerprint(reader)
        finally:
            reader.close()
    except MissingExtraError:
        raise
    except Exception:  # noqa: BLE001  whatever a file system's client raises, the other shards go on
        return None


def _without_removed(shards: list[str], prints: Mapping[str, str], previous: Dataset) -> list[str]:
    """The shards that are there, and those that were never: it is for indexing to explain what is wrong with them."""
    known = set(previous.urls)
    stay = [url for url in shards if url in prints or url not in known or not _is_gone(url)]
    if not stay:
        raise UsageError(f"none of {len(shards)} shards is there any more ({shards[0]}, …); is their disk mounted?")
    return stay


def _is_gone(url: str) -> bool:
    """Whether there is no such file or object; one that cannot be opened is there."""
    try:
        storage.open_reader(url).close()
    except ShardMissingError:
        return True
    except ShardError:
        pass
    return False


def _changes(before: Dataset | None, now: Dataset) -> dict[str, int]:
    """How many shards are new, changed and removed."""
    old = {} if before is None else dict(zip(before.urls, before.fingerprints, strict=True))
    new = dict(zip(now.urls, now.fingerprints, strict=True))
    return {
        "new_shards": len(new.keys() - old.keys()),
        "changed_shards": sum(old[url] != new[url] for url in new.keys() & old.keys()),
        "removed_shards": len(old.keys() - new.keys()),
    }


def _describes(dataset: Dataset | None, shards: list[str], prints: Mapping[str, str]) -> bool:
    """Whether a dataset version is about exactly these shards and bytes."""
    return (
        dataset is not None
        and list(dataset.urls) == shards
        and list(dataset.fingerprints) == [prints.get(url) for url in shards]
    )


# ---- finished work ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Found:
    """An indexed shard.

    Attributes:
        fingerprint, bytes, samples: as the dataset's table has them.
        place: its index, or the path of the file that holds it.
        number: its number in that file.
    """

    fingerprint: str
    bytes: int
    samples: int
    place: ShardIndex | str
    number: int


class _Job:
    """The shards that are indexed already: by an earlier version, by an interrupted run, by this one.

    Args:
        store: where finished work is kept.
        previous: the newest dataset version.
        prints: the shards of this job and their fingerprints now; work on other bytes is of no use.

    Attributes:
        named: the index files that the newest dataset version names.
    """

    def __init__(self, store: Store, previous: Dataset | None, prints: dict[str, str]):
        self.prints = prints
        self.found: dict[str, _Found] = {}
        self.named = frozenset(() if previous is None else (part.index_file for part in previous.parts))
        self.version_is_whole = False
        self.energon_shards = 0
        self.store = store
        self._fresh: dict[str, IndexedShard] = {}
        self._fresh_members = 0
        self._committed = time.monotonic()
        self._spent: list[str] = []
        if previous is not None:
            self._take_version(previous)
        self._take_unfinished()

    def _take_version(self, dataset: Dataset) -> None:
        there = set(storage.list_names(self.store.path(schema.INDEX_FOLDER)))
        self.version_is_whole = all(part.index_file.rsplit("/", 1)[-1] in there for part in dataset.parts)
        for part in dataset.parts:
            if part.index_file.rsplit("/", 1)[-1] not in there:
                continue
            file = self.store.path(part.index_file)
            for shard in range(part.first_shard, part.first_shard + part.shards):
                size, samples = int(dataset.sizes[shard]), int(dataset.counts[shard])
                self._take(dataset.urls[shard], _Found(dataset.fingerprints[shard], size, samples, file, shard))

    def _take_unfinished(self) -> None:
        folder = self.store.path(schema.INDEXING_FOLDER)
        for name in storage.list_names(folder):
            if not name.endswith(".parquet") or name.startswith("."):
                continue
            url = storage.join(folder, name)
            try:
                with storage.open_random(url) as file:
                    metadata = pq.read_metadata(file).metadata
                schema.require_format(metadata, url)
                records = json.loads(metadata[schema.INDEXED_KEY])
            except (pa.ArrowException, OSError, KeyError, ValueError, StoreError) as error:
                _log.warning("%s: left out, its shards are indexed again (%s)", url, error)
                continue
            taken = [
                self._take(shard, _Found(fingerprint, size, samples, url, number))
                for number, (shard, fingerprint, size, samples) in enumerate(records)
            ]
            if all(taken):
                self._spent.append(url)

    def _take(self, url: str, found: _Found) -> bool:
        fits = self.prints.get(url) == found.fingerprint
        if fits:
            self.found.setdefault(url, found)
        return fits

    def add(self, url: str, indexed: IndexedShard) -> None:
        """Keep the index of a shard; at times all that is new is written to the store."""
        self.found[url] = _Found(indexed.fingerprint, indexed.bytes, len(indexed.index), indexed.index, 0)
        self.energon_shards += indexed.by_energon
        self._fresh[url] = indexed
        self._fresh_members += len(indexed.index.offsets)
        if self._fresh_members > COMMIT_MEMBERS or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write what is new to the store, and let go of it."""
        if self._fresh:
            records = [(url, new.fingerprint, new.bytes, len(new.index)) for url, new in self._fresh.items()]
            about = json.dumps(records).encode()
            url = self.store.path(schema.indexing_path(hashlib.sha256(about).hexdigest()[:16]))
            with storage.atomic_writer(url) as file:
                write_index(file, 0, [shard.index for shard in self._fresh.values()], {schema.INDEXED_KEY: about})
            for number, (shard_url, fingerprint, size, samples) in enumerate(records):
                self.found[shard_url] = _Found(fingerprint, size, samples, url, number)
        self._fresh, self._fresh_members, self._committed = {}, 0, time.monotonic()

    def read(self, shards: Sequence[str]) -> list[ShardIndex]:
        """The indexes of finished shards; a file that holds several of them is read once."""
        files = Counter(found.place for found in map(self.found.__getitem__, shards) if isinstance(found.place, str))
        whole = {file: read_part_index(file) for file, count in files.items() if count > 1}
        indexes = []
        for found in map(self.found.__getitem__, shards):
            if not isinstance(found.place, str):
                indexes.append(found.place)
            elif found.place in whole:
                indexes.append(whole[found.place][found.number])
            else:
                indexes.append(read_shard_index(found.place, found.number))
        return indexes

    def clear(self, *, everything: bool) -> None:
        """Remove unfinished work, of which the newest dataset version now knows all.

        Args:
            everything: also that of runs on other shards, which this one has overtaken.
        """
        if everything:
            folder = self.store.path(schema.INDEXING_FOLDER)
            self._spent = [storage.join(folder, name) for name in storage.list_names(folder)]
            for leftovers in (schema.INDEX_FOLDER, schema.DATASET_FOLDER):
                storage.remove_leftovers(self.store.path(leftovers))
        for url in self._spent:
            storage.remove(url)


def _scan(
    job: _Job,
    shards: list[str],
    workers: int | None,
    progress: Callable[[int, int], None] | None,
    from_energon: bool,
) -> None:
    """Index the shards that are not; raises BadShardsError once all the others are done."""
    bad: dict[str, str] = {}

    def report() -> None:
        if progress is not None:
            progress(len(job.found) + len(bad), len(shards))

    report()
    try:
        missing = [url for url in shards if url not in job.found]
        for url, outcome in scan_shards(missing, workers, from_energon=from_energon):
            if isinstance(outcome, str):
                bad[url] = outcome
            elif outcome.fingerprint != job.prints.setdefault(url, outcome.fingerprint):
                bad[url] = f"{url}: changed while it was being indexed; run again when nobody writes to it"
            else:
                job.add(url, outcome)
            report()
    except BaseException:
        job.commit()
        raise
    if bad:
        job.commit()
        raise BadShardsError(
            f"{len(bad)} of {len(shards)} shards cannot be used; nothing was published, the index of the others is "
            f"kept. Repair them or leave them out, and run again:\n{listed([bad[url] for url in shards if url in bad])}"
        )


def listed(reasons: Sequence[str]) -> str:
    """The first reasons why shards are bad, one a line, and how many more there are."""
    lines = [f"  {reason}" for reason in reasons[:BAD_SHARDS_LISTED]]
    if len(reasons) > len(lines):
        lines.append(f"  … and {len(reasons) - len(lines)} more")
    return "\n".join(lines)


# ---- publishing ------------------------------------------------------------------------------------------------------


def _dataset_table(job: _Job, shards: list[str], threads: int) -> pa.Table:
    """Write the parts' index files; the table of shards that names them."""
    found = [job.found[url] for url in shards]
    counts = np.array([shard.samples for shard in found], dtype=np.int64)
    parts = assign_parts(counts)
    firsts = np.searchsorted(parts, np.arange(parts[-1] + 2)).tolist()

    def write(part: int) -> tuple[str, int]:
        first, stop = firsts[part : part + 2]
        indexes = job.read(shards[first:stop])
        path = write_part_index(job.store.url, part, first, indexes, job.named)
        return path, sum(map(repeated_keys, indexes))

    written = list(ordered_thread_map(threads)(write, range(len(firsts) - 1)))
    columns = {
        "shard": np.arange(len(shards), dtype=np.int32),
        "url": shards,
        "bytes": [shard.bytes for shard in found],
        "fingerprint": [shard.fingerprint for shard in found],
        "samples": counts,
        "part": parts,
        "index_file": [written[part][0] for part in parts.tolist()],
    }
    table = pa.table(columns, schema=schema.DATASET_SCHEMA)
    repeated = sum(count for _, count in written)
    return table.replace_schema_metadata({**schema.DATASET_SCHEMA.metadata, schema.REPEATED_KEY: str(repeated)})


def _holds(store: Store, dataset: Dataset, table: pa.Table) -> bool:
    """Whether a dataset version has this very table (only index files of it were missing)."""
    with storage.open_random(store.path(schema.dataset_path(dataset.version))) as file:
        return bool(pq.ParquetFile(file).read(use_threads=False).equals(table))


def _publish(store: Store, table: pa.Table, version: int) -> None:
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_dictionary=["index_file"],
        column_encoding=schema.encodings(schema.DATASET_SCHEMA),
    )
    url, data = store.path(schema.dataset_path(version)), buffer.getvalue()
    try:
        storage.create(url, data)
    except FileNotFoundError as error:  # the unfinished file was removed as another job's leftover
        raise _overtaken(store) from error
    except FileExistsError as error:
        # an object store's client repeats a request whose answer it lost; then the table there is ours
        if storage.is_local(url) or storage.read_bytes(url) != data:
            raise _overtaken(store) from error


def _overtaken(store: Store) -> StoreError:
    return StoreError(f"{store.url}: another job published a dataset version meanwhile; run again")


def _repeated_keys(store: Store, dataset: Dataset) -> int:
    with storage.open_random(store.path(schema.dataset_path(dataset.version))) as file:
        return int(pq.read_metadata(file).metadata.get(schema.REPEATED_KEY, b"0"))
