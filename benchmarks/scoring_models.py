"""What `scoring.py` scores with: networks, and transforms from images to their inputs."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from examples.models import small_cnn


def resnet18() -> nn.Module:
    """torchvision's, for 1,000 classes."""
    import torchvision

    return torchvision.models.resnet18()  # type: ignore[no-any-return]


def small() -> nn.Module:
    """Three convolutions, on colour."""
    return small_cnn(channels=3, classes=1000, width=16, stride=2)


def crop(image: Image.Image) -> Tensor:
    """The 224 × 224 pixels in the middle, float32, channels first."""
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return _tensor(image.convert("RGB").crop((left, top, left + 224, top + 224)))


def thumbnail(image: Image.Image) -> Tensor:
    """Shrunk to 32 × 32 pixels, float32, channels first."""
    return _tensor(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
