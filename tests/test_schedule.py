"""Schedules against their formulas by hand and plain loops."""

from __future__ import annotations

import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dynams_stream.errors import UsageError
from dynams_stream.schedule import (
    SCHEDULES,
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PowerSchedule,
    Schedule,
    StepSchedule,
    make_schedule,
)

KINDS = tuple(SCHEDULES.values())


def by_formula(kind: type[Schedule], k: int, rounds: int, final: float) -> float:
    """γ_k as the documentation writes it."""
    if kind is PowerSchedule:
        return (k + 1) ** (math.log(final) / math.log(rounds + 1))
    if kind is LinearSchedule:
        return 1 - (1 - final) * k / rounds
    if kind is CosineSchedule:
        return final + (1 - final) * (1 + math.cos(math.pi * k / rounds)) / 2
    if kind is ExponentialSchedule:
        return math.exp(math.log(final) * k / rounds)
    if kind is StepSchedule:
        stages = min(3, rounds)
        return final ** (math.ceil(Fraction(k * stages, rounds)) / stages)
    assert kind is ConstantSchedule
    return final


def fractions(schedule: Schedule) -> list[float]:
    return [schedule.fraction(epoch) for epoch in range(schedule.epochs)]


def test_linear_by_hand() -> None:
    # K = 3 rounds of one epoch between 2 of warm-up and 1 of anneal: 1 − 0.9·k/3
    assert fractions(LinearSchedule(6, warmup=2, anneal=1, final=0.1)) == [1.0, 1.0, 0.7, 0.4, 0.1, 1.0]


def test_power_by_hand() -> None:
    # K = 3, final = 1/4: r = ln 4 / ln 4 = 1, so γ_k = 1/(k + 1)
    assert fractions(PowerSchedule(4, warmup=1, final=0.25)) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], abs=1e-12)


def test_the_others_by_hand() -> None:
    # K = 4 rounds of one epoch, final 1/16: cos(π/4) = √½
    assert fractions(CosineSchedule(4, final=0.5)) == pytest.approx([0.5 + 0.25 * (1 + 0.5**0.5), 0.75, 0.5732233, 0.5])
    assert fractions(ExponentialSchedule(4, final=1 / 16)) == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert fractions(ConstantSchedule(4, warmup=1, final=0.3)) == [1.0, 0.3, 0.3, 0.3]
    assert fractions(StepSchedule(4, final=1 / 16, steps=2)) == pytest.approx([1 / 4, 1 / 4, 1 / 16, 1 / 16])
    assert fractions(StepSchedule(7, warmup=1, final=1 / 8)) == pytest.approx(
        [1, *[1 / 2] * 2, *[1 / 4] * 2, *[1 / 8] * 2]
    )
    assert fractions(StepSchedule(2, final=1 / 16, steps=9)) == pytest.approx([1 / 4, 1 / 16]), "a stage a round"


@pytest.mark.parametrize("steps", [0, 2.5, True])
def test_a_step_schedule_needs_a_number_of_stages(steps: Any) -> None:
    with pytest.raises(UsageError, match="steps is"):
        StepSchedule(4, final=0.1, steps=steps)


def test_the_measured_mnist_schedules() -> None:
    """The mean fractions that go with the figures measured on MNIST: 12 epochs, 2 of warm-up, final 0.1."""
    assert PowerSchedule(12, warmup=2, final=0.1).mean_fraction() == pytest.approx(0.345, abs=5e-4)
    assert LinearSchedule(12, warmup=2, final=0.1).mean_fraction() == pytest.approx(0.5875, abs=1e-9)


def test_rounds_of_several_epochs_with_a_short_last_one() -> None:
    schedule = LinearSchedule(10, warmup=2, anneal=1, interval=3, final=0.4)  # 7 epochs: rounds of 3, 3 and 1
    assert schedule.rounds == 3
    assert fractions(schedule) == [1.0, 1.0, 0.8, 0.8, 0.8, 0.6, 0.6, 0.6, 0.4, 1.0]
    assert [epoch for epoch in range(10) if schedule.starts_round(epoch)] == [2, 5, 8]
    assert [schedule.round(epoch) for epoch in range(10)] == [None, None, *["latest"] * 7, None]


