"""What a worker process may use of its machine: how many cores, which GPU, and memory that it has freed."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Mapping

import psutil
import torch
from distributed import get_worker

from dynams_stream.errors import ScoringError, UsageError
from pipeline.cores import available_cores

_DASKS_TRIM_THRESHOLD = "65536"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _LARGEST_KEPT_BYTES = 256 << 20, 32 << 20


def keep_freed_memory() -> None:
    """Let the allocator keep what images and batches free for the next ones, where Dask has told it not to.

    Dask's nanny starts workers with MALLOC_TRIM_THRESHOLD_=65536. glibc gives the pages of each decoded image back to
    the system then and gets them again, zeroed, for the next one, a page fault each. Another value was set by somebody
    who wants it, and stays.
    """
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") != _DASKS_TRIM_THRESHOLD or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def worker_cores() -> int:
    """Cores that one part may keep busy in this worker.

    `DYNAMS_CORES` says it. Without that, as in a plain `dask worker`, it is this worker's share of the cores that its
    process may use: they are divided by its Dask threads and by the worker processes that the same program started
    beside it (`--nworkers`).

    Raises:
        UsageError: DYNAMS_CORES is not a number from 1 on.
    """
    told = os.environ.get("DYNAMS_CORES")
    if told is None:
        return max(1, available_cores() // (_dask_threads() * _worker_processes()))
    if not told.isdecimal() or int(told) < 1:
        raise UsageError(f"DYNAMS_CORES is {told!r} on this worker; it is the number of cores for one part, from 1 on")
    return int(told)


def _dask_threads() -> int:
    try:
        return get_worker().state.nthreads
    except ValueError:  # not in a worker
        return 1


def _worker_processes() -> int:
    """How many workers share the cores of this process: those that its parent has started, itself included."""
    try:
        siblings = psutil.Process().parent().children()  # type: ignore[union-attr]
        return max(1, sum("--multiprocessing-fork" in process.cmdline() for process in siblings))
    except (psutil.Error, AttributeError):
        return 1


def worker_device(device: str) -> str:
    """The device of this worker: "cpu", or which of the GPUs that it sees.

    Raises:
        ScoringError: several GPUs are seen, and nothing tells which one is this worker's.
    """
    if device != "cuda":
        return device
    return f"cuda:{own_gpu(get_worker().name, torch.cuda.device_count(), os.environ)}"


def own_gpu(name: object, gpus: int, environment: Mapping[str, str]) -> int:
    """Which of the GPUs that a worker sees is its own.

    | started by | the worker sees | its own |
    |---|---|---|
    | SLURM with `--gres=gpu:1`, a pod | one | that one |
    | SLURM, several `processes` in a job | the job's | by its number: 3, SLURMCluster-0-3 |
    | dask-cuda, `CUDA_VISIBLE_DEVICES=3 dask worker` | the ones that CUDA_VISIBLE_DEVICES names | the first of them |
    | our local cluster, `dask worker --nworkers 8 --name gpu` | the whole machine's | by its number: 3, gpu-3 |

    DYNAMS_SHARED_GPUS says what the two that we start know: 1, the numbers are those of the workers that share the
    GPUs; 0, they are not, as workers of other jobs have the same ones.

    Args:
        name: the worker's name.
        gpus: how many it sees.
        environment: its environment.

    Raises:
        ScoringError: none of these: all workers of a machine would take the same GPU.
    """
    shared = environment.get("DYNAMS_SHARED_GPUS", "")
    if gpus <= 1 or ("CUDA_VISIBLE_DEVICES" in environment and shared != "1"):
        return 0
    number = re.fullmatch(r"(?:.*-)?(\d+)", str(name))
    if number is None or shared == "0":
        raise ScoringError(
            f"worker {name!r} sees {gpus} GPUs, and nothing tells which one is its own: start it by dask cuda worker, "
            f"with CUDA_VISIBLE_DEVICES (SLURM sets it for --gres=gpu:1), or with a number at the end of its name "
            f"(--name gpu-0)"
        )
    return int(number[1]) % gpus
