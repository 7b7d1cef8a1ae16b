"""Reads of shards that lie in files of this machine: open descriptors, positioned reads, and notice to a cold disk.

Samples come in a shuffled order, one short read at a time. From the page cache that is the fastest way: reading
neighbours together would only add a copy. From a disk it is the slowest, as each read waits for the one before it. So,
when the kernel says that the last chunk came from a disk, the next one's ranges are announced before they are read
(`posix_fadvise`): neighbours together, a whole shard where most of it is selected. The disk then works on many at once:
2 to 4 times as fast here (`benchmarks/cold.py`), at 0.7 µs for each range.
"""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from dynams_stream import ranges, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import ShardError, ShardUnreadableError
from dynams_stream.store import Store

Integers = npt.NDArray[np.int64]

_MOST_OPEN: Final = 1024
_ANNOUNCED_GAP: Final = 8 << 10  # bytes; a gap of two pages is not worth a notice of its own
_ANNOUNCED_BYTES: Final = 16 << 20


class LocalShards:
    """Open shards of one process, bounded in number.

    Args:
        store: knows where shards have moved.
        dataset: the shards.

    Attributes:
        descriptors: the open file of each shard; `open` gives the others.
    """

    def __init__(self, store: Store, dataset: Dataset):
        self._store = store
        self._dataset = dataset
        self.descriptors: dict[int, int] = {}
        self._readers: OrderedDict[int, storage.LocalReader] = OrderedDict()
        self._most_open = min(_MOST_OPEN, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        self._wanted: set[int] = set()
        self._disk_reads = _disk_reads()

    def open(self, shard: int) -> int:
        """The open file of a shard that is not open yet.

        Raises:
            ShardMissingError, ShardChangedError: when it is gone, or not what was indexed.
            ShardUnreadableError: when it may not be read.
        """
        while len(self._readers) >= self._most_open:
            self._close_one()
        while True:
            try:
                reader = self._store.open_shard(self._dataset.urls[shard], self._dataset.fingerprints[shard])
                break
            except ShardUnreadableError as error:  # others in this process may have all that it may open
                if getattr(error.__cause__, "errno", None) != errno.EMFILE or not self._readers:
                    raise
                self._close_one()
        assert isinstance(reader, storage.LocalReader)
        self._readers[shard] = reader
        self.descriptors[shard] = reader.descriptor
        return reader.descriptor

    def _close_one(self) -> None:
        # A chunk goes round its shards again and again: when they are too many, closing the newest keeps the rest.
        oldest = next(iter(self._readers))
        self._close(next(reversed(self._readers)) if oldest in self._wanted else oldest)

    def _close(self, shard: int) -> None:
        del self.descriptors[shard]
        self._readers.pop(shard).close()

    def pread(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard from `offset`.

        Raises:
            ShardChangedError: when there are fewer.
            ShardUnreadableError: when the disk fails.
        """
        if shard not in self.descriptors:
            self.open(shard)
        return self._readers[shard].pread(offset, size)

    def begin_chunk(self, shards: Integers, offsets: Integers, sizes: Integers) -> None:
        """Say what is read next.

        Args:
            shards, offsets, sizes: int64, shape (samples,): which bytes of which shards, in order.
        """
        distinct = np.unique(shards).tolist()
        self._wanted = set(distinct)
        for shard in distinct:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                if self._readers[shard].was_written():
                    self._close(shard)  # opening it again finds out whether it is still what was indexed
        before, self._disk_reads = self._disk_reads, _disk_reads()
        if self._disk_reads > before:
            self._announce(shards, offsets, sizes)

    def _announce(self, shards: Integers, offsets: Integers, sizes: Integers) -> None:
        planned = ranges.plan(shards, offsets, sizes, gap=_ANNOUNCED_GAP, longest=_ANNOUNCED_BYTES)
        for shard, start, stop in zip(
            planned.shards.tolist(), planned.starts.tolist(), planned.stops.tolist(), strict=True
        ):
            if shard not in self.descriptors and len(self._readers) < self._most_open:
                with suppress(ShardError):  # raised again with the first sample that needs it
                    self.open(shard)
            descriptor = self.descriptors.get(shard)
            if descriptor is not None:
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Give all files back; they are opened again when they are needed."""
        for shard in list(self._readers):
            self._close(shard)


def _disk_reads() -> int:
    """Blocks that this thread has read from disks so far; 0 where the system does not tell, or cannot be told."""
    if not hasattr(resource, "RUSAGE_THREAD") or not hasattr(os, "posix_fadvise"):
        return 0
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
