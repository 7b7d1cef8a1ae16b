"""Does training on the smallest margins find the boundary? A teacher whose margins are known, and students of it.

    python benchmarks/teacher_student.py [--seeds 10] [--out runs/bench/teacher-student]

A teacher is a linear classifier of K classes in d dimensions with random weights; samples are standard normal, and
their labels what it says. A student of the same form begins at random and takes the same number of SGD steps on the
cross-entropy whatever the method; the methods differ in which ⌈γN⌉ samples they may draw from:

    full           all of them
    random         a fixed random subset
    fresh random   another random subset each round
    static         the smallest distances of the student after its warm-up (the first round's, kept)
    dynamic        the smallest distances of the student as it is at the beginning of each round
    falling        the same, with γ falling by the power schedule instead of at once: DynaMS as it is trained
    oracle         the smallest distances of the teacher, which only a simulation knows

Distances are the project's own (`dynams_stream.scores`), with the student's weights as the head. Measured after each
round: the angle between student and teacher (rows centred over the classes, since a common shift changes no decision),
and the share of fresh samples on which the two disagree. N/d is what decides: with many samples a dimension hard ones
say most, with few of them every sample is needed (Sorscher et al. 2022, arXiv 2206.14486, find so for perceptrons).

One JSON line a cell of (N/d, γ, wrong labels, method), all seeds in it; what is in the file is not computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynams_stream.schedule import PowerSchedule
from dynams_stream.scores import BoundaryNorms, score_batch
from dynams_stream.selection import selected_count

METHODS = ("full", "random", "fresh random", "static", "dynamic", "falling", "oracle")
COLOURS = ("#444444", "#9aa0a6", "#e0a458", "#1b6ca8", "#e58e99", "#d1495b", "#3a7d44")
CLASSES, DIMENSIONS = 5, 40
ROUNDS, STEPS, BATCH = 12, 150, 64
WARMUP = 2
"""Rounds on everything, before the first selection."""
LEARNING_RATE, WEIGHT_DECAY = 0.5, 1e-3
TEST_SAMPLES = 20_000


@dataclass(frozen=True)
class Cell:
    """What is simulated: N/d, γ, the share of wrong labels, and the method."""

    samples_per_dimension: int
    fraction: float
    wrong: float
    method: str


def distances(weight: Tensor, samples: Tensor) -> Tensor:
    """Distance of each sample to the nearest boundary of a linear classifier without bias, float32 (N,)."""
    logits = samples @ weight.T
    return score_batch(logits, torch.full((len(samples),), -1), BoundaryNorms(weight)).distance


def angle(student: Tensor, teacher: Tensor) -> float:
    """Degrees between two classifiers' weights, rows centred."""
    first, second = (weight - weight.mean(0) for weight in (student, teacher))
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


