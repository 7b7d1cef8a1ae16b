"""Tables and plots of what `accuracy.py` has run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynams_stream.costs import StepCosts, count_flops
from tools.training import build_model
from tools.training_config import RunConfig

SHAPE = (1, 28, 28)
FULL = "full data"


@dataclass(frozen=True)
class Row:
    """One setting: what its runs measured.

    Attributes:
        condition, name: of the setting.
        accuracies: test accuracy by seed, in percent.
        samples: trained on, mean.
        flops: of one run: training, the proxy's training, scoring and comparing with the model; mean.
        seconds: processor seconds of each run.
        overlap: mean share of the model's selection that the proxy selected, over all rounds; None without a proxy.
    """

    condition: str
    name: str
    accuracies: Mapping[int, float]
    samples: float
    flops: float
    seconds: tuple[float, ...]
    overlap: float | None

    @property
    def accuracy(self) -> float:
        """Mean."""
        return statistics.mean(self.accuracies.values())

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 of one."""
        return _deviation(list(self.accuracies.values()))

    def gain(self, other: Row) -> tuple[float, float]:
        """Mean and standard deviation of the differences to another setting's runs with the same seeds.

        A seed decides on the initial weights and the order of the first epochs: its runs have their luck in common.
        """
        gains = [
            self.accuracies[seed] - other.accuracies[seed] for seed in self.accuracies.keys() & other.accuracies.keys()
        ]
        return statistics.mean(gains), _deviation(gains)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def row_of(condition: str, name: str, config: RunConfig, lines: Sequence[dict[str, Any]]) -> Row:
    """Sum up the runs of one setting."""
    width = config.model.width
    costs = count_flops(build_model(config), SHAPE, [width])[width]
    overlaps = [one["overlap"] for line in lines for one in line["faithfulness"] if one["overlap"] is not None]
    return Row(
        condition=condition,
        name=name,
        accuracies={line["seed"]: 100 * line["accuracy"] for line in lines},
        samples=statistics.mean(line["samples"] for line in lines),
        flops=statistics.mean(run_flops(line, config, costs) for line in lines),
        seconds=tuple(line["processor_seconds"] for line in lines),
        overlap=statistics.mean(overlaps) if overlaps else None,
    )


def run_flops(line: dict[str, Any], config: RunConfig, costs: StepCosts) -> float:
    """FLOPs of a run, from the samples that it counted."""
    score = costs.proxy_forward if config.selection.scorer == "proxy" else costs.forward
    compared = sum(one["samples"] for one in line["faithfulness"])
    return (
        line["samples"] * costs.training
        + line["proxy_samples"] * costs.proxy_training
        + line["scored_samples"] * score
        + compared * costs.forward
    )


def table(rows: Sequence[Row], against: str = FULL) -> str:
    """Markdown, a line a setting.

    Args:
        rows: the settings, of any conditions.
        against: the setting that differences are taken to, seed by seed. FLOPs and seconds are shares of full data's.
    """
    lines = [
        f"| data | method | seeds | test accuracy, % | against {against} | samples | FLOPs | processor s | overlap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = {one.name: one for one in rows if one.condition == row.condition}
        full, other = beside.get(FULL), beside.get(against)
        gain = "–" if other is None or other is row else "{:+.2f} ± {:.2f}".format(*row.gain(other)).replace("-", "−")
        flops, seconds = "–", f"{statistics.mean(row.seconds):.0f}"
        if full is not None:
            flops = f"{100 * row.flops / full.flops:.0f} %"
            seconds += f" ({100 * statistics.mean(row.seconds) / statistics.mean(full.seconds):.0f} %)"
        overlap = "–" if row.overlap is None else f"{row.overlap:.2f}"
        lines.append(
            f"| {row.condition} | {row.name} | {len(row.accuracies)} | {_accuracy(row)} "
            f"| {gain} | {row.samples:,.0f} | {flops} | {seconds} | {overlap} |"
        )
    return "\n".join(lines)


def selections(named: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> str:
    """Markdown: of the settings that score, over their seeds, the least and the most of what their rounds say.

    Args:
        named: the lines of each (condition, name).
    """
    lines = ["| data | method | overlap, first round | last round | labels contradicted, first round | last round |"]
    lines.append("|---|---|---|---|---|---|")
    for (condition, name), runs in named.items():
        overlaps = [[one["overlap"] for one in run["faithfulness"]] for run in runs if run["faithfulness"]]
        contradicted = [[one for one in run.get("label_disagreement", ()) if one is not None] for run in runs]
        both = (overlaps, contradicted)
        spans = [_span([each[place] for each in told if each]) for told in both for place in (0, -1)]
        if any(span != "–" for span in spans):
            lines.append(f"| {condition} | {name} | {' | '.join(spans)} |")
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f} ({len(values)} runs)" if values else "–"


def by_budget(rows: Sequence[Row]) -> str:
    """Markdown, a table for each condition: methods by mean budgets, accuracy and share of full data's seconds."""
    tables = []
    for condition in dict.fromkeys(row.condition for row in rows):
        own = [row for row in rows if row.condition == condition]
        full, methods = _full(own), _methods(own)
        budgets = list(dict.fromkeys(budget for points in methods.values() for budget in points))
        lines = [
            f"| {condition} | " + " | ".join(f"{budget:g}" for budget in budgets) + " |",
            "|---" * (1 + len(budgets)) + "|",
        ]
        if full is not None:
            lines.append(f"| {FULL}: {_accuracy(full)}" + " | " * len(budgets) + " |")
        for method, points in methods.items():
            cells = [_cell(points[budget], full) if budget in points else "–" for budget in budgets]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(row: Row, full: Row | None) -> str:
    share = "" if full is None else f" ({100 * statistics.mean(row.seconds) / statistics.mean(full.seconds):.0f} %)"
    return f"{_accuracy(row)}{share}"


def _full(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.name == FULL), None)


