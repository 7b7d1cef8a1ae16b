"""The pictures of `streaming.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

STYLES: dict[str, tuple[str, str, str]] = {  # colour, marker, line
    "ours": ("#c1121f", "o", "-"),
    "ours-first": ("#c1121f", "o", ":"),
    "ours-saving": ("#f77f00", "o", "--"),
    "pread": ("black", "x", "--"),
    "memory": ("black", "x", "--"),
    "obstore": ("black", "x", "--"),
    "server": ("grey", "x", ":"),
    "webdataset": ("#1d4e89", "s", "-"),
    "mosaic": ("#2a9d8f", "^", "-"),
    "litdata": ("#7b2cbf", "v", "-"),
    "litdata-subset": ("#7b2cbf", "v", ":"),
    "energon": ("#6b705c", "D", "-"),
}
NAMES = {
    "ours-first": "ours, first epoch",
    "ours-saving": "ours, saving requests",
    "pread": "bare os.pread loop",
    "memory": "decoding from memory",
    "obstore": "bare obstore, 64 threads",
    "server": "server's ceiling",
    "litdata-subset": "litdata subset",
    "energon": "Energon",
    "webdataset": "webdataset select",
    "mosaic": "mosaicml-streaming",
}


def draw_rates(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Rate against γ, both logarithmic, a panel for each sample size and way; writes a PNG.

    Args:
        rows: of one place and number of workers, as `streaming_table.rows` gives them.
        path: where it goes.
        title: what all panels share.
    """
    ways = [way for way in ("raw", "decode") if any(row["way"] == way for row in rows)]
    sizes = sorted({row["kilobytes"] for row in rows})
    figure, panels = plt.subplots(
        len(ways),
        len(sizes),
        figsize=(1.5 + 3.6 * len(sizes), 1.6 + 3.0 * len(ways)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    drawn: dict[str, Any] = {}
    for line, way in zip(panels, ways, strict=True):
        for panel, size in zip(line, sizes, strict=True):
            shown = [row for row in rows if (row["way"], row["kilobytes"]) == (way, size)]
            if not shown:
                panel.set_axis_off()
                continue
            drawn |= _draw_panel(panel, shown)
            panel.set_title(f"{size} KB, {'JPEG decode' if way == 'decode' else 'raw bytes'}", fontsize=10)
        next(panel for panel in line if panel.axison).set_ylabel("samples a second")
    fractions = sorted({float(row["fraction"]) for row in rows})
    for panel in panels[-1]:
        panel.set_xlabel("γ, selected part of all samples")
        panel.set_xscale("log")
        panel.set_xticks(fractions, [f"{fraction:g}" for fraction in fractions])
        panel.set_xticks([], minor=True)
        panel.set_xlim(fractions[0] / 1.3, fractions[-1] * 1.3)
    order = [name for name in STYLES if name in drawn]
    figure.legend(
        [drawn[name] for name in order],
        [NAMES.get(name, name) for name in order],
        loc="outside lower center",
        ncols=min(len(order), 1 + len(sizes)),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw_panel(panel: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One panel's lines by contender."""
    drawn = {}
    rows = sorted(rows, key=lambda row: float(row["fraction"]))
    for name, (colour, marker, line) in STYLES.items():
        points = [(float(row["fraction"]), row["rates"][name]) for row in rows if name in row["rates"]]
        if points:
            drawn[name] = panel.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                linestyle=line,
                linewidth=2.2 if name == "ours" else 1.3,
                markersize=4.5,
                zorder=3 if name.startswith("ours") else 2,
            )[0]
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(labelsize=8)
    panel.grid(True, which="major", alpha=0.3)
    return drawn
