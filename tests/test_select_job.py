"""Selecting: against a full sort, the same bytes for any number of workers, and what is published when."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from typer.testing import CliRunner

import toy_models
from dynams_stream import ScorerSpec, Store, schema
from dynams_stream.class_quotas import ClassQuotas
from dynams_stream.cut_part import ScorePart
from dynams_stream.errors import (
    RoundNotFoundError,
    ScoresIncompleteError,
    ScoringError,
    SelectionError,
    StoreBusyError,
    StoreError,
    UsageError,
)
from dynams_stream.samples import SelectedSamples
from dynams_stream.store import SelectionClaim
from dynams_stream.strategy import Strategy
from pipeline import select_job
from pipeline.intents import selection_intent
from pipeline.pending import unpublished_rounds
from pipeline.rounds import run_round
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.verify_job import verify_store
from tools.select_subset import app

LINEAR = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")


@pytest.fixture
def scored(digit_store: Store, client: Client, tmp_path: Path) -> Store:
    path = tmp_path / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    score_round(digit_store, LINEAR, checkpoint=str(path), epoch=4, client=client)
    return digit_store


def chosen(store: Store, number: int) -> set[tuple[int, int]]:
    selection = store.round(number).selection()
    return {(shard, int(row)) for shard in range(len(selection.counts)) for row in selection.rows(shard)}


@pytest.mark.parametrize(("strategy", "key"), [("distance", "distance"), ("abs(margin)", "margin"), ("-loss", "loss")])
def test_the_selection_is_the_head_of_a_full_sort(scored: Store, strategy: str, key: str) -> None:
    published = select_round(scored, fraction=0.3, strategy=strategy).round
    table = published.scores().to_table()
    values = table[key].to_numpy()
    values = {"distance": values, "abs(margin)": np.abs(values), "-loss": -values}[strategy]
    shards, rows = table["shard"].to_numpy(), table["row"].to_numpy()
    order = np.lexsort((rows, shards, values))[: math.ceil(0.3 * 1437)]
    assert chosen(scored, published.number) == set(zip(shards[order].tolist(), rows[order].tolist(), strict=True))
    manifest = published.manifest
    assert manifest["threshold"] == pytest.approx(float(values[order[-1]]))
    assert manifest["counts"] == {"all": 1437, "scored": 1437, "failed": 0, "selected": 432}
    assert sum(counts["selected"] for counts in manifest["classes"].values()) == 432
    assert (manifest["epoch"], manifest["status"], manifest["scores_of"]) == (4, "complete", None)
    assert manifest["scorer"]["model"] == "toy_models:linear"
    assert set(manifest["seconds"]) == {"read", "decode", "forward", "write"}


def test_any_number_of_workers_gives_the_same_bytes(scored: Store) -> None:
    files = []
    for workers in (1, 2, 4):
        made = select_round(scored, fraction=f"0.2{'0' * workers}", workers=workers)
        if not made.published:  # the same decimal: cut again into a round of its own
            manifest = Path(scored.path(schema.manifest_path(made.round.number)))
            manifest.unlink()
            made = select_round(scored, fraction="0.2", workers=workers)
        files.append(Path(scored.path(schema.selection_path(made.round.number))).read_bytes())
    assert files[0] == files[1] == files[2]


def test_as_many_threads_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_job, "available_cores", lambda: 48)

    def threads(rows: int, strategy: str = "distance", weight: str | None = None, least: int = 0) -> int:
        parts = [ScorePart("", 0, 0, np.array([10])), ScorePart("", 1, 1, np.array([rows - 10, 10]))]
        expression = None if weight is None else Strategy.parse(weight)
        return select_job._thread_count(parts, Strategy.parse(strategy), expression, ClassQuotas(False, least))

    assert (threads(100_000), threads(500_000), threads(10_000_000)) == (48, 10, 1)
    assert threads(500_000) > threads(500_000, "-loss") > threads(500_000, "-loss", least=1) > 1
    assert threads(500_000, weight="1 - confidence") == threads(500_000, "distance + confidence")
    assert threads(500_000, "random:1") == threads(500_000)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "abs(margin)"},
        {"class_balance": True, "sample_weight": "1 + loss"},
        {"min_per_class": 20},
        {"strategy": "random:3"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_tasks_of_a_cluster_give_the_same_bytes(scored: Store, client: Client, options: dict[str, Any]) -> None:
    files = []
    for where in ({"workers": 2}, {"client": client}, {"scheduler": client.scheduler.address}):
        made = select_round(scored, fraction="0.2", **options, **where)
        assert made.published
        files.append(Path(scored.path(schema.selection_path(made.round.number))).read_bytes())
        Path(scored.path(schema.manifest_path(made.round.number))).unlink()
    assert files[0] == files[1] == files[2]


def test_the_same_parameters_find_their_round_and_others_reuse_its_scores(scored: Store) -> None:
    first = select_round(scored, fraction=0.3)
    assert (first.round.number, first.published) == (1, True)
    for written in ("0.30", np.float32(0.3)):
        again = select_round(scored, fraction=written)
        assert (again.round.number, again.published) == (1, False)
    other = select_round(scored, fraction=0.1)
    assert (other.round.number, other.published, other.round.manifest["scores_of"]) == (2, True, 1)
    assert select_round(scored, fraction=0.1).published is False
    assert select_round(scored, fraction=0.1, scores_of=2).round.number == 2
    assert other.round.scores().count_rows() == 1437
    assert chosen(scored, 2) < chosen(scored, 1)
    assert scored.round("latest").number == 2


def test_as_newest_makes_latest_mean_this_selection(scored: Store) -> None:
    first = select_round(scored, fraction=0.3, as_newest=True).round
    select_round(scored, fraction=0.1)
    again = select_round(scored, fraction=0.3, as_newest=True)
    assert (again.round.number, again.published, again.round.manifest["scores_of"]) == (3, True, 1)
    assert again.round.manifest["selection"] == first.manifest["selection"]
    assert select_round(scored, fraction=0.3, as_newest=True).round.number == 3


@pytest.mark.parametrize("quotas", [{}, {"min_per_class": 25}], ids=["plain", "quotas"])
def test_weights_are_an_expression_of_the_samples_own_scores(scored: Store, quotas: dict[str, Any]) -> None:
    plain = select_round(scored, fraction=0.2, **quotas).round
    weighted = select_round(scored, fraction=0.2, sample_weight="(1 - confidence) * loss", **quotas).round
    assert chosen(scored, weighted.number) == chosen(scored, plain.number)
    assert (plain.manifest["sample_weight"], weighted.manifest["sample_weight"]) == (None, "(1 - confidence) * loss")
    table = weighted.scores().to_table()
    values = (1 - table["confidence"].to_numpy().astype(np.float64)) * table["loss"].to_numpy()
    places = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
    expected = dict(zip(places, values.astype(np.float32).tolist(), strict=True))
    samples = SelectedSamples(scored, round=weighted.number)
    found = [samples[place] for place in range(len(samples))]
    shards = {url: shard for shard, url in enumerate(scored.dataset().urls)}
    assert len(found) == 288
    assert all(sample["__weight__"] == expected[shards[sample["__url__"]], sample["__row__"]] for sample in found)
    again = select_round(scored, fraction=0.2, sample_weight="( 1 - confidence ) * loss", **quotas)
    assert (again.round.number, again.published) == (weighted.number, False)


def test_what_is_no_weight_is_told_before_or_names_its_sample(scored: Store) -> None:
    for text, reason in {
        "1 - certainty": "sample_weight is written like a strategy. .* no score column 'certainty'",
        "random:3": "write an expression over score columns",
    }.items():
        with pytest.raises(UsageError, match=reason):
            select_round(scored, fraction=0.2, sample_weight=text)
    with pytest.raises(UsageError, match="random:1 reads no score tables"):
        select_round(scored, fraction=0.2, strategy="random:1", sample_weight="loss")
    with pytest.raises(
        SelectionError, match=r"-distance is -0\.\d+ for shard 0, row 0, and for 99 more of the part's 100"
    ):
        select_round(scored, fraction=1.0, strategy="loss", sample_weight="-distance")
    assert scored.rounds() == []


def test_a_strategy_without_values_publishes_nothing(digit_store: Store, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    unlabelled = ScorerSpec(model="toy_models:linear", input="png", label="", transform="toy_models:gray")
    score_round(digit_store, unlabelled, checkpoint=str(path), client=client)
    with pytest.raises(SelectionError, match="none of 1437 samples has a value of abs"):
        select_round(digit_store, fraction=0.3, strategy="abs(margin)")
    assert digit_store.rounds() == []
    assert select_round(digit_store, fraction=0.3).round.counts["selected"] == 432


def test_tables_of_two_checkpoints_are_not_cut_together(scored: Store, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(toy_models.linear(seed=1).state_dict(), path)
    number = score_round(scored, LINEAR, checkpoint=str(path), client=client).number
    foreign = Path(scored.path(schema.scores_path(1, 2))).read_bytes()
    Path(scored.path(schema.scores_path(number, 2))).write_bytes(foreign)
    with pytest.raises(ScoresIncompleteError, match="not all made by the same scorer and checkpoint"):
        select_round(scored, fraction=0.3, scores_of=number)


def test_a_random_selection_needs_no_scores(digit_store: Store) -> None:
    first = select_round(digit_store, fraction=0.5, strategy="random:3").round
    assert first.counts["selected"] == 719
    assert select_round(digit_store, fraction=0.5, strategy="random:3").published is False
    other = select_round(digit_store, fraction=0.5, strategy="random:4").round
    assert chosen(digit_store, first.number) != chosen(digit_store, other.number)
    with pytest.raises(StoreError, match="has no score tables"):
        first.scores()


def test_an_interrupted_selection_is_taken_up_again(scored: Store) -> None:
    made = select_round(scored, fraction=0.3).round
    manifest = Path(scored.path(schema.manifest_path(made.number)))
    selection = Path(scored.path(schema.selection_path(made.number))).read_bytes()
    manifest.unlink()
    again = select_round(scored, fraction=0.3)
    assert (again.round.number, again.published) == (made.number, True)
    assert Path(scored.path(schema.selection_path(made.number))).read_bytes() == selection
    manifest.unlink()
    # Whoever began round 1 with other parameters may still be at work: this one must not touch its selection.
    other = select_round(scored, fraction=0.1).round
    assert other.number == 2
    assert Path(scored.path(schema.selection_path(made.number))).read_bytes() == selection
    assert select_round(scored, fraction=0.1).round.number == 2
    assert select_round(scored, fraction=0.3).round.number == 3  # not 1: loaders take up the latest
    assert not verify_store(scored).problems


@pytest.mark.parametrize(
    "refused",
    [{"min_per_class": 200}, {"sample_weight": "-distance"}, {"strategy": "0 * (margin - margin) / 0"}],
    ids=["quotas", "weights", "no values"],
)
def test_what_is_refused_leaves_the_round_to_the_next_call(scored: Store, refused: dict[str, Any]) -> None:
    with pytest.raises((UsageError, SelectionError)):
        select_round(scored, fraction=0.1, **refused)
    assert not Path(scored.path(schema.selection_claim_path(1))).exists()
    made = select_round(scored, fraction=0.1)
    assert (made.round.number, made.round.manifest["scores_of"]) == (1, None)
    with pytest.raises((UsageError, SelectionError)):  # now it would be a round of its own
        select_round(scored, fraction=0.1, **refused)
    assert (scored.round_numbers(), list(scored.claims())) == ([1], [1])
    assert select_round(scored, fraction=0.2).round.number == 2


def test_a_claim_that_was_there_before_is_not_given_back(scored: Store) -> None:
    """Another job with the same selection may be at work, and would lose its round to a third one."""
    with pytest.raises(SelectionError, match="is -0"):
        select_round(scored, fraction=0.1, sample_weight="-distance")
    dataset = scored.dataset()
    quotas, weight = ClassQuotas(False, 0), "-distance"
    intent = selection_intent(dataset.digest, 1, "distance", 0.1, quotas, None, [], weight)
    assert scored.claim_selection(1, intent)
    with pytest.raises(SelectionError, match="is -0"):
        select_round(scored, fraction=0.1, sample_weight="-distance")
    assert scored.claim_selection(1, intent) is SelectionClaim.THERE


def test_scores_that_failed_too_often_are_not_published(digit_store: Store, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    picky = replace(LINEAR, transform="toy_models:picky")
    failed = score_round(digit_store, picky, checkpoint=str(path), client=client, max_errors=1437).failed
    with pytest.raises(ScoresIncompleteError, match=rf"{failed} of 1437 samples failed in round 1, 14 are al") as told:
        select_round(digit_store, fraction=0.3)
    assert re.search(r"\n  shard 0, row \d+, key '\d+': cannot decode.*too bright", str(told.value))
    assert "run dynams score again, or allow so many" in str(told.value)
    assert digit_store.claim_selection(1, {}) is SelectionClaim.MADE  # nothing was begun
    Path(digit_store.path(schema.selection_claim_path(1))).unlink()
    command = ["--store", digit_store.url, "--fraction", "0.3", "--json", "--max-errors"]
    assert isinstance(CliRunner().invoke(app, [*command, str(failed - 1)]).exception, ScoresIncompleteError)
    assert json.loads(CliRunner().invoke(app, [*command, str(failed)]).stdout)["published"] is True
    assert select_round(digit_store, fraction=0.3).published is False  # what is there is found
    made = run_round(digit_store, picky, weights=path, fraction=0.2, client=client, max_errors=failed, check_samples=0)
    assert made.counts["failed"] == failed


def test_what_is_published_last_is_the_latest(scored: Store, client: Client, tmp_path: Path) -> None:
    assert select_round(scored, fraction=0.3).round.number == 1
    torch.save(toy_models.linear(seed=1).state_dict(), path := tmp_path / "next.pt")
    again = score_round(scored, LINEAR, checkpoint=str(path), epoch=5, client=client)
    assert again.number == 2
    assert select_round(scored, fraction=0.2, scores_of=1).round.number == 3
    assert unpublished_rounds(scored, scored.rounds()) == [2]
    made = run_round(scored, LINEAR, weights=str(path), fraction=0.1, client=client, check_samples=0)
    assert (made.number, made.scores_of, made.epoch) == (4, 2, 5)
    assert scored.round().number == 4
    assert unpublished_rounds(scored, scored.rounds()) == []
    assert SelectedSamples(scored).round == 4


def test_tables_that_the_scoring_job_refused_are_not_cut(digit_store: Store, client: Client, tmp_path: Path) -> None:
    torch.save(toy_models.linear().state_dict(), path := tmp_path / "linear.pt")
    with pytest.raises(ScoringError, match="none of 1437 samples has a label 'json:no'"):
        score_round(digit_store, replace(LINEAR, label="json:no"), checkpoint=str(path), client=client)
    with pytest.raises(ScoringError, match="none of 1437 samples has a label 'json:no'"):
        select_round(digit_store, fraction=0.3)
    assert not digit_store.rounds()


def test_while_a_job_makes_the_tables_it_is_named(scored: Store) -> None:
    Path(scored.path(schema.scores_path(1, 4))).unlink()
    code = "import sys, time; from dynams_stream import Store; from pipeline.lease import store_lease\n"
    code += "with store_lease(Store(sys.argv[1]), 'score'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, scored.url], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreBusyError, match=f"score.*{other.pid}"):
            select_round(scored, fraction=0.3)
        other.kill()


def test_a_dry_run_names_the_tables_or_what_is_missing(scored: Store, tmp_path: Path) -> None:
    command = ["--store", scored.url, "--fraction", "0.3", "--dry-run", "--json"]
    assert json.loads(CliRunner().invoke(app, command).stdout) == {
        "selected": 432, "samples": 1437, "strategy": "distance", "scores_of": 1,
    }  # fmt: skip
    Path(scored.path(schema.scores_path(1, 4))).unlink()
    assert json.loads(CliRunner().invoke(app, command).stdout)["scores_of"] is None
    told = CliRunner().invoke(app, command[:-1]).stdout
    assert "would select 432 of 1,437 samples by distance; not yet: " in told
    assert "are not complete (14 of 15 parts)" in told
    told = CliRunner().invoke(app, [*command[:-1], "--strategy", "random:3"]).stdout
    assert told.endswith("would select 432 of 1,437 samples by random:3\n")


def test_what_cannot_be_selected(digit_store: Store, scored: Store) -> None:
    for fraction in (-0.1, 1.1, "many", math.nan):
        with pytest.raises(UsageError, match="fraction"):
            select_round(scored, fraction=fraction)
    with pytest.raises(UsageError, match="no score column 'margins'"):
        select_round(scored, fraction=0.3, strategy="margins")
    with pytest.raises(RoundNotFoundError, match="no round 9"):
        select_round(scored, fraction=0.3, scores_of=9)
    Path(scored.path(schema.scores_path(1, 4))).unlink()
    with pytest.raises(ScoresIncompleteError, match=r"lacks the score tables of 1 of 15 parts \(first \[4\]\)"):
        select_round(scored, fraction=0.3, scores_of=1)
    with pytest.raises(StoreError, match="are not complete"):
        select_round(scored, fraction=0.3)


def test_the_manifest_is_plain_json(scored: Store) -> None:
    made = select_round(scored, fraction=0.3).round
    text = Path(scored.path(schema.manifest_path(made.number))).read_text()
    assert json.loads(text) == made.manifest
    assert json.loads(text)["fraction"] == 0.3


def test_quotas_of_classes_are_kept_and_make_another_round(scored: Store) -> None:
    plain = select_round(scored, fraction=0.1).round
    balanced = select_round(scored, fraction=0.1, class_balance=True).round
    least = select_round(scored, fraction=0.1, min_per_class=12).round
    assert [plain.number, balanced.number, least.number] == [1, 2, 3]
    assert plain.manifest["selection"] != balanced.manifest["selection"]
    for counts in balanced.manifest["classes"].values():
        assert abs(counts["selected"] - 0.1 * counts["all"]) <= 1
    assert min(counts["selected"] for counts in least.manifest["classes"].values()) >= 12
    assert balanced.counts["selected"] == least.counts["selected"] == 144
    assert (balanced.manifest["class_balance"], least.manifest["min_per_class"]) == (True, 12)
    for made, options in ((plain, {}), (balanced, {"class_balance": True}), (least, {"min_per_class": 12})):
        again = select_round(scored, fraction=0.1, **options)
        assert (again.round.number, again.published) == (made.number, False)
    with pytest.raises(UsageError, match="min_per_class=99 of 10 classes are 990 samples"):
        select_round(scored, fraction=0.1, min_per_class=99)
    with pytest.raises(UsageError, match="reads no score tables"):
        select_round(scored, fraction=0.1, strategy="random:1", class_balance=True)


def test_an_emptied_class_and_contradicted_labels_are_told(scored: Store, caplog: pytest.LogCaptureFixture) -> None:
    tiny = select_round(scored, fraction="0.003").round
    emptied = [int(label) for label, counts in tiny.manifest["classes"].items() if not counts["selected"]]
    assert len(emptied) >= 5  # 5 samples of 10 classes
    assert tiny.manifest["guards"]["emptied_classes"] == emptied
    assert f"no sample of {len(emptied)} of 10 classes ({emptied[0]}, " in caplog.text
    caplog.clear()
    wrong = select_round(scored, fraction=0.2, strategy="-loss").round.manifest["guards"]
    table = scored.round("latest").scores().to_table()
    loss, margin = table["loss"].to_numpy(), table["margin"].to_numpy()
    largest = np.argsort(-loss, kind="stable")[: math.ceil(0.2 * 1437)]
    expected = float(np.mean((margin[largest] < 0) & (loss[largest] > math.log(10))))
    assert wrong["label_disagreement"] == pytest.approx(expected)
    assert expected > 0.5  # of an untrained model
    assert "have a label that the scorer gives less than chance (bound 15 %)" in caplog.text
    assert sum("less than chance" in warning for warning in wrong["warnings"]) == 1
    caplog.clear()
    assert select_round(scored, fraction=0.21, strategy="-loss", most_disagreement=1.0).published
    assert "less than chance" not in caplog.text
    assert select_round(scored, fraction=0.2, strategy="random:5").round.manifest["guards"] == {
        "emptied_classes": [],
        "label_disagreement": None,
        "warnings": [],
    }
