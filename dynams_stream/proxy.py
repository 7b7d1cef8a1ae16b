"""The parameter sharing proxy: a slim network whose weights are the leading slices of the model's.

    model    conv1.weight ┌───────┬─────┐      bn1, …        fc
                          │ shared│     │
    proxy                 └───────┘     │      its own bn1   its own fc
                          │             │
                          └─────────────┘

Each hidden width is multiplied by p (0.5: about p² of the cost). Convolutions and linear layers of the proxy read the
model's tensors at each step, so that training one trains the other; normalisation layers and the head are its own.
"""

from __future__ import annotations

import copy
import math
import os
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dynams_stream.checkpoint import save_weights
from dynams_stream.errors import UnsupportedLayerError, UsageError
from dynams_stream.slimming import LayerPlan, plan_slimming
from dynams_stream.storage import absolute
from dynams_stream.tracing import copy_module, find_head, plain_kind

__all__ = ["ParameterSharingProxy", "find_head", "slim_architecture"]

FILE_FORMAT = "dynams-slim"
"""The `format` entry of the metadata of a file that `ParameterSharingProxy.save` wrote."""


class ParameterSharingProxy(nn.Module):
    """A model and its proxy, trained together: calling it returns `(logits, proxy_logits)`.

    Its parameters are the model's and the proxy's own normalisation layers and head, each once; so are the tensors of
    its state dict, under `model.` and `proxy.`. Wrap it, not the model, in DistributedDataParallel. Copies, pickles
    and moved networks keep sharing within themselves.

    Args:
        model: any module of convolutions, linear layers, batch or instance normalisation, activations, dropout,
            pooling, flattening and residual additions whose forward torch.fx can trace. It is held, not copied.
        width: p, in (0, 1]. A layer of c channels becomes one of max(1, ⌊p·c + ½⌋).
        head: name of the last linear layer, found by itself where its output is the model's.

    Raises:
        UsageError: the width is not in (0, 1].
        HeadError: the head was not found, or the output is not made by it.
        UnsupportedLayerError: a layer cannot be slimmed; named with the reason.
    """

    def __init__(self, model: nn.Module, width: float = 0.5, *, head: str | None = None) -> None:
        super().__init__()
        self.width = _require_width(width)
        self.head, plans = plan_slimming(model, self.width, head)
        self.model = model
        self.proxy = slim_copy(model, plans)
        for name, plan in plans.items():
            if plan.shared:
                _share(self.proxy.get_submodule(name), model.get_submodule(name), plan)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits of the model and of the proxy, both of shape (B, C)."""
        return self.model(*inputs), self.proxy(*inputs)

    def proxy_logits(self, *inputs: Any) -> Tensor:
        """Logits of the proxy alone, shape (B, C)."""
        return cast(Tensor, self.proxy(*inputs))

    def slim(self) -> nn.Module:
        """The proxy as a plain module of its own, with the model's layer names and contiguous copies of all tensors."""
        plain: dict[int, Any] = {}
        for layer in self.proxy.modules():
            if isinstance(layer, _SharedLayer):
                plain[id(layer)] = _unshared(layer)
        return copy.deepcopy(self.proxy, plain)

    def save(self, path: str | os.PathLike[str], *, epoch: int | None = None) -> None:
        """Write the slim network alone as `.safetensors`, whole or not at all.

        Its metadata (`format`, `width`, `head`, `classes`, `epoch` when given) says what it is; loading compares it
        with the scorer, and it never chooses code.

        Args:
            path: a local path or a URL.
            epoch: the epoch after which it was saved.
        """
        head = cast(nn.Linear, self.model.get_submodule(self.head))
        metadata = {
            "format": FILE_FORMAT,
            "width": repr(self.width),
            "head": self.head,
            "classes": str(head.out_features),
        }
        if epoch is not None:
            metadata["epoch"] = str(epoch)
        save_weights(self.slim(), absolute(path), metadata)

    def extra_repr(self) -> str:
        return f"width={self.width}, head={self.head!r}"


def slim_architecture(model: nn.Module, width: float, head: str | None = None) -> nn.Module:
    """The plain slim network of a model, with the model's layer names, ready to load what `save` wrote.

    Its weights start as copies of the leading slices of the model's. `width=1` gives a copy of the model, whatever its
    layers are.

    Raises:
        UsageError, HeadError, UnsupportedLayerError: as `ParameterSharingProxy`.
    """
    if _require_width(width) == 1.0:
        return copy.deepcopy(model)
    return slim_copy(model, plan_slimming(model, width, head)[1])


