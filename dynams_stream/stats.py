"""What reading cost, counted per process in shared memory, so that the main process sees its workers' counts."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

from dynams_stream.own_mutex import OwnMutex

_MOST_WORKERS: Final = 1024
_SCALE: Final = 1e9  # seconds are kept as whole nanoseconds


@dataclass(frozen=True)
class Stats:
    """What a dataset has read since it was made, in this rank's main process and its workers.

    Attributes:
        samples: samples that were read, unreadable ones not among them.
        skipped: samples that could not be read or prepared, and were replaced.
        bytes_used: bytes of the samples that were read.
        bytes_read: bytes that were read or received for them, gaps between merged ranges included; what tries that
            failed had received is not.
        bytes_cached: bytes of samples that came from the local cache.
        requests: reads of local shards, or requests sent to an object store, retries included.
        retries: requests that were sent again.
        slow_downs: times that an object store asked for fewer requests.
        wait_seconds: seconds in which a sample was waited for while its bytes were under way.
    """

    samples: int = 0
    skipped: int = 0
    bytes_used: int = 0
    bytes_read: int = 0
    bytes_cached: int = 0
    requests: int = 0
    retries: int = 0
    slow_downs: int = 0
    wait_seconds: float = 0.0


_FIELDS: Final = tuple(field.name for field in fields(Stats))


class Counters:
    """The counts of this process and of its DataLoader workers; copies made by pickling begin with what they were."""

    def __init__(self) -> None:
        self._shared: torch.Tensor = _zeros()
        self._owner = os.getpid()
        self._mutex = OwnMutex()

    def add(self, **counts: float) -> None:
        """Add to this process's own counts, from any thread; names are those of `Stats`."""
        with self._mutex.own():
            row = self._row()
            for name, count in counts.items():
                row[_FIELDS.index(name)] += round(count * _SCALE) if name == "wait_seconds" else int(count)

    def total(self) -> Stats:
        """The counts of all processes together."""
        sums = dict(zip(_FIELDS, self._shared.sum(dim=0).tolist(), strict=True))
        return Stats(**sums | {"wait_seconds": sums["wait_seconds"] / _SCALE})

    def _row(self) -> npt.NDArray[np.int64]:
        worker = get_worker_info()
        if worker is None and self._owner != os.getpid():  # a forked process that is no worker counts for itself
            self._shared, self._owner = _zeros(), os.getpid()
        row: npt.NDArray[np.int64] = self._shared.numpy()[0 if worker is None else 1 + worker.id % _MOST_WORKERS]
        return row


def _zeros() -> torch.Tensor:
    """Made in shared memory; moving them there would take OpenMP's threads, which no forked process has."""
    shape = (1 + _MOST_WORKERS, len(_FIELDS))
    storage = torch.UntypedStorage._new_shared(8 * shape[0] * shape[1])  # type: ignore[no-untyped-call]
    zeros: torch.Tensor = torch.empty(0, dtype=torch.int64).set_(storage, 0, shape)  # type: ignore[call-overload]
    zeros.numpy()[:] = 0
    return zeros
