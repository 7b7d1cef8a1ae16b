"""Descriptions of clusters: what is refused and in which words, what becomes of the options, and SLURM end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from dask_processes import ENVIRONMENT, wait_until
from fake_slurm import FakeSlurm
from test_score_job import tables

import toy_models
from dynams_stream import ScorerSpec, Store
from dynams_stream.errors import MissingExtraError, ScoringError, UsageError
from pipeline.cluster import dask_client, job_script, worker_threads
from pipeline.cluster_spec import ClusterSpec, SlurmOptions, read_cluster_spec
from pipeline.remote_cluster import dask_cluster_manifest, slurm_arguments
from pipeline.score_job import score_round

SLURM = """
kind = "slurm"
workers = 2
first_worker_seconds = 120

[slurm]
queue = "gpu"
cores = 2
memory = "4GB"
walltime = "00:10:00"
job_extra_directives = ["--gres=gpu:1"]
job_script_prologue = ["module load python"]
"""
LINEAR = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray", batch_size=37)
needs_jobqueue = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed (the extra 'slurm')"
)


def written(folder: Path, text: str) -> str:
    path = folder / "cluster.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('kind = "slurm', r"cluster\.toml: Unterminated string"),
        ("workers = 2", r"cluster\.toml:\n  kind: Field required"),
        ('kind = "pbs"', r"kind: Input should be 'local', 'cuda', 'slurm' or 'kubernetes'"),
        ('kind = "local"\nwrokers = 2', r"wrokers: no such key; docs/clusters\.md lists them"),
        ('kind = "local"\nworkers = 0', r"workers: Input should be greater than or equal to 1"),
        (SLURM + 'quue = "gpu"', r"slurm\.quue: no such key"),
        (SLURM.replace("cores = 2", ""), r"slurm\.cores: Field required"),
        (SLURM.replace("workers = 2", ""), r"kind 'slurm' needs workers = N"),
        ('kind = "local"\n[local]\nqueue = "gpu"', r"local\.queue: no such key"),
        ('kind = "slurm"\nworkers = 2', r"kind 'slurm' needs a table \[slurm\]"),
        ('kind = "local"\n[cuda]', r"kind is 'local', but there is a table \[cuda\]"),
        ('kind = "kubernetes"\nworkers = 1\n[kubernetes]\nmanifest = "a.yaml"', r"manifest: .*/a\.yaml: no such file"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_cluster_spec(written(tmp_path, text))


def test_a_description_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: no such file"), dask_client(scheduler="nowhere.toml"):
        pass


def test_a_cluster_of_gpus_is_not_used_without_them(tmp_path: Path) -> None:
    path = written(tmp_path, 'kind = "cuda"')
    with pytest.raises(UsageError, match="the device must be cuda, not cpu"), dask_client(scheduler=path):
        pass


@pytest.mark.parametrize(
    ("package", "text"),
    [
        ("dask_jobqueue", SLURM),
        ("dask_cuda", 'kind = "cuda"'),
        ("dask_kubernetes", 'kind = "kubernetes"\nworkers = 2\n[kubernetes]\nmanifest = "dask.yaml"'),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, package: str, text: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    (tmp_path / "dask.yaml").write_text(MANIFEST)
    extra = text.split('"')[1]
    with (
        pytest.raises(MissingExtraError, match=rf"pip install 'dynams-stream\[{extra}\]'"),
        dask_client(scheduler=written(tmp_path, text), device="cuda"),
    ):
        pass


def test_a_local_cluster_from_a_description(tmp_path: Path) -> None:
    about = 'kind = "local"\nworkers = 2\nfirst_worker_seconds = 1.5\n'
    path = written(tmp_path, about + '[local]\ncores = 1\nmemory_limit = "900MB"')
    with dask_client(scheduler=path) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [(one["nthreads"], one["memory_limit"]) for one in workers] == [(1, 900_000_000)] * 2
        assert set(client.run(os.getenv, "DYNAMS_CORES").values()) == {"1"}
        client.retire_workers()
        with pytest.raises(ScoringError, match=r"has no workers after 1\.5 s"):  # as long as for the first one
            worker_threads(client)
    assert job_script(path) is None


def test_a_job_books_its_cores_for_one_part_at_a_time() -> None:
    arguments = slurm_arguments(
        SlurmOptions(cores=9, memory="8GB", processes=2, job_script_prologue=("module load x",))
    )
    assert (arguments["cores"], arguments["processes"], arguments["job_cpu"]) == (2, 2, 9)
    assert arguments["job_script_prologue"][:2] == ["export DYNAMS_CORES=4", "export DYNAMS_SHARED_GPUS=1"]
    assert arguments["job_script_prologue"][-1] == "module load x"
    assert "queue" not in arguments


# ---- SLURM, with an sbatch that runs the jobs here -------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.programs}:{os.environ['PATH']}")
    return fake


@needs_jobqueue
def test_a_dry_run_shows_the_job_script(digit_store: Store, tmp_path: Path, slurm: FakeSlurm) -> None:
    torch.save(toy_models.linear().state_dict(), tmp_path / "linear.pt")
    command = [
        sys.executable, "-m", "tools.cli", "score", "--store", digit_store.url, "--checkpoint", tmp_path / "linear.pt",
        "--model", "toy_models:linear", "--transform", "toy_models:gray", "--cluster", written(tmp_path, SLURM),
        "--dry-run",
    ]  # fmt: skip
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    lines = json.loads(done.stdout)["job_script"].splitlines()
    assert lines[0].startswith("#!")
    for line in ("-p gpu", "--cpus-per-task=2", "--mem=4G", "-t 00:10:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in lines
    worker = next(place for place, line in enumerate(lines) if " -m distributed.cli.dask_worker " in line)
    assert "--nthreads 1" in lines[worker]
    assert {"export DYNAMS_CORES=2", "export DYNAMS_SHARED_GPUS=0", "module load python"} <= set(lines[:worker])
    assert not slurm.submitted


@pytest.mark.slow
@needs_jobqueue
def test_scoring_by_batch_jobs(digit_store: Store, tmp_path: Path, slurm: FakeSlurm) -> None:
    torch.save(toy_models.linear().state_dict(), tmp_path / "linear.pt")
    text = SLURM.replace('"module load python"', f'"export PYTHONPATH={ENVIRONMENT["PYTHONPATH"]}"')
    text = text.replace("cores = 2", "cores = 1")
    here = score_round(digit_store, LINEAR, checkpoint=str(tmp_path / "linear.pt"), workers=2)
    expected = tables(digit_store, here.number)
    for table in Path(digit_store.path(f"rounds/{here.number:06d}/scores")).iterdir():
        table.unlink()
    there = score_round(digit_store, LINEAR, checkpoint=str(tmp_path / "linear.pt"), scheduler=written(tmp_path, text))
    assert (there.parts, there.resumed_parts) == (here.parts, 0)
    assert tables(digit_store, there.number).equals(expected)
    assert len(slurm.submitted) == 2
    assert slurm.cancelled == slurm.submitted
    assert all("#SBATCH --gres=gpu:1" in script for script in slurm.scripts)


@pytest.mark.slow
@needs_jobqueue
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_batch_jobs_are_cancelled_when_their_program_is_killed(
    tmp_path: Path, slurm: FakeSlurm, how: signal.Signals
) -> None:
    code = "import sys, time; from pipeline.cluster import dask_client\n"
    code += "with dask_client(scheduler=sys.argv[1]) as client: print('up', flush=True); time.sleep(600)"
    text = SLURM.replace('"module load python"', f'"export PYTHONPATH={ENVIRONMENT["PYTHONPATH"]}"')
    command = [sys.executable, "-c", code, written(tmp_path, text)]
    environment = {**ENVIRONMENT, "PATH": os.environ["PATH"]}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(how)
    process.wait()
    process.stdout.close()
    wait_until(lambda: len(slurm.submitted) == 2 and slurm.cancelled == slurm.submitted)
    wait_until(lambda: not any(psutil.pid_exists(number) for number in slurm.submitted))


@pytest.mark.slow
@needs_jobqueue
def test_what_sbatch_refuses_is_told(tmp_path: Path, slurm: FakeSlurm) -> None:
    path = written(tmp_path, SLURM.replace('"gpu"', '"closed"'))
    complaint = "batch jobs could not be submitted.*invalid partition specified: closed"
    with pytest.raises(ScoringError, match=complaint), dask_client(scheduler=path):
        pass
    assert not slurm.submitted


@needs_jobqueue
def test_what_dask_jobqueue_refuses_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, SLURM.replace("4GB", "much"))
    with pytest.raises(UsageError, match=r"refuses the table \[slurm\].*'much'"):
        job_script(path)


# ---- Kubernetes: the manifest alone, no cluster ----------------------------------------------------------------------

MANIFEST = """
apiVersion: kubernetes.dask.org/v1
kind: DaskCluster
metadata: {name: dynams}
spec:
  worker: {replicas: 1, spec: {}}
  scheduler: {spec: {}, service: {selector: {dask.org/cluster-name: dynams}}}
