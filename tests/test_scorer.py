"""Scorer: recipes become networks, samples become tensors, errors say what is wrong."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import toy_models
from dynams_stream.checkpoint import checkpoint_epoch, read_checkpoint, save_weights, weights_bytes
from dynams_stream.errors import CheckpointError, HeadError, ModelError, SampleError, UsageError
from dynams_stream.scorer import Scorer, ScorerSpec, build_network, load_callable
from dynams_stream.scores import ScoreBatch

LINEAR = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGE = png(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)


def test_scores_of_a_linear_model_are_those_of_the_definition() -> None:
    scorer = Scorer(LINEAR, None)
    tensor, label = scorer.prepare({"png": IMAGE, "cls": b"3"})
    scores = scorer.score(tensor.unsqueeze(0), torch.tensor([label]))
    layer = toy_models.linear()[1]
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    features = tensor.flatten().double().numpy()
    logits = weight @ features + bias
    predicted = int(logits.argmax())
    distances = [
        (logits[predicted] - logits[c]) / np.linalg.norm(weight[predicted] - weight[c])
        for c in range(10)
        if c != predicted
    ]
    margins = [(logits[3] - logits[c]) / np.linalg.norm(weight[3] - weight[c]) for c in range(10) if c != 3]
    assert scores.predicted.item() == predicted
    assert scores.distance.item() == pytest.approx(min(distances), rel=1e-5)
    assert scores.margin.item() == pytest.approx(min(margins), rel=1e-5)
    assert scores.loss.item() == pytest.approx(np.log(np.exp(logits - logits[3]).sum()), rel=1e-5)


def test_without_a_transform_inputs_are_rgb_in_unit_range() -> None:
    tensor, _ = Scorer(replace(LINEAR, transform=None), None).prepare({"png": png(np.full((4, 6), 255, np.uint8))})
    assert tensor.shape == (3, 4, 6)
    assert tensor.dtype == torch.float32
    assert bool((tensor == 1).all())


def test_large_jpegs_reach_a_transform_at_a_part_of_their_size() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((64, 96), 80, dtype=np.uint8)).save(file, "JPEG")
    whole = replace(LINEAR, transform="toy_models:gray", input="jpg")
    for least_side, shape in ((None, (1, 64, 96)), (60, (1, 64, 96)), (30, (1, 32, 48)), (8, (1, 8, 12))):
        tensor, _ = Scorer(replace(whole, least_side=least_side), None).prepare({"jpg": file.getvalue()})
        assert tensor.shape == shape


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"1"}, "no member 'png'"),
        ({"png": b"not an image", "cls": b"1"}, "cannot decode"),
        ({"png": IMAGE, "cls": b"cat"}, "'cat' is not an integer"),
        ({"png": IMAGE, "cls": b"-4"}, "-4 is negative"),
        ({"png": IMAGE, "cls": b"1_0"}, "'1_0' is not an integer"),
        ({"png": IMAGE, "cls": b"9" * 5000}, "'9{100}' is not an integer"),
    ],
)
def test_a_bad_sample_is_an_error_of_that_sample(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        Scorer(LINEAR, None).prepare(members)


def test_labels_from_json_and_missing_labels() -> None:
    scorer = Scorer(
        ScorerSpec(model="toy_models:linear", input="png", label="json:y", transform="toy_models:gray"), None
    )
    assert scorer.prepare({"png": IMAGE, "json": b'{"y": 7}'})[1] == 7
    assert scorer.prepare({"png": IMAGE, "json": b'{"y": null}'})[1] == -1
    assert scorer.prepare({"png": IMAGE})[1] == -1
    assert scorer.prepare({"png": IMAGE, "json": b'{"y": "7"}'})[1] == 7
    for data, message in (
        (b"{}", "label 'json:y': KeyError"),
        (b'{"y": true}', "label 'True' is not an integer"),
        (b'{"y": "1_0"}', "label '1_0' is not an integer"),
        (b"[" * 200_000, "label 'json:y': RecursionError"),
    ):
        with pytest.raises(SampleError, match=message):
            scorer.prepare({"png": IMAGE, "json": data})


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_error_of_the_sample(error: Exception) -> None:
    scorer = Scorer(LINEAR, None)

    def hungry(image: Image.Image) -> torch.Tensor:
        raise error

    scorer.transform = hungry
    with pytest.raises(type(error), match=str(error)):
        scorer.prepare({"png": IMAGE, "cls": b"1"})


@pytest.mark.parametrize("value", ["[1, 2]", "0.3", '{"a": 1}'])
def test_multi_label_and_soft_labels_are_refused(value: str) -> None:
    scorer = Scorer(
        ScorerSpec(model="toy_models:linear", input="png", label="json:y", transform="toy_models:gray"), None
    )
    with pytest.raises(UsageError, match="one integer class per sample"):
        scorer.prepare({"png": IMAGE, "json": f'{{"y": {value}}}'.encode()})


def test_several_input_extensions_take_the_first_that_is_there() -> None:
    spec = ScorerSpec(model="toy_models:linear", input="jpg;png", label="", transform="toy_models:gray")
    tensor, label = Scorer(spec, None).prepare({"png": IMAGE, "cls": b"1"})
    assert tensor.shape == (1, 8, 8)
    assert label == -1


def test_defaults_come_from_the_first_sample() -> None:
    spec = ScorerSpec(model="toy_models:linear")
    assert (spec.resolved(["json", "jpeg", "cls"]).input, spec.resolved(["jpeg", "cls"]).label) == ("jpeg", "cls")
    assert spec.resolved(["png", "json"]).label == ""
    with pytest.raises(UsageError, match="no image among the extensions"):
        spec.resolved(["txt", "cls"])


def test_models_that_cannot_score_are_refused() -> None:
    with pytest.raises(ModelError, match="returned a str"):
        build_network(ScorerSpec(model="toy_models:not_a_module"), None)
    with pytest.raises(HeadError, match="at least two classes"):
        Scorer(ScorerSpec(model="toy_models:single_logit", input="png", transform="toy_models:gray"), None).classes  # noqa: B018
    scorer = Scorer(ScorerSpec(model="toy_models:linear", head="9", input="png"), None)
    with pytest.raises(HeadError, match="no layer '9'"):
        scorer.score(torch.zeros(1, 1, 8, 8), torch.tensor([0]))
    with pytest.raises(UsageError, match="not a tensor"):
        Scorer(ScorerSpec(model="toy_models:linear", input="png", transform="toy_models:wrong_type"), None).prepare(
            {"png": IMAGE}
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [("nocolon", "module:callable"), ("no_such_module:x", "cannot import"), ("toy_models:nope", "nope")],
)
def test_names_that_cannot_be_imported(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_callable(name, "--model")


def test_checkpoints_are_loaded_strictly(tmp_path: object) -> None:
    path = f"{tmp_path}/model.pt"
    model = toy_models.linear(seed=5)
    torch.save(model.state_dict(), path)
    assert torch.equal(build_network(LINEAR, path)[1].weight, model[1].weight)
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    assert torch.equal(build_network(LINEAR, path)[1].weight, model[1].weight)
    torch.save({"1.weight": model[1].weight.detach()}, path)
    with pytest.raises(CheckpointError, match=r"missing 1\.bias"):
        build_network(LINEAR, path)
    torch.save(toy_models.linear(classes=4).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"1\.weight has shape \(4, 64\)"):
        build_network(LINEAR, path)
    torch.save({"model": model}, path)
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        build_network(LINEAR, path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        build_network(LINEAR, f"{tmp_path}/none.pt")


def test_spec_identity_leaves_out_only_what_does_not_change_scores() -> None:
    spec = ScorerSpec(model="toy_models:linear", batch_size=8)
    assert spec.identity() == ScorerSpec(model="toy_models:linear", batch_size=64).identity()
    assert spec.identity() != ScorerSpec(model="toy_models:linear", width=0.5).identity()
    assert spec.identity() == ScorerSpec(model="toy_models:linear", precision="float32", compile=True).identity()
    assert spec.identity() != ScorerSpec(model="toy_models:linear", precision="bfloat16").identity()
    assert spec.identity() != ScorerSpec(model="toy_models:linear", least_side=64).identity()
    assert "least_side" not in spec.identity()  # tables from before there was the choice stay what they were
    with pytest.raises(UsageError, match="width"):
        ScorerSpec(model="a:b", width=0)
    with pytest.raises(UsageError, match="least_side must be at least 1; got 0"):
        ScorerSpec(model="a:b", least_side=0)
    with pytest.raises(UsageError, match="float32, bfloat16; got 'half'"):
        ScorerSpec(model="a:b", precision="half")


def test_equal_weights_make_equal_files(tmp_path: object) -> None:
    metadata = {"width": "1.0", "head": "1", "epoch": "3", "format": "x", "classes": "10"}
    files = [
        weights_bytes(toy_models.linear(), dict(order)) for order in (metadata.items(), reversed(metadata.items()))
    ]
    assert files[0] == files[1]
    path = f"{tmp_path}/weights.safetensors"
    save_weights(toy_models.linear(seed=3), path, metadata)
    tensors, found = read_checkpoint(path)
    assert found == metadata
    assert torch.equal(tensors["1.weight"], toy_models.linear(seed=3)[1].weight)
    assert checkpoint_epoch(path) == 3


def test_threads_that_share_a_scorer_get_their_own_scores() -> None:
    scorer = Scorer(LINEAR, None)
    inputs = [torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(64)]
    labels = torch.zeros(8, dtype=torch.int64)
    alone = [scorer.score(each, labels).distance for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda each: scorer.score(each, labels).distance, inputs))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("asked", "device", "settled"),
    [("auto", "cpu", "float32"), ("auto", "cuda:1", "bfloat16"), ("float32", "cuda", "float32")],
)
def test_the_device_settles_the_precision(asked: str, device: str, settled: str) -> None:
    assert replace(LINEAR, precision=asked).resolved(["png", "cls"], device).precision == settled


CNN = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray")


def cnn_scores(inputs: torch.Tensor, **changes: Any) -> ScoreBatch:
    torch.manual_seed(0)
    return Scorer(replace(CNN, **changes), None).score(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def test_bfloat16_is_near_and_not_the_same() -> None:
    inputs = torch.rand(64, 1, 8, 8)
    exact, rough = cnn_scores(inputs), cnn_scores(inputs, precision="bfloat16")
    assert rough.distance.dtype == torch.float32
    assert not torch.equal(rough.entropy, exact.entropy)
    torch.testing.assert_close(rough.entropy, exact.entropy, rtol=0.02, atol=0.02)


def test_a_compiled_network_gives_the_same_scores_for_batches_of_any_size() -> None:
    torch.manual_seed(0)
    scorer = Scorer(replace(CNN, compile=True), None)
    for size in (16, 5, 1):
        inputs = torch.rand(size, 1, 8, 8)
        found, expected = scorer.score(inputs, torch.zeros(size, dtype=torch.int64)), cnn_scores(inputs)
        assert torch.equal(found.predicted, expected.predicted)
        torch.testing.assert_close(found.distance, expected.distance, rtol=1e-4, atol=1e-6)


def test_too_little_memory_halves_the_batch_and_keeps_every_score(caplog: pytest.LogCaptureFixture) -> None:
    """(A network that refuses large batches, as a GPU would.)"""
    scorer, seen = Scorer(LINEAR, None), []

    def refuse(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(inputs[0]))
        if seen[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    scorer.network.register_forward_pre_hook(refuse)
    limit, inputs, labels = 7, torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    found = scorer.score(inputs, labels)
    expected = Scorer(LINEAR, None).score(inputs, labels)
    for name in ("predicted", "runner_up", "distance", "margin", "loss", "el2n"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert seen == [40, 20, 10, *[5] * 8]
    scorer.score(inputs[:6], labels[:6])
    assert seen[-2:] == [5, 1]  # it stays small
    assert "too little memory for 10 samples at once" in caplog.text
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(inputs, labels)


def test_too_little_memory_of_the_cpu_halves_the_batch_too() -> None:
    scorer, seen = Scorer(LINEAR, None), []

    def take_much(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(inputs[0]))
        if seen[-1] > 7:
            torch.empty(10**15)

    scorer.network.register_forward_pre_hook(take_much)
    assert scorer.score(torch.rand(10, 1, 8, 8), torch.zeros(10, dtype=torch.int64)).distance.isfinite().all()
    assert seen == [10, 5, 5]


def test_metadata_of_others_is_no_epoch_and_no_width(tmp_path: object) -> None:
    path = f"{tmp_path}/weights.safetensors"
    save_weights(toy_models.linear(), path, {"epoch": "last", "width": "wide"})
    assert checkpoint_epoch(path) is None
    with pytest.raises(CheckpointError, match="width wide"):
        build_network(LINEAR, path)
