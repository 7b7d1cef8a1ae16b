"""What the main process tells its workers: the place that the next iteration begins at.

`set_epoch` and `load_state_dict` publish a `Place`. A worker that has just been started inherits it (through fork, or
pickled), so that it cannot see a later one; a persistent worker, from its second iteration on, reads it from a small
tensor in shared memory. A loaded position holds for one iteration only: the first iteration to begin claims it.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

import torch
from torch.utils.data import get_worker_info

from dynams_stream.errors import StateError

EVERYTHING: Final = 0
"""The round number that stands for no round: all samples of the dataset."""


class Place(NamedTuple):
    """What the next iteration reads, as plain integers.

    Attributes:
        serial: raised each time a place is published.
        epoch: 0, 1, …
        round: number of the round, or `EVERYTHING`.
        version: the dataset version.
        lanes, window: number of lanes, and how many items of each are shuffled together; 0 for the defaults.
        loaded: 1 when it comes from a state, and `start` and the round are to be kept until an iteration has begun.
        start: global position to start at.
        steps: batches that each rank had consumed before `start`.
        chosen: 1 when set_epoch chose the epoch.
        check: digest of what the main process read of the round; a worker has to read the same.
    """

    serial: int = 0
    epoch: int = 0
    round: int = EVERYTHING
    version: int = 0
    lanes: int = 0
    window: int = 0
    loaded: int = 0
    start: int = 0
    steps: int = 0
    chosen: int = 0
    check: int = 0

    def from_the_beginning(self) -> Place:
        """The same epoch from its first sample on."""
        return self._replace(loaded=0, start=0, steps=0)


class Begun(NamedTuple):
    """The newest iteration that began: in workers or in the main process, and where (workers may resume elsewhere)."""

    in_workers: bool
    place: Place


_FIELDS: Final = len(Place._fields)
_WRITES: Final = 0  # odd while a place is being written
_PLACE: Final = slice(1, 1 + _FIELDS)
_CLAIM: Final = slice(_PLACE.stop, _PLACE.stop + 2)  # serial and iteration that claimed a loaded position
_BEGUN: Final = slice(_CLAIM.stop, _CLAIM.stop + 1 + _FIELDS)
_DROPPED: Final = _BEGUN.stop  # serial of the newest place whose iterations have dropped samples
_MOST_WORKERS: Final = 1024
_SLOTS: Final = _DROPPED + 1  # for each worker id, the serial whose position it has taken
_SKIPS: Final = _SLOTS + _MOST_WORKERS  # for each worker id, the iteration in which it has skipped samples
_SKIPPED: Final = _SKIPS + _MOST_WORKERS  # and how many
_ALL: Final = _SKIPPED + _MOST_WORKERS
_MAIN: Final = -1


class Control:
    """The place, shared by the main process, its workers and all copies of a dataset in them.

    A copy made in any other way (pickle, deepcopy, the processes of `torch.multiprocessing.spawn`) has its own.
    """

    def __init__(self) -> None:
        self.place = Place()
        self._shared = _shared(torch.full((_ALL,), -1, dtype=torch.int64))
        self._shared[: _CLAIM.start] = 0
        self._owner = os.getpid()
        self._began_in = 0  # process in which this copy began an iteration, as a worker
        self._iterations = 0  # how many iterations this worker has begun

    def publish(self, place: Place) -> None:
        """Make `place` what the next iterations read, here and in the workers."""
        self._own()
        self.place = place._replace(serial=self.place.serial + 1)
        self._shared[_WRITES] += 1
        self._shared[_PLACE] = torch.tensor(self.place, dtype=torch.int64)
        self._shared[_WRITES] += 1

    def begin(self) -> Place:
        """The place of an iteration that begins now in this process: from the loaded position if that is still free."""
        self._own()
        worker = get_worker_info()
        if worker is None:
            place, iteration, slot = self.place, _MAIN, 0
        else:
            inherited = self._began_in != os.getpid()
            self._began_in = os.getpid()
            if not inherited and not _is_shared(self._shared):
                raise StateError(
                    "this worker has a copy of the dataset that set_epoch does not reach, and would stream its first "
                    "epoch again: give the DataLoader the dataset itself, or persistent_workers=False"
                )
            place = self.place if inherited else self._read()
            iteration, slot = worker.seed - worker.id, worker.id % _MOST_WORKERS
            self._iterations += 1
        if place.loaded and not self._claim(place.serial, iteration, slot):
            place = place.from_the_beginning()
        self.mark_begun(place)
        return place

    def mark_begun(self, place: Place) -> None:
        """Note for the main process that an iteration has begun at `place`."""
        self._shared[_BEGUN] = torch.tensor([int(get_worker_info() is not None), *place])

    def begun(self) -> Begun | None:
        """The newest iteration of the current place, if one has begun."""
        self._own()
        in_workers, *place = self._shared[_BEGUN].tolist()
        begun = Begun(bool(in_workers), Place(*place))
        return begun if begun.place.serial == self.place.serial else None

    def note_dropped(self, place: Place) -> None:
        """Note that a stage of the pipeline has dropped samples of an iteration that began at `place`."""
        self._shared[_DROPPED] = place.serial

    def has_dropped(self) -> bool:
        """Whether a stage has dropped samples of the current place, in any process."""
        self._own()
        return int(self._shared[_DROPPED]) == self.place.serial

    def count_skip(self, skipped: int) -> int:
        """Note that this process has skipped `skipped` samples in its iteration.

        Returns:
            How many all workers of the iteration have skipped.
        """
        worker = get_worker_info()
        if worker is None:
            return skipped
        # persistent workers keep their seed, and all begin equally many iterations
        iteration, slot = hash((worker.seed - worker.id, self._iterations)), worker.id % _MOST_WORKERS
        self._shared[_SKIPPED + slot] = skipped
        self._shared[_SKIPS + slot] = iteration
        same = self._shared[_SKIPS:_SKIPPED] == iteration
        return int(self._shared[_SKIPPED:][same].sum())

    def holds_position(self) -> bool:
        """Whether a position was loaded that no iteration has claimed yet."""
        self._own()
        return bool(self.place.loaded) and int(self._shared[_CLAIM][0]) != self.place.serial

    def _claim(self, serial: int, iteration: int, slot: int) -> bool:
        """Whether this worker may start at the position loaded under `serial`.

        All workers of one DataLoader iteration share their base seed, which tells iterations of fresh workers apart;
        the slot of each worker id tells when persistent workers, or reseeded ones, come a second time.
        """
        claimed, by = self._shared[_CLAIM].tolist()
        if claimed != serial:
            self._shared[_CLAIM][1] = iteration
            self._shared[_CLAIM][0] = serial
        elif by != iteration:
            return False
        if int(self._shared[_SLOTS + slot]) == serial:
            return False
        self._shared[_SLOTS + slot] = serial
        return True

    def _read(self) -> Place:
        while True:
            before = int(self._shared[_WRITES])
            place = Place(*self._shared[_PLACE].tolist())
            if before % 2 == 0 and int(self._shared[_WRITES]) == before:
                return place

    def _own(self) -> None:
        """Take memory of one's own in a process that is not a worker of the one that made this copy."""
        if self._owner != os.getpid() and get_worker_info() is None:
            self._shared = _shared(self._shared.clone())
            self._owner = os.getpid()


def _is_shared(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_shared())  # type: ignore[no-untyped-call]


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.share_memory_()  # type: ignore[no-untyped-call, no-any-return]
