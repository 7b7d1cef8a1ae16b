"""A Lightning callback: tells a `SelectedDataset` the epoch, and keeps its position in Lightning's checkpoints.

Lightning calls no dataset's `set_epoch`, makes a run's first iterator before any epoch hook, and counts an epoch's
batches once in a run, although the epochs of a selection differ in length:

    a run's first epoch    on_fit_start ─► iterator ─► on_train_epoch_start ─► batches
                             epoch                       epoch, batches, another iterator
    every other epoch      on_train_epoch_start ─► iterator ─► batches
                             epoch, batches
    resumed in the middle  on_load_checkpoint ─► iterator ─► batches
                             epoch, position
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from dynams_stream.errors import MissingExtraError, StateError, UsageError
from dynams_stream.schedule import Schedule
from dynams_stream.stream import SelectedDataset

# a trainer takes the callbacks of its own package only
_PACKAGES = [name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.partition(".")[0])]
if not _PACKAGES:
    raise MissingExtraError("dynams_stream.lightning needs Lightning: pip install 'dynams-stream[lightning]'")


class RoundChoice(Protocol):
    """What `SelectionCallback` asks of a schedule."""

    def round(self, epoch: int) -> int | str | None:
        """What `epoch` streams: a round's number, "latest", or None for everything."""


CALLBACK_BASES = tuple(import_module(f"{name}.callbacks").Callback for name in _PACKAGES)


class SelectionCallback(*CALLBACK_BASES):  # type: ignore[misc]
    """Calls `dataset.set_epoch` before each training epoch, and goes on with the next sample at `fit(ckpt_path=…)`.

    A checkpoint that was made in the middle of an epoch fits any number of devices and workers, and any batch size.

    Args:
        dataset: what the training loader streams, or any copy of it that fluid calls made.
        schedule: chooses the round of each epoch; None leaves it to the dataset's constructor.

    Raises:
        UsageError: when the dataset was made without `batch_size`; for a schedule that wants random samples drawn.
        StateError: in `fit`, when the loader streams another dataset; or when the checkpoint is of another dataset, or
            was made in the middle of an epoch without this callback.
    """

    def __init__(self, dataset: SelectedDataset, schedule: RoundChoice | None = None):
        size = dataset._source.options.batch_size
        if size is None:
            raise UsageError("SelectionCallback counts in batches: give SelectedDataset the loader's batch_size")
        if isinstance(schedule, Schedule) and schedule.draws(0):
            raise UsageError(
                "this schedule's warm-up is on random samples, which SelectionCallback does not draw: give it a "
                "DynamicSelection of the schedule; pipeline.lightning.selection_callbacks makes both callbacks"
            )
        self._dataset, self._size, self._schedule = dataset, size, schedule
        self._trainer: Any = None
        self._epoch: int | None = None  # what the dataset was told last
        self._first = True  # no epoch of this run has been told by its hook

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remember whose progress is to be saved."""
        self._trainer, self._epoch, self._first = trainer, None, True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the run's first epoch, unless a checkpoint has."""
        if self._epoch is None:
            self._tell(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the epoch, with the round that callbacks before this one have made, and count its batches."""
        self._tell(trainer.current_epoch)
        _recount(trainer)
        if self._first:
            iter(trainer.fit_loop._data_fetcher)
        self._first = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Make sure that the loader has begun this epoch in this dataset."""
        if trainer.current_epoch != self._epoch or self._dataset._source.control.begun() is None:
            raise StateError(
                f"in epoch {trainer.current_epoch} the training loader streams something else than {self._dataset!r}; "
                f"give SelectionCallback the loader's own dataset, and leave set_epoch to it"
            )

    def state_dict(self) -> dict[str, Any]:
        """The dataset's state while an epoch runs; between epochs there is none."""
        fit = self._trainer and self._trainer.fit_loop
        if not fit or fit.epoch_progress.current.started == fit.epoch_progress.current.processed:
            return {}
        return self._dataset.state_dict(fit.epoch_loop.batch_progress.current.processed)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go to the checkpoint's epoch and position, and make the counts fit that Lightning loads next."""
        if not trainer.training:
            return
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
        last = batches["is_last_batch"] and batches["current"]["processed"] == batches["current"]["ready"]
        running = epochs["started"] > epochs["processed"]
        if not running or (last and batches["current"]["completed"] < batches["current"]["processed"]):
            _finish_epoch(loops, unfinished=int(running))
            running = False
        self._tell(epochs["processed"])
        if not running:
            return
        self._first = False
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise StateError(
                f"the checkpoint was made in the middle of epoch {epochs['processed']} without SelectionCallback, so "
                f"the position in the dataset is not in it; resume from one that was made at the end of an epoch"
            )
        self._dataset.load_state_dict(state)
        if state["batch"] != self._size * self._dataset._source.split()[1]:
            steps = self._steps(trainer, last)
            self._dataset.load_state_dict({**state, "steps": steps})
            batches["current"] = {name: count + steps - state["steps"] for name, count in batches["current"].items()}
        loops["state_dict"].pop("combined_loader", None)  # a StatefulDataLoader's: rank 0's, and given to every rank

    def _steps(self, trainer: Any, last: bool) -> int:
        """How many batches of the loaded epoch a rank has behind it, with this run's devices and batch size."""
        source = self._dataset._source
        length, left = (-(-n // self._size) for n in (len(self._dataset), source.left(source.control.place)[1]))
        most = _limited(length, trainer)
        return most if last else min(length - left, most - 1)

    def _tell(self, epoch: int) -> None:
        self._epoch = epoch
        if 0 <= (self._trainer.max_epochs or -1) <= epoch:
            return  # the run is over, and the schedule knows no such epoch
        if self._schedule is None:
            self._dataset.set_epoch(epoch)
        else:
            self._dataset.set_epoch(epoch, round=self._schedule.round(epoch))


def _finish_epoch(loops: dict[str, Any], unfinished: int) -> None:
    """Let a checkpoint that was made between two epochs look like one that was made when the first was all over.

    Lightning would measure the first by the length of the second when it was made in `on_train_batch_end` of the last
    batch (`unfinished` is 1 then), and skip the second when it was made in `on_train_epoch_start`.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    for count in (epochs["total"], epochs["current"]):
        done = count["processed"] + unfinished
        count.update(ready=done, started=done, processed=done, completed=done)
    batches["total"]["completed"] += unfinished
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += unfinished


def _recount(trainer: Any) -> None:
    loaders, fit = trainer.fit_loop._combined_loader, trainer.fit_loop
    for number, loader in enumerate(loaders.flattened):
        with suppress(TypeError):  # another loader, without a length
            loaders.limits[number] = _limited(len(loader), trainer)
    fit.max_batches = (min if loaders._mode == "min_size" else max)(loaders.limits)
    interval = getattr(trainer, "val_check_interval", None)
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(fit.max_batches * interval))


def _limited(batches: int, trainer: Any) -> int:
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
