"""How well a proxy stands in for its model: against scipy, by hand, and in whole rounds."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from stream_stores import make_store

import toy_models
from dynams_stream import ParameterSharingProxy, ScorerSpec, Store
from dynams_stream.errors import ScoringError, UsageError
from dynams_stream.faithfulness import compare_scorers, spearman
from dynams_stream.store import Round
from dynams_stream.strategy import Strategy
from pipeline import compare_job, run_round
from pipeline.compare_job import sample_rows
from pipeline.rounds import has_drifted

SLIM = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)
DISTANCE = Strategy.parse("distance")


def columns(distance: list[float], **others: list[float]) -> dict[str, Any]:
    return {name: np.array(values, dtype=np.float32) for name, values in {"distance": distance, **others}.items()}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=60))
def test_spearman_against_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(values, dtype=np.float32) for values in zip(*pairs, strict=True))
    found = spearman(first, second)
    if len(set(first.tolist())) == 1 or len(set(second.tolist())) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-9)


def test_infinite_distances_have_ranks() -> None:
    assert spearman(np.float32([1, np.inf, 2]), np.float32([3, np.inf, 5])) == 1


def test_overlap_by_hand() -> None:
    proxy, model = columns([1, 2, 3, 4, 5, 6]), columns([6, 1, 2, 5, 4, 3])
    found = compare_scorers(proxy, model, strategy=DISTANCE, fraction=0.5)  # {0, 1, 2} and {1, 2, 5}
    assert (found.samples, found.fraction, found.overlap) == (6, 0.5, 2 / 3)
    assert compare_scorers(proxy, proxy, strategy=DISTANCE, fraction=0.5).overlap == 1
    assert compare_scorers(proxy, proxy, strategy=DISTANCE, fraction=0).overlap is None
    opposite = compare_scorers(proxy, columns([6, 5, 4, 3, 2, 1]), strategy=DISTANCE, fraction="0.5")
    assert (opposite.overlap, opposite.rank_correlation) == (0, -1)


def test_only_samples_that_both_scored_are_compared() -> None:
    nan = float("nan")
    proxy, model = columns([1, nan, 3, 4, 5]), columns([1, 2, nan, 4, 5])
    found = compare_scorers(proxy, model, strategy=DISTANCE, fraction=0.34)
    assert (found.samples, found.overlap, found.rank_correlation) == (3, 1, pytest.approx(1))


def test_another_strategy_selects_on_its_own_columns() -> None:
    proxy, model = columns([1, 2, 3, 4], loss=[1, 2, 3, 4]), columns([1, 2, 3, 4], loss=[4, 3, 2, 1])
    found = compare_scorers(proxy, model, strategy=Strategy.parse("-loss"), fraction=0.5)
    assert (found.overlap, found.rank_correlation) == (0, 1)


def test_the_same_rows_are_sampled_again_and_each_part_gets_its_share(tmp_path: Any) -> None:
    store = make_store(tmp_path, [40, 0, 300, 100, 60])
    dataset = store.dataset()
    found, again = sample_rows(dataset, 200), sample_rows(dataset, 200)
    assert [(one.part.number, one.rows.tolist()) for one in found] == [
        (one.part.number, one.rows.tolist()) for one in again
    ]
    assert sum(len(one.rows) for one in found) == 200
    for one in found:
        assert np.all(np.diff(one.rows) > 0)
        assert 0 <= one.rows[0] <= one.rows[-1] < one.part.samples
        assert len(one.rows) == pytest.approx(one.part.samples * 200 / 500, abs=20)
    everything = sample_rows(dataset, 10_000)
    assert [one.rows.tolist() for one in everything] == [
        list(range(part.samples)) for part in dataset.parts if part.samples
    ]


# ---- whole rounds ----------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> ParameterSharingProxy:
    torch.manual_seed(0)
    return ParameterSharingProxy(toy_models.small_cnn(), width=0.5)


def distances(one: Round) -> np.ndarray:
    return one.scores().to_table()["distance"].to_numpy()


def test_a_round_records_how_its_proxy_compares(
    digit_store: Store, network: ParameterSharingProxy, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline.rounds"):
        made = run_round(
            digit_store, SLIM, weights=network, fraction=0.2, client=client, check_samples=5000, least_overlap=0
        )
    full = ScorerSpec(**{**SLIM.__dict__, "width": 1.0})
    itself = run_round(digit_store, full, weights=network.model, fraction=0.2, client=client)
    first, second = distances(made), distances(itself)
    wanted = int(np.ceil(0.2 * len(first)))
    chosen = [set(np.argsort(values, kind="stable")[:wanted].tolist()) for values in (first, second)]
    recorded = made.manifest["faithfulness"]
    assert recorded["samples"] == len(first) == 1437
    assert recorded["overlap"] == len(chosen[0] & chosen[1]) / wanted
    assert recorded["rank_correlation"] == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    assert recorded["fraction"] == 0.2
    assert itself.manifest["faithfulness"] is None, "the model is compared with nobody"
    assert f"selects {100 * recorded['overlap']:.0f} % of what the model would" in caplog.text


def test_a_sample_tells_about_the_same_as_everything(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    recorded = [
        run_round(
            digit_store, SLIM, weights=network, fraction=fraction, client=client, check_samples=check, least_overlap=0
        ).manifest["faithfulness"]
        for fraction, check in ((0.3, 5000), ("0.30001", 400))
    ]
    assert [one["samples"] for one in recorded] == [1437, 400]
    assert recorded[1]["overlap"] == pytest.approx(recorded[0]["overlap"], abs=0.12)
    assert recorded[1]["rank_correlation"] == pytest.approx(recorded[0]["rank_correlation"], abs=0.12)


def test_a_proxy_that_has_drifted_warns_and_the_model_takes_over_when_told(
    digit_store: Store, network: ParameterSharingProxy, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():  # a proxy whose head knows nothing
        network.proxy.get_submodule(network.head).weight.normal_()
    arguments: dict[str, Any] = {"weights": network, "fraction": 0.2, "client": client, "least_overlap": 0.9}
    warned = run_round(digit_store, SLIM, **arguments)
    assert "below 90 %" in caplog.text
    assert warned.manifest["scorer"]["width"] == 0.5
    taken = run_round(digit_store, SLIM, fallback="full", **arguments)
    assert taken.manifest["scorer"]["width"] == 1.0
    assert taken.manifest["faithfulness"] == warned.manifest["faithfulness"]
    assert run_round(digit_store, SLIM, fallback="full", **arguments).number == taken.number
    full = ScorerSpec(**{**SLIM.__dict__, "width": 1.0})
    itself = run_round(digit_store, full, weights=network.model, fraction=0.2, client=client)
    assert itself.manifest["selection"]["sha256"] == taken.manifest["selection"]["sha256"]
    assert run_round(digit_store, SLIM, check_samples=0, **arguments).manifest["faithfulness"] is None


def test_nothing_to_compare_is_said_and_is_no_drift(caplog: pytest.LogCaptureFixture) -> None:
    nan = columns([float("nan")] * 3)
    found = compare_scorers(nan, columns([1, 2, 3]), strategy=DISTANCE, fraction=0.5)
    assert (found.samples, found.overlap, found.rank_correlation) == (0, None, None)
    assert not has_drifted(found, 0.9)
    assert "could not be compared with its model: 0 samples" in caplog.text


def test_a_model_that_cannot_score_its_sample_says_how_to_do_without(
    digit_store: Store, network: ParameterSharingProxy, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_job, "score_rows", toy_models.out_of_memory)
    with pytest.raises(ScoringError, match=r"MemoryError.*check_samples=0"):
        run_round(digit_store, SLIM, weights=network, fraction=0.2, client=client)
    assert not digit_store.rounds()
    made = run_round(digit_store, SLIM, weights=network, fraction=0.2, client=client, check_samples=0)
    assert made.number == 1, "what the proxy had scored was kept"


def test_another_fallback_is_refused(digit_store: Store, network: ParameterSharingProxy) -> None:
    with pytest.raises(UsageError, match="fallback is 'random'"):
        run_round(digit_store, SLIM, weights=network, fraction=0.2, fallback="random")  # type: ignore[arg-type]
