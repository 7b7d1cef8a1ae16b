"""Dataset: the shards of one dataset version, and how they are cut into parts."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.errors import StoreError, UsageError


@dataclass(frozen=True)
class Part:
    """A fixed run of consecutive shards: the unit of work, commit and resume.

    Attributes:
        number: 0-based number of the part.
        first_shard: number of its first shard.
        shards: how many shards it holds.
        samples: how many samples they hold together.
        index_file: path of its member index, relative to the store.
    """

    number: int
    first_shard: int
    shards: int
    samples: int
    index_file: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """The shards of one dataset version, in order.

    Attributes:
        version: 1, 2, …
        digest: SHA-256 of the table's file, in hex.
        urls: URL of each shard.
        sizes: int64, bytes of each shard.
        fingerprints: what identified each shard's bytes when it was indexed.
        counts: int64, samples in each shard.
        parts: the parts, in order.
    """

    version: int
    digest: str
    urls: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    fingerprints: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    parts: tuple[Part, ...]

    @property
    def samples(self) -> int:
        """How many samples all shards hold."""
        return int(self.counts.sum())

    @cached_property
    def part_of_shard(self) -> npt.NDArray[np.int32]:
        """int32, for each shard the number of its part."""
        return np.repeat(np.arange(len(self.parts), dtype=np.int32), [part.shards for part in self.parts])


def read_dataset(url: str, version: int) -> Dataset:
    """Read the table of dataset `version`.

    Raises:
        StoreError: when it is not readable, or of another format.
    """
    data = storage.read_bytes(url)
    try:
        # Not `read_table`: it leaves the bytes to threads that may outlive the interpreter, which aborts the process.
        file = pq.ParquetFile(pa.BufferReader(data))
        schema.require_format(file.schema_arrow.metadata, url)
        urls, fingerprints, index_files = (_strings(file, name) for name in ("url", "fingerprint", "index_file"))
        sizes, counts, parts = (_numbers(file, name) for name in ("bytes", "samples", "part"))
    except pa.ArrowInvalid as error:
        raise StoreError(f"{url}: not a readable Parquet file ({error}); restore it, or index again") from error
    pa.default_memory_pool().release_unused()  # of 100,000 shards it would keep 30 MB
    first, shards = np.unique(parts, return_index=True)[1], np.bincount(parts)
    return Dataset(
        version=version,
        digest=hashlib.sha256(data).hexdigest(),
        urls=urls,
        sizes=sizes,
        fingerprints=fingerprints,
        counts=counts,
        parts=tuple(
            Part(number, int(start), int(length), int(counts[start : start + length].sum()), index_files[start])
            for number, (start, length) in enumerate(zip(first, shards, strict=True))
        ),
    )


def _strings(file: pq.ParquetFile, column: str) -> tuple[str, ...]:
    return tuple(file.read(columns=[column], use_threads=False)[column].to_pylist())


def _numbers(file: pq.ParquetFile, column: str) -> npt.NDArray[np.int64]:
    numbers: npt.NDArray[np.int64] = file.read(columns=[column], use_threads=False)[column].to_numpy().copy()
    return numbers


def require_distinct_names(dataset: Dataset, shards_at: str) -> None:
    """Refuse `shards_at` when two shards share a base name, by which they would be found there.

    Raises:
        UsageError: names the base name.
    """
    names = [url.rsplit("/", 1)[-1] for url in dataset.urls]
    twice, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UsageError(
            f"shards_at={shards_at!r} finds shards by their base names, and several of this dataset are named "
            f"{twice!r}; read them where they were indexed, or index the copies as a dataset of their own"
        )
