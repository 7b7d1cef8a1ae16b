"""A contender's process, as `streaming.py` sees it: started, asked, ended. `peers/protocol.py` is the other side."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

PATIENCE = 300.0  # seconds for an answer; a check streams a whole epoch


class ContenderError(Exception):
    """A contender cannot be measured."""


class ContenderProcess:
    """One contender.

    Args:
        name: what it is called.
        command: how it is started.
        environment: variables besides those of this process.

    Attributes:
        about: the package's version and how it reads, once a round is open.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self.about: dict[str, Any] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            start_new_session=True,  # its workers are its own, and end with it
        )

    @property
    def has_ended(self) -> bool:
        """Whether it can be asked nothing any more."""
        return self._process.poll() is not None

    def open(self, fraction: str) -> None:
        """Have it stream another round.

        Raises:
            ContenderError: when it cannot.
        """
        self.about = self.ask(f"open {fraction}")

    def ask(self, command: str) -> dict[str, Any]:
        """Tell it something, and wait for the answer.

        Raises:
            ContenderError: when it ends, or does not answer in time.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: told below
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
        return self._answer(command)

    def _answer(self, command: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        answers = self._process.stdout.fileno()
        deadline = time.monotonic() + PATIENCE
        received = b""
        while not received.endswith(b"\n"):
            if not select.select([answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ContenderError(f"{self.name}: no answer to {command!r} in {PATIENCE:.0f} s; {self._last_words()}")
            block = os.read(answers, 1 << 16)
            if not block:
                raise ContenderError(f"{self.name}: ended at {command!r}; {self._last_words()}")
            received += block
        answer: dict[str, Any] = json.loads(received)
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return " | ".join(lines[-3:])

    def close(self) -> None:
        """End it and its workers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
