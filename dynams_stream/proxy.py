"""The parameter sharing proxy: a slim network whose weights are the leading slices of the model's.

    model    conv1.weight ┌───────┬─────┐      bn1, …        fc
                          │ shared│     │
    proxy                 └───────┘     │      its own bn1   its own fc
                          │             │
                          └─────────────┘

Each hidden width is multiplied by p (0.5: about p² of the cost). All layers of the proxy read the model's tensors at
each step, so that training one trains the other, but normalisation layers and the head, which are its own.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynams_stream.checkpoint import save_weights
from dynams_stream.errors import UnsupportedLayerError, UsageError
from dynams_stream.sharing import copied_part, require_whole, share, unshared_copy
from dynams_stream.slim_layers import LayerPlan
from dynams_stream.slimming import plan_slimming
from dynams_stream.storage import absolute
from dynams_stream.tracing import copy_module, find_head

__all__ = ["ParameterSharingProxy", "find_head", "joint_loss", "slim_architecture"]

FILE_FORMAT = "dynams-slim"
"""The `format` entry of the metadata of a file that `ParameterSharingProxy.save` wrote."""


class ParameterSharingProxy(nn.Module):
    """A model and its proxy, trained together: calling it returns `(logits, proxy_logits)`.

    With `every=n` the proxy takes part in the first of n training steps, and `proxy_logits` is None in the others;
    `joint_loss` deals with both.

    Its parameters are the model's and the proxy's own normalisation layers and head, each once; so are the tensors of
    its state dict, under `model.` and `proxy.`. Wrap it, not the model, in DistributedDataParallel. Copies, pickles
    and moved networks keep sharing within themselves.

    Args:
        model: a classifier whose forward torch.fx can trace, of the layers that `docs/method.md` lists: those of
            torchvision's families of convolutional networks and of its ViT and Swin. It is held, not copied.
        width: p, in (0, 1]. A layer of c channels becomes one of max(1, ⌊p·c + ½⌋); where channels belong together
            in groups of g (grouped convolutions, heads of attention), of g · max(1, ⌊p·c/g + ½⌋).
        head: name of the last linear layer, found by itself where its output is the model's.
        every: n, the proxy takes part in each n-th training step only, beginning with the first. Steps are counted by
            calls in training mode, from when the network was made. Under DistributedDataParallel, n > 1 needs
            `find_unused_parameters=True`.

    Raises:
        UsageError: the width is not in (0, 1], or `every` is not a positive number.
        ShardedModelError: the model's parameters are spread over ranks (FSDP).
        HeadError: the head was not found, or the output is not made by it.
        UnsupportedLayerError: a layer cannot be slimmed; named with the reason.
    """

    def __init__(self, model: nn.Module, width: float = 0.5, *, head: str | None = None, every: int = 1) -> None:
        super().__init__()
        self.width = _require_width(width)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"every is {every!r}; a whole number of 1 or more is needed")
        self.every = every
        self._steps = 0
        require_whole(model)
        self.head, plans = plan_slimming(model, self.width, head)
        self.model = model
        self.proxy = slim_copy(model, plans)
        for name, plan in plans.items():
            if plan.shared:
                share(self.proxy.get_submodule(name), model.get_submodule(name), name, plan)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Logits of the model and of the proxy, both of shape (B, C); None for those of a proxy whose turn it is not.

        Raises:
            ShardedModelError: the model's parameters are spread over ranks (FSDP).
        """
        takes_part = self.every == 1 or not self.training or self._is_proxys_turn()
        return self.model(*inputs), self.proxy(*inputs) if takes_part else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _is_proxys_turn(self) -> bool:
        # Outside of compiled code, which would be compiled anew for each count.
        self._steps += 1
        return (self._steps - 1) % self.every == 0

    def proxy_logits(self, *inputs: Any) -> Tensor:
        """Logits of the proxy alone, shape (B, C)."""
        return cast(Tensor, self.proxy(*inputs))

    def slim(self) -> nn.Module:
        """The proxy as a plain module of its own, with the model's layer names and contiguous copies of all tensors."""
        return unshared_copy(self.proxy)

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
        return f"width={self.width}, head={self.head!r}, every={self.every}"


def joint_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    outputs: tuple[Tensor, Tensor | None],
    labels: Tensor,
    *,
    proxy_weight: float = 1.0,
) -> Tensor:
    """criterion(logits, labels) + λ · criterion(proxy_logits, labels); the first alone where the proxy took no part.

    Args:
        criterion: such as `nn.functional.cross_entropy`.
        outputs: what the `ParameterSharingProxy` returned.
        labels: whatever the criterion compares logits with.
        proxy_weight: λ.
    """
    logits, proxy_logits = outputs
    loss = criterion(logits, labels)
    return loss if proxy_logits is None else loss + proxy_weight * criterion(proxy_logits, labels)


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


def slim_copy(model: nn.Module, plans: dict[str, LayerPlan]) -> nn.Module:
    """A copy of `model`'s module tree whose layers hold contiguous copies of the leading parts of its tensors.

    Raises:
        UnsupportedLayerError: two layers share a tensor of which they need different parts.
    """
    replaced: dict[int, Any] = {}  # as deepcopy's memo: the slim tensor for each tensor of the model
    for name, plan in plans.items():
        layer = model.get_submodule(name)
        for key, kept in plan.kept.items():
            tensor = getattr(layer, key, None)
            if tensor is None:
                continue
            part = copied_part(tensor, kept)
            if replaced.setdefault(id(tensor), part).shape != part.shape:
                raise UnsupportedLayerError(f"{name}: it shares its {key} with a layer of another slim size")
    slim = copy_module(model, replaced)
    for name, plan in plans.items():
        layer = slim.get_submodule(name)
        for attribute, size in plan.sizes.items():
            setattr(layer, attribute, size)
    return slim
