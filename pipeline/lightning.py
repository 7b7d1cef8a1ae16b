"""A Lightning callback that makes the rounds: a `DynamicSelection` at the start of each training epoch.

callbacks = [DynamicSelectionCallback(selection, weights), SelectionCallback(dataset, schedule=selection)]
               on_train_epoch_start: the round            ─►  on_train_epoch_start: the dataset's epoch
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dynams_stream.lightning import CALLBACK_BASES, SelectionCallback
from dynams_stream.stream import SelectedDataset
from pipeline.dynamic_selection import DynamicSelection


class DynamicSelectionCallback(*CALLBACK_BASES):  # type: ignore[misc]
    """Calls `selection.begin_epoch` before each training epoch, and keeps its state in Lightning's checkpoints.

    It has to stand before the `SelectionCallback` that tells the dataset; `selection_callbacks` makes both.

    Args:
        selection: made without a dataset.
        weights: the `ParameterSharingProxy`, or the module to score with, of the LightningModule.
    """

    def __init__(self, selection: DynamicSelection, weights: Callable[[Any], nn.Module]):
        self._selection, self._weights = selection, weights

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the round that is due."""
        self._selection.begin_epoch(trainer.current_epoch, self._weights(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """The selection's state."""
        return self._selection.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with the epoch's own round, before `SelectionCallback` asks for it."""
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.training and state is not None:
            self._selection.load_state_dict(state)


def selection_callbacks(
    selection: DynamicSelection, dataset: SelectedDataset, weights: Callable[[Any], nn.Module]
) -> list[Any]:
    """Both callbacks, in their order.

    Args:
        selection: made without a dataset.
        dataset: what the training loader streams.
        weights: as for `DynamicSelectionCallback`.
    """
    return [DynamicSelectionCallback(selection, weights), SelectionCallback(dataset, schedule=selection)]
