"""Re-scoring: what a run does, by schedule or not, and real watchers while a trainer writes and a loader reads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from distributed import Client
from typer.testing import CliRunner

import toy_models
from dynams_stream import LinearSchedule, ParameterSharingProxy, ScorerSpec, Store
from dynams_stream.errors import CheckpointError, UsageError
from dynams_stream.selection import selected_count
from pipeline.rescore import Due, due_round, model_beside, rescore
from pipeline.run_records import LastRun, TriggerRecord, last_run, trigger
from tools.rescore import app
from tools.status import app as status_app

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")
MODEL = ["--model", "toy_models:linear", "--transform", "toy_models:gray"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}


def save(folder: Path, name: str, seed: int) -> str:
    """A checkpoint as careful trainers write them: beside its place, then renamed."""
    temporary = folder / f".{name}.tmp"
    torch.save(toy_models.linear(seed).state_dict(), temporary)
    temporary.rename(folder / name)
    return str(folder / name)


def test_rescore_makes_a_round_once(digit_store: Store, client: Client, tmp_path: Path) -> None:
    path = save(tmp_path, "1.pt", seed=1)
    first = rescore(digit_store, SPEC, path, fraction=0.2, client=client)
    assert (first.round.number, first.published, first.round.counts["selected"]) == (1, True, 288)
    again = rescore(digit_store, SPEC, path, fraction=0.2, client=client)
    assert (again.round.number, again.published) == (1, False)


def test_a_proxy_is_compared_with_the_model_beside_it(
    digit_store: Store, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5)
    network.save(tmp_path / "3.safetensors", epoch=3)
    (tmp_path / "full").mkdir()
    pattern = str(tmp_path / "full" / "{name}.pt")
    slim = str(tmp_path / "3.safetensors")
    assert model_beside(slim, pattern) is None
    assert "3.pt: not there" in caplog.text
    torch.save(network.model.state_dict(), tmp_path / "full" / "3.pt")
    model = model_beside(slim, pattern)
    assert model == str(tmp_path / "full" / "3.pt")
    spec = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)
    made = rescore(digit_store, spec, slim, fraction=0.2, model_checkpoint=model, client=client)
    found = made.round.manifest["faithfulness"]
    assert (found["samples"], found["fraction"], made.round.epoch) == (1437, 0.2, 3)
    again = rescore(digit_store, spec, slim, fraction=0.2, model_checkpoint=model, client=client)
    assert (again.round.number, again.published) == (made.round.number, False)
    full = rescore(
        digit_store, spec, slim, fraction=0.3, model_checkpoint=model, client=client, least_overlap=1.0, fallback="full"
    ).round
    assert full.manifest["scorer"]["width"] == 1.0
    with pytest.raises(UsageError, match=r"no \{name\} in it"):
        model_beside(slim, "full/3.pt")
    with pytest.raises(UsageError, match="width 1"):
        rescore(digit_store, SPEC, slim, fraction=0.2, model_checkpoint=model, client=client)


class Rounds:
    """As much of a store as a schedule looks at: the epochs of its rounds."""

    def __init__(self, *epochs: int | None):
        self._epochs = epochs

    def rounds(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(number=number, epoch=epoch) for number, epoch in enumerate(self._epochs, start=1)]


SCHEDULE = LinearSchedule(epochs=12, warmup=2, anneal=2, interval=3, final=0.2)
"""Rounds for the epochs 2-4, 5-7 and 8-9."""


@pytest.mark.parametrize(
    ("epoch", "rounds", "due"),
    [
        (0, (), "epoch 1 trains on everything"),
        (1, (), 2),
        (1, (80,), 2),  # of an earlier training run
        (1, (1,), 2),  # the same checkpoint again: the round's identity decides
        (2, (1,), "epochs 2 … have their round, 1, of epoch 1"),
        (3, (None,), 4),
        (3, (1, 2), "epochs 2 … have their round, 2, of epoch 2"),
        (4, (1, 2), 5),
        (5, (1, 2), 6),  # the checkpoint before it was missed
        (5, (1, 4), "epochs 5 … have their round, 2, of epoch 4"),
        (7, (4,), 8),
        (9, (7,), "epoch 10 trains on everything"),
        (11, (7,), "epoch 11 is the schedule's last"),
        (40, (7,), "epoch 40 is the schedule's last"),
    ],
)
def test_a_schedule_asks_for_one_round_an_interval(epoch: int, rounds: tuple[int | None, ...], due: int | str) -> None:
    found = due_round(Rounds(*rounds), SCHEDULE, "ckpt/a.pt", epoch)  # type: ignore[arg-type]
    expected = Due(None, due) if isinstance(due, str) else Due(SCHEDULE.fraction(due))
    assert found == expected


def test_a_warm_up_on_random_samples_needs_no_checkpoint() -> None:
    schedule = LinearSchedule(epochs=12, warmup=3, final=0.2, warmup_fraction=0.1)
    found = [due_round(Rounds(), schedule, "ckpt/a.pt", epoch) for epoch in (0, 1, 2)]  # type: ignore[arg-type]
    assert found == [Due(None, f"epoch {n} trains on random samples") for n in (1, 2)] + [Due(schedule.fraction(3))]


def test_a_schedule_needs_the_checkpoints_epoch() -> None:
    with pytest.raises(CheckpointError, match=r"ckpt/a\.pt does not say after which epoch .*--epoch-from"):
        due_round(Rounds(), SCHEDULE, "ckpt/a.pt", None)  # type: ignore[arg-type]


def dynams(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_runs_are_told_by_status(digit_store: Store, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    options = ["--store", digit_store.url, *MODEL, "--scheduler", client.scheduler.address, "--checkpoint", folder]
    by_epoch = [
        *options,
        "--schedule",
        "linear",
        "--epochs",
        4,
        "--interval",
        1,
        "--final",
        "0.2",
        "--epoch-from",
        "{epoch}.pt",
    ]
    # nothing to do is no failure: a scheduled run may well be there before the first epoch has ended
    assert "no round is due: no complete checkpoint yet" in dynams("rescore", *options, "--fraction", "0.2")
    save(folder, "0.pt", seed=0)
    os.utime(folder / "0.pt", (time.time() - 600, time.time() - 600))
    state = json.loads(dynams("status", "--store", digit_store.url, "--checkpoints", folder, "--json"))
    assert 590 < state["checkpoints"]["behind_seconds"] < 700
    assert state["checkpoints"]["round_behind_seconds"] is None
    assert (state["last_run"]["ending"], state["last_run"]["failures"]) == ("not due", 0)
    reason = json.loads(dynams("rescore", *by_epoch, "--json"))
    assert (reason["round"], reason["reason"]) == (None, "epoch 1 trains on everything")
    save(folder, "1.pt", seed=1)
    made = json.loads(dynams("rescore", *by_epoch, "--poll", "0.1", "--json"))
    assert (made["round"], made["published"], made["epoch"], made["fraction"]) == (1, True, 1, 0.6)
    again = json.loads(dynams("rescore", *by_epoch, "--poll", "0.1", "--json"))
    assert (again["round"], again["published"]) == (1, False)
    told = dynams("status", "--store", digit_store.url, "--checkpoints", folder)
    assert "last run: up to date, " in told
    assert f"checkpoints: {folder}, none waits for its round" in told
    lines = dynams("status", "--store", digit_store.url, "--checkpoints", folder, "--prometheus").splitlines()
    metrics = {line.split("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
    labels = {line.split("{")[1].split("}")[0] for line in lines if not line.startswith("#")}
    assert labels == {f'store="{digit_store.url}"'}
    assert {name: metrics[f"dynams_{name}"] for name in ("newest_round", "behind_seconds", "last_run_failures")} == {
        "newest_round": 1, "behind_seconds": 0, "last_run_failures": 0,
    }  # fmt: skip
    assert metrics["dynams_newest_round_selected_samples"] == 863
    assert abs(metrics["dynams_newest_round_timestamp_seconds"] - time.time()) < 300
    assert metrics["dynams_round_behind_seconds"] == 0
    assert "dynams_next_run_timestamp_seconds" not in metrics


def invoked(*arguments: object) -> dict[str, Any]:
    """What a command prints with --json, in this process."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_before_the_first_checkpoint_there_is_nothing_to_do(digit_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    options = ["--store", digit_store.url, *MODEL, "--fraction", "0.1", "--checkpoint", folder]
    told = invoked("--once", *options)
    assert (told["checkpoint"], told["round"], told["published"]) == (None, None, False)
    assert "no complete checkpoint yet in " in told["reason"]
    ran = last_run(digit_store)
    assert ran is not None
    assert (ran.ending, ran.failures, ran.checkpoint) == ("not due", 0, None)
    folder.rmdir()
    result = CliRunner().invoke(app, list(map(str, options)))
    assert isinstance(result.exception, CheckpointError)  # exit 1: it may be there again
    assert "no such folder" in str(result.exception)


