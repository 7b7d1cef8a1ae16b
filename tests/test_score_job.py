"""Scoring jobs on a real cluster: content against NumPy, batch sizes, failures, kills and what a rerun does."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from distributed import Client
from PIL import Image

import toy_models
from dynams_stream import ParameterSharingProxy, ScorerSpec, Store, schema
from dynams_stream.errors import CheckpointError, ScoringError, ShardChangedError, UsageError
from pipeline.index_job import build_index
from pipeline.pending import finished_parts
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.shards import write_shards

LINEAR = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray", batch_size=37)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    return str(path)


def tables(store: Store, number: int) -> pa.Table:
    parts = sorted(finished_parts(store, number))
    return pa.concat_tables(pq.read_table(store.path(schema.scores_path(number, part))) for part in parts)


def expected_scores(shards: list[str], seed: int = 0) -> dict[str, np.ndarray]:
    """Every score straight from the definition, with the images as webdataset reads them."""
    layer = toy_models.linear(seed)[1]
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    norms = np.array([[np.linalg.norm(a - b) for b in weight] for a in weight])
    columns: dict[str, list[float]] = {name: [] for name in ("predicted", "label", *schema.SCORE_COLUMNS)}
    for sample in wds.WebDataset(shards, shardshuffle=False):
        image = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("L"), dtype=np.float32) / np.float32(255)
        logits, label = weight @ image.ravel().astype(np.float64) + bias, int(sample["cls"])
        predicted = int(logits.argmax())
        softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        columns["predicted"].append(predicted)
        columns["label"].append(label)
        columns["distance"].append(
            min((logits[predicted] - logits[c]) / norms[predicted, c] for c in range(10) if c != predicted)
        )
        columns["margin"].append(min((logits[label] - logits[c]) / norms[label, c] for c in range(10) if c != label))
        columns["loss"].append(-np.log(softmax[label]))
        columns["el2n"].append(float(np.linalg.norm(softmax - np.eye(10)[label])))
        columns["entropy"].append(float(-(softmax * np.log(softmax)).sum()))
        columns["confidence"].append(float(softmax.max()))
    return {name: np.array(values) for name, values in columns.items()}


def test_tables_hold_the_scores_of_every_sample(
    digit_store: Store, digit_shards: list[str], checkpoint: str, client: Client
) -> None:
    result = score_round(digit_store, LINEAR, checkpoint=checkpoint, client=client)
    table = tables(digit_store, result.number)
    dataset = digit_store.dataset()
    assert (result.samples, result.failed, result.parts) == (1437, 0, len(dataset.parts))
    assert table.schema.equals(schema.SCORES_SCHEMA)
    assert table["shard"].to_pylist() == np.repeat(np.arange(15), dataset.counts).tolist()
    assert table["row"].to_pylist() == [row for count in dataset.counts for row in range(count)]
    assert table["key"].to_pylist() == [
        sample["__key__"] for sample in wds.WebDataset(digit_shards, shardshuffle=False)
    ]
    expected = expected_scores(digit_shards)
    for name in ("predicted", "label"):
        assert table[name].to_pylist() == expected[name].tolist()
    for name in schema.SCORE_COLUMNS:
        np.testing.assert_allclose(table[name].to_numpy(), expected[name], rtol=2e-4, atol=2e-5, err_msg=name)
    assert table["error"].null_count == 1437
    names = os.listdir(digit_store.path(schema.scores_folder(result.number)))
    assert sorted(names) == [f"part-{part:06d}.parquet" for part in range(len(dataset.parts))]


def test_scores_do_not_depend_on_the_batch_size(digit_shards: list[str], tmp_path: Path, client: Client) -> None:
    torch.manual_seed(0)
    path = tmp_path / "cnn.pt"
    torch.save(toy_models.small_cnn().state_dict(), path)
    found = {}
    for batch_size in (1, 64, 1000):
        store = Store(tmp_path / f"store-{batch_size}")
        build_index(store, digit_shards)
        spec = ScorerSpec(
            model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", batch_size=batch_size
        )
        found[batch_size] = tables(store, score_round(store, spec, checkpoint=str(path), client=client).number)
    for name in schema.SCORE_COLUMNS:
        reference = found[64][name].to_numpy()
        # Relative to the column's scale: a distance is a difference of logits, so near zero it cannot be better.
        scale = np.abs(reference).max()
        for batch_size in (1, 1000):
            difference = np.abs(found[batch_size][name].to_numpy() - reference) / np.maximum(
                np.abs(reference), 0.1 * scale
            )
            assert difference.max() <= 1e-5, (name, batch_size)


def test_the_same_identity_is_done_once_and_another_opens_the_next_round(
    digit_store: Store, checkpoint: str, client: Client, tmp_path: Path
) -> None:
    first = score_round(digit_store, LINEAR, checkpoint=checkpoint, client=client)
    before = {path: path.stat().st_mtime_ns for path in Path(digit_store.url, "rounds").rglob("*.parquet")}
    again = score_round(digit_store, LINEAR, checkpoint=checkpoint, client=client)
    assert (again.number, again.resumed_parts) == (first.number, first.parts)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = tmp_path / "other.pt"
    torch.save(toy_models.linear(seed=1).state_dict(), other)
    assert score_round(digit_store, LINEAR, checkpoint=str(other), client=client).number == first.number + 1


def test_a_rerun_does_only_what_is_missing(digit_store: Store, checkpoint: str, client: Client) -> None:
    first = score_round(digit_store, LINEAR, checkpoint=checkpoint, client=client)
    undisturbed = tables(digit_store, first.number)
    kept = Path(digit_store.path(schema.scores_path(first.number, 0)))
    Path(digit_store.path(schema.scores_path(first.number, 3))).unlink()
    Path(digit_store.path(schema.scores_path(first.number, 5))).write_bytes(b"torn")
    written = kept.stat().st_mtime_ns
    second = score_round(digit_store, LINEAR, checkpoint=checkpoint, client=client)
    assert second.resumed_parts == first.parts - 2
    assert kept.stat().st_mtime_ns == written
    assert tables(digit_store, first.number).equals(undisturbed)


def test_torchs_threads_are_for_the_forward_pass(
    digit_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(In this process, as on a worker with three cores: three decoding threads with three each would be nine.)"""
    torch.save(toy_models.watched_linear().state_dict(), tmp_path / "linear.pt")
    spec = replace(LINEAR, model="toy_models:watched_linear", transform="toy_models:watched_gray")
    monkeypatch.setenv("DYNAMS_CORES", "3")
    before = torch.get_num_threads()
    try:
        with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0") as inside:
            score_round(digit_store, spec, checkpoint=str(tmp_path / "linear.pt"), client=inside)
    finally:
        torch.set_num_threads(before)
    found = toy_models.TORCH_THREADS
    assert (found["transform"], found["forward"]) == ({1}, {3})


