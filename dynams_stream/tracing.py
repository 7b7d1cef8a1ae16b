"""The operations of a model, as torch.fx sees them, and the last linear layer among them."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import Any

from torch import fx, nn

from dynams_stream.errors import HeadError, UnsupportedLayerError

WIDTH_ONE = "score with the model itself (width=1) instead"
_SUBCLASSED: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_AFTER_HEAD = frozenset(
    {"Identity", "Dropout", "Flatten", "flatten", "contiguous", "float", "to", "clone", "log_softmax", "LogSoftmax"}
)
"""What may stand between the head and the output: each leaves the differences of the logits as they are."""
_LIBRARIES = frozenset({"torch", "_operator", "operator", "builtins", "math", "torchvision"})


def copy_module(model: nn.Module, replaced: dict[int, Any]) -> nn.Module:
    """A deep copy of a module without its hooks, which belong to the original.

    Args:
        replaced: what to put in the place of some objects, by their `id`.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    without = {id(getattr(module, name)): OrderedDict[int, Any]() for module in model.modules() for name in hooks}
    return copy.deepcopy(model, {**without, **replaced})


def plain_kind(layer: nn.Module) -> type[nn.Module]:
    """The layer's class, or for a subclass that leaves the computation alone, the torch class that it computes as."""
    for kind in _SUBCLASSED:
        same = (getattr(type(layer), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
        if isinstance(layer, kind) and all(same):
            return kind
    return type(layer)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer shows as a node instead of running under the trace

    def __init__(self) -> None:
        super().__init__()
        self.failed: tuple[str, str] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return plain_kind(m) in _SUBCLASSED or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or (self.path_of_module(m), type(m).__name__)
            raise


def trace(model: nn.Module) -> fx.Graph:
    """The operations of `model`, which stays as it is.

    Raises:
        UnsupportedLayerError: the forward code depends on values; names the module.
    """
    # Modules and buffers are copied, parameters (the bulk) are not.
    copied = copy_module(model, {id(parameter): parameter for parameter in model.parameters()})
    signature = inspect.signature(copied.forward)
    defaults = {name: p.default for name, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}
    tracer = _Tracer()
    try:
        return tracer.trace(copied, concrete_args=defaults or None)
    except Exception as error:
        name, kind = tracer.failed or ("the model", type(model).__name__)
        reason = str(error).split(". ")[0]
        raise UnsupportedLayerError(
            f"{name} ({kind}): its forward cannot be traced ({reason}); write it without control flow that depends on "
            f"tensors, or {WIDTH_ONE}"
        ) from error


def operation_name(node: fx.Node) -> str:
    """The name of a function, method or attribute: `relu` for torch.relu, F.relu, x.relu() and x.relu_().

    Functions of other libraries come with their module.
    """
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    assert callable(node.target)
    if node.target is getattr:
        return str(node.args[1])
    module = getattr(node.target, "__module__", None) or "torch"  # torch's built-in functions have none
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    return name if module.split(".")[0] in _LIBRARIES else f"{module}.{name}"


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of an operation, given by position or by name; position 0 is the tensor itself."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def find_head(model: nn.Module) -> str:
    """Name of the last linear layer, whose output is the model's output.

    Raises:
        HeadError: there is no such layer, or the forward code cannot be traced; name it with head=….
    """
    try:
        return head_of(trace(model), model)
    except UnsupportedLayerError as error:
        raise HeadError(f"the head cannot be found: {error}. Name the last nn.Linear with head=…") from error


def head_of(graph: fx.Graph, model: nn.Module) -> str:
    """As `find_head`, for a model that is traced already."""
    if isinstance(model, nn.Linear):
        raise HeadError("the model is a linear layer itself, which cannot be named; wrap it in nn.Sequential")
    node = graph.output_node().args[0]
    while isinstance(node, fx.Node):
        if node.op == "call_module":
            name = str(node.target)
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                return name
            found, kind = f"{name} ({type(layer).__name__})", type(layer).__name__
        elif node.op in ("call_function", "call_method"):
            kind = operation_name(node)
            found = f"{kind}()"
        else:
            raise HeadError(
                f"the output of {type(model).__name__} comes from {node.op} {node.target!s}, not from an nn.Linear; "
                f"name the last nn.Linear with head=…"
            )
        if kind not in _AFTER_HEAD:
            raise HeadError(
                f"the output of {type(model).__name__} comes from {found}, not from an nn.Linear; "
                f"name the last nn.Linear with head=…"
            )
        node = node.args[0]
    raise HeadError(
        f"{type(model).__name__} returns a {type(node).__name__}, not one tensor of logits; let its forward return the "
        f"logits alone"
    )


def require_head(model: nn.Module, name: str) -> None:
    """Check that `name` is a linear layer of `model`.

    Raises:
        HeadError: it is not; the message lists the model's linear layers.
    """
    layer = dict(model.named_modules()).get(name)
    if not name or not isinstance(layer, nn.Linear):
        linear = [other for other, module in model.named_modules() if other and isinstance(module, nn.Linear)]
        what = "no layer of the model" if layer is None else f"a {type(layer).__name__}, not an nn.Linear"
        raise HeadError(f"head={name!r} is {what}; its linear layers are {', '.join(linear[-8:]) or 'none'}")
