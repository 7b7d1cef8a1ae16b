"""What training on a selection costs, against training on everything; in FLOPs, or in seconds where they were measured.

With N samples, F a forward pass of one sample, α the proxy's share of it, and a training step three forward passes,
a round of Q epochs at fraction γ

    saves   3·F·N·Q·(1 − γ)
    costs   α·F·N  +  reading and decoding all N  +  3·α·F·γ·N·Q / every       (scored by the proxy)
    costs     F·N  +  reading and decoding all N                               (scored by the model itself)

so that on a small model the proxy, which has to be trained along, can cost more than it saves. `StepCosts` holds the
costs of one sample as they were counted or measured, and `RunCost` adds them up over a schedule.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynams_stream.errors import UsageError
from dynams_stream.proxy import ParameterSharingProxy, slim_architecture
from dynams_stream.schedule import Schedule
from dynams_stream.selection import selected_count

SMALLEST_BATCH = 2
"""What is counted: batch normalisation refuses to train on one sample alone."""


@dataclass(frozen=True)
class StepCosts:
    """Costs of one sample, in any one unit (FLOPs, seconds).

    Attributes:
        forward, training: the model's forward pass; its forward and backward pass.
        proxy_forward, proxy_training: the same of the proxy. They stand beside the model's, not instead.
        reading: reading and decoding it (no FLOPs).
    """

    forward: float
    training: float
    proxy_forward: float
    proxy_training: float
    reading: float = 0.0

    @property
    def proxy_share(self) -> float:
        """α, what a forward pass of the proxy costs of the model's."""
        return self.proxy_forward / self.forward


@dataclass(frozen=True)
class RunCost:
    """A whole run, or an epoch of it.

    Attributes:
        trained: samples trained on.
        scored: samples scored.
        training, proxy_training, scoring, reading: what that costs, in the unit of the `StepCosts`.
    """

    trained: int
    scored: int
    training: float
    proxy_training: float
    scoring: float
    reading: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.proxy_training + self.scoring + self.reading


def count_flops(
    model: nn.Module, shape: Sequence[int], widths: Sequence[float], *, head: str | None = None
) -> dict[float, StepCosts]:
    """The FLOPs of one sample, counted by torch's own `FlopCounterMode` (convolutions and matrix products).

    Args:
        model: the full-width model; it is copied, not changed.
        shape: of one input, such as (3, 224, 224).
        widths: of the proxies to count; 1 for none.
        head: as for `ParameterSharingProxy`.

    Returns:
        The costs by width.

    Raises:
        UsageError: the model cannot take inputs of this shape.
        HeadError, UnsupportedLayerError: as `ParameterSharingProxy`.
    """
    inputs = torch.zeros(SMALLEST_BATCH, *shape)
    forward, training = _flops(copy.deepcopy(model), inputs)
    costs = {}
    for width in widths:
        if width == 1:
            costs[width] = StepCosts(forward, training, forward, 0.0)
        else:
            slim = _flops(slim_architecture(model, width, head), inputs)
            costs[width] = StepCosts(forward, training, *slim)
    return costs