def _require_width(width: float) -> float:
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1 or math.isnan(width):
        raise UsageError(f"width is {width!r}; a factor in (0, 1] is needed, such as 0.5")
    return float(width)


# ---- the slim copy ---------------------------------------------------------------------------------------------------


def leading_part(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """The view tensor[:leading[0], :leading[1], …]."""
    return tensor[tuple(slice(size) for size in leading)]


def slim_copy(model: nn.Module, plans: dict[str, LayerPlan]) -> nn.Module:
    """A copy of `model`'s module tree whose layers hold contiguous copies of the leading parts of its tensors.

    Raises:
        UnsupportedLayerError: two layers share a tensor of which they need different parts.
    """
    replaced: dict[int, Any] = {}  # as deepcopy's memo: the slim tensor for each tensor of the model
    for name, plan in plans.items():
        layer = model.get_submodule(name)
        for key, leading in plan.leading.items():
            tensor = getattr(layer, key, None)
            if tensor is None:
                continue
            part = _copied(leading_part(tensor, leading), like=tensor)
            if replaced.setdefault(id(tensor), part).shape != part.shape:
                raise UnsupportedLayerError(f"{name}: it shares its {key} with a layer of another slim size")
    slim = copy_module(model, replaced)
    for name, plan in plans.items():
        layer = slim.get_submodule(name)
        for attribute, size in plan.sizes.items():
            setattr(layer, attribute, size)
    return slim


def _copied(part: Tensor, like: Tensor) -> Tensor:
    data = part.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(data, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else data


# ---- shared layers ---------------------------------------------------------------------------------------------------


class _SharedLayer(nn.Module):
    """A slim layer without tensors of its own: `weight` and `bias` are views of another layer's, taken at each use."""

    # A tuple, because a module here would be registered as a child and list its parameters a second time.
    source: tuple[nn.Module]
    plan: LayerPlan
    plain: type[nn.Module]

    if not TYPE_CHECKING:

        @property
        def weight(self) -> Tensor:
            return self._part("weight")

        @property
        def bias(self) -> Tensor | None:
            return self._part("bias")

    def _part(self, name: str) -> Tensor | None:
        tensor: Tensor | None = getattr(self.source[0], name)
        return None if tensor is None else leading_part(tensor, self.plan.leading[name])


class SharedLinear(_SharedLayer, nn.Linear):
    """A linear layer whose weight and bias are leading slices of another's."""


class SharedConv1d(_SharedLayer, nn.Conv1d):
    """A convolution whose weight and bias are leading slices of another's."""


class SharedConv2d(_SharedLayer, nn.Conv2d):
    """A convolution whose weight and bias are leading slices of another's."""


class SharedConv3d(_SharedLayer, nn.Conv3d):
    """A convolution whose weight and bias are leading slices of another's."""


class SharedPReLU(_SharedLayer, nn.PReLU):
    """A PReLU whose slopes are the leading ones of another's."""


_SHARED_KINDS: dict[type[nn.Module], type[_SharedLayer]] = {
    nn.Linear: SharedLinear,
    nn.Conv1d: SharedConv1d,
    nn.Conv2d: SharedConv2d,
    nn.Conv3d: SharedConv3d,
    nn.PReLU: SharedPReLU,
}


def _share(layer: nn.Module, source: nn.Module, plan: LayerPlan) -> None:
    """Turn a plain slim layer into one that reads the tensors of `source`."""
    plain = type(layer)
    for name, _ in list(layer.named_parameters()):
        delattr(layer, name)
    layer.__class__ = _SHARED_KINDS[plain_kind(layer)]
    shared = cast(_SharedLayer, layer)
    shared.source, shared.plan, shared.plain = (source,), plan, plain


def _unshared(shared: _SharedLayer) -> nn.Module:
    """A plain layer with contiguous copies of the views of `shared`."""
    source = shared.source[0]
    layer = copy.deepcopy(shared, {id(source): None})
    del layer.source, layer.plan, layer.plain
    layer.__class__ = shared.plain  # type: ignore[assignment]
    for name, tensor in source.named_parameters():
        part = leading_part(tensor, shared.plan.leading[name]).detach().clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(part, requires_grad=tensor.requires_grad))
    return layer
