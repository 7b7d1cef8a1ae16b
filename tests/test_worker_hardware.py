"""Which cores and which GPU a worker takes, by who started it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from dask_processes import scheduler, wait_until, worker
from distributed import Client
from typer.testing import CliRunner

from dynams_stream import ScorerSpec
from dynams_stream.errors import ScoringError, UsageError
from pipeline.cluster import dask_client
from pipeline.cores import available_cores
from pipeline.local_cluster import gpus_to_use
from pipeline.worker_hardware import own_gpu, worker_cores, worker_device
from tools.score_shards import app

ROOT = Path(__file__).resolve().parents[1]
SPEC = ScorerSpec(model="toy_models:linear")
ONE_CHOSEN = {"CUDA_VISIBLE_DEVICES": "3"}
ROTATED = {"CUDA_VISIBLE_DEVICES": "3,0,1,2"}
SHARED = {"CUDA_VISIBLE_DEVICES": "2,3", "DYNAMS_SHARED_GPUS": "1"}

JOB_OF_FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "DYNAMS_SHARED_GPUS": "1"}


@pytest.mark.parametrize(
    ("who", "name", "gpus", "environment", "expected"),
    [
        ("SLURM with --gres=gpu:1", "SLURMCluster-5", 1, ONE_CHOSEN, 0),
        ("a pod with one GPU", "dynams-default-worker-3f2a", 1, {}, 0),
        ("a plain worker on a machine with one GPU", "tcp://10.0.0.1:40331", 1, {}, 0),
        ("dask-cuda, whose names are numbers", 3, 4, ROTATED, 0),
        ("CUDA_VISIBLE_DEVICES=2,3 dask worker", "tcp://10.0.0.1:40331", 2, {"CUDA_VISIBLE_DEVICES": "2,3"}, 0),
        ("the local cluster", 3, 8, {"DYNAMS_SHARED_GPUS": "1"}, 3),
        ("the local cluster of more workers than GPUs", 5, 4, {"DYNAMS_SHARED_GPUS": "1"}, 1),
        ("the local cluster of a job that sees two GPUs", 1, 2, SHARED, 1),
        ("the user's own LocalCluster", 2, 4, {}, 2),
        ("dask worker --nworkers 8 --name gpu", "gpu-6", 8, {}, 6),
        ("no GPU at all", "x", 0, {}, 0),
        ("SLURM, process 3 of a job with four GPUs", "SLURMCluster-0-3", 4, JOB_OF_FOUR, 3),
        ("SLURM, process 2 of a job that has the node", "SLURMCluster-8-2", 4, {"DYNAMS_SHARED_GPUS": "1"}, 2),
        ("SLURM, one process, --gres=gpu:1", "SLURMCluster-3", 1, {**ONE_CHOSEN, "DYNAMS_SHARED_GPUS": "0"}, 0),
        ("SLURM, one process, --gres=gpu:4", "SLURMCluster-3", 4, {**ROTATED, "DYNAMS_SHARED_GPUS": "0"}, 0),
    ],
)
def test_each_worker_takes_its_own_gpu(
    who: str, name: object, gpus: int, environment: dict[str, str], expected: int
) -> None:
    assert own_gpu(name, gpus, environment) == expected, who


def test_workers_that_would_all_take_the_same_gpu_are_refused() -> None:
    with pytest.raises(ScoringError, match=r"'tcp://10\.0\.0\.1:40331' sees 8 GPUs.*--name gpu-0"):
        own_gpu("tcp://10.0.0.1:40331", 8, {})
    with pytest.raises(ScoringError, match=r"'SLURMCluster-4' sees 4 GPUs.*SLURM sets it for --gres=gpu:1"):
        own_gpu("SLURMCluster-4", 4, {"DYNAMS_SHARED_GPUS": "0"})  # other jobs on the node may be -0 and -8


@pytest.mark.parametrize(
    ("device", "there", "expected"), [("cpu", 4, 0), ("cuda", 4, 4), ("cuda:0", 4, 1), ("cuda:3", 4, 1), ("mps", 0, 0)]
)
def test_a_device_of_one_gpu_means_one_worker(device: str, there: int, expected: int) -> None:
    assert gpus_to_use(device, there) == expected


@pytest.mark.parametrize(
    ("device", "there", "complaint"),
    [("cuda", 0, "--device cuda: PyTorch finds no GPU"), ("cuda:4", 4, "finds 4 GPUs, cuda:0 … cuda:3 on this")],
)
def test_a_gpu_that_is_not_there_is_refused(device: str, there: int, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        gpus_to_use(device, there)


@pytest.mark.parametrize("device", ["cpuu", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:1", "xla", ""])
def test_a_device_that_nothing_is_scored_on_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=r"the device is cpu, cuda, one GPU as cuda:0, or mps; got"):
        SPEC.resolved(["png", "cls"], device)


def test_the_command_line_refuses_a_device_that_is_none() -> None:
    options = ["--store", "s", "--model", "m:f", "--checkpoint", "c.pt", "--device", "cpuu"]
    error = CliRunner().invoke(app, options).exception
    assert isinstance(error, UsageError)
    assert "got 'cpuu'" in str(error)


FAULTS = """
import resource
from pipeline.worker_hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(1000):
        bytearray(300_000)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 1000

before = faults()
keep_freed_memory()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_kept_where_dask_would_give_it_back() -> None:
    found = {}
    for threshold in ("65536", "65537"):
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": threshold}
        program = [sys.executable, "-c", FAULTS]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
        found[threshold] = [int(count) for count in done.stdout.split()]
    pages = 300_000 // 4096
    assert found["65536"] == [pytest.approx(pages, abs=3), 0]
    assert found["65537"][1] == pytest.approx(pages, abs=3), "a value of somebody's own stays"


def test_a_device_that_is_named_is_taken() -> None:
    assert (worker_device("cpu"), worker_device("cuda:1")) == ("cpu", "cuda:1")


def test_cores_are_those_that_were_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMS_CORES", "5")
    assert worker_cores() == 5
    monkeypatch.setenv("DYNAMS_CORES", "all")
    with pytest.raises(UsageError, match="DYNAMS_CORES is 'all' on this worker"):
        worker_cores()


def test_the_local_cluster_shares_the_machine(client: Client) -> None:
    assert client.submit(worker_cores, pure=False).result() == max(1, available_cores() // 2)


@pytest.mark.slow
def test_a_plain_worker_takes_its_share_of_the_cores(tmp_path: Path) -> None:
    with (
        scheduler(tmp_path / "scheduler.json") as file,
        worker(file, "--nworkers", 2, "--name", "pair", cores=None),
        worker(file, "--nthreads", 2, "--name", "threads", cores=None),
        worker(file, "--name", "alone", cores=None),
        dask_client(scheduler=str(file)) as client,
    ):
        wait_until(lambda: len(client.nthreads()) == 4)
        found = {
            name: client.submit(worker_cores, workers=[name], pure=False) for name in ("alone", "pair-0", "pair-1")
        }
        cores = {name: future.result() for name, future in found.items()}
        half = max(1, available_cores() // 2)
        assert cores == {"alone": available_cores(), "pair-0": half, "pair-1": half}
        assert client.submit(worker_cores, workers=["threads"], pure=False).result() == half
