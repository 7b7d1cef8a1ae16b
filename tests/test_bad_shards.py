"""Shards that cannot be read: tried again, left out alone where so many may be, told everywhere; never a lost line."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from distributed import Client
from typer.testing import CliRunner

import toy_models
from dynams_stream import ParameterSharingProxy, ScorerSpec, SelectedDataset, Store, schema
from dynams_stream.errors import ScoresIncompleteError, ScoringError, StoreBusyError
from pipeline import part_runs, select_job
from pipeline.index_job import build_index
from pipeline.lease import store_lease
from pipeline.other_workers import Worker, workers_of
from pipeline.pending import finished_parts
from pipeline.receipt import BadShard
from pipeline.rounds import make_round
from pipeline.score_job import _part_tasks, plan_round, score_round
from pipeline.score_part import score_part
from pipeline.select_job import select_round
from pipeline.shards import open_source, write_shards
from pipeline.verify_job import verify_store
from pipeline.weights import SavedWeights
from tools.score_shards import app as score_app
from tools.select_subset import app as select_app
from tools.select_subset import in_words
from tools.status import app

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray", batch_size=37)
BAD = (4, 5, 20)
"""Two of one part, that is, and one of another: parts have three shards of 30 samples each."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("small")
    return write_shards(open_source("digits", "", "train"), folder, prefix="train", samples_per_shard=30)


