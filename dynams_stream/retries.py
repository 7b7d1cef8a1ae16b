"""The one retry layer: tries again what may pass, ever more seldom, until a deadline; asks for less when told to.

    wait before try n + 1 = random(0, min(longest, first · 2ⁿ)) seconds          "full jitter"

(Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.) `SlowDown` halves the number of requests
that may be under way; each answer raises it by a little again, as TCP does with its window (RFC 5681).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from dynams_stream.errors import ShardChangedError, ShardUnreadableError
from dynams_stream.read_ahead import StoppedError
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.transport import TransientError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 10.0
_SHORT_ANSWERS: Final = 4  # so many in a row are no accident: the object has become shorter
_HALVE_AGAIN: Final = 0.5  # seconds; requests that were under way together count as one sign


class Retries:
    """Tries requests until they succeed, for all threads of a process.

    Args:
        options: how many at a time, and how long.
        count: told `requests=`, `retries=` and `slow_downs=` as they happen.
        advice: what else can be done when the deadline has passed, for the message.
    """

    def __init__(
        self, options: RemoteOptions, count: Callable[..., None], advice: str = "raise RemoteOptions(deadline=…)"
    ):
        self._deadline, self._advice = options.deadline, advice
        self._count = count
        self.allowance = Allowance(options.in_flight)
        self._warned: set[str] = set()
        self._random = random.Random()  # the user's global random state stays as it is

    def until_done(self, ask: Callable[[], T], url: str, what: str, stopped: threading.Event) -> T:
        """What `ask` returns, however often it takes.

        Args:
            ask: makes one request; raises TransientError when it may be made again.
            url: the object, and `what` of it is asked for; for the message.
            stopped: ends the waiting early.

        Raises:
            StoppedError: when `stopped` was set before it succeeded.
            ShardUnreadableError: when it did not succeed before the deadline.
            ShardChangedError: when the store gives fewer bytes than there were, again and again.
        """
        began = time.monotonic()
        tries = short = 0
        while True:
            with self.allowance.one():
                self._count(requests=1, retries=int(tries > 0))
                try:
                    answer = ask()
                except TransientError as error:
                    failure = error
                else:
                    self.allowance.grow()
                    return answer
            tries += 1
            short = short + 1 if failure.short else 0
            if failure.slow_down:
                self._count(slow_downs=1)
                self.allowance.halve()
            if short >= _SHORT_ANSWERS:
                raise ShardChangedError(str(failure), shard=url) from failure
            wait = self._random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(tries - 1, 20)))
            left = began + self._deadline - time.monotonic()
            if wait >= left:
                raise ShardUnreadableError(
                    f"{url}: {what} could not be had in {self._deadline:g} s: {tries} requests failed, the last one: "
                    f"{failure}; see that the store answers, or {self._advice}",
                    shard=url,
                ) from failure
            self._warn(url, failure)
            if stopped.wait(wait):
                raise StoppedError from failure

    def _warn(self, url: str, failure: TransientError) -> None:
        """Say once of each store that requests to it fail."""
        root = "/".join(url.split("/", 3)[:3])
        if root not in self._warned:
            self._warned.add(root)
            logger.warning("%s: a request failed and is tried again: %s", root, failure)


class Allowance:
    """How many requests may be under way: halved when the store asks for fewer, raised again with each answer.

    Args:
        most: where it begins, and the most it is raised to.
    """

    def __init__(self, most: int):
        self.limit = float(most)
        self._most = most
        self._under_way = 0
        self._halved_at = -1.0
        self._changed = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Waits for a place, and keeps it for the block."""
        with self._changed:
            while self._under_way >= max(1, int(self.limit)):
                self._changed.wait()
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()

    def halve(self) -> None:
        """The store asks for fewer requests."""
        with self._changed:
            now = time.monotonic()
            if now - self._halved_at >= _HALVE_AGAIN:
                self._halved_at = now
                self.limit = max(1.0, self.limit / 2)

    def grow(self) -> None:
        """A request succeeded: one more for each whole round of answers."""
        if self.limit < self._most:
            with self._changed:
                self.limit = min(float(self._most), self.limit + 1 / self.limit)
                self._changed.notify()
