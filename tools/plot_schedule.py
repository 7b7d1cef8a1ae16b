"""A schedule as a picture: the fraction of each epoch, and what the run has cost by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dynams_stream.schedule import Schedule

LINE, ROUND = "#1b6ca8", "#d1495b"
COLOURS = ("#444444", "#d1495b", "#1b6ca8")


def plot_schedule(schedule: Schedule, costs: Mapping[str, Sequence[float]], unit: str, path: Path) -> None:
    """Draw the schedule above, the costs that have run up below.

    Args:
        schedule: what is drawn; rounds begin at the dots.
        costs: by name, the cost of each epoch.
        unit: of the costs.
        path: PNG file to write.

    It needs matplotlib; ask `require_matplotlib` before.
    """
    from matplotlib.figure import Figure

    epochs = np.arange(schedule.epochs)
    fractions = np.array([schedule.fraction(int(epoch)) for epoch in epochs])
    begins = np.array([schedule.starts_round(int(epoch)) for epoch in epochs])
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.step(np.append(epochs, schedule.epochs), np.append(fractions, fractions[-1]), where="post", color=LINE)
    above.plot(epochs[begins], fractions[begins], "o", color=ROUND, markersize=4, label="a round begins")
    above.set_ylim(0, 1.05)
    above.set_ylabel("fraction γ")
    above.legend(frameon=False)
    above.set_title(f"{type(schedule).__name__}, mean fraction {schedule.mean_fraction():.3f}", fontsize=10)
    for (name, each), colour in zip(costs.items(), COLOURS, strict=False):
        below.plot(np.arange(schedule.epochs + 1), np.concatenate([[0], np.cumsum(each)]), color=colour, label=name)
    below.set_xlabel("epochs done")
    below.set_ylabel(unit)
    below.set_ylim(bottom=0)
    below.legend(frameon=False, fontsize=8)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
