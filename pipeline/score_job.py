"""One part of a scoring job: read its shards, decode, forward, write its score table. A plain function of its task.

shards ──read ranges──► members ──decode threads──► batches ──forward──► columns ──► scores/part-<n>.parquet
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dynams_stream import schema, storage
from dynams_stream.checkpoint import checkpoint_digest
from dynams_stream.errors import CheckpointError, DynamsError, SampleError, ScoringError
from dynams_stream.index import ShardIndex, read_part_index
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.reading import open_shard
from dynams_stream.scorer import Scorer, ScorerSpec
from dynams_stream.store import Dataset, Part, Store
from pipeline.receipt import STEPS, Receipt

READ_BYTES = 8 << 20
"""Bytes of one sequential read; a part needs nearly every byte of its shards."""
ERRORS_KEPT = 10
"""Failed samples that a receipt names; the table names all."""


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


def part_tasks(
    store: Store,
    dataset: Dataset,
    number: int,
    spec: ScorerSpec,
    checkpoint: str | None,
    checkpoint_sha256: str | None,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    device: str,
) -> list[PartTask]:
    """The tasks of a round, one per part."""
    text = json.dumps(identity, sort_keys=True)
    return [
        PartTask(
            store=store,
            number=number,
            part=part,
            urls=dataset.urls[part.first_shard : part.first_shard + part.shards],
            fingerprints=dataset.fingerprints[part.first_shard : part.first_shard + part.shards],
            spec=spec,
            checkpoint=checkpoint,
            checkpoint_sha256=checkpoint_sha256,
            identity=text,
            provenance=provenance,
            device=device,
        )
        for part in dataset.parts
    ]


# ---- the task --------------------------------------------------------------------------------------------------------


def score_part(task: PartTask) -> Receipt:
    """Score one part and write its table.

    Raises:
        ShardError: when a shard is missing or not the one that was indexed.
        ModelError: when the network cannot be built or run.
        ScoringError: when lines and samples do not add up.
    """
    torch.set_num_threads(_cores())
    scorer = _scorer(task.spec, task.checkpoint, task.checkpoint_sha256, _device(task.device))
    clock = _Clock()
    columns = _Columns()
    for batch in ordered_thread_map(_decode_threads())(_Decoder(task, scorer, clock), _batches(task)):
        with clock.timed("forward"):
            columns.add(batch, _score_by_shape(scorer, batch))
    return _write(task, columns, clock)


def _cores() -> int:
    return int(os.environ.get("DYNAMS_CORES", "1"))


def _decode_threads() -> int:
    return max(2, _cores())


def _device(device: str) -> str:
    """The GPU of this worker: workers of a local cluster are numbered and share the machine's GPUs in turn."""
    if device != "cuda":
        return device
    from distributed import get_worker  # not run here: there is no GPU on the machines this is tested on

    return f"cuda:{int(get_worker().name) % torch.cuda.device_count()}"


_building = threading.Lock()


def _scorer(spec: ScorerSpec, checkpoint: str | None, sha256: str | None, device: str) -> Scorer:
    """The scorer of this worker process, built once per checkpoint."""
    with _building:
        return _cached_scorer(_Hashable(spec), checkpoint, sha256, device)


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


class _Clock:
    """Seconds by name, added up from several threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self._lock = threading.Lock()

    def timed(self, name: str) -> _Timed:
        return _Timed(self, name)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name] += seconds


class _Timed:
    def __init__(self, clock: _Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._clock.add(self._name, time.perf_counter() - self._started)


# ---- reading and decoding --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _ShardRows:
    """Consecutive rows of one shard."""

    shard: int
    url: str
    reader: storage.Reader
    index: ShardIndex
    first: int
    stop: int


@dataclass(eq=False)
class _Batch:
    """Decoded samples, in (shard, row) order; a failed one has no input."""

    shards: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)


def _batches(task: PartTask) -> Iterator[list[_ShardRows]]:
    """The part's samples in runs of `batch_size`, across its shards; batches never cross parts."""
    indexes = read_part_index(task.store.path(task.part.index_file))
    pieces: list[_ShardRows] = []
    space = task.spec.batch_size
    for position, (url, recorded) in enumerate(zip(task.urls, task.fingerprints, strict=True)):
        shard = task.part.first_shard + position
        index = indexes[shard]
        reader = open_shard(task.store, url, recorded)
        first = 0
        while first < len(index):
            stop = min(len(index), first + space)
            pieces.append(_ShardRows(shard, url, reader, index, first, stop))
            space -= stop - first
            first = stop
            if space == 0:
                yield pieces
                pieces, space = [], task.spec.batch_size
    if pieces:
        yield pieces