def test_without_warmup_the_first_epoch_starts_a_round() -> None:
    schedule = PowerSchedule(1, final=0.3)
    assert schedule.starts_round(0)
    assert schedule.fraction(0) == 0.3
    assert schedule.round(0) == "latest"


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    epochs = draw(st.integers(1, 60))
    warmup = draw(st.integers(0, epochs - 1))
    anneal = draw(st.integers(0, epochs - 1 - warmup))
    part = draw(st.sampled_from([1.0, 0.3]))
    return {
        "epochs": epochs, "warmup": warmup, "anneal": anneal, "interval": draw(st.integers(1, 8)),
        "warmup_fraction": part,
    }  # fmt: skip


@given(shapes(), st.sampled_from(KINDS), st.floats(1e-6, 1.0))
def test_a_schedule_falls_to_final_and_not_below(shape: dict[str, Any], kind: type[Schedule], final: float) -> None:
    schedule = kind(**shape, final=final)
    selecting = range(shape["warmup"], shape["epochs"] - shape["anneal"])
    values = [schedule.fraction(epoch) for epoch in selecting]
    assert values == sorted(values, reverse=True)
    assert values[-1] == final
    assert all(0 < value <= 1 for value in values)
    starts = [epoch for epoch in range(shape["epochs"]) if schedule.starts_round(epoch)]
    assert starts == list(selecting)[:: shape["interval"]]
    assert len(starts) == schedule.rounds
    follow = [epoch for epoch in range(shape["epochs"]) if schedule.rounds_follow(epoch)]
    assert follow == [epoch for epoch in range(shape["epochs"]) if any(start > epoch for start in starts)]
    for k, start in enumerate(starts, start=1):
        expected = by_formula(kind, k, schedule.rounds, final)
        assert schedule.fraction(start) == pytest.approx(expected, abs=1e-12)
    for epoch in set(range(shape["epochs"])) - set(selecting):
        part = shape["warmup_fraction"] if epoch < shape["warmup"] else 1.0
        assert schedule.fraction(epoch) == part
        assert schedule.round(epoch) == (None if part == 1 else "latest")
        assert schedule.draws(epoch) == (part < 1)
        assert not schedule.starts_round(epoch)
    assert not any(schedule.draws(epoch) for epoch in selecting)


@given(shapes(), st.sampled_from(KINDS), st.floats(0.001, 1.0))
def test_a_budget_is_the_mean_over_all_epochs(shape: dict[str, Any], kind: type[Schedule], budget: float) -> None:
    try:
        schedule = kind(**shape, budget=budget)
    except UsageError:
        least, most = (kind(**shape, final=final).mean_fraction() for final in (1e-6, 1.0))
        assert not least <= budget <= most
        assume(False)
    assert math.fsum(fractions(schedule)) / schedule.epochs == pytest.approx(budget, abs=1e-6)
    assert schedule.mean_fraction() == pytest.approx(budget, abs=1e-6)
    assert kind(**shape, final=schedule.last_fraction) != schedule  # the fields are as given
    assert fractions(kind(**shape, final=schedule.last_fraction)) == fractions(schedule)