def _flops(network: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """FLOPs of one sample: a forward pass; forward and backward."""
    network.train()
    # The mathematical form of attention consists of products that the counter knows, on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            output = network(inputs)
        except Exception as error:  # a model's own code raises anything
            raise UsageError(
                f"the model cannot take inputs of shape {tuple(inputs.shape[1:])}: {type(error).__name__}: {error}"
            ) from error
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward / len(inputs), counter.get_total_flops() / len(inputs)


def measure_seconds(
    model: nn.Module, inputs: Tensor, *, width: float, head: str | None = None, reading: float = 0.0, turns: int = 5
) -> StepCosts:
    """The seconds of one sample on the device of `inputs`: medians of `turns` batches, model and proxy by turns.

    Args:
        model, width, head: as for `count_flops`; the proxy's training is what a joint step takes more than the model's.
        inputs: a batch as training has it.
        reading: seconds that reading and decoding a sample takes, measured elsewhere.
        turns: how many batches of each kind.
    """
    plain = copy.deepcopy(model).to(inputs.device).train()
    if width == 1:
        joint: nn.Module = plain
        slim = plain
    else:
        network = ParameterSharingProxy(copy.deepcopy(model), width, head=head).to(inputs.device)
        joint, slim = network.train(), network.slim()
    kinds: dict[str, Callable[[], object]] = {
        "forward": lambda: _forward(plain, inputs),
        "training": lambda: _step(plain, inputs),
        "proxy_forward": lambda: _forward(slim, inputs),
        "joint": lambda: _step(joint, inputs),
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(turns + 1):  # the first one warms up
        for name, work in kinds.items():
            seconds = _seconds(work, inputs.device) / len(inputs)
            if turn:
                taken[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    along = max(0.0, medians["joint"] - medians["training"]) if width != 1 else 0.0
    return StepCosts(medians["forward"], medians["training"], medians["proxy_forward"], along, reading)


def _forward(network: nn.Module, inputs: Tensor) -> None:
    network.eval()
    with torch.inference_mode():
        network(inputs)


def _step(network: nn.Module, inputs: Tensor) -> None:
    network.train()
    output = network(inputs)
    loss = output.sum() if isinstance(output, Tensor) else sum(one.sum() for one in output)
    loss.backward()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def full_cost(epochs: int, samples: int, costs: StepCosts) -> RunCost:
    """Training on everything."""
    trained = epochs * samples
    return RunCost(trained, 0, trained * costs.training, 0.0, 0.0, trained * costs.reading)


def selected_cost(
    schedule: Schedule, samples: int, costs: StepCosts, *, scorer: Literal["proxy", "model"], every: int = 1
) -> RunCost:
    """Training on selections; arguments as for `epoch_costs`."""
    parts = [astuple(cost) for cost in epoch_costs(schedule, samples, costs, scorer=scorer, every=every)]
    return RunCost(*map(sum, zip(*parts, strict=True)))


def epoch_costs(
    schedule: Schedule, samples: int, costs: StepCosts, *, scorer: Literal["proxy", "model"], every: int = 1
) -> list[RunCost]:
    """The cost of each epoch of training on selections, the round that it begins with included.

    Args:
        schedule: which fraction each epoch trains on, and which begin a round.
        samples: N, samples of the dataset.
        costs: of one sample.
        scorer: what scores: the proxy, trained along until the last round has begun, or the model itself.
        every: the proxy takes part in each n-th step.
    """
    score = costs.proxy_forward if scorer == "proxy" else costs.forward
    along = costs.proxy_training / every if scorer == "proxy" else 0.0
    found = []
    for epoch in range(schedule.epochs):
        trained = selected_count(schedule.fraction(epoch), samples)
        scored = samples if schedule.starts_round(epoch) else 0
        found.append(
            RunCost(
                trained=trained,
                scored=scored,
                training=trained * costs.training,
                proxy_training=trained * along if schedule.rounds_follow(epoch) else 0.0,
                scoring=scored * score,
                reading=(trained + scored) * costs.reading,
            )
        )
    return found


def break_even_fraction(costs: StepCosts, epochs: int, *, scorer: Literal["proxy", "model"], every: int = 1) -> float:
    """The largest γ at which a round of `epochs` epochs costs no more than training on everything; ≤ 0 where none does.

    Solves (1 − γ)·Q·(T + r) = S + r + γ·Q·P/every for γ, with T and P the training costs of the model and of the proxy,
    S the scorer's forward pass and r the reading of a sample.
    """
    if scorer == "proxy":
        score, along = costs.proxy_forward, costs.proxy_training / every
    else:
        score, along = costs.forward, 0.0
    saved = epochs * (costs.training + costs.reading)
    return (saved - score - costs.reading) / (saved + epochs * along)
