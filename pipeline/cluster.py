"""The only place where a Dask client is made or closed, and where it is decided which cluster it speaks to.

A cluster that is started here lives in a process of its own (`pipeline.cluster_process`). So a training script needs no
`if __name__ == "__main__"` guard, and the cluster goes away with its parent however that one ends, SIGKILL included: it
waits for the end of its standard input.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from distributed import Client

from dynams_stream import errors
from dynams_stream.errors import ScoringError, UsageError
from pipeline.cluster_spec import ClusterSpec, read_cluster_spec
from pipeline.own_python import own_command, own_environment

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
SCHEDULER_FILE_SECONDS = 60
"""How long a scheduler file, and the scheduler that it names, are waited for: the job may start before them."""
WORKER_SECONDS = 300
"""How long a cluster without workers is waited for, at the start of a job or after it has lost the last one."""
CLOSE_SECONDS = 60
MOMENT_SECONDS = 5.0

_worker_seconds: WeakKeyDictionary[Client, float] = WeakKeyDictionary()
"""The same for clusters of a description, which says it."""


@contextmanager
def dask_client(
    client: Client | None = None, *, scheduler: str | None = None, workers: int | None = None, device: str = "cpu"
) -> Iterator[Client]:
    """A client of the cluster that was given, or of one that is started now and ends with the block.

    Args:
        client: a client to use as it is; it is not closed.
        scheduler: where the scheduler comes from: the address of one that runs, such as `tcp://10.0.0.1:8786`; the path
            of its scheduler file (`.json`); the path of a cluster's description (`.toml`, see `pipeline.cluster_spec`),
            which is started; None starts a local cluster.
        workers: processes of a local cluster; by default one per core, or one per GPU for `device="cuda"`.
        device: "cpu", "cuda" or one GPU, "cuda:0".

    Raises:
        UsageError: when the address or the description is wrong, or the scheduler file is none.
        MissingExtraError: when the package that starts the cluster is not installed.
        ScoringError: when the scheduler is not reached, the cluster does not start, or no worker arrives.
    """
    if client is not None:
        yield client
        return
    with ExitStack() as stack:
        spec = _spec_to_start(scheduler, workers, device)
        if spec is not None:
            address = stack.enter_context(started_cluster(spec, device))
            connected = stack.enter_context(_closing(_connect(address)))
            if scheduler is not None:
                _worker_seconds[connected] = spec.first_worker_seconds
            wait_for_a_worker(connected, spec.first_worker_seconds)
        elif str(scheduler).endswith(".json"):
            connected = stack.enter_context(_closing(_connect_by_file(str(scheduler))))
        else:
            connected = stack.enter_context(_closing(_connect(str(scheduler))))
        yield connected


def is_running(scheduler: str | None) -> bool:
    """Whether `scheduler` names one that runs already, rather than a cluster to start."""
    return scheduler is not None and not scheduler.endswith(".toml")


def _spec_to_start(scheduler: str | None, workers: int | None, device: str) -> ClusterSpec | None:
    """The cluster that has to be started; None when it runs already."""
    if scheduler is None:
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be at least 1; got {workers}")
        return ClusterSpec(kind="local", workers=workers)
    if is_running(scheduler):
        return None
    spec = read_cluster_spec(scheduler)
    if spec.kind == "cuda" and device != "cuda":
        raise UsageError(
            f"{scheduler}: kind 'cuda' starts a worker for each GPU; the device must be cuda, not {device}"
        )
    return spec


# ---- connecting ------------------------------------------------------------------------------------------------------


@contextmanager
def _closing(client: Client) -> Iterator[Client]:
    try:
        yield client
    finally:
        client.close()


def _connect(address: str) -> Client:
    try:
        _knock(address)
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except ValueError as error:
        raise UsageError(f"{address!r} is no address of a Dask scheduler: {error}") from error
    except OSError as error:  # it may be there again the next time: no matter of usage
        raise ScoringError(
            f"cannot reach the Dask scheduler at {address}: {error}; see that it runs, then run the same command again"
        ) from error


def _knock(address: str) -> None:
    """Raise at once when nobody listens there: a `Client` that cannot connect takes long, and longer to go away."""
    place = urlsplit(address if "://" in address else f"tcp://{address}")
    if place.scheme not in ("tcp", "tls"):
        return
    if place.hostname is None or place.port is None:
        raise ValueError("an address looks like tcp://host:8786")
    socket.create_connection((place.hostname, place.port), timeout=CONNECT_SECONDS).close()


def _connect_by_file(path: str) -> Client:
    """A client of the scheduler that a file names. The file may appear, or be that of a new scheduler, only later."""
    deadline = time.monotonic() + SCHEDULER_FILE_SECONDS
    while True:
        try:
            return _connect(_address_in(path))
        except (UsageError, ScoringError) as error:
            if time.monotonic() >= deadline:
                raise type(error)(f"{error} ({path} was looked at for {SCHEDULER_FILE_SECONDS} s)") from error
        time.sleep(0.5)


def _address_in(path: str) -> str:
    try:
        with open(path) as file:
            return str(json.load(file)["address"])
    except FileNotFoundError as error:
        raise ScoringError(f"{path}: no such scheduler file; start: dask scheduler --scheduler-file {path}") from error
    except OSError as error:
        raise ScoringError(f"{path}: the scheduler file cannot be read: {error}; see that it may be") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a scheduler file as `dask scheduler` writes it: {error}") from error


# ---- starting --------------------------------------------------------------------------------------------------------


@contextmanager
def started_cluster(spec: ClusterSpec, device: str = "cpu") -> Iterator[str]:
    """A cluster in a process of its own, ended with the block; gives its scheduler's address.

    Raises:
        DynamsError: what kept it from starting.
    """
    with _cluster_process({"spec": spec.model_dump(mode="json"), "device": device}) as answer:
        yield answer["address"]


def job_script(scheduler: str | None) -> str | None:
    """The batch script of one job, where `scheduler` is the description of a cluster of them; else None.

    Raises:
        DynamsError: the description is wrong, or the package that would start the cluster is missing.
    """
    if scheduler is None or is_running(scheduler):
        return None
    spec = read_cluster_spec(scheduler)
    if spec.kind != "slurm":
        return None
    with _cluster_process({"spec": spec.model_dump(mode="json"), "job_script": True}) as answer:
        return str(answer["job_script"])


@contextmanager
def _cluster_process(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `pipeline.cluster_process` answers; it is told to end with the block."""
    command = own_command("pipeline.cluster_process", json.dumps(request))
    # A session of its own: Ctrl-C in the terminal reaches the caller alone, who then ends the cluster in order.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own_environment(), start_new_session=True
    )
    try:
        line = process.stdout.readline() if process.stdout else b""
        if not line:
            raise ScoringError("the Dask cluster did not start; its messages are above")
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        yield answer
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]


