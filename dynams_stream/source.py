"""The source of a `SelectedDataset`'s pipeline: one iteration of this process's share of an epoch.

    place ──► content (dataset, selection) ──► order ──► positions of this rank and worker ──► records ──► samples

A `Source` is shared by all copies of a dataset in a process; each iteration is a `Pass`, whose split is fixed when it
begins.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import get_worker_info
from webdataset.utils import PipelineStage

from dynams_stream.dataset import Dataset
from dynams_stream.errors import DynamsError, RoundNotFoundError, SampleError, ShardError, StateError, StoreError
from dynams_stream.order import (
    EpochOrder,
    default_lanes,
    rank_length,
    rank_positions,
    substitute,
    window_length,
    worker_length,
    worker_samples,
)
from dynams_stream.progress import EVERYTHING, Control, Place
from dynams_stream.reading import Chunk, Sample, SampleReader
from dynams_stream.reading import Place as SamplePlace
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.sample_cache import SampleCache
from dynams_stream.selection import Selection
from dynams_stream.stats import Counters
from dynams_stream.store import Store

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]

_FIRST_CHUNK: Final = 128  # small, for an early first batch
_CHUNK_LANES: Final = 16  # a chunk takes about this many samples of each lane, so that looking up a shard pays
_NOTHING: Final[Sample] = {}
_INHERITED: Final[list[SampleReader]] = []  # readers of a parent: a forked child may neither use nor take them down


@dataclass(frozen=True)
class Options:
    """What the user asked for; the meaning of each is in `SelectedDataset`."""

    batch_size: int | None
    shuffle: bool
    seed: int
    lanes: int | None
    window: int | None
    tail: str
    prepare: Callable[[Sample], Any] | None
    on_error: str
    max_errors: int
    remote: RemoteOptions
    cache: SampleCache | None


@dataclass(frozen=True, eq=False)
class Content:
    """The dataset version and the selection that a place names."""

    round: int
    version: int
    dataset: Dataset
    selection: Selection

    @property
    def check(self) -> int:
        """A number that stands for the dataset and the selection; equal in all processes that read the same."""
        digest = hashlib.sha256(f"{self.dataset.digest} {self.selection.digest}".encode()).digest()
        return int.from_bytes(digest[:7])


class Source(PipelineStage):  # type: ignore[misc]
    """First stage of the pipeline: yields this process's samples."""

    def __init__(self, store: Store, options: Options, split: tuple[int, int] | None):
        self.store = store
        self.options = options
        self.control = Control()
        self.counters = Counters()
        self.reported: set[tuple[int, int]] = set()  # (shard, row) of what was skipped and logged in this process
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
            "reported": set(),
        }
        return self.__dict__ | left_out

    def run(self) -> Iterator[Sample]:
        """Begin an iteration, as webdataset's pipelines ask for it."""
        return iter(self.begin())

    # ---- what to read ------------------------------------------------------------------------------------------------

    def split(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        if not self._given_split and dist.is_available() and dist.is_initialized():
            self._split = (dist.get_rank(), dist.get_world_size())
        return self._split

    def resolve(self, which: int | str | None, asked: Mapping[str, Any]) -> tuple[int, int]:
        """The round and the dataset version that `which` means now; under `torch.distributed` rank 0 looks for all.

        Ranks that were given by hand decide for themselves: they need not be all of the process group.

        Args:
            which: a round's number, "latest", or None for everything.
            asked: what all ranks have to ask for alike.

        Raises:
            RoundNotFoundError, NotIndexedError: when there is none.
            StateError: when the ranks ask for different things.
        """
        rank, ranks = self.split()
        if self._given_split or ranks == 1:
            return self._look_up(which)
        found: Any = None
        if rank == 0:
            try:
                found = self._look_up(which)
            except Exception as error:  # noqa: BLE001 (the other ranks wait: whatever it is, they have to hear of it)
                found = error if isinstance(error, DynamsError) else StoreError(f"{self.store.url}: {error!r}")
        answers: list[Any] = [None] * ranks
        dist.all_gather_object(answers, (dict(asked), found))
        first, found = answers[0]
        for other, (theirs, _) in enumerate(answers):
            for name, value in theirs.items():
                if value != first[name]:
                    raise StateError(
                        f"rank {other} was given {name} = {value!r}, rank 0 {first[name]!r}; give all ranks the same"
                    )
        if isinstance(found, Exception):
            raise found
        number, version = found
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
        """This process's reader of the dataset; files and connections are never shared through a fork."""
        owner = (os.getpid(), content.dataset.digest)
        if self._reader is None or self._reader_of != owner:
            if self._reader is not None and self._reader_of is not None:
                if self._reader_of[0] == os.getpid():
                    self._reader.close()
                else:
                    _INHERITED.append(self._reader)
            self._reader, self._reader_of = self.new_reader(content.dataset), owner
        return self._reader

    def new_reader(self, dataset: Dataset) -> SampleReader:
        """A reader of `dataset` for this process."""
        options = self.options
        return SampleReader(self.store, dataset, remote=options.remote, cache=options.cache, count=self.counters.add)

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

    def order_window(self, place: Place) -> int:
        """How many items of a lane are shuffled together at `place`."""
        if not self.options.shuffle:
            return 1
        return place.window or window_length(self.content(place).selection.total, self.order_lanes(place))

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

    Raises:
        StateError: when this worker reads another selection than the main process.
    """

    def __init__(self, source: Source, place: Place, yielded: int, refusal: str | None):
        self.source, self.place, self.yielded, self.refusal = source, place, yielded, refusal
        self.options = source.options
        self.content = source.content(place)
        if self.content.check != place.check:
            raise StateError(
                f"{source.store.url}: round {place.round} is not here what it is in the main process; "
                f"let all processes see the same store, and never change a published round"
            )
        self.rank, self.ranks = source.split()
        worker = get_worker_info()
        self.worker, self.workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.total = self.content.selection.total
        self.order = EpochOrder(
            self.content.selection.counts,
            seed=self.options.seed,
            epoch=place.epoch,
            lanes=place.lanes or None,
            window=place.window or None,
            shuffle=self.options.shuffle,
        )
        self.rank_length = rank_length(self.total - place.start, self.ranks, self.rank, self.options.tail)
        self.own_length = worker_length(self.rank_length, self.worker, self.workers, self.options.batch_size)
        self.errors = 0
        self._chunk_start = 0
        self._chunk: Chunk | None = None

    def __iter__(self) -> Iterator[Any]:
        reader = self.source.reader(self.content)
        if self.options.cache is not None and reader.fetches:
            self.options.cache.begin(self.content.selection.digest)
        prepare, chunks = self.options.prepare, self._chunks(reader)
        try:
            for chunk, positions in chunks:
                self._chunk, extras, number = chunk, chunk.extras, 0
                first = self._chunk_start = self.yielded
                try:
                    while number < len(chunk):
                        try:
                            for sample in reader.samples(chunk, number):
                                if extras:
                                    sample.update(extras.get(self.yielded - first, _NOTHING))
                                if prepare is not None:
                                    sample = prepare(sample)
                                self.yielded += 1
                                yield sample
                        except Exception as error:  # noqa: BLE001 (raised as a typed error there, or skipped and counted)
                            number = self.yielded - first
                            sample = self._stand_in(error, chunk, number, int(positions[number]), reader)
                            self.yielded += 1
                            yield sample
                        number = self.yielded - first
                finally:
                    reader.account(chunk, self.yielded - first)
                    chunk.forget()
        finally:
            chunks.close()

    # ---- chunks ------------------------------------------------------------------------------------------------------

    def _chunks(self, reader: SampleReader) -> Generator[tuple[Chunk, Integers]]:
        """This process's samples in order, and their positions; the next chunk is under way when one is given."""
        ahead: deque[tuple[Chunk, Integers]] = deque()
        try:
            for first, stop, shared in self._cuts(reader):
                ahead.append(self._shared(reader, first, stop) if shared else self._own(reader, first, stop))
                while len(ahead) > int(reader.fetches):
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        finally:
            for chunk, _ in ahead:
                chunk.forget()

    def _cuts(self, reader: SampleReader) -> Iterator[tuple[int, int, bool]]:
        """First and last + 1 of the process's own samples in each chunk, and whether workers fetch it together."""
        largest = reader.chunk_length(self.order.lanes * _CHUNK_LANES)
        first, size = self.yielded, min(_FIRST_CHUNK, largest)
        together = self.workers > 1 and reader.shares
        if together:  # the same cuts in all workers, however much each has yielded before
            batch = self.options.batch_size or 1
            size = largest = max(1, largest // (batch * self.workers)) * batch
        while first < self.own_length:
            stop = min(first - first % size + size if together else first + size, self.own_length)
            yield first, stop, together and first % size == 0
            first, size = stop, min(4 * size, largest)

    def _own(self, reader: SampleReader, first: int, stop: int) -> tuple[Chunk, Integers]:
        samples = worker_samples(first, stop, self.worker, self.workers, self.options.batch_size)
        positions, padded = self._positions(samples)
        return self._look_up(reader, positions, padded), positions

    def _shared(self, reader: SampleReader, first: int, stop: int) -> tuple[Chunk, Integers]:
        """As `_own`, planned over what all workers of the rank read meanwhile."""
        batch = self.options.batch_size or 1
        samples = np.arange(first * self.workers, min(stop * self.workers, self.rank_length), dtype=np.int64)
        workers = samples // batch % self.workers
        positions, padded = self._positions(samples)
        chunk = self._look_up(reader, positions, padded, workers)
        return chunk, positions[workers == self.worker]

    def _positions(self, samples: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
        return rank_positions(samples, self.total, self.ranks, self.rank, self.place.start)

    def _look_up(
        self,
        reader: SampleReader,
        positions: Integers,
        padded: npt.NDArray[np.bool_],
        workers: Integers | None = None,
    ) -> Chunk:
        shards, places = self.order.locate(positions)
        marks = padded if self.options.tail == "pad" else None
        selection = self.content.selection
        return reader.look_up(shards, places, selection, padded=marks, workers=workers, worker=self.worker)

    # ---- trouble -----------------------------------------------------------------------------------------------------

    def _stand_in(self, error: Exception, chunk: Chunk, number: int, position: int, reader: SampleReader) -> Any:
        """The sample that takes the place of one that failed (`order.substitute`), when skipping is allowed."""
        failed = chunk.place(number)
        padded = np.array(["__pad__" in chunk.extras.get(number, _NOTHING)])
        for attempt in range(1, self.total + 1):
            self._skip(error, failed)
            other = self._look_up(reader, np.array([substitute(position, attempt, self.total)]), padded)
            failed = other.place(0)
            try:
                (sample,) = reader.samples(other)
                sample.update(other.extras.get(0, _NOTHING))
                return sample if self.options.prepare is None else self.options.prepare(sample)
            except Exception as next_error:  # noqa: BLE001 (as in _samples_of)
                error = next_error
            finally:
                other.forget()
        raise SampleError(f"none of the {self.total} selected samples can be read; the last error: {error}") from error

    def _skip(self, error: Exception, failed: SamplePlace) -> None:
        """Count and log a sample that is skipped, or raise when that is not allowed."""
        named = name_error(error, failed)
        if self.options.on_error == "raise":
            raise named from error
        self.errors += 1
        self.source.counters.add(skipped=1)
        skipped = self.source.control.count_skip(self.errors)
        if skipped > self.options.max_errors:
            message = f"{named} (error {skipped} of this iteration, max_errors={self.options.max_errors})"
            raise SampleError(message, shard=named.shard, row=named.row, key=named.key) from error
        if (failed.shared.shard, failed.row) not in self.source.reported:
            self.source.reported.add((failed.shared.shard, failed.row))
            logger.warning("skipped (%d of at most %d): %s", skipped, self.options.max_errors, named)

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
