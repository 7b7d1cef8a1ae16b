"""Reads and decodes the samples of one part, front to back, in batches.

shards of the part ──batches of consecutive rows──► long range reads ──► members ──► tensors and labels
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dynams_stream import storage
from dynams_stream.dataset import Part
from dynams_stream.errors import DynamsError, SampleError, ScoringError, ShardError, ShardUnreadableError, UsageError
from dynams_stream.index import ShardIndex, read_part_index
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.scorer import Scorer
from dynams_stream.store import Store
from pipeline.receipt import Clock
from pipeline.remote_reader import open_reader
from pipeline.score_table import Batch

READ_BYTES = 8 << 20
"""Bytes of one sequential read; a part needs nearly every byte of its shards."""


@dataclass(frozen=True, eq=False)
class ShardRows:
    """Consecutive rows of one shard.

    Attributes:
        shard: its number.
        url: as it was indexed.
        reader: of its bytes; None for a bad shard.
        index: of its members.
        first, stop: the rows.
        reason: why the shard is not read.
    """

    shard: int
    url: str
    reader: storage.Reader | None
    index: ShardIndex
    first: int
    stop: int
    reason: str = ""


def part_batches(
    store: Store,
    part: Part,
    urls: Sequence[str],
    fingerprints: Sequence[str],
    batch_size: int,
    bad_shards: Mapping[int, str] | None = None,
) -> Iterator[list[ShardRows]]:
    """The part's samples in runs of `batch_size`, across its shards; batches never cross parts.

    Args:
        store, part: where and which.
        urls, fingerprints: of each of its shards.
        batch_size: samples of a run.
        bad_shards: by number why a shard is not read; its samples come without a reader.

    Raises:
        ShardError: when a shard is gone, cannot be read, or is not the one that was indexed; its `shard` is the URL
            that was indexed.
    """
    bad = bad_shards or {}
    indexes = read_part_index(store.path(part.index_file))
    pieces: list[ShardRows] = []
    space = batch_size
    for position, (url, recorded) in enumerate(zip(urls, fingerprints, strict=True)):
        shard = part.first_shard + position
        index = indexes[shard]
        reader = None if shard in bad else open_indexed(store, url, recorded)
        first = 0
        while first < len(index):
            stop = min(len(index), first + space)
            pieces.append(ShardRows(shard, url, reader, index, first, stop, bad.get(shard, "")))
            space -= stop - first
            first = stop
            if space == 0:
                yield pieces
                pieces, space = [], batch_size
    if pieces:
        yield pieces


def open_indexed(store: Store, url: str, fingerprint: str) -> storage.Reader:
    """As `remote_reader.open_reader`; whatever keeps the shard from being read is a ShardError that has its URL."""
    with _named(url):
        return open_reader(store, url, fingerprint)


def require_unchanged(
    store: Store, urls: Sequence[str], fingerprints: Sequence[str], bad: Sequence[bool], threads: int
) -> None:
    """Make sure that what was read from shards is what was indexed: they might have been written over meanwhile.

    Raises:
        ShardError: as for `part_batches`.
    """
    there = [pair for pair, is_bad in zip(zip(urls, fingerprints, strict=True), bad, strict=True) if not is_bad]
    for reader in ordered_thread_map(threads)(partial(_open_pair, store), there):
        reader.close()


def _open_pair(store: Store, pair: tuple[str, str]) -> storage.Reader:
    return open_indexed(store, *pair)


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Give errors of reading a shard its URL as it was indexed."""
    try:
        yield
    except ShardError as error:
        error.shard = url
        raise
    except DynamsError:
        raise
    except Exception as error:
        raise ShardUnreadableError(
            f"{url}: cannot be read ({type(error).__name__}: {error}); see that its store answers and lets you read it",
            shard=url,
        ) from error


class Decoder:
    """Reads and decodes one batch; called from several threads."""

    def __init__(self, scorer: Scorer, clock: Clock):
        self._scorer, self._clock = scorer, clock
        self._classes = scorer.classes

    def __call__(self, pieces: list[ShardRows]) -> Batch:
        batch, inputs = Batch(), []
        for piece in pieces:
            if piece.reader is None:
                inputs += _leave_out(batch, piece)
                continue
            with self._clock.timed("read"):
                samples = list(_read_rows(piece, self._scorer.extensions))
            with self._clock.timed("decode"):
                for row, members in samples:
                    batch.shards.append(piece.shard)
                    batch.rows.append(row)
                    batch.keys.append(piece.index.keys[row].as_py())
                    with _of_sample(f"shard {piece.shard}, row {row}, key {batch.keys[-1]!r}"):
                        inputs.append(self._decode(batch, members))
        with self._clock.timed("decode"):
            batch.inputs = self._stacked(inputs)
        return batch

    def _stacked(self, inputs: list[Tensor | None]) -> list[tuple[list[int], Tensor]]:
        shapes: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for position, tensor in enumerate(inputs):
            if tensor is not None:
                shapes.setdefault((tensor.shape, tensor.dtype), []).append(position)
        return [
            (
                positions,
                self._scorer.stack([tensor for position in positions if (tensor := inputs[position]) is not None]),
            )
            for positions in shapes.values()
        ]

    def _decode(self, batch: Batch, members: Mapping[str, bytes]) -> Tensor | None:
        tensor, label, reason = None, -1, None
        try:
            tensor, label = self._scorer.prepare(members)
            if label >= self._classes:
                tensor, reason = None, f"label {label} is outside the model's classes 0 … {self._classes - 1}"
        except SampleError as error:
            reason = str(error)
        if reason is not None:
            label = -1  # whatever it was, it may not even fit the column
        batch.labels.append(label)
        batch.errors.append(reason)
        return tensor


@contextmanager
def _of_sample(where: str) -> Iterator[None]:
    """Name the sample in errors that are not its own, but end the job."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        raise ScoringError(
            f"{where}: too little memory to decode it ({type(error).__name__}: {error}); give the workers more memory, "
            f"or start fewer of them"
        ) from error


def _leave_out(batch: Batch, piece: ShardRows) -> list[None]:
    """Add the lines of samples that are not read."""
    count = piece.stop - piece.first
    batch.shards += [piece.shard] * count
    batch.rows += range(piece.first, piece.stop)
    batch.keys += piece.index.keys[piece.first : piece.stop].to_pylist()
    batch.labels += [-1] * count
    batch.errors += [f"its shard was left out: {piece.reason}"] * count
    return [None] * count


def _read_rows(piece: ShardRows, extensions: frozenset[str]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """(row, members) of consecutive rows, read in long sequential ranges."""
    row = piece.first
    while row < piece.stop:
        start, stop, end = _block(piece.index, row, piece.stop)
        with _named(piece.url):
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
