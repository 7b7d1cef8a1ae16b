"""The margin histogram by round: what was selected, and where the cut lay."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynams_stream.errors import MissingExtraError
from dynams_stream.store import Round

SELECTED, REST = "#d1495b", "#c9d1d9"
COLUMNS = 3


def require_matplotlib() -> None:
    """Refuse to begin what ends in a plot without matplotlib.

    Raises:
        MissingExtraError: names the extra to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plots need matplotlib: pip install 'dynams-stream[train]'")


def plot_margins(rounds: Sequence[Round], path: Path, title: str, most: int = 9) -> None:
    """Draw one small histogram a round: signed margins of all samples, the selected ones in colour, the cut dashed.

    Args:
        rounds: published rounds with score tables, oldest first; at most `most` of them, evenly spread, are drawn.
        path: PNG file to write.
        title: headline.
        most: how many rounds to draw.

    It needs matplotlib; ask `require_matplotlib` before the work that leads here.
    """
    from matplotlib.figure import Figure

    shown = [rounds[i] for i in np.unique(np.linspace(0, len(rounds) - 1, min(most, len(rounds))).round().astype(int))]
    margins = [_margins(one) for one in shown]
    everything = np.concatenate([values for values, _ in margins])
    high = float(np.percentile(everything, 99.9))
    low = min(0.0, max(-high, float(everything.min())))
    bins = np.linspace(low, high, 61)
    columns = min(COLUMNS, len(shown)) if len(shown) != 4 else 2
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.5 * lines + 1.0), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, one, (values, selected) in zip(axes, shown, margins, strict=False):
        _histogram(axis, one, np.clip(values, bins[0], bins[-1]), selected, bins)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    axes[0].legend(loc="upper right", frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.supxlabel(
        "margin: distance to the nearest decision boundary, negative where the prediction is wrong", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _histogram(axis: Any, published: Round, values: np.ndarray, selected: np.ndarray, bins: np.ndarray) -> None:
    axis.hist(
        [values[selected], values[~selected]],
        bins=bins, stacked=True, color=[SELECTED, REST], label=["selected", "not selected"],
    )  # fmt: skip
    cut, counts = published.manifest["threshold"], published.counts
    title = f"round {published.number}, epoch {published.epoch}: {counts['selected']:,} of {counts['all']:,}"
    if isinstance(cut, float):
        axis.axvline(cut, color="black", linestyle="--", linewidth=1, label="cut")
        title += f", cut {cut:.3g}"
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_title(title, fontsize=9)
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)


def _margins(published: Round) -> tuple[np.ndarray, np.ndarray]:
    """Signed margins of all scored samples of a round, and which of them were selected."""
    table = published.scores().to_table(columns=["shard", "row", "margin"])
    shards, rows = table["shard"].to_numpy(), table["row"].to_numpy()
    selection = published.selection()
    selected = np.zeros(len(rows), dtype=bool)
    for shard in np.unique(shards):
        inside = shards == shard
        selected[inside] = np.isin(rows[inside], selection.rows(int(shard)))
    margins = table["margin"].to_numpy(zero_copy_only=False).astype(np.float64)
    known = np.isfinite(margins)
    return margins[known], selected[known]
