"""Bounded submission: as many tasks in flight as the cluster runs at once now, while workers come and go.

More in flight would be held by workers that could not run them yet: when one dies, Dask blames every task that it
held; and a worker that joins late would find nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from distributed import Client, Future, wait

from pipeline.cluster import worker_threads

Task = TypeVar("Task")

LOOK_SECONDS = 2.0
"""How often workers are counted while no task ends."""


def in_flight(
    client: Client, tasks: Iterator[Task], submit: Callable[[Task], Future], *, most: int | None = None
) -> Iterator[tuple[Task, Future]]:
    """Every task with its future, as soon as that is finished, failed or cancelled.

    Args:
        client: of the cluster.
        tasks: what is to be done, taken as workers become free.
        submit: gives a task to the cluster.
        most: no more than so many at once.

    Raises:
        ScoringError: the cluster has no workers any more.
    """
    running: dict[Future, Task] = {}
    while True:
        threads = worker_threads(client)
        free = (threads if most is None else min(threads, most)) - len(running)  # below 0 where workers went
        running |= {submit(task): task for task in islice(tasks, max(0, free))}
        if not running:
            return
        with suppress(TimeoutError, CancelledError), client.as_current():
            wait(list(running), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED")
        for future in [future for future in running if future.done()]:
            yield running.pop(future), future
            future.release()
