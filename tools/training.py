"""The reference training loop: one run of one method with one seed. All methods go through the same loop."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynams_stream.proxy import ParameterSharingProxy, joint_loss
from dynams_stream.scorer import load_callable
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from pipeline.cores import available_cores
from tools.training_config import Method, RunConfig
from tools.training_rounds import Rounds

_Outputs = Tensor | tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class RunResult:
    """What one run measured.

    Attributes:
        method, seed: which run.
        accuracy: share of the test images that are classified correctly after the last epoch.
        samples: samples trained on, all epochs together.
        steps: optimizer steps.
        proxy_samples: of `samples`, those that the proxy was trained on, too.
        scored_samples: samples scored for rounds.
        seconds: wall time of training, scoring and selecting; test evaluation is not in it.
        scoring_seconds: the part of `seconds` that rounds took.
        processor_seconds: of it, what this process kept its processors busy; loader and scoring workers are others.
        rounds: numbers of the published rounds, in order.
    """

    method: str
    seed: int
    accuracy: float
    samples: int
    steps: int
    proxy_samples: int
    scored_samples: int
    seconds: float
    scoring_seconds: float
    processor_seconds: float
    rounds: tuple[int, ...]


class DecodeImage:
    """The stage from a raw sample to (image tensor, label, place in the dataset, weight); picklable, for workers."""

    def __init__(self, config: RunConfig, store: Store, *, training: bool = False):
        data = config.data
        self.transform = (data.train_transform if training else None) or data.transform
        self.input, self.label = data.input, data.label
        dataset = store.dataset()
        self._starts = dict(zip(dataset.urls, (np.cumsum(dataset.counts) - dataset.counts).tolist(), strict=True))
        self._apply: Callable[[Image.Image], Tensor] | None = None

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, int, int, float]:
        if self._apply is None:
            self._apply = load_callable(self.transform, "the data's transform")
        place = self._starts[sample["__url__"]] + sample["__row__"]
        with Image.open(io.BytesIO(sample[self.input])) as image:
            return self._apply(image), int(sample[self.label]), place, sample.get("__weight__", 1.0)


def train_run(
    config: RunConfig, method: Method, seed: int, store: Store, test: Store, client: Client, report: Callable[..., None]
) -> RunResult:
    """Train once and measure.

    Args:
        config: the comparison.
        method: one of `METHODS`.
        seed: of initial weights and sample order.
        store: an indexed store of the training shards; this run's rounds go there.
        test: an indexed store of the test shards.
        client: the Dask client that scores.
        report: called with (epoch, epochs) as epochs end.
    """
    torch.manual_seed(seed)
    # Loader workers decode on cores of their own: OpenMP threads that wait for a core they share halve the speed.
    torch.set_num_threads(max(1, available_cores() - config.training.loader_workers))
    model = build_model(config)
    rounds = Rounds(config, method, seed, store, client)
    run = _Run(config, model, rounds, store)
    began, processor_began = time.perf_counter(), time.process_time()
    for epoch in range(config.training.epochs):
        run.epoch(epoch)
        report(epoch + 1, config.training.epochs)
        if run.steps == run.total_steps:
            break
    seconds, processor_seconds = time.perf_counter() - began, time.process_time() - processor_began
    return RunResult(
        method=method, seed=seed, accuracy=accuracy(config, model, test), samples=run.samples, steps=run.steps,
        proxy_samples=run.proxy_samples, scored_samples=rounds.scored, seconds=seconds,
        scoring_seconds=run.scoring_seconds, processor_seconds=processor_seconds, rounds=tuple(rounds.published),
    )  # fmt: skip


def build_model(config: RunConfig) -> nn.Module:
    """The network of a configuration, on its device and in the layout of memory that it asks for."""
    model: nn.Module = load_callable(config.model.factory, "model.factory")(**config.model.args)
    return model.to(config.training.device, memory_format=_memory_format(config))


def _on_device(config: RunConfig, images: Tensor) -> Tensor:
    return images.to(config.training.device, memory_format=_memory_format(config), non_blocking=True)


def _autocast(config: RunConfig) -> torch.autocast:
    return torch.autocast(config.training.device, torch.bfloat16, enabled=config.training.bf16)


def _memory_format(config: RunConfig) -> torch.memory_format:
    return torch.channels_last if config.model.channels_last else torch.contiguous_format


class _Run:
    """One run as it goes: the network, its optimizer, its loader, and what is counted."""

    def __init__(self, config: RunConfig, model: nn.Module, rounds: Rounds, store: Store):
        self.config, self.model, self.rounds = config, model, rounds
        self.samples = self.steps = self.proxy_samples = 0
        self.scoring_seconds = 0.0
        self.schedule = config.schedule()
        self.total_steps = _total_steps(config, rounds, store)
        self.network: nn.Module = model
        if rounds.has_proxy:
            self.network = ParameterSharingProxy(
                model, config.model.width, head=config.model.head, every=config.model.every
            )
        training = config.training
        self.dataset = SelectedDataset(store, batch_size=training.batch_size, seed=rounds.seed)
        self.loader = DataLoader(
            self.dataset.map(DecodeImage(config, store, training=True)),
            batch_size=training.batch_size,
            pin_memory=training.device == "cuda",
            num_workers=training.loader_workers,
            persistent_workers=training.loader_workers > 0,
            multiprocessing_context="forkserver" if training.loader_workers > 0 else None,
        )
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=training.learning_rate, momentum=training.momentum,
            weight_decay=training.weight_decay, nesterov=training.momentum > 0,
        )  # fmt: skip
        self.learning_rate = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, training.learning_rate, total_steps=self.total_steps
        )

    def epoch(self, epoch: int) -> None:
        """Make the round that is due, if one is, and train on what it selects."""
        if self.rounds.begins(epoch):
            began = time.perf_counter()
            self.rounds.begin(epoch, self.schedule.fraction(epoch), self.network)
            self.scoring_seconds += time.perf_counter() - began
        self.dataset.set_epoch(epoch, round=self.schedule.round(epoch) if self.rounds.selects else None)
        trained = self.network if self.rounds.trains_proxy(epoch) else self.model
        for images, labels, places, weights in self.loader:
            self._step(trained, images, labels, places, weights.float())
            if self.steps == self.total_steps:
                break

    def _step(self, network: nn.Module, images: Tensor, labels: Tensor, places: Tensor, weights: Tensor) -> None:
        training, losses = self.config.training, []
        labels, weights = (one.to(training.device, non_blocking=True) for one in (labels, weights))
        with _autocast(self.config):
            outputs: _Outputs = network(_on_device(self.config, images))

        def criterion(logits: Tensor, labels: Tensor) -> Tensor:
            smoothing = training.label_smoothing
            losses.append(
                nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
            )
            return (losses[-1] * weights).mean()

        if isinstance(outputs, Tensor):
            loss = criterion(outputs, labels)
        else:
            loss = joint_loss(criterion, outputs, labels, proxy_weight=self.config.model.proxy_weight)
            self.proxy_samples += len(labels) if outputs[1] is not None else 0
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.learning_rate.step()
        if self.rounds.observes:
            self.rounds.observe(places.numpy(), losses[0].detach().cpu().numpy())
        self.samples, self.steps = self.samples + len(labels), self.steps + 1


def _total_steps(config: RunConfig, rounds: Rounds, store: Store) -> int:
    """Optimizer steps of a run, over which the learning rate goes through one cycle."""
    training, samples = config.training, store.dataset().samples
    if rounds.method == "full":
        return training.epochs * -(-samples // training.batch_size)
    return config.schedule().total_steps(samples, training.batch_size)


def accuracy(config: RunConfig, model: nn.Module, test: Store) -> float:
    """Share of the test samples whose largest logit is their label's."""
    dataset = SelectedDataset(test, shuffle=False, round=None, tail="keep").map(DecodeImage(config, test))
    right = total = 0
    was_training = model.training
    model.eval()
    with torch.inference_mode(), _autocast(config):
        for images, labels, *_ in DataLoader(dataset, batch_size=500):
            right += int((model(_on_device(config, images)).argmax(dim=1).cpu() == labels).sum())
            total += len(labels)
    model.train(was_training)
    return right / total


def run_folder(config: RunConfig, method: str, seed: int) -> Path:
    """Where a run keeps its store."""
    return config.out / "stores" / f"{method}-{seed}"
