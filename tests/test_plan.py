"""`dynams plan`: its table against the library, its verdicts, its plot, and wrong flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import toy_models
from dynams_stream.costs import count_flops, selected_cost
from dynams_stream.errors import UnsupportedLayerError, UsageError
from dynams_stream.schedule import PowerSchedule
from dynams_stream.store import Store
from tools.plan import app, read_points

MODEL = ["--model", "toy_models:small_cnn"]
RUN = [*MODEL, "--epochs", "12", "--final", "0.1", "--samples", "1000", "--shape", "1,8,8"]


def plan(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


def test_the_table_is_what_the_library_computes() -> None:
    found = plan(*RUN, "--width", "0.25", "--every", "4", "--interval", "2", "--json")
    schedule = PowerSchedule(12, warmup=2, final=0.1, interval=2)
    costs = count_flops(toy_models.small_cnn(), (1, 8, 8), [0.25])[0.25]
    full, proxy, itself = found["costs"]["FLOPs"]
    assert full["total"] == 12_000 * costs.training
    for row, scorer, every in ((proxy, "proxy", 4), (itself, "model", 1)):
        expected = selected_cost(schedule, 1000, costs, scorer=scorer, every=every)  # type: ignore[arg-type]
        assert (row["trained"], row["scored"], row["total"]) == (expected.trained, expected.scored, expected.total)
        assert row["of_full"] == expected.total / full["total"]
    assert [(row["first"], row["last"]) for row in found["rounds"]] == [(0, 1), *((e, e + 1) for e in range(2, 12, 2))]
    assert [row["round"] for row in found["rounds"]] == [None, 1, 2, 3, 4, 5]
    assert [row["fraction"] for row in found["rounds"][1:]] == [schedule.fraction(e) for e in range(2, 12, 2)]
    shares = [row["of_full"] for row in found["proxy_settings"]]
    assert shares == sorted(shares)
    assert (found["proxy_settings"][0]["width"], found["proxy_settings"][0]["every"]) == (0.25, 8)


def test_it_says_when_the_proxy_does_not_pay() -> None:
    """On a small network with a round each epoch, training the proxy along costs more than scoring with the model."""
    small = plan(*RUN, "--width", "0.75", "--interval", "10")
    assert "the proxy does not pay" in small
    assert "the proxy pays" in plan(*RUN, "--width", "0.25", "--every", "8")
    assert "DynaMS, proxy 0.75: a round of 10 epochs pays below γ = 0." in small


def test_a_store_tells_samples_and_shape(digit_store: Store) -> None:
    store = digit_store
    arguments = [
        *MODEL,
        "--epochs",
        "4",
        "--budget",
        "0.7",
        "--store",
        str(store.url),
        "--transform",
        "toy_models:gray",
    ]
    found = plan(*arguments, "--measure", "--batch-size", "8", "--json")
    assert found["samples"] == store.dataset().samples
    assert found["costs"]["FLOPs"][0]["total"] > 0
    seconds = found["costs"]["seconds"]
    assert all(row["reading"] > 0 for row in seconds)
    assert "seconds" in plan(*arguments, "--measure", "--batch-size", "8")


def test_points_give_what_a_fraction_costs(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    lines = [{"samples": n, "accuracy": 1 - (2 * n**-0.5 + 0.01)} for n in (100, 200, 400)]
    path.write_text("\n".join(map(json.dumps, [*lines, {"samples": 1000, "error": 2 * 1000**-0.5 + 0.01}])) + "\n\n")
    found = plan(*RUN, "--points", str(path), "--json")["expected_errors"]
    assert [row["fraction"] for row in found] == sorted([1.0, 0.6, 0.3, 0.1, 0.345], reverse=True)
    for row in found:
        assert row["error"] == pytest.approx(2 * row["samples"] ** -0.5 + 0.01, rel=1e-3)
    assert "90 % interval" in plan(*RUN, "--points", str(path))


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "schedule.png"
    plan(*RUN, "--plot", str(path))
    with Image.open(path) as image:
        assert image.size[0] > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_a_model_that_cannot_be_slimmed_is_planned_without_a_proxy() -> None:
    model = ["--model", "torchvision.models:shufflenet_v2_x0_5", *RUN[2:-1], "3,64,64"]
    found = plan(*model, "--width", "1", "--json")
    assert [row["name"] for row in found["costs"]["FLOPs"]] == ["full data", "DynaMS, scored by the model"]
    assert found["proxy_settings"] == []
    with pytest.raises(UnsupportedLayerError, match="InvertedResidual"):
        plan(*model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--epochs", "4", "--final", "0.1"], "--store DIR, or both"),
        ([*RUN, "--schedule", "quadratic"], "'quadratic' is unknown; choose from power"),
        ([*RUN, "--budget", "0.5"], "exactly one of final"),
        ([*MODEL, "--epochs", "4", "--final", "0.1", "--samples", "9", "--shape", "3x8"], "whole numbers with commas"),
        ([*MODEL, "--epochs", "4", "--final", "0.1", "--samples", "9", "--shape", "3,8,8"], r"shape \(3, 8, 8\)"),
        ([*RUN, "--store", "x"], "leave out --samples"),
        ([*RUN, "--points", "nowhere.jsonl"], "no such file"),
    ],
)
def test_wrong_flags_say_what_to_do(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(*arguments)


def test_a_point_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text('{"samples": 10, "error": 0.1}\n{"samples": 10}\n')
    with pytest.raises(UsageError, match="line 2: KeyError"):
        read_points(path)
