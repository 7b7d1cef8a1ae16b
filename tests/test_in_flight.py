"""Bounded submission on a real cluster: what is in flight grows when a worker joins and shrinks when one goes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from dask_processes import scheduler, wait_until, worker
from distributed import Client, Future, get_worker

from dynams_stream.errors import ScoringError
from pipeline import cluster
from pipeline.cluster import dask_client
from pipeline.dask_map import ordered_dask_map
from pipeline.in_flight import in_flight, result_of


@pytest.fixture
def scheduler_file(tmp_path: Path) -> Iterator[Path]:
    with scheduler(tmp_path / "scheduler.json") as file:
        yield file


def meet(mine: str, other: str) -> str:
    """Ends only when the task that is called with the two swapped runs at the same time; where this one ran."""
    Path(mine).touch()
    wait_until(Path(other).exists)
    return str(get_worker().address)


def test_a_worker_that_joins_late_gets_work_while_the_first_task_still_runs(
    scheduler_file: Path, tmp_path: Path
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with worker(scheduler_file), dask_client(scheduler=str(scheduler_file)) as client, ExitStack() as late:
        submitted: list[tuple[str, str]] = []

        def submit(pair: tuple[str, str]) -> Future:
            submitted.append(pair)
            if len(submitted) == 1:  # the window is of one now; the first task waits for a second one
                assert list(client.nthreads().values()) == [1]
                late.enter_context(worker(scheduler_file))
            return client.submit(meet, *pair, key=f"meet-{len(submitted)}", pure=False)

        pairs = [(first, second), (second, first)]
        places = {future.result() for _, future in in_flight(client, iter(pairs), submit)}
        assert submitted == pairs
        assert len(places) == 2


def test_fewer_tasks_are_in_flight_when_a_worker_is_gone(scheduler_file: Path) -> None:
    with (
        worker(scheduler_file, "--no-nanny") as doomed,
        worker(scheduler_file),
        dask_client(scheduler=str(scheduler_file)) as client,
    ):
        wait_until(lambda: len(client.nthreads()) == 2)
        running, most = 0, {2: 0, 1: 0}

        def submit(task: int) -> Future:
            nonlocal running
            running += 1
            workers = len(client.nthreads())
            most[workers] = max(most[workers], running)
            return client.submit(time.sleep, 0.05, key=f"sleep-{task}", pure=False)

        done = []
        for task, future in in_flight(client, iter(range(12)), submit):
            assert future.exception() is None
            done.append(task)
            running -= 1
            if len(done) == 4:
                os.kill(doomed.pid, signal.SIGKILL)
                wait_until(lambda: len(client.nthreads()) == 1)
        assert sorted(done) == list(range(12))
        assert most == {2: 2, 1: 1}


WAYS_TO_WAIT = {
    "in_flight": lambda client, submit: list(in_flight(client, iter([1]), submit)),
    "result_of": lambda client, submit: result_of(client, submit(1)),
    "ordered_dask_map": lambda client, submit: list(ordered_dask_map(client)(time.sleep, map(submit, [1]))),
}


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_a_cluster_that_lost_its_workers_is_an_error_and_no_endless_wait(
    scheduler_file: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(cluster, "WORKER_SECONDS", 1)
    with worker(scheduler_file, "--no-nanny") as only, dask_client(scheduler=str(scheduler_file)) as client:

        def submit(task: int) -> Future | int:
            os.kill(only.pid, signal.SIGKILL)
            return 600 if way == "ordered_dask_map" else client.submit(time.sleep, 600, pure=False)

        with pytest.raises(ScoringError, match="no workers after 1 s"):
            WAYS_TO_WAIT[way](client, submit)


def test_a_scheduler_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with scheduler(tmp_path / "s.json") as file, worker(file), dask_client(scheduler=str(file)) as client:

        def submit(task: int) -> Future:
            return client.submit(time.sleep, 0, pure=False)

        for _ in in_flight(client, iter([1]), submit):
            for other in psutil.Process().children(recursive=True):
                if "scheduler" in other.cmdline() and str(file) in other.cmdline():
                    other.kill()
            break
        with pytest.raises(ScoringError, match=r"is lost; what is done is kept.*run the same command again"):
            list(in_flight(client, iter([2]), submit))


def test_nothing_to_do_ends_at_once(client: Client) -> None:
    assert list(in_flight(client, iter([]), lambda task: client.submit(task))) == []
