"""The ordered map over Dask tasks, on a real cluster of two worker processes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
from distributed import Client, get_worker

from dynams_stream.errors import SelectionError, StoreError
from pipeline import dask_map
from pipeline.dask_map import ordered_dask_map


def squared(item: int, shift: int = 0) -> int:
    time.sleep(0.02 if item % 3 == 0 else 0)
    return item * item + shift


def fails_at(item: int, at: int) -> int:
    if item == at:
        raise StoreError(f"item {item}: not a readable table")
    return item


def fails_twice(item: int, marks: str) -> int:
    path = f"{marks}/{item}-{os.getpid()}-{time.time_ns()}"
    open(path, "x").close()
    if len([name for name in os.listdir(marks) if name.startswith(f"{item}-")]) < 3:
        raise ConnectionError("it passes")
    return item


def in_task(item: int, seconds: float) -> str:
    time.sleep(seconds)
    return get_worker().get_current_task()


def large(item: bytes) -> tuple[str, bytes]:
    return get_worker().get_current_task(), item * ((1 << 20) // len(item))


def always_fails(item: int) -> int:
    raise ConnectionError("it stays")


@pytest.mark.parametrize("items", [0, 1, 5, 30])
def test_results_come_in_order(client: Client, items: int) -> None:
    found = list(ordered_dask_map(client)(partial(squared, shift=7), range(items)))
    assert found == [item * item + 7 for item in range(items)]


def test_takes_no_more_than_its_window_and_leaves_nothing_behind(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_map, "MOST_ITEMS", 3)
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = iter(ordered_dask_map(client)(squared, endless()))
    for consumed in range(1, 12):
        assert next(results) == consumed * consumed
        assert taken <= consumed + 3 + 2 * 2 * 3
    results.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while any(key.startswith("squared") for key in client.futures):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_task_has_as_many_items_as_take_a_tenth_of_a_second(client: Client) -> None:
    short = list(ordered_dask_map(client)(partial(in_task, seconds=0), range(1000)))
    assert len(set(short)) < 100
    assert max(Counter(short).values()) == dask_map.MOST_ITEMS
    long = list(ordered_dask_map(client)(partial(in_task, seconds=0.11), range(8)))
    assert len(set(long)) == 8


def test_large_items_and_results_are_not_put_together(client: Client) -> None:
    found = list(ordered_dask_map(client)(large, [b"x"] * 12))
    assert len({task for task, _ in found}) == 12
    found = list(ordered_dask_map(client)(large, [b"x" * (1 << 19)] * 12))
    assert max(Counter(task for task, _ in found).values()) <= 2


@pytest.mark.parametrize("at", [3, 70])
def test_our_errors_come_in_their_place_and_are_not_tried_again(client: Client, at: int) -> None:
    results = iter(ordered_dask_map(client)(partial(fails_at, at=at), range(100)))
    assert [next(results) for _ in range(at)] == list(range(at))
    with pytest.raises(StoreError, match=f"item {at}: not a readable table"):
        next(results)


def test_a_passing_fault_is_tried_again_and_a_lasting_one_told(client: Client, tmp_path: object) -> None:
    assert list(ordered_dask_map(client)(partial(fails_twice, marks=str(tmp_path)), range(3))) == [0, 1, 2]
    with pytest.raises(SelectionError, match="ConnectionError: it stays; nothing is published"):
        list(ordered_dask_map(client)(always_fails, [1]))
