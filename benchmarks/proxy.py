"""What training the proxy along costs, and how much of that is the sharing.

    python benchmarks/proxy.py [--models small_cnn resnet18 …] [--widths 0.5 0.25] [--turns 9]
    python benchmarks/proxy.py --device cuda --image-size 224 --batch-size 128      # bfloat16, channels last

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
import copy
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


def autocast(device: str) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def step(network: nn.Module, images: Tensor) -> None:
    """Forward and backward in training mode; gradients are dropped first, as optimizers do."""
    network.train()
    network.zero_grad(set_to_none=True)
    with autocast(images.device.type):
        outputs = network(images)
    losses = [output.float().square().mean() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
    torch.stack(losses).sum().backward()


def forward(network: nn.Module, images: Tensor) -> None:
    """As scoring does."""
    network.eval()
    with torch.inference_mode(), autocast(images.device.type):
        network(images)


def seconds(work: Callable[[], None]) -> float:
    """How long one call takes, the GPU's part included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(
    name: str, width: float, turns: int, device: str, image_size: int | None, batch_size: int | None, compile: bool
) -> dict[str, float]:
    """Medians of one model and width."""
    factory, shape, batch = MODELS[name]
    if image_size is not None:
        shape = (shape[0], image_size, image_size)
        factory = partial(models.vit_b_16, image_size=image_size) if name == "vit_b_16" else factory
    torch.manual_seed(0)
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    network = ParameterSharingProxy(factory(), width).to(device, memory_format=layout)
    images = torch.randn(batch_size or batch, *shape, device=device).to(memory_format=layout)
    slim, fused = (network.slim().to(device, memory_format=layout).eval() for _ in range(2))
    fuse_convolutions(fused)
    model = network.model
    if compile:
        model = copy.deepcopy(model)
        for one in (network, model, slim, fused):
            one.compile()
    works = {
        "model": partial(step, model, images),
        "joint": partial(step, network, images),
        "slim": partial(step, slim, images),
        "score model": partial(forward, model, images),
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--image-size", type=int, help="of both sides; small ones for each model unless given")
    parser.add_argument("--batch-size", type=int, help="small ones for each model unless given")
    parser.add_argument("--compile", action="store_true", help="all networks through torch.compile")
    options = parser.parse_args()
    heading = True
    for name in options.models:
        for width in options.widths:
            row = measure(
                name, width, options.turns, options.device, options.image_size, options.batch_size, options.compile
            )
            if heading:
                print(f"| model | width | {' | '.join(row)} |\n|{'---|' * (len(row) + 2)}")
                heading = False
            cells = " | ".join(f"{value:.1f}" if key.endswith("ms") else f"{value:.2f}" for key, value in row.items())
            print(f"| {name} | {width:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
