"""Re-scoring: once, and watching a folder while a trainer writes and a loader reads."""

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
from dynams_stream import ParameterSharingProxy, ScorerSpec, SelectedDataset, Store
from dynams_stream.errors import CheckpointError, UsageError
from pipeline.rescore import checkpoints, model_beside, newest_checkpoint, rescore, watch

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")
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


def test_watch_gives_the_newest_then_each_new_file_once_it_is_complete(tmp_path: Path) -> None:
    for number in range(3):
        path = Path(save(tmp_path, f"{number}.pt", number))
        os.utime(path, (1000 + number, 1000 + number))
    looks: list[int] = []

    def act(seconds: float) -> None:
        looks.append(len(looks))
        if len(looks) == 3:
            (tmp_path / "3.pt").write_bytes(b"half of a check")
        if len(looks) == 4:
            (tmp_path / "3.pt").write_bytes(b"half of a checkpoint, and more")
        if len(looks) == 8:
            save(tmp_path, "2.pt", seed=9)
        if len(looks) == 12:
            raise KeyboardInterrupt

    found: list[tuple[int, str]] = []

    def follow() -> None:
        for path in watch(str(tmp_path), every=0.1, sleep=act):
            found.append((len(looks), Path(path).name))

    with pytest.raises(KeyboardInterrupt):
        follow()
    assert found == [(1, "2.pt"), (5, "3.pt"), (9, "2.pt")]


def test_folders_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(str(tmp_path)) == []
    (tmp_path / "notes.txt").write_text("not one")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        newest_checkpoint(str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        checkpoints(str(tmp_path / "none"))


@pytest.mark.slow
def test_a_running_loader_takes_up_what_the_watcher_publishes(digit_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    command = [
        sys.executable, "-m", "tools.cli", "rescore", "--store", digit_store.url, "--watch", str(folder),
        "--poll", "0.2", "--fraction", "0.1", "--model", "toy_models:linear", "--transform", "toy_models:gray",
        "--workers", "1", "--json",
    ]  # fmt: skip
    watcher = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    dataset = SelectedDataset(digit_store, batch_size=10)
    lengths = []
    try:
        for epoch in range(3):
            dataset.set_epoch(epoch)
            stream = iter(dataset)
            first = next(stream)
            save(folder, f"{epoch}.pt", seed=epoch)
            published = json.loads(watcher.stdout.readline())
            assert published["round"] == epoch + 1
            # The round that appeared meanwhile changes nothing before the next set_epoch.
            lengths.append(1 + sum(1 for _ in stream))
            assert first["__row__"] >= 0
        (folder / "bad.pt").write_bytes(b"not a checkpoint")
        time.sleep(2)
        save(folder, "3.pt", seed=3)
        assert json.loads(watcher.stdout.readline())["checkpoint"] == str(folder / "3.pt")
    finally:
        watcher.send_signal(signal.SIGTERM)
        _, complaint = watcher.communicate(timeout=60)
    assert lengths == [1437, 144, 144]
    assert watcher.returncode == 143
    assert "bad.pt: no round" in complaint
    assert [published.counts["selected"] for published in digit_store.rounds()] == [144] * 4
