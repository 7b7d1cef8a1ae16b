"""Scores against the definition, spelled with explicit loops in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dynams_stream import scores as scores_module
from dynams_stream.errors import HeadError, UsageError
from dynams_stream.scores import BoundaryNorms, ScoreBatch, score_batch

Array = npt.NDArray[Any]
FLOATS = ("distance", "margin", "loss", "el2n", "entropy", "confidence")


def by_definition(z: Array, label: int, weight: Array) -> dict[str, float]:
    """The scores of one sample, from differences of head rows, in float64."""
    z, weight = z.astype(np.float64), weight.astype(np.float64)

    def nearest(k: int) -> tuple[float, int]:
        best, across = math.inf, -1
        for c in range(len(z)):
            norm = float(np.linalg.norm(weight[k] - weight[c]))
            if norm > 0 and (z[k] - z[c]) / norm < best:
                best, across = (z[k] - z[c]) / norm, c
        return best, across

    k = next(c for c in range(len(z)) if z[c] == z.max())
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    distance, runner_up = nearest(k)
    result = {
        "predicted": k,
        "runner_up": runner_up,
        "distance": distance,
        "entropy": -sum(q * math.log(q) for q in p if q > 0),
        "confidence": p.max(),
    }
    if label >= 0:
        target = np.eye(len(z))[label]
        result["margin"] = nearest(label)[0]
        result["loss"] = z.max() - z[label] + math.log(np.exp(z - z.max()).sum())
        result["el2n"] = float(np.linalg.norm(p - target))
    else:
        result.update(margin=math.nan, loss=math.nan, el2n=math.nan)
    return result


def score(z: Any, labels: Any, weight: Any) -> ScoreBatch:
    return score_batch(torch.tensor(z), torch.tensor(labels, dtype=torch.int64), BoundaryNorms(torch.tensor(weight)))


def sample(batch: ScoreBatch, row: int) -> dict[str, float]:
    return {name: getattr(batch, name)[row].item() for name in ("predicted", "runner_up", *FLOATS)}


# Quarters from a small range: equal rows, equal logits and tied distances are common, and all differences are exact.
quarters = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    classes, features, batch = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    elements = draw(st.sampled_from([quarters, st.floats(-50, 50, width=32, allow_subnormal=False)]))
    weight = draw(hnp.arrays(np.float32, (classes, features), elements=elements))
    z = draw(hnp.arrays(np.float32, (batch, classes), elements=elements))
    labels = draw(hnp.arrays(np.int64, batch, elements=st.integers(-1, classes - 1)))
    return z, labels, weight


@settings(max_examples=300, deadline=None)
@given(cases())
def test_scores_follow_the_definition(case: tuple[Array, Array, Array]) -> None:
    z, labels, weight = case
    batch = score(z, labels, weight)
    for row, label in enumerate(labels):
        expected, got = by_definition(z[row], int(label), weight), sample(batch, row)
        assert got["predicted"] == expected["predicted"]
        for name in FLOATS:
            # entropy and EL2N of the plain formula lose digits where the prediction is sure, hence the absolute part
            assert got[name] == pytest.approx(expected[name], rel=2e-6, abs=1e-12, nan_ok=True), name
        if got["runner_up"] != expected["runner_up"]:  # equally near, up to float64 rounding
            norm = np.linalg.norm((weight[got["predicted"]] - weight[got["runner_up"]]).astype(np.float64))
            away = (float(z[row, got["predicted"]]) - float(z[row, got["runner_up"]])) / norm
            assert away == pytest.approx(expected["distance"], rel=1e-12)
        assert batch.labelled[row].item() == (label >= 0)
        assert batch.finite[row].item()


@settings(max_examples=200, deadline=None)
@given(cases())
def test_invariants(case: tuple[Array, Array, Array]) -> None:
    z, labels, weight = case
    batch = score(z, labels, weight)
    assert (batch.distance >= 0).all()
    right = batch.predicted == torch.tensor(labels)
    assert torch.equal(batch.margin[right], batch.distance[right])
    if len(np.unique(weight, axis=0)) == len(weight):  # a skipped pair may be the one that the label loses
        assert (batch.margin[batch.labelled & ~right] <= 0).all()
    for name in FLOATS:
        values = getattr(batch, name)
        assert values.dtype == torch.float32
        assert not torch.signbit(values[values == 0]).any(), f"-0.0 in {name}"
        known = batch.labelled if name in ("margin", "loss", "el2n") else torch.ones_like(batch.labelled)
        assert torch.equal(values.isnan(), ~known)
    assert batch.predicted.dtype == batch.runner_up.dtype == torch.int64


def test_known_probability_scores() -> None:
    batch = score([[2.0, 1.0, 0.0]] * 4, [0, 1, 2, -1], [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert batch.loss[:3].tolist() == pytest.approx([0.407606, 1.407606, 2.407606], abs=1e-6)
    assert batch.el2n[:3].tolist() == pytest.approx([0.424336, 1.010488, 1.153465], abs=1e-6)
    assert batch.entropy.tolist() == pytest.approx([0.832396] * 4, abs=1e-6)
    assert batch.confidence.tolist() == pytest.approx([0.665241] * 4, abs=1e-6)
    assert batch.loss.isnan().tolist() == [False, False, False, True]


def test_known_geometric_margin() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    batch = score_batch(torch.tensor([[2.0, 1.0]]) @ weight.T, torch.tensor([0]), BoundaryNorms(weight))
    assert sample(batch, 0)["distance"] == pytest.approx(0.707107, abs=1e-6)
    assert sample(batch, 0)["margin"] == pytest.approx(0.707107, abs=1e-6)
    assert sample(batch, 0)["runner_up"] == 1


@pytest.mark.parametrize("seed", range(20))
def test_walking_the_distance_reaches_the_boundary_and_less_does_not(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (5,)))
    h = torch.randn(7, generator=generator, dtype=torch.float64)
    batch = score_batch((weight @ h + bias)[None], torch.tensor([-1]), BoundaryNorms(weight))
    k, c, distance = int(batch.predicted), int(batch.runner_up), float(batch.distance)
    normal = (weight[c] - weight[k]) / (weight[c] - weight[k]).norm()
    there = weight @ (h + distance * normal) + bias
    assert there[k].item() == pytest.approx(there[c].item(), abs=1e-5)
    assert there.max().item() == pytest.approx(there[k].item(), abs=1e-5)
    for _ in range(20):  # nothing changes short of it, in any direction
        direction = torch.randn(7, generator=generator, dtype=torch.float64)
        short = weight @ (h + 0.999 * distance * direction / direction.norm()) + bias
        assert int(short.argmax()) == k
    assert int((weight @ (h + 1.001 * distance * normal) + bias).argmax()) == c


def test_equal_rows_have_no_boundary() -> None:
    weight = [[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]
    z = [[3.0, 3.0, 0.0], [3.0, 2.0, 0.0]]  # the second with different biases
    batch = score(z, [1, 1], weight)
    assert batch.predicted.tolist() == [0, 0]
    assert batch.runner_up.tolist() == [2, 2]
    assert batch.distance.tolist() == pytest.approx([3 / math.sqrt(5)] * 2)
    assert batch.margin.tolist() == pytest.approx([3 / math.sqrt(5), 2 / math.sqrt(5)])


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6])
def test_a_head_of_equal_rows_puts_everything_infinitely_far(value: float) -> None:
    batch = score([[1.0, 5.0, 0.0]], [0], [[value] * 4] * 3)
    assert batch.distance.tolist() == [math.inf]
    assert batch.margin.tolist() == [math.inf]
    assert batch.runner_up.tolist() == [-1]
    assert batch.predicted.tolist() == [1]
    assert batch.loss[0].isfinite()


def test_ties_are_the_lower_class_wherever_they_stand() -> None:
    weight = torch.eye(300)
    for low, high in [(0, 299), (17, 18), (130, 260)]:
        z = torch.zeros(4, 300)
        z[:, [low, high]] = 5.0
        batch = score_batch(z, torch.tensor([low, high, 3, -1]), BoundaryNorms(weight))
        assert batch.predicted.tolist() == [low] * 4
        assert batch.runner_up.tolist() == [high] * 4
        assert batch.distance.tolist() == [0.0] * 4
        assert batch.margin[:2].tolist() == [0.0, 0.0]
    batch = score_batch(torch.zeros(1, 300), torch.tensor([0]), BoundaryNorms(weight))
    assert (batch.predicted.item(), batch.runner_up.item()) == (0, 1)


def test_two_classes() -> None:
    batch = score([[0.5, 2.0]], [0], [[1.0], [4.0]])
    assert sample(batch, 0)["distance"] == pytest.approx(0.5)
    assert sample(batch, 0)["margin"] == pytest.approx(-0.5)


@pytest.mark.parametrize("logit", [1e4, -1e4, 3e38])
def test_extreme_logits_stay_finite(logit: float) -> None:
    batch = score([[logit, 0.0, -logit]], [2 if logit > 0 else 0], [[1e-3, 0.0], [0.0, 1e-3], [1e-3, 1e-3]])
    for name in FLOATS:
        assert getattr(batch, name).isfinite().all(), name
    assert batch.confidence.item() == 1.0
    assert batch.entropy.item() == 0.0


def test_sure_predictions_keep_their_digits() -> None:
    """1 − softmax would be all rounding here: e^−40 against 1."""
    batch = score([[40.0, 0.0]], [0], [[1.0], [0.0]])
    assert batch.loss.item() == pytest.approx(math.exp(-40), rel=1e-6, abs=0)
    assert batch.el2n.item() == pytest.approx(math.sqrt(2) * math.exp(-40), rel=1e-6, abs=0)
    assert batch.entropy.item() == pytest.approx(41 * math.exp(-40), rel=1e-6, abs=0)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("classes", [5, 4100])
def test_nearly_equal_rows_are_precise(gap: float, classes: int) -> None:
    generator = np.random.default_rng(0)
    row = generator.normal(size=8)
    weight = generator.normal(size=(classes, 8))
    weight[:4] = row + gap * generator.normal(size=(4, 8))
    norms = BoundaryNorms(torch.from_numpy(weight)).rows(torch.arange(4)).numpy()
    for k in range(4):
        for c in range(5):
            exact = float(np.sqrt(((weight[k].astype(np.longdouble) - weight[c].astype(np.longdouble)) ** 2).sum()))
            assert norms[k, c] == pytest.approx(exact if k != c else math.inf, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_heads_are_computed_exactly(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    norms = BoundaryNorms(weight).rows(torch.arange(6))
    expected = torch.cdist(weight.double(), weight.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, expected.fill_diagonal_(torch.inf), rtol=1e-9, atol=0)


def test_many_classes_equal_few(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(50, 6, generator=generator)
    weight[30:34] = weight[7]
    weight[40] = weight[7] + 1e-6
    z, labels = torch.randn(64, 50, generator=generator), torch.randint(-1, 50, (64,), generator=generator)
    z[:20, 7] = 9.0
    expected = score_batch(z, labels, BoundaryNorms(weight))
    monkeypatch.setattr(scores_module, "_KEPT_CLASSES", 10)
    monkeypatch.setattr(scores_module, "_BLOCK_CLASSES", 7)
    monkeypatch.setattr(scores_module, "_BLOCK_ELEMENTS", 100)
    norms = BoundaryNorms(weight)
    weight.zero_()  # a pass keeps the head that it began with
    got = score_batch(z, labels, norms)
    for name in ("predicted", "runner_up", "labelled", "finite"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in FLOATS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-6, atol=0, equal_nan=True)


def test_a_score_is_the_samples_own() -> None:
    generator = torch.Generator().manual_seed(3)
    norms = BoundaryNorms(torch.randn(12, 5, generator=generator))
    z, labels = 9 * torch.randn(33, 12, generator=generator), torch.randint(-1, 12, (33,), generator=generator)
    whole = score_batch(z, labels, norms)
    for size in (1, 2, 7):
        some = [score_batch(z[i : i + size], labels[i : i + size], norms) for i in range(0, 33, size)]
        for name in (*FLOATS, "predicted", "runner_up"):
            joined = torch.cat([getattr(one, name) for one in some])
            torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-6, atol=0, equal_nan=True)


def test_an_empty_batch_has_empty_scores() -> None:
    batch = score_batch(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), BoundaryNorms(torch.eye(3)))
    assert len(batch) == 0
    assert batch.distance.shape == (0,)
    assert batch.distance.dtype == torch.float32


def test_logits_that_are_not_finite_spoil_their_own_sample_alone() -> None:
    z = torch.tensor([[math.nan, 1.0, 2.0], [0.0, 1.0, 3.0], [math.inf, 0.0, 0.0]])
    batch = score_batch(z, torch.tensor([0, 2, 1]), BoundaryNorms(torch.eye(3)))
    alone = score_batch(z[1:2], torch.tensor([2]), BoundaryNorms(torch.eye(3)))
    assert batch.finite.tolist() == [False, True, False]
    assert batch.predicted.tolist() == [-1, 2, -1]
    assert batch.runner_up.tolist() == [-1, 1, -1]
    for name in FLOATS:
        values = getattr(batch, name)
        assert values.isnan().tolist() == [True, False, True]
        assert torch.equal(values[1:2], getattr(alone, name))


def test_memory_stays_far_from_all_pairs_times_features() -> None:
    """No tensor of an operation comes near B×C×d or C×C×d elements."""
    classes, features, batch = 600, 128, 64
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        norms = BoundaryNorms(torch.randn(classes, features))
        score_batch(torch.randn(batch, classes), torch.zeros(batch, dtype=torch.int64), norms)
    assert classes * classes <= largest < batch * classes * features / 8


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(1, 4), r"1 output.*two-logit"),
        (torch.ones(4), r"shape \(4,\)"),
        (torch.ones(4, 4, 1), r"shape \(4, 4, 1\)"),
        (torch.ones(4, 4, dtype=torch.int64), "int64"),
        (torch.tensor([[1.0], [math.nan], [2.0]]), "NaN.*class 1"),
        (torch.tensor([[1.0], [1.0], [-math.inf]]), "infinity.*class 2"),
        (torch.full((2, 2), 1e200, dtype=torch.float64), "too large"),
    ],
)
def test_unfit_heads_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        BoundaryNorms(weight)


def test_logits_of_another_head_are_refused() -> None:
    with pytest.raises(HeadError, match=r"\(2, 4\) do not fit a head of 3"):
        score_batch(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), BoundaryNorms(torch.eye(3)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "label 3 of sample 1"),
        (torch.tensor([-2, 0]), "label -2 of sample 0"),
        (torch.tensor([0]), r"shape \(1,\) for 2 samples"),
        (torch.eye(3)[:2], "soft labels"),
        (torch.tensor([0.0, 1.0]), "soft labels"),
    ],
)
def test_labels_other_than_one_class_a_sample_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score_batch(torch.zeros(2, 3), labels, BoundaryNorms(torch.eye(3)))


def test_cpu_brings_every_field() -> None:
    batch = score([[0.5, 2.0]], [0], [[1.0], [4.0]]).cpu()
    assert batch.distance.device.type == batch.finite.device.type == "cpu"
    assert sample(batch, 0)["runner_up"] == 0
