"""Fetches planned ranges before they are needed: many at a time, in the order of need, within a number of bytes.

    submit [────][──][──────] ──► threads ask, as many as may ──► take(range) waits for its bytes ──► release(range)

A range counts against the budget from the moment it is asked for until it is released. Ranges are begun in the order in
which they are first needed, so that the one that is waited for has always been begun, whatever the budget.

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

_IDLE_SECONDS: Final = 5.0
_EXIT_SECONDS: Final = 5.0


class Range:
    """Some bytes of one shard that are, or will be, under way.

    Attributes:
        shard: number of the shard.
        start, stop: which bytes.
        uses: how many samples still need it.
        wanted: (offset, size) of each sample that it was planned for.
    """

    __slots__ = ("begun", "data", "error", "shard", "start", "stop", "uses", "wanted")

    def __init__(self, shard: int, start: int, stop: int):
        self.shard, self.start, self.stop = shard, start, stop
        self.uses = 0
        self.wanted: list[tuple[int, int]] = []
        self.begun = False
        self.data: memoryview | None = None
        self.error: Exception | None = None

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


class ReadAhead:
    """Fetches ranges in threads.

    Args:
        fetch: gives the bytes of a range, or raises; it is told by an event when nobody needs them any more.
        threads: how many ranges are fetched at a time, at most.
        budget: bytes that may be under way or held. One range is always allowed, and so is one that is waited for.
    """

    def __init__(self, fetch: Callable[[Range, threading.Event], Any], *, threads: int, budget: int):
        self._fetch = fetch
        self._most = threads
        self._budget = budget
        self._queue: deque[Range] = deque()
        self._held = 0
        self._running = 0
        self._idle = 0
        self._overdue = False
        mutex = threading.Lock()
        self._work = threading.Condition(mutex)
        self._arrived = threading.Condition(mutex)
        self._stopped = threading.Event()
        self.waited = 0.0
        """Seconds in which `take` has waited."""
        _LIVE.add(self)

    def submit(self, ranges: Iterable[Range]) -> None:
        """Have these fetched too, after those that were submitted before."""
        with self._work:
            self._queue.extend(ranges)
            wanted = min(self._most, self._running + len(self._queue) - self._idle)
            while self._running < wanted:
                self._running += 1
                threading.Thread(target=self._run, name="dynams-read-ahead", daemon=True).start()
            self._work.notify(len(self._queue))

    def take(self, wanted: Range) -> memoryview:
        """The bytes of a range that was submitted; waits for them.

        Raises:
            Exception: whatever fetching it raised.
        """
        if wanted.data is None and wanted.error is None:
            began = time.perf_counter()
            with self._arrived:
                if not wanted.begun:  # ranges that are needed longer fill the budget
                    self._queue.remove(wanted)
                    self._queue.appendleft(wanted)
                    self._overdue = True
                    self._work.notify()
                while wanted.data is None and wanted.error is None:
                    self._arrived.wait()
            self.waited += time.perf_counter() - began
        if wanted.error is not None:
            raise wanted.error
        assert wanted.data is not None
        return wanted.data

    def release(self, done: Range) -> None:
        """Let go of a range's bytes: nobody needs them any more."""
        with self._work:
            done.data = None
            if done.begun:
                done.begun = False
                self._held -= done.size
                self._work.notify()

    def forget(self, ranges: Iterable[Range]) -> None:
        """Let go of ranges, those that are only waiting their turn included."""
        dropped = set(ranges)
        with self._work:
            self._queue = deque(each for each in self._queue if each not in dropped)
        for each in dropped:
            self.release(each)

    def close(self) -> None:
        """Begin nothing more; what is under way ends by itself."""
        self._stopped.set()
        with self._work:
            self._queue.clear()
            self._work.notify_all()

    def join(self, deadline: float) -> None:
        """Wait until no thread is left, at most until `time.monotonic()` is `deadline`."""
        with self._arrived:
            while self._running and time.monotonic() < deadline:
                self._arrived.wait(0.05)

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (mine := self._next()) is not None:
            data, error = None, None
            try:
                data = memoryview(self._fetch(mine, self._stopped))
            except Exception as failure:  # noqa: BLE001 (raised where the bytes are needed)
                error = failure
            with self._arrived:
                if mine.begun:  # else it was let go of meanwhile
                    mine.data, mine.error = data, error
                    self._arrived.notify_all()

    def _next(self) -> Range | None:
        """The next range to fetch; None when the thread shall end."""
        with self._work:
            self._idle += 1
            patient = True
            while not self._stopped.is_set():
                if self._queue and self._may_begin(self._queue[0]):
                    mine = self._queue.popleft()
                    mine.begun, self._overdue = True, False
                    self._held += mine.size
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
        return self._held == 0 or self._held + first.size <= self._budget or self._overdue


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