def test_the_schedule_is_the_one_that_plan_and_train_have(digit_store: Store, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'schedule = "power"\nepochs = 12\nwarmup = 4\nwarmup_fraction = 0.1\ninterval = 2\nbudget = 0.2\n'
    )
    path = save(tmp_path, "1.pt", seed=1)
    options = ["--store", digit_store.url, *MODEL, "--config", config, "--checkpoint", path, "--epoch-from", "{epoch}."]
    assert invoked(*options)["reason"] == "epoch 2 trains on random samples"


HOLDS = """
import sys
from dynams_stream import Store
from pipeline.lease import store_lease
with store_lease(Store(sys.argv[1]), "score"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_who_waited_for_another_job_takes_what_is_the_newest_then(
    digit_store: Store, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, long_ago = tmp_path / "ckpt", time.time() - 600
    folder.mkdir()
    os.utime(save(folder, "1.pt", seed=1), (long_ago, long_ago))
    job = subprocess.Popen(
        [sys.executable, "-c", HOLDS, digit_store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert job.stdin is not None
    assert job.stdout is not None
    assert job.stdout.readline() == "held\n"

    def trainer() -> None:
        deadline = time.monotonic() + 60
        while "waiting for it to end" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        os.utime(save(folder, "2.pt", seed=2), (long_ago + 60, long_ago + 60))
        job.communicate()  # the other job ends

    thread = threading.Thread(target=trainer)
    thread.start()
    options = ["--store", digit_store.url, *MODEL, "--scheduler", client.scheduler.address, "--fraction", "0.1"]
    try:
        made = invoked(*options, "--checkpoint", folder, "--on-busy", "wait")
    finally:
        thread.join()
    assert (made["checkpoint"], made["published"]) == (str(folder / "2.pt"), True)


def test_a_trigger_that_was_stopped_is_not_missed(digit_store: Store) -> None:
    record = TriggerRecord(digit_store, "every 30m", "1.pt")
    record.seen(datetime.now(UTC))

    def metrics() -> set[str]:
        text = CliRunner().invoke(status_app, ["--store", digit_store.url, "--prometheus"]).stdout
        return {line.split("{")[0] for line in text.splitlines() if not line.startswith("#")}

    signs = {"dynams_trigger_seen_timestamp_seconds", "dynams_next_run_timestamp_seconds"}
    assert metrics() >= signs
    record.ended()
    assert not metrics() & signs
    words = CliRunner().invoke(status_app, ["--store", digit_store.url]).stdout
    assert re.search(r"runs start: every 30m \(process \d+ on .*, stopped 2.*\)$", words, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--checkpoint", "c.pt", "--watch", "ckpt", "--fraction", "0.1"], "give one of --checkpoint"),
        (["--fraction", "0.1"], "give one of --checkpoint"),
        (["--checkpoint", "c.pt"], "give one of --fraction 0.3, and --schedule"),
        (["--checkpoint", "c.pt", "--schedule", "power", "--final", "0.1"], "needs --epochs"),
        (["--watch", "ckpt", "--every", "5m", "--fraction", "0.1"], "with --every name the folder by --checkpoint"),
        (["--checkpoint", "ckpt", "--every", "5", "--fraction", "0.1"], "--every '5' is no duration"),
        (["--checkpoint", "ckpt", "--every", "1h30", "--fraction", "0.1"], "--every '1h30' is no duration"),
        (["--checkpoint", "ckpt", "--cron", "0 6 * *", "--fraction", "0.1"], "has 4 fields"),
        (["--checkpoint", "c", "--cron", "0 6 * * *", "--every", "1h", "--fraction", "0.1"], "one of --every and"),
        (["--watch", "ckpt", "--fraction", "0.1"], "ckpt: no such folder"),
        (["--watch", ".", "--fraction", "0.1", "--max-runtime", "long"], "--max-runtime 'long' is no duration"),
        (
            ["--checkpoint", "c.pt", "--fraction", "0.1", "--max-runtime", "6h"],
            "--max-runtime is for runs that --watch",
        ),
        (["--checkpoint", "ckpt", "--every", "1h", "--fraction", "0.1"], "ckpt: no such folder"),
        (["--checkpoint", __file__, "--fraction", "0.1"], r"test_rescore\.py: a file, but no checkpoint by its name"),
        (["--watch", ".", "--fraction", "0.1", "--epoch-from", "4"], r"no \{epoch\} in it"),
    ],
)
def test_flags_that_make_no_sense_are_refused(digit_store: Store, flags: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["--store", digit_store.url, *MODEL, *flags])
    assert isinstance(result.exception, UsageError)
    assert re.search(complaint, str(result.exception))


def starter(store: Store, scheduler: str, *more: str) -> subprocess.Popen[str]:
    """A `dynams rescore` that stays and starts runs."""
    command = [
        sys.executable, "-m", "tools.cli", "rescore", "--store", store.url, "--poll", "0.2", *MODEL,
        "--scheduler", scheduler, "--json", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def watcher(store: Store, folder: Path, scheduler: str, *more: str) -> subprocess.Popen[str]:
    return starter(store, scheduler, "--watch", str(folder), *more)


@pytest.mark.slow
def test_runs_each_second_until_it_is_stopped(digit_store: Store, client: Client, tmp_path: Path) -> None:
    save(tmp_path, "1.pt", seed=1)
    flags = ("--checkpoint", str(tmp_path), "--every", "1s", "--fraction", "0.1")
    process = starter(digit_store, client.scheduler.address, *flags)
    assert process.stdout is not None
    try:
        made = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [(one["round"], one["published"]) for one in made] == [(1, True), (1, False)]
        starts = trigger(digit_store)
        assert starts is not None
        assert (starts.when, starts.pid, starts.ended) == ("every 1s", process.pid, None)
        assert starts.next_run is not None
    finally:
        process.terminate()
        _, complaint = process.communicate(timeout=100)
    assert process.returncode == 143, complaint
    starts = trigger(digit_store)
    assert starts is not None
    assert starts.ended is not None


@pytest.mark.slow
def test_a_watcher_goes_on_after_a_bad_checkpoint_and_stops_in_order(
    digit_store: Store, client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    process = watcher(digit_store, folder, client.scheduler.address, "--fraction", "0.1")
    assert process.stdout is not None
    try:
        save(folder, "0.pt", seed=0)
        assert json.loads(process.stdout.readline())["round"] == 1
        (folder / "bad.pt").write_bytes(b"not a checkpoint")
        while (ran := last_run(digit_store)) is None or not ran.failures:
            time.sleep(0.1)
        assert "bad.pt" in str(ran.error)
        save(folder, "1.pt", seed=1)
        assert json.loads(process.stdout.readline())["checkpoint"] == str(folder / "1.pt")
        starts = trigger(digit_store)
        assert starts is not None
        assert (starts.checkpoints, starts.pid, starts.ended) == (str(folder), process.pid, None)
    finally:
        process.send_signal(signal.SIGTERM)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "bad.pt: no round; trying again in 60 s" in " ".join(complaint.split())
    starts = trigger(digit_store)
    assert starts is not None
    assert starts.ended is not None
    ran = last_run(digit_store)
    assert ran is not None
    assert (ran.ending, ran.round, ran.failures) == ("published", digit_store.rounds()[-1].number, 0)
    assert len(digit_store.rounds()) == 2


TRIES_SOON = """
from pipeline import triggers
triggers.PAUSES = (0.1,)
from tools.cli import main
main()
"""


@pytest.mark.slow
def test_a_watcher_outlives_whatever_becomes_of_its_runs(digit_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise ImportError('the tools of a training repository')")
    command = [
        sys.executable, "-P", "-c", TRIES_SOON, "rescore", "--store", digit_store.url, "--watch", str(folder),
        "--poll", "0.1", *MODEL, "--scheduler", "tcp://127.0.0.1:9", "--fraction", "0.1",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    def failures(number: int) -> LastRun:
        while (ran := last_run(digit_store)) is None or ran.failures < number:
            assert process.poll() is None
            time.sleep(0.05)
        return ran

    try:
        save(folder, "0.pt", seed=0)
        while not (runs := psutil.Process(process.pid).children()):
            assert process.poll() is None
            time.sleep(0.01)
        runs[0].kill()
        killed = failures(1)
        assert (killed.checkpoint, killed.pid) == (str(folder / "0.pt"), process.pid)
        assert killed.error == "its process was ended by signal 9 (SIGKILL)"
        assert "cannot reach the Dask scheduler" in str(failures(3).error)  # and that again is no end
    finally:
        process.send_signal(signal.SIGTERM)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "0.pt: no round; trying again in 0.1 s" in " ".join(complaint.split())


TRAINER = """
import json, sys, time
import torch
from torch import nn
import toy_models
from dynams_stream import LinearSchedule, SelectedDataset, Store
from dynams_stream.checkpoint import save_weights

