"""One part of a scoring job: read its shards, decode, forward, write its score table. A plain function of its task.

shards ──read ranges──► members ──decode threads──► batches ──forward──► columns ──► scores/part-<n>.parquet
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from dynams_stream import schema, storage
from dynams_stream.checkpoint import checkpoint_digest
from dynams_stream.dataset import Part
from dynams_stream.errors import CheckpointError, ScoringError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.scorer import Scorer, ScorerSpec
from dynams_stream.store import Store
from pipeline.batch_scores import scored_batches
from pipeline.part_reader import Decoder, part_batches
from pipeline.receipt import Clock, Receipt
from pipeline.score_table import ScoreTable
from pipeline.worker_hardware import worker_cores, worker_device


@dataclass(frozen=True)
class PartTask:
    """Everything a worker needs to score one part.

    Attributes:
        store: where index and scores lie.
        number: the round being scored.
        part: which part.
        urls: URL of each of its shards, as indexed.
        fingerprints: what identified each shard when it was indexed.
        spec: the resolved scorer.
        checkpoint: path or URL of the weights.
        checkpoint_sha256: their digest, checked before they are used.
        identity: what the table says it was made from, as JSON.
        provenance: what it records besides.
        device: "cpu" or "cuda".
    """

    store: Store
    number: int
    part: Part
    urls: tuple[str, ...]
    fingerprints: tuple[str, ...]
    spec: ScorerSpec
    checkpoint: str | None
    checkpoint_sha256: str | None
    identity: str
    provenance: Mapping[str, Any]
    device: str


def score_part(task: PartTask) -> Receipt:
    """Score one part and write its table.

    Raises:
        ShardError: when a shard is missing or not the one that was indexed.
        ModelError: when the network cannot be built or run.
        ScoringError: when lines and samples do not add up.
    """
    scorer = worker_scorer(task.spec, task.checkpoint, task.checkpoint_sha256, task.device)
    clock, table = Clock(), ScoreTable()
    batches = part_batches(task.store, task.part, task.urls, task.fingerprints, task.spec.batch_size)
    # torch's own threads, which a thread sets for itself, are for the forward pass: transforms run in several already
    decode = ordered_thread_map(_decode_threads(), initializer=partial(torch.set_num_threads, 1))
    decoded = decode(Decoder(scorer, clock), batches)
    for batch, columns in scored_batches(scorer, decoded, clock):
        table.add(batch, columns)
    return _write(task, table, clock)


def _write(task: PartTask, table: ScoreTable, clock: Clock) -> Receipt:
    if table.lines != task.part.samples:
        raise ScoringError(
            f"part {task.part.number}: {table.lines} lines for {task.part.samples} samples; index the dataset again"
        )
    began = time.perf_counter()

    def receipt() -> Receipt:
        clock.add("write", time.perf_counter() - began)
        return Receipt(
            part=task.part.number,
            samples=table.lines,
            failed=table.failed,
            labelled=table.labelled,
            seconds=dict(clock.seconds),
            errors=tuple(table.errors),
            provenance=task.provenance,
        )

    data, made = table.parquet(task.identity, receipt)
    storage.write_bytes(task.store.path(schema.scores_path(task.number, task.part.number)), data)
    return made


def _decode_threads() -> int:
    return max(2, worker_cores())


_building = threading.Lock()


def worker_scorer(spec: ScorerSpec, checkpoint: str | None, sha256: str | None, device: str) -> Scorer:
    """The scorer of this worker process, built once per checkpoint, with as many threads as the worker has cores.

    Raises:
        CheckpointError: when the checkpoint is not the one of that digest.
    """
    torch.set_num_threads(worker_cores())
    with _building:
        return _cached_scorer(_Hashable(spec), checkpoint, sha256, worker_device(device))


class _Hashable:
    """A spec as a cache key: it holds a mapping, which cannot be hashed itself."""

    def __init__(self, spec: ScorerSpec):
        self.spec = spec
        self._text = json.dumps(asdict(spec), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=1)
def _cached_scorer(spec: _Hashable, checkpoint: str | None, sha256: str | None, device: str) -> Scorer:
    if checkpoint is not None and checkpoint_digest(checkpoint) != sha256:
        raise CheckpointError(
            f"{checkpoint} was replaced while the job ran; keep checkpoints immutable, or start again"
        )
    return Scorer(spec.spec, checkpoint, device)
