"""Runs the parts of a scoring job on a cluster.

every part ──► receipts
  a shard cannot be read ──► the part is run again, when the others are done, on another worker where there is one
      again it cannot     ──► the shard is bad: the part is run without it where that many may be bad, else it fails
  its worker died         ──► the part is run again, alone: Dask blames every part that the worker held
      died again          ──► the part fails
  anything else           ──► the job fails at once
SIGTERM ──► no new parts; those that run may finish, for `GRACE_SECONDS`
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType

from distributed import Client, Future, get_worker, wait
from distributed.scheduler import KilledWorker

from dynams_stream.errors import DynamsError, ScoringError, ShardError
from pipeline.in_flight import ended, in_flight
from pipeline.other_workers import FailedTries, Worker, workers_of
from pipeline.receipt import BadShard, Receipt
from pipeline.score_part import PartTask, score_part
from pipeline.stopping import Terminated

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
"""How long parts may go on after SIGTERM; most that send it wait 30 seconds before they kill."""
RETRY_SECONDS = 1.0
"""A pause before shards that could not be read are tried again: the second attempt is worth little at once."""
_MOST_NAMED = 50
"""Parts and shards that a message names."""


@dataclass(frozen=True)
class Unread:
    """A part that a worker could not score, since it could not read one of its shards.

    Attributes:
        error: what it met; its `shard` is the URL that was indexed.
        worker: which one.
        machine: the name of its host, for people.
    """

    error: ShardError
    worker: Worker
    machine: str

    @property
    def place(self) -> str:
        """Where it happened, in words."""
        return f"worker {self.worker.name} on {self.machine}"


def score_part_here(task: PartTask) -> Receipt | Unread:
    """The task of a cluster: `score_part`, whose errors about shards come back with the name of the worker."""
    try:
        return score_part(task)
    except ShardError as error:
        here = get_worker()
        return Unread(error, Worker(str(here.name), here.address), socket.gethostname())


class PartRuns:
    """The parts of a scoring job; iterated within `with`, it gives their receipts as they finish.

    Args:
        client: of the cluster.
        tasks: the parts.
        max_bad_shards: how many shards may be left out.

    Raises, while it is iterated:
        ScoringError: when parts could not be scored, after all others are done; when the cluster is lost, at once.
        DynamsError: of the step that failed otherwise, at once.
    """

    def __init__(self, client: Client, tasks: Sequence[PartTask], *, max_bad_shards: int = 0):
        self._client, self._tasks, self._max_bad_shards = client, tasks, max_bad_shards
        self._attempt = uuid.uuid4().hex[:8]
        self._submitted = 0
        self._running: dict[str, tuple[PartTask, Future]] = {}
        self._workers: list[Worker] = []
        self._only_on: dict[str, frozenset[str]] = {}
        self._failed_tries: defaultdict[int, FailedTries] = defaultdict(FailedTries)
        self._places: defaultdict[str, list[str]] = defaultdict(list)
        self._bad: set[str] = set()
        self._lost: list[str] = []

    def __enter__(self) -> PartRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Terminated):
            self._drain()

    def __iter__(self) -> Iterator[Receipt]:
        waiting: Sequence[PartTask] = self._tasks
        again: list[tuple[PartTask, Unread]] = []
        while waiting:
            died: list[PartTask] = []
            again = []
            for tasks, most in ((waiting, None), (died, 1)):  # the first fills the second
                for task, outcome in self._outcomes(tasks, most):
                    if isinstance(outcome, Receipt):
                        yield outcome
                    elif isinstance(outcome, Unread):
                        again.append((self._without_bad_shard(task, outcome), outcome))
                    elif not isinstance(outcome, KilledWorker):
                        raise _as_dynams_error(task, outcome)
                    elif tasks is died:
                        self._lost.append(_died_twice(task, outcome))
                    else:
                        died.append(task)
            if len(self._bad) > self._max_bad_shards:
                break
            waiting = [task for task, _ in again]
            if waiting:
                time.sleep(RETRY_SECONDS)
                self._workers = workers_of(self._client)
        self._require_all(again)

    def _outcomes(
        self, tasks: Iterable[PartTask], most: int | None
    ) -> Iterator[tuple[PartTask, Receipt | Unread | BaseException]]:
        """Each part with its receipt or what it failed with, as they end; at most so many at once."""
        for task, future in in_flight(self._client, iter(tasks), self._submit, most=most, stranded=self._is_stranded):
            self._running.pop(future.key)
            receipt, error = ended(self._client, future)
            yield task, receipt if error is None else error

    def _submit(self, task: PartTask) -> Future:
        self._submitted += 1
        key = f"score-{task.number:06d}-{task.part.number:06d}-{self._attempt}-{self._submitted}"
        only = [worker.address for worker in self._failed_tries[task.part.number].next_workers(self._workers)]
        future = self._client.submit(score_part_here, task, key=key, pure=False, workers=only or None)
        self._running[key] = task, future
        self._only_on[key] = frozenset(only)
        return future

    # ---- shards that a worker could not read -------------------------------------------------------------------------

    def _is_stranded(self, future: Future, addresses: Collection[str]) -> bool:
        """Whether none of the workers that may run it is there any more."""
        only = self._only_on[future.key]
        if not only or future.done() or not only.isdisjoint(addresses):
            return False
        self._running.pop(future.key)
        self._workers = workers_of(self._client)
        return True

    def _without_bad_shard(self, task: PartTask, unread: Unread) -> PartTask:
        """The part as it is to be tried next: without the shard when others could not read it either."""
        error, url = unread.error, str(unread.error.shard)
        if url not in task.urls or any(known.url == url for known in task.bad_shards):  # it would be tried for ever
            raise error
        if not any(unread.place in places for places in self._places.values()):
            logger.warning(f"{unread.place}: {error}; what fails there is tried again, elsewhere if it can be")
        self._places[url].append(unread.place)
        tries, position = self._failed_tries[task.part.number], task.urls.index(url)
        tries.add(position, unread.worker)
        if not tries.is_bad(position, self._workers):
            return task
        self._bad.add(url)
        tries.leave_out(position)
        bad = tuple(
            BadShard(shard, url, str(error)) for shard, own in enumerate(task.urls, task.part.first_shard) if own == url
        )
        return replace(task, bad_shards=task.bad_shards + bad)

    def _require_all(self, unread: Sequence[tuple[PartTask, Unread]]) -> None:
        """Fail the job when parts are missing; names them, and who could not read them."""
        reasons = [self._reason(task, found) for task, found in unread] + self._lost
        if not reasons:
            return
        shown = "\n  ".join(reasons[:_MOST_NAMED])
        may = f" ({self._max_bad_shards} shards may be left out: --max-bad-shards)" if unread else ""
        raise ScoringError(
            f"{len(reasons)} of {len(self._tasks)} parts could not be scored{may}:\n  {shown}\n"
            f"the others are done and kept; mend these and run the same command again"
        )

    def _reason(self, task: PartTask, unread: Unread) -> str:
        places = dict.fromkeys(self._places[str(unread.error.shard)])
        return f"part {task.part.number}: {unread.error}; it was tried by {', '.join(places)}"

    # ---- SIGTERM -----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Let the parts that run write their tables."""
        futures = [future for _, future in self._running.values() if not future.done()]
        if futures:
            logger.warning(
                f"SIGTERM: the parts that run ({len(futures)}) may finish, for {GRACE_SECONDS:.0f} seconds; "
                f"a second SIGTERM stops at once"
            )
            with suppress(TimeoutError, CancelledError), self._client.as_current():
                wait(futures, timeout=GRACE_SECONDS)


def _died_twice(task: PartTask, error: KilledWorker) -> str:
    return (
        f"part {task.part.number}: its worker died, and again when it was run alone ({error}); out of memory, perhaps: "
        f"see the workers' log, give them more memory or lower the batch size"
    )


def _as_dynams_error(task: PartTask, error: BaseException) -> DynamsError:
    if isinstance(error, DynamsError):
        return error
    return ScoringError(f"part {task.part.number} failed: {type(error).__name__}: {error}")
