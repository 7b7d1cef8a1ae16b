"""The only place where a Dask client is made or closed.

Without a client or a scheduler's address, a local cluster is started in a process of its own
(`pipeline.local_cluster`). So a training script needs no `if __name__ == "__main__"` guard, and the cluster goes away
with its parent however that one ends, SIGKILL included: it waits for the end of its standard input.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client

from dynams_stream.errors import ScoringError, UsageError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
WORKER_SECONDS = 60


@contextmanager
def dask_client(
    client: Client | None = None, *, scheduler: str | None = None, workers: int | None = None, device: str = "cpu"
) -> Iterator[Client]:
    """A client of the cluster that was given, or of a local one that ends with the block.

    Args:
        client: a client to use as it is; it is not closed.
        scheduler: address of a running scheduler, such as `tcp://10.0.0.1:8786`.
        workers: processes of a local cluster; by default one per core, or one per GPU for `device="cuda"`.
        device: "cpu" or "cuda".

    Raises:
        UsageError: when the scheduler cannot be reached.
        ScoringError: when the local cluster does not start.
    """
    if client is not None:
        yield client
    elif scheduler is not None:
        with _connect(scheduler) as connected:
            yield connected
    else:
        with local_cluster(workers, device=device) as address, _connect(address) as connected:
            yield connected


@contextmanager
def _connect(address: str) -> Iterator[Client]:
    try:
        connected = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"cannot reach the Dask scheduler at {address}: {error}; is it running?") from error
    try:
        yield connected
    finally:
        connected.close()


@contextmanager
def local_cluster(workers: int | None = None, *, device: str = "cpu") -> Iterator[str]:
    """A local cluster in a process of its own; gives its scheduler's address.

    Args:
        workers: worker processes, one Dask thread each; by default one per core or GPU.
        device: "cpu" or "cuda".
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1; got {workers}")
    command = [sys.executable, "-m", "pipeline.local_cluster", json.dumps({"workers": workers, "device": device})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # A session of its own: Ctrl-C in the terminal reaches the caller alone, who then ends the cluster in order.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        line = process.stdout.readline() if process.stdout else b""
        if not line:
            raise ScoringError("the local Dask cluster did not start; its messages are above")
        yield json.loads(line)["address"]
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def worker_threads(client: Client) -> int:
    """How many tasks the cluster runs at once.

    Raises:
        ScoringError: when no worker arrives.
    """
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError as error:
        raise ScoringError(f"the Dask cluster has no workers after {WORKER_SECONDS} s") from error
    return sum(client.nthreads().values())
