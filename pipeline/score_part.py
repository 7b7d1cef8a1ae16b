"""One part of a scoring job: read its shards, decode, forward, write its score table. A plain function of its task.

shards ──read ranges──► members ──decode threads──► batches ──forward──► columns ──► scores/part-<n>.parquet
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dynams_stream import schema, storage
from dynams_stream.dataset import Part
from dynams_stream.errors import DynamsError, ScoringError, ShardError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.scorer import Scorer, ScorerSpec
from dynams_stream.store import Store
from pipeline.batch_scores import scored_batches
from pipeline.part_reader import Decoder, part_batches, require_unchanged
from pipeline.pending import are_published
from pipeline.receipt import BadShard, Clock, Receipt
from pipeline.score_table import Batch, ScoreTable
from pipeline.worker_hardware import keep_freed_memory, worker_cores, worker_device


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
        bad_shards: shards of the part to leave out; their samples get lines without scores.
        give_up_after: failed samples after which a part is given up that has no score yet; None for never.
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
    bad_shards: tuple[BadShard, ...] = ()
    give_up_after: int | None = None


def score_part(task: PartTask) -> Receipt:
    """Score one part and write its table.

    Raises:
        ShardError: when a shard is missing or not the one that was indexed; its `shard` is the URL that was indexed.
        ModelError: when the network cannot be built or run.
        CheckpointError: when the checkpoint was replaced.
        ScoringError: when lines and samples do not add up, or nothing but failures is seen.
        StoreFullError: when there is no room for the table.
    """
    scorer = worker_scorer(task.spec, task.checkpoint, task.checkpoint_sha256, task.device)
    clock, table = Clock(), ScoreTable(bad_shards=[bad.shard for bad in task.bad_shards])
    try:
        for batch, columns in scored_batches(scorer, _decoded(task, scorer, clock), clock):
            table.add(batch, columns)
            _require_hope(task, table)
    except ShardError:
        raise
    except DynamsError:
        _require_unchanged(task)  # what looks like bad samples may be a shard that is being written over
        raise
    _require_unchanged(task)
    return _write(task, table, clock)


def _decoded(task: PartTask, scorer: Scorer, clock: Clock) -> Iterable[Batch]:
    reasons = {bad.shard: bad.reason for bad in task.bad_shards}
    batches = part_batches(task.store, task.part, task.urls, task.fingerprints, task.spec.batch_size, reasons)
    # torch's own threads, which a thread sets for itself, are for the forward pass: transforms run in several already
    decode = ordered_thread_map(_decode_threads(), initializer=partial(torch.set_num_threads, 1))
    return decode(Decoder(scorer, clock), batches)


def _require_hope(task: PartTask, table: ScoreTable) -> None:
    """Give up where a transform or a model fits no sample: to read a large part to its end would only tell it later."""
    failed = table.failed - table.unread
    if task.give_up_after is not None and table.failed == table.lines and failed > task.give_up_after:
        shown = "\n  ".join(table.errors)
        raise ScoringError(
            f"part {task.part.number}: the first {failed} samples failed, all of them; see that --transform gives what "
            f"the model takes, or allow more with --max-errors:\n  {shown}"
        )


def _require_unchanged(task: PartTask) -> None:
    left_out = {bad.url for bad in task.bad_shards}
    require_unchanged(
        task.store, task.urls, task.fingerprints, [url in left_out for url in task.urls], threads=_decode_threads()
    )


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
            unread=table.unread,
            bad_shards=task.bad_shards,
        )

    data, made = table.parquet(task.identity, receipt)
    url = task.store.path(schema.scores_path(task.number, task.part.number))
    if storage.exists(url) and are_published(task.store, task.number):
        raise ScoringError(
            f"{url}: a round that was cut from it was published while this part was scored again; it stays as it is"
        )
    storage.write_bytes(url, data)
    return made


def _decode_threads() -> int:
    return max(2, worker_cores())


_building = threading.Lock()
_LOADED: dict[tuple[str | None, ...], tuple[str, Scorer]] = {}
"""The newest scorer of this process, by what it was made from: the version of its checkpoint's file, and itself."""


def worker_scorer(spec: ScorerSpec, checkpoint: str | None, sha256: str | None, device: str) -> Scorer:
    """The scorer of this worker process, built once per checkpoint, with as many threads as the worker has cores.

    Raises:
        CheckpointError: when the checkpoint is not, or no longer, the one of that digest. One that was removed goes on
            being used by a worker that has it in memory.
    """
    torch.set_num_threads(worker_cores())
    made_from = json.dumps(asdict(spec), sort_keys=True), checkpoint, sha256, worker_device(device)
    with _building:
        version = "" if checkpoint is None else storage.version(checkpoint)
        there, scorer = _LOADED.get(made_from, ("", None))
        if scorer is None or version not in ("", there):
            _LOADED.clear()  # two models may be too much for a GPU
            keep_freed_memory()
            scorer = Scorer(spec, checkpoint, made_from[-1], sha256)
            _LOADED[made_from] = version, scorer
        return scorer
