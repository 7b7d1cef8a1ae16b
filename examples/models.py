"""Small networks and transforms for the examples; any `module:callable` of your own works the same way."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def small_cnn(channels: int = 1, classes: int = 10, width: int = 32, stride: int = 1) -> nn.Module:
    """Three convolutions with batch normalisation, global pooling, one linear layer; `stride` is the first one's."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(channels, width, stride),
        *block(width, 2 * width, 2),
        *block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def grayscale(image: Image.Image) -> Tensor:
    """One channel, float32, (1, height, width), about zero mean and unit variance for digits on black."""
    return _gray(image, mean=33.0, deviation=79.0)


def digits_input(image: Image.Image) -> Tensor:
    """One channel, float32, (1, height, width), about zero mean and unit variance for scikit-learn's digits."""
    return _gray(image, mean=78.0, deviation=96.0)


def _gray(image: Image.Image, mean: float, deviation: float) -> Tensor:
    pixels = np.asarray(image if image.mode == "L" else image.convert("L")).astype(np.float32)
    pixels -= mean
    pixels /= deviation
    return torch.from_numpy(pixels[np.newaxis])
