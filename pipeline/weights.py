"""Weights that are in memory, saved into the store for the workers that will score with them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dynams_stream import schema, storage
from dynams_stream.checkpoint import save_weights
from dynams_stream.errors import ModelError
from dynams_stream.proxy import ParameterSharingProxy
from dynams_stream.scorer import ScorerSpec, build_network
from dynams_stream.store import Store


@dataclass(frozen=True)
class SavedWeights:
    """Weights that workers can read.

    Attributes:
        scorer: path of what scores.
        model: path of its model, where a proxy scores and is to be compared with it.
    """

    scorer: str
    model: str | None = None


def save_for_workers(
    store: Store,
    spec: ScorerSpec,
    weights: nn.Module | str | os.PathLike[str] | None,
    epoch: int | None,
    *,
    with_model: bool,
) -> SavedWeights:
    """Save what scores, and the model beside its proxy `with_model`."""
    scorer = save_module(store, spec, weights, epoch)
    by_proxy = isinstance(weights, nn.Module) and isinstance(unwrapped(weights), ParameterSharingProxy)
    if not (with_model and by_proxy and spec.width < 1):
        return SavedWeights(scorer)
    return SavedWeights(scorer, save_module(store, replace(spec, width=1.0), weights, epoch))


def save_module(
    store: Store, spec: ScorerSpec, weights: nn.Module | str | os.PathLike[str] | None, epoch: int | None
) -> str:
    """The checkpoint's path: the one given, or the module's weights saved into the store under their digest.

    Raises:
        ModelError: when the module and the scorer's width do not go together.
    """
    if isinstance(weights, (str, os.PathLike)):
        return storage.absolute(weights)
    module = build_network(spec, None) if weights is None else unwrapped(weights)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.safetensors")
        if isinstance(module, ParameterSharingProxy):
            if spec.width == 1:
                save_weights(module.model, path, _metadata(spec, epoch))
            elif module.width == spec.width:
                module.save(path, epoch=epoch)
            else:
                raise ModelError(f"the proxy has width {module.width}, the scorer asks for {spec.width}")
        elif spec.width == 1 or weights is None:
            save_weights(module, path, _metadata(spec, epoch))
        else:
            raise ModelError(
                f"a scorer of width {spec.width} needs the weights of a ParameterSharingProxy; "
                f"got a {type(module).__name__}. Pass the proxy, or score with width=1"
            )
        data = Path(path).read_bytes()
    url = store.path(f"{schema.WEIGHTS_FOLDER}/{hashlib.sha256(data).hexdigest()[:16]}.safetensors")
    if not storage.exists(url):
        storage.write_bytes(url, data)
    return url


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def _metadata(spec: ScorerSpec, epoch: int | None) -> dict[str, str]:
    return {
        "format": "dynams-weights",
        "width": repr(float(spec.width)),
        **({} if epoch is None else {"epoch": str(epoch)}),
    }
