"""run_round: the one function behind the training loop, the command line and scheduled jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import Client
from torch.utils.data import DataLoader

import toy_models
from dynams_stream import ParameterSharingProxy, ScorerSpec, SelectedDataset, Store, schema
from dynams_stream.errors import ModelError, RoundExistsError, ScoresIncompleteError, UsageError
from pipeline import run_round
from pipeline.index_job import build_index
from pipeline.score_job import ScoreProgress
from pipeline.select_job import select_round
from pipeline.verify_job import verify_store

SLIM = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)
FULL = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray")


@pytest.fixture
def network() -> ParameterSharingProxy:
    torch.manual_seed(0)
    return ParameterSharingProxy(toy_models.small_cnn(), width=0.5)


def test_a_proxy_makes_a_round_that_the_loader_takes_up(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    seen: list[ScoreProgress] = []
    dataset = SelectedDataset(digit_store, batch_size=50)
    dataset.set_epoch(0)
    assert len(dataset) == 1437
    made = run_round(digit_store, SLIM, weights=network, fraction=0.25, epoch=7, client=client, progress=seen.append)
    assert (made.number, made.epoch, made.fraction) == (1, 7, 0.25)
    assert made.counts["selected"] == 360
    assert seen[-1].done == seen[-1].samples == 1437
    assert made.manifest["checkpoint"]["path"].startswith(digit_store.path(schema.WEIGHTS_FOLDER))
    assert made.manifest["scorer"]["width"] == 0.5
    dataset.set_epoch(1)
    streamed = {(sample["__url__"], sample["__row__"]) for sample in dataset}
    urls, selection = digit_store.dataset().urls, made.selection()
    assert streamed == {(urls[shard], int(row)) for shard in range(15) for row in selection.rows(shard)}
    assert len(streamed) == 360
    assert len(list(DataLoader(dataset.to_tuple("cls"), batch_size=50))) == 8


def test_the_same_call_again_gives_the_same_round(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    first = run_round(digit_store, SLIM, weights=network, fraction=0.25, client=client)
    assert run_round(digit_store.url, SLIM, weights=network, fraction=0.25, client=client).number == first.number
    assert len(digit_store.rounds()) == 1


def test_full_models_paths_and_factories(
    digit_store: Store, network: ParameterSharingProxy, client: Client, tmp_path: Path
) -> None:
    by_model = run_round(digit_store, FULL, weights=network.model, fraction=0.5, client=client)
    path = tmp_path / "model.pt"
    torch.save(network.model.state_dict(), path)
    by_path = run_round(digit_store, FULL, weights=path, fraction=0.5, client=client)
    by_proxy = run_round(digit_store, FULL, weights=network, fraction=0.5, client=client)
    assert by_proxy.manifest["scores_of"] == by_model.number  # newest again, cut from the same scores
    assert by_path.manifest["selection"] == by_model.manifest["selection"]
    linear = ScorerSpec(model="toy_models:linear", input="png", transform="toy_models:gray")
    assert run_round(digit_store, linear, fraction=0.5, client=client).counts["scored"] == 1437
    assert run_round(digit_store, SLIM, fraction=0.5, client=client).counts["scored"] == 1437
    compiled = torch.compile(torch.nn.DataParallel(network), backend="eager")
    assert run_round(digit_store, FULL, weights=compiled, fraction=0.5, client=client).manifest["scores_of"] == 1
    with pytest.raises(ModelError, match="needs the weights of a ParameterSharingProxy"):
        run_round(digit_store, SLIM, weights=network.model, fraction=0.5, client=client)
    with pytest.raises(ModelError, match=r"width 0\.25, the scorer asks for 0\.5"):
        run_round(
            digit_store,
            SLIM,
            weights=ParameterSharingProxy(toy_models.small_cnn(), width=0.25),
            fraction=1,
            client=client,
        )


def test_a_dataset_that_is_indexed_anew_during_the_scoring_wastes_none_of_it(
    digit_shards: list[str], network: ParameterSharingProxy, client: Client, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    build_index(store, digit_shards[:4])

    def refresh(_: ScoreProgress) -> None:
        build_index(store, digit_shards[1:5])

    made = run_round(store, SLIM, weights=network, fraction=0.25, client=client, progress=refresh)
    assert store.dataset_versions() == [1, 2]
    assert (made.number, made.manifest["dataset"]["version"], made.counts["all"]) == (1, 1, 400)
    assert made.manifest["faithfulness"]["samples"] == 400
    urls, selection = made.dataset().urls, made.selection()
    chosen = {(urls[shard], int(row)) for shard in range(4) for row in selection.rows(shard)}
    dataset = SelectedDataset(store)
    assert {(sample["__url__"], sample["__row__"]) for sample in dataset} == chosen  # of the old version
    assert select_round(store, fraction=0.25, scores_of=1).published is False
    assert select_round(store, fraction=0.5, scores_of=1).round.manifest["dataset"]["version"] == 1
    assert select_round(store, fraction=0.5, scores_of=2).published is False
    with pytest.raises(ScoresIncompleteError, match="no score tables of its newest dataset"):
        select_round(store, fraction=0.25)
    again = run_round(store, SLIM, weights=network, fraction=0.25, client=client)
    assert (again.number, again.manifest["dataset"]["version"]) == (3, 2)
    dataset.set_epoch(1)
    assert {sample["__url__"] for sample in dataset} <= set(digit_shards[1:5])
    assert verify_store(store).problems == ()


def test_tables_of_two_datasets_are_not_cut_together(
    digit_shards: list[str], network: ParameterSharingProxy, client: Client, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    build_index(store, digit_shards[:2])
    run_round(store, SLIM, weights=network, fraction=0.25, client=client)
    build_index(store, digit_shards[1:3])
    run_round(store, SLIM, weights=network, fraction=0.25, client=client)
    Path(store.path(schema.scores_path(2, 0))).rename(store.path(schema.scores_path(2, 1)))
    Path(store.path(schema.scores_path(2, 0))).write_bytes(Path(store.path(schema.scores_path(1, 0))).read_bytes())
    with pytest.raises(ScoresIncompleteError, match="part 0 of round 2 does not belong to dataset version 1"):
        select_round(store, fraction=0.5, scores_of=2)


def test_wrong_arguments_are_refused_before_scoring_and_random_needs_none(digit_store: Store) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        run_round(digit_store, FULL, fraction=1.5)
    with pytest.raises(UsageError, match="no score column 'margins'"):
        run_round(digit_store, FULL, fraction=0.5, strategy="margins")
    assert digit_store.claims() == {}
    made = run_round(digit_store, FULL, fraction=0.5, strategy="random:1")
    assert made.counts["selected"] == 719
    assert digit_store.round_numbers() == [made.number]


def test_of_two_publishers_one_fails_and_the_round_stays(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    made = run_round(digit_store, SLIM, weights=network, fraction=0.25, client=client)
    with pytest.raises(RoundExistsError, match="published by another job"):
        digit_store.publish(made.number, {**made.manifest, "fraction": 0.9})
    assert digit_store.round(made.number).fraction == 0.25


RANKS = """
import json, sys, torch, torch.distributed as dist, toy_models
from dynams_stream import ScorerSpec
from pipeline import run_round
from pipeline.index_job import build_index
dist.init_process_group("gloo", init_method=sys.argv[3], rank=int(sys.argv[1]), world_size=2)
torch.manual_seed(0)
spec = ScorerSpec(model="toy_models:linear", input=sys.argv[4], transform="toy_models:gray")
try:
    made = run_round(sys.argv[2], spec, weights=toy_models.linear(), fraction=0.1, workers=1, deadline=100)
    print(json.dumps({"round": made.number, "selected": made.counts["selected"]}))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_ranks_wait_on_the_store_and_agree(digit_store: Store, tmp_path: Path, extension: str) -> None:
    script, rendezvous = tmp_path / "rank.py", f"file://{tmp_path}/rendezvous"
    script.write_text(RANKS)
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]), "PATH": "/usr/bin:/bin"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), digit_store.url, rendezvous, extension],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [json.loads(process.communicate(timeout=150)[0].strip().splitlines()[-1]) for process in processes]
    if extension == "png":
        assert answers == [{"round": 1, "selected": 144}] * 2
        assert select_round(digit_store, fraction=0.1).published is False
    else:
        assert "1437 of 1437 samples failed" in answers[0]["error"] or "samples failed" in answers[0]["error"]
        assert "rank 0 could not make the round: ScoringError" in answers[1]["error"]
