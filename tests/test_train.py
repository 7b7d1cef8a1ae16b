"""The reference training run: every method through the same loop, resumable, with an honest table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dynams_stream import ParameterSharingProxy
from dynams_stream.errors import UsageError
from dynams_stream.scorer import load_callable
from dynams_stream.selection import selected_count
from dynams_stream.store import Store
from tools.train import app, table, verdict
from tools.training import RunResult
from tools.training_config import METHODS, RunConfig, read_config

CONFIG = """
out = "{out}"
methods = ["full", "short", "random", "fresh-random", "static", "infobatch", "dynams"]
seeds = [0]
[data]
dataset = "digits"
samples_per_shard = 300
transform = "toy_models:gray"
[model]
factory = "toy_models:small_cnn"
args = {{ width = 8 }}
width = 0.5
[training]
epochs = 5
batch_size = 64
loader_workers = 0
[selection]
final = 0.25
warmup = 1
interval = 2
scorer = "proxy"
"""


def planned_samples(config: RunConfig, method: str, samples: int) -> int:
    """How many samples a run will train on, from arithmetic."""
    if method == "full":
        return config.training.epochs * samples
    schedule = config.schedule()
    return sum(
        samples if schedule.round(epoch) is None else selected_count(schedule.fraction(epoch), samples)
        for epoch in range(config.training.epochs)
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(out=tmp_path / "out"))
    return path


def test_every_method_trains_on_what_was_planned_and_a_rerun_does_nothing(config: Path, tmp_path: Path) -> None:
    first = CliRunner().invoke(app, ["--config", str(config), "--workers", "1", "--json"], catch_exceptions=False)
    results = {result["method"]: result for result in json.loads(first.stdout)["results"]}
    run = read_config(config)
    assert set(results) == {"full", "short", "random", "fresh-random", "static", "infobatch", "dynams"}
    for method, result in results.items():
        if method not in ("short", "infobatch"):
            assert result["samples"] == planned_samples(run, method, 1437), method
        assert 0.1 < result["accuracy"] <= 1
        assert result["seconds"] > result["scoring_seconds"] >= 0
    assert results["full"]["samples"] == 5 * 1437
    rounds = {method: len(result["rounds"]) for method, result in results.items()}
    # InfoBatch's rule keeps more than the fraction while most losses are above the mean; the steps are as many
    assert rounds.pop("infobatch") in (2, 3, 4)
    assert rounds == {"full": 0, "short": 0, "random": 2, "fresh-random": 4, "static": 2, "dynams": 2}
    steps = run.schedule().total_steps(1437, 64)
    assert results["short"]["steps"] == results["dynams"]["steps"] == steps < results["full"]["steps"] == 5 * 23
    assert results["infobatch"]["steps"] <= steps
    # as many steps, in whole epochs of full batches: the last of each epoch is short
    assert results["short"]["samples"] == steps // 23 * 1437 + steps % 23 * 64
    assert [results[method]["scored_samples"] for method in ("full", "static", "dynams")] == [0, 1437, 2 * 1437]
    # the proxy is trained until the last round has begun
    last = selected_count(run.schedule().fraction(3), 1437)
    assert results["dynams"]["proxy_samples"] == results["dynams"]["samples"] - 2 * last
    assert results["static"]["proxy_samples"] == 1437
    assert results["random"]["proxy_samples"] == 0
    stores = {method: Store(tmp_path / "out" / "stores" / f"{method}-0") for method in results}
    static = stores["static"].rounds()
    assert [published.manifest["scores_of"] for published in static] == [None, 1]
    dynamic = stores["dynams"].rounds()
    assert [published.epoch for published in dynamic] == [1, 3]
    assert len({published.manifest["checkpoint"]["sha256"] for published in dynamic}) == 2
    assert [published.counts["selected"] for published in dynamic] == [
        published.counts["selected"] for published in stores["random"].rounds()
    ]
    assert (tmp_path / "out" / "margins.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, ["--config", str(config), "--workers", "1", "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["results"] == json.loads(first.stdout)["results"]
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 7
    config.write_text(config.read_text().replace("samples_per_shard = 300", "samples_per_shard = 200"))
    with pytest.raises(UsageError, match="holds shards of"):
        CliRunner().invoke(app, ["--config", str(config), "--workers", "1"], catch_exceptions=False)


def test_the_model_itself_scores_when_told_and_the_plan_comes_first(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    text = CONFIG.format(out=tmp_path / "out").replace('scorer = "proxy"', 'scorer = "model"')
    config.write_text(text.replace("width = 0.5", "width = 0.5\nevery = 2\nproxy_weight = 0.5"))
    arguments = ["--config", str(config), "--method", "dynams", "--workers", "1", "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    (only,) = json.loads(done.stdout)["results"]
    assert only["samples"] == planned_samples(read_config(config), "dynams", 1437)
    rounds = Store(tmp_path / "out" / "stores" / "dynams-0").rounds()
    assert [one.manifest["scorer"]["width"] for one in rounds] == [1.0] * 2
    assert done.stderr.index("mean fraction") < done.stderr.index("dynams, seed 0:"), "told before training"
    assert "DynaMS, scored by the model" in done.stderr
    assert (tmp_path / "out" / "schedule.png").read_bytes().startswith(b"\x89PNG")


def result(method: str, seed: int, accuracy: float) -> RunResult:
    return RunResult(
        method, seed, accuracy, samples=100, steps=10, proxy_samples=0, scored_samples=0, seconds=2.0,
        scoring_seconds=0.5, processor_seconds=2.0, rounds=(),
    )  # fmt: skip


def test_a_warm_up_on_random_samples_is_the_same_for_all_methods(config: Path, tmp_path: Path) -> None:
    methods = ["random", "static", "infobatch", "dynams"]
    text = (
        config.read_text()
        .replace('"full", "short", ', "")
        .replace('"fresh-random", ', "")
        .replace('"proxy"', '"model"')
    )
    config.write_text(text.replace("warmup = 1", "warmup = 2\nwarmup_fraction = 0.1"))
    done = CliRunner().invoke(app, ["--config", str(config), "--workers", "1", "--json"], catch_exceptions=False)
    results = {result["method"]: result for result in json.loads(done.stdout)["results"]}
    run = read_config(config)
    expected = sum(selected_count(run.schedule().fraction(epoch), 1437) for epoch in range(5))
    assert [results[name]["samples"] for name in ("random", "static", "dynams")] == [expected] * 3
    for method in methods:
        rounds = Store(tmp_path / "out" / "stores" / f"{method}-0").rounds()
        assert [one.manifest["strategy"] for one in rounds[:2]] == ["random:0", "random:1"], method
        assert [one.counts["selected"] for one in rounds[:2]] == [144, 144]
        assert len(rounds) > 2
    assert [results[name]["scored_samples"] for name in ("static", "dynams")] == [1437, 2 * 1437]


def test_the_table_gives_mean_and_deviation() -> None:
    text = table([result("full", 0, 0.90), result("full", 1, 0.92), result("dynams", 0, 0.5)])
    assert "91.00 ± 1.41" in text
    assert "50.00 ± 0.00" in text
    assert "over 2 seeds" in text


def test_no_win_is_claimed_inside_one_standard_deviation() -> None:
    close = [result("full", s, a) for s, a in enumerate((0.90, 0.92, 0.94))] + [
        result("dynams", s, a) for s, a in enumerate((0.92, 0.93, 0.94))
    ]
    assert "no difference beyond the spread (+1.00 points" in verdict(close)
    apart = close[:3] + [result("dynams", s, a) for s, a in enumerate((0.97, 0.98, 0.99))]
    assert "better by 6.00 points" in verdict(apart)
    worse = close[:3] + [result("dynams", s, a) for s, a in enumerate((0.77, 0.78, 0.79))]
    assert "worse by 14.00 points" in verdict(worse)
    assert "one seed says nothing" in verdict([result("full", 0, 0.9), result("dynams", 0, 0.95)])
    assert "at least one other" in verdict([result("dynams", 0, 0.95)])


def test_a_wrong_configuration_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    text = CONFIG.format(out=tmp_path)
    for wrong, message in [
        (text.replace("epochs = 5", "epochs = 0"), r"training\.epochs"),
        (text.replace("final = 0.25", "finale = 0.25"), r"selection\.finale"),
        (text.replace('"static"', '"magic"'), r"methods\.4"),
        (text.replace("warmup = 1", "warmup = 9"), "warmup"),
        (text.replace("final = 0.25", 'final = 0.25\nstrategy = "los"'), "there is no score column 'los'"),
        (text.replace("final = 0.25", 'final = 0.25\nsample_weight = "1 -"'), "sample_weight is written like"),
        ("out =", "run.toml"),
    ]:
        path.write_text(wrong)
        with pytest.raises(UsageError, match=message):
            read_config(path)
    with pytest.raises(UsageError, match="no such file"):
        read_config(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["digits.toml", "mnist.toml"])
def test_the_examples_are_valid(name: str) -> None:
    config = read_config(Path(__file__).resolve().parents[1] / "examples" / name)
    assert set(config.methods) <= set(METHODS)
    assert len(config.seeds) >= 3
    assert config.schedule().fraction(config.training.epochs - 1) == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "size"), [("cifar10.toml", 32), ("imagenet.toml", 224)])
def test_the_examples_for_machines_with_the_data_are_ready(name: str, size: int) -> None:
    """What they name can be imported, fits together, and a proxy of the network can be made."""
    config = read_config(Path(__file__).resolve().parents[1] / "examples" / name)
    schedule = config.schedule()
    assert sum(map(schedule.fraction, range(schedule.epochs))) / schedule.epochs == pytest.approx(0.6)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48), dtype=np.uint8))
    if size == 32:
        image = image.resize((32, 32))
    for transform in (config.data.transform, config.data.train_transform):
        tensor = load_callable(transform, "transform")(image)
        assert (tensor.shape, tensor.dtype) == ((3, size, size), torch.float32)
    model = load_callable(config.model.factory, "model")(**config.model.args)
    network = ParameterSharingProxy(model, config.model.width, head=config.model.head).eval()
    with torch.inference_mode():
        logits, proxied = network(tensor.unsqueeze(0))
    assert logits.shape == proxied.shape


@pytest.mark.slow
def test_smoothing_precision_and_augmentation_reach_the_loop(config: Path) -> None:
    plain = config.read_text().replace("loader_workers = 0", "loader_workers = 0\nlabel_smoothing = 0.2\nbf16 = true")
    inverted = plain.replace("[model]", 'train_transform = "toy_models:inverted"\n[model]')
    accuracies = []
    for text in (plain, inverted):
        config.write_text(text)
        arguments = ["--config", str(config), "--method", "full", "--workers", "1", "--json"]
        (result,) = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)["results"]
        accuracies.append(result["accuracy"])
    # Trained on inverted images and tested on the plain ones, it cannot know them.
    assert accuracies[1] < accuracies[0] - 0.2
