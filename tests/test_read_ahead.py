"""ReadAhead: what is begun when, what is held, what is given, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import stream_stores
from hypothesis import given, settings
from hypothesis import strategies as st
from object_server import ObjectServer

from dynams_stream import ranges, read_ahead
from dynams_stream.errors import ShardUnreadableError
from dynams_stream.read_ahead import Range, ReadAhead, StoppedError
from dynams_stream.store import Store
from pipeline.index_job import build_index

DATA = np.random.default_rng(0).bytes(1 << 16)
SECONDS = 5.0


class Fetcher:
    """Gives slices of `DATA`; with `gated`, only those that a test lets through.

    Attributes:
        begun: first byte of each range, in the order in which they were asked for.
        most_at_once: the most that were under way together.
    """

    def __init__(self, *, gated: bool = False, fails: frozenset[int] = frozenset()):
        self.begun: list[int] = []
        self.most_at_once = 0
        self._under_way = 0
        self._gated = gated
        self._fails = fails
        self._open: set[int] = set()
        self._changed = threading.Condition()

    def __call__(self, wanted: Range) -> bytes:
        with self._changed:
            self.begun.append(wanted.start)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            deadline = time.monotonic() + SECONDS
            while self._gated and wanted.start not in self._open and not wanted.stopped.is_set():
                assert time.monotonic() < deadline
                self._changed.wait(0.01)
            self._under_way -= 1
        if wanted.start in self._fails:
            raise OSError(f"bytes from {wanted.start} are damaged")
        return DATA[wanted.start : wanted.stop]

    def let_through(self, *starts: int) -> None:
        with self._changed:
            self._open.update(starts)
            self._changed.notify_all()


class Watched(ReadAhead):
    """Remembers the most bytes that were held."""

    most_held = 0
    _bytes = 0

    @property
    def _held(self) -> int:
        return self._bytes

    @_held.setter
    def _held(self, held: int) -> None:
        assert held >= 0
        self._bytes, self.most_held = held, max(self.most_held, held)


@pytest.fixture
def made() -> Iterator[list[ReadAhead]]:
    """What a test has made, to be ended after it."""
    made: list[ReadAhead] = []
    yield made
    for each in made:
        each.close()
    for each in made:
        each.join(time.monotonic() + SECONDS)
        assert each._running == 0


@pytest.fixture
def make(made: list[ReadAhead]) -> Callable[..., Watched]:
    def maker(fetch: Callable[[Range], bytes], *, threads: int = 1, budget: int = 10**6) -> Watched:
        made.append(Watched(fetch, threads=threads, budget=budget))
        return made[-1]  # type: ignore[return-value]

    return maker


def whole(start: int, size: int) -> Range:
    """A range that is wanted as one span."""
    return spanned(start, size, {start: size})


def spanned(start: int, size: int, spans: dict[int, int]) -> Range:
    made = Range(0, start, start + size)
    made.spans.update(spans)
    return made


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stays(condition: Callable[[], bool]) -> None:
    for _ in range(10):
        assert condition()
        time.sleep(0.005)


# ---- order -----------------------------------------------------------------------------------------------------------


def test_ranges_are_begun_in_the_order_in_which_they_were_submitted(make: Callable[..., Watched]) -> None:
    fetch = Fetcher()
    ahead = make(fetch)
    planned = [whole(start, 10) for start in (70, 20, 90, 0)]
    ahead.submit(planned[:2])
    ahead.submit(planned[2:])
    eventually(lambda: len(fetch.begun) == 4)
    assert fetch.begun == [70, 20, 90, 0]
    for each in reversed(planned):  # and are taken in any order
        assert ahead.take(each, each.start) == DATA[each.start : each.stop]


def test_several_are_under_way_at_a_time_and_never_more_than_the_threads(make: Callable[..., Watched]) -> None:
    fetch = Fetcher(gated=True)
    ahead = make(fetch, threads=3)
    planned = [whole(10 * number, 10) for number in range(8)]
    for each in planned:
        ahead.submit([each])
    eventually(lambda: len(fetch.begun) == 3)
    stays(lambda: sorted(fetch.begun) == [0, 10, 20])
    fetch.let_through(10)
    eventually(lambda: len(fetch.begun) == 4)
    assert fetch.begun[3] == 30
    fetch.let_through(*range(0, 80, 10))
    assert [ahead.take(each, each.start) for each in planned] == [DATA[10 * n : 10 * n + 10] for n in range(8)]
    assert fetch.most_at_once == ahead._running == 3


def test_no_more_threads_are_started_than_there_is_work(make: Callable[..., Watched]) -> None:
    ahead = make(Fetcher(), threads=50)
    first = [whole(0, 10), whole(10, 10)]
    ahead.submit(first)
    for each in first:
        ahead.take(each, each.start)
    assert ahead._running == 2
    eventually(lambda: ahead._idle == 2)
    for start in range(20, 100, 10):  # the idle ones take these
        again = whole(start, 10)
        ahead.submit([again])
        ahead.take(again, start)
        eventually(lambda: ahead._idle == 2)
    assert ahead._running == 2


def test_threads_end_when_idle_and_are_started_again(
    make: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_IDLE_SECONDS", 0.05)
    ahead = make(Fetcher(), threads=4)
    for _ in range(2):
        planned = [whole(10 * number, 10) for number in range(6)]
        ahead.submit(planned)
        assert [ahead.take(each, each.start) for each in planned] == [DATA[n : n + 10] for n in range(0, 60, 10)]
        eventually(lambda: ahead._running == 0)
        assert (ahead._idle, ahead._held) == (0, 0)


def test_threads_wait_for_a_full_budget_however_long_it_takes(
    make: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_IDLE_SECONDS", 0.01)
    fetch = Fetcher()
    ahead = make(fetch, budget=10)
    planned = [whole(0, 10), whole(10, 10)]
    ahead.submit(planned)
    eventually(lambda: planned[0].left is not None)
    time.sleep(0.1)
    assert fetch.begun == [0]
    assert ahead.take(planned[0], 0) == DATA[:10]
    eventually(lambda: fetch.begun == [0, 10])
    ahead.take(planned[1], 10)


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_no_more_than_the_budget_is_under_way_or_held(make: Callable[..., Watched]) -> None:
    fetch = Fetcher()
    ahead = make(fetch, threads=8, budget=35)
    planned = [whole(10 * number, 10) for number in range(8)]
    ahead.submit(planned)
    eventually(lambda: len(fetch.begun) == 3)
    for number, each in enumerate(planned):
        stays(lambda number=number: len(fetch.begun) == min(8, 3 + number))  # type: ignore[misc]
        assert ahead.take(each, each.start) == DATA[10 * number : 10 * number + 10]
        eventually(lambda number=number: len(fetch.begun) == min(8, 4 + number))  # type: ignore[misc]
    assert (ahead.most_held, ahead._held) == (30, 0)


def test_small_ranges_do_not_overtake_a_large_one_that_waits_for_the_budget(make: Callable[..., Watched]) -> None:
    fetch = Fetcher()
    ahead = make(fetch, threads=4, budget=30)
    planned = [whole(0, 20), whole(100, 25), whole(200, 1)]
    ahead.submit(planned)
    eventually(lambda: planned[0].left is not None)
    stays(lambda: fetch.begun == [0])
    assert [ahead.take(each, each.start) for each in planned] == [DATA[:20], DATA[100:125], DATA[200:201]]


def test_a_range_larger_than_the_budget_is_fetched_alone(make: Callable[..., Watched]) -> None:
    fetch = Fetcher()
    ahead = make(fetch, threads=4, budget=10)
    planned = [whole(0, 5), whole(100, 500), whole(1000, 5)]
    ahead.submit(planned)
    eventually(lambda: planned[0].left is not None)
    stays(lambda: fetch.begun == [0])
    for each in planned:
        assert ahead.take(each, each.start) == DATA[each.start : each.stop]
    assert ahead.most_held == 500


def test_what_is_waited_for_is_begun_even_when_the_budget_is_full(make: Callable[..., Watched]) -> None:
    """Its bytes go to one sample at once; the budget is full of what is needed later."""
    fetch = Fetcher()
    ahead = make(fetch, threads=2, budget=20)
    planned = [whole(0, 20), whole(100, 10), whole(200, 10), whole(300, 10)]
    ahead.submit(planned)
    eventually(lambda: planned[0].left is not None)
    stays(lambda: fetch.begun == [0])
    assert ahead.take(planned[2], 200) == DATA[200:210]  # not even the next one
    stays(lambda: fetch.begun == [0, 200])
    assert ahead.take(planned[0], 0) == DATA[:20]
    eventually(lambda: fetch.begun == [0, 200, 100, 300])
    assert [ahead.take(planned[n], planned[n].start) for n in (3, 1)] == [DATA[300:310], DATA[100:110]]
    assert (ahead.most_held, ahead._held) == (30, 0)


def test_all_that_several_threads_wait_for_is_begun_even_when_the_budget_is_full(make: Callable[..., Watched]) -> None:
    fetch = Fetcher(gated=True)
    ahead = make(fetch, threads=1, budget=20)
    planned = [whole(0, 10), whole(50, 10), whole(100, 10), whole(200, 10), whole(300, 10)]
    ahead.submit(planned)
    fetch.let_through(0, 100, 200, 300)
    eventually(lambda: fetch.begun == [0, 50])
    waiting = [Taking(ahead, each) for each in planned[2:4]]
    for each in waiting:
        each.start()
        eventually(lambda each=each: ahead._queue[0] is each.wanted)  # type: ignore[misc]
    fetch.let_through(50)
    for each in waiting:
        each.join(SECONDS)
    assert [each.data for each in waiting] == [DATA[100:110], DATA[200:210]]
    assert fetch.begun == [0, 50, 200, 100]


class Taking(threading.Thread):
    """A thread that takes the only span of a range."""

    def __init__(self, ahead: ReadAhead, wanted: Range):
        super().__init__(daemon=True)
        self.ahead, self.wanted, self.data = ahead, wanted, b""

    def run(self) -> None:
        self.data = self.ahead.take(self.wanted, self.wanted.start)


def test_each_span_is_given_once_and_counts_until_then(make: Callable[..., Watched]) -> None:
    ahead = make(Fetcher())
    one = spanned(100, 100, {150: 20, 100: 10, 190: 10})
    ahead.submit([one])
    eventually(lambda: one.left is not None)
    held = []
    for offset, size in ((190, 10), (100, 10), (150, 20)):
        held.append(ahead._held)
        assert ahead.take(one, offset) == DATA[offset : offset + size]
    assert held == [40, 30, 20]
    assert ahead._held == 0
    with pytest.raises(KeyError):
        ahead.take(one, 100)


def test_bytes_between_the_wanted_spans_are_dropped(make: Callable[..., Watched]) -> None:
    ahead = make(Fetcher())
    one = spanned(0, 60_000, {0: 10, 50_000: 10})
    one.others[30_000] = 10  # another process wants these; they are for the cache
    ahead.submit([one])
    eventually(lambda: one.left is not None)
    assert one.left == {0: DATA[:10], 50_000: DATA[50_000:50_010]}
    assert all(type(data) is bytes for data in one.left.values())  # no views that keep the whole alive
    assert (ahead.most_held, ahead._held) == (60_000, 20)
    ahead.take(one, 0)
    ahead.take(one, 50_000)
    assert ahead._held == 0


def test_a_range_of_which_nothing_is_wanted_here_holds_nothing(make: Callable[..., Watched]) -> None:
    ahead = make(Fetcher())
    one = spanned(0, 100, {})
    one.others[0] = 100
    ahead.submit([one])
    eventually(lambda: one.left == {})
    assert ahead._held == 0


def test_waiting_is_measured_and_what_is_here_costs_none(make: Callable[..., Watched]) -> None:
    fetch = Fetcher(gated=True)
    ahead = make(fetch)
    one = spanned(0, 20, {0: 10, 10: 10})
    ahead.submit([one])
    threading.Timer(0.1, fetch.let_through, [0]).start()
    ahead.take(one, 0)
    waited = ahead.waited
    assert 0.08 < waited < 2
    ahead.take(one, 10)
    assert ahead.waited == waited


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_errors_are_raised_where_the_bytes_are_needed_and_nowhere_else(make: Callable[..., Watched]) -> None:
    ahead = make(Fetcher(fails=frozenset({100})), threads=2, budget=30)
    planned = [whole(0, 20), spanned(100, 20, {100: 10, 110: 10}), whole(200, 20), whole(300, 20)]
    ahead.submit(planned)
    assert ahead.take(planned[0], 0) == DATA[:20]
    for offset in (100, 110):
        with pytest.raises(OSError, match=r"^bytes from 100 are damaged$"):
            ahead.take(planned[1], offset)
    assert [ahead.take(each, each.start) for each in planned[2:]] == [DATA[200:220], DATA[300:320]]
    assert ahead._held == 0


def test_a_panic_of_the_transport_is_raised_and_hangs_nobody(make: Callable[..., Watched]) -> None:
    """What Rust code raises when it panics is no `Exception`."""

    class PanicError(BaseException):
        pass

    def fetch(wanted: Range) -> bytes:
        if wanted.start == 0:
            raise PanicError("called `Option::unwrap()` on a `None` value")
        return DATA[wanted.start : wanted.stop]

    ahead = make(fetch)
    planned = [whole(0, 10), whole(10, 10)]
    ahead.submit(planned)
    with pytest.raises(PanicError, match="unwrap"):
        ahead.take(planned[0], 0)
    assert ahead.take(planned[1], 10) == DATA[10:20]


def test_forgetting_frees_the_budget_and_the_queue(make: Callable[..., Watched]) -> None:
    fetch = Fetcher(gated=True)
    ahead = make(fetch, threads=2, budget=20)
    here, under_way, queued, kept = whole(0, 10), whole(10, 10), whole(20, 10), whole(30, 20)
    ahead.submit([here, under_way, queued, kept])
    fetch.let_through(0)
    eventually(lambda: here.left is not None)
    stays(lambda: sorted(fetch.begun) == [0, 10])
    ahead.forget([here, under_way, queued])
    eventually(lambda: sorted(fetch.begun) == [0, 10, 30])  # two times the budget's bytes, but half is nobody's
    fetch.let_through(10, 30)
    assert ahead.take(kept, 30) == DATA[30:50]
    eventually(lambda: ahead._idle == 2)
    assert ahead._held == 0
    assert under_way.left is None
    assert sorted(fetch.begun) == [0, 10, 30]


def test_forgetting_what_was_taken_in_part_frees_the_rest(make: Callable[..., Watched]) -> None:
    ahead = make(Fetcher())
    one = spanned(0, 100, {0: 30, 50: 20})
    ahead.submit([one])
    ahead.take(one, 0)
    ahead.forget([one])
    assert ahead._held == 0
    ahead.forget([one])
    assert ahead._held == 0


class Retrying:
    """Fetches that fail until a test says otherwise, and wait for long between; what is stopped is given up.

    Attributes:
        works: whether a try succeeds.
        begun, ended: first byte of each range, in the order in which their fetching began, and ended.
    """

    def __init__(self) -> None:
        self.works = False
        self.begun: list[int] = []
        self.ended: list[int] = []

    def __call__(self, wanted: Range) -> bytes:
        self.begun.append(wanted.start)
        try:
            if not self.works and wanted.stopped.wait(SECONDS):
                raise StoppedError
            return DATA[wanted.start : wanted.stop]
        finally:
            self.ended.append(wanted.start)


def test_forgetting_ends_the_tries_of_what_nobody_needs_any_more(make: Callable[..., Watched]) -> None:
    fetch = Retrying()
    ahead = make(fetch, threads=2)
    planned = [whole(0, 10), whole(10, 10), whole(20, 10)]
    ahead.submit(planned)
    eventually(lambda: len(fetch.begun) == 2)
    ahead.forget(planned[:1])
    eventually(lambda: fetch.ended == [0])  # and not 10, which is needed
    eventually(lambda: sorted(fetch.begun) == [0, 10, 20])
    ahead.forget(planned[1:])
    eventually(lambda: sorted(fetch.ended) == [0, 10, 20])
    assert ahead._held == 0


def test_without_any_thread_submitting_is_an_error_that_names_the_limit(
    make: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = make(Fetcher())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused_thread)
        message = r"nothing can be fetched .*\(can't start new thread\); let the process have more threads \(ulimit -u"
        with pytest.raises(ShardUnreadableError, match=message):
            ahead.submit([whole(0, 10)])
    again = whole(10, 10)
    ahead.submit([again])
    assert ahead.take(again, 10) == DATA[10:20]
    assert (ahead._running, ahead._held) == (1, 0)


def test_fewer_threads_than_wanted_do_all_the_work(
    make: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = make(Fetcher(), threads=4)
    first, more = whole(0, 10), [whole(start, 10) for start in range(10, 100, 10)]
    ahead.submit([first])
    monkeypatch.setattr(threading.Thread, "start", refused_thread)
    ahead.submit(more)
    assert [ahead.take(each, each.start) for each in [first, *more]] == [DATA[n : n + 10] for n in range(0, 100, 10)]
    assert ahead._running == 1


def refused_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_closing_begins_nothing_more_and_tells_what_is_under_way(make: Callable[..., Watched]) -> None:
    fetch = Fetcher(gated=True)
    ahead = make(fetch, threads=2)
    planned = [whole(10 * number, 10) for number in range(5)]
    ahead.submit(planned)
    eventually(lambda: len(fetch.begun) == 2)
    ahead.close()  # the fetcher's gates open when it is told so
    ahead.join(time.monotonic() + SECONDS)
    assert ahead._running == 0
    assert sorted(fetch.begun) == [0, 10]


def test_after_closing_what_is_still_taken_is_fetched_by_who_takes_it(make: Callable[..., Watched]) -> None:
    """An iteration of an older dataset goes on when the reader was given another one."""
    fetch = Fetcher(gated=True, fails=frozenset({40}))
    ahead = make(fetch, threads=2)
    planned = [spanned(10 * number, 10, {10 * number: 4, 10 * number + 5: 5}) for number in range(5)]
    ahead.submit(planned)
    eventually(lambda: len(fetch.begun) == 2)
    ahead.close()
    fetch.let_through(*range(0, 50, 10))
    for each in planned[:4]:
        assert ahead.take(each, each.start + 5) == DATA[each.start + 5 : each.stop]
        assert ahead.take(each, each.start) == DATA[each.start : each.start + 4]
    for offset in (40, 45):
        with pytest.raises(OSError, match="bytes from 40 are damaged"):
            ahead.take(planned[4], offset)
    ahead.join(time.monotonic() + SECONDS)
    assert sorted(fetch.begun) == [0, 10, 20, 30, 40]  # each once
    assert ahead._held == 0


def test_closing_wakes_who_waits_for_what_was_not_begun(make: Callable[..., Watched]) -> None:
    begun, release = threading.Event(), threading.Event()

    def fetch(wanted: Range) -> bytes:
        begun.set()
        if wanted.start == 0:  # a request that takes its time
            release.wait(SECONDS)
        return DATA[wanted.start : wanted.stop]

    ahead = make(fetch)
    planned = [whole(0, 10), whole(10, 10)]
    ahead.submit(planned)
    assert begun.wait(SECONDS)
    waiting = Taking(ahead, planned[1])
    waiting.start()
    eventually(lambda: planned[1].overdue)
    ahead.close()
    waiting.join(SECONDS / 2)
    assert waiting.data == DATA[10:20]
    release.set()


@pytest.mark.parametrize("waits", [True, False])
def test_what_was_stopped_between_two_tries_is_fetched_by_who_needs_it(
    make: Callable[..., Watched], waits: bool
) -> None:
    fetch = Retrying()
    ahead = make(fetch)
    one = whole(0, 10)
    ahead.submit([one])
    eventually(lambda: fetch.begun == [0])
    taking = Taking(ahead, one)
    if waits:
        taking.start()
        time.sleep(0.02)
    fetch.works = True
    ahead.close()
    eventually(lambda: 0 in fetch.ended)
    if not waits:
        taking.start()
    taking.join(SECONDS)
    assert taking.data == DATA[:10]
    assert fetch.begun == [0, 0]
    assert ahead._held == 0


def test_joining_gives_up_at_its_deadline(make: Callable[..., Watched]) -> None:
    begun, release = threading.Event(), threading.Event()

    def fetch(wanted: Range) -> bytes:
        begun.set()
        release.wait(SECONDS)
        return DATA[wanted.start : wanted.stop]

    ahead = make(fetch)
    ahead.submit([whole(0, 10)])
    assert begun.wait(SECONDS)
    ahead.close()
    began = time.monotonic()
    ahead.join(began + 0.1)
    assert 0.1 <= time.monotonic() - began < 1
    assert ahead._running == 1
    release.set()


def test_a_forked_child_leaves_its_parents_threads_alone(make: Callable[..., Watched]) -> None:
    ahead = make(Fetcher())
    assert ahead in read_ahead._LIVE
    child = os.fork()
    if child == 0:
        began = time.monotonic()
        read_ahead._end_threads()
        os._exit(0 if not len(read_ahead._LIVE) and time.monotonic() - began < 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ahead in read_ahead._LIVE


PROGRAM = """
import sys, threading, time
from dynams_stream import read_ahead
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.stream import SelectedDataset

