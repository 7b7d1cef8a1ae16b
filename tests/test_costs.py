"""Costs against sums by hand, a plain loop, and the break-even of the theory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import toy_models
from dynams_stream import costs as costs_module
from dynams_stream.costs import (
    StepCosts,
    break_even_fraction,
    count_flops,
    epoch_costs,
    full_cost,
    measure_seconds,
    selected_cost,
)
from dynams_stream.errors import UsageError
from dynams_stream.schedule import SCHEDULES, ConstantSchedule, LinearSchedule

COSTS = StepCosts(forward=10.0, training=30.0, proxy_forward=2.5, proxy_training=7.5, reading=1.0)


def test_flops_of_a_small_network_by_hand() -> None:
    """Two FLOPs for each product of a convolution or a linear layer; the backward pass does each twice, but for the
    gradient of the images, which nobody asks for."""
    first = 2 * 8 * (1 * 9) * (8 * 8)
    second = 2 * 16 * (8 * 9) * (4 * 4)
    head = 2 * 16 * 10
    costs = count_flops(toy_models.small_cnn(width=8), (1, 8, 8), [0.5])[0.5]
    assert costs.forward == first + second + head
    assert costs.training == 2 * first + 3 * (second + head)
    assert costs.proxy_forward == first / 2 + second / 4 + head / 2
    assert costs.proxy_training == first + 3 * (second / 4 + head / 2)
    assert costs.proxy_share == costs.proxy_forward / costs.forward


def test_attention_is_counted_whatever_kernel_computes_it() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x).flatten(2).transpose(1, 2)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    tokens = 16
    products = 2 * tokens * (3 * 8 + 8 * 24 + 8 * 8) + 2 * (2 * tokens * tokens * 8) + 2 * 8 * 5
    assert count_flops(Attending(), (3, 4, 4), [1])[1].forward == products


def test_the_model_is_left_alone() -> None:
    model = toy_models.small_cnn().eval()
    before = copy.deepcopy(model.state_dict())
    count_flops(model, (1, 8, 8), [0.5])
    measure_seconds(model, torch.zeros(2, 1, 8, 8), width=0.5, turns=1)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_shape_that_does_not_fit_is_named() -> None:
    with pytest.raises(UsageError, match=r"shape \(3, 8, 8\)"):
        count_flops(toy_models.small_cnn(), (3, 8, 8), [1])


def test_measured_seconds_are_medians_of_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 that take 8, 24, 4 and 40 seconds (forward, training, proxy, joint), but for a slow first turn."""
    turns = itertools.chain([99.0] * 4, itertools.cycle([8.0, 24.0, 4.0, 40.0]))

    def clock(work: Callable[[], object], device: torch.device) -> float:
        work()
        return next(turns)

    monkeypatch.setattr(costs_module, "_seconds", clock)
    found = measure_seconds(toy_models.small_cnn(), torch.zeros(4, 1, 8, 8), width=0.5, reading=0.25, turns=3)
    assert found == StepCosts(forward=2.0, training=6.0, proxy_forward=1.0, proxy_training=4.0, reading=0.25)


def test_a_run_by_hand() -> None:
    # Epochs 0 and 1 on all 100 samples, then rounds of 70, 40 and 10 of them: 1 − 0.9·k/3
    schedule = LinearSchedule(5, warmup=2, final=0.1)
    assert full_cost(5, 100, COSTS).total == 500 * 30 + 500 * 1
    cost = selected_cost(schedule, 100, COSTS, scorer="proxy", every=2)
    assert (cost.trained, cost.scored) == (320, 300)
    assert cost.training == 320 * 30
    assert cost.proxy_training == (100 + 100 + 70 + 40) * 7.5 / 2, "after the last round has begun nobody needs it"
    assert cost.scoring == 300 * 2.5
    assert cost.reading == 620
    itself = selected_cost(schedule, 100, COSTS, scorer="model")
    assert (itself.proxy_training, itself.scoring) == (0, 300 * 10)
    assert itself.total == 320 * 30 + 3000 + 620


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 30),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 5000),
    st.sampled_from(["proxy", "model"]),
    st.integers(1, 4),
)
def test_epochs_add_up(
    kind: str, epochs: int, warmup: int, interval: int, samples: int, scorer: str, every: int
) -> None:
    schedule = SCHEDULES[kind](epochs + warmup, warmup=warmup, interval=interval, final=0.1)
    by_epoch = epoch_costs(schedule, samples, COSTS, scorer=scorer, every=every)  # type: ignore[arg-type]
    total = selected_cost(schedule, samples, COSTS, scorer=scorer, every=every)  # type: ignore[arg-type]
    assert len(by_epoch) == schedule.epochs
    assert total.total == pytest.approx(sum(cost.total for cost in by_epoch))
    assert total.trained == sum(cost.trained for cost in by_epoch)
    assert total.scored == schedule.rounds * samples


@pytest.mark.parametrize(("scorer", "every"), [("proxy", 1), ("proxy", 4), ("model", 1)])
@pytest.mark.parametrize("interval", [1, 3, 10])
def test_at_the_break_even_a_round_costs_what_it_saves(scorer: str, every: int, interval: int) -> None:
    """3·F·N·Q·(1 − γ) saved, α·F·N + 3·α·F·γ·N·Q spent: training costs 3·F, the proxy's 3·α·F, and reading nothing."""
    model_forward, share, samples = 8.0, 0.25, 1000
    costs = StepCosts(model_forward, 3 * model_forward, share * model_forward, 3 * share * model_forward)
    fraction = break_even_fraction(costs, interval, scorer=scorer, every=every)  # type: ignore[arg-type]
    saved = 3 * model_forward * samples * interval * (1 - fraction)
    spent = samples * model_forward
    if scorer == "proxy":
        spent = share * model_forward * samples + 3 * share * model_forward * fraction * samples * interval / every
    assert saved == pytest.approx(spent)


def test_runs_cross_full_data_where_the_break_even_says() -> None:
    """A schedule of many rounds of one constant fraction costs as much as full data at just that fraction."""
    costs = StepCosts(10.0, 30.0, 2.5, 7.5, reading=3.0)
    for scorer in ("proxy", "model"):
        fraction = break_even_fraction(costs, 5, scorer=scorer)  # type: ignore[arg-type]
        schedule = ConstantSchedule(5000, interval=5, final=fraction)
        total = selected_cost(schedule, 10_000, costs, scorer=scorer).total  # type: ignore[arg-type]
        assert total == pytest.approx(full_cost(5000, 10_000, costs).total, rel=1e-3)


def test_a_scorer_that_costs_more_than_it_can_save_never_pays() -> None:
    assert break_even_fraction(StepCosts(10, 30, 10, 30, reading=25), 1, scorer="model") > 0
    assert break_even_fraction(StepCosts(10, 12, 10, 30, reading=0), 1, scorer="proxy") > 0
    assert break_even_fraction(StepCosts(10, 9, 10, 30), 1, scorer="model") <= 0
