"""The source of a `SelectedDataset`'s pipeline: one iteration of this process's share of an epoch.

    place ──► content (dataset, selection) ──► order ──► positions of this rank and worker ──► records ──► samples

A `Source` is shared by all copies of a dataset in a process; each iteration is a `Pass`, whose split is fixed when it
begins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import get_worker_info
from webdataset.utils import PipelineStage

from dynams_stream.errors import DynamsError, RoundNotFoundError, SampleError, ShardError, StoreError
from dynams_stream.order import (
    EpochOrder,
    default_lanes,
    rank_length,
    rank_positions,
    substitute,
    worker_length,
    worker_samples,
)
from dynams_stream.progress import EVERYTHING, Control, Place
from dynams_stream.reading import Chunk, Sample, SampleReader
from dynams_stream.reading import Place as SamplePlace
from dynams_stream.selection import Selection
from dynams_stream.store import Dataset, Store

logger = logging.getLogger(__name__)

_FIRST_CHUNK: Final = 128  # small, for an early first batch
_CHUNK: Final = 2048
_CHUNK_LANES: Final = 16  # a chunk takes about this many samples of each lane, so that looking up a shard pays


@dataclass(frozen=True)
class Options:
    """What the user asked for; the meaning of each is in `SelectedDataset`."""

    batch_size: int | None
    shuffle: bool
    seed: int
    lanes: int | None
    tail: str
    prepare: Callable[[Sample], Any] | None
    on_error: str
    max_errors: int


@dataclass(frozen=True, eq=False)
class Content:
    """The dataset version and the selection that a place names."""

    round: int
    version: int
    dataset: Dataset
    selection: Selection


class Source(PipelineStage):  # type: ignore[misc]
    """First stage of the pipeline: yields this process's samples."""

    def __init__(self, store: Store, options: Options, split: tuple[int, int] | None):
        self.store = store
        self.options = options
        self.control = Control()
        self.newest: Pass | None = None
        self.resumed: tuple[Place, int] | None = None  # in a worker: the place, and how many samples it had yielded
        self._given_split = split is not None
        self._split = split or (0, 1)
        self._content: Content | None = None
        self._reader: SampleReader | None = None
        self._reader_of: tuple[int, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; open files and tables are made anew there."""
        self.split()
        left_out: dict[str, Any] = {
            "newest": None,
            "resumed": None,
            "_content": None,
            "_reader": None,
            "_reader_of": None,
        }
        return self.__dict__ | left_out

    def run(self) -> Iterator[Sample]:
        """Begin an iteration, as webdataset's pipelines ask for it."""
        return iter(self.begin())

    def close(self) -> None:
        """Give open files back."""
        if self._reader is not None:
            self._reader.close()

    # ---- what to read ------------------------------------------------------------------------------------------------

    def split(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        if not self._given_split and dist.is_available() and dist.is_initialized():
            self._split = (dist.get_rank(), dist.get_world_size())
        return self._split

    def resolve(self, which: int | str | None) -> tuple[int, int]:
        """The round and the dataset version that `which` means now; under `torch.distributed` rank 0 decides for all.

        Ranks that were given by hand decide for themselves: they need not be all of the process group.

        Raises:
            RoundNotFoundError, NotIndexedError: when there is none.
        """
        _, ranks = self.split()
        if self._given_split or ranks == 1 or isinstance(which, int):
            return self._look_up(which)
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                box = [self._look_up(which)]
            except Exception as error:  # noqa: BLE001 (the other ranks wait: whatever it is, they have to hear of it)
                box = [error if isinstance(error, DynamsError) else StoreError(f"{self.store.url}: {error!r}")]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], Exception):
            raise box[0]
        number, version = box[0]
        return number, version

    def _look_up(self, which: int | str | None) -> tuple[int, int]:
        if which is not None:
            try:
                found = self.store.round(which)
                return found.number, int(found.manifest["dataset"]["version"])
            except RoundNotFoundError:
                if which != "latest":
                    raise
        versions = self.store.dataset_versions()
        return EVERYTHING, versions[-1] if versions else self.store.dataset().version

    def content(self, place: Place) -> Content:
        """The dataset and selection of a place, kept until another is asked for."""
        known = self._content
        if known is None or (known.round, known.version) != (place.round, place.version):
            self._content = known = self._load(place, known)
        return known

    def _load(self, place: Place, known: Content | None) -> Content:
        if place.round == EVERYTHING:
            dataset = known.dataset if known and known.version == place.version else self.store.dataset(place.version)
            selection = Selection.everything(dataset.counts, dataset.digest)
            return Content(EVERYTHING, place.version, dataset, selection)
        found = self.store.round(place.round)
        recorded = found.manifest["dataset"]
        if known and (known.dataset.version, known.dataset.digest) == (recorded["version"], recorded["digest"]):
            dataset = known.dataset
        else:
            dataset = found.dataset()
        selection = found.selection()
        if len(selection.counts) != len(dataset.counts):
            raise StoreError(
                f"{self.store.url}: round {place.round} selects from {len(selection.counts)} shards, dataset version "
                f"{dataset.version} has {len(dataset.counts)}; select again"
            )
        return Content(place.round, place.version, dataset, selection)

    def reader(self, content: Content) -> SampleReader:
        """This process's reader of the dataset; open files are never shared through a fork."""
        owner = (os.getpid(), content.dataset.digest)
        if self._reader is None or self._reader_of != owner:
            if self._reader is not None:
                self._reader.close()
            self._reader, self._reader_of = SampleReader(self.store, content.dataset), owner
        return self._reader

    def length(self) -> int:
        """How many samples this rank yields in the current epoch, from its start."""
        rank, ranks = self.split()
        return rank_length(self.content(self.control.place).selection.total, ranks, rank, self.options.tail)

    def left(self, place: Place) -> tuple[int, int, int]:
        """Selected samples of `place`, the most of them that any rank yields from its start on, and how many ranks."""
        _, ranks = self.split()
        total = self.content(place).selection.total
        return total, rank_length(total - place.start, ranks, 0, self.options.tail), ranks

    def order_lanes(self, place: Place) -> int:
        """The number of lanes in use at `place`."""
        if not self.options.shuffle:
            return 1
        return place.lanes or default_lanes(self.content(place).selection.total)

    # ---- iterations --------------------------------------------------------------------------------------------------

    def begin(self, refusal: str | None = None) -> Pass:
        """Begin an iteration: from here on its epoch, round and split are fixed.

        Args:
            refusal: why no state can be given of it, if so.
        """
        place, yielded = self.control.begin(), 0
        if self.resumed is not None:
            told, (place, yielded), self.resumed = place, self.resumed, None
            self.control.mark_begun(place._replace(serial=told.serial))
            warn_of_other_epoch(told, place)
        self.newest = Pass(self, place, yielded, refusal)
        return self.newest


