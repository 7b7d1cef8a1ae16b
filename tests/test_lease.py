"""One job on a store at a time: real processes that are killed, paused and woken while they hold the lease."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from typer.testing import CliRunner

import toy_models
from dynams_stream import ScorerSpec, Store, schema, storage
from dynams_stream.errors import LeaseLostError, ScoringError, StoreBusyError, StoreError, UsageError
from pipeline import lease
from pipeline.lease import current_holder, store_lease
from pipeline.rounds import make_round
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.weights import SavedWeights
from tools.status import app

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    return str(path)


def hold(url: str, told: Any, end: Any) -> None:
    with store_lease(Store(url), "score"):
        told.set()
        end.wait(60)


class OtherJob:
    """A process that holds the lease of a store."""

    def __init__(self, store: Store):
        told, self.end = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=hold, args=(store.url, told, self.end))
        self.process.start()
        assert told.wait(60)

    def stop(self) -> None:
        self.end.set()
        self.process.join(30)

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)


@pytest.fixture
def other(digit_store: Store) -> Iterator[OtherJob]:
    job = OtherJob(digit_store)
    yield job
    if job.process.pid is not None and job.process.is_alive():
        os.kill(job.process.pid, signal.SIGCONT)
        job.stop()


def number_of(store: Store) -> int:
    """Of the newest lease."""
    return max(int(name[:-5]) for name in storage.list_names(store.path(schema.LEASE_FOLDER)))


def test_a_second_job_is_told_who_is_at_work(
    digit_store: Store, other: OtherJob, checkpoint: str, client: Client
) -> None:
    message = rf"is busy: score \(process {other.process.pid} on .*wait for it to end"
    with pytest.raises(StoreBusyError, match=message):
        score_round(digit_store, SPEC, checkpoint=checkpoint, client=client)
    with pytest.raises(StoreBusyError, match=message):
        make_round(digit_store, SPEC, SavedWeights(checkpoint), fraction=0.5, strategy="distance", client=client)
    holder = current_holder(digit_store)
    assert holder is not None
    assert (holder.pid, holder.job, holder.number) == (other.process.pid, "score", 1)
    select_round(digit_store, fraction="0.5", strategy="random:1")  # cutting what is there goes on
    told = [CliRunner().invoke(app, ["--store", digit_store.url, *more]).stdout for more in ([], ["--json"])]
    assert f"at work: score (process {other.process.pid} on " in told[0]
    assert json.loads(told[1])["at_work"]["pid"] == other.process.pid
    other.stop()
    assert current_holder(digit_store) is None
    assert json.loads(CliRunner().invoke(app, ["--store", digit_store.url, "--json"]).stdout)["at_work"] is None
    assert score_round(digit_store, SPEC, checkpoint=checkpoint, client=client).samples == 1437


def test_a_job_may_wait(digit_store: Store, other: OtherJob, caplog: pytest.LogCaptureFixture) -> None:
    threading.Timer(2.0, other.stop).start()
    began = time.monotonic()
    with store_lease(digit_store, "gc", on_busy="wait"):
        assert time.monotonic() - began > 1.5
        assert number_of(digit_store) == 2
    assert "waiting for it to end" in caplog.text


def test_waiting_for_one_store_keeps_no_other_waiting(digit_store: Store, other: OtherJob, tmp_path: Path) -> None:
    got = threading.Event()

    def wait() -> None:
        with store_lease(digit_store, "gc", on_busy="wait"):
            got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)
    with store_lease(Store(tmp_path / "another"), "gc"):
        assert not got.is_set()
    other.stop()
    waiting.join(60)
    assert got.is_set()


def test_a_killed_holders_lease_is_taken_over_at_once(digit_store: Store, other: OtherJob) -> None:
    other.kill()
    while other.process.is_alive():
        time.sleep(0.01)
    with store_lease(digit_store, "gc"):
        assert number_of(digit_store) == 2
        assert storage.list_names(digit_store.path(schema.LEASE_FOLDER)) == ["000002.json"]


def test_a_process_that_got_a_dead_ones_number_is_not_its_holder(digit_store: Store) -> None:
    with store_lease(digit_store, "score") as mine:
        held = mine._holder
    for process, free in ((held.process, False), (held.process[:-1] + "x", True), ("another-machine/1/2", False)):
        said = {**vars(held), "process": process, "renewed": lease._now()}
        storage.write_bytes(digit_store.path(schema.lease_path(1)), json.dumps(said).encode())
        assert (current_holder(digit_store) is None) == free


def test_a_silent_holder_on_another_machine_loses_it_in_time(digit_store: Store) -> None:
    with store_lease(digit_store, "score") as mine:
        held = {**vars(mine._holder), "process": "another-machine/1/2", "host": "far-away"}
    for silent, free in ((119, False), (179, False), (182, True)):
        renewed = (datetime.now(UTC) - timedelta(seconds=silent)).isoformat()
        storage.write_bytes(digit_store.path(schema.lease_path(1)), json.dumps({**held, "renewed": renewed}).encode())
        assert (current_holder(digit_store) is None) == free
    with store_lease(digit_store, "score"):
        assert number_of(digit_store) == 2


def test_it_is_renewed_while_the_job_runs(digit_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    with store_lease(digit_store, "score"):
        first = lease._newest(digit_store)
        assert first is not None
        deadline = time.monotonic() + 20
        while (now := lease._newest(digit_store)) is not None and now.renewed == first.renewed:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert now is not None
        assert (now.number, now.since, now.given_back) == (1, first.since, False)


def test_jobs_within_a_job_share_it(digit_store: Store) -> None:
    with store_lease(digit_store, "round"):
        with store_lease(Store(digit_store.url), "score"):
            assert number_of(digit_store) == 1
        assert current_holder(digit_store) is not None
        with pytest.raises(UsageError, match="on_busy"), store_lease(digit_store, "score", on_busy="perhaps"):  # type: ignore[arg-type]
            pass
    assert current_holder(digit_store) is None


def ask(url: str, start: Any, got: Any) -> None:
    start.wait(60)
    try:
        with store_lease(Store(url), "score"):
            got.put(os.getpid())
            time.sleep(2)
    except StoreBusyError:
        got.put(0)


def test_of_jobs_that_ask_at_once_one_gets_it(digit_store: Store) -> None:
    start, got = FORK.Event(), FORK.Queue()
    jobs = [FORK.Process(target=ask, args=(digit_store.url, start, got)) for _ in range(8)]
    for job in jobs:
        job.start()
    start.set()
    answers = [got.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join(60)
    assert sum(bool(answer) for answer in answers) == 1


PAUSED = """
import os, signal, sys
from datetime import timedelta
from dynams_stream import ScorerSpec, Store
from pipeline import lease, rounds
from pipeline.weights import SavedWeights
select = rounds.select_round
def pause_then_select(*args, **options):
    print("scored", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return select(*args, **options)
rounds.select_round = pause_then_select
spec = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")
try:
    rounds.make_round(
        Store(sys.argv[1]), spec, SavedWeights(sys.argv[2]), fraction=0.5, strategy="distance", workers=1
    )
    print("published", flush=True)
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_scoring_job_that_was_taken_over_ends_at_the_next_part(
    digit_store: Store, checkpoint: str, client: Client, fails: bool
) -> None:
    seen: list[int] = []

    def taken_over(now: Any) -> None:
        """Another job has begun, as it would after this one had been silent for long."""
        seen.append(now.done)
        if len(seen) == 1:
            mine = Path(digit_store.path(schema.lease_path(number_of(digit_store))))
            Path(digit_store.path(schema.lease_path(number_of(digit_store) + 1))).write_bytes(mine.read_bytes())
            if fails:
                raise ScoringError("a part that the other job has written")

    with pytest.raises(LeaseLostError, match="took over"):
        score_round(digit_store, SPEC, checkpoint=checkpoint, client=client, progress=taken_over)
    assert len(seen) == 1


@pytest.mark.slow
def test_a_paused_job_that_wakes_publishes_nothing(
    digit_store: Store, checkpoint: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    paused = subprocess.Popen(
        [sys.executable, "-c", PAUSED, digit_store.url, checkpoint], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert paused.stdout is not None
    assert paused.stdout.readline() == "scored\n"
    with pytest.raises(StoreBusyError):  # it is alive, if silent
        score_round(digit_store, SPEC, checkpoint=checkpoint, client=client)
    monkeypatch.setattr(lease, "EXPIRES", timedelta(seconds=2))
    monkeypatch.setattr(lease, "CLOCKS_DIFFER", timedelta(seconds=1))
    time.sleep(4)
    made = make_round(
        digit_store, SPEC, SavedWeights(checkpoint), fraction=0.25, strategy="distance", client=client
    ).round
    paused.send_signal(signal.SIGCONT)
    said = paused.communicate(timeout=120)[0]
    assert said.startswith("LeaseLostError"), said
    assert "took over" in said
    assert [one.number for one in digit_store.rounds()] == [made.number]
    assert made.counts["selected"] == 360


def test_tables_that_a_scoring_job_may_replace_are_not_cut_beside_it(
    digit_store: Store, checkpoint: str, client: Client
) -> None:
    spec = replace(SPEC, transform="toy_models:picky")  # some samples fail
    assert 0 < score_round(digit_store, spec, checkpoint=checkpoint, client=client, max_errors=1437).failed < 1437
    holder = OtherJob(digit_store)
    try:
        with pytest.raises(StoreBusyError, match=r"is busy: score \(process"):
            select_round(digit_store, fraction="0.3", max_errors=1437)
        assert digit_store.rounds() == []
    finally:
        holder.stop()
    select_round(digit_store, fraction="0.3", max_errors=1437)
    holder = OtherJob(digit_store)
    try:  # from now on they cannot change
        assert select_round(digit_store, fraction="0.2", max_errors=1437).round.manifest["scores_of"] == 1
    finally:
        holder.stop()


def test_a_number_that_others_have_had_and_removed_is_no_lease(digit_store: Store) -> None:
    with store_lease(digit_store, "score") as mine:
        held = mine._holder
        assert not lease._take(digit_store, replace(held, number=1, pid=held.pid + 1))  # another's
        assert lease._take(digit_store, held)  # asked twice by a client whose answer was lost
        storage.write_bytes(digit_store.path(schema.lease_path(3)), lease._text(replace(held, number=3)))
        assert not lease._take(digit_store, replace(held, number=2))
    assert storage.list_names(digit_store.path(schema.LEASE_FOLDER)) == ["000001.json", "000003.json"]


def test_a_damaged_lease_is_named(digit_store: Store) -> None:
    storage.write_bytes(digit_store.path(schema.lease_path(1)), b"{ half")
    with pytest.raises(StoreError, match=r"000001\.json: not the JSON of a lease"), store_lease(digit_store, "score"):
        pass


def test_losing_it_stops_publication_alone(digit_store: Store) -> None:
    with store_lease(digit_store, "round") as mine:
        mine.require()
        storage.write_bytes(
            digit_store.path(schema.lease_path(2)), json.dumps({**vars(mine._holder), "number": 2}).encode()
        )
        with pytest.raises(LeaseLostError):
            mine.require()
    newest = lease._newest(digit_store)
    assert newest is not None
    assert (newest.number, newest.given_back) == (2, False)  # it is not ours to give back
