"""The reference training loop: one run of one method with one seed. All methods go through the same loop."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distributed import Client
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynams_stream.proxy import ParameterSharingProxy, joint_loss
from dynams_stream.schedule import Schedule
from dynams_stream.scorer import ScorerSpec, load_callable
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from pipeline.cores import available_cores
from pipeline.rounds import run_round
from pipeline.select_job import select_round
from tools.training_config import RunConfig


@dataclass(frozen=True)
class RunResult:
    """What one run measured.

    Attributes:
        method, seed: which run.
        accuracy: share of the test images that are classified correctly after the last epoch.
        samples: samples trained on, all epochs together.
        steps: optimizer steps.
        seconds: wall time of training, scoring and selecting; test evaluation is not in it.
        scoring_seconds: the part of `seconds` that rounds took.
        rounds: numbers of the published rounds, in order.
    """

    method: str
    seed: int
    accuracy: float
    samples: int
    steps: int
    seconds: float
    scoring_seconds: float
    rounds: tuple[int, ...]


class DecodeImage:
    """The stage from a raw sample to (image tensor, label); picklable, for loader workers."""

    def __init__(self, config: RunConfig):
        self.transform, self.input, self.label = config.data.transform, config.data.input, config.data.label
        self._apply: Callable[[Image.Image], Tensor] | None = None

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, int]:
        if self._apply is None:
            self._apply = load_callable(self.transform, "data.transform")
        with Image.open(io.BytesIO(sample[self.input])) as image:
            return self._apply(image), int(sample[self.label])


class Rounds:
    """How a method gets its selection for an epoch; `begin` publishes what the method trains on next."""

    def __init__(self, config: RunConfig, method: str, seed: int, store: Store, client: Client):
        self.config, self.method, self.seed, self.store, self.client = config, method, seed, store, client
        self.published: list[int] = []
        self._scored: int | None = None

    @property
    def has_proxy(self) -> bool:
        """Whether this method has a proxy score its rounds."""
        return self.method in ("dynams", "static") and self.config.selection.scorer == "proxy"

    def trains_proxy(self, epoch: int) -> bool:
        """Whether the proxy is still trained along in `epoch`: until the last round that it scores has begun."""
        later = self.config.schedule().rounds_follow(epoch)
        return self.has_proxy and later and (self.method == "dynams" or self._scored is None)

    def begin(self, epoch: int, fraction: float, network: nn.Module) -> None:
        """Publish the round that starts with this epoch, scored by the network or by the proxy in it."""
        if self.method in ("random", "fresh-random"):
            seed = self.seed if self.method == "random" else self.seed * 100_000 + epoch
            made = select_round(self.store, fraction=fraction, strategy=f"random:{seed}", as_newest=True).round
        elif self.method == "static" and self._scored is not None:
            made = select_round(
                self.store,
                fraction=fraction,
                strategy=self.config.selection.strategy,
                scores_of=self._scored,
                as_newest=True,
            ).round
        else:
            made = run_round(
                self.store, scorer_spec(self.config), weights=network, fraction=fraction, epoch=epoch,
                strategy=self.config.selection.strategy, client=self.client,
            )  # fmt: skip
            self._scored = made.number
        self.published.append(made.number)


def scorer_spec(config: RunConfig) -> ScorerSpec:
    """How rounds of this configuration are scored."""
    data, model = config.data, config.model
    return ScorerSpec(
        model=model.factory, model_args=model.args, head=model.head,
        width=model.width if config.selection.scorer == "proxy" else 1.0,
        input=data.input, label=data.label, transform=data.transform,
    )  # fmt: skip


def train_run(
    config: RunConfig, method: str, seed: int, store: Store, test: Store, client: Client, report: Callable[..., None]
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
    schedule = config.schedule() if method != "full" else None
    model = load_callable(config.model.factory, "model.factory")(**config.model.args)
    rounds = Rounds(config, method, seed, store, client)
    network: nn.Module = model
    if rounds.has_proxy:
        network = ParameterSharingProxy(model, config.model.width, head=config.model.head, every=config.model.every)
    dataset = SelectedDataset(store, batch_size=config.training.batch_size, seed=seed).map(DecodeImage(config))
    loader = DataLoader(
        dataset,
        batch_size=config.training.batch_size,
        num_workers=config.training.loader_workers,
        persistent_workers=config.training.loader_workers > 0,
        multiprocessing_context="forkserver" if config.training.loader_workers > 0 else None,
    )
    optimizer, learning_rate = _optimizer(config, schedule, store, network)
    samples = steps = 0
    scoring = 0.0
    began = time.perf_counter()
    for epoch in range(config.training.epochs):
        if schedule is not None and schedule.starts_round(epoch):
            round_began = time.perf_counter()
            rounds.begin(epoch, schedule.fraction(epoch), network)
            scoring += time.perf_counter() - round_began
            network = network if rounds.trains_proxy(epoch) else model
        dataset.set_epoch(epoch, round=None if schedule is None else schedule.round(epoch))
        for images, labels in loader:
            loss = _loss(config, network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learning_rate.step()
            samples, steps = samples + len(labels), steps + 1
        report(epoch + 1, config.training.epochs)
    seconds = time.perf_counter() - began
    return RunResult(
        method=method, seed=seed, accuracy=accuracy(config, model, test), samples=samples, steps=steps,
        seconds=seconds, scoring_seconds=scoring, rounds=tuple(rounds.published),
    )  # fmt: skip


def _loss(config: RunConfig, outputs: Tensor | tuple[Tensor, Tensor | None], labels: Tensor) -> Tensor:
    if isinstance(outputs, Tensor):
        return nn.functional.cross_entropy(outputs, labels)
    return joint_loss(nn.functional.cross_entropy, outputs, labels, proxy_weight=config.model.proxy_weight)


def _optimizer(
    config: RunConfig, schedule: Schedule | None, store: Store, network: nn.Module
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD, and one cycle of the learning rate over exactly the steps that this method will take."""
    training, samples = config.training, store.dataset().samples
    if schedule is None:
        steps = training.epochs * -(-samples // training.batch_size)
    else:
        steps = schedule.total_steps(samples, training.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=training.learning_rate, momentum=training.momentum,
        weight_decay=training.weight_decay, nesterov=training.momentum > 0,
    )  # fmt: skip
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=steps)


def accuracy(config: RunConfig, model: nn.Module, test: Store) -> float:
    """Share of the test samples whose largest logit is their label's."""
    dataset = SelectedDataset(test, shuffle=False, round=None, tail="keep").map(DecodeImage(config))
    right = total = 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for images, labels in DataLoader(dataset, batch_size=500):
            right += int((model(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    model.train(was_training)
    return right / total


def run_folder(config: RunConfig, method: str, seed: int) -> Path:
    """Where a run keeps its store."""
    return config.out / "stores" / f"{method}-{seed}"
