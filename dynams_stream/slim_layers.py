"""How each kind of layer that owns parameters is slimmed: rules from (layer, its input) to (plans, its output).

Convolutions and linear layers set the channels, normalisation keeps them. Layers that work on groups of channels
(grouped convolutions, group normalisation, the heads of attention) keep the size of a group and have fewer groups, so
that what stays is the leading part of the model's; `Widths` then rounds to whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dynams_stream.channels import Blocks, Channels, ChannelsLostError, Other, Outputs, Value

Kept = tuple[Blocks | None, ...]
"""For each of a tensor's first dimensions what stays of it; None and dimensions beyond stay whole."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is slimmed.

    Attributes:
        sizes: attributes of the layer and their slim values, such as {"in_channels": 32, "out_channels": 64}.
        kept: for each parameter and buffer, what the slim layer takes of it; {"weight": (((128, 64),), ((64, 32),))}
            stands for weight[:64, :32].
        shared: whether a proxy uses the model's own tensors (else it has its own, starting as a copy).
    """

    sizes: dict[str, Any]
    kept: dict[str, Kept]
    shared: bool


Rule = tuple[dict[str, LayerPlan], Value]
"""Plans by name below the layer ("" is the layer itself), and its output."""


class UnevenGroupsError(Exception):
    """The slim part of `channels` has to be a multiple of `size`."""

    def __init__(self, channels: int, size: int):
        self.channels, self.size = channels, size
        super().__init__(channels, size)


@dataclass
class Widths:
    """How many channels stay: p of them, rounded half up to whole groups, at least one group.

    Attributes:
        width: p.
        groups: by number of channels the size of the groups that layers need.
    """

    width: float
    groups: dict[int, int] = field(default_factory=dict)

    def of(self, channels: int) -> int:
        """The slim network's share of `channels`."""
        group = self.groups.get(channels, 1)
        return group * max(1, math.floor(self.width * channels / group + 0.5))

    def require_groups(self, blocks: Blocks, size: int) -> None:
        """Check that blocks consist of whole groups of `size` channels.

        Raises:
            UnevenGroupsError: they would if the widths were rounded so.
            ChannelsLostError: they cannot.
        """
        for full, slim in blocks:
            if full % size:
                raise ChannelsLostError(f"its groups of {size} channels mix those of several layers")
            if slim % size:
                if self.groups.get(full, 1) % size == 0:
                    raise ChannelsLostError(f"its groups of {size} channels would be cut: {slim} of {full} stay")
                raise UnevenGroupsError(full, size)


# ---- linear layers and convolutions ----------------------------------------------------------------------------------


def slim_head(layer: nn.Linear, value: Value) -> Rule:
    """The classifier: every class stays."""
    wide = _features(value, layer.in_features)
    return {
        "": LayerPlan({"in_features": _slim(wide)}, {"weight": (None, wide), "bias": ()}, shared=False)
    }, Other.TENSOR


def slim_linear(layer: nn.Linear, value: Value, widths: Widths) -> Rule:
    """A linear layer on the last dimension."""
    wide, out = _features(value, layer.in_features), _block(layer.out_features, widths)
    sizes = {"in_features": _slim(wide), "out_features": _slim(out)}
    plan = LayerPlan(sizes, {"weight": (out, wide), "bias": (out,)}, shared=True)
    rank = value.rank if isinstance(value, Channels) else 2
    return {"": plan}, Channels(out, rank - 1, rank)


def _features(value: Value, features: int) -> Blocks:
    """What stays of the input features of a linear layer."""
    if not isinstance(value, Channels):
        return ((features, features),)
    if not value.is_last:
        raise ChannelsLostError("it works on a spatial dimension; flatten or pool the features first")
    return _times(value, features)


def _times(value: Channels, features: int) -> Blocks:
    """What stays of a dimension of `features` entries that holds the channels of `value`."""
    each, rest = divmod(features, value.full)
    if rest or (each != 1 and not value.flattened):
        raise ChannelsLostError(f"it takes {features} features, but gets {value}")
    return value.times(each)


