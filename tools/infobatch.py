"""InfoBatch's rule (Qin et al., ICLR 2024), the rival that needs no scoring: it goes by the losses seen in training.

Samples whose last loss lies below the mean are pruned at random; those of them that stay weigh more, so that the
gradient's expectation stays that of all samples:

    kept = every sample with loss ≥ mean, and a share 1 − r of the others
    weight = 1 for the former, 1 / (1 − r) for the latter

The rule has a fixed r; here r is solved for the fraction that the schedule asks for. r is at most 0.95: where the
samples above the mean alone are more than the fraction, the rule keeps more than that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dynams_stream.selection import selected_count
from dynams_stream.store import Round, Store
from pipeline.own_selection import publish_rows

FIRST_LOSS = 3.0
"""Of samples that were not seen yet, as the authors' code has it."""
LARGEST_PRUNED = 0.95


class InfoBatch:
    """The losses last seen, and the selections that the rule makes of them.

    Args:
        store: an indexed store; rounds are published there.
        seed: of the random choice.
    """

    def __init__(self, store: Store, seed: int):
        self._store, self._seed = store, seed
        self._counts = store.dataset().counts
        self.losses = np.full(int(self._counts.sum()), FIRST_LOSS, dtype=np.float32)

    def observe(self, places: npt.NDArray[np.int64], losses: npt.NDArray[np.float32]) -> None:
        """Note the unweighted losses of some samples, which are counted through the dataset."""
        self.losses[places] = losses

    def select(self, fraction: float, epoch: int) -> Round:
        """Publish the round of `epoch`."""
        wanted = selected_count(fraction, len(self.losses))
        chosen, weights = prune(self.losses, wanted, np.random.default_rng([self._seed, epoch]))
        starts = np.concatenate([[0], np.cumsum(self._counts)])
        cuts = np.searchsorted(chosen, starts[1:-1])
        rows = [part - start for part, start in zip(np.split(chosen, cuts), starts[:-1], strict=True)]
        return publish_rows(self._store, rows, np.split(weights, cuts), strategy="infobatch", epoch=epoch)


def prune(
    losses: npt.NDArray[np.float32], wanted: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ascending places of the samples that are kept, and their weights.

    Args:
        losses: of every sample.
        wanted: how many to keep, where the rule can.
        generator: chooses which.
    """
    easy = losses < losses.mean(dtype=np.float64)
    pruned_at = np.flatnonzero(easy)
    weights = np.ones(len(losses), dtype=np.float32)
    kept = np.ones(len(losses), dtype=bool)
    least = len(pruned_at) - int(LARGEST_PRUNED * len(pruned_at))
    stay = min(len(pruned_at), max(least, wanted - (len(losses) - len(pruned_at))))
    if stay:
        weights[pruned_at] = len(pruned_at) / stay
    kept[generator.permutation(pruned_at)[stay:]] = False
    places = np.flatnonzero(kept)
    return places, weights[places]
