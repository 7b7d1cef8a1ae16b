"""Schedules: epoch → fraction of the samples to train on, and which epochs start a new round.

    epoch      0 … warmup−1 │ interval epochs │ interval epochs │ … │ the rest │ anneal epochs
    round            –      │      k = 1      │      k = 2      │   │   k = K  │       –
    fraction         w      │       γ_1       │       γ_2       │   │    γ_K   │       1

There are K = ⌈(epochs − warmup − anneal) / interval⌉ rounds; the last may be shorter. γ_k never rises, and γ_K is
`final`.
The warm-up gives the model a boundary worth measuring; the last stretch on everything removes the bias that selection
leaves. w is 1, everything, unless `warmup_fraction` says less: then each epoch of the warm-up draws a random selection
of its own, which is for small budgets, where a warm-up on everything would leave nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Literal

from dynams_stream.errors import UsageError
from dynams_stream.selection import selected_count

_SMALLEST_FINAL = 1e-6
_DIGITS = 12
"""Fractions are rounded to this many decimals, so that 0.7000000000000001 of 10 samples is 7 samples, not 8."""


@dataclass(frozen=True)
class Schedule(ABC):
    """Base of all schedules; a subclass says how γ_k falls from 1 to `final`.

    Args:
        epochs: epochs of the whole run, numbered from 0.
        warmup: first epochs, which train on everything or, with a `warmup_fraction`, on random samples.
        anneal: last epochs that train on everything.
        interval: epochs of a round.
        final: γ of the last round, in (0, 1].
        budget: instead of `final`: the mean fraction over all epochs, warm-up and anneal included.
        warmup_fraction: share of all samples that an epoch of the warm-up trains on, drawn anew for each; in (0, 1].

    Raises:
        UsageError: an argument is out of range; for a budget, the message names the attainable range.
    """

    epochs: int
    warmup: int = 0
    anneal: int = 0
    interval: int = 1
    final: float | None = None
    budget: float | None = None
    warmup_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("warmup", 0), ("anneal", 0), ("interval", 1)):
            _require_whole(name, getattr(self, name), least)
        if self.warmup + self.anneal >= self.epochs:
            raise UsageError(
                f"warmup={self.warmup} and anneal={self.anneal} leave none of {self.epochs} epochs to select in; "
                f"shorten them, or train without a schedule"
            )
        if (self.final is None) == (self.budget is None):
            given = "both" if self.final is not None else "neither"
            raise UsageError(f"give exactly one of final (last fraction) and budget (mean fraction); {given} given")
        for name in ("final", "budget", "warmup_fraction"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= 1):
                raise UsageError(f"{name} is {value!r}; a fraction in (0, 1] is needed")
        if self.budget is not None:
            self._require_attainable(self.budget)

    @property
    def rounds(self) -> int:
        """K, the number of rounds."""
        return -(-(self.epochs - self.warmup - self.anneal) // self.interval)

    @cached_property
    def last_fraction(self) -> float:
        """γ_K: `final` as given, or solved for the budget."""
        return self._solve(self.budget) if self.budget is not None else float(self.final or 0)

    def fraction(self, epoch: int) -> float:
        """Share of all samples that `epoch` trains on, in (0, 1], rounded to 12 decimals."""
        if not self._selects(epoch):
            return float(self.warmup_fraction) if epoch < self.warmup else 1.0
        number = (epoch - self.warmup) // self.interval + 1
        if number == self.rounds:
            return self.last_fraction
        # `max`, because rounding must not make a tiny fraction 0
        return max(self.last_fraction, round(self._fraction_of_round(number, self.last_fraction), _DIGITS))

    def starts_round(self, epoch: int) -> bool:
        """Whether a round has to be scored and selected before `epoch`."""
        return self._selects(epoch) and (epoch - self.warmup) % self.interval == 0

    def draws(self, epoch: int) -> bool:
        """Whether a random selection has to be drawn before `epoch`: one of the warm-up, on less than everything."""
        self._selects(epoch)
        return epoch < self.warmup and self.warmup_fraction < 1

    def rounds_follow(self, epoch: int) -> bool:
        """Whether a round begins after `epoch`: until then the proxy has to be trained along."""
        self._selects(epoch)
        return epoch < self.warmup + (self.rounds - 1) * self.interval

    def round(self, epoch: int) -> Literal["latest"] | None:
        """What `epoch` streams: the newest round, scored or drawn; None (everything) where neither is."""
        return "latest" if self._selects(epoch) or self.draws(epoch) else None

    def total_steps(self, samples: int, batch: int) -> int:
        """Optimiser steps of the whole run, as learning-rate schedulers ask for.

        Args:
            samples: N, samples of the dataset.
            batch: samples of a step over all ranks; an epoch's last, short batch counts as a step.
        """
        for name, value in (("samples", samples), ("batch", batch)):
            if value < 1:
                raise UsageError(f"{name} is {value!r}; at least 1 is needed")
        counts = (selected_count(self.fraction(epoch), samples) for epoch in range(self.epochs))
        return sum(-(-count // batch) for count in counts)

    def mean_fraction(self) -> float:
        """Mean of `fraction` over all epochs: what the run costs, against training on everything."""
        return math.fsum(self.fraction(epoch) for epoch in range(self.epochs)) / self.epochs

    @abstractmethod
    def _fraction_of_round(self, number: int, final: float) -> float:
        """γ_k for k = `number` in 1 … K, increasing with `final`."""

    def _selects(self, epoch: int) -> bool:
        if not 0 <= epoch < self.epochs:
            raise UsageError(f"epoch is {epoch}; this schedule's epochs are 0 … {self.epochs - 1}")
        return self.warmup <= epoch < self.epochs - self.anneal

    # -- budget

    def _mean(self, final: float) -> float:
        """Mean fraction over all epochs of the schedule that ends at `final`."""
        selecting = self.epochs - self.warmup - self.anneal
        lengths = [min(self.interval, selecting - start) for start in range(0, selecting, self.interval)]
        parts = [n * self._fraction_of_round(k, final) for k, n in enumerate(lengths, start=1)]
        return math.fsum([*parts, self.warmup * self.warmup_fraction, self.anneal]) / self.epochs

    def _require_attainable(self, budget: float) -> None:
        least, most = self._mean(_SMALLEST_FINAL), self._mean(1.0)
        if not least <= budget <= most:
            raise UsageError(
                f"budget={budget} cannot be reached: with epochs={self.epochs}, warmup={self.warmup}, "
                f"anneal={self.anneal}, interval={self.interval}, warmup_fraction={self.warmup_fraction} this "
                f"schedule's mean fraction lies in [{math.ceil(least * 1e6) / 1e6}, {math.floor(most * 1e6) / 1e6:g}]; "
                f"change the budget, the warm-up or the anneal"
            )

    def _solve(self, budget: float) -> float:
        """The `final` whose mean fraction is `budget`, by bisection."""
        low, high = _SMALLEST_FINAL, 1.0
        while high - low > 1e-13:
            middle = (low + high) / 2
            if self._mean(middle) < budget:
                low = middle
            else:
                high = middle
        return round(high, _DIGITS)


@dataclass(frozen=True)
class PowerSchedule(Schedule):
    """γ_k = (k + 1)^(−r) with r = −ln(final) / ln(K + 1): falls fast, then slowly; the authors' kind."""

    def _fraction_of_round(self, number: int, final: float) -> float:
        return float(final ** (math.log(number + 1) / math.log(self.rounds + 1)))


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """γ_k = 1 − (1 − final) · k / K: falls by the same amount each round."""

    def _fraction_of_round(self, number: int, final: float) -> float:
        return 1 - (1 - final) * number / self.rounds


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """γ_k = final + (1 − final) · (1 + cos(π·k/K)) / 2: slowly, fast, slowly."""

    def _fraction_of_round(self, number: int, final: float) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * number / self.rounds)) / 2


