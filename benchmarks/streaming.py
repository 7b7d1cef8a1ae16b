"""Streaming a random γ: this loader, `webdataset` with `select`, and a bare `os.pread` loop as the floor.

    python benchmarks/streaming.py [--samples 20000] [--runs 3] [--json]

Makes shards of 13 KB samples of three members (jpg, cls, json), indexes them and publishes one random round for each γ.
Then, for each γ, all contenders take turns in one process over the same selected samples, page cache warm; the table
shows medians. One process, default shuffle, raw bytes, nothing decoded.

* ours: `for sample in dataset` with one `SelectedDataset` over several epochs, `set_epoch` included; "first" is a fresh
  one, whose first epoch reads the member index too.
* webdataset: `WebDataset(shards).select(key in selected keys)`, its documented way to stream a subset.
* pread: the selected samples' byte ranges from a list made beforehand, in the order in which ours reads them: open
  files, one `os.pread` a sample, nothing else.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from pipeline.index_job import build_index
from pipeline.select_job import select_round

FRACTIONS = (1.0, 0.3, 0.1, 0.01)
SHARDS = 20
SAMPLE_BYTES = 13_000


def make_shards(folder: Path, samples: int) -> list[str]:
    """`SHARDS` shards of samples of three members, together about `SAMPLE_BYTES` with their headers."""
    random = np.random.default_rng(0)
    urls = []
    for shard in range(SHARDS):
        path = folder / f"data-{shard:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for row in range(samples * shard // SHARDS, samples * (shard + 1) // SHARDS):
                about = json.dumps({"id": row, "source": "benchmark"}).encode()
                image = random.bytes(SAMPLE_BYTES - 3 * 1024 + int(random.integers(-1500, 1500)))
                for name, data in (("jpg", image), ("cls", str(row % 1000).encode()), ("json", about)):
                    info = tarfile.TarInfo(f"{row:08d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        urls.append(str(path))
    return urls


def timed(work: Callable[[], int]) -> float:
    """Samples a second."""
    start = time.perf_counter()
    samples = work()
    return samples / (time.perf_counter() - start)


def contenders(store: Store, number: int) -> dict[str, Callable[[], int]]:
    """Each streams the whole selection once and returns how many samples it got."""
    urls = store.dataset().urls
    plan = []
    keys = set()
    descriptors: dict[str, int] = {}
    dataset = SelectedDataset(store, round=number)
    reader = dataset.pipeline[0].begin()
    for _ in reader:
        place = reader._chunk.place(reader.yielded - reader._chunk_start - 1)
        if place.url not in descriptors:
            descriptors[place.url] = os.open(place.url, os.O_RDONLY)
        plan.append((descriptors[place.url], place.size, place.offset))
        keys.add(place.key)

    epochs = itertools.count(1)

    def ours() -> int:
        dataset.set_epoch(next(epochs))
        return sum(1 for _ in dataset)

    def first() -> int:
        return sum(1 for _ in SelectedDataset(store, round=number))

    def webdataset() -> int:
        found = wds.WebDataset(list(urls), shardshuffle=False, empty_check=False).select(lambda s: s["__key__"] in keys)
        return sum(1 for _ in found)

    def pread() -> int:
        read = os.pread
        for descriptor, size, offset in plan:
            read(descriptor, size, offset)
        return len(plan)

    return {"ours": ours, "first": first, "webdataset": webdataset, "pread": pread}


def measure(store: Store, runs: int) -> list[dict[str, Any]]:
    """One line for each γ: medians over `runs` rounds in which the contenders take turns."""
    lines = []
    for fraction in FRACTIONS:
        made = select_round(store, fraction=fraction, strategy="random:1")
        works = contenders(store, made.round.number)
        rates: dict[str, list[float]] = {name: [] for name in works}
        for name in ("ours", "pread"):
            works[name]()  # page cache and imports are warm before the clock runs
        for _ in range(runs):
            for name, work in works.items():
                rates[name].append(timed(work))
        line: dict[str, Any] = {"fraction": fraction, "samples": works["pread"]()}
        line |= {name: round(statistics.median(found)) for name, found in rates.items()}
        line["of_pread"] = round(
            statistics.median(a / b for a, b in zip(rates["ours"], rates["pread"], strict=True)), 3
        )
        line["of_webdataset"] = round(line["ours"] / max(line["webdataset"], 1), 1)
        lines.append(line)
    return lines


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Streaming rates side by side; see the module's docstring.")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put the shards (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        store = Store(Path(name) / "store")
        build_index(store, make_shards(Path(name), options.samples))
        lines = measure(store, options.runs)
    if options.json:
        for line in lines:
            print(json.dumps(line))
        return
    columns = ("fraction", "samples", "ours", "first", "webdataset", "pread", "of_pread", "of_webdataset")
    print("samples a second, medians; of_pread and of_webdataset: ours as a multiple of theirs")
    print(" ".join(f"{column:>13}" for column in columns))
    for line in lines:
        print(" ".join(f"{line[column]:>13,}" for column in columns))


if __name__ == "__main__":
    main()
