"""A run in a process of its own: whatever ends it, a crash of CUDA included, does not end who started it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

STOP_SECONDS = 90.0
"""How long a process that was told to stop may take to end in order; then it is killed."""


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        status: the command's exit status; negative: the signal that ended it.
        too_long: whether it was stopped because it lasted too long.
    """

    status: int
    too_long: bool = False


def run_process(
    command: Sequence[str], *, max_seconds: float | None = None, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a command to its end. Its output goes where this process's goes.

    It is stopped when it runs for longer than `max_seconds`, and when this call is left by an exception, such as
    Ctrl-C. Who is killed himself leaves it to end its work.

    Raises:
        OSError: it could not be started.
    """
    process = None
    try:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then ends the other in order.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        return Ended(process.wait(timeout=max_seconds))
    except subprocess.TimeoutExpired:
        assert process is not None
        return Ended(_end(process), too_long=True)
    except BaseException:
        if process is not None:
            _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