@dataclass(frozen=True)
class ExponentialSchedule(Schedule):
    """γ_k = final^(k/K): falls by the same factor each round."""

    def _fraction_of_round(self, number: int, final: float) -> float:
        return float(final ** (number / self.rounds))


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """γ_k = final: at once. (Falling from everything to a tenth in one round costs accuracy; see docs/method.md.)"""

    def _fraction_of_round(self, number: int, final: float) -> float:
        return final


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """γ_k = final^(s/S) with s = ⌈k·S/K⌉: S equal stages, each by the same factor smaller than the one before.

    Args:
        steps: S, at least 1; of more stages than rounds, each round is one.
    """

    steps: int = 3

    def __post_init__(self) -> None:
        _require_whole("steps", self.steps, 1)
        super().__post_init__()

    def _fraction_of_round(self, number: int, final: float) -> float:
        stages = min(self.steps, self.rounds)
        return float(final ** (-(-number * stages // self.rounds) / stages))


SCHEDULES: dict[str, type[Schedule]] = {
    "power": PowerSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "exponential": ExponentialSchedule,
    "constant": ConstantSchedule,
    "step": StepSchedule,
}
"""Schedules by the name that configurations and commands give them."""


def make_schedule(name: str, *, steps: int | None = None, **arguments: Any) -> Schedule:
    """The schedule of that name.

    Args:
        name: of `SCHEDULES`.
        steps: stages of a step schedule, which alone has any; None for its default.
        arguments: as for `Schedule`.

    Raises:
        UsageError: an unknown name, steps of another schedule, or arguments that no schedule can be made of.
    """
    if name not in SCHEDULES:
        raise UsageError(f"schedule {name!r} is unknown; choose from {', '.join(SCHEDULES)}")
    if steps is None:
        return SCHEDULES[name](**arguments)
    if SCHEDULES[name] is not StepSchedule:
        raise UsageError(f"steps={steps} is for the step schedule; the {name} schedule has none")
    return StepSchedule(**arguments, steps=steps)


def _require_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; a whole number of {least} or more is needed")
