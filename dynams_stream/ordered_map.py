"""A lazy `map` over threads that keeps order and holds few results at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

from dynams_stream.errors import UsageError

A = TypeVar("A")
B = TypeVar("B")


class OrderedMap(Protocol):
    """What `map` does: results in the order of the items, made as they are consumed."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """`function(item)` for each item, in order."""


def ordered_thread_map(workers: int, initializer: Callable[[], object] | None = None) -> OrderedMap:
    """A `map` that runs in `workers` threads, each of which calls `initializer` first.

    At most 2 × workers items are taken from the input before their results have been consumed, so memory stays flat
    however many items there are. The first error, in the order of the items, is raised in its place; what has not begun
    by then never runs, and no thread outlives the iterator.

    Raises:
        UsageError: for fewer than one worker.
    """
    if workers < 1:
        raise UsageError(f"a thread map needs at least 1 worker; got {workers}")

    def mapped(function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        source = iter(items)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="dynams-map", initializer=initializer)
        try:
            waiting: deque[Future[B]] = deque(pool.submit(function, item) for item in islice(source, 2 * workers))
            while waiting:
                result = waiting.popleft().result()
                yield result
                waiting.extend(pool.submit(function, item) for item in islice(source, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return mapped
