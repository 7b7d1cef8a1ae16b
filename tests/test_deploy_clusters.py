"""The clusters that the files under deploy/ describe, and the script of a fixed allocation, run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from dask_processes import ENVIRONMENT
from test_score_job import LINEAR, tables

import toy_models
from dynams_stream import Store
from pipeline.cluster_spec import read_cluster_spec
from pipeline.remote_cluster import dask_cluster_manifest
from pipeline.score_job import score_round

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.toml")), ids=lambda path: path.name)
def test_descriptions_are_valid(path: Path) -> None:
    assert read_cluster_spec(path).kind == path.stem


def test_the_kubernetes_manifest_fits_its_description() -> None:
    spec = read_cluster_spec(DEPLOY / "kubernetes.toml")
    assert spec.kubernetes is not None
    manifest = dask_cluster_manifest(spec.kubernetes, spec.workers, "x")
    assert manifest["spec"]["worker"]["replicas"] == spec.workers
    by_hand = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())
    for one in (manifest, by_hand):
        assert one["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == one["metadata"]["name"]
    for role in ("worker", "scheduler"):
        container = manifest["spec"][role]["spec"]["containers"][0]
        assert container["name"] == role
        assert container["args"][:2] == ["dask", role]
        assert all(isinstance(argument, str) for argument in container["args"])
        assert all(isinstance(variable["value"], str) for variable in container["env"])


@pytest.mark.slow
def test_the_script_of_a_fixed_allocation_scores(digit_store: Store, tmp_path: Path) -> None:
    """Its `srun` starts two workers here; `dask` and `dynams` are this environment's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    texts = {
        "dask": f'exec "{sys.executable}" -m dask "$@"',
        "dynams": f'exec "{sys.executable}" -m tools.cli "$@"',
        "srun": '[[ "$1" == --cpus-per-task=1 ]] || exit 1; shift; "$@" & "$@" & wait',
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    torch.save(toy_models.linear().state_dict(), tmp_path / "linear.pt")
    here = score_round(digit_store, LINEAR, checkpoint=str(tmp_path / "linear.pt"), workers=2)
    expected = tables(digit_store, here.number)
    for table in Path(digit_store.path(f"rounds/{here.number:06d}/scores")).iterdir():
        table.unlink()
    environment = {**ENVIRONMENT, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        [
            "bash", DEPLOY / "score.sbatch", "--store", digit_store.url, "--checkpoint", tmp_path / "linear.pt",
            "--model", LINEAR.model, "--transform", str(LINEAR.transform), "--input", "png", "--label", "cls",
            "--batch-size", str(LINEAR.batch_size),
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 failed" in done.stdout
    assert tables(digit_store, here.number).equals(expected)
    assert not list(tmp_path.glob("scheduler-*.json"))