def test_scoring_with_the_proxy(digit_store: Store, client: Client, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5)
    path = str(tmp_path / "slim.safetensors")
    network.save(path, epoch=3)
    spec = ScorerSpec(
        model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5, batch_size=64
    )
    result = score_round(digit_store, spec, checkpoint=path, client=client)
    part = finished_parts(digit_store, result.number)[0]
    assert part.receipt.provenance["epoch"] == 3
    slim = network.slim().eval()
    images = [
        toy_models.gray(Image.open(io.BytesIO(sample["png"])))
        for sample in wds.WebDataset([digit_store.dataset().urls[0]], shardshuffle=False)
    ]
    with torch.inference_mode():
        logits = slim(torch.stack(images)).double().numpy()
    weight = slim[8].weight.detach().double().numpy()
    predicted = logits.argmax(axis=1)
    distances = [
        min((z[k] - z[c]) / np.linalg.norm(weight[k] - weight[c]) for c in range(10) if c != k)
        for z, k in zip(logits, predicted, strict=True)
    ]
    found = tables(digit_store, result.number)["distance"].to_numpy()[: len(images)]
    np.testing.assert_allclose(found, distances, rtol=1e-3, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"width 0\.5, the scorer asks for 1"):
        score_round(digit_store, ScorerSpec(**{**spec.__dict__, "width": 1.0}), checkpoint=path, client=client)


