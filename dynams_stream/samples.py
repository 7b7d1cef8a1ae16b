"""SelectedSamples: the selected samples as a map-style dataset, for samplers of the user's own."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, get_worker_info

from dynams_stream.content import Content, find_content, read_content
from dynams_stream.iteration import name_error
from dynams_stream.order import EpochOrder
from dynams_stream.own_mutex import OwnMutex
from dynams_stream.own_reader import OwnReader
from dynams_stream.progress import EVERYTHING
from dynams_stream.reading import Chunk, SampleReader
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.sample_cache import SampleCache
from dynams_stream.stats import Counters, Stats
from dynams_stream.store import Store, round_number
from dynams_stream.uses import UseMarker


class SelectedSamples(Dataset[Any]):
    """The selected samples of one round by number, in (shard, row) order.

    Sample i is what `SelectedDataset(store, shuffle=False)` yields as its i-th: a dict equal to webdataset's, plus
    `__row__`, and `__weight__` when the selection has weights. Torch's DataLoader asks for whole batches
    (`__getitems__`), whose reads are planned together; Grain takes it as a source. It can be pickled, and read from
    several threads at once.

    A round never changes, so neither does this; make another one for another round.

    Args:
        store: a `Store`, or its path or URL.
        round: a round's number, "latest" (everything while there is none) or None for everything. "latest" is looked up
            now; ranks that should read the same had better name the round.
        prepare: called with each sample dict.
        remote: what reading from object stores may cost.
        cache: keeps samples of object stores on a disk of this machine.

    Attributes:
        round: the number of the round; None for everything.

    Raises:
        NotIndexedError, RoundNotFoundError: when the store lacks it.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        round: int | str | None = "latest",
        prepare: Callable[[dict[str, Any]], Any] | None = None,
        remote: RemoteOptions | None = None,
        cache: SampleCache | None = None,
    ):
        self._store = store if isinstance(store, Store) else Store(store)
        which = round if round is None or round == "latest" else round_number(round)
        number, self._version = find_content(self._store, which)
        self.round = None if number == EVERYTHING else number
        self._uses = UseMarker(self._store)
        self._mark_use()
        self._prepare = prepare
        self._cache = cache
        self._counters = Counters()
        self._reader = OwnReader(self._store, remote=remote, cache=cache, count=self._counters.add)
        self._mutex = OwnMutex()
        self._content: Content | None = None
        self._order: EpochOrder | None = None
        self._length = self._read_content().selection.total

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_content": None, "_order": None}

    def __repr__(self) -> str:
        what = "everything" if self.round is None else f"round {self.round}"
        return f"SelectedSamples({self._store.url!r}, {what}, {self._length} samples)"

    def __len__(self) -> int:
        """How many samples are selected."""
        return self._length

    def __getitem__(self, index: SupportsIndex) -> Any:
        """Sample number `index`; negative numbers count from the end.

        Raises:
            IndexError: when there is no such sample.
            SampleError: when it cannot be read or prepared; names shard, row and key.
            ShardMissingError, ShardChangedError, ShardUnreadableError: when the shard is the trouble.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Any]:
        """Several samples, in the order asked for; neighbours are read together where that is cheaper.

        Raises:
            IndexError, SampleError, ShardMissingError, ShardChangedError, ShardUnreadableError: as for one.
        """
        numbers = self._checked(indices)
        if not len(numbers):
            return []
        self._mark_use()
        with self._mutex.own():
            content = self._read_content()
            assert self._order is not None
            reader = self._reader.of(content.dataset)
            chunk = reader.look_up(*self._order.locate(numbers), content.selection)
            samples = self._read(chunk, reader) if reader.has_files else None
        if samples is None:  # waiting for an object store does not keep other threads from asking too
            samples = self._read(chunk, reader)
        if self._prepare is None:
            return samples
        return [self._prepared(chunk, number, sample) for number, sample in enumerate(samples)]

    def stats(self) -> Stats:
        """What has been read since this was made, by this process and its DataLoader workers together."""
        return self._counters.total()

    @property
    def _number(self) -> int:
        return EVERYTHING if self.round is None else self.round

    def _mark_use(self) -> None:
        """Let `dynams gc` know that the round is needed; one of a DataLoader's workers does so for all."""
        worker = get_worker_info()
        if worker is None or worker.id == 0:
            self._uses.mark(self._number, self._version)

    def _read_content(self) -> Content:
        if self._content is None:
            self._content = read_content(self._store, self._number, self._version)
            self._order = EpochOrder(self._content.selection.counts, shuffle=False)
            if self._cache is not None:
                self._cache.begin(self._content.selection.digest)
        return self._content

    def _checked(self, indices: Sequence[SupportsIndex]) -> npt.NDArray[np.int64]:
        numbers = np.array([operator.index(index) for index in indices], dtype=np.int64)
        wrong = np.flatnonzero((numbers < -self._length) | (numbers >= self._length))
        if len(wrong):
            allowed = f"allowed are {-self._length} to {self._length - 1}" if self._length else "nothing is selected"
            raise IndexError(f"index {numbers[wrong[0]]} is out of range; {allowed}")
        return np.where(numbers < 0, numbers + self._length, numbers)

    def _read(self, chunk: Chunk, reader: SampleReader) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = []
        try:
            for number, sample in enumerate(reader.samples(chunk)):
                sample.update(chunk.extras.get(number, {}))
                samples.append(sample)
        except Exception as error:
            raise name_error(error, chunk.place(len(samples))) from error
        finally:
            reader.account(chunk, len(samples))
            chunk.forget()
        return samples

    def _prepared(self, chunk: Chunk, number: int, sample: dict[str, Any]) -> Any:
        assert self._prepare is not None
        try:
            return self._prepare(sample)
        except Exception as error:
            raise name_error(error, chunk.place(number)) from error