class Pass:
    """One iteration of this process's share.

    Args:
        source: whose iteration it is.
        place: epoch, round and start.
        yielded: how many of its own samples from `start` on it has yielded before (a resumed worker).
        refusal: why no state can be given, if so.

    Attributes:
        yielded: how many of its own samples it has yielded since `place.start`.
        own_length: how many there are.
    """

    def __init__(self, source: Source, place: Place, yielded: int, refusal: str | None):
        self.source, self.place, self.yielded, self.refusal = source, place, yielded, refusal
        self.options = source.options
        self.content = source.content(place)
        self.rank, self.ranks = source.split()
        worker = get_worker_info()
        self.worker, self.workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.total = self.content.selection.total
        self.order = EpochOrder(
            self.content.selection.counts,
            seed=self.options.seed,
            epoch=place.epoch,
            lanes=place.lanes or None,
            shuffle=self.options.shuffle,
        )
        self.rank_length = rank_length(self.total - place.start, self.ranks, self.rank, self.options.tail)
        self.own_length = worker_length(self.rank_length, self.worker, self.workers, self.options.batch_size)
        self.errors = 0
        self._reported: set[tuple[int, int]] = set()
        self._chunk_start = 0
        self._chunk: Chunk | None = None

    def __iter__(self) -> Iterator[Any]:
        reader = self.source.reader(self.content)
        prepare, read = self.options.prepare, reader.read
        size, largest = _FIRST_CHUNK, max(_CHUNK, _CHUNK_LANES * self.order.lanes)
        while self.yielded < self.own_length:
            self._chunk_start = self.yielded
            positions, padded = self._positions(self.yielded, min(self.yielded + size, self.own_length))
            chunk = self._chunk = self._look_up(reader, positions, padded)
            extras, bounds = chunk.extras, iter(chunk.bounds)
            for place in zip(*chunk.columns, strict=True):
                try:
                    sample: Any = read(place, bounds)
                    if extras:
                        sample.update(extras.get(self.yielded - self._chunk_start, {}))
                    if prepare is not None:
                        sample = prepare(sample)
                except Exception as error:  # noqa: BLE001 (raised as a typed error there, or skipped and counted)
                    number = self.yielded - self._chunk_start
                    bounds = chunk.bounds_from(number + 1)
                    failed = chunk.place(number)
                    sample = self._stand_in(error, failed, reader, int(positions[number]), padded[number : number + 1])
                self.yielded += 1
                yield sample
            size = min(4 * size, largest)

    def _positions(self, first: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        samples = worker_samples(first, stop, self.worker, self.workers, self.options.batch_size)
        return rank_positions(samples, self.total, self.ranks, self.rank, self.place.start)

    def _look_up(self, reader: SampleReader, positions: npt.NDArray[np.int64], padded: npt.NDArray[np.bool_]) -> Chunk:
        marks = padded if self.options.tail == "pad" else None
        return reader.look_up(*self.order.locate(positions), self.content.selection, marks)

    # ---- trouble -----------------------------------------------------------------------------------------------------

    def _stand_in(
        self, error: Exception, failed: SamplePlace, reader: SampleReader, position: int, padded: npt.NDArray[np.bool_]
    ) -> Any:
        """The sample that takes the place of one that failed (`order.substitute`), when skipping is allowed."""
        for attempt in range(1, self.total + 1):
            named = name_error(error, failed)
            if self.options.on_error == "raise":
                raise named from error
            self.errors += 1
            if self.errors > self.options.max_errors:
                message = f"{named} (error {self.errors} of this iteration, max_errors={self.options.max_errors})"
                raise SampleError(message, shard=named.shard, row=named.row, key=named.key) from error
            if (failed.shared.shard, failed.row) not in self._reported:
                self._reported.add((failed.shared.shard, failed.row))
                logger.warning("skipped (%d of at most %d): %s", self.errors, self.options.max_errors, named)
            other = np.array([substitute(position, attempt, self.total)])
            chunk = self._look_up(reader, other, padded)
            failed = chunk.place(0)
            try:
                sample = {**reader.read(failed, iter(chunk.bounds)), **chunk.extras.get(0, {})}
                return sample if self.options.prepare is None else self.options.prepare(sample)
            except Exception as next_error:  # noqa: BLE001 (as in __iter__)
                error = next_error
        raise SampleError(f"none of the {self.total} selected samples can be read; the last error: {error}") from error

    def blame(self, error: Exception) -> DynamsError:
        """A typed error for a later stage's, with the sample that the stage was given last."""
        number = self.yielded - self._chunk_start - 1
        if self._chunk is None or number < 0:
            return SampleError(f"a stage of the pipeline failed before it got a sample: {_told(error)}")
        return name_error(error, self._chunk.place(number))


def warn_of_other_epoch(told: Place, resumed: Place) -> None:
    """Say so when a state goes on with another epoch than the one that set_epoch chose."""
    if told.chosen and told.epoch != resumed.epoch:
        logger.warning(
            "set_epoch chose epoch %d, but the state that was loaded since goes on with epoch %d from sample %d",
            told.epoch,
            resumed.epoch,
            resumed.start,
        )


def name_error(error: Exception, sample: SamplePlace) -> DynamsError:
    """A typed error that names shard, row and key; of the same kind when the shard itself is the trouble."""
    text = f"{sample.url}: row {sample.row}, key {sample.key!r}: {_told(error)}"
    kind: type[DynamsError] = type(error) if isinstance(error, ShardError) else SampleError
    if not isinstance(error, DynamsError):
        text += "; repair the sample, or skip such samples in `prepare` with on_error='skip'"
    return kind(text, shard=sample.url, row=sample.row, key=sample.key)


def _told(error: BaseException) -> str:
    if isinstance(error, DynamsError):
        return str(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if error.__cause__ is None else f"{text} ({_told(error.__cause__)})"