def test_failed_samples_keep_their_line(
    tmp_path: Path, checkpoint: str, client: Client, digit_shards: list[str]
) -> None:
    samples = [
        {"__key__": s["__key__"], "png": s["png"], "cls": s["cls"]}
        for s in wds.WebDataset(digit_shards[:2], shardshuffle=False)
    ]
    samples[7]["png"] = b"broken"
    samples[11]["cls"] = b"12"
    del samples[20]["png"]
    del samples[30]["cls"]
    samples[40]["png"] = png(4, 4)  # the model takes 8 · 8 pixels
    store = Store(tmp_path / "store")
    build_index(store, write_shards(samples, tmp_path / "shards", prefix="train", samples_per_shard=64))
    result = score_round(store, LINEAR, checkpoint=checkpoint, client=client)
    table = tables(store, result.number)
    assert (result.samples, result.failed) == (200, 4)
    failed = table.filter(pa.compute.is_valid(table["error"])).to_pylist()
    assert [line["key"] for line in failed] == [samples[i]["__key__"] for i in (7, 11, 20, 40)]
    assert all(line[name] is None for line in failed for name in (*schema.SCORE_COLUMNS, "predicted", "runner_up"))
    assert [text.split(":")[0] for text in table["error"].drop_null().to_pylist()] == [
        "cannot decode", "label 12 is outside the model's classes 0 … 9", "no member 'png'",
        "the model failed on float32 of shape (1, 4, 4)",
    ]  # fmt: skip
    unlabelled = table.to_pylist()[30]
    assert unlabelled["label"] is None
    assert unlabelled["margin"] is None
    assert unlabelled["loss"] is None
    assert unlabelled["distance"] > 0
    with pytest.raises(ScoringError, match=r"4 of 200 samples failed, 3 are allowed"):
        score_round(store, LINEAR, checkpoint=checkpoint, client=client, max_errors=3)


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width), 128, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_model_that_fits_no_sample_ends_the_job_before_its_part_is_read(
    digit_store: Store, client: Client, tmp_path: Path
) -> None:
    torch.save(toy_models.linear(pixels=100).state_dict(), tmp_path / "wide.pt")
    spec = replace(LINEAR, model_args={"pixels": 100}, batch_size=37)
    with pytest.raises(ScoringError, match=r"the first 74 samples failed, all of them; see that --transform") as told:
        score_round(digit_store, spec, checkpoint=str(tmp_path / "wide.pt"), client=client, max_errors=40)
    assert re.search(r"row 0, key '\d+': the model failed on float32 of shape \(1, 8, 8\): mat1 and", str(told.value))
    assert finished_parts(digit_store, 1) == {}


def test_a_label_that_no_sample_has_fails_the_job(digit_store: Store, checkpoint: str, client: Client) -> None:
    spec = ScorerSpec(model="toy_models:linear", input="png", label="clss", transform="toy_models:gray")
    with pytest.raises(ScoringError, match="none of 1437 samples has a label 'clss'"):
        score_round(digit_store, spec, checkpoint=checkpoint, client=client)


def test_a_label_too_large_for_its_column_is_that_samples_error(
    tmp_path: Path, checkpoint: str, client: Client, digit_shards: list[str]
) -> None:
    samples = [
        {"__key__": s["__key__"], "png": s["png"], "cls": s["cls"]}
        for s in wds.WebDataset(digit_shards[:1], shardshuffle=False)
    ]
    samples[5]["cls"] = b"3000000000"
    store = Store(tmp_path / "store")
    build_index(store, write_shards(samples, tmp_path / "shards", prefix="train", samples_per_shard=64))
    assert score_round(store, LINEAR, checkpoint=checkpoint, client=client).failed == 1
    assert "3000000000 is outside" in tables(store, 1)["error"].drop_null().to_pylist()[0]


def test_parts_that_failed_are_scored_again_when_they_were_too_many(
    digit_store: Store, checkpoint: str, client: Client, tmp_path: Path
) -> None:
    spec = ScorerSpec(**{**LINEAR.__dict__, "transform": "toy_models:mended_later"})
    marker = Path(os.environ["DYNAMS_TEST_MARKER"])
    marker.unlink(missing_ok=True)
    with pytest.raises(ScoringError, match="not mended yet"):
        score_round(digit_store, spec, checkpoint=checkpoint, client=client)
    marker.touch()
    result = score_round(digit_store, spec, checkpoint=checkpoint, client=client)
    assert (result.number, result.failed) == (1, 0)


