"""How far the order is from a uniform shuffle, and what that buys in requests: lanes and windows side by side.

    python benchmarks/order.py                      the statistics, about a minute
    python benchmarks/order.py --train runs/order   and the accuracy of MNIST runs, sorted by class, about ten minutes

For a dataset of 1,000 shards of 1,000 rows, γ = 0.3, each order of one epoch is looked at:

* sorted shards, sorted rows: χ² of the classes of a batch of 256 per degree of freedom, averaged over the batches, when
  each shard holds one class, and when each shard is sorted by class inside. 1: as after a uniform shuffle; below: more
  even; far above: batches of few classes.
* drift: half the summed difference between the classes of 10,000 samples in a row and those of the whole, with shards
  of one class each. A uniform shuffle has 0.04.
* requests a sample / bytes read for each byte used, for samples of 13 KB, planned as the loader plans them, reading
  64 MB and 256 MB ahead and leaving out gaps of more than 100 KB.

Training: MNIST in 20 shards sorted by class, the small network of the examples, two epochs, batch 64, three seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynams_stream import ranges
from dynams_stream.order import EpochOrder, default_lanes, window_length

ROOT = Path(__file__).resolve().parents[1]
SHARDS, ROWS, FRACTION, CLASSES, BATCH = 1000, 1000, 0.3, 100, 256
SAMPLE_BYTES, GAP = 13_000, 100_000
UNIFORM = (1, 10**9)
ORDERS = (UNIFORM, (960, 68), (960, 17), (960, 4), (480, 17), (240, 68), (240, 16), (60, 64), (16, 64))
Integers = npt.NDArray[np.int64]


def unevenness(labels: Integers) -> float:
    """χ² per degree of freedom of the classes of a batch, averaged over the batches."""
    batches = labels[: len(labels) // BATCH * BATCH].reshape(-1, BATCH)
    expected = BATCH * np.bincount(labels, minlength=CLASSES) / len(labels)
    counts = np.stack([np.bincount(batch, minlength=CLASSES) for batch in batches])
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (CLASSES - 1))


def drift(labels: Integers, block: int = 10_000) -> float:
    """Half the summed difference between the classes of `block` samples in a row and those of all, averaged."""
    whole = np.bincount(labels, minlength=CLASSES) / len(labels)
    blocks = labels[: len(labels) // block * block].reshape(-1, block)
    return statistics.mean(
        float(np.abs(np.bincount(each, minlength=CLASSES) / block - whole).sum()) / 2 for each in blocks
    )


def requests(shards: Integers, rows: Integers, pool: int, read_ahead: int) -> tuple[float, float]:
    """Requests a sample, and bytes read for each byte used, over four chunks in the middle of the epoch.

    As in the loader, a chunk is half of what is read ahead, and ends with a pool where it holds one.
    """
    length, used = read_ahead // 2 // SAMPLE_BYTES, SAMPLE_BYTES - 1024
    first = start = len(shards) // 4 // pool * pool
    asked = read = 0
    for _ in range(4):
        stop = start + length
        if stop // pool * pool > start:
            stop = stop // pool * pool
        chunk = slice(start, stop)
        sizes = np.full(stop - start, used)
        planned = ranges.plan(shards[chunk], rows[chunk] * SAMPLE_BYTES, sizes, gap=GAP, longest=8 << 20)
        asked += len(planned)
        read += int((planned.stops - planned.starts).sum())
        start = stop
    return asked / (start - first), read / ((start - first) * used)


def look_at(lanes: int, window: int) -> dict[str, Any]:
    """One line of the table."""
    random = np.random.default_rng(0)
    selected = [np.flatnonzero(random.random(ROWS) < FRACTION) for _ in range(SHARDS)]
    counts = np.array([len(rows) for rows in selected])
    starts = np.cumsum(counts) - counts
    order = EpochOrder(counts, seed=1, epoch=0, lanes=lanes, window=window)
    shards, places = order.locate(np.arange(order.total))
    rows = np.concatenate(selected)[starts[shards] + places]
    pool = lanes * order.window
    small, large = (requests(shards, rows, pool, ahead << 20) for ahead in (64, 256))
    return {
        "lanes": lanes,
        "window": order.window,
        "pool": pool,
        "sorted shards": round(unevenness(shards * CLASSES // SHARDS), 2),
        "sorted rows": round(unevenness(rows * CLASSES // ROWS), 2),
        "drift": round(drift(shards * CLASSES // SHARDS), 3),
        "64 MB ahead": f"{small[0]:.2f} / {small[1]:.1f}",
        "256 MB ahead": f"{large[0]:.2f} / {large[1]:.1f}",
    }


def show(lines: list[dict[str, Any]]) -> None:
    """Print a markdown table."""
    columns = list(lines[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for line in lines:
        print(f"| {' | '.join(f'{value:,}' if isinstance(value, int) else str(value) for value in line.values())} |")


# ---- training --------------------------------------------------------------------------------------------------------

TRAINED = (UNIFORM, (0, 0), (240, 16), (48, 64), (16, 64), (4, 64))


def train(folder: Path) -> list[dict[str, Any]]:
    """Mean and spread of the test accuracy for each order; a line of JSON for each run is kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "order.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    data = sorted_mnist()
    lines = []
    for lanes, window in TRAINED:
        for seed in range(3):
            if not any((run["lanes"], run["window"], run["seed"]) == (lanes, window, seed) for run in done):
                accuracy = run_once(data, lanes, window, seed)
                done.append({"lanes": lanes, "window": window, "seed": seed, "accuracy": accuracy})
                with open(results, "a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
        found = [run["accuracy"] for run in done if (run["lanes"], run["window"]) == (lanes, window)]
        real = lanes or default_lanes(60_000)
        lines.append(
            {
                "lanes": real,
                "window": min(window, 60_000) if window else window_length(60_000, real),
                "accuracy, %": f"{100 * statistics.mean(found):.2f} ± {100 * statistics.stdev(found):.2f}",
            }
        )
    return lines


def sorted_mnist() -> dict[str, torch.Tensor]:
    """Images and labels of MNIST, the training images sorted by class."""
    from torchvision.datasets import MNIST

    found = {}
    for name, training in (("train", True), ("test", False)):
        part = MNIST(ROOT.parent / "shared" / "data", train=training)
        by_class = torch.argsort(part.targets, stable=True) if training else torch.arange(len(part.targets))
        found[f"{name} images"] = (part.data[by_class].unsqueeze(1).float() - 33.0) / 79.0
        found[f"{name} labels"] = part.targets[by_class]
    return found


def run_once(data: dict[str, torch.Tensor], lanes: int, window: int, seed: int) -> float:
    """Test accuracy after two epochs in an order over 20 shards of 3,000 rows."""
    sys.path.insert(0, str(ROOT))
    from examples.models import small_cnn

    torch.manual_seed(seed)
    network = small_cnn(width=16, stride=2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    counts = np.full(20, 3000)
    for epoch in range(2):
        order = EpochOrder(counts, seed=seed, epoch=epoch, lanes=lanes or None, window=window or None)
        shards, rows = order.locate(np.arange(order.total))
        for batch in torch.from_numpy(shards * 3000 + rows).split(64):
            loss = torch.nn.functional.cross_entropy(network(data["train images"][batch]), data["train labels"][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.inference_mode():
        right = sum(
            int((network(images).argmax(1) == labels).sum())
            for images, labels in zip(data["test images"].split(1000), data["test labels"].split(1000), strict=True)
        )
    return right / len(data["test labels"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Orders side by side; see the module's docstring.")
    parser.add_argument("--train", type=Path, help="also train on MNIST, and keep the runs in this folder")
    options = parser.parse_args()
    show([look_at(lanes, window) for lanes, window in ORDERS])
    if options.train is not None:
        print()
        show(train(options.train))


if __name__ == "__main__":
    main()
