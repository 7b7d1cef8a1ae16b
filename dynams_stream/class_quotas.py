"""How many samples each class has to give to a selection.

    min_per_class = m    each class gives at least m (all it has, when it has fewer); scores decide on the rest
    class_balance        each class gives the same share of its samples: λ·n_c, rounded so that they add up to k

With both, class c gives clamp(λ·n_c, m, scored samples of c), and λ is what makes the sum k. Samples without a label
are one more class, which no minimum holds for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynams_stream.errors import UsageError

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassQuotas:
    """What is asked of the classes of a selection.

    Attributes:
        balance: whether each class gives the same share of its samples.
        least: samples that each class gives at least.

    Raises:
        UsageError: `least` is negative.
    """

    balance: bool = False
    least: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.least, bool) or self.least < 0:
            raise UsageError(f"min_per_class is {self.least!r}; a number of samples from 0 on is needed")

    def __bool__(self) -> bool:
        return self.balance or self.least > 0


def settle_quotas(
    quotas: ClassQuotas, wanted: int, samples: Counts, scored: Counts, labelled: npt.NDArray[np.bool_]
) -> Counts:
    """How many of its smallest scores each class gives in any case; int64, shape (classes,).

    Args:
        quotas: what is asked for.
        wanted: k, samples of the whole selection; at most all scored ones.
        samples: n_c, all samples of each class, at least 1.
        scored: those that can be selected.
        labelled: false for the samples without a label.

    Raises:
        UsageError: the minima alone are more than k.
    """
    least = np.where(labelled, np.minimum(quotas.least, scored), 0)
    if least.sum() > wanted:
        raise UsageError(
            f"min_per_class={quotas.least} of {int(labelled.sum())} classes are {int(least.sum())} samples, the "
            f"fraction selects {wanted}; lower the one or raise the other"
        )
    if not quotas.balance:
        return least
    return np.array(_apportion(wanted, samples.tolist(), least.tolist(), scored.tolist()), dtype=np.int64)


def _apportion(wanted: int, samples: list[int], least: list[int], most: list[int]) -> list[int]:
    """`wanted` in proportion to `samples`, within bounds; exact in whole numbers, by largest remainder."""
    given: dict[int, int] = {}
    free = list(range(len(samples)))
    left, total = wanted, sum(samples)
    while free:
        short = {place: least[place] for place in free if left * samples[place] < least[place] * total}
        over = {place: most[place] for place in free if left * samples[place] > most[place] * total}
        if not short and not over:
            break
        missing = sum(least[place] * total - left * samples[place] for place in short)
        surplus = sum(left * samples[place] - most[place] * total for place in over)
        given |= short if missing >= surplus else over  # which stay at their bound, whatever the others come to
        free = [place for place in free if place not in given]
        left, total = wanted - sum(given.values()), sum(samples[place] for place in free)
    given |= {place: left * samples[place] // total for place in free}
    by_remainder = sorted(free, key=lambda place: (-(left * samples[place] % total), place))
    for place in by_remainder[: wanted - sum(given.values())]:
        given[place] += 1
    return [given[place] for place in range(len(samples))]
