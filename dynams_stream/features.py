"""The features that go into a network's last linear layer; on which device and how precisely the network runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynams_stream.errors import HeadError
from dynams_stream.proxy import find_head


class HeadFeatures:
    """Runs a network for the features h of its batches.

    Args:
        network: in evaluation mode; it is moved.
        head: name of its last linear layer; None finds it at the first batch.
        device: where it runs. Images lie there channels last on GPUs, whose convolutions are faster so.
        autocast: run in bfloat16 where autocast does.
        compile: run through `torch.compile`.
    """

    def __init__(
        self,
        network: nn.Module,
        head: str | None,
        device: torch.device,
        *,
        autocast: bool = False,
        compile: bool = False,
    ):
        self._network = network.to(device)
        self._name, self._device, self._autocast, self._compile = head, device, autocast, compile
        self._layer: nn.Linear | None = None
        self._seen: Tensor | None = None
        if device.type == "cuda":
            for parameter in self._network.parameters():
                parameter.data = _channels_last(parameter.data)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, d) features of a batch (B, …) on any device, in inference mode.

        Raises:
            HeadError: the head does not see one row of features for each sample.
        """
        if self._layer is None:
            self._layer = self._find()
            self._layer.register_forward_hook(self._catch)
            if self._compile:
                self._network.compile(dynamic=True)  # a part's last batch is smaller
        self._seen = None
        inputs = inputs.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            inputs = _channels_last(inputs)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output = self._network(inputs)
        if self._seen is None or self._seen.dim() != 2 or self._seen.shape[0] != inputs.shape[0]:
            shape = None if self._seen is None else tuple(self._seen.shape)
            raise HeadError(
                f"the head saw features of shape {shape} for a batch of {inputs.shape[0]}; margins need one row of "
                f"features per sample: name the classifier's last linear layer with --head"
            )
        if self._name is None and (not isinstance(output, Tensor) or output.shape[-1] != self._layer.out_features):
            raise HeadError("the model's output does not come from its last linear layer; name it with --head")
        return self._seen

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (C, d) and bias (C,) of the head in float32.

        Raises:
            HeadError: it is not a linear layer of at least two classes.
        """
        layer = self._layer if self._layer is not None else self._find()
        return layer.weight.float(), None if layer.bias is None else layer.bias.float()

    def _find(self) -> nn.Linear:
        name = find_head(self._network) if self._name is None else self._name
        try:
            layer = self._network.get_submodule(name)
        except AttributeError as error:
            raise HeadError(f"the model has no layer {name!r}; --head names its last linear layer") from error
        if not isinstance(layer, nn.Linear):
            raise HeadError(f"--head {name!r} is a {type(layer).__name__}; margins need the last nn.Linear")
        if layer.out_features < 2:
            raise HeadError(f"head {name!r} has a single logit; margins need at least two classes")
        return layer

    def _catch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen = inputs[0]


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
