"""`dynams train`: the reference training run: DynaMS, baselines and full data, with a table at the end."""

from __future__ import annotations

import hashlib
import json as json_module
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from distributed import Client

from dynams_stream.costs import count_flops
from dynams_stream.errors import UsageError
from dynams_stream.samples import SelectedSamples
from dynams_stream.store import Store
from pipeline.cluster import dask_client
from pipeline.index_job import build_index
from tools.cluster_options import ClusterOption, SchedulerFileOption, SchedulerOption, scheduler_source
from tools.command import DebugOption, JsonOption, WorkersOption, run, say, show
from tools.plan_report import compared, cost_text, costs_by_epoch, schedule_rows, schedule_text
from tools.plot_margins import plot_margins, require_matplotlib
from tools.plot_schedule import plot_schedule
from tools.progress import progress_bar
from tools.training import DecodeImage, RunResult, build_model, run_folder, train_run
from tools.training_config import METHODS, Method, RunConfig, read_config
from tools.training_data import prepare_data

app = typer.Typer(add_completion=False)


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", help="TOML file of the comparison, such as examples/mnist.toml.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"Of {', '.join(METHODS)}; may be repeated. Default: the file's."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="May be repeated. Default: the file's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for shards, stores and results.")] = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    cluster: ClusterOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train each method with each seed through the same loop, and print accuracy, samples and seconds side by side.

    Every finished run is a line in <out>/results.jsonl; run again, the command does only what is missing.

    Example: dynams train --config examples/mnist.toml --method dynams --seed 0
    """
    chosen = _chosen(read_config(config), method, seed, out)
    source = scheduler_source(scheduler, scheduler_file, cluster)
    require_matplotlib()
    data, test = prepare_data(chosen)
    planned = announce(chosen, data)
    with dask_client(scheduler=source, workers=workers, device=chosen.training.device) as client:
        results = [
            _finished(chosen, name, number) or _run(chosen, name, number, data, test, client)
            for number in chosen.seeds
            for name in chosen.methods
        ]
    plots = [planned, *_plots(chosen, results)]
    files = [chosen.out / "results.jsonl", *plots, chosen.out / "stores", chosen.out / "shards"]
    show(
        {"results": [asdict(result) for result in results], "files": [str(file) for file in files]},
        "\n".join([table(results), "", verdict(results), "", "Files to look at:", *(f"  {file}" for file in files)]),
        json,
    )


def _chosen(config: RunConfig, methods: list[str] | None, seeds: list[int] | None, out: Path | None) -> RunConfig:
    unknown = [name for name in methods or [] if name not in METHODS]
    if unknown:
        raise UsageError(f"--method {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}")
    changes = {"methods": tuple(methods or ()), "seeds": tuple(seeds or ()), "out": out}
    return config.model_copy(update={name: value for name, value in changes.items() if value})


def announce(config: RunConfig, data: Store) -> Path:
    """Tell what the schedule selects and what that costs, before anything is trained; the plot's path."""
    schedule, samples = config.schedule(), data.dataset().samples
    width, every = config.model.width, config.model.every
    image, *_ = DecodeImage(config, data)(SelectedSamples(data, round=None)[0])
    costs = count_flops(build_model(config).cpu(), image.shape, [width], head=config.model.head)[width]
    say(schedule_text(schedule, schedule_rows(schedule, samples)))
    say("")
    say(cost_text(compared(schedule, samples, costs, width=width, every=every), "FLOPs"))
    say("")
    path = config.out / "schedule.png"
    plot_schedule(schedule, costs_by_epoch(schedule, samples, costs, width=width, every=every), "FLOPs", path)
    return path


def _run(config: RunConfig, method: Method, seed: int, data: Store, test: Store, client: Client) -> RunResult:
    store = Store(run_folder(config, method, seed))
    build_index(store, data.dataset().urls)
    with progress_bar(f"{method}, seed {seed}", "epochs") as report:
        result = train_run(config, method, seed, store, test, client, report)
    say(f"{method}, seed {seed}: {100 * result.accuracy:.2f} % in {result.seconds:.1f} s")
    with _results_file(config).open("a") as file:
        file.write(json_module.dumps({"config": _digest(config), **asdict(result)}) + "\n")
    return result


