"""A local Dask cluster as a process: `python -m pipeline.local_cluster '{"workers": 2, "device": "cpu"}'`.

Prints one JSON line with the scheduler's address, then lives until its standard input ends.
"""

from __future__ import annotations

import json
import logging
import sys

import dask
import torch
from distributed import LocalCluster

from pipeline.cores import available_cores

# Scores are not kept in Dask's memory, so there is nothing to spill; pausing would only stall a worker whose decoded
# batches fill its memory for a moment.
WORKER_SETTINGS = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.scheduler.allowed-failures": 1,
    "distributed.admin.system-monitor.gil.enabled": False,
}


def cores_per_worker(workers: int) -> int:
    """Cores each of `workers` processes may keep busy."""
    return max(1, available_cores() // workers)


def main() -> None:
    """Start the cluster, say where it is, wait for the end of standard input, stop it."""
    options = json.loads(sys.argv[1])
    gpus = torch.cuda.device_count() if options["device"].startswith("cuda") else 0
    workers = options["workers"] or gpus or available_cores()
    dask.config.set(WORKER_SETTINGS)
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        dashboard_address=None,
        silence_logs=logging.CRITICAL,  # failures of tasks come back as errors; their tracebacks would only hide those
        env={"DYNAMS_CORES": str(cores_per_worker(workers))},
    ) as cluster:
        print(json.dumps({"address": cluster.scheduler_address}), flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
