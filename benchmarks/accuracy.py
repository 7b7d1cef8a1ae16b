"""What training on selections gives, and what it costs: MNIST, real training runs, one line of JSON each.

    python benchmarks/accuracy.py headline            # the power schedule to γ = 0.1 against its rivals
    python benchmarks/accuracy.py frontier            # accuracy against seconds and FLOPs, over the options
    python benchmarks/accuracy.py budgets             # all methods at mean budgets of 0.6, 0.3 and 0.1
    python benchmarks/accuracy.py headline --table    # the table of what has run

Runs of `tools/training.py`, the loop of `dynams train`: the same small network, optimizer and data path for all. A run
that is done (a line in benchmarks/accuracy.jsonl, which the repository keeps) is not done again: a stopped benchmark
goes on where it was, and tables can be made of the lines without hours of runs. `--lines` with the name of another file
does them again.

Two runs go side by side, each in one process on one core: it decodes, trains and scores (in a Dask worker of the same
process) there, so that processor seconds are all that it cost and other work on the machine disturbs them little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.training_config import RunConfig

CONDITIONS: dict[str, dict[str, float]] = {
    "clean": {},
    "10 % wrong labels": {"wrong_labels": 0.1},
    "long tail": {"imbalance": 100.0},
}
SEEDS = 5
LINES = Path(__file__).with_suffix(".jsonl")


@dataclass(frozen=True)
class Setting:
    """One line of a table: a method with its options, under one condition of the data.

    Attributes:
        name: as the table has it.
        method: of `dynams train`.
        condition: of `CONDITIONS`.
        changes: of the configuration, by section.
    """

    name: str
    method: str
    condition: str = "clean"
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def config(self, folder: Path) -> RunConfig:
        """The whole configuration of its runs."""
        sections = {name: {**base, **self.changes.get(name, {})} for name, base in BASE.items()}
        sections["data"] |= CONDITIONS[self.condition]
        out = folder / self.condition.replace(" ", "-").replace("%", "percent")
        return RunConfig(out=out, **sections)  # type: ignore[arg-type]


BASE: dict[str, dict[str, Any]] = {
    "data": {
        "dataset": "mnist",
        "root": str(Path(__file__).resolve().parents[2] / "shared" / "data"),
        "transform": "examples.models:grayscale",
    },
    "model": {
        "factory": "examples.models:small_cnn",
        "args": {"width": 16, "stride": 2},
        "channels_last": True,
        "width": 0.5,
    },
    "training": {"epochs": 12, "batch_size": 128, "learning_rate": 0.1, "loader_workers": 0},
    "selection": {
        "schedule": "power",
        "final": 0.1,
        "warmup": 2,
        "interval": 5,
        "scorer": "proxy",
        "calibration_samples": 2000,
    },
}

# ---- the settings ----------------------------------------------------------------------------------------------------

BY_MODEL = {"scorer": "model"}


def dynams(name: str, condition: str = "clean", model: dict[str, Any] | None = None, **selection: Any) -> Setting:
    """DynaMS with some options."""
    return Setting(name, "dynams", condition, {"model": model or {}, "selection": selection})


def headline() -> Iterator[Setting]:
    """The power schedule to γ = 0.1."""
    for condition in ("clean", "10 % wrong labels"):
        yield Setting("full data", "full", condition)
        yield Setting("full data, as many steps", "short", condition)
        yield Setting("random", "random", condition)
        yield Setting("fresh random", "fresh-random", condition)
        yield Setting("static distance", "static", condition)
        yield dynams("DynaMS, proxy", condition)
        for interval in (2, 3):
            yield dynams(f"DynaMS, proxy, interval {interval}", condition, interval=interval)
        yield dynams("DynaMS, proxy, not calibrated", condition, calibration_samples=0)
        yield dynams("DynaMS, model", condition, **BY_MODEL)
        yield dynams("DynaMS, model, abs(margin)", condition, strategy="abs(margin)", **BY_MODEL)


def budgets() -> Iterator[Setting]:
    """Every method at mean fractions of 0.6, 0.3 and 0.1, warm-up included.

    At 0.1 a warm-up on everything would use it up: there is none, or one on random samples.
    """
    for condition in CONDITIONS:
        yield Setting("full data", "full", condition)
        for budget in (0.6, 0.3, 0.1):
            power = {"final": None, "budget": budget, "warmup": 0 if budget == 0.1 else 2}
            constant = {
                **power,
                "schedule": "constant",
                "interval": 1,
                "warmup": 0,
                "anneal": 0 if budget == 0.1 else 1,
            }
            changes = {"selection": power}
            yield Setting(f"{budget}: full data, as many steps", "short", condition, changes)
            yield Setting(f"{budget}: random", "random", condition, changes)
            yield Setting(f"{budget}: fresh random", "fresh-random", condition, changes)
            yield Setting(f"{budget}: InfoBatch's rule", "infobatch", condition, {"selection": constant})
            yield Setting(f"{budget}: static distance", "static", condition, changes)
            yield dynams(f"{budget}: DynaMS, proxy", condition, **power)
            for name, strategy in {
                "DynaMS, model": "distance",
                "DynaMS, model, abs(margin)": "abs(margin)",
                "largest loss, model": "-loss",
                "largest EL2N, model": "-el2n",
            }.items():
                yield dynams(f"{budget}: {name}", condition, strategy=strategy, **power, **BY_MODEL)
            if budget == 0.1:
                warm = {**power, "warmup": 4, "warmup_fraction": 0.1}
                yield Setting(f"{budget}: static distance, random warm-up", "static", condition, {"selection": warm})
                yield dynams(f"{budget}: DynaMS, proxy, random warm-up", condition, **warm)
                yield dynams(f"{budget}: DynaMS, model, random warm-up", condition, **warm, **BY_MODEL)
            if condition == "long tail":
                for name, quotas in {
                    "class_balance": {"class_balance": True},
                    "30 per class": {"min_per_class": 30},
                }.items():
                    yield dynams(f"{budget}: DynaMS, model, {name}", condition, **quotas, **power, **BY_MODEL)


def frontier() -> Iterator[Setting]:
    """Full data for fewer epochs, and DynaMS with one option after another changed."""
    for epochs in (3, 4, 6, 8):
        yield Setting(f"full data, {epochs} epochs", "full", changes={"training": {"epochs": epochs}})
    yield Setting("full data", "full")
    # Everything, with a proxy that is trained along and hardly used: what the second loss does by itself.
    yield dynams("full data, proxy trained along", schedule="constant", final=1.0, warmup=11)
    yield dynams("proxy")
    yield dynams("model", **BY_MODEL)
    for interval in (1, 2, 3):
        yield dynams(f"proxy, interval {interval}", interval=interval)
        yield dynams(f"model, interval {interval}", interval=interval, **BY_MODEL)
    for every in (2, 4, 8):
        yield dynams(f"proxy, every {every}", model={"every": every})
    for weight in (0.5, 0.2):
        yield dynams(f"proxy, weight {weight}", model={"proxy_weight": weight})
    for width in (0.25, 0.75):
        yield dynams(f"proxy, width {width}", model={"width": width})
    for schedule in ("linear", "cosine", "exponential"):
        yield dynams(f"proxy, {schedule}", schedule=schedule)
    for final in (0.05, 0.2, 0.3):
        yield dynams(f"proxy, final {final}", final=final)
        yield dynams(f"model, final {final}", final=final, **BY_MODEL)
    for warmup in (1, 3):
        yield dynams(f"proxy, warm-up {warmup}", warmup=warmup)
    yield dynams("proxy, anneal 1", anneal=1)
    for epochs in (8, 10, 16):
        training = {"epochs": epochs}
        yield Setting(f"proxy, {epochs} epochs", "dynams", changes={"training": training})
        yield Setting(f"model, {epochs} epochs", "dynams", changes={"training": training, "selection": BY_MODEL})


GROUPS = {"headline": headline, "budgets": budgets, "frontier": frontier}

# ---- running them ----------------------------------------------------------------------------------------------------


def digest(setting: Setting, folder: Path) -> str:
    """What a result depends on, its seed aside. Settings that are not named are left out, so that new ones may come."""
    elsewhere = {"methods": True, "seeds": True, "out": True, "data": {"root"}}
    config = setting.config(folder).model_dump_json(exclude=elsewhere, exclude_unset=True)
    return hashlib.sha256(f"{setting.method} {config}".encode()).hexdigest()[:16]


def finished(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines of all runs that are done, by digest and seed."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {(line["digest"], line["seed"]): line for line in lines}


def run(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """One run, in this process: its line."""
    import torch
    from distributed import Client

    from dynams_stream.store import Store
    from pipeline.index_job import build_index
    from tools.training import train_run

    config = setting.config(folder)
    data, test = (Store(config.out / "shards" / split) for split in ("train", "test"))
    store = Store(folder / "stores" / f"{digest(setting, folder)}-{seed}")
    shutil.rmtree(store.url, ignore_errors=True)
    build_index(store, data.dataset().urls)
    torch.set_num_threads(1)
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        result = train_run(config, setting.method, seed, store, test, client, lambda *_: None)  # type: ignore[arg-type]
    rounds = [store.round(number).manifest for number in result.rounds]
    shutil.rmtree(store.url)
    return {
        "digest": digest(setting, folder),
        "condition": setting.condition,
        "name": setting.name,
        **asdict(result),
        "fractions": [one["counts"]["selected"] / one["counts"]["all"] for one in rounds],
        "label_disagreement": [one["guards"]["label_disagreement"] for one in rounds if one.get("guards")],
        "faithfulness": [one["faithfulness"] for one in rounds if one.get("faithfulness")],
    }


def one_core(cores: Any) -> None:
    """Keep this process on one of the cores, as long as there are free ones."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if not cores.empty():
        os.sched_setaffinity(0, {cores.get()})


