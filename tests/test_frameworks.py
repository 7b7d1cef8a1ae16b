"""The programs of docs/training_loops.md as they stand there, killed and started again; and the Lightning callback.

A program runs in a folder whose `runs/a` holds images that name themselves in their first pixel. `sitecustomize` notes
what reaches the model in each rank, and publishes a round or kills its process where it is told to.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stream_stores
import torch
import webdataset as wds
from distributed import Client
from PIL import Image
from test_stream import expected_order, identity
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import toy_models
from dynams_stream.errors import MissingExtraError, StateError, UsageError
from dynams_stream.proxy import ParameterSharingProxy, joint_loss
from dynams_stream.schedule import LinearSchedule, PowerSchedule
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from pipeline.dynamic_selection import DynamicSelection
from pipeline.index_job import build_index

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```(\w+)(?: file=(\S+))?\n(.*?)```", re.DOTALL)
COUNTS = (150, 0, 230, 90, 170)
BATCH = 16
ROUNDS = (575, 511, 447)  # selected samples; odd, so that two ranks leave one out

Batches = list[list[tuple[int, int]]]

RECORDER = """
import json, os, signal
import torch

rank, calls = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))), 0
kill, publish = json.loads(os.environ["RECORD"])

def record(module, inputs):
    global calls
    if type(module) is not torch.nn.Flatten or not module.training:
        return
    calls += 1
    pixels = (inputs[0][:, :, 0, 0] * 255).round().int().tolist()
    with open(f"seen-{rank}.jsonl", "a") as file:
        file.write(json.dumps([[shard, 256 * high + low] for shard, high, low in pixels]) + "\\n")
    if rank == 0 and publish and calls == publish[0]:
        import stream_stores
        from dynams_stream import Store
        stream_stores.publish(Store("runs/a"), publish[1])
    if [rank, calls] == kill:
        os.kill(os.getpid(), signal.SIGKILL)