store, folder, report = Store(sys.argv[1]), sys.argv[2], sys.argv[3]
schedule = LinearSchedule(epochs=11, warmup=1, final=0.1)
torch.manual_seed(0)
model = toy_models.linear()
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
to_image = lambda sample: toy_models.gray(sample["png"])
dataset = SelectedDataset(store, batch_size=50)
for epoch in range(schedule.epochs):
    deadline = time.monotonic() + 120
    while len(store.rounds()) < epoch:  # a real one would go on with the round it has
        assert time.monotonic() < deadline, f"no round for epoch {epoch}"
        time.sleep(0.1)
    dataset.set_epoch(epoch, round=schedule.round(epoch))
    seen = []
    for sample in dataset.decode("pil"):
        seen.append([sample["__url__"], sample["__row__"]])
        loss = nn.functional.cross_entropy(model(to_image(sample)[None]), torch.tensor([int(sample["cls"])]))
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    with open(report, "a") as file:
        file.write(json.dumps({"epoch": epoch, "seen": seen}) + "\\n")
    save_weights(model, f"{folder}/{epoch}.safetensors", {"epoch": str(epoch)})
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trainer_watcher_and_loader_for_ten_rounds_with_the_watcher_killed_twice(
    digit_store: Store, client: Client, tmp_path: Path
) -> None:
    folder, report = tmp_path / "ckpt", tmp_path / "seen.jsonl"
    folder.mkdir()
    by_epoch = ("--schedule", "linear", "--epochs", "11", "--warmup", "1", "--interval", "1", "--final", "0.1")

    def watch() -> subprocess.Popen[str]:
        return watcher(digit_store, folder, client.scheduler.address, *by_epoch)

    watching = watch()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, digit_store.url, str(folder), str(report)], env=ENVIRONMENT
    )
    try:
        for rounds, with_its_run in ((2, True), (5, False)):
            while len(digit_store.rounds()) < rounds or not psutil.Process(watching.pid).children():
                assert trainer.poll() is None
                time.sleep(0.05)
            runs = psutil.Process(watching.pid).children()
            watching.kill()
            if with_its_run:
                for process in runs:
                    process.kill()
            watching.wait()
            time.sleep(0.5)
            watching = watch()
        assert trainer.wait(timeout=300) == 0
    finally:
        trainer.kill()
        watching.terminate()
        watching.communicate(timeout=100)
    schedule = LinearSchedule(epochs=11, warmup=1, final=0.1)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(11))
    rounds_made = digit_store.rounds()[:10]
    assert [made.epoch for made in rounds_made] == list(range(10))
    urls = digit_store.dataset().urls
    for line in lines:
        epoch, seen = line["epoch"], {(url, row) for url, row in line["seen"]}
        assert len(line["seen"]) == len(seen)
        if epoch == 0:
            assert len(seen) == 1437
            continue
        selection = rounds_made[epoch - 1].selection()
        assert seen == {(url, int(row)) for shard, url in enumerate(urls) for row in selection.rows(shard)}
        assert len(seen) == selected_count(schedule.fraction(epoch), 1437)
