"""The power law: what it recovers, how honest its intervals are, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from dynams_stream import power_law
from dynams_stream.errors import UsageError
from dynams_stream.power_law import fit_power_law

SIZES = [600, 1800, 6000, 18000, 60000]


@pytest.mark.parametrize(("a", "b", "c"), [(2.0, 0.5, 0.01), (0.8, 0.2, 0.0), (30.0, 0.9, 0.005)])
def test_exact_points_give_the_law_back(a: float, b: float, c: float) -> None:
    law = fit_power_law(SIZES, [a * n**-b + c for n in SIZES])
    assert law.error(30_000) == pytest.approx(a * 30_000**-b + c, rel=1e-4)
    assert law.error(10**9) == pytest.approx(a * 1e9**-b + c, rel=0.02, abs=1e-6)
    low, high = law.interval(30_000)
    assert low == pytest.approx(high, rel=1e-3)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power_law, "_RESAMPLES", 60)
    generator, inside, trials = np.random.default_rng(1), 0, 40
    for _ in range(trials):
        sizes = np.repeat(SIZES, 2)
        truth = 2 * 30_000**-0.5 + 0.01
        errors = (2 * sizes**-0.5 + 0.01) * np.exp(generator.normal(0, 0.05, len(sizes)))
        low, high = fit_power_law(sizes, errors).interval(30_000)
        inside += low <= truth <= high
    assert 0.75 * trials <= inside < trials + 1


def test_the_same_points_give_the_same_interval() -> None:
    errors = [0.09, 0.05, 0.036, 0.026, 0.018]
    assert fit_power_law(SIZES, errors).interval(5000) == fit_power_law(SIZES, errors).interval(5000)
    wide, narrow = (fit_power_law(SIZES, errors).interval(5000, level) for level in (0.95, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("sizes", "errors", "message"),
    [
        ([100, 200, 400], [0.3, 0.2, 0.1], "3 different sizes"),
        ([100, 100, 100, 200], [0.3, 0.2, 0.1, 0.1], "2 different sizes"),
        ([100, 200, 400, 800], [0.3, 0.2, 0.1], "4 sizes and 3 errors"),
        ([100, 200, 400, 800], [0.3, 0.2, 0.1, 0.0], r"in \(0, 1\]"),
        ([100, 200, 400, 800], [3, 0.2, 0.1, 0.1], r"in \(0, 1\]"),
        ([0, 200, 400, 800], [0.3, 0.2, 0.1, 0.1], "1 or more"),
    ],
)
def test_points_that_say_nothing_are_refused(sizes: list[float], errors: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_power_law(sizes, errors)
