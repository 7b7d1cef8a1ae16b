"""What streaming adds to decoding: JPEGs from the stream, from bare reads and from memory, in turns of 50 images.

    python benchmarks/decoding.py [--samples 20000] [--turns 200]

One process, no workers, shards in the page cache, samples of 13 KB (`streaming_data.py`), torchvision's `decode_jpeg`.
`streaming.py` measures the same with a process for each contender and a second for each turn; the difference is some
hundredths, which a busy machine hides. Here they take turns every 15 ms, and ratios are of all time together.

* stream: `SelectedDataset`, epoch after epoch.
* bare reads: one `os.pread` a sample from a list made beforehand, the image cut out of it: the floor of reading at all.
* memory: the images' bytes in a list.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peers.protocol import decode
from streaming_data import DataSet, into_page_cache, make_plan, make_set

from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset

FRACTIONS = ("1", "0.3", "0.1", "0.01")
IN_A_TURN = 50


def streamed(dataset: SelectedDataset) -> Iterator[bytes]:
    """Images, epoch after epoch."""
    for epoch in itertools.count(1):
        dataset.set_epoch(epoch)
        for sample in dataset:
            yield sample["jpg"]


def read_barely(data: DataSet, spans: np.ndarray) -> Iterator[bytes]:
    """Images, by the places that `make_plan` has written down."""
    files = [os.open(path, os.O_RDONLY) for path in data.shards]
    places = [(files[shard], size, start, *bounds[:2]) for _, shard, start, size, *bounds in spans.tolist()]
    while True:
        for file, size, start, begin, end in places:
            yield os.pread(file, size, start)[begin:end]


def seconds(images: Iterator[bytes]) -> float:
    """How long a turn takes."""
    began = time.perf_counter()
    for image in itertools.islice(images, IN_A_TURN):
        decode(image)
    return time.perf_counter() - began


def measure(data: DataSet, fraction: str, turns: int) -> str:
    """A line of the table."""
    make_plan(data, "local", fraction)
    plan = np.load(data.plan_path("local", fraction))
    dataset = SelectedDataset(Store(data.folder / "store"), round=int(plan["round"]))
    contenders = {
        "stream": streamed(dataset),
        "bare reads": read_barely(data, plan["spans"]),
        "memory": itertools.cycle([sample["jpg"] for sample in dataset]),
    }
    for images in contenders.values():
        seconds(images)  # imports and the index are there before the clock runs
    spent = dict.fromkeys(contenders, 0.0)
    names = list(contenders)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spent[name] += seconds(contenders[name])
    rates = [f"{turns * IN_A_TURN / spent[name]:,.0f}" for name in names]
    of_memory, of_bare = (spent[name] / spent["stream"] for name in ("memory", "bare reads"))
    return f"| {fraction} | {' | '.join(rates)} | {of_memory:.3f} | {of_bare:.3f} |"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Decoding from the stream and from memory; see the docstring.")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    with tempfile.TemporaryDirectory() as root:
        data = DataSet(Path(root), 13, options.samples)
        make_set(data)
        into_page_cache(data)
        print("| γ | stream, images/s | bare reads | memory | stream of memory | of bare reads |")
        print("|---|---|---|---|---|---|")
        for fraction in FRACTIONS:
            print(measure(data, fraction, options.turns), flush=True)


if __name__ == "__main__":
    main()