def _finished(config: RunConfig, method: str, seed: int) -> RunResult | None:
    """The line of a run that was done before with this very configuration."""
    if not _results_file(config).exists():
        return None
    for line in reversed(_results_file(config).read_text().splitlines()):
        fields = json_module.loads(line)
        if fields.pop("config") == _digest(config) and (fields["method"], fields["seed"]) == (method, seed):
            say(f"{method}, seed {seed}: done before, taken from {_results_file(config)}")
            return RunResult(**{**fields, "rounds": tuple(fields["rounds"])})
    return None


def _results_file(config: RunConfig) -> Path:
    return config.out / "results.jsonl"


def _digest(config: RunConfig) -> str:
    """What a result depends on: everything but which methods, seeds and folder were asked for."""
    text = config.model_dump_json(exclude={"methods", "seeds", "out"})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plots(config: RunConfig, results: Sequence[RunResult]) -> list[Path]:
    """The margin histograms of the first DynaMS run."""
    first = next((result for result in results if result.method == "dynams"), None)
    if first is None:
        return []
    store = Store(run_folder(config, first.method, first.seed))
    path = config.out / "margins.png"
    scored = [made for made in map(store.round, first.rounds) if made.manifest["score_parts"]]
    plot_margins(scored, path, f"{config.data.dataset}: margins by round, seed {first.seed}")
    return [path]


# ---- the table -------------------------------------------------------------------------------------------------------


def table(results: Sequence[RunResult]) -> str:
    """Mean ± standard deviation over the seeds, a line a method."""
    lines = [
        f"{'method':<13} {'test accuracy, %':>18} {'samples trained on':>20} {'seconds':>16} {'of it scoring':>14}"
    ]
    for method in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == method]
        lines.append(
            f"{method:<13} {_spread([100 * one.accuracy for one in runs], 2):>18} "
            f"{round(statistics.mean(one.samples for one in runs)):>20,} "
            f"{_spread([one.seconds for one in runs], 1):>16} "
            f"{statistics.mean(one.scoring_seconds for one in runs):>14.1f}"
        )
    seeds = len({result.seed for result in results})
    return "\n".join([*lines, f"mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}"])


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def verdict(results: Sequence[RunResult]) -> str:
    """How DynaMS compares, in words; never a win inside one standard deviation."""
    methods = {result.method for result in results}
    if "dynams" not in methods or len(methods) < 2:
        return "Run DynaMS and at least one other method to compare them."
    lines = []
    for other in (name for name in METHODS if name in methods and name != "dynams"):
        lines.append(_compare(results, other))
    return "\n".join(lines)


def _compare(results: Sequence[RunResult], other: str) -> str:
    mine = [result for result in results if result.method == "dynams"]
    theirs = [result for result in results if result.method == other]
    accuracies = [100 * one.accuracy for one in mine], [100 * one.accuracy for one in theirs]
    difference = statistics.mean(accuracies[0]) - statistics.mean(accuracies[1])
    samples = statistics.mean(one.samples for one in mine) / statistics.mean(one.samples for one in theirs)
    seconds = statistics.mean(one.seconds for one in mine) / statistics.mean(one.seconds for one in theirs)
    costs = f"with {100 * samples:.0f} % of its samples and {100 * seconds:.0f} % of its seconds"
    if min(len(values) for values in accuracies) < 2:
        return f"DynaMS against {other}: {difference:+.2f} points {costs}; one seed says nothing about the spread."
    deviation = max(statistics.stdev(values) for values in accuracies)
    if abs(difference) <= deviation:
        outcome = (
            f"no difference beyond the spread ({difference:+.2f} points, larger standard deviation {deviation:.2f})"
        )
    else:
        outcome = f"{'better' if difference > 0 else 'worse'} by {abs(difference):.2f} points (spread {deviation:.2f})"
    return f"DynaMS against {other}: {outcome}, {costs}."


if __name__ == "__main__":
    run(app, name="dynams train")
