"""First batch and epoch set-up on many shards, and memory over many epochs; the datasets are synthesised.

    python benchmarks/set_up.py --shards 1000          1,000 whole tar files of 100 samples
    python benchmarks/set_up.py --shards 100000        10⁹ samples; writes 5 GB of index, in a quarter of an hour
    python benchmarks/set_up.py --flat                 50 epochs over a store of 10⁷ rows, a new round each fifth

Each measurement is a process of its own and prints one line. Timed, imports done and the files in the page cache:

* open: `Store` and `SelectedDataset` on one round, γ = 0.3.
* set_epoch: taking up another round.
* first batch: from there to the first 256 samples, without workers.
* memory: how far resident memory has grown above what it was after the imports, at its highest, over 50,000 samples.

What is synthetic of the 10⁹ samples: all URLs lead to one sparse tar file of zeros, and of the 2,000 index files only
those are written that the 50,000 samples need. Everything else (the table of 100,000 shards, the two random rounds of
3·10⁸ rows, the index files' contents) is what it would be, and all is read by the code that users run.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH, STEADY = 256, 50_000
SAMPLE_BYTES = 13_000


# ---- synthesised stores ----------------------------------------------------------------------------------------------


def make_store(folder: Path, shards: int, rows: int) -> None:
    """A store over `shards` shards of `rows` samples of three members, with two random rounds of γ = 0.3."""
    from dynams_stream import index, schema, storage
    from dynams_stream.store import Store
    from pipeline.select_job import select_round

    store = Store(folder / "store")
    counts = np.full(shards, rows, dtype=np.int64)
    layout = shard_layout(rows)
    tar, size = folder / "data.tar", int(layout.offsets[-1] + layout.sizes[-1]) // 512 * 512 + 2048
    tar.touch()
    os.truncate(tar, size)
    fingerprint = storage.fingerprint(storage.open_reader(str(tar)))
    (folder / "shards").mkdir()
    urls = [str(folder / "shards" / f"data-{shard:06d}.tar") for shard in range(shards)]
    for url in urls:
        os.symlink(tar, url)
    parts = index.assign_parts(counts)
    columns = {
        "shard": np.arange(shards, dtype=np.int32),
        "url": urls,
        "bytes": np.full(shards, size),
        "fingerprint": [fingerprint] * shards,
        "samples": counts,
        "part": parts,
        "index_file": [schema.index_path(int(part), "synthesised0") for part in parts],
    }
    with storage.atomic_writer(store.path(schema.dataset_path(1))) as file:
        pq.write_table(pa.table(columns, schema=schema.DATASET_SCHEMA), file)
    for seed in (1, 2):
        select_round(store, fraction=0.3, strategy=f"random:{seed}")
    jobs = [
        (store, int(part), int(np.searchsorted(parts, part)), int((parts == part).sum()), rows)
        for part in needed_parts(store)
    ]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, _ in enumerate(pool.imap_unordered(write_part, jobs)):
            print(f"\rindex file {number + 1} of {len(jobs)}", end="", file=sys.stderr)
    print(file=sys.stderr)


def needed_parts(store: Any) -> list[int]:
    """The parts that hold the first samples of the two epochs that are measured."""
    from dynams_stream.order import EpochOrder

    dataset = store.dataset()
    if len(dataset.parts) <= 100:
        return [part.number for part in dataset.parts]
    parts: set[int] = set()
    for number, epoch in ((1, 0), (2, 1)):
        order = EpochOrder(store.round(number).selection().counts, seed=0, epoch=epoch)
        shards, _ = order.locate(np.arange(min(order.total, STEADY + 30_000)))
        parts |= set(dataset.part_of_shard[np.unique(shards)].tolist())
    return sorted(parts)


def write_part(job: tuple[Any, int, int, int, int]) -> None:
    """Write one index file."""
    from dynams_stream import index, schema, storage

    store, part, first, count, rows = job
    layout = shard_layout(rows)
    with storage.atomic_writer(store.path(schema.index_path(part, "synthesised0"))) as file:
        index.write_index(file, first, [layout] * count)


def shard_layout(rows: int) -> Any:
    """The index of one shard of samples of about 13 KB."""
    from dynams_stream.index import ShardIndex

    random = np.random.default_rng(0)
    sizes = np.stack([random.integers(8000, 13_000, rows), random.integers(1, 4, rows), random.integers(40, 60, rows)])
    sizes = sizes.T.ravel()
    ends = np.cumsum(512 + (sizes + 511) // 512 * 512)
    return ShardIndex(
        keys=pa.array([f"{row:08d}" for row in range(rows)]),
        starts=np.arange(0, 3 * rows + 1, 3),
        extensions=("jpg", "cls", "json"),
        extension_codes=np.tile(np.arange(3, dtype=np.int32), rows),
        offsets=ends - (sizes + 511) // 512 * 512,
        sizes=sizes,
    )


def make_tars(folder: Path, shards: int, rows: int) -> None:
    """A store over whole tar files, indexed by `dynams index`."""
    from dynams_stream.store import Store
    from pipeline.index_job import build_index
    from pipeline.select_job import select_round

    random = np.random.default_rng(0)
    (folder / "shards").mkdir()
    urls = []
    for shard in range(shards):
        urls.append(str(folder / "shards" / f"data-{shard:06d}.tar"))
        with tarfile.open(urls[-1], "w") as tar:
            for row in range(rows):
                for name, size in (("jpg", int(random.integers(8000, 13_000))), ("cls", 2), ("json", 50)):
                    about = tarfile.TarInfo(f"{row:08d}.{name}")
                    about.size = size
                    tar.addfile(about, io.BytesIO(random.bytes(size)))
    store = Store(folder / "store")
    build_index(store, urls)
    for seed in (1, 2):
        select_round(store, fraction=0.3, strategy=f"random:{seed}")


# ---- measurements, each in a process of its own ----------------------------------------------------------------------


def resident() -> int:
    """Bytes of resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def highest() -> int:
    """The most resident memory so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_set_up(folder: Path) -> dict[str, Any]:
    """Seconds of opening, of an epoch's set-up and of the first batch; memory."""
    import torch  # noqa: F401 (imports are not part of what is timed)
    import webdataset  # noqa: F401

    from dynams_stream.store import Store
    from dynams_stream.stream import SelectedDataset

    gc.collect()
    before, began = resident(), time.perf_counter()
    dataset = SelectedDataset(Store(folder / "store"), batch_size=BATCH, round=1)
    opened = time.perf_counter()
    dataset.set_epoch(1, round=2)
    set_up = time.perf_counter()
    samples = iter(dataset)
    for _ in range(BATCH):
        next(samples)
    first = time.perf_counter()
    for _ in range(min(STEADY, len(dataset)) - BATCH):
        next(samples)
    steady = time.perf_counter()
    return {
        "shards": len(dataset._source.content(dataset._source.control.place).dataset.urls),
        "selected": len(dataset),
        "open s": round(opened - began, 3),
        "set_epoch s": round(set_up - opened, 3),
        "first batch s": round(first - set_up, 3),
        "samples/s then": round((min(STEADY, len(dataset)) - BATCH) / (steady - first)),
        "memory MB": round((highest() - before) / 1e6),
    }


