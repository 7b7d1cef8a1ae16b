"""Tables and plots of what `accuracy.py` has run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynams_stream.costs import StepCosts, count_flops
from tools.training import build_model
from tools.training_config import RunConfig

SHAPE = (1, 28, 28)
FULL = "full data, 12 epochs"


@dataclass(frozen=True)
class Row:
    """One setting: what its runs measured.

    Attributes:
        condition, name: of the setting.
        accuracies: test accuracy of each seed, in percent.
        samples: trained on, mean.
        flops: of one run: training, the proxy's training, scoring and comparing with the model; mean.
        seconds: processor seconds of each run.
        overlap: mean share of the model's selection that the proxy selected, over all rounds; None without a proxy.
    """

    condition: str
    name: str
    accuracies: tuple[float, ...]
    samples: float
    flops: float
    seconds: tuple[float, ...]
    overlap: float | None

    @property
    def accuracy(self) -> float:
        """Mean."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 of one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def row_of(condition: str, name: str, config: RunConfig, lines: Sequence[dict[str, Any]]) -> Row:
    """Sum up the runs of one setting."""
    width = config.model.width
    costs = count_flops(build_model(config), SHAPE, [width])[width]
    overlaps = [one["overlap"] for line in lines for one in line["faithfulness"] if one["overlap"] is not None]
    return Row(
        condition=condition,
        name=name,
        accuracies=tuple(100 * line["accuracy"] for line in lines),
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


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a setting; FLOPs and seconds as shares of full data's, under the same condition."""
    lines = [
        "| data | method | seeds | test accuracy, % | samples | FLOPs | processor seconds | overlap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        full = next((one for one in rows if one.condition == row.condition and one.name in ("full data", FULL)), None)
        seconds = statistics.mean(row.seconds)
        shares = ("–", f"{seconds:.0f}")
        if full is not None:
            shares = (
                f"{100 * row.flops / full.flops:.0f} %",
                f"{seconds:.0f} ({100 * seconds / statistics.mean(full.seconds):.0f} %)",
            )
        overlap = "–" if row.overlap is None else f"{row.overlap:.2f}"
        lines.append(
            f"| {row.condition} | {row.name} | {len(row.accuracies)} | {row.accuracy:.2f} ± {row.deviation:.2f} "
            f"| {row.samples:,.0f} | {shares[0]} | {shares[1]} | {overlap} |"
        )
    return "\n".join(lines)


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against processor seconds and FLOPs: full data for fewer epochs as a line, DynaMS as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    full = [row for row in rows if row.name.startswith("full data,") and row.name.endswith("epochs")]
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
        for scorer, colour in (("proxy", "tab:blue"), ("model", "tab:orange")):
            points = [row for row in rows if row.name.startswith(scorer)]
            panel.errorbar(
                [cost(row) for row in points], [row.accuracy for row in points], [row.deviation for row in points],
                fmt="o", color=colour, capsize=2, alpha=0.8, label=f"DynaMS, scored by the {scorer}",
            )  # fmt: skip
            for row in points:
                short = row.name.removeprefix(scorer).removeprefix(", ") or "default"
                panel.annotate(short, (cost(row), row.accuracy), fontsize=6, xytext=(3, 2), textcoords="offset points")
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="test accuracy, %")
    panels[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
