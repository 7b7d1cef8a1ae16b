"""Layers without tensors of their own: their parameters are leading parts of another layer's, taken at each use.

A shared layer has a class of its own, made from the plain one, in which each shared parameter is a property. So it
computes exactly as the plain layer does, whatever that is, and training either trains both.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynams_stream.errors import ShardedModelError
from dynams_stream.slim_layers import Kept, LayerPlan


def kept_part(tensor: Tensor, kept: Kept) -> Tensor:
    """The leading entries of each block of a tensor's dimensions: a view, unless several blocks are put together."""
    if all(blocks is None or len(blocks) == 1 for blocks in kept):
        # One view instead of one for each dimension: its backward pass pads the gradient once.
        sizes = [size if blocks is None else blocks[0][1] for size, blocks in zip(tensor.shape, kept, strict=False)]
        return tensor.as_strided((*sizes, *tensor.shape[len(kept) :]), tensor.stride())
    for dim, blocks in enumerate(kept):
        if blocks is None or all(full == slim for full, slim in blocks):
            continue
        parts, start = [], 0
        for full, slim in blocks:
            parts.append(tensor.narrow(dim, start, slim))
            start += full
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


def copied_part(tensor: Tensor, kept: Kept) -> Tensor:
    """A contiguous copy of the part; of a parameter, a parameter."""
    part = kept_part(tensor, kept).detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


class SharedLayer(nn.Module):
    """Base of shared layers; `share` makes one of a plain layer."""

    # A tuple, because a module here would be registered as a child and list its parameters a second time.
    _source: tuple[nn.Module]
    _kept: dict[str, Kept]
    _shapes: dict[str, torch.Size]
    _path: str
    _plain: type[nn.Module]
    _shared: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made at run time, so that pickles and copies name what it is made of.
        reduced = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_blank, (self._plain, self._shared), *reduced[2:])


def _blank(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _class_sharing(plain, names)
    return made.__new__(made)


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[SharedLayer]] = {}


def _class_sharing(plain: type[nn.Module], names: tuple[str, ...]) -> type[SharedLayer]:
    """The subclass of a layer's class in which the parameters `names` are another layer's; always the same one."""
    if (plain, names) not in _CLASSES:
        _CLASSES[plain, names] = _make_class(plain, names)
    return _CLASSES[plain, names]


def _make_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[SharedLayer]:
    def shared(name: str) -> property:
        def part(self: SharedLayer) -> Tensor:
            return kept_part(_whole(self._source[0], self._path, name, self._shapes[name]), self._kept[name])

        return property(part)

    body = {"_plain": plain, "_shared": names, "__module__": plain.__module__, **{name: shared(name) for name in names}}
    return type(f"Shared{plain.__name__}", (SharedLayer, plain), body)


def _whole(source: nn.Module, path: str, name: str, shape: torch.Size) -> Tensor:
    """A parameter of the model's layer at `path`, which has to be there whole."""
    tensor = cast(Tensor | None, source.__dict__.get(name, source._parameters.get(name)))
    if tensor is None or tensor.shape != shape or hasattr(tensor, "device_mesh"):
        raise ShardedModelError(
            f"{path}.{name} ({type(source).__name__}) is sharded over ranks (FSDP), and the proxy reads slices of "
            f"whole parameters; use DistributedDataParallel, or score with the model itself (width=1)"
        )
    return tensor


def require_whole(model: nn.Module) -> None:
    """Check that a model's parameters are not sharded.

    Raises:
        ShardedModelError: they are.
    """
    for path, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            _whole(layer, path, name, parameter.shape)


def share(layer: nn.Module, source: nn.Module, path: str, plan: LayerPlan) -> None:
    """Turn a plain slim layer into one that reads the parameters of `source`, the model's layer at `path`."""
    names = tuple(name for name in plan.kept if isinstance(getattr(source, name, None), nn.Parameter))
    if not names:
        return
    for name in names:
        delattr(layer, name)
    layer.__class__ = _class_sharing(type(layer), names)
    shared = cast(SharedLayer, layer)
    shared._source, shared._path, shared._kept = (source,), path, plan.kept
    shared._shapes = {name: cast(Tensor, getattr(source, name)).shape for name in names}


def unshared_copy(module: nn.Module) -> nn.Module:
    """A copy of a module in which every shared layer is a plain one, with contiguous copies of its parameters."""
    sources = {id(layer._source[0]): layer._source[0] for layer in module.modules() if isinstance(layer, SharedLayer)}
    plain = copy.deepcopy(module, cast(dict[int, Any], sources))
    for layer in plain.modules():
        if isinstance(layer, SharedLayer):
            _unshare(layer)
    return plain


def _unshare(layer: SharedLayer) -> None:
    source, kept = layer._source[0], layer._kept
    del layer._source, layer._kept, layer._shapes, layer._path
    names = layer._shared
    layer.__class__ = layer._plain  # type: ignore[assignment]
    for name in names:
        setattr(layer, name, copied_part(getattr(source, name), kept[name]))
