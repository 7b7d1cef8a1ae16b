"""InfoBatch's rule: what is kept and how it weighs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dynams_stream import Store
from tools.infobatch import InfoBatch, prune


@given(
    losses=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=200),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_hard_samples_stay_and_easy_ones_stand_for_those_that_go(losses: list[float], share: float, seed: int) -> None:
    values = np.array(losses, dtype=np.float32)
    wanted = int(share * len(values))
    places, weights = prune(values, wanted, np.random.default_rng(seed))
    easy = values < values.mean(dtype=np.float64)
    assert (np.diff(places) > 0).all()
    assert set(np.flatnonzero(~easy).tolist()) <= set(places.tolist())
    assert (weights[~easy[places]] == 1).all()
    kept = int(easy[places].sum())
    if easy.any():
        least = easy.sum() - int(0.95 * easy.sum())
        assert kept == min(easy.sum(), max(least, wanted - (~easy).sum()))
        # the weights add up to all samples: the gradient's expectation is that of everything
        np.testing.assert_allclose(weights.sum(), len(values), rtol=1e-4)


def test_which_easy_samples_stay_is_drawn_anew() -> None:
    losses = np.array([1.0] * 90 + [100.0] * 10, dtype=np.float32)
    first, second = (prune(losses, 50, np.random.default_rng(seed))[0] for seed in (0, 1))
    assert len(first) == len(second) == 50
    assert set(first.tolist()) != set(second.tolist())


def test_a_round_holds_the_rule_s_choice(digit_store: Store) -> None:
    rule = InfoBatch(digit_store, seed=3)
    before = rule.select(0.5, epoch=0)
    assert before.counts["selected"] == 1437, "nothing is below the mean yet"
    losses = np.linspace(0, 1, 1437, dtype=np.float32) ** 4
    rule.observe(np.arange(1437), losses)
    made = rule.select(0.5, epoch=1)
    assert made.counts["selected"] == 719
    places, weights = prune(losses, 719, np.random.default_rng([3, 1]))
    starts = np.cumsum(digit_store.dataset().counts) - digit_store.dataset().counts
    selection = made.selection()
    assert [int(row + starts[shard]) for shard in range(15) for row in selection.rows(shard)] == places.tolist()
    found = np.concatenate([selection.weights(shard) for shard in range(15)])
    np.testing.assert_array_equal(found, weights)
