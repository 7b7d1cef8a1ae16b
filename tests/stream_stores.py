"""Small stores for the streaming tests: shards with awkward samples, their index, and rounds published by hand."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from dynams_stream import schema, storage
from dynams_stream.store import Round, Store
from pipeline.index_job import build_index


def make_shards(folder: Path, counts: Sequence[int], seed: int = 0) -> list[str]:
    """Shards of `counts` samples; members differ in number, case and dots, some are empty, keys repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    urls = []
    for shard, count in enumerate(counts):
        path = folder / f"data-{shard:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for row in range(count):
                names = ["jpg", "cls", "json"]
                if row % 5 == 1:
                    names = ["JPG", "cls"]
                if row % 7 == 2:
                    names = ["cls", "jpg", "seg.png", "json"]
                key = f"größe/{row:04d}" if shard % 2 else f"{'x' * (120 if row == 3 else 2)}/{row:04d}"
                for name in names:
                    size = 0 if row % 6 == 4 and name == "json" else int(random.integers(1, 1500))
                    data = str(shard * 1000 + row).encode() if name == "cls" else random.bytes(size)
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        urls.append(str(path))
    return urls


def make_store(folder: Path, counts: Sequence[int], seed: int = 0) -> Store:
    """A store over fresh shards, with no round."""
    store = Store(folder / "store")
    build_index(store, make_shards(folder / "shards", counts, seed))
    return store


def publish(store: Store, rows: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> Round:
    """Publish `rows` of each shard as the next round."""
    number = max(store.round_numbers(), default=0) + 1
    table = pa.table(
        {"shard": np.arange(len(rows), dtype=np.int32), "rows": rows, "weights": weights or [None] * len(rows)},
        schema=schema.SELECTION_SCHEMA,
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    data = sink.getvalue()
    storage.write_bytes(store.path(schema.selection_path(number)), data)
    dataset = store.dataset()
    manifest: dict[str, Any] = {
        "fraction": 0.5,
        "epoch": None,
        "counts": {"all": dataset.samples, "selected": sum(map(len, rows))},
        "dataset": {"version": dataset.version, "digest": dataset.digest},
        "selection": {"sha256": hashlib.sha256(data).hexdigest()},
        "scores_of": None,
        "score_parts": [],
        "strategy": "by hand",
    }
    return store.publish(number, manifest)


def some_rows(store: Store, fraction: float, seed: int = 0) -> list[list[int]]:
    """A random subset of each shard's rows, ascending."""
    random = np.random.default_rng(seed)
    return [np.flatnonzero(random.random(count) < fraction).tolist() for count in store.dataset().counts.tolist()]


def webdataset_samples(urls: Sequence[str]) -> list[list[dict[str, Any]]]:
    """What webdataset itself yields, shard by shard."""
    return [list(wds.WebDataset([url], shardshuffle=False, empty_check=False)) for url in urls]