remote = RemoteOptions(in_flight=16, gap=0, longest=2000)
read_ahead._EXIT_SECONDS = 1.0
samples = iter(SelectedDataset(sys.argv[1], remote=remote))
if sys.argv[2] == "reading":
    next(samples)
else:
    threading.Thread(target=next, args=(samples,), daemon=True).start()
    time.sleep(0.5)
print(time.time(), flush=True)
sys.exit(0)
"""


@pytest.mark.parametrize("how", ["reading", "hanging"])
def test_a_process_with_requests_under_way_ends_cleanly_and_soon(tmp_path: Path, how: str) -> None:
    stream_stores.make_shards(tmp_path / "shards", (60, 60))
    with ObjectServer(tmp_path) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        store = Store(tmp_path / "store")
        build_index(store, [f"{server.endpoint}/bucket/shards/data-{shard:03d}.tar" for shard in range(2)])
        server.delay = 0.3
        server.faults = lambda request: "hang" if how == "hanging" else None
        program = [sys.executable, "-c", textwrap.dedent(PROGRAM), store.url, how]
        ended = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
        seconds = time.time() - float(ended.stdout)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert seconds < 10  # torch takes some of them
    assert server.most_at_once > 4


# ---- any plan --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Spans in order of need, and how they are to be fetched."""

    places: list[tuple[int, int]]
    gap: int
    longest: int
    budget: int
    threads: int
    chunk: int
    leave: int
    fails: frozenset[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=40))
    places, end = [], 0
    for size, distance in sizes:
        places.append((end + distance, size))
        end += distance + size
    return Case(
        places=draw(st.permutations(places)),
        gap=draw(st.sampled_from([0, 10, 40])),
        longest=draw(st.sampled_from([1, 50, 200, 10**6])),
        budget=draw(st.sampled_from([1, 60, 300, 10**6])),
        threads=draw(st.integers(1, 5)),
        chunk=draw(st.integers(1, 20)),
        leave=draw(st.integers(0, 60)),
        fails=frozenset(draw(st.sets(st.integers(0, 39), max_size=3))),
    )