def prepare(settings: Sequence[Setting], folder: Path) -> None:
    """Write the shards of each condition."""
    from tools.training_data import prepare_data

    for config in {setting.condition: setting.config(folder) for setting in settings}.values():
        prepare_data(config)


def run_all(settings: Sequence[Setting], seeds: int, jobs: int, folder: Path, path: Path) -> None:
    """Do what is not done, the first seed of everything first, and append a line for each run."""
    prepare(settings, folder)
    done = finished(path)
    missing = [
        (setting, seed) for seed in range(seeds) for setting in settings if (digest(setting, folder), seed) not in done
    ]
    print(f"{len(missing)} of {len(settings) * seeds} runs to do", flush=True)
    context = get_context("spawn")
    cores = context.Queue()
    for core in sorted(os.sched_getaffinity(0))[:jobs]:
        cores.put(core)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=one_core, initargs=(cores,)) as pool:
        waiting = {pool.submit(run, setting, seed, folder): setting for setting, seed in missing}
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                line = future.result()
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{number}/{len(missing)} {line['condition']}, {line['name']}, seed {line['seed']}: "
                    f"{100 * line['accuracy']:.2f} %, {line['processor_seconds']:.0f} s",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    """Run, or print a table."""
    parser = argparse.ArgumentParser(description="What training on selections gives and costs; see the docstring.")
    parser.add_argument("group", choices=list(GROUPS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, one core each")
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/accuracy"), help="of shards, stores and plots")
    parser.add_argument("--lines", type=Path, default=LINES, help="the file with a line for each run")
    parser.add_argument("--table", action="store_true", help="print the table of what has run, and run nothing")
    parser.add_argument("--against", default="full data", help="the setting that the table takes differences to")
    options = parser.parse_args()
    settings = [setting for setting in GROUPS[options.group]() if options.only in setting.name]
    if not options.table:
        run_all(settings, options.seeds, options.jobs, options.folder, options.lines)
    report(options.group, settings, options)


def report(group: str, settings: Sequence[Setting], options: argparse.Namespace) -> None:
    """Print the table of what has run, and draw its plot."""
    from accuracy_table import by_budget, plot_budgets, plot_frontier, row_of, selections, table

    folder, done = options.folder, finished(options.lines)
    rows, named = [], {}
    for setting in settings:
        lines = [done[key] for seed in range(options.seeds) if (key := (digest(setting, folder), seed)) in done]
        if lines:
            rows.append(row_of(setting.condition, setting.name, setting.config(folder), lines))
            named[setting.condition, setting.name] = lines
    print(f"{table(rows, options.against)}\n\n{selections(named)}")
    if group == "budgets" and rows:
        print(f"\n{by_budget(rows)}")
    plots = {"frontier": plot_frontier, "budgets": plot_budgets}
    if group in plots and rows:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{group}.png"
        plots[group](rows, path)
        print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