"""


def test_the_manifest_gets_the_number_of_workers_and_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "dask.yaml").write_text(MANIFEST)
    path = written(tmp_path, 'kind = "kubernetes"\nworkers = 7\n[kubernetes]\nmanifest = "dask.yaml"')
    spec = read_cluster_spec(path)
    assert spec.kubernetes is not None
    manifest = dask_cluster_manifest(spec.kubernetes, spec.workers, "1a2b")
    assert manifest["spec"]["worker"]["replicas"] == 7
    assert manifest["metadata"]["name"] == "dynams-1a2b"
    assert manifest["spec"]["scheduler"]["service"]["selector"] == {"dask.org/cluster-name": "dynams-1a2b"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: b: c", "not one YAML document"),
        ("kind: Pod", "kind is 'Pod'; a DaskCluster is needed"),
        (MANIFEST.replace("worker:", "wroker:"), "not a DaskCluster: 'worker' is missing"),
        ("- 1", "not a DaskCluster"),
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "dask.yaml").write_text(text)
    spec = ClusterSpec(kind="kubernetes", workers=1, kubernetes={"manifest": tmp_path / "dask.yaml"})  # type: ignore[arg-type]
    assert spec.kubernetes is not None
    with pytest.raises(UsageError, match=complaint):
        dask_cluster_manifest(spec.kubernetes, 1, "x")
