"""ScorerSpec says by name how samples are scored; Scorer is the built thing, one per worker process.

A spec is a recipe of plain values, so that it travels to workers and into `round.json`; workers import the callables
it names and build the model there, once.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dynams_stream.checkpoint import load_weights
from dynams_stream.errors import ModelError, SampleError, UsageError
from dynams_stream.features import HeadFeatures
from dynams_stream.fusing import fuse_convolutions
from dynams_stream.images import open_image, rgb_tensor
from dynams_stream.proxy import slim_architecture
from dynams_stream.scores import BoundaryNorms, ScoreBatch, join_scores, score_batch

logger = logging.getLogger(__name__)

SCORES_VERSION = 2
"""Raised when the same model and samples would get other scores; part of a score table's identity."""

PRECISIONS = ("auto", "float32", "bfloat16")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
LABEL_EXTENSIONS = ("cls",)

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")  # Python's int takes 1_0, other scripts' digits, and numbers without end
_SHOWN = 100
"""Characters of a label that an error shows."""
_OUT_OF_MEMORY = (
    "can't allocate memory",  # DefaultCPUAllocator
    "not enough memory",  # the same on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
_DEVICE_FAILED = (
    "CUDA error",
    "HIP error",
    "cuDNN error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "CUSOLVER_STATUS",
    "NCCL error",
)


@dataclass(frozen=True)
class ScorerSpec:
    """How to score a dataset, as names and numbers.

    Args:
        model: `module:callable` that returns the full-width `nn.Module`.
        input: extension of the image, several as `jpg;png`; None takes what the first shard shows.
        label: extension that holds an integer, or `json:field`; None takes `cls` where the first shard has it;
            "" scores without labels.
        transform: `module:callable` from a `PIL.Image` to a tensor; None gives RGB, float32, channels first, in [0, 1].
        width: the factor of the slim network that scores; 1 scores with the model itself.
        head: name of the last linear layer, where it is not found by itself.
        model_args: keyword arguments of the model's callable.
        batch_size: samples per forward pass; it does not change what the scores mean.
        precision: of the forward pass up to the head, whose logits and scores are float32 or better in any case:
            "float32", "bfloat16" (by autocast), or "auto": bfloat16 on GPUs, float32 elsewhere.
        compile: run the network through `torch.compile`; worth its minutes on large datasets.
        least_side: decode JPEGs at 1/2, 1/4 or 1/8 of their size as long as both sides keep so many pixels: what the
            transform shrinks them to, or more. Cheaper, and other pixels than the full size shrunk; None for those.
    """

    model: str
    input: str | None = None
    label: str | None = None
    transform: str | None = None
    width: float = 1.0
    head: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    precision: str = "auto"
    compile: bool = False
    least_side: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise UsageError(f"width must be in (0, 1]; got {self.width}")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; got {self.batch_size}")
        if self.least_side is not None and self.least_side < 1:
            raise UsageError(f"least_side must be at least 1; got {self.least_side}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is one of {', '.join(PRECISIONS)}; got {self.precision!r}")

    def resolved(self, extensions: Sequence[str], device: str = "cpu") -> ScorerSpec:
        """The spec with nothing left open.

        Args:
            extensions: what a first sample shows; they settle `input` and `label`.
            device: what the precision "auto" is settled by.

        Raises:
            UsageError: when the input is neither given nor recognised, or there is no such device.
        """
        require_device(device)
        settled = self
        if settled.input is None:
            found = [ext for ext in extensions if ext in IMAGE_EXTENSIONS]
            if not found:
                raise UsageError(
                    f"no image among the extensions {list(extensions)} of the first sample; name it with --input"
                )
            settled = replace(settled, input=found[0])
        if settled.label is None:
            settled = replace(settled, label=next((ext for ext in extensions if ext in LABEL_EXTENSIONS), ""))
        if settled.precision == "auto":
            settled = replace(settled, precision="bfloat16" if device.startswith("cuda") else "float32")
        return settled

    def identity(self) -> dict[str, Any]:
        """What decides the scores, without what only decides how fast they come."""
        fields = asdict(self)
        del fields["batch_size"], fields["compile"]
        if self.precision != "bfloat16":  # as it was before there was a choice
            del fields["precision"]
        if self.least_side is None:
            del fields["least_side"]
        fields["model_args"] = dict(sorted(self.model_args.items()))
        return {**fields, "scores_version": SCORES_VERSION}


def require_device(device: str) -> str:
    """The device as it is given.

    Raises:
        UsageError: it is none that is scored on.
    """
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?|mps", device) is None:
        raise UsageError(f"the device is cpu, cuda, one GPU as cuda:0, or mps; got {device!r}")
    return device


def load_callable(name: str, what: str) -> Callable[..., Any]:
    """Import `module:callable`.

    Raises:
        UsageError: names what could not be imported and why.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{what} is written module:callable, such as my_models:resnet18; got {name!r}")
    try:
        found: Any = importlib.import_module(module_name)
        for step in attribute.split("."):
            found = getattr(found, step)
    except ImportError as error:
        raise UsageError(
            f"{what} {name!r}: cannot import {module_name!r} ({error}); "
            f"run where the module lies, or install it for every worker"
        ) from error
    except AttributeError as error:
        raise UsageError(f"{what} {name!r}: {error}") from error
    if not callable(found):
        raise UsageError(f"{what} {name!r} is a {type(found).__name__}, not a callable")
    return found  # type: ignore[no-any-return]


def build_network(spec: ScorerSpec, checkpoint: str | None, sha256: str | None = None) -> nn.Module:
    """The network that scores: the factory's model, slimmed to `spec.width`, with the checkpoint's weights.

    Raises:
        ModelError: when the factory does not return a module.
        CheckpointError: when the weights do not fit, or are not those of digest `sha256`.
    """
    model = load_callable(spec.model, "--model")(**spec.model_args)
    if not isinstance(model, nn.Module):
        raise ModelError(f"--model {spec.model!r} returned a {type(model).__name__}, not an nn.Module")
    network = model if spec.width == 1 else slim_architecture(model, spec.width, spec.head)
    if checkpoint is not None:
        load_weights(network, checkpoint, width=spec.width, head=spec.head, sha256=sha256)
    return network.eval().requires_grad_(False)


class Scorer:
    """Decodes samples and scores batches with one network on one device.

    Args:
        spec: a resolved spec (`input`, `label` and `precision` settled).
        checkpoint: the weights, or None to score with the factory's own.
        device: "cpu", "cuda:0", …
        sha256: digest that the checkpoint must have; None for any.

    `prepare` and `stack` run in several threads at once; `score` lets them in one by one.
    """

    def __init__(self, spec: ScorerSpec, checkpoint: str | None, device: str = "cpu", sha256: str | None = None):
        self.spec = spec
        self.device = torch.device(device)
        self.network = build_network(spec, checkpoint, sha256)
        fuse_convolutions(self.network)
        self.transform = None if spec.transform is None else load_callable(spec.transform, "--transform")
        self.inputs = tuple((spec.input or "").split(";"))
        self.label_extension, _, self.label_field = (spec.label or "").partition(":")
        self._features = HeadFeatures(
            self.network, spec.head, self.device, autocast=spec.precision == "bfloat16", compile=spec.compile
        )
        self._norms: BoundaryNorms | None = None
        self._most_samples: int | None = None
        self._one_at_a_time = threading.Lock()

    @property
    def extensions(self) -> frozenset[str]:
        """The members of a sample that scoring reads."""
        return frozenset(ext for ext in (*self.inputs, self.label_extension) if ext)

    def prepare(self, members: Mapping[str, bytes]) -> tuple[Tensor, int]:
        """The input tensor of a sample and its label, -1 where it has none.

        Raises:
            SampleError: says what about the sample cannot be used.
            UsageError: for labels that are not one integer per sample.
            MemoryError, RuntimeError: out of memory.
        """
        return self._input(members), self._label(members)

    def _input(self, members: Mapping[str, bytes]) -> Tensor:
        data = next((members[ext] for ext in self.inputs if ext in members), None)
        if data is None:
            raise SampleError(f"no member {self.spec.input!r}")
        try:
            if self.transform is None:
                return rgb_tensor(data, self.spec.least_side)
            with open_image(data, self.spec.least_side) as image:
                tensor = self.transform(image)
        except Exception as error:  # decoders and users' transforms raise anything; the error names it
            if out_of_memory(error):  # with more memory the sample would have scores
                raise
            raise SampleError(f"cannot decode: {type(error).__name__}: {error}") from error
        if not isinstance(tensor, Tensor):
            raise UsageError(f"--transform {self.spec.transform!r} returned a {type(tensor).__name__}, not a tensor")
        return tensor

    def _label(self, members: Mapping[str, bytes]) -> int:
        data = members.get(self.label_extension) if self.label_extension else None
        if data is None:
            return -1
        if not self.label_field:
            return _integer(data.decode("ascii", "replace").strip())
        try:
            value = json.loads(data)[self.label_field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SampleError(f"label {self.spec.label!r}: {type(error).__name__}: {error}") from error
        if value is None:
            return -1
        if isinstance(value, (list, dict, float)):
            raise UsageError(
                f"label {self.spec.label!r} holds {value!r}: margins need one integer class per sample; "
                f"multi-label and soft labels are not supported"
            )
        return _integer(value)

    def stack(self, inputs: Sequence[Tensor]) -> Tensor:
        """One batch of equal shapes; for a GPU in memory that it copies from while the processor goes on."""
        first = inputs[0]
        pinned = self.device.type == "cuda" and first.device.type == "cpu"
        batch = torch.empty((len(inputs), *first.shape), dtype=first.dtype, device=first.device, pin_memory=pinned)
        with torch.no_grad():
            return torch.stack(list(inputs), out=batch)

    def score(self, inputs: Tensor, labels: Tensor) -> ScoreBatch:
        """Score one batch, in smaller ones from the time on that the device's memory is too small for it.

        Args:
            inputs: (B, …) on any device.
            labels: int64 (B,), -1 for samples without a label.

        Returns:
            The scores, on the scorer's device: there a GPU may still be at work on them.

        Raises:
            HeadError: when the head's outputs are not one row of logits per sample.
            RuntimeError: of the model; one that `out_of_memory` knows only for a single sample.
        """
        # A Dask worker with several threads shares one scorer; the head's features pass through one slot of it.
        with self._one_at_a_time, torch.inference_mode():
            while True:
                most = self._most_samples or max(1, len(inputs))
                try:
                    pieces = map(self._score, torch.split(inputs, most), torch.split(labels, most))
                    return join_scores(list(pieces))
                except RuntimeError as error:
                    most = min(most, len(inputs))
                    if most == 1 or not out_of_memory(error):
                        raise
                    self._most_samples = most // 2
                    logger.warning(f"{self.device}: too little memory for {most} samples at once, going on with half")
                if self.device.type == "cuda":  # outside of the handler, which holds on to what the pass has made
                    torch.cuda.empty_cache()

    def _score(self, inputs: Tensor, labels: Tensor) -> ScoreBatch:
        features = self._features(inputs)
        weight, bias = self._features.head()
        if self._norms is None:
            self._norms = BoundaryNorms(weight)
        logits = nn.functional.linear(features.float(), weight, bias)
        return score_batch(logits, labels.to(self.device, non_blocking=True), self._norms)

    @property
    def classes(self) -> int:
        """How many classes the head tells apart."""
        return int(self._features.head()[0].shape[0])


def out_of_memory(error: Exception) -> bool:
    """Whether memory was too little. Of torch's allocators only CUDA's has a type of error for that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in str(error) for sign in _OUT_OF_MEMORY
    )


def device_failed(error: Exception) -> bool:
    """Whether a GPU failed, rather than the model on its inputs; whatever follows on that GPU fails, too."""
    return any(sign in str(error) for sign in _DEVICE_FAILED)


def _integer(value: Any) -> int:
    text = str(value).strip()
    if _INTEGER.fullmatch(text) is None:
        raise SampleError(f"label {text[:_SHOWN]!r} is not an integer")
    label = int(text)
    if label < 0:
        raise SampleError(f"label {label} is negative")
    return label