def _accuracy(row: Row) -> str:
    return f"{row.accuracy:.2f} ± {row.deviation:.2f}"


def _methods(rows: Sequence[Row]) -> dict[str, dict[float, Row]]:
    """The rows of a condition by method and mean budget, which their names begin with."""
    methods: dict[str, dict[float, Row]] = {}
    for row in rows:
        budget, found, method = row.name.partition(": ")
        if found:
            methods.setdefault(method, {})[float(budget)] = row
    return methods


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against processor seconds and FLOPs: full data for fewer epochs as a line, DynaMS as numbered points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    *panels, names = figure.subplots(1, 3, width_ratios=(5, 5, 1.6))
    full = [row for row in rows if row.name == FULL or (row.name.startswith(FULL) and row.name.endswith("epochs"))]
    points = [row for row in rows if row.name.startswith(tuple(_SCORERS))]
    for panel, label, cost in zip(
        panels,
        ("processor seconds", "FLOPs"),
        (lambda row: statistics.mean(row.seconds), lambda row: row.flops),
        strict=True,
    ):
        panel.errorbar(
            [cost(row) for row in full], [row.accuracy for row in full], [row.deviation for row in full],
            marker="o", color="black", capsize=2, label="full data, 3 to 12 epochs",
        )  # fmt: skip
        for scorer, colour in _SCORERS.items():
            own = [row for row in points if row.name.startswith(scorer)]
            panel.errorbar(
                [cost(row) for row in own], [row.accuracy for row in own], [row.deviation for row in own],
                fmt="o", color=colour, capsize=2, alpha=0.7, elinewidth=0.8, label=f"DynaMS, scored by the {scorer}",
            )  # fmt: skip
        for number, row in enumerate(points, 1):
            place = (cost(row), row.accuracy)
            panel.annotate(str(number), place, fontsize=7, xytext=(4, 3), textcoords="offset points")
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="test accuracy, %")
    panels[0].legend(fontsize=8, loc="lower right")
    names.axis("off")
    text = "\n".join(f"{number:>2}  {row.name}" for number, row in enumerate(points, 1))
    names.text(0, 1, text, va="top", fontsize=8, family="monospace")
    figure.savefig(path, dpi=130)


_SCORERS = {"proxy": "tab:blue", "model": "tab:orange"}


def plot_budgets(rows: Sequence[Row], path: Path) -> None:
    """Test error by mean budget, a line for each method; a panel for each condition, with full data as a band.

    Errors are on a logarithmic scale: some methods end near chance, others differ by a tenth of a point.
    """
    import matplotlib
    from matplotlib.figure import Figure

    conditions = list(dict.fromkeys(row.condition for row in rows))
    named = list(_methods(rows))
    colours = dict(zip(named, matplotlib.colormaps["tab20"].colors, strict=False))
    figure = Figure(figsize=(5.2 * len(conditions), 5.5), layout="constrained")
    for panel, condition in zip(figure.subplots(1, len(conditions), squeeze=False)[0], conditions, strict=True):
        own = [row for row in rows if row.condition == condition]
        full, methods = _full(own), _methods(own)
        if full is not None:
            span = 100 - full.accuracy - full.deviation, 100 - full.accuracy + full.deviation
            panel.axhspan(*span, color="black", alpha=0.15, label="full data, mean ± sd")
        for method, points in methods.items():
            shift = 1 + 0.012 * (named.index(method) - len(named) / 2)  # error bars beside each other
            panel.errorbar(
                [budget * shift for budget in points], [100 - row.accuracy for row in points.values()],
                [row.deviation for row in points.values()], marker="o", markersize=4, capsize=2, linewidth=1,
                linestyle="-" if method.startswith("DynaMS") else ":", color=colours[method], label=method,
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="mean budget, warm-up included", title=condition)
        panel.minorticks_off()
        panel.set_xticks([0.1, 0.3, 0.6], ["0.1", "0.3", "0.6"])
        low, high = panel.get_ylim()
        ticks = [error for error in (1, 1.2, 1.4, 1.6, 2, 3, 5, 10, 15, 20, 30, 50, 90) if low <= error <= high]
        panel.set_yticks(ticks, [f"{error:g}" for error in ticks])
        panel.invert_yaxis()
        panel.grid(alpha=0.3)
    figure.axes[0].set(ylabel="test error, % (better is higher)")
    entries = {
        label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
