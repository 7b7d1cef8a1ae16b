"""A run in a process of its own: whatever ends it, a crash of CUDA included, does not end who started it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

logger = logging.getLogger(__name__)

STOP_SECONDS = 90.0
"""How long a process that was told to stop may take to end in order; then it is killed."""


class RunProcess:
    """Runs one command at a time; `stop` may be called from another thread."""

    def __init__(self, command: Sequence[str], *, max_seconds: float | None = None):
        self._command, self._max_seconds = list(command), max_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, *arguments: str) -> int:
        """Run the command with further arguments, and give its exit status (negative: the signal that ended it).

        Its output goes where this process's goes. It is stopped when it runs for longer than `max_seconds`, and when
        this call is left by an exception, such as Ctrl-C. Who is killed himself leaves it to end its work.
        """
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then ends the other in order.
        self._process = subprocess.Popen([*self._command, *arguments], start_new_session=True)
        try:
            if self._stopped:  # before there was a process to stop
                return self._end()
            return self._process.wait(timeout=self._max_seconds)
        except subprocess.TimeoutExpired:
            logger.warning(f"the run has lasted for more than {self._max_seconds:g} s; it is stopped")
            return self._end()
        except BaseException:
            self._end()
            raise

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called: how a command ended then says nothing about it."""
        return self._stopped

    def stop(self) -> None:
        """End the command that runs, if one does, and any that is started later."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._end()

    def _end(self) -> int:
        process = self._process
        assert process is not None
        process.terminate()
        try:
            return process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait()
