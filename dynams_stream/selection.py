"""Selection: for each shard the rows to train on, and its file.

`selection.parquet` has one line for every shard in order, possibly with an empty list, and one row group per part. It
holds its columns and a format version, no time and no path, so that the same rows always make the same bytes.
"""

from __future__ import annotations

import decimal
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.errors import StoreError, UsageError


def _exact(fraction: float | str | Decimal) -> Fraction:
    """The decimal as written, exactly: 0.07 is 7/100, not the float next to it.

    Raises:
        UsageError: unless it is a number in [0, 1].
    """
    try:
        written = Decimal(str(fraction).strip())
    except decimal.InvalidOperation:
        written = Decimal("NaN")
    if not (written.is_finite() and 0 <= written <= 1):
        raise UsageError(f"a fraction is a number from 0 to 1; got {fraction!r}")
    return Fraction(written)


def selected_count(fraction: float | str | Decimal, samples: int) -> int:
    """⌈fraction · samples⌉, with the fraction as the decimal it is written as: 0.07 of 100 is 7.

    Raises:
        UsageError: unless the fraction is a number in [0, 1].
    """
    return math.ceil(_exact(fraction) * samples)


@dataclass(frozen=True, eq=False)
class Selection:
    """For each shard the sorted rows to train on, and optional weights.

    Attributes:
        counts: int64, shape (shards,): selected rows of each shard.
        digest: SHA-256 of `selection.parquet` in hex; of `everything`, a digest of the dataset's digest.
    """

    counts: npt.NDArray[np.int64]
    digest: str
    _values: npt.NDArray[np.uint32] | None = None  # all shards' rows in one run; None: every row of every shard
    _weights: npt.NDArray[np.float32] | None = None
    _offsets: npt.NDArray[np.int64] | None = None  # shape (shards + 1,): shard s owns offsets[s]:offsets[s + 1]

    @property
    def total(self) -> int:
        """How many samples are selected."""
        return int(self.counts.sum())

    def rows(self, shard: int) -> npt.NDArray[np.uint32]:
        """The selected rows of `shard`, uint32, ascending."""
        if self._values is None or self._offsets is None:
            return np.arange(self.counts[shard], dtype=np.uint32)
        return self._values[self._offsets[shard] : self._offsets[shard + 1]]

    def weights(self, shard: int) -> npt.NDArray[np.float32] | None:
        """The weights of `rows(shard)`, float32; None when the selection has none."""
        if self._weights is None or self._offsets is None:
            return None
        return self._weights[self._offsets[shard] : self._offsets[shard + 1]]

    @classmethod
    def everything(cls, counts: npt.NDArray[np.int64], dataset_digest: str) -> Selection:
        """All rows of all shards, made on demand.

        Args:
            counts: int64, shape (shards,): samples in each shard.
            dataset_digest: the digest of the dataset that `counts` is from.
        """
        digest = hashlib.sha256(f"everything of {dataset_digest}".encode()).hexdigest()
        return cls(counts=np.asarray(counts, dtype=np.int64), digest=digest)

    @classmethod
    def read(cls, url: str) -> Selection:
        """Read a `selection.parquet`.

        Raises:
            StoreError: when it is missing, of another format, or not a line for every shard with ascending rows.
        """
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError as error:
            raise StoreError(f"{url}: no such file; restore it, or select again") from error
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            schema.require_format(file.schema_arrow.metadata, url)
            counts, values, weights = _read_flat(file, url)
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{url}: not a readable Parquet file ({error}); restore it, or select again") from error
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        _require_ascending(values, offsets, url)
        return cls(counts, hashlib.sha256(data).hexdigest(), values, weights, offsets)


