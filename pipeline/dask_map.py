"""A lazy `map` over Dask tasks that keeps order and holds few results at a time: `ordered_thread_map` on a cluster."""

from __future__ import annotations

import pickle
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from distributed import Client, Future

from dynams_stream.errors import DynamsError, SelectionError
from dynams_stream.ordered_map import OrderedMap
from pipeline.cluster import worker_threads
from pipeline.in_flight import result_of

A = TypeVar("A")
B = TypeVar("B")

TASK_SECONDS = 0.1
"""What a task should take about: a scheduler spends some thousandths of a second on each, however short."""
TASK_BYTES = 1 << 20
"""What the items of a task, or their results, should take at most: scheduler and workers hold those of some tasks."""
MOST_ITEMS = 32
"""Items of a task at most."""
LOOK_SECONDS = 2.0
"""How often the cluster is asked how much it runs at once: workers come and go."""
RETRIES = 2
"""Of a whole task that fails with anything but an error of ours: a connection that broke, say."""


def ordered_dask_map(client: Client) -> OrderedMap:
    """A `map` whose functions run as tasks of a cluster; they and their items are pickled.

    At most twice as many tasks as the cluster runs at once are in flight, so that memory stays flat here and there.
    A task has one item to begin with, and more where items are small and take little time. The first error, in the
    order of the items, is raised in its place; tasks that nobody needs any more are cancelled.

    Raises:
        SelectionError: a task failed with an error that is none of this library's, before the results of its items.
    """

    def mapped(function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        source, submitted, items_a_task = iter(items), 0, 1
        run = f"{_name(function)}-{uuid.uuid4().hex[:8]}"
        waiting: deque[Future] = deque()

        def submit_up_to(most: int) -> None:
            nonlocal submitted
            while len(waiting) < most and (chunk := list(islice(source, items_a_task))):
                key = f"{run}-{submitted:06d}"
                waiting.append(client.submit(_guarded, function, chunk, key=key, pure=False, retries=RETRIES))
                submitted += len(chunk)

        try:
            most, looked = 2 * worker_threads(client), time.monotonic()
            submit_up_to(most)
            while waiting:
                future = waiting.popleft()
                try:
                    done = _result(client, future)
                finally:
                    future.release()
                yield from done.results
                if done.error is not None:
                    raise done.error
                items_a_task = _suitable(items_a_task, done)
                if time.monotonic() - looked > LOOK_SECONDS:
                    most, looked = 2 * worker_threads(client), time.monotonic()
                submit_up_to(most)
        finally:
            client.cancel(list(waiting))

    return mapped


@dataclass(frozen=True)
class _Done:
    """What a task gives.

    Attributes:
        results: of its items, up to the first of our errors.
        error: that one.
        seconds: how long all took.
        bytes: the size of all items, or of their results where that is more.
    """

    results: list[Any]
    error: DynamsError | None
    seconds: float
    bytes: int


def _guarded(function: Callable[[A], B], chunk: Sequence[A]) -> _Done:
    """One of our errors is returned, not raised: to run such a task again would give the same."""
    began, results = time.perf_counter(), []
    error = None
    try:
        for item in chunk:
            results.append(function(item))
    except DynamsError as found:
        error = found
    seconds = time.perf_counter() - began
    return _Done(results, error, seconds, max(len(pickle.dumps(chunk, 5)), len(pickle.dumps(results, 5))))


def _suitable(items: int, done: _Done) -> int:
    """How many items the next tasks have: at most twice as many as before, fewer where they took long or much room."""
    of_time = int(TASK_SECONDS * len(done.results) / max(done.seconds, 1e-6))
    of_room = TASK_BYTES * len(done.results) // max(done.bytes, 1)
    return max(1, min(of_time, of_room, 2 * items, MOST_ITEMS))


def _result(client: Client, future: Future) -> _Done:
    try:
        done: _Done = result_of(client, future)
        return done
    except DynamsError:
        raise
    except Exception as error:
        raise SelectionError(
            f"a task of the cut failed on the cluster: {type(error).__name__}: {error}; nothing is published, run the "
            f"same command again"
        ) from error


def _name(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__name__", "task").replace("_", "-")