def planned_ranges(places: list[tuple[int, int]], case: Case) -> dict[int, Range]:
    """By offset of a span, the range that holds it; in order of need, as `RemoteShards` plans them."""
    offsets, sizes = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
    plan = ranges.plan(np.zeros(len(places), dtype=np.int64), offsets, sizes, gap=case.gap, longest=case.longest)
    made = [Range(0, *place) for place in zip(plan.starts.tolist(), plan.stops.tolist(), strict=True)]
    for (offset, size), number in zip(places, plan.range_of.tolist(), strict=True):
        made[number].spans[offset] = size
    return {offset: made[number] for (offset, _), number in zip(places, plan.range_of.tolist(), strict=True)}


@given(case=cases())
@settings(deadline=None, max_examples=60)
def test_any_plan_gives_the_right_bytes_within_its_memory(case: Case) -> None:
    """Two chunks are planned at a time, as a reader does; after `leave` spans the rest is forgotten."""
    bad = {offset for number, (offset, _) in enumerate(case.places) if number in case.fails}

    def fetch(wanted: Range) -> memoryview:
        time.sleep(0.0002 * (wanted.start % 3))
        if bad & wanted.spans.keys():
            raise OSError("damaged")
        return memoryview(DATA)[wanted.start : wanted.stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "_IDLE_SECONDS", 0.02)
        ahead = Watched(fetch, threads=case.threads, budget=case.budget)
        chunks = [case.places[i : i + case.chunk] for i in range(0, len(case.places), case.chunk)]
        plans: list[dict[int, Range]] = []
        taken = 0
        for number, chunk in enumerate(chunks):
            while len(plans) < min(number + 2, len(chunks)):
                plans.append(planned_ranges(chunks[len(plans)], case))
                ahead.submit(dict.fromkeys(plans[-1].values()))
            for offset, size in chunk:
                if taken >= case.leave:
                    break
                taken += 1
                holder = plans[number].pop(offset)
                if bad & holder.spans.keys():
                    with pytest.raises(OSError, match=r"^damaged$"):
                        ahead.take(holder, offset)
                else:
                    assert ahead.take(holder, offset) == DATA[offset : offset + size]
        for plan in plans:
            ahead.forget(plan.values())
        assert ahead._held == 0
        assert ahead._running <= case.threads
        ahead.close()
        ahead.join(time.monotonic() + SECONDS)
        assert ahead._running == 0
    largest = max(max(each.size for each in plan.values()) for plan in map(planned_ranges_of(case), chunks))
    wanted = max(
        sum(size for chunk in pair for _, size in chunk) for pair in zip(chunks, [*chunks[1:], []], strict=True)
    )
    assert ahead.most_held <= max(case.budget, wanted) + largest


def planned_ranges_of(case: Case) -> Callable[[list[tuple[int, int]]], dict[int, Range]]:
    return lambda places: planned_ranges(places, case)
