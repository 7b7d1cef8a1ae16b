"""Networks and transforms for CIFAR-10 and ImageNet: what examples/cifar10.toml and examples/imagenet.toml name."""

from __future__ import annotations

from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import v2 as transforms

_MEAN, _DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_TENSOR = [transforms.PILToTensor(), transforms.ConvertImageDtype(), transforms.Normalize(_MEAN, _DEVIATION)]

_CIFAR_TRAIN = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *_TENSOR])
_CIFAR_TEST = transforms.Compose(_TENSOR)
_IMAGENET_TRAIN = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *_TENSOR])
_IMAGENET_TEST = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *_TENSOR])


def cifar_resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 for images of 32 × 32: a 3 × 3 convolution at the begin, no pooling after it."""
    model = models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def cifar_train(image: Image.Image) -> Tensor:
    """(3, 32, 32), float32: a random crop of the padded image, mirrored half of the time."""
    return _CIFAR_TRAIN(image.convert("RGB"))


def cifar_test(image: Image.Image) -> Tensor:
    """(3, 32, 32), float32."""
    return _CIFAR_TEST(image.convert("RGB"))


def imagenet_train(image: Image.Image) -> Tensor:
    """(3, 224, 224), float32: a random part of the image, resized, mirrored half of the time."""
    return _IMAGENET_TRAIN(image.convert("RGB"))


def imagenet_test(image: Image.Image) -> Tensor:
    """(3, 224, 224), float32: the middle of the image, its shorter side resized to 256."""
    return _IMAGENET_TEST(image.convert("RGB"))
