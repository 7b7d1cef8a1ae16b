"""What becomes of each layer when a model's hidden widths are multiplied by a factor.

    model ──trace──► operations ──follow the channels──► {layer name: LayerPlan}

The trace runs on a copy of the module tree, so that the user's model is never touched. A value that depends on hidden
layers is followed as `Channels`; the network's input and the head's output keep their size. Convolutions and linear
layers set the channels, normalisation and activations keep them, flattening multiplies them, an addition wants them
equal on both sides. What the rules cannot follow is refused by name: a slim network that is not the leading part of
the model would train without complaint and score nonsense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NoReturn, cast

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dynams_stream.errors import HeadError, UnsupportedLayerError
from dynams_stream.tracing import WIDTH_ONE, argument, head_of, operation_name, plain_kind, require_head, trace


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is slimmed.

    Attributes:
        sizes: attributes of the layer and their slim values, such as {"in_channels": 32, "out_channels": 64}.
        leading: for each parameter and buffer, how much of its first dimensions the slim layer takes;
            {"weight": (64, 32)} stands for weight[:64, :32].
        shared: whether a proxy uses the model's own tensors (else it has its own, starting as a copy).
    """

    sizes: dict[str, int]
    leading: dict[str, tuple[int, ...]]
    shared: bool


@dataclass(frozen=True)
class Channels:
    """A tensor whose dimension 1 holds `slim` of the model's `full` channels, the leading ones.

    `spatial` dimensions follow it. Once flattened, dimension 1 holds each channel's values in turn.
    """

    full: int
    slim: int
    spatial: int
    flattened: bool = False

    def __str__(self) -> str:
        return f"{self.full} channels ({self.slim} slim)"


class Other(Enum):
    """Values that hold no hidden channels."""

    TENSOR = auto()  # of the same size in the model and the slim network: the input, the head's output, buffers
    SHAPE = auto()  # x.shape
    BATCH = auto()  # x.size(0)
    NUMBER = auto()  # any other size


Value = Channels | Other

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
NORMS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def _in_each_dimension(*names: str) -> frozenset[str]:
    return frozenset(name.replace("#", dimension) for name in names for dimension in ("1d", "2d", "3d"))


# Elementwise, or separately on each channel; all keep the channels and the number of spatial dimensions.
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
_ARITHMETIC = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "subtract",
        "multiply",
        "divide",
        "true_divide",
        "maximum",
        "minimum",
        "pow",
    }
)
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})
_SIZE_FUNCTIONS = frozenset({"size", "shape", "dim", "ndim", "dtype", "device"})


_REASONS = {
    "cat": "concatenation interleaves channels, so that the slim ones are not the leading ones",
    "concat": "concatenation interleaves channels, so that the slim ones are not the leading ones",
    "stack": "stacking adds a dimension whose channels cannot be followed",
    "LayerNorm": "layer normalisation over slim channels is not supported",
    "GroupNorm": "its groups would hold other channels in the slim network",
    "MultiheadAttention": "attention is not supported",
    "scaled_dot_product_attention": "attention is not supported",
    "Embedding": "embeddings are not supported",
    "EmbeddingBag": "embeddings are not supported",
    "LSTM": "recurrent layers are not supported",
    "GRU": "recurrent layers are not supported",
    "RNN": "recurrent layers are not supported",
}


# ---- following the channels ------------------------------------------------------------------------------------------


def plan_slimming(model: nn.Module, width: float, head: str | None) -> tuple[str, dict[str, LayerPlan]]:
    """The head's name, and a plan for every layer of `model` that owns parameters.

    Raises:
        UnsupportedLayerError: a layer or function cannot be slimmed; named with the reason.
        HeadError: the head was not found, or the output is not made by it.
    """
    graph = trace(model)
    if head is None:
        head = head_of(graph, model)
    require_head(model, head)
    follower = _Follower(model, width, head)
    for node in graph.nodes:
        follower.follow(node)
    follower.require_all_planned()
    return head, follower.plans


