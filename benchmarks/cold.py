"""Reading local shards that are not in the page cache: with and without telling the kernel what comes next.

    python benchmarks/cold.py [--samples 40000] [--runs 3]

Makes shards of 13 KB samples, puts them out of the page cache before each epoch (`posix_fadvise(DONTNEED)`), and
streams random rounds of γ = 1, 0.3 and 0.1: as the loader does it (`dynams_stream.local_shards`), and with its
announcements switched off. Medians of the runs, which take turns. What it gains depends on the disk; the page cache is
not the only cache on a virtual machine.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from dynams_stream import local_shards
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from pipeline.index_job import build_index
from pipeline.select_job import select_round

SHARDS, SAMPLE_BYTES, FRACTIONS = 20, 13_000, (1, 0.3, 0.1)


def make_shards(folder: Path, samples: int) -> list[str]:
    """Shards of samples of two members."""
    random = np.random.default_rng(0)
    urls = []
    for shard in range(SHARDS):
        urls.append(str(folder / f"data-{shard:04d}.tar"))
        with tarfile.open(urls[-1], "w") as tar:
            for row in range(samples // SHARDS):
                for name, data in (("jpg", random.bytes(SAMPLE_BYTES - 2048)), ("cls", b"7")):
                    about = tarfile.TarInfo(f"{row:08d}.{name}")
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))
    return urls


def forget(urls: list[str]) -> None:
    """Put files out of the page cache."""
    os.sync()
    for url in urls:
        with open(url, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(dataset: SelectedDataset, epoch: int, announces: bool) -> float:
    """Samples a second of one epoch."""
    announce = local_shards.LocalShards._announce
    if not announces:
        local_shards.LocalShards._announce = lambda *_: None  # type: ignore[method-assign]
    try:
        dataset.set_epoch(epoch)
        began = time.perf_counter()
        samples = sum(1 for _ in dataset)
        return samples / (time.perf_counter() - began)
    finally:
        local_shards.LocalShards._announce = announce  # type: ignore[method-assign]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="A cold page cache; see the module's docstring.")
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    options = parser.parse_args()
    print("| γ | announced, samples/s | one read after the other | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        store = Store(Path(name) / "store")
        urls = make_shards(Path(name), options.samples)
        build_index(store, urls)
        for fraction in FRACTIONS:
            made = select_round(store, fraction=fraction, strategy="random:1")
            dataset = SelectedDataset(store, round=made.round.number)
            found: dict[bool, list[float]] = {True: [], False: []}
            for run in range(options.runs):
                for announces in (True, False):
                    forget(urls)
                    found[announces].append(rate(dataset, run, announces))
            ours, plain = (statistics.median(found[announces]) for announces in (True, False))
            print(f"| {fraction} | {ours:,.0f} | {plain:,.0f} | {ours / plain:.1f} × |")


if __name__ == "__main__":
    main()
