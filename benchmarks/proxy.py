"""What training the proxy along costs, and how much of that is the sharing.

    python benchmarks/proxy.py [--models small_cnn resnet18 …] [--widths 0.5 0.25] [--turns 9]

Steps (forward and backward, in training mode) on random images, side by side in turns:

    model      the model alone
    joint      the model and its parameter sharing proxy
    slim       a plain network of the proxy's size, which shares nothing
    sharing    (joint − model) / slim: 1 if the shared slices cost nothing

and forward passes for scoring, in evaluation and inference mode: the model, the slim network, and the slim network with
its batch normalisation folded in, as scoring runs it. Medians over the turns, ratios within a turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from dynams_stream.costs import count_flops
from dynams_stream.fusing import fuse_convolutions
from dynams_stream.proxy import ParameterSharingProxy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.models import small_cnn

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "small_cnn": (partial(small_cnn, width=16, stride=2), (1, 28, 28), 64),
    "resnet18": (models.resnet18, (3, 64, 64), 32),
    "resnet50": (models.resnet50, (3, 96, 96), 16),
    "mobilenet_v2": (models.mobilenet_v2, (3, 96, 96), 16),
    "densenet121": (models.densenet121, (3, 96, 96), 8),
    "vit_b_16": (partial(models.vit_b_16, image_size=96), (3, 96, 96), 8),
}


def step(network: nn.Module, images: Tensor) -> None:
    """Forward and backward in training mode; gradients are dropped first, as optimizers do."""
    network.train()
    network.zero_grad(set_to_none=True)
    outputs = network(images)
    losses = [output.square().mean() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
    torch.stack(losses).sum().backward()


def forward(network: nn.Module, images: Tensor) -> None:
    """As scoring does."""
    network.eval()
    with torch.inference_mode():
        network(images)


def seconds(work: Callable[[], None]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, width: float, turns: int) -> dict[str, float]:
    """Medians of one model and width."""
    factory, shape, batch = MODELS[name]
    torch.manual_seed(0)
    network, images = ParameterSharingProxy(factory(), width), torch.randn(batch, *shape)
    slim, fused = network.slim(), network.slim().eval()
    fuse_convolutions(fused)
    works = {
        "model": partial(step, network.model, images),
        "joint": partial(step, network, images),
        "slim": partial(step, slim, images),
        "score model": partial(forward, network.model, images),
        "score slim": partial(forward, slim, images),
        "score fused": partial(forward, fused, images),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in works}
    for turn in range(turns + 1):  # the first one warms up
        for kind, work in works.items():
            passed = seconds(work)
            if turn:
                taken[kind].append(passed)

    def ratio(of: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(of({kind: times[i] for kind, times in taken.items()}) for i in range(turns))

    costs = count_flops(factory(), shape, [width])[width]
    return {
        "model, ms": 1000 * statistics.median(taken["model"]),
        "joint / model": ratio(lambda one: one["joint"] / one["model"]),
        "FLOPs": 1 + costs.proxy_training / costs.training,
        "sharing": ratio(lambda one: (one["joint"] - one["model"]) / one["slim"]),
        "score slim / model": ratio(lambda one: one["score slim"] / one["score model"]),
        "FLOPs of a score": costs.proxy_share,
        "fused / slim": ratio(lambda one: one["score fused"] / one["score slim"]),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="What training the proxy along costs; see the module's docstring.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--widths", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    heading = True
    for name in options.models:
        for width in options.widths:
            row = measure(name, width, options.turns)
            if heading:
                print(f"| model | width | {' | '.join(row)} |\n|{'---|' * (len(row) + 2)}")
                heading = False
            cells = " | ".join(f"{value:.1f}" if key.endswith("ms") else f"{value:.2f}" for key, value in row.items())
            print(f"| {name} | {width:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