def measure_flat(folder: Path, epochs: int = 50) -> dict[str, Any]:
    """Growth of resident memory, and open files, after each tenth of `epochs` epochs, a new round each fifth."""
    from dynams_stream.store import Store
    from dynams_stream.stream import SelectedDataset
    from pipeline.select_job import select_round

    gc.collect()
    before = resident()
    store = Store(folder / "store")
    dataset = SelectedDataset(store, batch_size=BATCH)
    memory, files = [], []
    for epoch in range(epochs):
        if epoch % 5 == 0:
            select_round(store, fraction=0.01, strategy=f"random:{epoch}", as_newest=True)
        dataset.set_epoch(epoch)
        for _ in dataset:
            pass
        if epoch % 10 == 9:
            gc.collect()
            memory.append(round((resident() - before) / 1e6))
            files.append(len(os.listdir("/proc/self/fd")))
    return {"epochs": epochs, "samples an epoch": len(dataset), "memory MB": memory, "open files": files}


def main() -> None:
    """Make the store unless the folder has it, and print what a process of its own measures."""
    parser = argparse.ArgumentParser(description="Set-up and memory; see the module's docstring.")
    parser.add_argument("--shards", type=int, default=1000, choices=(1000, 100_000))
    parser.add_argument("--flat", action="store_true", help="memory over 50 epochs instead")
    parser.add_argument("--folder", type=Path, help="keep the synthesised store there (default: a temporary folder)")
    parser.add_argument("--measure", choices=("set_up", "flat"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps((measure_flat if options.measure == "flat" else measure_set_up)(options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        if not (folder / "store").exists():
            folder.mkdir(parents=True, exist_ok=True)
            if options.flat:
                make_store(folder, 1000, 10_000)
            elif options.shards == 1000:
                make_tars(folder, 1000, 100)
            else:
                make_store(folder, 100_000, 10_000)
        what = "flat" if options.flat else "set_up"
        for _ in range(1 if options.flat else 3):
            subprocess.run([sys.executable, __file__, "--measure", what, "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