def _read_flat(
    file: pq.ParquetFile, url: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], npt.NDArray[np.float32] | None]:
    """counts, rows and weights of all lines, read row group by row group into arrays made once."""
    if not file.schema_arrow.equals(schema.SELECTION_SCHEMA):
        raise _malformed(url, f"its columns are {file.schema_arrow.names}")
    about = file.metadata
    leaf = next(i for i in range(about.num_columns) if about.schema.column(i).path.startswith("rows."))
    most = sum(about.row_group(group).column(leaf).num_values for group in range(about.num_row_groups))
    counts = np.empty(about.num_rows, dtype=np.int64)
    values = np.empty(most, dtype=np.uint32)
    weights: npt.NDArray[np.float32] | None = None
    line = filled = weighted = 0
    for group in range(about.num_row_groups):
        table = file.read_row_group(group, use_threads=False)
        shards = table["shard"].to_numpy()
        if not np.array_equal(shards, np.arange(line, line + len(shards))):
            raise _malformed(url, f"row group {group} does not hold shards {line} to {line + len(shards) - 1} in order")
        rows, weight = table["rows"].combine_chunks(), table["weights"].combine_chunks()
        lengths = rows.value_lengths().to_numpy(zero_copy_only=False)
        counts[line : line + len(lengths)] = lengths
        flat = rows.flatten().to_numpy(zero_copy_only=False)
        values[filled : filled + len(flat)] = flat
        filled += len(flat)
        if len(flat_weights := weight.flatten().to_numpy(zero_copy_only=False)):
            unequal = np.flatnonzero(lengths != weight.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
            if len(unequal):
                raise _malformed(url, f"shard {line + unequal[0]} has not one weight for each of its rows")
            weights = np.empty(most, dtype=np.float32) if weights is None else weights
            weights[weighted : weighted + len(flat_weights)] = flat_weights
            weighted += len(flat_weights)
        line += len(lengths)
    if weighted not in (0, filled):
        raise _malformed(url, f"it has {weighted} weights for {filled} rows")
    return counts, values[:filled], None if weights is None else weights[:filled]


def _require_ascending(values: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64], url: str) -> None:
    ascending = values[1:] > values[:-1]
    starts = offsets[1:-1]
    ascending[starts[(starts > 0) & (starts < len(values))] - 1] = True
    if not ascending.all():
        place = int(np.argmin(ascending)) + 1
        shard = int(np.searchsorted(offsets, place, side="right")) - 1
        raise _malformed(url, f"the rows of shard {shard} do not ascend")


def _malformed(url: str, what: str) -> StoreError:
    return StoreError(f"{url}: not a selection of this format: {what}; restore it, or select again")


class SelectionWriter:
    """Writes a selection part by part, in bounded memory; make one with `selection_writer`."""

    def __init__(self, file: BinaryIO):
        self._file = _HashingFile(file)
        self._shards = 0
        self._total = 0
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(self._file, mode="w"),
            schema.SELECTION_SCHEMA,
            compression="zstd",
            use_dictionary=False,
            column_encoding=schema.encodings(schema.SELECTION_SCHEMA),
        )

    def append(
        self,
        counts: npt.NDArray[np.int64],
        rows: npt.NDArray[np.uint32],
        weights: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Write the next part as one row group.

        Args:
            counts: int64, shape (shards of the part,): selected rows of each of its shards.
            rows: uint32, shape (counts.sum(),): the shards' rows one after another, ascending within a shard.
            weights: float32, one for each of `rows`; either all parts have them or none.
        """
        offsets = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(counts, dtype=np.int32)])
        if weights is None:
            weight_lists = pa.nulls(len(counts), schema.SELECTION_SCHEMA.field("weights").type)
        else:
            weight_lists = _lists(offsets, weights, "weights")
        table = pa.table(
            [
                pa.array(np.arange(self._shards, self._shards + len(counts), dtype=np.int32)),
                _lists(offsets, np.ascontiguousarray(rows, dtype=np.uint32), "rows"),
                weight_lists,
            ],
            schema=schema.SELECTION_SCHEMA,
        )
        self._parquet.write_table(table, row_group_size=max(1, len(counts)))
        self._shards += len(counts)
        self._total += len(rows)

    @property
    def total(self) -> int:
        """How many rows were written so far."""
        return self._total

    def close(self) -> None:
        """Write the footer; `digest` is final from here on."""
        self._parquet.close()

    def abandon(self) -> None:
        """Close without writing any more: left open, pyarrow would write a footer into the closed file later."""
        self._file.discards = True
        self._parquet.close()

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the bytes written so far."""
        return self._file.digest.hexdigest()


@contextmanager
def selection_writer(url: str) -> Iterator[SelectionWriter]:
    """A `SelectionWriter` whose file appears under `url` whole when the block ends, or not at all.

    Its `digest` is the file's once the block has ended.
    """
    with storage.atomic_writer(url) as file:
        writer = SelectionWriter(file)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.close()


def _lists(offsets: npt.NDArray[np.int32], values: npt.NDArray[np.generic], column: str) -> pa.ListArray:
    kind = schema.SELECTION_SCHEMA.field(column).type
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind.value_type), type=kind)


class _HashingFile:
    """A file that is written through, with the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._position = 0
        self.digest = hashlib.sha256()
        self.discards = False
        self.closed = False

    def write(self, data: bytes) -> int:
        if not self.discards:
            self.digest.update(data)
            self._file.write(data)
        size = memoryview(data).nbytes
        self._position += size
        return size

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        if not self.discards:
            self._file.flush()

    def close(self) -> None:
        self.closed = True  # the underlying file belongs to `storage.atomic_writer`