@dataclass
class _Follower:
    model: nn.Module
    width: float
    head: str
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)

    def follow(self, node: fx.Node) -> None:
        """Find the value of `node` from those of its inputs."""
        if node.op == "placeholder":
            self.values[node] = Other.TENSOR
        elif node.op == "get_attr":
            self.values[node] = self._attribute(node)
        elif node.op == "call_module":
            self.values[node] = self._module(node)
        elif node.op == "output":
            self._output(node)
        else:
            self.values[node] = self._function(node)

    def slim(self, channels: int) -> int:
        """The slim network's share of `channels`, at least one."""
        return max(1, math.floor(self.width * channels + 0.5))

    def require_all_planned(self) -> None:
        """Refuse parameters that the trace did not meet: the proxy would not share them."""
        planned = {id(p) for name in self.plans for p in self.model.get_submodule(name).parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in planned:
                raise UnsupportedLayerError(
                    f"{name}: this parameter is not used by a layer that forward calls in "
                    f"{'training' if self.model.training else 'evaluation'} mode; remove it, or {WIDTH_ONE}"
                )

    # -- nodes

    def _attribute(self, node: fx.Node) -> Value:
        name = str(node.target)
        if name in dict(self.model.named_parameters(remove_duplicate=False)):
            raise UnsupportedLayerError(
                f"{name}: forward uses this parameter directly instead of through a layer; {WIDTH_ONE}"
            )
        return Other.TENSOR

    def _output(self, node: fx.Node) -> None:
        if self.head not in self.plans:
            raise HeadError(f"head={self.head!r} is never called by forward; name the last nn.Linear")
        hidden = [str(other) for other in node.all_input_nodes if isinstance(self.values[other], Channels)]
        if hidden:
            raise HeadError(
                f"the model returns {', '.join(hidden)}, which is not the output of the head {self.head!r}; "
                f"name the last nn.Linear with head=…, and let forward return its logits alone"
            )

    def _module(self, node: fx.Node) -> Value:
        name = str(node.target)
        layer = self.model.get_submodule(name)
        if type(layer).__name__ in _REASONS:
            self._refuse(node)
        value = self._only_input(node)
        if any(True for _ in layer.children()) or set(dict(layer.named_parameters())) - {"weight", "bias"}:
            # parametrisations, weight_norm and spectral_norm included
            self._refuse(node, "its parameters are not the plain weight and bias of a layer")
        if name == self.head:
            return self._head(node, layer, value)
        kind = plain_kind(layer)
        if kind in CONVOLUTIONS:
            return self._convolution(node, layer, value)
        if kind is nn.Linear:
            return self._linear(node, cast(nn.Linear, layer), value)
        if type(layer) in NORMS:
            return self._norm(node, layer, value)
        if type(layer) is nn.PReLU:
            return self._prelu(node, layer, value)
        if any(True for _ in layer.parameters()):
            self._refuse(node)
        if not isinstance(value, Channels):
            return value
        if type(layer) is nn.Flatten:
            return self._flatten(node, value, layer.start_dim, layer.end_dim)
        if type(layer).__name__ in _MODULES_THAT_KEEP and not getattr(layer, "return_indices", False):
            return self._keep(node, value, type(layer).__name__)
        return self._refuse(node)

    def _function(self, node: fx.Node) -> Value:
        name = operation_name(node)
        operands = [self.values[other] for other in node.all_input_nodes]
        if name in _SIZE_FUNCTIONS:
            return self._size(node, name)
        if name == "getitem" and operands[0] is Other.SHAPE:
            return Other.BATCH if node.args[1] == 0 else Other.NUMBER
        if not any(isinstance(operand, Channels) for operand in operands):
            return Other.TENSOR if Other.TENSOR in operands or not operands else Other.NUMBER
        if name in _ARITHMETIC:
            return self._arithmetic(node, operands)
        value = operands[0]
        if not isinstance(value, Channels) or any(isinstance(operand, Channels) for operand in operands[1:]):
            return self._refuse(node)
        if name in _FUNCTIONS_THAT_KEEP:
            return self._keep(node, value, name)
        if name == "flatten":
            return self._flatten(node, value, argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))
        if name in ("view", "reshape"):
            return self._view(node, value)
        if name in _REDUCTIONS:
            kept = bool(argument(node, 2, "keepdim", False))
            return self._drop(node, value, argument(node, 1, "dim", None), kept=kept)
        if name == "squeeze":
            return self._drop(node, value, argument(node, 1, "dim", None), kept=False)
        if name in ("pad", "interpolate"):
            return self._spatial(node, value, name)
        return self._refuse(node)

    # -- layers with parameters

    def _head(self, node: fx.Node, layer: nn.Module, value: Value) -> Value:
        assert isinstance(layer, nn.Linear)
        if self.head in self.plans:
            raise HeadError(f"head={self.head!r} is called more than once by forward; name the last nn.Linear")
        wide = self._features(node, value, layer.in_features)
        self._plan(node, {"in_features": wide}, {"weight": (layer.out_features, wide)}, shared=False)
        return Other.TENSOR

    def _linear(self, node: fx.Node, layer: nn.Linear, value: Value) -> Value:
        wide, out = self._features(node, value, layer.in_features), self.slim(layer.out_features)
        sizes = {"in_features": wide, "out_features": out}
        self._plan(node, sizes, {"weight": (out, wide), "bias": (out,)}, shared=True)
        return Channels(layer.out_features, out, spatial=0)

    def _features(self, node: fx.Node, value: Value, features: int) -> int:
        """How many input features a linear layer of `features` keeps."""
        if not isinstance(value, Channels):
            return features
        if value.spatial:
            self._refuse(node, "it works on a spatial dimension; flatten or pool the features first")
        values_per_channel, rest = divmod(features, value.full)
        if rest or (values_per_channel != 1 and not value.flattened):
            self._refuse(node, f"it takes {features} features, but gets {value}")
        return value.slim * values_per_channel

    def _convolution(self, node: fx.Node, layer: nn.Module, value: Value) -> Value:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        spatial = CONVOLUTIONS[plain_kind(layer)]
        wide = layer.in_channels
        if isinstance(value, Channels):
            if value.spatial != spatial or value.full != wide:
                self._refuse(node, f"it takes {wide} channels of {spatial} dimensions, but gets {value}")
            wide = value.slim
        if layer.groups == 1:
            groups, out = 1, self.slim(layer.out_channels)
        elif layer.groups == layer.in_channels:  # depthwise: each channel keeps its own filters
            groups, out = wide, layer.out_channels // layer.in_channels * wide
        else:
            self._refuse(node, f"a grouped convolution (groups={layer.groups}) mixes other channels when slim")
        sizes = {"in_channels": wide, "out_channels": out, "groups": groups}
        self._plan(node, sizes, {"weight": (out, wide // groups), "bias": (out,)}, shared=True)
        return Channels(layer.out_channels, out, spatial)

    def _norm(self, node: fx.Node, layer: nn.Module, value: Value) -> Value:
        assert isinstance(layer, _NormBase)
        features = layer.num_features
        if isinstance(value, Channels):
            values_per_channel, rest = divmod(features, value.full)
            if rest or (values_per_channel != 1 and not value.flattened):
                self._refuse(node, f"it takes {features} features, but gets {value}")
            features = value.slim * values_per_channel
            value = Channels(layer.num_features, features, value.spatial) if value.flattened else value
        leading = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (features,))
        self._plan(node, {"num_features": features}, {**leading, "num_batches_tracked": ()}, shared=False)
        return value

    def _prelu(self, node: fx.Node, layer: nn.PReLU, value: Value) -> Value:
        slopes = layer.num_parameters
        if slopes > 1 and isinstance(value, Channels):
            if slopes != value.full or value.flattened:
                self._refuse(node, f"it has {slopes} slopes, but gets {value}")
            slopes = value.slim
        self._plan(node, {"num_parameters": slopes}, {"weight": (slopes,)}, shared=True)
        return value

    def _plan(self, node: fx.Node, sizes: dict[str, int], leading: dict[str, tuple[int, ...]], *, shared: bool) -> None:
        plan = LayerPlan(sizes, leading, shared)
        if self.plans.setdefault(str(node.target), plan) != plan:
            self._refuse(
                node, f"it is used twice with different slim sizes: {self.plans[str(node.target)].sizes}, {sizes}"
            )

    # -- operations without parameters

    def _keep(self, node: fx.Node, value: Channels, name: str) -> Value:
        dimensions = name[-2:-1]  # of max_pool2d and ZeroPad2d
        if name.endswith("d") and dimensions.isdigit() and "ropout" not in name and value.spatial != int(dimensions):
            self._refuse(node, f"it works on {dimensions} spatial dimensions, but gets {value.spatial}")
        return value

    def _flatten(self, node: fx.Node, value: Channels, start: Any, end: Any) -> Value:
        last = 1 + value.spatial
        if start in (1, -last) and end in (-1, last):
            return value if value.spatial == 0 else Channels(value.full, value.slim, spatial=0, flattened=True)
        if start in (2, 1 - last) and end in (-1, last) and value.spatial:
            return Channels(value.full, value.slim, spatial=1)
        return self._refuse(node, "only flattening from dimension 1 or 2 to the last can be followed")

    def _view(self, node: fx.Node, value: Channels) -> Value:
        shape = node.args[1:] or tuple(node.kwargs.values())
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        batch = shape[0] if shape else None
        if len(shape) == 2 and shape[1] == -1 and isinstance(batch, fx.Node) and self.values[batch] is Other.BATCH:
            return self._flatten(node, value, 1, -1)
        sizes = ", ".join(str(size) for size in shape)
        return self._refuse(node, f"sizes ({sizes}) do not follow the width; write torch.flatten(x, 1)")

    def _drop(self, node: fx.Node, value: Channels, dims: Any, *, kept: bool) -> Value:
        """Reduce or squeeze spatial dimensions."""
        some = dims if isinstance(dims, tuple | list) else (dims,)
        if not some or not all(isinstance(one, int) for one in some):
            self._refuse(node, "it reduces over all dimensions; name the spatial ones with dim=…")
        dropped = {one if one >= 0 else one + 2 + value.spatial for one in some}
        if not all(2 <= one < 2 + value.spatial for one in dropped):
            self._refuse(node, f"it reduces over dimensions {tuple(some)}, not over spatial ones alone")
        return value if kept else Channels(value.full, value.slim, value.spatial - len(dropped))

    def _spatial(self, node: fx.Node, value: Channels, name: str) -> Value:
        padding = argument(node, 1, "pad", None) if name == "pad" else ()
        if not isinstance(padding, tuple | list) or len(padding) > 2 * value.spatial or value.spatial == 0:
            self._refuse(node, "it changes dimensions other than the spatial ones")
        return value

    def _arithmetic(self, node: fx.Node, operands: list[Value]) -> Value:
        followed = [operand for operand in operands if isinstance(operand, Channels)]
        first = followed[0]
        if any(other != first for other in followed[1:]):
            self._refuse(node, f"its operands differ: {', '.join(map(str, followed))}")
        if Other.TENSOR in operands and first.full != first.slim:
            self._refuse(node, f"it combines {first} with a tensor that keeps its full size")
        return first

    def _size(self, node: fx.Node, name: str) -> Value:
        dim = argument(node, 1, "dim", None)
        if name == "shape" or (name == "size" and dim is None):
            return Other.SHAPE
        return Other.BATCH if name == "size" and dim == 0 else Other.NUMBER

    # -- shared

    def _only_input(self, node: fx.Node) -> Value:
        inputs = [self.values[other] for other in node.all_input_nodes]
        if len(inputs) != 1:
            self._refuse(node, f"it takes {len(inputs)} inputs")
        return inputs[0]

    def _refuse(self, node: fx.Node, reason: str | None = None) -> NoReturn:
        if node.op == "call_module":
            kind = type(self.model.get_submodule(str(node.target))).__name__
            what = f"{node.target} ({kind})"
        else:
            stack = node.meta.get("nn_module_stack") or {}
            path, owner = list(stack.values())[-1] if stack else ("the model", type(self.model))
            kind = operation_name(node)
            what = f"{path} ({getattr(owner, '__name__', owner)}): {kind}()"
        reason = reason or _REASONS.get(kind, "there is no rule for slimming it")
        raise UnsupportedLayerError(f"{what} cannot be slimmed: {reason}; change it, or {WIDTH_ONE}")