def slim_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, spatial: int, value: Value, widths: Widths) -> Rule:
    """A convolution, plain, grouped or depthwise: a slim one has fewer groups of the same size."""
    wide: Blocks = ((layer.in_channels, layer.in_channels),)
    if isinstance(value, Channels):
        if not value.is_image(spatial) or value.full != layer.in_channels:
            raise ChannelsLostError(f"it takes {layer.in_channels} channels of {spatial} dimensions, but gets {value}")
        wide = value.blocks
    if layer.groups == 1:
        groups, out, inside = 1, _block(layer.out_channels, widths), wide
    else:
        size, made = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        widths.require_groups(wide, size)
        groups, inside = _slim(wide) // size, ((size, size),)
        out = tuple((full // size * made, slim // size * made) for full, slim in wide)
    sizes = {"in_channels": _slim(wide), "out_channels": _slim(out), "groups": groups}
    return {"": LayerPlan(sizes, {"weight": (out, inside), "bias": (out,)}, shared=True)}, Channels(out, 1, 2 + spatial)


def slim_prelu(layer: nn.PReLU, value: Value) -> Rule:
    """A PReLU with one slope, or one for each channel."""
    slopes: Blocks = ((layer.num_parameters, layer.num_parameters),)
    if layer.num_parameters > 1 and isinstance(value, Channels):
        if layer.num_parameters != value.full or value.flattened or value.axis != 1:
            raise ChannelsLostError(f"it has {layer.num_parameters} slopes, but gets {value}")
        slopes = value.blocks
    return {"": LayerPlan({"num_parameters": _slim(slopes)}, {"weight": (slopes,)}, shared=True)}, value


# ---- normalisation ---------------------------------------------------------------------------------------------------


def slim_channel_norm(layer: _NormBase, value: Value) -> Rule:
    """Batch and instance normalisation: of each channel on its own."""
    features: Blocks = ((layer.num_features, layer.num_features),)
    if isinstance(value, Channels):
        if value.axis != 1:
            raise ChannelsLostError(f"it normalises dimension 1, but gets {value} in dimension {value.axis}")
        features = _times(value, layer.num_features)
        value = Channels(features, value.axis, value.rank) if value.flattened else value
    kept: dict[str, Kept] = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (features,))
    plan = LayerPlan({"num_features": _slim(features)}, {**kept, "num_batches_tracked": ()}, shared=False)
    return {"": plan}, value


def slim_group_norm(layer: nn.GroupNorm, value: Value, widths: Widths) -> Rule:
    """Group normalisation: a slim one has fewer groups of the same size."""
    channels: Blocks = ((layer.num_channels, layer.num_channels),)
    size = layer.num_channels // layer.num_groups
    if isinstance(value, Channels):
        if value.axis != 1 or value.full != layer.num_channels or value.flattened:
            raise ChannelsLostError(f"it takes {layer.num_channels} channels, but gets {value}")
        channels = value.blocks
        widths.require_groups(channels, size)
    sizes = {"num_channels": _slim(channels), "num_groups": _slim(channels) // size}
    return {"": LayerPlan(sizes, {"weight": (channels,), "bias": (channels,)}, shared=False)}, value


def slim_layer_norm(shape: Sequence[int], value: Value) -> Rule:
    """Layer normalisation over the last dimensions, of size `shape`: over the slim channels alone."""
    kept: Kept = (None,) * len(shape)
    if isinstance(value, Channels):
        at = value.axis - (value.rank - len(shape))
        if at < 0:
            raise ChannelsLostError(
                f"it normalises over the last {len(shape)} dimensions, which do not hold the {value}"
            )
        kept = tuple(_times(value, size) if dim == at else None for dim, size in enumerate(shape))
    sizes = tuple(size if blocks is None else _slim(blocks) for size, blocks in zip(shape, kept, strict=True))
    return {"": LayerPlan({"normalized_shape": sizes}, {"weight": kept, "bias": kept}, shared=False)}, value


# ---- attention -------------------------------------------------------------------------------------------------------


def slim_attention(layer: nn.MultiheadAttention, values: Sequence[Value], widths: Widths) -> Rule:
    """Attention between tensors of the same channels: a slim one has fewer heads of the same size."""
    value = values[0]
    packed = layer.in_proj_weight is not None and layer.bias_k is None
    if not packed or not isinstance(value, Channels) or any(other != value for other in values):
        raise ChannelsLostError("only attention whose query, key and value have the same channels can be slimmed")
    if not value.is_last or value.rank != 3 or value.full != layer.embed_dim:
        raise ChannelsLostError(f"it takes (batch, tokens, {layer.embed_dim}), but gets {value}")
    widths.require_groups(value.blocks, layer.head_dim)
    blocks, wide = value.blocks, value.slim
    sizes = {"embed_dim": wide, "kdim": wide, "vdim": wide, "num_heads": wide // layer.head_dim}
    kept: dict[str, Kept] = {"in_proj_weight": (blocks * 3, blocks), "in_proj_bias": (blocks * 3,)}
    plans = {"": LayerPlan(sizes, kept, shared=True), "out_proj": attention_projection(blocks, blocks)}
    return plans, Outputs((value, Other.TENSOR))


def attention_projection(out: Blocks, wide: Blocks) -> LayerPlan:
    """A linear layer of attention, whose sizes follow from the heads."""
    sizes = {"in_features": _slim(wide), "out_features": _slim(out)}
    return LayerPlan(sizes, {"weight": (out, wide), "bias": (out,)}, shared=True)


def _block(channels: int, widths: Widths) -> Blocks:
    return ((channels, widths.of(channels)),)


def _slim(blocks: Blocks) -> int:
    return sum(slim for _, slim in blocks)
