"""Retries and Allowance: what is tried again, how long is waited, when it ends, and how many may ask at once."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from dynams_stream import retries
from dynams_stream.errors import ShardChangedError, ShardMissingError, ShardUnreadableError
from dynams_stream.read_ahead import StoppedError
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.retries import Allowance, Retries
from dynams_stream.transport import TransientError

URL = "s3://bucket/a.tar"
WHAT = "bytes 0 to 99"


class Patient(threading.Event):
    """An event that remembers how long was to be waited for it, and waits for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return self.is_set()


class Script:
    """Answers as it is told, one step each time it is asked: None answers well, an error is raised."""

    def __init__(self, *steps: Exception | None):
        self.steps = list(steps)
        self.asked = 0

    def __call__(self) -> str:
        self.asked += 1
        step = self.steps.pop(0)
        if step is not None:
            raise step
        return "the bytes"


class Clock:
    """A clock that a test sets, in the place of the module's `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: self.now))


def failed(reason: str = "connection reset", **flags: bool) -> TransientError:
    return TransientError(reason, **flags)


def short() -> TransientError:
    return failed("asked for 100 bytes at 0, got 40", short=True)


def make(count: Callable[..., None] = lambda **_: None, **options: float) -> Retries:
    return Retries(RemoteOptions(**{"in_flight": 8, **options}), count)  # type: ignore[arg-type]


# ---- trying again ----------------------------------------------------------------------------------------------------


def test_an_answer_is_returned_at_once() -> None:
    stopped, ask = Patient(), Script(None)
    assert make().until_done(ask, URL, WHAT, stopped) == "the bytes"
    assert (ask.asked, stopped.waits) == (1, [])


def test_failures_that_may_pass_are_tried_again() -> None:
    stopped, ask = Patient(), Script(*[failed()] * 9, None)
    assert make().until_done(ask, URL, WHAT, stopped) == "the bytes"
    assert (ask.asked, len(stopped.waits)) == (10, 9)


def test_waits_are_spread_over_a_span_that_doubles_up_to_the_longest() -> None:
    """Full jitter: from nothing to min(10, 0.1 · 2ⁿ) seconds, all of it."""
    once = make(deadline=1e9)
    once._random.seed(0)
    runs = []
    for _ in range(300):
        stopped = Patient()
        once.until_done(Script(*[failed()] * 10, None), URL, WHAT, stopped)
        runs.append(stopped.waits)
    waits = np.array(runs)
    longest = np.minimum(10.0, 0.1 * 2.0 ** np.arange(10))
    assert longest[-1] == 10
    assert waits.min() >= 0
    assert (waits <= longest).all()
    np.testing.assert_allclose(waits.mean(axis=0) / longest, 0.5, atol=0.06)
    assert (waits.max(axis=0) > 0.95 * longest).all()
    assert (waits.min(axis=0) < 0.05 * longest).all()


def test_many_tries_do_not_overflow_the_wait() -> None:
    stopped = Patient()
    make(deadline=1e9).until_done(Script(*[failed()] * 1500, None), URL, WHAT, stopped)
    assert 9 < max(stopped.waits) <= 10


def test_failures_that_will_not_pass_are_raised_at_once() -> None:
    stopped, ask = Patient(), Script(failed(), ShardMissingError("gone", shard=URL), None)
    with pytest.raises(ShardMissingError, match=r"^gone$"):
        make().until_done(ask, URL, WHAT, stopped)
    assert ask.asked == 2


def test_the_waiting_is_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    once = make()
    monkeypatch.setattr(once, "_random", SimpleNamespace(uniform=lambda low, high: high / 2))
    began = time.monotonic()
    assert once.until_done(Script(failed(), failed(), None), URL, WHAT, threading.Event()) == "the bytes"
    assert 0.15 <= time.monotonic() - began < 1  # 0.05 and 0.1 seconds


# ---- giving up -------------------------------------------------------------------------------------------------------


def test_the_deadline_ends_in_an_error_that_tells_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stopped, once = Clock(monkeypatch), Patient(), make(deadline=90)
    monkeypatch.setattr(once, "_random", SimpleNamespace(uniform=lambda low, high: 1.0))

    def ask() -> str:
        clock.now += 29.5
        raise failed(f"reset at {clock.now - 1000:g} s")

    message = (
        "s3://bucket/a.tar: bytes 0 to 99 could not be had in 90 s: 4 requests failed, the last one: reset at 118 s; "
        "see that the store answers, or raise RemoteOptions(deadline=…)"
    )
    with pytest.raises(ShardUnreadableError, match=f"^{re.escape(message)}$") as caught:
        once.until_done(ask, URL, WHAT, stopped)
    assert caught.value.shard == URL
    assert isinstance(caught.value.__cause__, TransientError)
    assert stopped.waits == [1.0, 1.0, 1.0]


def test_a_wait_that_would_pass_the_deadline_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stopped, once = Clock(monkeypatch), Patient(), make(deadline=5)
    monkeypatch.setattr(once, "_random", SimpleNamespace(uniform=lambda low, high: 2.0))

    def ask() -> str:
        clock.now += 1.6
        raise failed()

    with pytest.raises(ShardUnreadableError, match="could not be had in 5 s: 2 requests failed"):
        once.until_done(ask, URL, WHAT, stopped)
    assert stopped.waits == [2.0]


def test_real_seconds_stay_below_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(ShardUnreadableError, match=r"could not be had in 0\.3 s"):
        make(deadline=0.3).until_done(Script(*[failed()] * 1000), URL, WHAT, threading.Event())
    assert time.monotonic() - began < 0.4


def test_stopping_ends_a_wait_and_nothing_is_asked_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    once, stopped, ask = make(), threading.Event(), Script(failed("reset by peer"), None)
    monkeypatch.setattr(once, "_random", SimpleNamespace(uniform=lambda low, high: 60.0))
    threading.Timer(0.1, stopped.set).start()
    began = time.monotonic()
    with pytest.raises(StoppedError) as caught:
        once.until_done(ask, URL, WHAT, stopped)
    assert str(caught.value.__cause__) == "reset by peer"
    assert time.monotonic() - began < 5
    assert ask.asked == 1


def test_short_answers_in_a_row_mean_that_the_shard_has_become_shorter() -> None:
    stopped, ask = Patient(), Script(*[short()] * 4, None)
    with pytest.raises(ShardChangedError, match=r"^asked for 100 bytes at 0, got 40$") as caught:
        make().until_done(ask, URL, WHAT, stopped)
    assert caught.value.shard == URL
    assert (ask.asked, len(stopped.waits)) == (4, 3)


def test_short_answers_between_others_are_tried_again() -> None:
    steps = [*[short()] * 3, failed(), *[short()] * 3, failed(slow_down=True), short(), None]
    assert make().until_done(Script(*steps), URL, WHAT, Patient()) == "the bytes"


# ---- side effects ----------------------------------------------------------------------------------------------------


def test_requests_retries_and_slow_downs_are_told() -> None:
    told: Counter[str] = Counter()
    once = make(lambda **counts: told.update(counts))
    once.until_done(Script(None), URL, WHAT, Patient())
    assert told == {"requests": 1, "retries": 0}
    once.until_done(Script(failed(), failed(slow_down=True), short(), None), URL, WHAT, Patient())
    assert told == {"requests": 5, "retries": 3, "slow_downs": 1}
    with pytest.raises(ShardChangedError, match="got 40"):
        once.until_done(Script(*[short()] * 4), URL, WHAT, Patient())
    assert told == {"requests": 9, "retries": 6, "slow_downs": 1}


def test_the_users_random_state_is_left_alone() -> None:
    random.seed(7)
    np.random.seed(7)
    before, numpys = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    make().until_done(Script(*[failed()] * 5, None), URL, WHAT, Patient())
    assert random.getstate() == before
    assert np.random.get_state()[1].tolist() == numpys  # type: ignore[index, union-attr]


def test_processes_that_seed_alike_do_not_wait_alike() -> None:
    """Otherwise all workers that a store refuses would come back at one moment."""
    waits = []
    for _ in range(2):
        random.seed(0)
        stopped = Patient()
        make().until_done(Script(*[failed()] * 5, None), URL, WHAT, stopped)
        waits.append(stopped.waits)
    assert waits[0] != waits[1]


def test_the_first_failure_of_each_store_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    once = make()
    with caplog.at_level(logging.WARNING):
        for url in (URL, "s3://bucket/b.tar", "http://host:80/a.tar", URL):
            once.until_done(Script(failed("503"), failed("500"), None), url, WHAT, Patient())
    assert [record.getMessage() for record in caplog.records] == [
        "s3://bucket: a request failed and is tried again: 503",
        "http://host:80: a request failed and is tried again: 503",
    ]


# ---- the allowance ---------------------------------------------------------------------------------------------------


def test_slow_down_halves_the_allowance_once_for_requests_that_were_under_way_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, allowance = Clock(monkeypatch), Allowance(64)
    limits = []
    for seconds in (0.0, 0.1, 0.49, 0.51, 0.9, 1.02):
        clock.now = 1000 + seconds
        allowance.halve()
        limits.append(allowance.limit)
    assert limits == [32, 32, 32, 16, 16, 8]


def test_the_allowance_never_falls_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, allowance = Clock(monkeypatch), Allowance(5)
    limits = []
    for _ in range(5):
        clock.now += 1
        allowance.halve()
        limits.append(allowance.limit)
    assert limits == [2.5, 1.25, 1, 1, 1]
    with allowance.one():
        pass


def test_answers_raise_the_allowance_by_one_a_round_and_never_above_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, allowance = Clock(monkeypatch), Allowance(16)
    for _ in range(2):
        clock.now += 1
        allowance.halve()
    assert allowance.limit == 4
    while allowance.limit < 15:
        before = allowance.limit
        for _ in range(int(before)):
            allowance.grow()
        assert 0.7 < allowance.limit - before <= 1
    for _ in range(100):
        allowance.grow()
    assert allowance.limit == 16


def test_only_refusals_that_ask_for_it_lower_the_allowance() -> None:
    once = make()
    once.until_done(Script(failed(), short(), failed("500"), None), URL, WHAT, Patient())
    assert once.allowance.limit == 8
    once.until_done(Script(failed(slow_down=True), None), URL, WHAT, Patient())
    assert once.allowance.limit == 4.25


def test_never_more_than_the_allowance_is_under_way() -> None:
    allowance, seen, mutex = Allowance(3), [], threading.Lock()
    under_way = 0

    def work() -> None:
        nonlocal under_way
        for _ in range(5):
            with allowance.one():
                with mutex:
                    under_way += 1
                    seen.append(under_way)
                time.sleep(0.001)
                with mutex:
                    under_way -= 1

    _run_all([threading.Thread(target=work) for _ in range(12)])
    assert len(seen) == 60
    assert max(seen) == 3


def test_a_lowered_allowance_holds_for_those_that_wait_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight are under way when it is halved: none begins before fewer than four are left."""
    allowance, release = Allowance(8), [threading.Event() for _ in range(8)]
    begun = threading.Semaphore(0)
    late: list[int] = []

    def early(number: int) -> None:
        with allowance.one():
            begun.release()
            release[number].wait()

    def waiting() -> None:
        with allowance.one():
            late.append(sum(event.is_set() for event in release))

    threads = [threading.Thread(target=early, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=5)
    allowance.halve()
    last = threading.Thread(target=waiting)
    last.start()
    for event in release:
        time.sleep(0.02)
        event.set()
    for thread in [*threads, last]:
        thread.join(5)
    assert late == [5]


def test_nobody_waits_for_ever_while_the_allowance_goes_up_and_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_HALVE_AGAIN", 0.0)
    once, done = make(in_flight=6), []
    monkeypatch.setattr(once, "_random", SimpleNamespace(uniform=lambda low, high: 0.0))

    def work(number: int) -> None:
        steps = [failed(slow_down=True)] * (number % 3)
        done.append(once.until_done(Script(*steps, None), URL, WHAT, threading.Event()))

    _run_all([threading.Thread(target=work, args=(number,)) for number in range(40)])
    assert done == ["the bytes"] * 40
    assert once.allowance._under_way == 0


def test_a_place_is_given_back_when_the_request_raises() -> None:
    once = make(in_flight=1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="a bug"):
            once.until_done(Script(RuntimeError("a bug")), URL, WHAT, Patient())
    assert once.until_done(Script(None), URL, WHAT, Patient()) == "the bytes"


def _run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.daemon = True
        thread.start()
    deadline = time.monotonic() + 20
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
