"""What becomes of each layer when a model's hidden widths are multiplied by a factor.

    model ──trace──► operations ──follow the channels──► {layer name: LayerPlan}

The trace runs on a copy of the module tree, so that the user's model is never touched. A value that depends on hidden
layers is followed as `Channels`; the network's input and the head's output keep their size. `slim_layers` has the rules
of layers, `channels` those of operations; here they are applied to each operation in turn. What no rule can follow is
refused by name: a slim network that is not the leading part of the model would train without complaint and score
nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2
from torchvision.models.vision_transformer import VisionTransformer

from dynams_stream.channels import Blocks, Channels, ChannelsLostError, Other, Outputs, Value, Weight
from dynams_stream.errors import HeadError, UnsupportedLayerError
from dynams_stream.slim_layers import (
    Kept,
    LayerPlan,
    Rule,
    UnevenGroupsError,
    Widths,
    attention_projection,
    slim_attention,
    slim_channel_norm,
    slim_convolution,
    slim_group_norm,
    slim_head,
    slim_layer_norm,
    slim_linear,
    slim_prelu,
)
from dynams_stream.tracing import WIDTH_ONE, argument, head_of, operation_name, plain_kind, require_head, trace

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
NORMS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
SIZE_ATTRIBUTES: dict[type[nn.Module], str] = {VisionTransformer: "hidden_dim", ShiftedWindowAttentionV2: "num_heads"}
"""Attributes that forward reshapes by, where a number of channels is written out: they become slim too."""


def _in_each_dimension(*names: str) -> frozenset[str]:
    return frozenset(name.replace("#", dimension) for name in names for dimension in ("1d", "2d", "3d"))


# Elementwise, or separately on each channel of (batch, channels, …); all keep the channels and the dimensions.
_MODULES_THAT_KEEP = frozenset(
    {"Identity", "ReLU", "ReLU6", "LeakyReLU", "RReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Hardswish"}
    | {"Hardsigmoid", "Hardtanh", "Sigmoid", "Tanh", "Softplus", "Softsign", "LogSigmoid", "Tanhshrink", "Softshrink"}
    | {"Hardshrink", "Threshold", "Dropout", "AlphaDropout", "FeatureAlphaDropout"}
) | _in_each_dimension(
    *("Dropout#", "MaxPool#", "AvgPool#", "LPPool#", "AdaptiveAvgPool#", "AdaptiveMaxPool#"),
    *("ZeroPad#", "ConstantPad#", "ReflectionPad#", "ReplicationPad#", "CircularPad#"),
)
_FUNCTIONS_THAT_KEEP = frozenset(
    {"relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid"}
    | {"hardtanh", "sigmoid", "tanh", "softplus", "softsign", "logsigmoid", "tanhshrink", "softshrink", "hardshrink"}
    | {"threshold", "dropout", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth", "contiguous", "clone"}
    | {"detach", "float", "half", "bfloat16", "double", "to", "neg", "abs", "exp", "square", "sqrt", "clamp", "clip"}
) | _in_each_dimension("dropout#", "max_pool#", "avg_pool#", "lp_pool#", "adaptive_avg_pool#", "adaptive_max_pool#")
_WEIGHT_FUNCTIONS_THAT_KEEP = frozenset({"expand", "contiguous", "clone", "to", "float"})
_ARITHMETIC = frozenset(
    {"add", "sub", "mul", "div", "truediv", "subtract", "multiply", "divide", "true_divide"}
    | {"maximum", "minimum", "pow"}
)
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})
_SIZE_FUNCTIONS = frozenset({"size", "shape", "dim", "ndim", "dtype", "device"})

_REASONS = {
    "stack": "stacking adds a dimension whose channels cannot be followed",
    "chunk": "it takes some channels and leaves others",
    "split": "it takes some channels and leaves others",
    "scaled_dot_product_attention": "attention that is not written as nn.MultiheadAttention is not supported",
    "Embedding": "embeddings are not supported",
    "EmbeddingBag": "embeddings are not supported",
    "LSTM": "recurrent layers are not supported",
    "GRU": "recurrent layers are not supported",
    "RNN": "recurrent layers are not supported",
}


def plan_slimming(model: nn.Module, width: float, head: str | None) -> tuple[str, dict[str, LayerPlan]]:
    """The head's name, and a plan for every module of `model` that owns parameters.

    Raises:
        UnsupportedLayerError: a layer or function cannot be slimmed; named with the reason.
        HeadError: the head was not found, or the output is not made by it.
    """
    graph = trace(model)
    if head is None:
        head = head_of(graph, model)
    require_head(model, head)
    widths = Widths(width)
    while True:
        follower = _Follower(model, widths, head)
        try:
            for node in graph.nodes:
                follower.follow(node)
        except UnevenGroupsError as uneven:  # each time a group's size that did not divide the width yet: it ends
            known = widths.groups.get(uneven.channels, 1)
            widths.groups[uneven.channels] = math.lcm(known, uneven.size)
            continue
        follower.require_all_planned()
        return head, follower.plans


@dataclass
class _Follower:
    model: nn.Module
    widths: Widths
    head: str
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)

    def follow(self, node: fx.Node) -> None:
        """Find the value of `node` from those of its inputs."""
        try:
            if node.op == "placeholder":
                self.values[node] = Other.TENSOR
            elif node.op == "get_attr":
                self.values[node] = self._attribute(str(node.target))
            elif node.op == "call_module":
                self.values[node] = self._module(node)
            elif node.op == "output":
                self._output(node)
            else:
                self.values[node] = self._function(node)
        except ChannelsLostError as error:
            self._refuse(node, str(error))

    def require_all_planned(self) -> None:
        """Refuse parameters that the trace did not meet: the proxy would not share them."""
        planned = {
            id(getattr(self.model.get_submodule(name), key, None))
            for name, plan in self.plans.items()
            for key in plan.kept
        }
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in planned:
                raise UnsupportedLayerError(
                    f"{name}: this parameter is not used by a layer that forward calls in "
                    f"{'training' if self.model.training else 'evaluation'} mode; remove it, or {WIDTH_ONE}"
                )

    # -- nodes

    def _attribute(self, target: str) -> Value:
        owner, _, name = target.rpartition(".")
        tensor = getattr(self.model.get_submodule(owner), name)
        return Weight(owner, name, tuple(tensor.shape)) if isinstance(tensor, nn.Parameter) else Other.TENSOR

    def _output(self, node: fx.Node) -> None:
        if self.head not in self.plans:
            raise HeadError(f"head={self.head!r} is never called by forward; name the last nn.Linear")
        hidden = [str(other) for other in node.all_input_nodes if self._holds_channels(self.values[other])]
        if hidden:
            raise HeadError(
                f"the model returns {', '.join(hidden)}, which is not the output of the head {self.head!r}; "
                f"name the last nn.Linear with head=…, and let forward return its logits alone"
            )

    @staticmethod
    def _holds_channels(value: Value) -> bool:
        return isinstance(value, Channels | Weight | Outputs)

    def _module(self, node: fx.Node) -> Value:
        name = str(node.target)
        layer = self.model.get_submodule(name)
        if type(layer).__name__ in _REASONS:
            self._refuse(node)
        rule = self._layer_rule(node, name, layer)
        if rule is not None:
            plans, value = rule
            for below, plan in plans.items():
                self._plan(f"{name}.{below}" if below else name, plan)
            return value
        value = self._only_input(node)
        if not isinstance(value, Channels):
            return value
        if type(layer) is nn.Flatten:
            return value.flatten(layer.start_dim, layer.end_dim)
        if type(layer).__name__ in _MODULES_THAT_KEEP and not getattr(layer, "return_indices", False):
            return _keep(value, type(layer).__name__)
        return self._refuse(node)

    def _layer_rule(self, node: fx.Node, name: str, layer: nn.Module) -> Rule | None:
        """Plans and output of a layer that owns parameters; None for one that owns none."""
        if not any(True for _ in layer.parameters()):
            return None
        if type(layer) is nn.MultiheadAttention:
            inputs = [self.values[other] for other in node.args[:3] if isinstance(other, fx.Node)]
            return slim_attention(layer, inputs, self.widths) if len(inputs) == 3 else self._refuse(node)
        value = self._only_input(node)
        if any(True for _ in layer.children()) or set(dict(layer.named_parameters())) - {"weight", "bias"}:
            # parametrisations, weight_norm and spectral_norm included
            raise ChannelsLostError("its parameters are not the plain weight and bias of a layer")
        if name == self.head:
            if self.head in self.plans:
                raise HeadError(f"head={self.head!r} is called more than once by forward; name the last nn.Linear")
            return slim_head(cast(nn.Linear, layer), value)
        kind = plain_kind(layer)
        if kind in CONVOLUTIONS:
            return slim_convolution(cast(nn.Conv2d, layer), CONVOLUTIONS[kind], value, self.widths)
        if kind is nn.Linear:
            return slim_linear(cast(nn.Linear, layer), value, self.widths)
        if type(layer) in NORMS:
            return slim_channel_norm(cast(_NormBase, layer), value)
        if type(layer) is nn.LayerNorm:
            return slim_layer_norm(layer.normalized_shape, value)
        if type(layer) is nn.GroupNorm:
            return slim_group_norm(layer, value, self.widths)
        if type(layer) is nn.PReLU:
            return slim_prelu(layer, value)
        return self._refuse(node)

    def _function(self, node: fx.Node) -> Value:
        name = operation_name(node)
        operands = [self.values[other] for other in node.all_input_nodes]
        if name in _SIZE_FUNCTIONS:
            return _size(node, name)
        if not any(self._holds_channels(operand) for operand in operands):
            if name == "getitem" and operands[0] is Other.SHAPE:
                return Other.BATCH if node.args[1] == 0 else Other.NUMBER
            return Other.TENSOR if Other.TENSOR in operands or not operands else Other.NUMBER
        special = _SPECIAL.get(name)
        if special is not None:
            return special(self, node)
        if name in _ARITHMETIC:
            return self._arithmetic(operands)
        value = operands[0]
        if isinstance(value, Outputs) and name == "getitem" and isinstance(node.args[1], int):
            return value.values[node.args[1]]
        if isinstance(value, Weight) and name in _WEIGHT_FUNCTIONS_THAT_KEEP:
            return value
        if not isinstance(value, Channels) or any(self._holds_channels(operand) for operand in operands[1:]):
            return self._refuse(node)
        return self._operation(node, name, value)

    def _operation(self, node: fx.Node, name: str, value: Channels) -> Value:
        """A function of one tensor with hidden channels."""
        if name in _FUNCTIONS_THAT_KEEP:
            return _keep(value, name)
        if name == "flatten":
            return value.flatten(argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))
        if name in ("view", "reshape"):
            return self._view(node, value)
        if name == "permute":
            return value.permuted(_several(node, "dims"))
        if name in ("transpose", "swapaxes"):
            return value.swapped(argument(node, 1, "dim0", None), argument(node, 2, "dim1", None))
        if name == "getitem":
            return value.indexed(node.args[1])
        if name in _REDUCTIONS:
            kept = bool(argument(node, 2, "keepdim", False))
            return value.without(_dims(argument(node, 1, "dim", None)), kept=kept)
        if name == "squeeze":
            return value.without(_dims(argument(node, 1, "dim", None)), kept=False)
        if name in ("pad", "interpolate"):
            return _spatial(node, value, name)
        return self._refuse(node)

    # -- operations without parameters of their own

    def _arithmetic(self, operands: list[Value]) -> Value:
        followed = [operand for operand in operands if isinstance(operand, Channels)]
        if not followed:
            raise ChannelsLostError(self._direct(operands))
        first = followed[0]
        if any(other != first for other in followed[1:]):
            raise ChannelsLostError(f"its operands differ: {', '.join(map(str, followed))}")
        if Other.TENSOR in operands and first.full != first.slim:
            raise ChannelsLostError(f"it combines {first} with a tensor that keeps its full size")
        for weight in operands:
            if isinstance(weight, Weight):
                self._share_weight(weight, first)
        return first

    def _share_weight(self, weight: Weight, value: Channels) -> None:
        """Plan a parameter that is combined with a tensor, dimension by dimension from the last."""
        at = value.axis - (value.rank - len(weight.shape))
        kept: list[Blocks | None] = [None] * len(weight.shape)
        if value.flattened or len(weight.shape) > value.rank:
            raise ChannelsLostError(
                f"it combines {value} in {value.rank} dimensions with a parameter of {weight.shape}"
            )
        if at >= 0 and weight.shape[at] != 1:
            if weight.shape[at] != value.full:
                raise ChannelsLostError(f"it combines {value} with a parameter of shape {weight.shape}")
            kept[at] = value.blocks
        self._plan(weight.owner, LayerPlan({}, {weight.name: tuple(kept)}, shared=True))

    @staticmethod
    def _direct(operands: Sequence[Value]) -> str:
        names = [f"{one.owner}.{one.name}".lstrip(".") for one in operands if isinstance(one, Weight)]
        return f"forward uses {', '.join(names)} directly instead of through a layer"

    def _concatenated(self, node: fx.Node) -> Value:
        tensors = argument(node, 0, "tensors", ())
        parts = [self.values[one] for one in tensors] if isinstance(tensors, tuple | list) else []
        channels = [one for one in parts if isinstance(one, Channels)]
        dim = argument(node, 1, "dim", 0)
        if not channels:
            return self._refuse(node)
        for part in parts:
            if isinstance(part, Weight) and channels[0].dimension(dim) != channels[0].axis:  # a class token
                self._share_weight(part, channels[0])
            elif not isinstance(part, Channels):
                raise ChannelsLostError("it puts hidden channels beside a tensor that keeps its full size")
        return channels[0].beside(channels[1:], dim)

    def _view(self, node: fx.Node, value: Channels) -> Value:
        """`view` and `reshape`, where sizes say which dimension holds the channels."""
        shape = _several(node, "shape")
        known = [self.values[size] if isinstance(size, fx.Node) else size for size in shape]
        if len(known) == 2 and known[1] == -1 and known[0] is Other.BATCH:
            return value.flatten(1, -1)
        owner = self._owner(node)
        attribute = next((name for kind, name in SIZE_ATTRIBUTES.items() if isinstance(owner[1], kind)), None)
        written = attribute is not None and value.full in known and getattr(owner[1], attribute) == value.full
        if written and len(value.blocks) == 1:
            if value.axis == 1 and known[:2] == [Other.BATCH, value.full]:
                self._plan(owner[0], LayerPlan({str(attribute): value.slim}, {}, shared=True))
                return Channels(value.blocks, 1, len(known))
            if value.is_last and known == [-1, value.full]:
                return Channels(value.blocks, 1, 2)
        sizes = ", ".join(str(size) for size in shape)
        raise ChannelsLostError(f"sizes ({sizes}) do not follow the width; write torch.flatten(x, 1)")

    # -- functions that take parameters

    def _layer_norm(self, node: fx.Node) -> Value:
        value = self.values[node.all_input_nodes[0]]
        weights = [self.values[other] for other in node.all_input_nodes[1:]]
        owner = weights[0].owner if weights and isinstance(weights[0], Weight) else None
        layer = None if owner is None else self.model.get_submodule(owner)
        if owner is None or not isinstance(layer, nn.LayerNorm):
            return self._refuse(node, "only the layer normalisation of an nn.LayerNorm can be slimmed")
        plans, value = slim_layer_norm(layer.normalized_shape, value)
        self._plan(owner, plans[""])
        return value

    def _relative_position_bias(self, node: fx.Node) -> Value:
        """Swin's table of (positions, heads), or its network of them, made (1, heads, tokens, tokens)."""
        value = self.values[node.all_input_nodes[0]]
        return Channels(value.blocks, 1, 4) if isinstance(value, Channels) else value

    def _window_attention(self, node: fx.Node) -> Value:
        """Swin's attention in windows: a slim one has fewer heads of the same size."""
        names = ("input", "qkv_weight", "proj_weight", "relative_position_bias", "window_size", "num_heads")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        values = {name: self.values[one] for name, one in given.items() if isinstance(one, fx.Node)}
        value, heads = values["input"], given["num_heads"]
        owner = self._owner(node)[0]
        if not isinstance(value, Channels) or not value.is_last or not isinstance(heads, int) or value.full % heads:
            return self._refuse(node)
        size = value.full // heads
        self.widths.require_groups(value.blocks, size)
        kept: Kept = (tuple((full // size, slim // size) for full, slim in value.blocks),)
        for name, out in (("qkv", value.blocks * 3), ("proj", value.blocks)):
            weight = values[f"{name}_weight"]
            if not isinstance(weight, Weight):
                return self._refuse(node)
            self._plan(weight.owner, attention_projection(out, value.blocks))
        own = LayerPlan({"num_heads": value.slim // size}, {}, shared=True)
        bias, scale = values["relative_position_bias"], values.get("logit_scale")
        if isinstance(bias, Weight):
            own = replace(own, kept={bias.name: (None, *kept)})
        elif not isinstance(bias, Channels) or bias.blocks != kept[0]:
            raise ChannelsLostError(f"its relative position bias has other heads: {bias}")
        if isinstance(scale, Weight):
            own = replace(own, kept={**own.kept, scale.name: kept})
        self._plan(owner, own)
        return value

    def _merged_patches(self, node: fx.Node) -> Value:
        """Swin's four neighbouring positions side by side in the last dimension."""
        value = self.values[node.all_input_nodes[0]]
        if not isinstance(value, Channels) or not value.is_last:
            return self._refuse(node)
        return replace(value, blocks=value.blocks * 4)

    # -- shared

    def _plan(self, name: str, plan: LayerPlan) -> None:
        """Note a plan; those of one module add up."""
        known = self.plans.get(name)
        if known is None:
            self.plans[name] = plan
            return
        same = all(known.sizes.get(key, size) == size for key, size in plan.sizes.items()) and all(
            known.kept.get(key, kept) == kept for key, kept in plan.kept.items()
        )
        if not same or known.shared != plan.shared:
            raise ChannelsLostError(f"it is used twice with different slim sizes: {known.sizes}, {plan.sizes}")
        self.plans[name] = LayerPlan({**known.sizes, **plan.sizes}, {**known.kept, **plan.kept}, plan.shared)

    def _only_input(self, node: fx.Node) -> Value:
        inputs = [self.values[other] for other in node.all_input_nodes]
        if len(inputs) != 1:
            raise ChannelsLostError(f"it takes {len(inputs)} inputs")
        if isinstance(inputs[0], Weight):
            raise ChannelsLostError(self._direct(inputs))
        return inputs[0]

    def _owner(self, node: fx.Node) -> tuple[str, nn.Module]:
        """The module whose forward code an operation is part of: its name and itself."""
        stack = node.meta.get("nn_module_stack") or {}
        name = next(reversed(stack.values()))[0] if stack else ""
        return name, self.model.get_submodule(name)

    def _refuse(self, node: fx.Node, reason: str | None = None) -> NoReturn:
        if node.op == "call_module":
            kind = type(self.model.get_submodule(str(node.target))).__name__
            what = f"{node.target} ({kind})"
        else:
            name, owner = self._owner(node)
            kind = operation_name(node)
            what = f"{name or 'the model'} ({type(owner).__name__}): {kind}()"
        reason = reason or _REASONS.get(kind, "there is no rule for slimming it")
        raise UnsupportedLayerError(f"{what} cannot be slimmed: {reason}; change it, or {WIDTH_ONE}")


_SPECIAL = {
    "cat": _Follower._concatenated,
    "concat": _Follower._concatenated,
    "layer_norm": _Follower._layer_norm,
    "get_relative_position_bias": _Follower._relative_position_bias,
    "shifted_window_attention": _Follower._window_attention,
    "patch_merging_pad": _Follower._merged_patches,
}


def _keep(value: Channels, name: str) -> Value:
    """An activation, or a pool of as many spatial dimensions as its name says."""
    dimensions = name[-2:-1]  # of max_pool2d and ZeroPad2d
    if name.endswith("d") and dimensions.isdigit():
        spatial = value.rank - 2 if "ropout" in name else int(dimensions)
        if not value.is_image(spatial):
            raise ChannelsLostError(f"it works on {dimensions} spatial dimensions, but gets {value.rank - 2}")
    return value


def _spatial(node: fx.Node, value: Channels, name: str) -> Value:
    padding = argument(node, 1, "pad", None) if name == "pad" else ()
    if not isinstance(padding, tuple | list) or value.axis != 1 or not len(padding) <= 2 * (value.rank - 2) != 0:
        raise ChannelsLostError("it changes dimensions other than the spatial ones")
    return value


def _size(node: fx.Node, name: str) -> Value:
    dim = argument(node, 1, "dim", None)
    if name == "shape" or (name == "size" and dim is None):
        return Other.SHAPE
    return Other.BATCH if name == "size" and dim == 0 else Other.NUMBER


def _several(node: fx.Node, name: str) -> tuple[Any, ...]:
    """Sizes or dimensions, given one by one or as one tuple."""
    given = node.args[1:] or ((node.kwargs[name],) if name in node.kwargs else tuple(node.kwargs.values()))
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else tuple(given)


def _dims(dims: Any) -> tuple[Any, ...]:
    return tuple(dims) if isinstance(dims, tuple | list) else (dims,)
