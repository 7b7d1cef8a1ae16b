"""A lock that survives a fork."""

from __future__ import annotations

import os
import threading
from typing import Any


class OwnMutex:
    """A lock for each process: one that a thread held while it was forked would never be free in the child."""

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnMutex, ()

    def own(self) -> threading.Lock:
        """This process's lock."""
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        return self._lock
