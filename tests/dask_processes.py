"""A Dask cluster as people start one by hand: a `dask scheduler` and `dask worker` processes on the loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "DYNAMS_CORES"},
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
}


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look until it is true; fail when it does not become so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.05)


@contextmanager
def process(*command: object, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program of this Python, `-m …`, terminated with the block."""
    running = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env={**ENVIRONMENT, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield running
    finally:
        running.terminate()
        running.wait(timeout=30)


@contextmanager
def scheduler(file: Path) -> Iterator[Path]:
    """A scheduler that writes its scheduler file there."""
    with process("dask", "scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file):
        wait_until(file.exists)
        yield file


@contextmanager
def worker(file: Path, *options: object, cores: int | None = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of that scheduler, named by Dask; it may not have joined yet. `cores` becomes DYNAMS_CORES."""
    environment = {} if cores is None else {"DYNAMS_CORES": str(cores)}
    command = ("dask", "worker", "--scheduler-file", file, "--nthreads", 1, "--no-dashboard", *options)
    with process(*command, environment=environment) as running:
        yield running
