"""Waiting for tasks while workers come and go, and bounded submission: as many in flight as the cluster runs at once.

More in flight would be held by workers that could not run them yet: when one dies, Dask blames every task that it
held; and a worker that joins late would find nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from distributed import Client, Future, wait

from pipeline.cluster import lost_scheduler, threads_by_worker, worker_threads

Task = TypeVar("Task")

LOOK_SECONDS = 2.0
"""How often workers are counted while no task ends."""


def in_flight(
    client: Client,
    tasks: Iterator[Task],
    submit: Callable[[Task], Future],
    *,
    most: int | None = None,
    stranded: Callable[[Future, Collection[str]], bool] = lambda future, addresses: False,
) -> Iterator[tuple[Task, Future]]:
    """Every task with its future, as soon as that is finished, failed or cancelled.

    Args:
        client: of the cluster.
        tasks: what is to be done, taken as workers become free.
        submit: gives a task to the cluster.
        most: no more than so many at once.
        stranded: told the addresses of the workers that are there, whether a task waits for others; it is submitted
            again then.

    Raises:
        ScoringError: the cluster has no workers any more.
    """
    running: dict[Future, Task] = {}
    while True:
        workers = threads_by_worker(client)
        running = {submit(task) if stranded(future, workers) else future: task for future, task in running.items()}
        threads = sum(workers.values())
        free = (threads if most is None else min(threads, most)) - len(running)  # below 0 where workers went
        running |= {submit(task): task for task in islice(tasks, max(0, free))}
        if not running:
            return
        with suppress(TimeoutError, CancelledError), client.as_current():
            wait(list(running), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED")
        for future in [future for future in running if future.done()]:
            yield running.pop(future), future
            future.release()


def result_of(client: Client, future: Future) -> Any:
    """The result of one task, once it has ended; raises what it raised.

    `Future.result` alone waits for ever when the workers are gone.

    Raises:
        ScoringError: the cluster has no workers any more, or its scheduler is gone.
    """
    while not future.done():
        with suppress(TimeoutError, CancelledError), client.as_current():
            wait([future], timeout=LOOK_SECONDS)
        if not future.done():
            worker_threads(client)  # there are some, or it raises
    result, error = ended(client, future)
    if error is not None:
        raise error
    return result


def ended(client: Client, future: Future) -> tuple[Any, BaseException | None]:
    """What a task that has ended returned, and what it raised: one of them is None.

    Raises:
        ScoringError: the scheduler is gone.
    """
    try:
        if future.status == "cancelled":
            raise CancelledError
        error = future.exception()
        return (future.result(), None) if error is None else (None, error)
    except (CancelledError, TimeoutError, OSError) as error:  # of the connection: those of tasks are returned
        raise lost_scheduler(client) from error
