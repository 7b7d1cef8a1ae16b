"""The ordered thread map."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from dynams_stream.errors import UsageError
from dynams_stream.ordered_map import ordered_thread_map


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 3, 50])
def test_results_come_in_order(workers: int, items: int) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.002 if item % 3 == 0 else 0)
        return item * item

    assert list(ordered_thread_map(workers)(slow_first, range(items))) == [i * i for i in range(items)]


def test_workers_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)
    assert sorted(ordered_thread_map(3)(lambda item: together.wait() * 0 + item, range(6))) == list(range(6))


def test_takes_no_more_than_its_window() -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = iter(ordered_thread_map(3)(lambda item: item, endless()))
    assert taken == 0
    for consumed in range(20):
        assert next(results) == consumed + 1
        assert taken <= consumed + 6
    assert taken >= 20
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dynams-map")]


def test_an_error_comes_in_its_place_and_stops_the_rest() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 4:
            raise ValueError("item 4")
        return item

    results = iter(ordered_thread_map(2)(work, range(1000)))
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(results)
    assert max(begun) <= 8
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dynams-map")]


def test_needs_a_worker() -> None:
    with pytest.raises(UsageError, match="got 0"):
        ordered_thread_map(0)