def test_the_tables_of_a_published_round_never_change(
    digit_store: Store, checkpoint: str, client: Client, tmp_path: Path
) -> None:
    spec = ScorerSpec(**{**LINEAR.__dict__, "transform": "toy_models:picky"})
    made = score_round(digit_store, spec, checkpoint=checkpoint, client=client, max_errors=1437)
    assert 14 < made.failed < 1437
    published = select_round(digit_store, fraction=0.1, scores_of=made.number, max_errors=1437).round
    folder = Path(digit_store.path(schema.scores_folder(published.number)))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ScoringError, match=f"{made.failed} of 1437 samples failed, 14 are allowed"):
        score_round(digit_store, spec, checkpoint=checkpoint, client=client)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_model_that_gives_nan_fails_the_job(digit_store: Store, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "nan.pt"
    torch.save(toy_models.broken().state_dict(), path)
    with pytest.raises(Exception, match=r"NaN|finite"):
        score_round(digit_store, LINEAR, checkpoint=str(path), client=client)


def test_changed_and_missing_shards_are_named_after_the_others_are_done(
    tmp_path: Path, checkpoint: str, client: Client, digit_shards: list[str]
) -> None:
    copies = [tmp_path / f"copy-{number}.tar" for number in range(15)]
    for copy, shard in zip(copies, digit_shards, strict=True):
        copy.write_bytes(Path(shard).read_bytes())
    store = Store(tmp_path / "store")
    build_index(store, [str(copy) for copy in copies])
    copies[4].write_bytes(copies[5].read_bytes())
    copies[9].unlink()
    with pytest.raises(ScoringError, match=r"2 of 15 parts") as error:
        score_round(store, LINEAR, checkpoint=checkpoint, client=client)
    assert "copy-4.tar: not the shard that was indexed" in str(error.value)
    assert "copy-9.tar: no such file" in str(error.value)
    assert len(finished_parts(store, 1)) == 13


def test_a_copy_elsewhere_scores_the_same(
    digit_store: Store, digit_shards: list[str], tmp_path: Path, checkpoint: str, client: Client
) -> None:
    place = tmp_path / "copies"
    place.mkdir()
    for shard in digit_shards:
        (place / Path(shard).name).write_bytes(Path(shard).read_bytes())
    original = tables(digit_store, score_round(digit_store, LINEAR, checkpoint=checkpoint, client=client).number)
    moved = Store(tmp_path / "moved", shards_at=place)
    build_index(moved, digit_shards)
    assert tables(moved, score_round(moved, LINEAR, checkpoint=checkpoint, client=client).number).equals(original)
    (place / Path(digit_shards[2]).name).write_bytes(Path(digit_shards[3]).read_bytes())
    other = Store(tmp_path / "other", shards_at=place)
    build_index(other, digit_shards)
    with pytest.raises(ScoringError, match="not the shard that was indexed"):
        score_round(other, LINEAR, checkpoint=checkpoint, client=client)
    assert issubclass(ShardChangedError, Exception)


def test_copies_of_shards_with_one_base_name_are_refused(tmp_path: Path, digit_shards: list[str]) -> None:
    urls = [tmp_path / "a" / "000.tar", tmp_path / "b" / "000.tar"]
    for url, shard in zip(urls, digit_shards, strict=False):
        url.parent.mkdir()
        url.write_bytes(Path(shard).read_bytes())
    build_index(Store(tmp_path / "store"), [str(url) for url in urls])
    with pytest.raises(UsageError, match=r"several of this dataset are named '000\.tar'"):
        Store(tmp_path / "store", shards_at=tmp_path / "a").dataset()


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_with_the_same_tables(
    digit_store: Store, digit_shards: list[str], tmp_path: Path, checkpoint: str, client: Client
) -> None:
    reference = tables(digit_store, score_round(digit_store, LINEAR, checkpoint=checkpoint, client=client).number)
    store = Store(tmp_path / "killed")
    build_index(store, digit_shards)
    command = [
        sys.executable, "-m", "tools.score_shards", "--store", store.url, "--model", "toy_models:linear",
        "--input", "png", "--label", "cls", "--transform", "toy_models:slow_gray", "--checkpoint", checkpoint,
        "--batch-size", "37", "--workers", "1", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder = Path(store.path(schema.scores_folder(1)))
    deadline = time.monotonic() + 90
    while not (folder.is_dir() and len(list(folder.glob("part-*"))) >= 3):
        assert time.monotonic() < deadline, "the job wrote no tables"
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.5)
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert 3 <= len(done) < 15
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    summary = json.loads(finished.stdout)
    assert summary["resumed_parts"] == len(done)
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done
    assert tables(store, 1).drop_columns(["error"]).equals(reference.drop_columns(["error"]))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["resumed_parts"] == 15