class Simulation:
    """One student of one teacher."""

    def __init__(self, cell: Cell, seed: int):
        self.cell = cell
        self.generator = torch.Generator().manual_seed(seed)  # data and teacher are the same for all methods
        self.teacher = self._normal(CLASSES, DIMENSIONS)
        count = cell.samples_per_dimension * DIMENSIONS
        self.samples, self.test = self._normal(count, DIMENSIONS), self._normal(TEST_SAMPLES, DIMENSIONS)
        self.labels = (self.samples @ self.teacher.T).argmax(1)
        wrong = torch.rand(count, generator=self.generator) < cell.wrong
        shifted = (self.labels + torch.randint(1, CLASSES, (count,), generator=self.generator)) % CLASSES
        self.labels = torch.where(wrong, shifted, self.labels)
        self.truth = (self.test @ self.teacher.T).argmax(1)
        self.student = 0.1 * self._normal(CLASSES, DIMENSIONS)
        self.schedule = PowerSchedule(ROUNDS, warmup=WARMUP, final=cell.fraction)
        self._kept: Tensor | None = None

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def run(self) -> tuple[list[float], list[float]]:
        """Angle and disagreement after each round."""
        angles, errors = [], []
        for number in range(ROUNDS):
            everything = torch.arange(len(self.samples))
            self._train(number, everything if number < WARMUP else self._pool(number, everything))
            angles.append(angle(self.student, self.teacher))
            errors.append(float(((self.test @ self.student.T).argmax(1) != self.truth).float().mean()))
        return angles, errors

    def _pool(self, number: int, everything: Tensor) -> Tensor:
        """The samples that this round may draw from."""
        method = self.cell.method
        if method == "full":
            return everything
        if method == "dynamic":
            return self._nearest(self.student, self.cell.fraction)
        if method == "falling":
            return self._nearest(self.student, self.schedule.fraction(number))
        if method == "fresh random" or self._kept is None:
            self._kept = self._choose(method)
        return self._kept

    def _choose(self, method: str) -> Tensor:
        if method == "static":
            return self._nearest(self.student, self.cell.fraction)
        if method == "oracle":
            return self._nearest(self.teacher, self.cell.fraction)
        count = selected_count(self.cell.fraction, len(self.samples))
        return torch.randperm(len(self.samples), generator=self.generator)[:count]

    def _nearest(self, weight: Tensor, fraction: float) -> Tensor:
        count = selected_count(fraction, len(self.samples))
        return torch.argsort(distances(weight, self.samples), stable=True)[:count]

    def _train(self, number: int, pool: Tensor) -> None:
        weight = self.student.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for step in range(number * STEPS, (number + 1) * STEPS):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / (ROUNDS * STEPS))) / 2
            chosen = pool[torch.randint(len(pool), (BATCH,), generator=self.generator)]
            loss = torch.nn.functional.cross_entropy(self.samples[chosen] @ weight.T, self.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.student = weight.detach()


# ---- the program -----------------------------------------------------------------------------------------------------


def cells() -> Iterator[Cell]:
    """Everything that is simulated."""
    for ratio, fraction, wrong in itertools.product((5, 20, 100, 500), (0.3, 0.1), (0.0, 0.1)):
        yield from (Cell(ratio, fraction, wrong, method) for method in METHODS)


def simulate(path: Path, seeds: int) -> list[dict[str, Any]]:
    """Compute the cells that the file lacks; all of its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {
        (line["samples_per_dimension"], line["fraction"], line["wrong"], line["method"], line["seeds"])
        for line in lines
    }
    for cell in cells():
        if (*asdict(cell).values(), seeds) in done:
            continue
        results = [Simulation(cell, seed).run() for seed in range(seeds)]
        line = {
            **asdict(cell), "seeds": seeds,
            "angles": [one[0] for one in results], "errors": [one[1] for one in results],
        }  # fmt: skip
        lines.append(line)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{cell}: {np.mean(line['angles'], 0)[-1]:.2f}°", file=sys.stderr, flush=True)
    return [line for line in lines if line["seeds"] == seeds]


def table(lines: list[dict[str, Any]]) -> str:
    """Angle at the end, mean ± standard deviation over the seeds, a line for each data set."""
    rows = ["| N/d | γ | wrong labels | " + " | ".join(METHODS) + " |", "|" + "---|" * (3 + len(METHODS))]
    keys = dict.fromkeys((line["samples_per_dimension"], line["fraction"], line["wrong"]) for line in lines)
    for ratio, fraction, wrong in keys:
        found = {
            line["method"]: np.array(line["angles"])[:, -1]
            for line in lines
            if (line["samples_per_dimension"], line["fraction"], line["wrong"]) == (ratio, fraction, wrong)
        }
        cells_ = [f"{found[one].mean():.2f} ± {found[one].std(ddof=1):.2f}" if one in found else "" for one in METHODS]
        rows.append(f"| {ratio} | {fraction:g} | {100 * wrong:.0f} % | " + " | ".join(cells_) + " |")
    return "\n".join(rows)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Angle by round: a panel for each N/d and share of wrong labels, at the smallest γ."""
    from matplotlib.figure import Figure

    fraction = min(line["fraction"] for line in lines)
    ratios = sorted({line["samples_per_dimension"] for line in lines})
    wrongs = sorted({line["wrong"] for line in lines})
    figure = Figure(figsize=(1.2 + 3.2 * len(ratios), 2.9 * len(wrongs)), layout="constrained")
    axes = figure.subplots(len(wrongs), len(ratios), squeeze=False, sharex=True)
    colours = dict(zip(METHODS, COLOURS, strict=True))
    for line in lines:
        if line["fraction"] != fraction:
            continue
        axis = axes[wrongs.index(line["wrong"]), ratios.index(line["samples_per_dimension"])]
        angles = np.array(line["angles"])
        rounds = np.arange(1, angles.shape[1] + 1)
        mean, deviation = angles.mean(0), angles.std(0, ddof=1)
        axis.plot(rounds, mean, color=colours[line["method"]], label=line["method"], linewidth=1.5)
        axis.fill_between(
            rounds, mean - deviation, mean + deviation, color=colours[line["method"]], alpha=0.12, linewidth=0
        )
        axis.set_title(f"N/d = {line['samples_per_dimension']}, {100 * line['wrong']:.0f} % wrong labels", fontsize=9)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.set_xticks([1, WARMUP, ROUNDS // 2, ROUNDS])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    figure.supxlabel("round", fontsize=9)
    figure.supylabel("degrees between student and teacher", fontsize=9)
    figure.suptitle(
        f"γ = {fraction:g}, {ROUNDS} rounds of {STEPS} steps, the first {WARMUP} on everything", fontsize=10
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description="Students of a known teacher; see the module's docstring.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/teacher-student"), help="without an ending")
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    lines = simulate(options.out.with_suffix(".jsonl"), options.seeds)
    print(table(lines))
    plot(lines, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
