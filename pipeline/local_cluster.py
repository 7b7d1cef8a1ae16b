"""Dask clusters on this machine: worker processes for its cores, or one for each GPU."""

from __future__ import annotations

import logging
import os
from typing import Any

import dask
import torch
from distributed import LocalCluster

from dynams_stream.errors import MissingExtraError, UsageError
from pipeline.cluster_spec import ClusterSpec, CudaOptions, LocalOptions
from pipeline.cores import available_cores

# Scores are not kept in Dask's memory, so there is nothing to spill; pausing would only stall a worker whose decoded
# batches fill its memory for a moment. Dask's profiler would look at all threads a hundred times a second.
WORKER_SETTINGS = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.profile.enabled": False,
    "distributed.scheduler.allowed-failures": 1,
    "distributed.admin.system-monitor.gil.enabled": False,
}


def start_local(spec: ClusterSpec, device: str) -> LocalCluster:
    """Workers of one Dask thread each; the machine's cores, and its GPUs for `device="cuda"`, are shared among them.

    Raises:
        UsageError: the machine has no such GPU.
    """
    options = spec.local or LocalOptions()
    cores = min(options.cores or available_cores(), available_cores())
    gpus = gpus_to_use(device, torch.cuda.device_count())
    workers = spec.workers or gpus or cores
    dask.config.set(WORKER_SETTINGS)
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # its server's: the default is another job's, and warns
        silence_logs=logging.CRITICAL,  # failures of tasks come back as errors; their tracebacks would only hide those
        env={"DYNAMS_CORES": str(max(1, cores // workers)), "DYNAMS_SHARED_GPUS": "1"},
        **_given(options, "memory_limit", "local_directory"),
    )


def gpus_to_use(device: str, there: int) -> int:
    """How many of a machine's GPUs a device means: all for "cuda", one for "cuda:1".

    Raises:
        UsageError: there are not so many.
    """
    if not device.startswith("cuda"):
        return 0
    number = device.partition(":")[2]
    if there <= int(number or 0):
        shown = f"{there} GPUs, cuda:0 … cuda:{there - 1}" if there else "no GPU"
        raise UsageError(f"--device {device}: PyTorch finds {shown} on this machine; see nvidia-smi")
    return 1 if number else there


def start_cuda(spec: ClusterSpec) -> LocalCluster:
    """One worker for each GPU, by dask-cuda, which shows each worker its own GPU first.

    Raises:
        MissingExtraError: dask-cuda is not installed.
    """
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingExtraError("kind 'cuda' needs dask-cuda: pip install 'dynams-stream[cuda]'") from error
    options = spec.cuda or CudaOptions()
    gpus = len(options.visible_devices.split(",")) if options.visible_devices else torch.cuda.device_count()
    os.environ["DYNAMS_CORES"] = str(max(1, available_cores() // (spec.workers or gpus or 1)))  # workers inherit it
    dask.config.set(WORKER_SETTINGS)
    return LocalCUDACluster(
        CUDA_VISIBLE_DEVICES=options.visible_devices,
        n_workers=spec.workers,
        threads_per_worker=1,
        **_given(options, "memory_limit", "device_memory_limit", "local_directory"),
    )


def _given(options: Any, *names: str) -> dict[str, Any]:
    """The options that the file names; the others keep the package's defaults."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}
