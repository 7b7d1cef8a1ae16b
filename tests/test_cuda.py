"""On a GPU: the proxy, scoring, rounds and training give what they give on the CPU. Skipped where there is none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models
from typer.testing import CliRunner

import toy_models
from dynams_stream import ParameterSharingProxy, PowerSchedule, ScorerSpec, SelectedDataset, Store, schema
from dynams_stream.checkpoint import save_weights
from dynams_stream.costs import measure_seconds
from dynams_stream.proxy import joint_loss
from dynams_stream.scorer import Scorer
from dynams_stream.selection import selected_count
from pipeline import DynamicSelection, run_round
from pipeline.score_job import score_round
from tools.train import app

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FAMILIES = {
    "resnet18": models.resnet18,
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "densenet121": models.densenet121,
    "efficientnet_b0": models.efficientnet_b0,
    "convnext_tiny": models.convnext_tiny,
    "vit_b_16": partial(models.vit_b_16, image_size=64),
    "swin_t": models.swin_t,
}
every_family = pytest.mark.parametrize("name", FAMILIES)
CNN = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Convolutions in float32, not in the shorter TF32 that PyTorch allows itself by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def network_of(name: str) -> ParameterSharingProxy:
    torch.manual_seed(0)
    network = ParameterSharingProxy(FAMILIES[name](num_classes=5), width=0.5)  # type: ignore[call-arg]
    for module in network.modules():  # gradients that random masks decide cannot be compared
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return network.train()


def gradients(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the joint loss, by name, on the CPU."""
    network.zero_grad(set_to_none=True)
    joint_loss(F.cross_entropy, network(images), labels).backward()
    return {name: parameter.grad.detach().clone().double().cpu() for name, parameter in network.named_parameters()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], most: float) -> None:
    """The difference of each gradient is at most that part of it, or of a hundredth of the largest one."""
    assert found.keys() == expected.keys()
    scale = max(float(one.norm()) for one in expected.values())
    for name, one in expected.items():
        assert float((found[name] - one).norm()) <= most * max(float(one.norm()), 0.01 * scale), name


IMAGES, LABELS = (4, 3, 64, 64), torch.tensor([0, 4, 2, 1])


@every_family
def test_a_joint_step_computes_the_same_as_on_the_cpu(name: str) -> None:
    """(In float64: in float32 an activation that falls to the other side of zero changes gradients by per cents.)"""
    network, images = (
        network_of(name).double(),
        torch.randn(IMAGES, generator=torch.Generator().manual_seed(1)).double(),
    )
    expected = gradients(network, images, LABELS)
    network = network.cuda()
    assert_near(gradients(network, images.cuda(), LABELS.cuda()), expected, 1e-6)
    network = network.to(memory_format=torch.channels_last)
    images = images.cuda().to(memory_format=torch.channels_last)
    assert_near(gradients(network, images, LABELS.cuda()), expected, 1e-6)


@every_family
def test_training_in_bfloat16_learns(name: str) -> None:
    """Both losses fall on a batch that is shown again and again, with a gradient for every parameter."""
    network = network_of(name).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(IMAGES, device="cuda").to(memory_format=torch.channels_last)
    labels = LABELS.cuda()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            logits, proxy_logits = network(images)
        assert logits.dtype == torch.bfloat16
        both = F.cross_entropy(logits.float(), labels), F.cross_entropy(proxy_logits.float(), labels)
        optimizer.zero_grad()
        (both[0] + both[1]).backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append([loss.item() for loss in both])
    assert np.all(np.array(losses[-1]) < 0.8 * np.array(losses[0])), losses


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_compiled_by_inductor_it_computes_the_same(name: str) -> None:
    network = network_of(name).cuda()
    images, labels = torch.randn(IMAGES, device="cuda"), LABELS.cuda()
    expected = gradients(network, images, labels)
    network.compile(fullgraph=True)
    assert_near(gradients(network, images, labels), expected, 0.03)