@pytest.fixture(scope="module")
def undisturbed(
    originals: list[str], checkpoint: str, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    """The scores of all shards."""
    store = Store(tmp_path_factory.mktemp("undisturbed") / "store")
    build_index(store, originals)
    return tables(store, score_round(store, SPEC, checkpoint=checkpoint, client=client).number)


@pytest.fixture
def shards(originals: list[str], tmp_path: Path) -> list[Path]:
    """Copies that a test may damage."""
    found = [tmp_path / "shards" / Path(shard).name for shard in originals]
    found[0].parent.mkdir()
    for copy, shard in zip(found, originals, strict=True):
        copy.write_bytes(Path(shard).read_bytes())
    return found


@pytest.fixture
def store(shards: list[Path], tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    build_index(store, [str(shard) for shard in shards])
    assert store.dataset().parts[1].shards == 3
    return store


@pytest.fixture
def damaged(store: Store, shards: list[Path]) -> Store:
    """One shard is gone, one is truncated, one is no file any more."""
    shards[4].rename(shards[4].with_suffix(".away"))
    shards[5].write_bytes(shards[5].read_bytes()[:5000])
    shards[20].rename(shards[20].with_suffix(".away"))
    shards[20].mkdir()
    return store


def mend(shards: list[Path], originals: list[str], store: Store) -> None:
    """The shards as they were indexed, their times included."""
    shards[20].rmdir()
    for number in (4, 20):
        shards[number].with_suffix(".away").rename(shards[number])
    shards[5].write_bytes(Path(originals[5]).read_bytes())
    time = store.dataset().fingerprints[5].split("time=")[1].split(";")[0]
    os.utime(shards[5], ns=(int(time), int(time)))


def tables(store: Store, number: int) -> pa.Table:
    parts = sorted(finished_parts(store, number))
    return pa.concat_tables(pq.read_table(store.path(schema.scores_path(number, part))) for part in parts)


def of_shards(table: pa.Table, shards: tuple[int, ...], *, keep: bool) -> pa.Table:
    inside = pc.is_in(table["shard"], value_set=pa.array(shards, pa.int32()))
    return table.filter(inside if keep else pc.invert(inside))


def test_bad_shards_fail_the_job_when_the_others_are_done(
    damaged: Store, shards: list[Path], checkpoint: str, client: Client
) -> None:
    with pytest.raises(ScoringError, match=r"2 of 16 parts could not be scored \(0 shards may be left out") as told:
        score_round(damaged, SPEC, checkpoint=checkpoint, client=client)
    assert f"part 1: {shards[4]}: no such file or object" in str(told.value)
    assert f"part 6: {shards[20]}: a folder, not a file" in str(told.value)
    assert sorted(finished_parts(damaged, 1)) == [part for part in range(16) if part not in (1, 6)]
    # of three bad shards two may be left out: the part of the third is missing, and said to be
    with pytest.raises(ScoringError, match=r"parts could not be scored \(2 shards may be left out"):
        score_round(damaged, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=2)
    with pytest.raises(ScoresIncompleteError, match="not complete"):
        select_round(damaged, fraction="0.5", max_bad_shards=48)


def test_bad_shards_are_left_out_alone_and_said_to_be(
    damaged: Store, shards: list[Path], undisturbed: pa.Table, checkpoint: str, client: Client
) -> None:
    made = score_round(damaged, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=3, max_errors=0)
    table = tables(damaged, made.number)
    assert (made.samples, made.failed, [bad.shard for bad in made.bad_shards]) == (1437, 90, list(BAD))
    for name in ("shard", "row", "key"):
        assert table[name].equals(undisturbed[name])
    assert of_shards(table, BAD, keep=False).equals(of_shards(undisturbed, BAD, keep=False))
    left_out = of_shards(table, BAD, keep=True)
    assert all(left_out[name].null_count == 90 for name in (*schema.SCORE_COLUMNS, "label", "predicted", "runner_up"))
    reasons = [left_out["error"][30 * place].as_py() for place in range(3)]
    for reason, what in zip(reasons, ("no such file", "not the shard that was indexed", "a folder"), strict=True):
        assert reason.startswith("its shard was left out: ")
        assert what in reason
    receipt = finished_parts(damaged, made.number)[1].receipt
    assert (receipt.failed, receipt.unread, receipt.errors) == (60, 60, ())
    assert receipt.bad_shards == tuple(BadShard(n, str(shards[n]), made.bad_shards[n - 4].reason) for n in (4, 5))


def test_a_partial_round_is_published_only_where_it_may_be_and_loaders_use_it(
    damaged: Store, undisturbed: pa.Table, checkpoint: str, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    score_round(damaged, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=3)
    for allowed in (0, 2):
        with pytest.raises(ScoresIncompleteError, match=rf"without 3 shards, {allowed} may be left out") as told:
            select_round(damaged, fraction="1", max_bad_shards=allowed)
        assert "shard 20:" in str(told.value)
    assert damaged.rounds() == []
    result = select_round(damaged, fraction="1", max_bad_shards=3)
    assert "round 1 is partial: 3 shards were left out, first 4" in caplog.text
    manifest = result.round.manifest
    assert (manifest["status"], [bad["shard"] for bad in manifest["bad_shards"]]) == ("partial", list(BAD))
    assert manifest["bad_shards"][0]["url"].endswith("train-000004.tar")
    assert "no such file" in manifest["bad_shards"][0]["reason"]
    counts = result.round.counts
    assert (counts["all"], counts["scored"], counts["failed"], counts["selected"]) == (1437, 1347, 90, 1347)
    assert [shard for shard in range(48) if not result.round.selection().counts[shard]] == list(BAD)
    assert "partial: 3 shards were left out:\n  shard 4: " in in_words(result, "s")
    assert "partial: 3 shards left out" in CliRunner().invoke(app, ["--store", damaged.url]).stdout
    told = json.loads(CliRunner().invoke(app, ["--store", damaged.url, "--json"]).stdout)["rounds"][0]
    assert (told["status"], told["bad_shards"]) == ("partial", manifest["bad_shards"])
    assert verify_store(damaged).problems == ()
    read = [sample["__key__"] for sample in SelectedDataset(damaged, shuffle=False)]
    assert read == of_shards(undisturbed, BAD, keep=False)["key"].to_pylist()
    assert select_round(damaged, fraction="1", max_bad_shards=3).published is False


def test_verify_finds_what_does_not_fit_a_partial_round(damaged: Store, checkpoint: str, client: Client) -> None:
    score_round(damaged, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=3)
    published = select_round(damaged, fraction="0.5", max_bad_shards=3).round
    path = Path(damaged.path(schema.manifest_path(published.number)))
    for changed, what in (
        ({"bad_shards": published.manifest["bad_shards"][1:]}, "made without other shards than round.json names"),
        ({"bad_shards": []}, "its status, partial, does not fit"),
        ({"status": "complete"}, "its status, complete, does not fit"),
    ):
        path.write_text(json.dumps({**published.manifest, **changed}))
        assert what in str(verify_store(damaged).problems[0])


def test_left_out_shards_are_tried_again_until_the_round_is_published(
    damaged: Store, shards: list[Path], originals: list[str], undisturbed: pa.Table, checkpoint: str, client: Client
) -> None:
    score_round(damaged, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=3)
    assert plan_round(damaged, SPEC, checkpoint).pending == (1, 6)
    kept = Path(damaged.path(schema.scores_path(1, 0))).stat().st_mtime_ns
    mend(shards, originals, damaged)
    made = score_round(damaged, SPEC, checkpoint=checkpoint, client=client)
    assert (made.number, made.failed, made.resumed_parts, made.bad_shards) == (1, 0, 14, ())
    assert Path(damaged.path(schema.scores_path(1, 0))).stat().st_mtime_ns == kept
    assert tables(damaged, 1).equals(undisturbed)
    assert select_round(damaged, fraction="0.5").round.manifest["status"] == "complete"


def test_a_published_partial_round_stays_and_gets_a_successor(
    damaged: Store, shards: list[Path], originals: list[str], undisturbed: pa.Table, checkpoint: str, client: Client
) -> None:
    def make(allowed: int) -> select_job.SelectResult:
        return make_round(
            damaged, SPEC, SavedWeights(checkpoint), fraction="0.5", strategy="distance", client=client,
            max_bad_shards=allowed,
        )  # fmt: skip

    partial = make(3)
    folder = Path(damaged.path(schema.round_path(1)))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (partial.round.number, partial.published, make(3).published) == (1, True, False)
    mend(shards, originals, damaged)
    assert make(3).round.number == 1  # it is what was asked for
    complete = make(0)
    assert (complete.round.number, complete.round.manifest["status"]) == (2, "complete")
    assert tables(damaged, 2).equals(undisturbed)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert make(0).published is False


def test_a_scoring_job_and_the_selection_of_a_partial_round_keep_apart(
    damaged: Store, checkpoint: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_round(damaged, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=3)
    told = []

    def busy(*arguments: object, **options: object) -> None:
        told.append(True)
        raise StoreBusyError("at work")

    with monkeypatch.context() as patch:
        patch.setattr(select_job, "store_lease", busy)
        with pytest.raises(StoreBusyError):
            select_round(damaged, fraction="0.5", max_bad_shards=3)
    assert told == [True]
    assert damaged.rounds() == []
    with store_lease(damaged, "round"):  # a job may hold it itself
        assert select_round(damaged, fraction="0.5", max_bad_shards=3).published


def test_a_shard_that_can_be_read_again_is_no_bad_shard(
    store: Store,
    shards: list[Path],
    undisturbed: pa.Table,
    checkpoint: str,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = shards[7].with_suffix(".away")
    shards[7].rename(away)
    pauses = []

    def come_back(seconds: float) -> None:
        pauses.append(seconds)
        away.rename(shards[7])

    monkeypatch.setattr(part_runs, "time", SimpleNamespace(sleep=come_back))
    made = score_round(store, SPEC, checkpoint=checkpoint, client=client)
    assert (pauses, made.bad_shards) == ([part_runs.RETRY_SECONDS], ())
    assert tables(store, 1).equals(undisturbed)


@pytest.fixture
def half_blind(client: Client, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Shards below a path that one worker lacks: what /proc/self/cwd leads to is each process's own."""
    homes = client.run(os.getcwd)
    blind, seeing = (worker.address for worker in sorted(workers_of(client)))
    monkeypatch.chdir(tmp_path)
    client.run(os.chdir, str(tmp_path), workers=[seeing])
    client.run(os.chdir, str(tmp_path / "shards"), workers=[blind])
    store = Store(tmp_path / "store")
    build_index(store, [f"/proc/self/cwd/shards/{shard.name}" for shard in shards])
    yield store
    for worker, home in homes.items():
        client.run(os.chdir, home, workers=[worker])


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux")
def test_a_worker_that_sees_no_shards_makes_none_bad_and_is_named(
    half_blind: Store,
    shards: list[Path],
    undisturbed: pa.Table,
    checkpoint: str,
    client: Client,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards[4].rename(shards[4].with_suffix(".away"))
    made = score_round(half_blind, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=48)
    assert [bad.shard for bad in made.bad_shards] == [4]
    assert of_shards(tables(half_blind, 1), (4,), keep=False).equals(of_shards(undisturbed, (4,), keep=False))
    assert f"worker 0 on {socket.gethostname()}: /proc/self/cwd/shards/train-" in caplog.text
    with pytest.raises(ScoringError, match=r"1 of 1 parts could not be scored") as told:
        score_round(half_blind, SPEC, checkpoint=checkpoint, client=client)
    assert "train-000004.tar: no such file or object" in str(told.value)
    assert f"worker 1 on {socket.gethostname()}" in str(told.value).splitlines()[1]


def test_a_part_does_not_wait_for_workers_that_went_away(
    store: Store,
    shards: list[Path],
    undisturbed: pa.Table,
    checkpoint: str,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards[7].rename(shards[7].with_suffix(".away"))
    looks = iter([[Worker("gone", "tcp://127.0.0.1:9")]])  # it was there when the second try was submitted
    monkeypatch.setattr(part_runs, "workers_of", lambda client: next(looks, None) or workers_of(client))
    made = score_round(store, SPEC, checkpoint=checkpoint, client=client, max_bad_shards=1)
    assert [bad.shard for bad in made.bad_shards] == [7]
    assert of_shards(tables(store, 1), (7,), keep=False).equals(of_shards(undisturbed, (7,), keep=False))
    assert next(looks, None) is None


def test_a_shard_written_over_in_the_middle_of_its_part_gives_no_scores(
    store: Store, shards: list[Path], checkpoint: str, client: Client, tmp_path: Path
) -> None:
    """The other bytes are as many, and read well: nothing but a look at the shard after its last sample tells."""
    first_in_part = store.dataset().parts[2].first_shard
    data = shards[first_in_part].read_bytes()
    assert data.count(b"\x00\x003\x00\x00") > 0  # labels
    (tmp_path / "others").write_bytes(data.replace(b"\x00\x003\x00\x00", b"\x00\x004\x00\x00"))
    marker = Path(os.environ["DYNAMS_TEST_MARKER"])
    marker.unlink(missing_ok=True)
    spec = replace(SPEC, transform="toy_models:overwriting_gray", batch_size=5)  # no batch has rows of two
    score_round(store, spec, checkpoint=checkpoint, client=client)
    undisturbed = tables(store, 1)
    Path(store.path(schema.scores_path(1, 2))).unlink()  # so that the first image is one of this part
    marker.write_text(f"{shards[first_in_part]}\n{tmp_path / 'others'}")
    made = score_round(store, spec, checkpoint=checkpoint, client=client, max_bad_shards=1)
    assert not marker.exists()
    assert [bad.shard for bad in made.bad_shards] == [first_in_part]
    table, bad = tables(store, 1), (first_in_part,)
    assert of_shards(table, bad, keep=True)["distance"].null_count == 30
    assert of_shards(table, bad, keep=False).equals(of_shards(undisturbed, bad, keep=False))


@pytest.mark.parametrize("number", [1, 2])
def test_a_late_worker_replaces_no_table_that_a_published_round_was_cut_from(
    store: Store, checkpoint: str, client: Client, number: int
) -> None:
    score_round(store, SPEC, checkpoint=checkpoint, client=client)
    if number == 2:
        assert store.claim_selection(1, {"of": "another job"})
    assert select_round(store, fraction="0.5").round.number == number
    plan = replace(plan_round(store, SPEC, checkpoint), receipts={})
    task = _part_tasks(store, plan, 1, checkpoint, {}, "cpu")[3]
    before = Path(store.path(schema.scores_path(1, 3))).stat().st_mtime_ns
    with pytest.raises(ScoringError, match="was published while this part was scored again; it stays"):
        client.submit(score_part, task, pure=False).result()
    assert Path(store.path(schema.scores_path(1, 3))).stat().st_mtime_ns == before


def test_a_proxy_is_compared_with_its_model_on_the_shards_that_are_there(
    damaged: Store, client: Client, tmp_path: Path
) -> None:
    network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5)
    weights = SavedWeights(str(tmp_path / "slim.safetensors"), str(tmp_path / "model.pt"))
    network.save(weights.scorer)
    torch.save(network.model.state_dict(), str(weights.model))
    made = make_round(
        damaged, replace(SPEC, model="toy_models:small_cnn", width=0.5), weights, fraction="0.5", strategy="distance",
        client=client, max_bad_shards=3,
    )  # fmt: skip
    assert made.round.manifest["faithfulness"]["samples"] == 1347


def test_the_commands_say_what_was_left_out(damaged: Store, checkpoint: str, client: Client) -> None:
    options = ["--store", damaged.url, "--max-bad-shards", "3"]
    model = ["--model", "toy_models:linear", "--transform", "toy_models:gray", "--checkpoint", checkpoint]
    scored = CliRunner().invoke(score_app, [*options, *model, "--scheduler", client.scheduler.address])
    assert scored.exit_code == 0, scored.output
    assert "1,347 scored + 90 failed" in scored.stdout
    assert "warning: 3 shards were left out:\n  shard 4: " in scored.stdout
    assert "next: dynams select --max-bad-shards 3" in scored.stdout
    selected = CliRunner().invoke(select_app, [*options, "--fraction", "0.5", "--json"])
    assert json.loads(selected.stdout)["status"] == "partial"
    again = CliRunner().invoke(score_app, [*options, *model, "--json"])
    assert [bad["shard"] for bad in json.loads(again.stdout)["bad_shards"]] == list(BAD)
