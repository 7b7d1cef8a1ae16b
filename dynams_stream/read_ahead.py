"""Fetches planned ranges before they are needed: many at a time, in the order of need, within a number of bytes.

    submit [────][──][──────] ──► threads ask, as many as may ──► cut into spans ──► take(range, offset)

A range counts against the budget from the moment it is asked for. When its bytes are here, what was read between the
wanted spans is dropped, and each span counts until it is taken. Ranges are begun in the order in which they are first
needed.

Threads are started when there is work and end when there has been none for some seconds. Nothing here survives a fork:
a `ReadAhead` belongs to the process that made it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from dynams_stream.errors import ShardUnreadableError

_IDLE_SECONDS: Final = 5.0
_EXIT_SECONDS: Final = 5.0


class StoppedError(Exception):
    """A fetch was given up because it was told to, not because it had failed."""


class Range:
    """Some bytes of one shard that are, or will be, under way.

    Attributes:
        shard: number of the shard.
        start, stop: which bytes.
        spans: offset and size of the spans that are wanted of it here.
        others: the same of spans that other processes want.
    """

    __slots__ = ("begun", "error", "held", "left", "others", "overdue", "shard", "spans", "start", "stop", "stopped")

    def __init__(self, shard: int, start: int, stop: int):
        self.shard, self.start, self.stop = shard, start, stop
        self.spans: dict[int, int] = {}
        self.others: dict[int, int] = {}
        self.left: dict[int, bytes] | None = None  # the spans that are here and were not taken yet
        self.error: BaseException | None = None
        self.begun = self.overdue = False
        self.held = 0
        self.stopped = threading.Event()  # ends the waiting of who fetches it

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start

    def cut(self, data: memoryview) -> dict[int, bytes]:
        """The wanted spans of its bytes."""
        return {offset: bytes(data[offset - self.start : offset - self.start + n]) for offset, n in self.spans.items()}


class ReadAhead:
    """Fetches ranges in threads.

    Args:
        fetch: gives the bytes of a range, or raises; the range's event tells it when nobody needs them any more, or
            when they had better be fetched elsewhere, and then it may raise StoppedError.
        threads: how many ranges are fetched at a time, at most.
        budget: bytes that may be under way or held. One range is always allowed, and so is one that is waited for.
    """

    def __init__(self, fetch: Callable[[Range], Any], *, threads: int, budget: int):
        self._fetch = fetch
        self._most = threads
        self._budget = budget
        self._queue: deque[Range] = deque()
        self._under_way: set[Range] = set()
        self._held = 0
        self._running = 0
        self._idle = 0
        self._closed = False
        mutex = threading.Lock()
        self._work = threading.Condition(mutex)
        self._arrived = threading.Condition(mutex)
        self.waited = 0.0
        """Seconds in which `take` has waited."""
        _LIVE.add(self)

    def submit(self, ranges: Iterable[Range]) -> None:
        """Have these fetched too, after those that were submitted before.

        Raises:
            ShardUnreadableError: when there is no thread, and none can be started.
        """
        more = list(ranges)
        with self._work:
            wanted = min(self._most, self._running + len(self._queue) + len(more) - self._idle)
            while self._running < wanted and self._start_thread():
                self._running += 1
            self._queue.extend(more)
            self._work.notify(len(self._queue))

    def _start_thread(self) -> bool:
        """Whether one could be started; without it the others have more to do."""
        try:
            threading.Thread(target=self._run, name="dynams-read-ahead", daemon=True).start()
        except RuntimeError as error:
            if not self._running:
                advice = "let the process have more threads (ulimit -u, or the container's limit of processes)"
                raise ShardUnreadableError(f"nothing can be fetched from object stores ({error}); {advice}") from error
            return False
        return True

    def take(self, wanted: Range, offset: int) -> bytes:
        """A span of a range that was submitted; waits for it, or fetches it here after `close`. Each can be taken once.

        Raises:
            Exception: whatever fetching the range raised.
        """
        if wanted.left is None and wanted.error is None:
            began = time.perf_counter()
            self._wait_for(wanted)
            self.waited += time.perf_counter() - began
        if wanted.error is not None:
            raise wanted.error
        assert wanted.left is not None
        data = wanted.left.pop(offset)
        with self._work:
            self._let_go(wanted, len(data))
        return data

    def _wait_for(self, wanted: Range) -> None:
        while True:
            with self._arrived:
                while wanted.left is None and wanted.error is None and (wanted.begun or not self._closed):
                    if not wanted.begun and not wanted.overdue:
                        self._hasten(wanted)
                    self._arrived.wait()
                if wanted.left is not None or wanted.error is not None:
                    return
                self._begin(wanted)
            self._bring(wanted)

    def _hasten(self, wanted: Range) -> None:
        """Have a range begun next, whatever is held: that is needed later, and fills the budget. The mutex is held."""
        self._queue.remove(wanted)
        self._queue.appendleft(wanted)
        wanted.overdue = True
        self._work.notify()

    def forget(self, ranges: Iterable[Range]) -> None:
        """Let go of ranges, those that are only waiting their turn included."""
        dropped = set(ranges)
        with self._work:
            self._queue = deque(each for each in self._queue if each not in dropped)
            for each in dropped:
                each.begun = False
                each.stopped.set()
                self._let_go(each, each.held)

    def _let_go(self, holder: Range, size: int) -> None:
        """Bytes that do not count any more; the condition is held."""
        holder.held -= size
        self._held -= size
        if self._queue and self._may_begin(self._queue[0]):
            self._work.notify()

    def close(self) -> None:
        """Begin nothing more here, and try nothing again; who still takes a range fetches it."""
        with self._work:
            self._closed = True
            self._queue.clear()
            for each in self._under_way:
                each.stopped.set()
            self._work.notify_all()
            self._arrived.notify_all()

    def join(self, deadline: float) -> None:
        """Wait until no thread is left, at most until `time.monotonic()` is `deadline`."""
        with self._arrived:
            while self._running and time.monotonic() < deadline:
                self._arrived.wait(0.05)

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (mine := self._next()) is not None:
            self._bring(mine)

    def _bring(self, mine: Range) -> None:
        """Fetch a range that was begun."""
        spans, error = None, None
        try:
            spans = mine.cut(memoryview(self._fetch(mine)))
        except StoppedError:
            pass
        except BaseException as failure:  # noqa: BLE001 (raised where the bytes are needed; a panic in Rust is no Exception)
            error = failure
        with self._arrived:
            self._under_way.discard(mine)
            if mine.begun:  # else it was let go of meanwhile
                mine.left, mine.error = spans, error
                mine.begun = spans is not None or error is not None  # else who needs it begins it again
                self._let_go(mine, mine.held - sum(map(len, (spans or {}).values())))
                self._arrived.notify_all()

    def _begin(self, mine: Range) -> None:
        """Count a range as under way; the condition is held."""
        mine.begun, mine.held = True, mine.size
        mine.stopped.clear()
        self._under_way.add(mine)
        self._held += mine.size

    def _next(self) -> Range | None:
        """The next range to fetch; None when the thread shall end."""
        with self._work:
            self._idle += 1
            patient = True
            while not self._closed:
                if self._queue and self._may_begin(self._queue[0]):
                    mine = self._queue.popleft()
                    self._begin(mine)
                    self._idle -= 1
                    if self._queue and self._may_begin(self._queue[0]):
                        self._work.notify()
                    return mine
                if not self._queue and not patient:
                    break
                patient = self._work.wait(_IDLE_SECONDS)
            self._idle -= 1
            self._running -= 1
            return None

    def _may_begin(self, first: Range) -> bool:
        return self._held == 0 or self._held + first.size <= self._budget or first.overdue


_LIVE: Final[weakref.WeakSet[ReadAhead]] = weakref.WeakSet()


os.register_at_fork(after_in_child=_LIVE.clear)  # a child has none of the threads, and locks as they happened to be


@atexit.register
def _end_threads() -> None:
    """Threads that come back from a request while the interpreter is taken down would crash it: let them end before."""
    deadline = time.monotonic() + _EXIT_SECONDS
    live = list(_LIVE)
    for each in live:
        each.close()
    for each in live:
        each.join(deadline)
