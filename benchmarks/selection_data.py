"""A store with score tables of any number of samples, written as a scoring job writes them; the scores are made up."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.dataset import Part
from dynams_stream.index import assign_parts
from dynams_stream.store import Store
from pipeline.receipt import Receipt
from pipeline.score_table import score_table_file

SHARD_SAMPLES = 10_000
CLASSES = 1000
IDENTITY = {"scorer": {"model": "made_up:scores", "width": 0.5, "label": "cls"}, "checkpoint": "0" * 64}


def make_store(folder: Path, rows: int, processes: int) -> Store:
    """A store whose round 1 has all its score tables; found again when it was made before."""
    store = Store(folder)
    done = folder / "complete"
    if done.exists():
        return store
    counts = np.full(-(-rows // SHARD_SAMPLES), SHARD_SAMPLES, dtype=np.int64)
    counts[-1] -= counts.sum() - rows
    storage.write_bytes(store.path(schema.dataset_path(1)), _dataset(counts))
    identity = json.dumps({"dataset": {"version": 1, "digest": store.dataset().digest}, **IDENTITY})
    store.claim_round(json.loads(identity))
    tasks = [(str(folder), part, identity) for part in store.dataset().parts]
    with ProcessPoolExecutor(processes) as pool:
        for _ in pool.map(_write_part, tasks, chunksize=4):
            pass
    done.touch()
    return store


def _dataset(counts: np.ndarray) -> bytes:
    """The table of shards that are nowhere: selecting reads none of them."""
    parts = assign_parts(counts)
    shards = np.arange(len(counts), dtype=np.int32)
    table = pa.table(
        [
            pa.array(shards),
            pa.array([f"/nowhere/train-{shard:06d}.tar" for shard in shards]),
            pa.array(counts * 13_000),
            pa.array([f"size={count * 13_000};time=0;head=00000000" for count in counts]),
            pa.array(counts),
            pa.array(parts),
            pa.array([schema.index_path(int(part), "0" * 16) for part in parts]),
        ],
        schema=schema.DATASET_SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _write_part(task: tuple[str, Part, str]) -> None:
    folder, part, identity = task
    store = Store(folder)
    counts = store.dataset().counts[part.first_shard : part.first_shard + part.shards]
    receipt = Receipt(
        part=part.number, samples=part.samples, failed=0, labelled=part.samples,
        seconds={"read": 0.0, "decode": 0.0, "forward": 0.0, "write": 0.0}, errors=(),
        provenance={"checkpoint": "made up", "epoch": 0, "started": "2026-01-01T00:00:00+00:00"},
    )  # fmt: skip
    data, _ = score_table_file(_scores(part, counts), identity, lambda: receipt)
    storage.write_bytes(store.path(schema.scores_path(1, part.number)), data, durable=False)


def _scores(part: Part, counts: np.ndarray) -> pa.Table:
    """Distances of a gamma distribution; margins that are negative for a tenth; the other columns of their own."""
    generator = np.random.default_rng([7, part.number])
    samples = int(counts.sum())
    shards = np.repeat(np.arange(part.first_shard, part.first_shard + part.shards, dtype=np.int32), counts)
    rows = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    distance = generator.gamma(2.0, 1.0, samples).astype(np.float32)
    label = generator.integers(0, CLASSES, samples, dtype=np.int32)
    wrong = generator.random(samples) < 0.1
    predicted = np.where(wrong, (label + 1) % CLASSES, label).astype(np.int32)
    columns = {
        "shard": shards,
        "row": rows,
        "key": pc.utf8_lpad(pc.cast(pa.array(shards.astype(np.int64) * SHARD_SAMPLES + rows), pa.string()), 10, "0"),
        "label": label,
        "predicted": predicted,
        "runner_up": (predicted + 1) % CLASSES,
        "distance": distance,
        "margin": np.where(wrong, -distance, distance),
        **{name: generator.random(samples, dtype=np.float32) for name in ("loss", "el2n", "entropy", "confidence")},
        "error": pa.nulls(samples, pa.string()),
    }
    return pa.table([columns[name] for name in schema.SCORES_SCHEMA.names], schema=schema.SCORES_SCHEMA)


def size_on_disk(store: Store) -> int:
    """Bytes of round 1's score tables."""
    folder = store.path(schema.scores_folder(1))
    return sum(os.path.getsize(f"{folder}/{name}") for name in os.listdir(folder))