def test_the_authors_budget() -> None:
    schedule = PowerSchedule(200, budget=0.6)
    assert schedule.mean_fraction() == pytest.approx(0.6, abs=1e-9)
    # Σ (k+1)^(−r) / 200 with the r of the solved final, from the formula
    r = -math.log(schedule.last_fraction) / math.log(201)
    assert sum((k + 1) ** -r for k in range(1, 201)) / 200 == pytest.approx(0.6, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unattainable_budget_names_the_attainable_range(kind: type[Schedule]) -> None:
    with pytest.raises(UsageError, match=r"budget=0\.2 .*\[0\.(\d+), 1\]") as caught:
        kind(10, warmup=3, anneal=2, budget=0.2)
    least = float(str(caught.value).split("[")[1].split(",")[0])
    assert kind(10, warmup=3, anneal=2, budget=least).mean_fraction() == pytest.approx(least, abs=1e-6)
    with pytest.raises(UsageError, match="cannot be reached"):
        kind(10, warmup=3, anneal=2, budget=least - 1e-4)


def test_a_warm_up_on_random_samples_leaves_a_small_budget_its_rounds() -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        PowerSchedule(12, warmup=2, budget=0.1)
    schedule = PowerSchedule(12, warmup=2, budget=0.1, warmup_fraction=0.2)
    assert fractions(schedule)[:2] == [0.2, 0.2]
    assert schedule.mean_fraction() == pytest.approx(0.1, abs=1e-9)
    assert [schedule.round(epoch) for epoch in (0, 1, 2)] == ["latest"] * 3
    assert [schedule.draws(epoch) for epoch in (0, 1, 2)] == [True, True, False]
    assert [schedule.starts_round(epoch) for epoch in (0, 1, 2)] == [False, False, True]
    with pytest.raises(UsageError, match=r"lies in \[0\.0350\d+, 0\.866666\]"):
        PowerSchedule(12, warmup=2, budget=0.9, warmup_fraction=0.2)


def test_a_budget_of_one_trains_on_everything() -> None:
    assert fractions(LinearSchedule(5, warmup=1, budget=1.0)) == [1.0] * 5


@given(shapes(), st.sampled_from(KINDS), st.integers(1, 5000), st.integers(1, 300))
def test_total_steps_against_a_plain_loop(
    shape: dict[str, int], kind: type[Schedule], samples: int, batch: int
) -> None:
    schedule = kind(**shape, final=0.07)
    steps = 0
    for epoch in range(schedule.epochs):
        selected = math.ceil(Decimal(repr(schedule.fraction(epoch))) * samples)
        steps += len(range(0, selected, batch))
    assert schedule.total_steps(samples, batch) == steps


def test_total_steps_takes_the_fraction_as_written() -> None:
    # 0.6 of 10 is 6 samples, although 1 − 0.6·2/3 is 0.6000000000000001 in floating point
    assert 1 - (1 - 0.4) * 2 / 3 > 0.6
    assert LinearSchedule(3, final=0.4).total_steps(10, 1) == 8 + 6 + 4


@pytest.mark.parametrize("epoch", [-1, 4, 100])
@pytest.mark.parametrize("method", ["fraction", "starts_round", "round", "rounds_follow"])
def test_epochs_outside_the_run_are_refused(method: str, epoch: int) -> None:
    with pytest.raises(UsageError, match=rf"epoch is {epoch}; .* 0 … 3"):
        getattr(PowerSchedule(4, final=0.5), method)(epoch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0, "final": 0.5}, "epochs is 0"),
        ({"epochs": 2.5, "final": 0.5}, "epochs is 2.5"),
        ({"epochs": 5, "warmup": -1, "final": 0.5}, "warmup is -1"),
        ({"epochs": 5, "warmup_fraction": 0, "final": 0.5}, "warmup_fraction is 0"),
        ({"epochs": 5, "interval": 0, "final": 0.5}, "interval is 0"),
        ({"epochs": 5, "warmup": 3, "anneal": 2, "final": 0.5}, "leave none of 5 epochs"),
        ({"epochs": 5}, "neither given"),
        ({"epochs": 5, "final": 0.5, "budget": 0.5}, "both given"),
        ({"epochs": 5, "final": 0.0}, r"final is 0\.0"),
        ({"epochs": 5, "final": 1.1}, r"final is 1\.1"),
        ({"epochs": 5, "final": math.nan}, "final is nan"),
        ({"epochs": 5, "final": "0.3"}, "final is '0.3'"),
        ({"epochs": 5, "budget": -0.1}, r"budget is -0\.1"),
        ({"epochs": 5, "budget": True}, "budget is True"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LinearSchedule(**arguments)


@pytest.mark.parametrize(("samples", "batch", "name"), [(0, 8, "samples"), (10, 0, "batch")])
def test_total_steps_refuses_nothing_to_do(samples: int, batch: int, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0"):
        PowerSchedule(4, final=0.5).total_steps(samples, batch)


def test_schedules_are_values() -> None:
    schedule = PowerSchedule(9, warmup=1, budget=0.5)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(PowerSchedule(9, warmup=1, budget=0.5))
    with pytest.raises(AttributeError):
        schedule.epochs = 3  # type: ignore[misc]


def test_schedules_by_name() -> None:
    arguments = {"epochs": 12, "warmup": 2, "final": 0.1}
    assert make_schedule("cosine", **arguments) == CosineSchedule(**arguments)
    assert make_schedule("step", **arguments) == StepSchedule(**arguments)
    assert make_schedule("step", steps=5, **arguments) == StepSchedule(**arguments, steps=5)
    with pytest.raises(UsageError, match="schedule 'cubic' is unknown; choose from power, linear"):
        make_schedule("cubic", **arguments)
    with pytest.raises(UsageError, match="steps=5 is for the step schedule; the power schedule has none"):
        make_schedule("power", steps=5, **arguments)
