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
from dynams_stream.index import Member, ShardIndex, read_part_index
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
                _add_places(batch, piece)
                for row, members in samples:
                    try:
                        inputs.append(self._decode(batch, members))
                    except (UsageError, MemoryError, RuntimeError) as error:
                        raise _of_sample(error, piece, row) from error
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


def _of_sample(error: Exception, piece: ShardRows, row: int) -> DynamsError:
    """An error that is not a sample's own, but ends the job, with the name of the sample that showed it."""
    where = f"shard {piece.shard}, row {row}, key {piece.index.keys[row].as_py()!r}"
    if isinstance(error, UsageError):
        return UsageError(f"{where}: {error}")
    return ScoringError(
        f"{where}: too little memory to decode it ({type(error).__name__}: {error}); give the workers more memory, "
        f"or start fewer of them"
    )


def _add_places(batch: Batch, piece: ShardRows) -> None:
    """Add which samples a piece has."""
    batch.shards += [piece.shard] * (piece.stop - piece.first)
    batch.rows += range(piece.first, piece.stop)
    batch.keys += piece.index.keys[piece.first : piece.stop].to_pylist()


def _leave_out(batch: Batch, piece: ShardRows) -> list[None]:
    """Add the lines of samples that are not read."""
    count = piece.stop - piece.first
    _add_places(batch, piece)
    batch.labels += [-1] * count
    batch.errors += [f"its shard was left out: {piece.reason}"] * count
    return [None] * count


def _read_rows(piece: ShardRows, extensions: frozenset[str]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """(row, members) of consecutive rows, read in long sequential ranges."""
    rows = piece.index.members_of(piece.first, piece.stop)
    first = 0
    while first < len(rows):
        start, stop, end = _block(rows, first)
        with _named(piece.url):
            data = piece.reader.pread(start, end - start) if end > start else b""
        for row in range(first, stop):
            yield (
                piece.first + row,
                {ext: data[at - start : at - start + size] for ext, at, size in rows[row] if ext in extensions},
            )
        first = stop


def _block(rows: Sequence[Sequence[Member]], first: int) -> tuple[int, int, int]:
    """Byte offset, row after the last, end offset of the next read: as many rows as fit, at least one."""
    start = end = rows[first][0][1] if rows[first] else 0
    stop = first
    while stop < len(rows):
        end_of_row = max((at + size for _, at, size in rows[stop]), default=end)
        if stop > first and end_of_row - start > READ_BYTES:
            break
        end = end_of_row
        stop += 1
    return start, stop, end
