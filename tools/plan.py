"""`dynams plan`: what a schedule costs, and whether the proxy pays."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from dynams_stream.costs import StepCosts, count_flops, measure_seconds
from dynams_stream.errors import HeadError, UnsupportedLayerError, UsageError
from dynams_stream.power_law import fit_power_law
from dynams_stream.samples import SelectedSamples
from dynams_stream.schedule import Schedule, make_schedule
from dynams_stream.scorer import Scorer, ScorerSpec, build_network
from dynams_stream.store import Store
from pipeline.score_job import first_extensions
from tools.command import ConfigOption, DebugOption, JsonOption, run, say, show
from tools.plan_report import (
    compared,
    cost_text,
    costs_by_epoch,
    errors_text,
    expected_errors,
    proxy_settings,
    schedule_rows,
    schedule_text,
    verdict_text,
)
from tools.plot_margins import require_matplotlib
from tools.plot_schedule import plot_schedule
from tools.schedule_options import (
    ANNEAL,
    INTERVAL,
    WARMUP,
    AnnealOption,
    BudgetOption,
    FinalOption,
    IntervalOption,
    ScheduleOption,
    StepsOption,
    WarmupFractionOption,
    WarmupOption,
)
from tools.scoring_options import (
    DeviceOption,
    HeadOption,
    InputOption,
    ModelArgsOption,
    ModelOption,
    TransformOption,
    scorer_spec,
)

app = typer.Typer(add_completion=False)

WIDTHS, EVERY = (0.25, 0.5, 0.75), (1, 2, 4, 8)
"""Proxy settings whose costs are compared."""
FRACTIONS = (1.0, 0.6, 0.3, 0.1)
"""Whose expected error is told, next to the schedule's mean."""
MOST_READ = 256
"""Samples that are read to measure reading."""


