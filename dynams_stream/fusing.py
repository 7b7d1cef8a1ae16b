"""Batch normalisation folded into the convolution before it: in evaluation both are one affine map."""

from __future__ import annotations

from collections import Counter
from typing import cast

from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval

from dynams_stream.errors import UnsupportedLayerError
from dynams_stream.tracing import trace

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def fuse_convolutions(network: nn.Module) -> int:
    """Fold each batch normalisation of a network into its convolution, in place; logits change by rounding alone.

    Only where the convolution feeds the normalisation and nothing else, both are called once, and neither has hooks. A
    network whose forward cannot be traced stays as it is.

    Args:
        network: in evaluation mode, and kept so.

    Returns:
        How many were folded.
    """
    if network.training:
        raise ValueError("only a network in evaluation mode can be fused")
    try:
        graph = trace(network)
    except UnsupportedLayerError:
        return 0
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    fused = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        names = str(before.target), str(node.target)
        convolution, normalisation = (network.get_submodule(name) for name in names)
        if _PAIRS.get(type(convolution)) is not type(normalisation) or any(calls[name] > 1 for name in names):
            continue
        layers = cast(nn.Conv2d, convolution), cast(nn.BatchNorm2d, normalisation)
        if not layers[1].track_running_stats or _has_hooks(*layers):
            continue
        _replace(network, names[0], fuse_conv_bn_eval(*layers))
        _replace(network, names[1], nn.Identity())
        fused += 1
    return fused


def _has_hooks(*layers: nn.Module) -> bool:
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(owner), attribute, layer)
