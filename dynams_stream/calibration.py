"""Batch normalisation statistics of the weights as they are: re-estimated from samples before they score.

In training, running means and variances follow the weights by some steps, and under a high learning rate those steps
matter: a proxy of a network that has just warmed up then ranks samples by noise. Their exact values, averaged over
batches with the weights held still, are what Yu and Huang 2019 ("Universally slimmable networks", arXiv 1903.05134) use
for slim networks. They are also those of the whole dataset, not of the subset that was trained on last.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_running_statistics(network: nn.Module) -> bool:
    """Whether there is anything to re-estimate."""
    return bool(_layers(network))


@torch.no_grad()
def recompute_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of all batch normalisation to the means over `batches`; everything else stays.

    Each batch counts alike, whatever its size. Layers are left in evaluation mode.

    Args:
        network: on the batches' device.
        batches: inputs as scoring has them, of two samples or more each.
    """
    layers = _layers(network)
    network.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    for inputs in batches:
        network(inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.eval()


def _layers(network: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
