"""The source of a `SelectedDataset`'s pipeline: what is read, which part of it is this process's, and iterations of it.

A `Source` is shared by all copies of a dataset in a process; each iteration is a `Pass`, whose split is fixed when it
begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.utils.data import get_worker_info
from webdataset.utils import PipelineStage

from dynams_stream.content import Content, find_content, read_content
from dynams_stream.errors import DynamsError, StateError, StoreError
from dynams_stream.iteration import Pass
from dynams_stream.order import default_lanes, rank_length, window_length
from dynams_stream.own_reader import OwnReader
from dynams_stream.progress import Control, Place
from dynams_stream.reading import Sample, SampleReader
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.sample_cache import SampleCache
from dynams_stream.stats import Counters
from dynams_stream.store import Store
from dynams_stream.uses import UseMarker

logger = logging.getLogger(__name__)


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
        self._uses = UseMarker(store)
        self._reader = OwnReader(store, remote=options.remote, cache=options.cache, count=self.counters.add)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; open files and tables are made anew there."""
        self.split()
        return self.__dict__ | {"newest": None, "resumed": None, "_content": None, "reported": set()}

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
            return find_content(self.store, which)
        found: Any = None
        if rank == 0:
            try:
                found = find_content(self.store, which)
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

    def content(self, place: Place) -> Content:
        """The dataset and selection of a place, kept until another is asked for."""
        known = self._content
        if known is None or (known.round, known.version) != (place.round, place.version):
            self._content = known = read_content(self.store, place.round, place.version, known)
        return known

    def reader(self, content: Content) -> SampleReader:
        """This process's reader of the dataset."""
        return self._reader.of(content.dataset)

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
        return place.lanes or default_lanes(self.content(place).selection.total, place.window or None)

    def order_window(self, place: Place) -> int:
        """How many items of a lane are shuffled together at `place`."""
        if not self.options.shuffle:
            return 1
        return place.window or window_length(self.content(place).selection.total, self.order_lanes(place))

    def tell(self, place: Place) -> None:
        """Make `place` what the next iterations read, here and in the workers."""
        content = self.content(place)  # here already: errors show up here, forked workers inherit it
        self.control.publish(place._replace(check=content.check))

    def mark_use(self, place: Place) -> None:
        """Let `dynams gc` know that the round of `place` is needed; rank 0 does so for all."""
        worker = get_worker_info()
        if self.split()[0] == 0 and (worker is None or worker.id == 0):
            self._uses.mark(place.round, place.version)

    # ---- iterations --------------------------------------------------------------------------------------------------

    def begin(self, refusal: str | None = None) -> Pass:
        """Begin an iteration: from here on its epoch, round and split are fixed.

        Args:
            refusal: why no state can be given of it, if so.
        """
        place, yielded = self.control.begin(), 0
        if self.resumed is not None:
            told, (place, yielded), self.resumed = place, self.resumed, None
            place = place._replace(serial=told.serial)
            self.control.mark_begun(place)
            self.warn_of_other_epoch(told, place)
        self.newest = Pass(self, place, yielded, refusal)
        self.mark_use(place)
        return self.newest

    @staticmethod
    def warn_of_other_epoch(told: Place, resumed: Place) -> None:
        """Say so when a state goes on with another epoch than the one that set_epoch chose."""
        if told.chosen and told.epoch != resumed.epoch:
            logger.warning(
                "set_epoch chose epoch %d, but the state that was loaded since goes on with epoch %d from sample %d",
                told.epoch,
                resumed.epoch,
                resumed.start,
            )