# ---- workers ---------------------------------------------------------------------------------------------------------


def wait_for_a_worker(client: Client, seconds: float) -> None:
    """Wait until the cluster has a worker; tell the log when that takes longer than a moment.

    Raises:
        ScoringError: when none arrives.
    """
    moment = min(MOMENT_SECONDS, seconds)
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=moment)
        return
    if seconds > moment:
        logger.warning(f"the Dask cluster has no workers yet; waiting for up to {seconds:g} s")
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=seconds - moment)
            return
    raise ScoringError(
        f"the Dask cluster has no workers after {seconds:g} s; look at its jobs and their logs, then run the same "
        f"command again"
    )


def threads_by_worker(client: Client) -> Mapping[str, int]:
    """How many tasks each worker runs at once, by its address; waits for a worker where there is none.

    Raises:
        ScoringError: when it has no worker and none arrives, or its scheduler is gone.
    """
    try:
        threads = client.nthreads()
        if not threads:
            wait_for_a_worker(client, _worker_seconds.get(client, WORKER_SECONDS))
            threads = client.nthreads()
    except (OSError, CancelledError) as error:
        raise lost_scheduler(client) from error
    return threads  # type: ignore[no-any-return]


def worker_threads(client: Client) -> int:
    """How many tasks the cluster runs at once now.

    Raises:
        ScoringError: when it has no worker and none arrives, or its scheduler is gone.
    """
    return sum(threads_by_worker(client).values())


def lost_scheduler(client: Client) -> ScoringError:
    """What to tell of a scheduler that was there and does not answer any more."""
    address = client.scheduler.address if client.scheduler else "its address"
    return ScoringError(
        f"the connection to the Dask scheduler at {address} is lost; what is done is kept: see that the "
        f"scheduler runs, then run the same command again"
    )
