"""The scripts under deploy/ run, with programs that stand in for SLURM's, pip and `dynams`; so does the cron job."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
import tomllib
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from distributed import Client
from typer.testing import CliRunner

import toy_models
from dynams_stream import Store, schema, storage
from pipeline import lease
from pipeline.lease import Holder
from tools.rescore import app

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"

SRUN = """
cpus=1 # what Slurm 22.05 to 23.02 give a task of a step that asks for nothing, whatever the job has
while [[ "$1" == --* ]]; do
  case "$1" in --cpus-per-task=*) cpus="${1#*=}" ;; *) echo "srun: unrecognized option '$1'" >&2; exit 1 ;; esac
  shift
done
echo "srun gives $cpus" >>"$LOG"
exec "$@"
"""
UNTIL_TERMINATED = 'trap "echo $1 ended >>$LOG; kill %1; exit 0" TERM; sleep 60 & wait'
"""Its first argument is the name that it says."""
ENDS_ONCE_WORKERS_ARE_THERE = 'until grep -q "srun gives" "$LOG"; do sleep 0.05; done; exit 7'
FINISHES = 'trap "kill %1; sleep 0.3; echo finished >>$LOG; exit 143" TERM; sleep 60 & echo waiting >>$LOG; wait'
"""A command that is told to stop, and takes a moment for it."""


class StandIns:
    """Programs in `folder/bin`, first on the path of the scripts; each says in one log what it was called with."""

    def __init__(self, folder: Path, **texts: str):
        self.folder, self._log = folder, folder / "log"
        for name, text in texts.items():
            self.add(folder / "bin" / name, text)

    def add(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "{path.name} $*" >>"$LOG"\n{text}\n')
        path.chmod(0o755)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", DEPLOY / script, *arguments], cwd=self.folder, text=True, stderr=subprocess.PIPE,
            env={
                **os.environ, **environment, "LOG": str(self._log), "PATH": f"{self.folder}/bin:{os.environ['PATH']}"
            },
        )  # fmt: skip

    @property
    def said(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 60
        while line not in self.said:
            assert time.monotonic() < deadline, (line, self.said)
            time.sleep(0.02)


# ---- a fixed allocation ----------------------------------------------------------------------------------------------


@pytest.fixture
def allocation(tmp_path: Path) -> StandIns:
    """What deploy/score.sbatch finds on a node."""
    return StandIns(tmp_path, srun=SRUN, dask=UNTIL_TERMINATED, dynams=ENDS_ONCE_WORKERS_ARE_THERE)


def test_an_allocation_s_tasks_have_the_cores_that_its_workers_use(allocation: StandIns) -> None:
    job = allocation.start("score.sbatch", "--config", "run.toml", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="3")
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 7, complaint  # that of dynams
    assert "srun gives 3" in allocation.said
    file = f"--scheduler-file {allocation.folder}/scheduler-7.json"
    assert f"dynams score {file} --config run.toml" in allocation.said


def test_an_allocation_s_command_alone_is_told_of_its_end(allocation: StandIns) -> None:
    """SLURM's `--signal=B:` reaches the script's shell; workers must go on until the command has ended."""
    allocation.add(allocation.folder / "bin/dynams", FINISHES)
    job = allocation.start("score.sbatch", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="1")
    allocation.wait_for("waiting")
    allocation.wait_for("srun gives 1")
    job.terminate()
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 143, complaint
    allocation.wait_for("worker ended")
    allocation.wait_for("scheduler ended")
    ends = [line for line in allocation.said if line == "finished" or line.endswith(" ended")]
    assert (ends[0], set(ends[1:])) == ("finished", {"worker ended", "scheduler ended"})


# ---- a row of batch jobs ---------------------------------------------------------------------------------------------


@pytest.fixture
def row(tmp_path: Path) -> StandIns:
    """What deploy/rescore.sbatch finds: `sbatch` accepts a job, unless a file `refused` is there."""
    programs = StandIns(tmp_path, sbatch='[ ! -e refused ] || { echo "sbatch: error: no" >&2; exit 1; }', sleep="")
    programs.add(tmp_path / ".venv/bin/dynams", 'echo "process $$" >>"$LOG"; exit 5')
    return programs


NEXT = "sbatch --begin=now+30minutes --dependency=singleton deploy/rescore.sbatch"
RUN = "dynams rescore --config run.toml --checkpoint ckpt/ --workers 16"


def test_a_run_submits_the_next_one_first_and_takes_the_script_s_place(row: StandIns) -> None:
    job = row.start("rescore.sbatch", SLURM_CPUS_PER_TASK="16")
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 5, complaint
    # SLURM's signal to the script (B:) is the command's, then, and no step has workers that would get it, too
    assert row.said == ["sleep 0", NEXT, RUN, f"process {job.pid}"]


def test_a_submission_that_is_refused_is_tried_again_and_costs_no_run(row: StandIns) -> None:
    (row.folder / "refused").touch()
    job = row.start("rescore.sbatch", SLURM_CPUS_PER_TASK="16")
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 5, complaint
    assert row.said == ["sleep 0", NEXT, "sleep 30", NEXT, "sleep 120", NEXT, RUN, f"process {job.pid}"]
    assert "the next run could not be submitted" in complaint


# ---- a rented machine ------------------------------------------------------------------------------------------------


def test_a_rented_machine_gets_the_checkout_that_the_script_lies_in(tmp_path: Path) -> None:
    """An index might have a package of that name that is somebody else's."""
    programs = StandIns(tmp_path, **{"nvidia-smi": ""})
    programs.add(tmp_path / ".venv/bin/pip", "")
    programs.add(tmp_path / ".venv/bin/dynams", "")
    job = programs.start("eight-gpus.sh", "--store", "s3://bucket/runs/a")
    assert job.wait(timeout=60) == 0
    installed, listed, scored = map(shlex.split, programs.said)
    found = re.fullmatch(r"(.*)\[(.*)\]", installed[-1])
    assert found is not None
    assert Path(found[1]).resolve() == ROOT
    assert found[2] == "s3,jpeg"
    assert installed[:-1] == ["pip", "install", "--quiet"]
    assert (listed[0], scored) == ("nvidia-smi", shlex.split("dynams score --device cuda --store s3://bucket/runs/a"))