@app.command()
def plan(
    model: ModelOption,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs of the whole run.")],
    store: Annotated[
        str | None, typer.Option("--store", help="An indexed store: how many samples, and what shape.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Samples of the dataset, without --store.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Of one input, such as 3,224,224, without --store.")
    ] = None,
    schedule: ScheduleOption = "power",
    final: FinalOption = None,
    budget: BudgetOption = None,
    warmup: WarmupOption = WARMUP,
    warmup_fraction: WarmupFractionOption = 1.0,
    anneal: AnnealOption = ANNEAL,
    interval: IntervalOption = INTERVAL,
    steps: StepsOption = None,
    width: Annotated[float, typer.Option("--width", help="Width of the proxy; 1: the model itself scores.")] = 0.5,
    every: Annotated[int, typer.Option("--every", min=1, help="The proxy takes part in each n-th step.")] = 1,
    model_args: ModelArgsOption = "{}",
    head: HeadOption = None,
    input: InputOption = None,
    transform: TransformOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure seconds here too; with --store also reading.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Of the steps that --measure takes.")] = 64,
    device: DeviceOption = "cpu",
    points: Annotated[
        Path | None,
        typer.Option("--points", help="Runs on random subsets, JSON lines with samples and error, for the power law."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG file: fraction and cost by epoch.")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print what full training, DynaMS with a proxy and DynaMS scored by the model cost, before anything is trained.

    Example: dynams plan --model torchvision.models:resnet50 --samples 1281167 --shape 3,224,224 --epochs 90 --final 0.3
    """
    if plot is not None:
        require_matplotlib()
    chosen = make_schedule(
        schedule,
        steps=steps,
        epochs=epochs,
        warmup=warmup,
        warmup_fraction=warmup_fraction,
        anneal=anneal,
        interval=interval,
        final=final,
        budget=budget,
    )
    spec = scorer_spec(model, model_args, head, 1.0, input, "", transform, batch_size)
    law = None if points is None else fit_power_law(*read_points(points))
    number, inputs, reading = _data(store, samples, shape, spec, measure)
    network = build_network(spec, None).requires_grad_(True)
    counted = _count(network, inputs, width, head)
    costs = {"FLOPs": counted[width]}
    if measure:
        batch = inputs.expand(batch_size, *inputs.shape).contiguous().to(device)
        costs["seconds"] = measure_seconds(network, batch, width=width, head=head, reading=reading)
    result, parts = _compare(chosen, number, costs, counted, width=width, every=every)
    if law is not None:
        fractions = sorted({*FRACTIONS, round(chosen.mean_fraction(), 3)}, reverse=True)
        result["expected_errors"] = expected_errors(law, fractions, number)
        parts.append(errors_text(law, result["expected_errors"]))
    if plot is not None:
        by_epoch = costs_by_epoch(chosen, number, costs["FLOPs"], width=width, every=every)
        plot_schedule(chosen, by_epoch, "FLOPs", plot)
        result["plot"] = str(plot)
        parts.append(f"plot: {plot}")
    if not measure:
        say("FLOPs leave out reading and decoding, which decide on many pipelines; --measure counts seconds")
    show(result, "\n\n".join(parts), json)


def _count(network: nn.Module, inputs: Tensor, width: float, head: str | None) -> dict[float, StepCosts]:
    """FLOPs by width: of the one that was asked for, and of those that it is compared with."""
    if width != 1:
        return count_flops(network, inputs.shape, sorted({*WIDTHS, width}), head=head)
    try:
        return count_flops(network, inputs.shape, [*WIDTHS, 1.0], head=head)
    except (UnsupportedLayerError, HeadError) as error:
        say(f"no proxy to compare with: {error}")
        return count_flops(network, inputs.shape, [1.0])


def _compare(
    schedule: Schedule,
    samples: int,
    costs: Mapping[str, StepCosts],
    counted: Mapping[float, StepCosts],
    *,
    width: float,
    every: int,
) -> tuple[dict[str, Any], list[str]]:
    """The result and its text: the schedule, what it costs in each unit, and which proxy is cheapest."""
    rows = {unit: compared(schedule, samples, one, width=width, every=every) for unit, one in costs.items()}
    proxies = {p: one for p, one in counted.items() if p != 1}
    result: dict[str, Any] = {
        "samples": samples,
        "mean_fraction": schedule.mean_fraction(),
        "rounds": schedule_rows(schedule, samples),
        "costs": rows,
        "proxy_settings": proxy_settings(schedule, samples, proxies, EVERY),
    }
    parts = [schedule_text(schedule, result["rounds"])]
    parts += [cost_text(of_unit, unit) for unit, of_unit in rows.items()]
    for unit, of_unit in rows.items():
        settings = result["proxy_settings"] if unit == "FLOPs" else []
        parts.append(verdict_text(of_unit, settings, unit, schedule.interval))
    return result, parts


def read_points(path: Path) -> tuple[list[float], list[float]]:
    """Sizes and errors of runs: JSON lines with `samples`, and `error` or `accuracy`.

    Raises:
        UsageError: names the line that cannot be used.
    """
    if not path.exists():
        raise UsageError(f"--points {path}: no such file")
    sizes, errors = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json_module.loads(line)
            sizes.append(float(fields["samples"]))
            errors.append(float(fields["error"]) if "error" in fields else 1 - float(fields["accuracy"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--points {path}, line {number}: {type(error).__name__}: {error}; each line has samples, the size "
                f"of the training set, and error or accuracy, in [0, 1]"
            ) from error
    return sizes, errors


def _data(
    store: str | None, samples: int | None, shape: str | None, spec: ScorerSpec, measure: bool
) -> tuple[int, Tensor, float]:
    """How many samples there are, an input (zeros where only its shape is known), and the seconds of reading one."""
    if store is None:
        if samples is None or shape is None:
            raise UsageError("give --store DIR, or both --samples N and --shape C,H,W")
        try:
            sizes = [int(size) for size in shape.split(",")]
        except ValueError as error:
            raise UsageError(f"--shape {shape!r}: write whole numbers with commas, such as 3,224,224") from error
        if min(sizes) < 1:
            raise UsageError(f"--shape {shape!r}: sizes are 1 or more")
        return samples, torch.zeros(sizes), 0.0
    if samples is not None or shape is not None:
        raise UsageError("--store tells samples and shape itself; leave out --samples and --shape")
    target = Store(store)
    dataset = target.dataset()
    scorer = Scorer(spec.resolved(first_extensions(target, dataset)), None)
    stored = SelectedSamples(target, round=None)
    inputs, _ = scorer.prepare(stored[0])
    if not measure:
        return dataset.samples, inputs, 0.0
    some = list(range(min(MOST_READ, len(stored))))
    began = time.perf_counter()
    for sample in stored.__getitems__(some):
        scorer.prepare(sample)
    return dataset.samples, inputs, (time.perf_counter() - began) / len(some)


if __name__ == "__main__":
    run(app, name="dynams plan")
