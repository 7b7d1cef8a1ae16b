"""A lazy `map` over Dask tasks that keeps order and holds few results at a time: `ordered_thread_map` on a cluster."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

LOOK_SECONDS = 2.0
"""How often the cluster is asked how much it runs at once: workers come and go."""
RETRIES = 2
"""Of a task that fails with anything but an error of ours: a connection that broke, say."""


def ordered_dask_map(client: Client) -> OrderedMap:
    """A `map` whose functions run as tasks of a cluster; they and their items are pickled.

    At most twice as many tasks as the cluster runs at once are in flight, so that memory stays flat here and there.
    The first error, in the order of the items, is raised in its place; tasks that nobody needs any more are cancelled.

    Raises:
        SelectionError: a task failed with an error that is none of this library's.
    """

    def mapped(function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        source = enumerate(items)
        run = f"{_name(function)}-{uuid.uuid4().hex[:8]}"
        waiting: deque[Future] = deque()

        def submit_up_to(most: int) -> None:
            for number, item in islice(source, max(0, most - len(waiting))):
                key = f"{run}-{number:06d}"
                waiting.append(client.submit(_guarded, function, item, key=key, pure=False, retries=RETRIES))

        try:
            most, looked = 2 * worker_threads(client), time.monotonic()
            submit_up_to(most)
            while waiting:
                future = waiting.popleft()
                yield _result(client, future)
                future.release()
                if time.monotonic() - looked > LOOK_SECONDS:
                    most, looked = 2 * worker_threads(client), time.monotonic()
                submit_up_to(most)
        finally:
            client.cancel(list(waiting))

    return mapped


def _guarded(function: Callable[[A], B], item: A) -> B | DynamsError:
    """The result, or one of our errors as a result: to run such a task again would give the same."""
    try:
        return function(item)
    except DynamsError as error:
        return error


def _result(client: Client, future: Future) -> Any:
    try:
        found = result_of(client, future)
    except DynamsError:
        raise
    except Exception as error:
        raise SelectionError(
            f"a task of the cut failed on the cluster: {type(error).__name__}: {error}; nothing is published, run the "
            f"same command again"
        ) from error
    if isinstance(found, DynamsError):
        raise found
    return found


def _name(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__name__", "task").replace("_", "-")