torch.nn.modules.module.register_module_forward_pre_hook(record)
"""


def selected(number: int) -> list[list[int]]:
    """The rows of round 1, 2 or 3."""
    places = np.random.default_rng(number).permutation(sum(COUNTS))[: ROUNDS[number - 1]]
    shards = np.split(np.isin(np.arange(sum(COUNTS)), places), np.cumsum(COUNTS)[:-1])
    return [np.flatnonzero(shard).tolist() for shard in shards]


def named_image(shard: int, row: int) -> bytes:
    pixels = np.full((8, 8, 3), row % 251, dtype=np.uint8)
    pixels[0, 0] = shard, row // 256, row % 256
    Image.fromarray(pixels).save(sink := io.BytesIO(), "png")
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's programs, and a store with round 1 in `runs/a`."""
    urls = []
    for shard, count in enumerate(COUNTS):
        urls.append(str(tmp_path / f"data-{shard:03d}.tar"))
        with wds.TarWriter(urls[-1]) as tar:
            for row in range(count):
                tar.write({"__key__": f"{row:04d}", "png": named_image(shard, row), "cls": str(row % 10).encode()})
    store = Store(tmp_path / "runs" / "a")
    build_index(store, urls)
    stream_stores.publish(store, selected(1))
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore "$@"\n')
    (programs / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore -m torch.distributed.run "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    for _, name, text in blocks():
        if name:
            (tmp_path / name).write_text(text)
    return tmp_path


@functools.cache
def blocks() -> list[tuple[str, str, str]]:
    return BLOCK.findall((ROOT / "docs" / "training_loops.md").read_text())


def command_of(program: str) -> str:
    """The page's command that runs `program`."""
    (command,) = (text for language, _, text in blocks() if language == "bash" and program in text)
    return command


def run(
    folder: Path, command: str, kill: tuple[int, int] | None = None, publish: tuple[int, int] | None = None
) -> tuple[list[Batches], str]:
    """Run a command in `folder`.

    Args:
        kill: rank, and at which of its batches it is killed.
        publish: at which batch of rank 0 a round is published, and its number.

    Returns:
        What each rank's model was given, batch by batch, and the program's output.
    """
    for old in folder.glob("seen-*"):
        old.unlink()
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RECORD": json.dumps([kill, publish and (publish[0], selected(publish[1]))]),
    }
    log = folder / "output.txt"
    with log.open("w") as sink:
        process = subprocess.Popen(
            ["bash", "-ec", command], cwd=folder, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        code = process.wait(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and workers whose main process was killed
    output = log.read_text()
    assert (code != 0) == (kill is not None), output
    found = []
    for path in sorted(folder.glob("seen-*")):
        lines = map(json.loads, path.read_text().splitlines())
        found.append([[(shard, row) for shard, row in batch] for batch in lines])
    return found, output


def cut(samples: list[tuple[int, int]], size: int = BATCH) -> Batches:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def expected(number: int, epoch: int, ranks: int, start: int = 0) -> list[Batches]:
    """What each rank takes of an epoch from position `start` on."""
    order = expected_order(selected(number), epoch=epoch)[start:]
    return [cut(order[rank : len(order) - len(order) % ranks : ranks]) for rank in range(ranks)]


def check_a_killed_run(
    folder: Path, commands: tuple[str, str], ranks: tuple[int, int], kill: tuple[int, int], state: Callable[[], Any]
) -> str:
    """Run a program that is killed in epoch 1, and run it again; a round is published in epoch 0, another in epoch 1.

    Args:
        commands, ranks: of the first and of the second run.
        kill: rank, and at which batch of epoch 1.
        state: reads the dataset's state from the program's checkpoint.
    """
    whole, begun = expected(1, 0, ranks[0]), expected(2, 1, ranks[0])
    steps = len(whole[0])
    first, _ = run(folder, commands[0], kill=(kill[0], steps + kill[1]), publish=(5, 2))
    assert len(first) == ranks[0]
    saved = state()
    assert (saved["epoch"], saved["round"]) == (1, 2)
    assert 0 < saved["steps"] < kill[1]
    assert saved["samples"] == saved["steps"] * BATCH * ranks[0]
    for rank in range(ranks[0]):
        assert first[rank][:steps] == whole[rank]  # epoch 0 keeps to the round that it began with
        assert len(first[rank]) >= steps + saved["steps"]
        assert first[rank][steps:] == begun[rank][: len(first[rank]) - steps]

    second, output = run(folder, commands[1], publish=(2, 3))
    left, last = expected(2, 1, ranks[1], saved["samples"]), expected(3, 2, ranks[1])
    assert second == [left[rank] + last[rank] for rank in range(ranks[1])]
    assert len({len(batches) for batches in second}) == 1

    consumed = [
        batches[steps : steps + saved["steps"]] for batches in first
    ] + left  # of epoch 1, by the model that lives
    samples = [sample for batches in consumed for batch in batches for sample in batch]
    wanted = {(shard, row) for shard, rows in enumerate(selected(2)) for row in rows}
    assert len(samples) == len(set(samples)) == len(wanted) - (len(wanted) - saved["samples"]) % ranks[1]
    assert set(samples) <= wanted
    return output


# ---- the page's programs ---------------------------------------------------------------------------------------------


def test_every_program_has_its_command_and_is_run_here() -> None:
    names = [name for _, name, _ in blocks() if name]
    assert names == ["train_plain.py", "train_ddp.py", "train_lightning.py", "train_accelerate.py"]
    assert all(command_of(name) for name in names)


def torch_state(path: Path) -> Any:
    return torch.load(path, weights_only=True)["data"]


def test_plain(folder: Path) -> None:
    command = command_of("train_plain.py")
    output = check_a_killed_run(
        folder, (command, command), (1, 1), kill=(0, 25), state=lambda: torch_state(folder / "plain.pt")
    )
    assert f"epoch 2: {len(expected(3, 2, 1)[0])} steps, {ROUNDS[2]} samples" in output


@pytest.mark.slow
def test_ddp_goes_on_with_one_rank(folder: Path) -> None:
    two = command_of("train_ddp.py")
    one = two.replace("--nproc-per-node 2", "--nproc-per-node 1")
    assert one != two
    output = check_a_killed_run(folder, (two, one), (2, 1), kill=(1, 13), state=lambda: torch_state(folder / "ddp.pt"))
    assert f"rank 0, epoch 2: {len(expected(3, 2, 1)[0])} steps, {ROUNDS[2]} samples" in output


@pytest.mark.slow
def test_lightning_goes_on_with_two_devices(folder: Path) -> None:
    two = command_of("train_lightning.py")
    one = two.replace("train_lightning.py 2", "train_lightning.py 1")
    assert one != two

    def state() -> Any:
        checkpoint = torch.load(folder / "ckpt-lightning" / "last.ckpt", weights_only=False)
        return checkpoint["callbacks"]["SelectionCallback"]

    check_a_killed_run(folder, (one, two), (1, 2), kill=(0, 20), state=state)


@pytest.mark.slow
def test_accelerate(folder: Path) -> None:
    command = command_of("train_accelerate.py")

    def state() -> Any:
        return json.loads((folder / "accelerate.json").read_text())["data"]

    output = check_a_killed_run(folder, (command, command), (2, 2), kill=(1, 13), state=state)
    assert output.count(f"epoch 2: {len(expected(3, 2, 2)[0])} steps, {ROUNDS[2] // 2} samples") == 1


PREPARED = """
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader
from dynams_stream import SelectedDataset

model = nn.Flatten()
for dispatch in (None, False):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    dataset = SelectedDataset("runs/a", batch_size=16).decode("torchrgb").to_tuple("png", "cls")
    loader = accelerator.prepare(DataLoader(dataset, batch_size=16))
    dataset.set_epoch(3, round=None)
    for images, labels in loader:
        model(images)
    accelerator.print(repr(dataset))
    accelerator.wait_for_everyone()
"""


def test_loaders_that_accelerate_prepares_are_as_wrong_as_the_page_says(folder: Path) -> None:
    (folder / "prepared.py").write_text(PREPARED)
    seen, output = run(folder, "torchrun --standalone --nproc-per-node 2 prepared.py")
    assert output.count("epoch 0, round 1)") == 2  # not epoch 3 and everything, as was asked for
    steps = len(seen[0]) // 2
    for part in (slice(steps), slice(steps, None)):
        samples = {sample for batches in seen for batch in batches[part] for sample in batch}
        assert samples
        assert len(samples) < 0.6 * ROUNDS[0]


# ---- the Lightning callback, in this process -------------------------------------------------------------------------

SMALL = (13, 0, 21, 9, 17)
PLANS = {"shrinking": (None, 1, 2), "growing": (2, 1, None)}
"""Rounds of the epochs 0, 1 and 2: 60, about 36 and about 18 samples, and the other way round."""


class Plan:
    """A schedule with a list of rounds."""

    def __init__(self, rounds: tuple[int | None, ...]):
        self.rounds = rounds

    def round(self, epoch: int) -> int | None:
        return self.rounds[min(epoch, len(self.rounds) - 1)]


def as_tensor(samples: list[Any]) -> torch.Tensor:
    return torch.tensor([list(sample) for sample in samples])


@functools.cache
def lightning(package: str = "lightning.pytorch") -> SimpleNamespace:
    """Lightning, imported where it is needed (it takes seconds), with a model and a callback for these tests."""
    pl = importlib.import_module(package)

    class Model(pl.LightningModule):
        """Notes the batches that it is trained on, and after which of them it is validated."""

        def __init__(self, fails_at: tuple[int, int] | None):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.fails_at = fails_at
            self.seen: Batches = []
            self.validated: list[int] = []

        def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
            if (self.current_epoch, number) == self.fails_at:
                raise InterruptedError
            self.seen.append([(shard, row) for shard, row in batch.tolist()])
            return self.layer(batch.float()).sum()

        def on_validation_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.validated.append(len(self.seen))

        def validation_step(self, batch: torch.Tensor, number: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    class SaveAlways(pl.Callback):
        """Saves a checkpoint wherever callbacks do; `made` has (path, batches that the model had seen)."""

        def __init__(self, folder: Path):
            self.folder = folder
            self.made: list[tuple[str, int]] = []

        def save(self, trainer: Any, model: Any, hook: str) -> None:
            path = str(self.folder / f"{len(self.made):03d}-{hook}.ckpt")
            trainer.save_checkpoint(path)
            self.made.append((path, len(model.seen)))

        def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
            self.save(trainer, model, "epoch-start")

        def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
            self.save(trainer, model, "batch")

        def on_validation_end(self, trainer: Any, model: Any) -> None:
            if not trainer.sanity_checking:
                self.save(trainer, model, "validation")

        def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
            self.save(trainer, model, "epoch-end")

        def on_exception(self, trainer: Any, model: Any, _: BaseException) -> None:
            self.save(trainer, model, "exception")

    from dynams_stream.lightning import SelectionCallback

    return SimpleNamespace(pl=pl, Model=Model, SaveAlways=SaveAlways, SelectionCallback=SelectionCallback)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with two rounds; tests only read it."""
    store = stream_stores.make_store(tmp_path_factory.mktemp("lightning"), SMALL)
    stream_stores.publish(store, stream_stores.some_rows(store, 0.6, 1))
    stream_stores.publish(store, stream_stores.some_rows(store, 0.3, 2))
    return store


def order_of(store: Store, number: int | None, epoch: int) -> list[tuple[int, int]]:
    rows = [list(range(count)) for count in SMALL]
    if number is not None:
        rows = stream_stores.some_rows(store, {1: 0.6, 2: 0.3}[number], number)
    return expected_order(rows, epoch=epoch)


def fit(
    store: Store,
    plan: tuple[int | None, ...] | None = PLANS["shrinking"],
    *,
    callbacks: Callable[[SelectedDataset], list[Any]] | None = None,
    loader: type[DataLoader[Any]] = DataLoader,
    batch: int = 4,
    workers: int = 0,
    validate: bool = True,
    checkpoint: str | None = None,
    fails_at: tuple[int, int] | None = None,
    saver: Any = None,
    package: str = "lightning.pytorch",
    **options: Any,
) -> Any:
    """Train for three epochs and return the model."""
    parts = lightning(package)
    dataset = SelectedDataset(store, batch_size=batch).map(identity)
    if callbacks is None:
        chosen = [parts.SelectionCallback(dataset, plan and Plan(plan))]
    else:
        chosen = callbacks(dataset)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = parts.pl.Trainer(
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        callbacks=[*chosen, *([saver] if saver else [])],
        **{"max_epochs": 3, **quiet, **options},
    )
    model = parts.Model(fails_at)
    batches = loader(dataset, batch_size=batch, num_workers=workers, collate_fn=as_tensor)
    validation = DataLoader(torch.zeros(2, 2), batch_size=2) if validate else None
    with contextlib.suppress(InterruptedError):
        trainer.fit(model, batches, validation, ckpt_path=checkpoint)
    return model


lightnings_warnings = pytest.mark.filterwarnings("ignore")  # about workers, lengths and loaders that cannot be resumed


@lightnings_warnings
@pytest.mark.parametrize(
    ("plan", "options", "resumed"),
    [
        ("shrinking", {}, {}),
        ("growing", {}, {}),
        ("growing", {"validate": False, "max_epochs": -1, "max_steps": 26}, {}),
        ("shrinking", {"val_check_interval": 0.5, "accumulate_grad_batches": 2}, {}),
        ("growing", {"limit_train_batches": 0.5}, {}),
        ("shrinking", {"loader": StatefulDataLoader, "workers": 1}, {}),
        ("growing", {"fails_at": (1, 3)}, {"fails_at": None}),
        ("shrinking", {"batch": 3}, {"batch": 5}),
        ("growing", {"batch": 5}, {"batch": 2, "val_check_interval": 2}),
    ],
)
def test_lightning_resumes_from_every_checkpoint(
    small: Store, tmp_path: Path, plan: str, options: dict[str, Any], resumed: dict[str, Any]
) -> None:
    saver = lightning().SaveAlways(tmp_path)
    model = fit(small, PLANS[plan], saver=saver, **options)
    undisturbed = fit(small, PLANS[plan], **{**options, **resumed})
    whole = [sample for batch in undisturbed.seen for sample in batch]
    assert len(saver.made) > len(model.seen) > 0
    every = 4 if "workers" in options else 1  # starting processes takes time
    for path, seen in saver.made[::every]:
        again = fit(small, PLANS[plan], checkpoint=path, **{**options, **resumed})
        found = [sample for batch in model.seen[:seen] + again.seen for sample in batch]
        assert found == whole, Path(path).name


@lightnings_warnings
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_trains_and_validates_on_epochs_of_any_length(small: Store, plan: str, package: str) -> None:
    orders = [order_of(small, number, epoch) for epoch, number in enumerate(PLANS[plan])]
    model = fit(small, PLANS[plan], package=package)
    assert model.seen == [batch for order in orders for batch in cut(order, 4)]
    assert model.validated == np.cumsum([len(cut(order, 4)) for order in orders]).tolist()


@lightnings_warnings
def test_lightning_takes_a_round_that_an_earlier_callback_makes(tmp_path: Path) -> None:
    """Also in the first epoch of a run, whose first iterator is made before, and of a resumed run."""
    parts = lightning()
    store = stream_stores.make_store(tmp_path, SMALL)
    rows = {}

    class Publish(parts.pl.Callback):
        def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
            rows[trainer.current_epoch] = stream_stores.some_rows(store, 0.5, len(rows))
            stream_stores.publish(store, rows[trainer.current_epoch])

    saver = parts.SaveAlways(tmp_path)
    options: dict[str, Any] = {"callbacks": lambda dataset: [Publish(), parts.SelectionCallback(dataset)]}
    model = fit(store, saver=saver, **options)
    assert model.seen == [batch for epoch in range(3) for batch in cut(expected_order(rows[epoch], epoch=epoch), 4)]
    path = next(path for path, _ in saver.made if "epoch-end" in path)
    again = fit(store, checkpoint=path, **options)
    assert again.seen == [batch for epoch in (1, 2) for batch in cut(expected_order(rows[epoch], epoch=epoch), 4)]


@lightnings_warnings
def test_lightning_trains_on_after_fit_has_returned(small: Store) -> None:
    parts = lightning()
    dataset = SelectedDataset(small, batch_size=4).map(identity)
    loader = DataLoader(dataset, batch_size=4, collate_fn=as_tensor)
    schedule = PowerSchedule(epochs=2, warmup=1, final=0.5)  # knows of no epoch 2
    trainer = parts.pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[parts.SelectionCallback(dataset, schedule)],
    )
    model = parts.Model(None)
    trainer.fit(model, loader)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader)
    assert model.seen == cut(order_of(small, None, 0), 4) + cut(order_of(small, 2, 1), 4)
    trainer.fit(model, loader)
    assert len(model.seen) == len(cut(order_of(small, None, 0), 4) + cut(order_of(small, 2, 1), 4))


@lightnings_warnings
def test_lightning_refuses_what_it_could_not_do_right(small: Store, tmp_path: Path) -> None:
    parts = lightning()
    drawing = LinearSchedule(4, warmup=1, final=0.5, warmup_fraction=0.1)
    with pytest.raises(UsageError, match="warm-up is on random samples, which SelectionCallback does not draw"):
        parts.SelectionCallback(SelectedDataset(small, batch_size=4), drawing)
    with pytest.raises(UsageError, match="give SelectedDataset the loader's batch_size"):
        parts.SelectionCallback(SelectedDataset(small))
    other = SelectedDataset(small, batch_size=4)
    with pytest.raises(StateError, match=r"the training loader streams something else than SelectedDataset\("):
        fit(small, callbacks=lambda dataset: [parts.SelectionCallback(other)])
    saver = parts.SaveAlways(tmp_path)
    fit(small, callbacks=lambda dataset: [], saver=saver, max_epochs=1)
    with pytest.raises(StateError, match="in the middle of epoch 0 without SelectionCallback"):
        fit(small, checkpoint=saver.made[3][0])
    again = fit(small, checkpoint=saver.made[-1][0])
    assert again.seen[0] == cut(order_of(small, 1, 1), 4)[0]


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dynams_stream.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dynams-stream\[lightning\]'"):
        importlib.import_module("dynams_stream.lightning")


# ---- rounds in Lightning ---------------------------------------------------------------------------------------------


@lightnings_warnings
def test_lightning_makes_the_rounds_and_goes_on_in_the_middle_of_one(
    digit_store: Store, tmp_path: Path, client: Client
) -> None:
    """Rounds come at epochs 1 and 2; a run that is cut in epoch 1 and resumed sees what the whole one does."""
    from pipeline.lightning import selection_callbacks

    parts = lightning()
    spec = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)

    class Model(parts.pl.LightningModule):
        def __init__(self, fails_at: tuple[int, int] | None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5)
            self.fails_at, self.seen = fails_at, []

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            if (self.current_epoch, number) == self.fails_at:
                raise InterruptedError
            images, labels, rows = batch
            self.seen.append((self.current_epoch, rows.tolist()))
            return joint_loss(torch.nn.functional.cross_entropy, self.network(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def run(store: Store, checkpoint: str | None, fails_at: tuple[int, int] | None) -> Any:
        dataset = SelectedDataset(store, batch_size=100).map(image_label_row)
        selection = DynamicSelection(
            store, spec, LinearSchedule(3, warmup=1, final=0.2), client=client, least_overlap=0, check_samples=0
        )
        model = Model(fails_at)
        trainer = parts.pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
            callbacks=[*selection_callbacks(selection, dataset, lambda module: module.network), Saver()],
        )  # fmt: skip
        with contextlib.suppress(InterruptedError):
            trainer.fit(model, DataLoader(dataset, batch_size=100), ckpt_path=checkpoint)
        return model.seen

    class Saver(parts.pl.Callback):
        def on_exception(self, trainer: Any, model: Any, _: BaseException) -> None:
            trainer.save_checkpoint(str(tmp_path / "cut.ckpt"))

    whole = run(digit_store, None, None)
    counts = [sum(len(rows) for epoch, rows in whole if epoch == number) for number in range(3)]
    assert counts == [1437, 863, 288]
    assert [one.epoch for one in digit_store.rounds()] == [1, 2]
    twin = Store(tmp_path / "twin")
    build_index(twin, digit_store.dataset().urls)
    before = run(twin, None, (1, 4))
    assert before == whole[: len(before)]
    after = run(twin, str(tmp_path / "cut.ckpt"), None)
    assert before + after == whole, "no round was made twice, no sample repeated or lost"
    assert len(twin.rounds()) == 2


def image_label_row(sample: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
    with Image.open(io.BytesIO(sample["png"])) as image:
        return toy_models.gray(image), int(sample["cls"]), 1000 * int(sample["__url__"][-10:-4]) + sample["__row__"]
