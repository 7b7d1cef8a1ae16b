"""Suspected label errors: planted ones are found, and they are those that cleanlab finds with all probabilities."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import toy_models
from dynams_stream import ScorerSpec, Store, schema, storage
from dynams_stream.dataset import Part
from dynams_stream.errors import MissingExtraError, SelectionError, UsageError
from dynams_stream.samples import SelectedSamples
from dynams_stream.selection import Selection
from pipeline import label_errors, run_round
from pipeline.index_job import build_index
from pipeline.label_errors import score_history, suspected_label_errors
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.shards import open_source, write_shards
from tools.training_config import DataConfig
from tools.training_data import mislabelled, wrong_places

LINEAR = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")
NOISY = DataConfig(dataset="digits", transform="toy_models:gray", wrong_labels=0.08)


@pytest.fixture(scope="module")
def noisy_shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = mislabelled(open_source("digits", "", "train"), NOISY)
    return write_shards(source, tmp_path_factory.mktemp("noisy"), samples_per_shard=100)


@pytest.fixture
def noisy(noisy_shards: list[str], tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    build_index(store, noisy_shards)
    return store


def images_and_labels(store: Store) -> tuple[torch.Tensor, torch.Tensor]:
    samples = SelectedSamples(store, round=None)
    images = [toy_models.gray(Image.open(io.BytesIO(samples[place]["png"]))) for place in range(len(samples))]
    return torch.stack(images), torch.tensor([int(samples[place]["cls"]) for place in range(len(samples))])


def trained(store: Store, path: Path, steps: int) -> str:
    """A linear model that was trained a little, on the wrong labels, too."""
    images, labels = images_and_labels(store)
    model = toy_models.linear()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), path)
    return str(path)


def flat(found: dict[int, np.ndarray], store: Store) -> list[int]:
    starts = np.cumsum([0, *(part.samples for part in store.dataset().parts)])
    return [int(position + starts[number]) for number, positions in sorted(found.items()) for position in positions]


def test_planted_errors_are_found_and_left_out(noisy: Store, client: Client, tmp_path: Path) -> None:
    for steps in (200, 400):
        checkpoint = trained(noisy, tmp_path / f"{steps}.pt", steps)
        number = score_round(noisy, LINEAR, checkpoint=checkpoint, epoch=steps, client=client).number
    planted = set(wrong_places(1437, NOISY).tolist())
    assert len(planted) == 115
    suspected = set(flat(suspected_label_errors(noisy, noisy.dataset(), [1, 2]), noisy))
    assert len(suspected & planted) / len(planted) > 0.7, "recall"
    assert len(suspected & planted) / len(suspected) > 0.85, "precision"

    made = select_round(noisy, fraction=0.5, strategy="-loss", exclude_noisy=True).round
    sha256 = storage.file_digest(noisy.path(schema.excluded_path(made.number)))
    assert made.manifest["excluded"] == {"samples": len(suspected), "judged_by": [1, 2], "sha256": sha256}
    assert made.counts == {"all": 1437, "scored": 1437, "failed": 0, "selected": 719}
    selection = made.selection()
    starts = np.cumsum(noisy.dataset().counts) - noisy.dataset().counts
    chosen = {int(row + starts[shard]) for shard in range(15) for row in selection.rows(shard)}
    assert len(chosen) == 719
    assert not chosen & suspected
    listed = Selection.read(noisy.path(schema.excluded_path(made.number)))
    assert {int(row + starts[shard]) for shard in range(15) for row in listed.rows(shard)} == suspected

    assert made.manifest["guards"]["warnings"] == []

    everything = select_round(noisy, fraction=0.5, strategy="-loss").round
    assert everything.number != made.number
    assert everything.manifest["guards"]["label_disagreement"] > made.manifest["guards"]["label_disagreement"]
    assert select_round(noisy, fraction=0.5, strategy="-loss", exclude_noisy=True).round.number == made.number
    assert number == 2


def test_too_many_suspects_are_told(
    noisy: Store, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    score_round(noisy, LINEAR, checkpoint=trained(noisy, tmp_path / "early.pt", 30), client=client)
    made = select_round(noisy, fraction=0.2, exclude_noisy=True).round
    assert made.counts["selected"] == 288
    assert made.manifest["excluded"]["samples"] > 700
    assert "of all labels are suspected: the scorer has not learnt enough" in caplog.text


def test_the_same_as_cleanlab_finds_with_all_probabilities(noisy: Store, client: Client, tmp_path: Path) -> None:
    from cleanlab.experimental.label_issues_batched import LabelInspector

    checkpoint = trained(noisy, tmp_path / "linear.pt", 80)
    score_round(noisy, LINEAR, checkpoint=checkpoint, client=client)
    images, labels = images_and_labels(noisy)
    model = toy_models.linear()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    probabilities = torch.softmax(model(images).double(), dim=1).detach().numpy()
    inspector = LabelInspector(num_class=10, verbose=False)
    inspector.update_confident_thresholds(labels.numpy(), probabilities)
    inspector.score_label_quality(labels.numpy(), probabilities)
    expected = sorted(inspector.get_label_issues().tolist())
    assert len(expected) > 100
    assert flat(suspected_label_errors(noisy, noisy.dataset(), [1]), noisy) == expected


def test_blocks_do_not_change_what_is_found(
    noisy: Store, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_round(noisy, LINEAR, checkpoint=trained(noisy, tmp_path / "linear.pt", 80), client=client)
    whole = flat(suspected_label_errors(noisy, noisy.dataset(), [1]), noisy)
    monkeypatch.setattr(label_errors, "_BLOCK_ELEMENTS", 170)
    assert flat(suspected_label_errors(noisy, noisy.dataset(), [1]), noisy) == whole


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1e-30, np.nan]), max_size=9), min_size=1), st.integers(0, 9)
)
def test_the_lowest_are_those_of_a_stable_sort(values: list[list[float]], wanted: int) -> None:
    arrays = [np.array(each, dtype=np.float32) for each in values]
    parts = [
        Part(number, first_shard=number, shards=1, samples=len(each), index_file="")
        for number, each in enumerate(arrays)
    ]
    everything = np.concatenate(arrays)
    order = np.argsort(everything, kind="stable")  # NaNs come last
    expected = sorted(order[: min(wanted, np.count_nonzero(~np.isnan(everything)))].tolist())
    found = label_errors._lowest(io.BytesIO(everything.tobytes()), parts, wanted)
    starts = np.cumsum([0, *map(len, arrays)])
    assert [int(place + starts[number]) for number, places in found.items() for place in places] == expected


@pytest.mark.slow
def test_the_history_is_the_newest_complete_tables(noisy: Store, client: Client, tmp_path: Path) -> None:
    for steps in range(6):
        checkpoint = trained(noisy, tmp_path / f"{steps}.pt", steps)
        run_round(noisy, LINEAR, weights=checkpoint, fraction=0.5, epoch=steps, client=client)
    Path(noisy.path(schema.scores_path(3, 0))).unlink()
    select_round(noisy, fraction=0.2)  # a round without tables of its own
    assert score_history(noisy, noisy.dataset(), 6) == [1, 2, 4, 5, 6]
    assert score_history(noisy, noisy.dataset(), 5) == [1, 2, 4, 5]
    # Tables without labels say nothing of labels: they do not make the others useless.
    unlabelled = ScorerSpec(model="toy_models:linear", input="png", label="", transform="toy_models:gray")
    number = score_round(noisy, unlabelled, checkpoint=checkpoint, client=client).number
    newest = run_round(noisy, LINEAR, weights=trained(noisy, tmp_path / "9.pt", 9), fraction=0.5, client=client).number
    history = score_history(noisy, noisy.dataset(), newest)
    assert number not in history
    assert history[-1] == newest


def test_what_cannot_be_judged(noisy: Store, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="reads no score tables"):
        select_round(noisy, fraction=0.5, strategy="random:1", exclude_noisy=True)
    unlabelled = ScorerSpec(model="toy_models:linear", input="png", label="", transform="toy_models:gray")
    score_round(noisy, unlabelled, checkpoint=trained(noisy, tmp_path / "linear.pt", 1), client=client)
    with pytest.raises(SelectionError, match=r"0 distinct label\(s\)"):
        select_round(noisy, fraction=0.5, exclude_noisy=True)
    monkeypatch.setattr(label_errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"dynams-stream\[noise\]"):
        run_round(noisy, LINEAR, fraction=0.5, exclude_noisy=True, client=client)