def test_ddp_on_nccl_takes_a_step(tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        network = network_of("resnet18").cuda()
        images, labels = torch.randn(IMAGES, device="cuda"), LABELS.cuda()
        expected = gradients(network, images, labels)
        found = gradients(DistributedDataParallel(network, device_ids=[0]), images, labels)
        assert_near({name.removeprefix("module."): one for name, one in found.items()}, expected, 0.02)
    finally:
        dist.destroy_process_group()


# ---- scoring ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(digit_store: Store, tmp_path: Path) -> str:
    """A small network after a few steps on the digits."""
    torch.manual_seed(0)
    network, path = toy_models.small_cnn(), str(tmp_path / "weights.safetensors")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scorer = Scorer(CNN, None)
    samples = [scorer.prepare(sample) for sample in SelectedDataset(digit_store, round=None)]
    images, labels = torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    save_weights(network, path, {"width": "1.0"})
    return path


def table(store: Store, spec: ScorerSpec, checkpoint: str, device: str) -> pa.Table:
    number = score_round(store, spec, checkpoint=checkpoint, device=device, workers=1).number
    parts = range(len(store.dataset().parts))
    return pa.concat_tables(pq.read_table(store.path(schema.scores_path(number, part))) for part in parts)


def test_score_tables_of_gpu_and_cpu_agree(digit_store: Store, weights: str) -> None:
    exact = table(digit_store, replace(CNN, precision="float32"), weights, "cpu")
    rough = table(digit_store, CNN, weights, "cuda")
    assert rough.select(["shard", "row", "key", "label"]).equals(exact.select(["shard", "row", "key", "label"]))
    distances = [np.asarray(one["distance"]) for one in (exact, rough)]
    assert not np.array_equal(*distances)
    assert np.corrcoef(distances)[0, 1] > 0.999
    assert np.mean(np.asarray(exact["predicted"]) == np.asarray(rough["predicted"])) > 0.98


@pytest.mark.parametrize("compile", [False, True])
def test_in_float32_a_gpu_gives_the_scores_of_the_cpu(weights: str, compile: bool) -> None:
    spec = replace(CNN, precision="float32", compile=compile)
    inputs = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(300) % 10
    on_gpu, on_cpu = Scorer(spec, weights, "cuda:0"), Scorer(replace(spec, compile=False), weights)
    for size in (300, 256, 1):
        batch = on_gpu.stack(list(inputs[:size]))
        assert batch.is_pinned()
        found, expected = on_gpu.score(batch, labels[:size]).cpu(), on_cpu.score(inputs[:size], labels[:size])
        for name in ("distance", "margin", "loss", "el2n", "entropy", "confidence"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_too_large_a_batch_is_halved_until_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    spec = ScorerSpec(model="torchvision.models:resnet18", model_args={"num_classes": 5}, input="jpg", label="cls")
    torch.manual_seed(0)
    scorer = Scorer(spec, None, "cuda:0")
    inputs, labels = torch.rand(256, 3, 128, 128), torch.zeros(256, dtype=torch.int64)
    expected = scorer.score(inputs, labels).cpu()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 300e6) / total)
    try:
        with caplog.at_level(logging.WARNING):
            found = scorer.score(inputs, labels).cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "too little memory for 256 samples" in caplog.text
    torch.testing.assert_close(found.distance, expected.distance, rtol=2e-2, atol=1e-3)


# ---- rounds and training ---------------------------------------------------------------------------------------------


def test_rounds_of_a_network_on_the_gpu(digit_store: Store) -> None:
    torch.manual_seed(0)
    network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5).cuda().train()
    network(torch.rand(64, 1, 8, 8, device="cuda"))
    made = run_round(
        digit_store, replace(CNN, width=0.5), weights=network, fraction=0.25, device="cuda", calibration_samples=500
    )
    assert made.manifest["counts"] == {**made.manifest["counts"], "all": 1437, "scored": 1437, "selected": 360}
    assert made.manifest["faithfulness"]["samples"] == 1437
    assert all(parameter.device.type == "cuda" for parameter in network.parameters())


def test_dynamic_selection_drives_a_loop_on_the_gpu(digit_store: Store) -> None:
    torch.manual_seed(0)
    network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5).cuda()
    dataset = SelectedDataset(digit_store, batch_size=64)
    schedule = PowerSchedule(epochs=3, warmup=1, final=0.3)
    selection = DynamicSelection(digit_store, replace(CNN, width=0.5), schedule, dataset=dataset, device="cuda")
    for epoch in range(3):
        selection.begin_epoch(epoch, network)
        assert len(dataset) == selected_count(schedule.fraction(epoch), 1437)
    assert selection.failures == []


def test_the_reference_run_trains_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        out = "{tmp_path / "out"}"
        methods = ["full", "dynams"]
        seeds = [0]
        data = {{ dataset = "digits", samples_per_shard = 300, transform = "toy_models:gray" }}
        model = {{ factory = "toy_models:small_cnn", args = {{ width = 16 }}, channels_last = true }}
        training = {{ epochs = 6, batch_size = 32, device = "cuda", bf16 = true, loader_workers = 2 }}
        selection = {{ final = 0.3, warmup = 2, interval = 2 }}
        """
    )
    result = CliRunner().invoke(app, ["--config", str(path), "--json"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)["results"]
    assert [one["method"] for one in results] == ["full", "dynams"]
    assert all(one["accuracy"] > 0.8 for one in results), results


def test_seconds_on_the_gpu_are_waited_for() -> None:
    """A step that was only launched would take as long whatever its size."""
    small, large = (
        measure_seconds(models.resnet18(), torch.randn(size, 3, 224, 224, device="cuda"), width=0.5)
        for size in (2, 256)
    )
    assert 256 * large.training > 2 * 2 * small.training
