"""Recomputed batch normalisation statistics: against torch's own, and in whole rounds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client
from PIL import Image
from torch import nn
from torch.optim.swa_utils import update_bn

import toy_models
from dynams_stream import ParameterSharingProxy, ScorerSpec, Store
from dynams_stream.calibration import has_running_statistics, recompute_statistics
from dynams_stream.checkpoint import checkpoint_digest, read_checkpoint
from dynams_stream.samples import SelectedSamples
from dynams_stream.scores import BoundaryNorms, score_batch
from pipeline import run_round
from pipeline.compare_job import sample_rows

SLIM = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)
FULL = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray")


def test_the_same_as_torch_computes() -> None:
    torch.manual_seed(0)
    ours, theirs = toy_models.small_cnn(), toy_models.small_cnn()
    theirs.load_state_dict(ours.state_dict())
    batches = [3 * torch.randn(size, 1, 8, 8) - 1 for size in (20, 30, 7)]
    before = {name: value.clone() for name, value in ours.named_parameters()}
    recompute_statistics(ours, batches)
    update_bn(batches, theirs)
    assert not ours.training
    assert not ours[1].training
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert all(torch.equal(before[name], value) for name, value in ours.named_parameters())
    assert ours[1].momentum == 0.1
    assert ours[1].running_mean.abs().max() > 0.1


def test_only_batch_normalisation_is_in_training_mode() -> None:
    seen: list[bool] = []

    class Spy(nn.Dropout):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(self.training)
            return super().forward(inputs)

    network = nn.Sequential(nn.Conv2d(1, 4, 3), Spy(), nn.BatchNorm2d(4)).train()
    recompute_statistics(network, [torch.randn(4, 1, 8, 8)])
    assert seen == [False]
    assert has_running_statistics(network)
    assert not has_running_statistics(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)))


def spoilt(seed: int) -> ParameterSharingProxy:
    """A network whose statistics have nothing to do with its weights."""
    torch.manual_seed(0)
    network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5)
    torch.manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=3)
            layer.running_var.uniform_(0.01, 9)
    return network


def test_scores_do_not_depend_on_the_statistics_that_training_left(digit_store: Store, client: Client) -> None:
    found = []
    for seed in (1, 2):
        network = spoilt(seed)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        made = run_round(
            digit_store, SLIM, weights=network, fraction=0.25, epoch=seed, client=client, calibration_samples=500
        )
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
        assert Path(made.manifest["checkpoint"]["path"]).name.startswith("calibrated-")
        found.append(made)
    assert found[0].manifest["selection"] == found[1].manifest["selection"]
    assert found[0].manifest["faithfulness"] == found[1].manifest["faithfulness"]
    plain = run_round(digit_store, SLIM, weights=spoilt(1), fraction=0.25, client=client)
    assert plain.manifest["selection"] != found[0].manifest["selection"]


def test_scores_are_those_of_the_recomputed_network(digit_store: Store, client: Client) -> None:
    network = spoilt(1)
    made = run_round(digit_store, FULL, weights=network.model, fraction=0.25, client=client, calibration_samples=300)
    samples = SelectedSamples(digit_store, round=None)
    images = [toy_models.gray(Image.open(io.BytesIO(samples[place]["png"]))) for place in range(1437)]
    dataset = digit_store.dataset()
    starts = np.cumsum([0, *(part.samples for part in dataset.parts)])
    rows = [int(row + starts[some.part.number]) for some in sample_rows(dataset, 300, seed=1) for row in some.rows]
    assert len(rows) == 300
    chosen = torch.stack([images[row] for row in rows])
    recompute_statistics(network.model, [chosen[:256], chosen[256:]])
    with torch.no_grad():
        logits = network.model(torch.stack(images))
    expected = score_batch(logits, torch.full((1437,), -1), BoundaryNorms(network.model[-1].weight.float())).distance
    distances = made.scores().to_table()["distance"].to_numpy()
    np.testing.assert_allclose(distances, expected.numpy(), rtol=2e-4, atol=1e-6)


def test_the_copy_is_made_once_and_keeps_what_the_file_says(digit_store: Store, client: Client) -> None:
    options = {"fraction": 0.25, "epoch": 4, "client": client, "calibration_samples": 400}
    first = run_round(digit_store, SLIM, weights=spoilt(3), **options)
    path = first.manifest["checkpoint"]["path"]
    made = Path(path).stat().st_mtime_ns
    assert read_checkpoint(path)[1]["epoch"] == "4"
    assert checkpoint_digest(path) == first.manifest["checkpoint"]["sha256"]
    assert run_round(digit_store, SLIM, weights=spoilt(3), **options).number == first.number
    assert Path(path).stat().st_mtime_ns == made


@pytest.mark.parametrize("samples", [0, 200])
def test_a_network_without_batch_normalisation_scores_as_it_is(
    digit_store: Store, client: Client, tmp_path: Path, samples: int
) -> None:
    path = tmp_path / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    spec = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")
    made = run_round(digit_store, spec, weights=path, fraction=0.5, client=client, calibration_samples=samples)
    assert made.manifest["checkpoint"]["path"] == str(path)
