"""DynamicSelection: a training run's rounds, epoch by epoch, in a plain loop, under DDP and in Lightning.

    begin_epoch(e) ─► is a round due? ─► run_round ──► the round's number ─► dataset.set_epoch
                                  └─ background: begun an epoch early, taken up now

A round that fails does not end a training that has run for days: it goes on with the last selection, and says so.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.distributed
from torch import nn

from dynams_stream.errors import ModelError, ScoringError, StateError, UsageError
from dynams_stream.schedule import Schedule
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from dynams_stream.stream import SelectedDataset
from pipeline.ranks import has_several_ranks
from pipeline.rounds import make_round, require_round, run_round
from pipeline.select_job import select_round
from pipeline.weights import save_for_workers

logger = logging.getLogger(__name__)

STATE_VERSION = 1
_PERMANENT = (UsageError, ModelError)
"""Errors of arguments and models, which the next round would meet again."""
_CHOICES = ("class_balance", "min_per_class", "exclude_noisy", "most_disagreement", "sample_weight")
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(run_round).parameters.items()
    if name not in ("store", "scorer", "fraction", "weights", "epoch")
}


class DynamicSelection:
    """Makes the rounds that a schedule asks for and tells the dataset which one each epoch streams.

    Args:
        store: an indexed store.
        scorer: how to score.
        schedule: fraction and rounds by epoch.
        dataset: is told each epoch; None where something else does it, such as Lightning's `SelectionCallback`, which
            takes this object as its schedule.
        background: score in a thread and on the cluster's workers while training goes on. A round begins one epoch
            early, with the weights of then, and is taken up when it is due; one that is not ready leaves the last
            selection in place until the next epoch.
        on_failure: "keep" trains on with the last selection (everything, before the first) when a round fails, and
            logs an error; "raise" raises. Wrong arguments and models that cannot be scored with are always raised.
        options: further arguments of `run_round`: strategy, client, scheduler, workers, device, check_samples, …

    Attributes:
        failures: messages of the rounds that failed, oldest first.

    Under `torch.distributed` every rank makes one and calls it alike. Rank 0 works; the others wait for it at
    `begin_epoch`, no longer than `deadline` seconds. (Rank 0 cuts a background round that comes late anew while the
    others wait in a collective.)

    Raises:
        UsageError: an option that `run_round` does not know, or a wrong value.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        scorer: ScorerSpec,
        schedule: Schedule,
        *,
        dataset: SelectedDataset | None = None,
        background: bool = False,
        on_failure: Literal["keep", "raise"] = "keep",
        **options: Any,
    ) -> None:
        unknown = sorted(options.keys() - _OPTIONS.keys())
        if unknown:
            raise UsageError(f"DynamicSelection has no option {unknown[0]!r}; run_round has {', '.join(_OPTIONS)}")
        if on_failure not in ("keep", "raise"):
            raise UsageError(f'on_failure is {on_failure!r}; "keep" or "raise" is needed')
        self.schedule = schedule
        self.failures: list[str] = []
        self._store = store if isinstance(store, Store) else Store(store)
        self._scorer, self._dataset, self._on_failure = scorer, dataset, on_failure
        self._options = {**_OPTIONS, **options}
        self._background = background
        self._begun: int | None = None
        self._round: int | None = None
        self._pending: _Background | None = None
        require_round(schedule.last_fraction, self._options["strategy"], self._options["fallback"], self._choices)

    @property
    def _choices(self) -> dict[str, Any]:
        return {name: self._options[name] for name in _CHOICES}

    # ---- epochs ------------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, weights: nn.Module | str | os.PathLike[str] | None = None) -> int | None:
        """Make the round that is due before `epoch`, if one is, and tell the dataset.

        Args:
            epoch: 0, 1, …; an epoch that was begun before (in a run that goes on) makes no other round.
            weights: as for `run_round`: a `ParameterSharingProxy`, a module or a checkpoint's path.

        Returns:
            The number of the round that the epoch streams; None for everything.

        Raises:
            UsageError, ModelError: arguments or a model that no round can be made with.
            DynamsError: a round failed, with `on_failure="raise"`.
        """
        if epoch != self._begun:
            if self.schedule.round(epoch) is None:
                self._round = None
            elif self.schedule.draws(epoch):
                self._draw(epoch)
            elif self.schedule.starts_round(epoch) or self._is_late(epoch):
                self._take_up(epoch, weights)
            if self._background:
                with self._kept_on_failure(epoch):
                    self._begin_early(epoch, weights)
            self._begun = epoch
        if self._dataset is not None:
            self._dataset.set_epoch(epoch, round=self._round)
        return self._round

    def round(self, epoch: int) -> int | None:
        """The round that `epoch` streams, as far as it is known: what `begin_epoch` returned last, else None."""
        return self._round if self.schedule.round(epoch) is not None else None

    def trains_proxy(self, epoch: int) -> bool:
        """Whether a later round will need the proxy, which then has to be trained along in `epoch`."""
        return self.schedule.rounds_follow(epoch)

    def _is_late(self, epoch: int) -> bool:
        """Whether a round that was due before has not been taken up; the same on all ranks."""
        return bool(_from_rank_zero(self._pending is not None and self._pending.epoch < epoch))

    def _take_up(self, epoch: int, weights: nn.Module | str | os.PathLike[str] | None) -> None:
        fraction = self.schedule.fraction(epoch)
        with self._kept_on_failure(epoch):
            if _from_rank_zero(self._pending is not None):
                self._round = self._from_background(fraction)
            else:
                made = run_round(
                    self._store, self._scorer, fraction=fraction, weights=weights, epoch=epoch, **self._options
                )
                self._round = made.number

    def _draw(self, epoch: int) -> None:
        """A random selection, for an epoch of the warm-up that is not on everything."""
        options = {name: self._options[name] for name in ("workers", "deadline", "on_busy")}
        with self._kept_on_failure(epoch):
            self._round = run_round(
                self._store, self._scorer, fraction=self.schedule.fraction(epoch), strategy=f"random:{epoch}",
                epoch=epoch, **options,
            ).number  # fmt: skip

    @contextmanager
    def _kept_on_failure(self, epoch: int) -> Iterator[None]:
        """Let a failed round leave the last selection in place; what cannot mend itself is raised."""
        try:
            yield
        except _PERMANENT:
            raise
        except Exception as error:
            if self._on_failure == "raise":
                raise
            what = "everything" if self._round is None else f"round {self._round}"
            message = f"epoch {epoch}: the round failed; training goes on with {what}. {type(error).__name__}: {error}"
            self.failures.append(message)
            logger.error(message)

    # ---- in the background -------------------------------------------------------------------------------------------

    def _begin_early(self, epoch: int, weights: nn.Module | str | os.PathLike[str] | None) -> None:
        due = epoch + 1
        if due >= self.schedule.epochs or not self.schedule.starts_round(due) or not _is_rank_zero():
            return
        if self._pending is not None:
            logger.warning(f"epoch {epoch}: the round of epoch {self._pending.epoch} is not ready; no other is begun")
            return
        options = {name: value for name, value in self._options.items() if name not in ("deadline", *_CHOICES)}
        saved = None
        if Strategy.parse(options["strategy"]).seed is None:
            checked = options["check_samples"] > 0
            saved = save_for_workers(self._store, self._scorer, weights, epoch, with_model=checked)
        fraction, choices = self.schedule.fraction(due), self._choices
        self._pending = _Background(
            due,
            lambda: (
                make_round(
                    self._store, self._scorer, saved, fraction=fraction, epoch=epoch, choices=choices, **options
                ).round
            ),
        )

    def _from_background(self, fraction: float) -> int | None:
        """The pending round's number, cut anew where its fraction has changed; the last one's while it is not ready."""
        answer: dict[str, Any] = {"round": self._round}
        if _is_rank_zero():
            assert self._pending is not None
            if self._pending.is_ready:
                pending, self._pending = self._pending, None
                try:
                    answer["round"] = self._cut(pending.result(), fraction)
                except Exception as error:  # noqa: BLE001 - told to all ranks, and raised below
                    answer["error"] = f"{type(error).__name__}: {error}"
                    answer["permanent"] = isinstance(error, _PERMANENT)
            else:
                logger.warning(f"the round of epoch {self._pending.epoch} is not ready; it is taken up when it is")
        answer = _from_rank_zero(answer)
        if "error" in answer:
            kind = ModelError if answer["permanent"] else ScoringError
            raise kind(f"the background round failed: {answer['error']}")
        return answer["round"]  # type: ignore[no-any-return]

    def _cut(self, made: Round, fraction: float) -> int:
        if made.fraction == fraction:
            return made.number
        return select_round(
            self._store, fraction=fraction, scores_of=made.scores_of, as_newest=True, **self._choices,
            **{name: self._options[name] for name in ("strategy", "workers", "max_errors", "max_bad_shards")},
        ).round.number  # fmt: skip

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the round that is under way in the background; whether there is none, or it is ready.

        Args:
            timeout: seconds; None for as long as it takes.
        """
        return self._pending is None or self._pending.wait(timeout)

    # ---- states ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep, JSON-able and the same on all ranks. A background round is not in it."""
        return {"version": STATE_VERSION, "epoch": self._begun, "round": self._round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: `begin_epoch` of the epoch that was running takes its round, and makes no other.

        Raises:
            StateError: it is not a state of this class.
        """
        if set(state) != {"version", "epoch", "round"} or state["version"] != STATE_VERSION:
            raise StateError(f"this is no state of DynamicSelection of version {STATE_VERSION}: {state!r}")
        self._begun, self._round, self._pending = state["epoch"], state["round"], None


@dataclass
class _Background:
    """A round that is made in a thread."""

    epoch: int
    work: Any
    _thread: threading.Thread = field(init=False)
    _made: Round | None = field(init=False, default=None)
    _error: BaseException | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # A daemon, so that a training that ends does not wait for it; the local cluster goes with the process.
        self._thread = threading.Thread(target=self._run, name="dynams-round", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made = self.work()
        except BaseException as error:  # noqa: BLE001 - kept for whoever takes the round up
            self._error = error

    @property
    def is_ready(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout: float | None) -> bool:
        self._thread.join(timeout)
        return self.is_ready

    def result(self) -> Round:
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made


def _is_rank_zero() -> bool:
    return not has_several_ranks() or torch.distributed.get_rank() == 0


def _from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    if not has_several_ranks():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
