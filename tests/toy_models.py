"""Models and transforms that tests and their worker processes import by name."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def linear(seed: int = 0, classes: int = 10, pixels: int = 64, equal_rows: bool = False) -> nn.Module:
    """One linear layer on the pixels: its features are the image itself, so every score is known by hand."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(pixels, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, pixels, generator=generator))
        layer.bias.copy_(torch.randn(classes, generator=generator))
        if equal_rows:
            layer.weight[:] = layer.weight[0]
    return nn.Sequential(nn.Flatten(), layer)


def small_cnn(width: int = 8) -> nn.Module:
    """Two convolutions with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def broken(**arguments: object) -> nn.Module:
    """Gives NaN for everything."""
    model = linear()
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    return model


def single_logit() -> nn.Module:
    """A head with one output."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))


def not_a_module() -> str:
    """What --model must not return."""
    return "resnet"


def gray(image: Image.Image) -> Tensor:
    """(1, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 255).unsqueeze(0)


def inverted(image: Image.Image) -> Tensor:
    """`gray`, with black and white exchanged."""
    return 1 - gray(image)


def picky(image: Image.Image) -> Tensor:
    """Refuses images whose first pixels are dark in a certain way, as a broken transform would."""
    tensor = gray(image)
    if tensor[0, 2, 2] > 0.9:
        raise ValueError("too bright")
    return tensor


def wrong_type(image: Image.Image) -> list[int]:
    """Not a tensor."""
    return [1, 2]


def slow_gray(image: Image.Image) -> Tensor:
    """As `gray`, but slow enough for a test to kill the job in the middle."""
    time.sleep(0.004)
    return gray(image)


def mended_later(image: Image.Image) -> Tensor:
    """Fails until the file that the environment names is there, as a transform does that its author mends."""
    if not os.path.exists(os.environ["DYNAMS_TEST_MARKER"]):
        raise ValueError("not mended yet")
    return gray(image)


TORCH_THREADS: dict[str, set[int]] = {"transform": set(), "forward": set()}
"""How many threads torch might start, as `watched_gray` and `watched_linear` found it."""


def watched_gray(image: Image.Image) -> Tensor:
    """As `gray`; notes how many threads torch might start for it."""
    TORCH_THREADS["transform"].add(torch.get_num_threads())
    return gray(image)


class _Watched(nn.Flatten):
    def forward(self, inputs: Tensor) -> Tensor:
        TORCH_THREADS["forward"].add(torch.get_num_threads())
        return super().forward(inputs)


def watched_linear() -> nn.Module:
    """As `linear`; notes how many threads torch might start for it."""
    return nn.Sequential(_Watched(), linear()[1])


def out_of_memory(*arguments: object) -> None:
    """A worker's task that fails as one does whose model is too large."""
    raise MemoryError("cannot allocate")


def overwriting_gray(image: Image.Image) -> Tensor:
    """As `gray`; where the environment's file names a shard and other bytes, writes them over the shard first."""
    marker = os.environ["DYNAMS_TEST_MARKER"]
    try:
        os.rename(marker, marker + ".taken")
    except FileNotFoundError:
        return gray(image)
    with open(marker + ".taken") as file:
        shard, others = file.read().splitlines()
    with open(others, "rb") as source, open(shard, "r+b") as target:
        target.write(source.read())
    return gray(image)


def deadly_gray(image: Image.Image) -> Tensor:
    """As `gray`; an image whose pixels add up to what the environment's file says kills the process."""
    tensor, marker = gray(image), os.environ["DYNAMS_TEST_MARKER"]
    if os.path.exists(marker):
        with open(marker) as file:
            if pixel_sum(image) == int(file.read()):
                os.kill(os.getpid(), signal.SIGKILL)
    return tensor


def pixel_sum(image: Image.Image) -> int:
    """What an image's pixels add up to."""
    return int(np.asarray(image.convert("L"), dtype=np.int64).sum())


def slower_gray(image: Image.Image) -> Tensor:
    """As `gray`; a part of a hundred samples takes more than a second."""
    time.sleep(0.03)
    return gray(image)


def very_slow_gray(image: Image.Image) -> Tensor:
    """As `gray`; a part of a hundred samples takes half a minute. Makes the environment's file when it begins."""
    open(os.environ["DYNAMS_TEST_MARKER"], "a").close()
    time.sleep(0.6)
    return gray(image)
