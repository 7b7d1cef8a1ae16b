"""The commands as people and cron lines call them: real processes, exit codes, stdout and stderr apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed import Client

import toy_models
from tools.cli import COMMANDS

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
SCORING = ["--model", "toy_models:linear", "--transform", "toy_models:gray"]


def dynams(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; its exit code must be `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", *map(str, arguments)],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=200,
    )  # fmt: skip
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr or "--debug" in arguments
    return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    return path


def test_shard_index_score_select_status(tmp_path: Path, checkpoint: Path) -> None:
    store = tmp_path / "runs" / "a"
    sharded = json.loads(
        dynams(
            "shard", "--dataset", "digits", "--out", tmp_path / "data", "--samples-per-shard", 500, "--store", store,
            "--json",
        ).stdout
    )  # fmt: skip
    assert (sharded["shards"], sharded["samples"], sharded["store"]) == (3, 1437, str(store))
    indexed = json.loads(
        dynams("index", str(tmp_path / "data/train-{000000..000002}.tar"), "--store", store, "--json").stdout
    )
    assert (indexed["published"], indexed["dataset"], indexed["samples"]) == (False, 1, 1437)
    scored = dynams("score", "--store", store, "--checkpoint", checkpoint, *SCORING)
    assert "round 1, 1,437 samples = 1,437 scored + 0 failed" in scored.stdout
    assert "input: png, label: cls (as the first shard shows)" in scored.stderr
    again = dynams("score", "--store", store, "--checkpoint", checkpoint, *SCORING)
    assert "is scored already" in again.stdout
    selected = dynams("select", "--store", store, "--fraction", "0.3", "--json")
    assert json.loads(selected.stdout)["counts"] == {"all": 1437, "scored": 1437, "failed": 0, "selected": 432}
    assert "published before" in dynams("select", "--store", store, "--fraction", "0.3").stdout
    status = json.loads(dynams("status", "--store", store, "--json").stdout)
    assert (status["published_rounds"], status["dataset"]["samples"]) == (1, 1437)
    assert 0 <= status["newest_round_age_seconds"] < 200
    assert "432" in dynams("status", "--store", store).stdout


def test_a_running_scheduler_scores(tmp_path: Path, checkpoint: Path, client: Client) -> None:
    dynams("shard", "--dataset", "digits", "--out", tmp_path / "d", "--store", tmp_path / "s")
    command = ("score", "--store", tmp_path / "s", "--checkpoint", checkpoint, *SCORING, "--json")
    result = json.loads(dynams(*command, "--scheduler", client.scheduler.address).stdout)
    assert (result["scored"], result["resumed_parts"]) == (1437, 0)
    assert client.status == "running"


def test_a_fallback_without_a_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    arguments = ("--store", tmp_path, "--fraction", "0.3", "--checkpoint", checkpoint, *SCORING, "--width", "0.5")
    assert "--fallback needs --compare-with" in dynams("rescore", *arguments, "--fallback", "full", code=2).stderr


def test_help_names_every_command() -> None:
    text = dynams("--help").stdout
    assert dynams(code=2).stdout == text
    assert all(command in text for command in COMMANDS)
    assert "Usage: dynams status" in dynams("status", "--help").stdout
    assert dynams("--version").stdout.startswith("dynams")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_as_a_module(command: str) -> None:
    module = COMMANDS[command][0]
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0
    assert f"Usage: dynams {command}" in done.stdout
    assert f"Example: dynams {command}" in done.stdout


@pytest.mark.slow
def test_wrong_usage_exits_2_and_says_what_to_do(tmp_path: Path, checkpoint: Path) -> None:
    assert "No such option" in dynams("status", "--stroe", "x", code=2).stderr
    assert "did you mean 'score'?" in dynams("socre", code=2).stderr
    dynams("shard", "--dataset", "digits", "--out", tmp_path / "d", "--store", tmp_path / "s")
    store = ["--store", str(tmp_path / "s")]
    assert "from 0 to 1; got '1.5'" in dynams("select", *store, "--fraction", "1.5", code=2).stderr
    assert (
        "cannot import 'nowhere'"
        in dynams("score", *store, "--model", "nowhere:x", "--checkpoint", checkpoint, code=2).stderr
    )
    assert "is not JSON" in dynams("score", *store, *SCORING, "--checkpoint", "x", "--model-args", "{", code=2).stderr
    assert "no*.tar" in dynams("index", tmp_path / "no*.tar", *store, code=2).stderr
    assert "give one of" in dynams("rescore", *store, *SCORING, "--fraction", "0.1", code=2).stderr


@pytest.mark.slow
def test_failures_exit_1(tmp_path: Path, checkpoint: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no index; run: dynams index" in dynams("status", "--store", empty, code=1).stderr
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b not a tar")
    found = dynams("index", tmp_path / "a.tar", "--store", tmp_path / "s", code=1).stderr
    assert "a.tar" in found
    assert "gunzip" in found or "compressed" in found
    dynams("shard", "--dataset", "digits", "--out", tmp_path / "d", "--store", tmp_path / "s")
    assert (
        "no such checkpoint"
        in dynams("score", "--store", tmp_path / "s", *SCORING, "--checkpoint", "x.pt", code=1).stderr
    )
    traceback = dynams("score", "--store", tmp_path / "s", *SCORING, "--checkpoint", "x.pt", "--debug", code=1).stderr
    assert "Traceback" in traceback


@pytest.mark.slow
def test_a_configuration_file_gives_defaults_and_flags_win(tmp_path: Path) -> None:
    dynams("shard", "--dataset", "digits", "--out", tmp_path / "d", "--store", tmp_path / "s")
    config = tmp_path / "run.toml"
    config.write_text(
        f'store = "{tmp_path}/s"\nfraction = "0.5"\nmodel = "toy_models:linear"\n[select]\nstrategy = "random:1"\n'
    )
    first = json.loads(dynams("select", "--config", config, "--json").stdout)
    assert (first["counts"]["selected"], first["strategy"]) == (719, "random:1")
    second = json.loads(dynams("select", "--config", config, "--fraction", "0.1", "--json").stdout)
    assert second["counts"]["selected"] == 144
    config.write_text('sotre = "x"\n')
    assert "'sotre' is not an option" in dynams("select", "--config", config, code=2).stderr
    config.write_text("store =\n")
    assert str(config) in dynams("select", "--config", config, code=2).stderr
    assert "no such file" in dynams("select", "--config", tmp_path / "none.toml", code=2).stderr


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(tmp_path: Path, checkpoint: Path) -> None:
    """(SIGTERM: `tests/test_faults.py`.)"""
    store = tmp_path / "s"
    dynams("shard", "--dataset", "digits", "--out", tmp_path / "d", "--store", store, "--samples-per-shard", 100)
    command = [
        sys.executable, "-m", "tools.cli", "score", "--store", store, "--checkpoint", checkpoint, "--workers", "1",
        "--model", "toy_models:linear", "--transform", "toy_models:slow_gray",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C and their children inherit that; this one is in the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder, deadline = store / "rounds" / "000001" / "scores", time.monotonic() + 90
    while not (folder.is_dir() and any(folder.glob("part-*"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "run the same command again" in complaint
    assert "Traceback" not in complaint
    done = len(list(folder.glob("part-*")))
    finished = dynams(*command[3:], "--json")
    assert json.loads(finished.stdout)["resumed_parts"] >= done


def test_a_dry_run_tells_and_does_nothing(tmp_path: Path, checkpoint: Path) -> None:
    dynams(
        "shard", "--dataset", "digits", "--out", tmp_path / "d", "--store", tmp_path / "s", "--samples-per-shard", 500
    )
    store = ["--store", str(tmp_path / "s")]
    plan = json.loads(dynams("score", *store, *SCORING, "--checkpoint", checkpoint, "--dry-run", "--json").stdout)
    assert (plan["round"], plan["pending_samples"], plan["pending_parts"]) == (None, 1437, 3)
    assert plan["pending_bytes"] == sum(path.stat().st_size for path in (tmp_path / "d").glob("*.tar"))
    assert json.loads(dynams("select", *store, "--fraction", "0.1", "--dry-run", "--json").stdout)["selected"] == 144
    assert (
        "would index 3 shards" in dynams("index", tmp_path / "d/*.tar", "--store", tmp_path / "n", "--dry-run").stdout
    )
    assert not (tmp_path / "n").exists()
    assert not (tmp_path / "s" / "rounds").exists()