class _Decoder:
    """Reads and decodes one batch; called from several threads."""

    def __init__(self, task: PartTask, scorer: Scorer, clock: _Clock):
        self._scorer, self._clock = scorer, clock
        self._classes = scorer.classes

    def __call__(self, pieces: list[_ShardRows]) -> _Batch:
        batch = _Batch()
        for piece in pieces:
            with self._clock.timed("read"):
                samples = list(_read_rows(piece, self._scorer.extensions))
            with self._clock.timed("decode"):
                for row, members in samples:
                    batch.shards.append(piece.shard)
                    batch.rows.append(row)
                    batch.keys.append(piece.index.keys[row].as_py())
                    self._decode(batch, members)
        return batch

    def _decode(self, batch: _Batch, members: Mapping[str, bytes]) -> None:
        tensor, label, reason = None, -1, None
        try:
            tensor, label = self._scorer.prepare(members)
            if label >= self._classes:
                tensor, reason = None, f"label {label} is outside the model's classes 0 … {self._classes - 1}"
        except SampleError as error:
            reason = str(error)
        batch.inputs.append(tensor)
        batch.labels.append(label)
        batch.errors.append(reason)


def _read_rows(piece: _ShardRows, extensions: frozenset[str]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """(row, members) of consecutive rows, read in long sequential ranges."""
    row = piece.first
    while row < piece.stop:
        start, stop, end = _block(piece.index, row, piece.stop)
        data = piece.reader.pread(start, end - start) if end > start else b""
        for current in range(row, stop):
            yield (
                current,
                {
                    ext: data[offset - start : offset - start + size]
                    for ext, offset, size in piece.index.members(current)
                    if ext in extensions
                },
            )
        row = stop


def _block(index: ShardIndex, row: int, last: int) -> tuple[int, int, int]:
    """Byte offset, row after the last, end offset of the next read: as many rows as fit, at least one."""
    starts = index.starts
    start = int(index.offsets[starts[row]]) if starts[row + 1] > starts[row] else 0
    stop = row + 1
    end = _end(index, row, start)
    while stop < last and _end(index, stop, end) - start <= READ_BYTES:
        end = _end(index, stop, end)
        stop += 1
    return start, stop, end


def _end(index: ShardIndex, row: int, default: int) -> int:
    members = slice(int(index.starts[row]), int(index.starts[row + 1]))
    ends = index.offsets[members] + index.sizes[members]
    return int(ends.max()) if len(ends) else default


# ---- scoring and writing ---------------------------------------------------------------------------------------------


def _score_by_shape(scorer: Scorer, batch: _Batch) -> dict[str, np.ndarray]:
    """The batch's score columns, NaN where a sample failed; inputs of unequal shapes go through one shape at a time."""
    count = len(batch.rows)
    columns = {name: np.full(count, np.nan, dtype=np.float32) for name in schema.SCORE_COLUMNS}
    columns["predicted"] = np.full(count, -1, dtype=np.int64)
    columns["runner_up"] = np.full(count, -1, dtype=np.int64)
    shapes: dict[torch.Size, list[int]] = {}
    for position, tensor in enumerate(batch.inputs):
        if tensor is not None:
            shapes.setdefault(tensor.shape, []).append(position)
    for positions in shapes.values():
        inputs = torch.stack([batch.inputs[position] for position in positions])  # type: ignore[misc]
        labels = torch.tensor([batch.labels[position] for position in positions], dtype=torch.int64)
        try:
            scores = scorer.score(inputs, labels)
        except DynamsError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise ScoringError(
                f"the model failed on inputs of shape {tuple(inputs.shape)}: {error}; "
                f"does --transform give what it takes?"
            ) from error
        for name in columns:
            columns[name][positions] = getattr(scores, name).cpu().numpy()
    return columns


class _Columns:
    """The part's table as it grows, batch by batch."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self.errors: list[str] = []
        self.failed = 0

    def add(self, batch: _Batch, scores: Mapping[str, np.ndarray]) -> None:
        """Append one scored batch."""
        reasons = list(batch.errors)
        for position in np.flatnonzero(~np.isfinite(scores["entropy"])):
            # NaN would sort last and the sample would silently never be selected; it is that sample's error.
            reasons[position] = reasons[position] or "the model's output is not a finite number"
        failed = np.array([reason is not None for reason in reasons], dtype=bool)
        unlabelled = np.array(batch.labels, dtype=np.int64) < 0
        arrays: dict[str, pa.Array] = {
            "shard": pa.array(batch.shards, pa.int32()),
            "row": pa.array(batch.rows, pa.int32()),
            "key": pa.array(batch.keys, pa.string()),
            "label": pa.array(np.array(batch.labels, dtype=np.int32), mask=unlabelled),
            "predicted": pa.array(scores["predicted"].astype(np.int32), mask=failed),
            "runner_up": pa.array(scores["runner_up"].astype(np.int32), mask=failed | (scores["runner_up"] < 0)),
            "error": pa.array(reasons, pa.string()),
        }
        for name in schema.SCORE_COLUMNS:
            arrays[name] = pa.array(scores[name], pa.float32(), mask=failed | np.isnan(scores[name]))
        self._tables.append(
            pa.table([arrays[name] for name in schema.SCORES_SCHEMA.names], schema=schema.SCORES_SCHEMA)
        )
        self.failed += int(failed.sum())
        for position in np.flatnonzero(failed)[: max(0, ERRORS_KEPT - len(self.errors))]:
            self.errors.append(
                f"shard {batch.shards[position]}, row {batch.rows[position]}, key {batch.keys[position]!r}: "
                f"{reasons[position]}"
            )

    def table(self) -> pa.Table:
        """All lines so far, in (shard, row) order."""
        return pa.concat_tables(self._tables) if self._tables else schema.SCORES_SCHEMA.empty_table()


def _write(task: PartTask, columns: _Columns, clock: _Clock) -> Receipt:
    table = columns.table()
    if table.num_rows != task.part.samples:
        raise ScoringError(
            f"part {task.part.number}: {table.num_rows} lines for {task.part.samples} samples; index the dataset again"
        )
    buffer = io.BytesIO()
    with clock.timed("write"):
        writer = pq.ParquetWriter(
            buffer,
            schema.SCORES_SCHEMA,
            compression="zstd",
            use_dictionary=["error", "label", "predicted", "runner_up"],
            column_encoding=schema.encodings(schema.SCORES_SCHEMA),
        )
        for start, stop in _shard_runs(table["shard"].to_numpy()):
            writer.write_table(table.slice(start, stop - start), row_group_size=schema.ROW_GROUP_ROWS)
    receipt = Receipt(
        part=task.part.number,
        samples=table.num_rows,
        failed=columns.failed,
        seconds=dict(clock.seconds),
        errors=tuple(columns.errors),
        provenance=task.provenance,
    )
    writer.add_key_value_metadata(
        {schema.IDENTITY_KEY.decode(): task.identity, schema.RECEIPT_KEY.decode(): json.dumps(asdict(receipt))}
    )
    writer.close()
    storage.write_bytes(task.store.path(schema.scores_path(task.number, task.part.number)), buffer.getbuffer())
    return receipt


def _shard_runs(shards: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each shard's lines, so that a reader of one shard reads its row group alone."""
    borders = np.flatnonzero(np.diff(shards)) + 1
    edges = [0, *borders.tolist(), len(shards)]
    return ((start, stop) for start, stop in pairwise(edges) if stop > start)
