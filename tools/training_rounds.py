"""How each method of a reference training run comes to its selections."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from distributed import Client
from torch import nn

from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Round, Store
from pipeline.rounds import run_round
from pipeline.select_job import select_round
from tools.infobatch import InfoBatch
from tools.training_config import Method, RunConfig

_UNSELECTED = ("full", "short")
_ANEW = ("fresh-random", "infobatch")
"""Methods whose selections cost nothing, and which choose in each epoch."""


class Rounds:
    """How a method gets its selection for an epoch; `begin` publishes what the method trains on next.

    Attributes:
        published: numbers of the rounds, in order.
        scored: samples that were scored for them.
    """

    def __init__(self, config: RunConfig, method: Method, seed: int, store: Store, client: Client):
        self.config, self.method, self.seed, self.store, self.client = config, method, seed, store, client
        self.published: list[int] = []
        self.scored = 0
        self._scores: int | None = None
        self._infobatch = InfoBatch(store, seed) if method == "infobatch" else None

    @property
    def selects(self) -> bool:
        """Whether the method trains on selections at all."""
        return self.method not in _UNSELECTED

    def begins(self, epoch: int) -> bool:
        """Whether the method makes a selection before `epoch`: when a round starts, or anew in each epoch."""
        schedule = self.config.schedule()
        if self.method in _ANEW:
            return schedule.round(epoch) is not None
        return self.selects and (schedule.starts_round(epoch) or schedule.draws(epoch))

    @property
    def has_proxy(self) -> bool:
        """Whether this method has a proxy score its rounds."""
        return self.method in ("dynams", "static") and self.config.selection.scorer == "proxy"

    @property
    def observes(self) -> bool:
        """Whether the method wants to see each sample's loss."""
        return self._infobatch is not None

    def trains_proxy(self, epoch: int) -> bool:
        """Whether the proxy is trained along in `epoch`: until the last round that it scores has begun."""
        later = self.config.schedule().rounds_follow(epoch)
        return self.has_proxy and later and (self.method == "dynams" or self._scores is None)

    def observe(self, places: npt.NDArray[np.int64], losses: npt.NDArray[np.float32]) -> None:
        """Take note of the losses of samples that were trained on."""
        if self._infobatch is not None:
            self._infobatch.observe(places, losses)

    def begin(self, epoch: int, fraction: float, network: nn.Module) -> None:
        """Publish the selection that starts with this epoch, scored by the network or by the proxy in it."""
        self.published.append(self._make(epoch, fraction, network).number)

    def _make(self, epoch: int, fraction: float, network: nn.Module) -> Round:
        selection = self.config.selection
        strategy = selection.strategy
        choices = selection.choices()
        warms_up = self.config.schedule().draws(epoch)
        if self._infobatch is not None and not warms_up:
            return self._infobatch.select(fraction, epoch)
        if warms_up or self.method in ("random", "fresh-random"):
            fixed = self.method == "random" and not warms_up
            seed = self.seed if fixed else self.seed * 100_000 + epoch
            return select_round(self.store, fraction=fraction, strategy=f"random:{seed}", as_newest=True).round
        if self._scores is None or self.method == "dynams":
            made = run_round(
                self.store, scorer_spec(self.config), weights=network, fraction=fraction, epoch=epoch,
                strategy=strategy, client=self.client, device=self.config.training.device,
                fallback=selection.fallback, calibration_samples=selection.calibration_samples, **choices,
            )  # fmt: skip
            self._scores = made.number
            self.scored += self.store.dataset().samples
            return made
        return select_round(
            self.store, fraction=fraction, strategy=strategy, scores_of=self._scores, as_newest=True, **choices
        ).round


def scorer_spec(config: RunConfig) -> ScorerSpec:
    """How rounds of this configuration are scored."""
    data, model = config.data, config.model
    return ScorerSpec(
        model=model.factory, model_args=model.args, head=model.head,
        width=model.width if config.selection.scorer == "proxy" else 1.0,
        input=data.input, label=data.label, transform=data.transform,
    )  # fmt: skip
