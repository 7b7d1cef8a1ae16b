"""Where a part is tried again that a worker could not read, and when such failures speak of the shard.

A worker that lacks a mount fails every part at once, and so is always free for the next one. What it says of shards
counts for nothing until another worker says the same; one of another host where there is one, as hosts share mounts.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import CancelledError
from typing import NamedTuple

from distributed import Client
from distributed.comm import get_address_host

from pipeline.cluster import lost_scheduler

TRIES = 2
"""How often a shard is tried at least."""
MOST_TRIES = 10
"""How often at most, whoever failed: what comes and goes must not keep a job for ever."""


class Worker(NamedTuple):
    """A worker process. It keeps its name when its nanny starts it anew, at another address."""

    name: str
    address: str

    @property
    def host(self) -> str:
        """The host in its address."""
        return str(get_address_host(self.address))


def workers_of(client: Client) -> list[Worker]:
    """The workers that the cluster has now.

    Raises:
        ScoringError: the scheduler is gone.
    """
    try:
        found = client.scheduler_info(n_workers=-1)["workers"]
    except (OSError, CancelledError) as error:
        raise lost_scheduler(client) from error
    return [Worker(str(about["name"]), address) for address, about in found.items()]


def elsewhere(workers: Collection[Worker], failed: Collection[Worker]) -> list[Worker]:
    """The workers to try next: those of other hosts, else the others of the same; none when all have failed."""
    hosts, names = {worker.host for worker in failed}, {worker.name for worker in failed}
    return [worker for worker in workers if worker.host not in hosts] or [
        worker for worker in workers if worker.name not in names
    ]


class FailedTries:
    """The tries of one part that ended at a shard which a worker could not read. A worker reads shards in their order.

    So of a shard only those can say something that do not fail on an earlier one.

    | a shard failed on | on hosts | and can be tried on | it is bad |
    |-------------------|----------|---------------------|-----------|
    | one worker, once  |          |                     | no        |
    | one worker, twice | one      | nobody else         | yes       |
    | one worker, twice | one      | another worker      | no        |
    | two workers       | one      | this host's workers | yes       |
    | two workers       | one      | another host's      | no        |
    | two workers       | two      |                     | yes       |
    """

    def __init__(self) -> None:
        self._tries: list[tuple[int, Worker]] = []

    def add(self, shard: int, worker: Worker) -> None:
        """One more: the shard's position in its part, and the worker."""
        self._tries.append((shard, worker))

    def leave_out(self, shard: int) -> None:
        """Forget a shard that is not read any more."""
        self._tries = [(position, worker) for position, worker in self._tries if position != shard]

    def next_workers(self, workers: Collection[Worker]) -> list[Worker]:
        """The workers to try the part on; none where all are as good."""
        if not self._tries:
            return []
        furthest = max(self._latest().values())
        reaching = self._reaching(furthest, workers)
        return elsewhere(reaching, self._failed_on(furthest)) or reaching

    def is_bad(self, shard: int, workers: Collection[Worker]) -> bool:
        """Whether it is the shard's fault, as far as these workers can say."""
        failed = self._failed_on(shard)
        if len(failed) < TRIES:
            return False
        hosts, names = {worker.host for worker in failed}, {worker.name for worker in failed}
        others = elsewhere(self._reaching(shard, workers), failed)
        if len(hosts) > 1 or not others or len(failed) >= MOST_TRIES:
            return True
        return len(names) > 1 and others[0].host in hosts

    def _failed_on(self, shard: int) -> list[Worker]:
        return [worker for position, worker in self._tries if position == shard]

    def _latest(self) -> dict[str, int]:
        """By name of a worker the shard that it failed on last."""
        return {worker.name: position for position, worker in self._tries}

    def _reaching(self, shard: int, workers: Collection[Worker]) -> list[Worker]:
        """The workers that do not fail on an earlier shard, as far as is known."""
        latest = self._latest()
        return [worker for worker in workers if latest.get(worker.name, shard) >= shard]