# ---- Kubernetes ------------------------------------------------------------------------------------------------------


def test_the_pod_after_one_that_was_killed_waits_for_its_lease(
    digit_store: Store, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has numbers of processes of its own, so that it cannot know that the holder is dead."""
    settings, job = yaml.safe_load_all((DEPLOY / "cronjob.yaml").read_text())
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    given = tomllib.loads(settings["data"]["run.toml"])
    given |= {"store": digit_store.url, "model": "toy_models:linear", "transform": "toy_models:gray", "width": 1.0}
    (tmp_path / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items()))
    torch.save(toy_models.linear().state_dict(), tmp_path / "1.pt")
    places = {"/etc/dynams/run.toml": tmp_path / "run.toml", "s3://bucket/ckpt/": tmp_path / "1.pt"}
    words = [str(places.get(word, word)) for word in [*container["command"], *container["args"]]]

    def sign_of_the_killed(age: float) -> None:
        sign = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="seconds")
        killed = Holder(1, "round", "pod-1", 1, "boot/4026531836/17", since=sign, renewed=sign)
        storage.write_bytes(digit_store.path(schema.lease_path(1)), json.dumps(asdict(killed)).encode())

    sign_of_the_killed(age=20)
    # three minutes pass at the first look that finds the store busy
    monkeypatch.setattr(lease, "time", SimpleNamespace(sleep=lambda seconds: sign_of_the_killed(age=200)))
    result = CliRunner().invoke(app, [*words[2:], "--scheduler", client.scheduler.address, "--poll", "0.1"])
    assert result.exit_code == 0, (result.exception, result.output)
    assert [made.number for made in digit_store.rounds()] == [1]
    assert storage.list_names(digit_store.path(schema.LEASE_FOLDER)) == ["000002.json"]
