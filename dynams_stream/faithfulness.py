"""How well a proxy stands in for the model: on a sample of the data scored by both.

    rank_correlation   Spearman's, of the two distances of each sample
    overlap            |A ∩ B| / k of the k = ⌈γ·m⌉ samples that each would select from the m compared ones

A random selection overlaps any other by γ; 1 is a proxy that selects what the model would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynams_stream.selection import selected_count
from dynams_stream.strategy import Strategy

Columns = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Faithfulness:
    """A comparison of two scorers.

    Attributes:
        samples: m, how many were compared: those that both could score.
        fraction: γ of the selections that are compared.
        rank_correlation: in [−1, 1]; None where one of the distances is the same for all samples.
        overlap: in [0, 1]; None where nothing is selected.
    """

    samples: int
    fraction: float
    rank_correlation: float | None
    overlap: float | None


def compare_scorers(proxy: Columns, model: Columns, *, strategy: Strategy, fraction: float | str) -> Faithfulness:
    """Compare the scores that two scorers gave the same samples.

    Args:
        proxy, model: score columns, float32 arrays of one length, NaN where there is no score: `distance` and those
            that the strategy needs.
        strategy: what selects; the smallest values of it.
        fraction: γ.
    """
    first, second = strategy.evaluate(proxy), strategy.evaluate(model)
    distances = proxy["distance"], model["distance"]
    both = ~np.isnan(np.stack([first, second, *distances])).any(axis=0)
    samples = int(both.sum())
    wanted = selected_count(fraction, samples)
    overlap = None
    if wanted:
        mine, theirs = (np.argsort(values[both], kind="stable")[:wanted] for values in (first, second))
        overlap = len(np.intersect1d(mine, theirs)) / wanted
    return Faithfulness(samples, float(fraction), spearman(*(one[both] for one in distances)), overlap)


def spearman(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side is constant."""
    ranks = [_mean_ranks(values) for values in (first, second)]
    if any(len(one) < 2 or one.min() == one.max() for one in ranks):
        return None
    return float(np.clip(np.asarray(np.corrcoef(ranks))[0, 1], -1, 1))


def _mean_ranks(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    of_group: npt.NDArray[np.float64] = np.cumsum(counts, dtype=np.float64) - (counts.astype(np.float64) - 1) / 2
    return of_group[group]
