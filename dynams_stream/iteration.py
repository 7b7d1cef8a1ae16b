"""One iteration of a process's share of an epoch: positions, chunks, samples, and what stands in for those that fail.

place ──► order ──► positions of this rank and worker ──► chunks, the next one under way ──► samples, prepared
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from dynams_stream.errors import DynamsError, SampleError, ShardError, StateError
from dynams_stream.order import EpochOrder, rank_length, rank_positions, substitute, worker_length, worker_samples
from dynams_stream.progress import Place
from dynams_stream.reading import Chunk, Sample, SampleReader
from dynams_stream.reading import Place as SamplePlace

if TYPE_CHECKING:
    from dynams_stream.source import Source

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]

_FIRST_CHUNK: Final = 256  # small, for an early first batch
_CHUNK_LANES: Final = 16  # a chunk takes about this many samples of each lane, so that looking up a shard pays
_NOTHING: Final[Sample] = {}


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
        self._planned = yielded  # how many of its own samples have been planned, or yielded before

    def __iter__(self) -> Iterator[Any]:
        reader = self.source.reader(self.content)
        if self.options.cache is not None and reader.fetches:
            self.options.cache.begin(self.content.selection.digest)
        prepare, chunks = self.options.prepare, self._chunks(reader)
        try:
            for chunk, positions in chunks:
                self.source.mark_use(self.place)  # an epoch may take longer than a mark holds
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
        """First and last + 1 of the process's own samples in each chunk, and whether workers fetch it together.

        Then they are those of a whole chunk, though some have been yielded already or are more than there are: all
        workers have to plan the same.
        """
        largest = reader.chunk_length(self.order.lanes * _CHUNK_LANES)
        batch = self.options.batch_size or 1
        first, size = self.yielded, min(max(batch, _FIRST_CHUNK), largest)
        together = self.workers > 1 and reader.shares
        if together:  # the same cuts in all workers, however much each has yielded before
            first, size = 0, max(1, largest // (batch * self.workers)) * batch
            largest = size
        while first < self.own_length:
            stop = first + size
            if reader.fetches:
                stop = self._end_of_windows(first, stop, batch)
            if not together:
                yield first, min(stop, self.own_length), False
            elif stop > self.yielded:
                yield first, stop, True
            first, size = stop, min(4 * size, largest)

    def _end_of_windows(self, first: int, stop: int, batch: int) -> int:
        """The last own sample + 1 before `stop` with which the windows of all lanes end, or `stop` if there is none.

        Two chunks that split a window would each fetch half of its samples, with gaps twice as large between them.
        """
        pool, share = self.order.lanes * self.order.window, self.ranks * self.workers
        end = (self.place.start + stop * share) // pool * pool - self.place.start
        own = end // share // batch * batch
        return own if own > first else stop

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
        yielded = max(0, self._planned - first)
        self._planned = stop
        chunk = self._look_up(reader, positions, padded, workers, yielded)
        return chunk, positions[workers == self.worker][yielded:]

    def _positions(self, samples: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
        return rank_positions(samples, self.total, self.ranks, self.rank, self.place.start)

    def _look_up(
        self,
        reader: SampleReader,
        positions: Integers,
        padded: npt.NDArray[np.bool_],
        workers: Integers | None = None,
        skip: int = 0,
    ) -> Chunk:
        shards, places = self.order.locate(positions)
        marks = padded if self.options.tail == "pad" else None
        selection = self.content.selection
        return reader.look_up(shards, places, selection, padded=marks, workers=workers, worker=self.worker, skip=skip)

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

    def note_dropped(self) -> None:
        """A later stage of the pipeline has dropped samples."""
        self.source.control.note_dropped(self.place)

    def blame(self, error: Exception) -> DynamsError:
        """A typed error for a later stage's, with the sample that the stage was given last."""
        number = self.yielded - self._chunk_start - 1
        if self._chunk is None or number < 0:
            return SampleError(f"a stage of the pipeline failed before it got a sample: {_told(error)}")
        return name_error(error, self._chunk.place(number))


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
