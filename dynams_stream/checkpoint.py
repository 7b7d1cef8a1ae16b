"""Weights on disk: reading `.safetensors` and plain `.pt` state dicts into a network, and naming them by SHA-256.

Nothing here unpickles code: `.pt` files are read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dynams_stream import storage
from dynams_stream.errors import CheckpointError

MODEL_PREFIXES = ("module.", "model.", "_orig_mod.")
"""Prefixes that DDP, ParameterSharingProxy and torch.compile put before a model's own parameter names."""


def checkpoint_digest(url: str) -> str:
    """SHA-256 of a checkpoint's bytes, in hex.

    Raises:
        CheckpointError: when it is not there.
    """
    try:
        return hashlib.sha256(storage.read_bytes(url)).hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: no such checkpoint") from error


def load_weights(network: nn.Module, url: str, *, width: float, head: str | None, sha256: str | None = None) -> None:
    """Load a checkpoint into `network`, strictly.

    Args:
        network: the network that will score, already of the right width.
        url: a `.safetensors` file, or a `.pt`/`.pth` file that holds a plain state dict.
        width: the scorer's width, compared with the file's metadata.
        head: the scorer's head, compared likewise where both are known.
        sha256: digest that the file's bytes must have; None for any.

    Raises:
        CheckpointError: when the file cannot be read, was replaced, or its tensors do not fit.
    """
    tensors, metadata = read_checkpoint(url, sha256)
    _compare(url, metadata, width=width, head=head)
    expected = network.state_dict()
    fitting = _strip_prefix(tensors, expected)
    missing = sorted(expected.keys() - fitting.keys())
    unexpected = sorted(fitting.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{url} does not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}. "
            + ("A slim network is written by ParameterSharingProxy.save(path)." if width < 1 else "")
        )
    for name, tensor in expected.items():
        if tensor.shape != fitting[name].shape:
            raise CheckpointError(
                f"{url}: {name} has shape {tuple(fitting[name].shape)}, the network of width {width} needs "
                f"{tuple(tensor.shape)}; compare --width and --model-args with the run that wrote it"
            )
    state = OrderedDict(fitting)
    # Layers' format versions are no tensors, so that files lack them; these weights fit the network as it is now.
    state._metadata = expected._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state)


def read_checkpoint(url: str, sha256: str | None = None) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a checkpoint, and a `.safetensors` file's metadata.

    Args:
        url: the file; it is read once, so that what is checked is what is used.
        sha256: digest that its bytes must have; None for any.

    Raises:
        CheckpointError: when it is missing, damaged, was replaced, or holds more than tensors.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: no such checkpoint") from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise CheckpointError(
            f"{url} was replaced while the job ran (its SHA-256 was {sha256[:12]}, now it is {found[:12]}); what was "
            f"scored with the old bytes is kept apart: run the same command again for a round of the new ones, and "
            f"give each checkpoint a name of its own"
        )
    if url.endswith(".safetensors"):
        try:
            header = int.from_bytes(data[:8], "little")
            metadata = _json_metadata(data[8 : 8 + header])
            return safetensors.torch.load(data), metadata
        except (safetensors.SafetensorError, ValueError) as error:
            raise CheckpointError(f"{url}: not a readable safetensors file ({error})") from error
    try:
        state: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors alike for a file it refuses
        raise CheckpointError(f"{url}: not a plain state dict ({type(error).__name__}: {error})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{url}: holds more than tensors; save model.state_dict() alone, or .safetensors")
    return dict(state), {}


def _json_metadata(header: bytes) -> Mapping[str, str]:
    return json.loads(header).get("__metadata__", {})  # type: ignore[no-any-return]


def save_weights(network: nn.Module, url: str, metadata: Mapping[str, str]) -> None:
    """Write a network's state dict as `.safetensors`, whole or not at all; tied tensors are written once each."""
    storage.write_bytes(url, weights_bytes(network, metadata))


def weights_bytes(network: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """A network's state dict as the bytes of a `.safetensors` file; equal weights and metadata give equal bytes.

    The format writes its header in any order; here it is sorted, so that a file's SHA-256 names the weights.
    """
    # Cloned, because the format refuses entries that share memory, as tied layers do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    data = safetensors.torch.save(tensors, metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def checkpoint_epoch(url: str) -> int | None:
    """The epoch that a `.safetensors` file's metadata names, where it does."""
    if not url.endswith(".safetensors"):
        return None
    text = read_checkpoint(url)[1].get("epoch")
    return int(text) if text is not None and text.isdecimal() else None


def _compare(url: str, metadata: Mapping[str, str], *, width: float, head: str | None) -> None:
    saved_width = metadata.get("width")
    if saved_width is not None and _number(saved_width) != width:
        raise CheckpointError(
            f"{url} holds a network of width {saved_width}, the scorer asks for {width}; pass --width {saved_width}"
        )
    saved_head = metadata.get("head")
    if saved_head is not None and head is not None and saved_head != head:
        raise CheckpointError(f"{url} was saved with head {saved_head!r}, the scorer names {head!r}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # equal to no width


def _strip_prefix(tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without a wrapper's prefix, where only so they fit; other wrapped networks' tensors are left out."""
    for prefix in MODEL_PREFIXES:
        inner = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if not (tensors.keys() & expected.keys()) and inner.keys() >= expected.keys():
            return {name: inner[name] for name in expected}
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
