"""`selection.parquet`: written part by part, read whole or by the shard.

One line for every shard in order, possibly with an empty list, and one row group per part. It holds its columns and a
format version, no time and no path, so that the same rows always make the same bytes. Pages carry checksums: who reads
a few of them knows that these are what was written. What a reader wants to know before it opens the file, the number of
rows of each shard, is in the round's manifest (`SelectionWriter.for_manifest`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.errors import StoreError
from dynams_stream.parquet_footer import footer_bytes, read_footer

Integers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint32]
Weights = npt.NDArray[np.float32]


def read_whole(url: str) -> tuple[str, Integers, Rows, Weights | None]:
    """SHA-256 in hex, rows of each shard, all rows one after another, and their weights.

    Raises:
        StoreError: when it is missing, of another format, or not a line for every shard with ascending rows.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise _missing(url) from error
    with _readable(url):
        file = pq.ParquetFile(pa.BufferReader(data))
        counts, rows, weights = _read_flat(file, url)
    _require_ascending(rows, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]), url)
    return hashlib.sha256(data).hexdigest(), counts, rows, weights


def read_counts(url: str) -> Integers:
    """int64, rows of each shard; reads the whole file, one row group in memory at a time.

    Raises:
        StoreError: when it is missing, or not a selection of this format.
    """
    counts = []
    with _readable(url), storage.open_random(url) as source:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        _require_schema(file, url)
        line = 0
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=["shard", "rows"], use_threads=False)
            _require_shards(table, line, group, url)
            line += len(table)
            counts.append(table["rows"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False))
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts]).astype(np.int64)


def require_digest(url: str, digest: str, footer_digest: str | None) -> None:
    """Make sure that the file is the one that a manifest names.

    Args:
        url: the file.
        digest: SHA-256 of all of it.
        footer_digest: SHA-256 of its footer, which is checked instead when it is given: the pages have checksums of
            their own.

    Raises:
        StoreError: when it is missing or another one.
    """
    try:
        found = storage.file_digest(url) if footer_digest is None else hashlib.sha256(read_footer(url)).hexdigest()
    except FileNotFoundError as error:
        raise _missing(url) from error
    expected = digest if footer_digest is None else footer_digest
    if found != expected:
        raise StoreError(
            f"{url}: not the file that was published (SHA-256 {found[:12]}, recorded {expected[:12]}); "
            f"restore it, or select again"
        )


class ShardRowsReader:
    """Reads the rows of single shards; picklable.

    Args:
        url: the file.
        counts: int64, rows of each shard, that the file is held to.
    """

    def __init__(self, url: str, counts: Integers):
        self._url = url
        self._counts = counts
        self._file: tuple[pq.ParquetFile, Integers] | None = None
        self._owner = 0

    def read(self, shard: int) -> tuple[Rows, Weights | None]:
        """The rows of `shard`, and their weights when there are any.

        Raises:
            StoreError: when the file is damaged or does not hold as many rows for the shard.
        """
        file, starts = self._opened()
        group = int(np.searchsorted(starts, shard, side="right")) - 1
        with _readable(self._url):
            table = file.read_row_group(group, use_threads=False).slice(shard - int(starts[group]), 1)
        if table["shard"].to_pylist() != [shard]:
            raise _malformed(self._url, f"row group {group} does not hold shard {shard} in its place")
        rows = np.array(table["rows"].combine_chunks().flatten().to_numpy(zero_copy_only=False))
        if len(rows) != self._counts[shard]:
            raise _malformed(self._url, f"shard {shard} has {len(rows)} rows, the manifest says {self._counts[shard]}")
        if not (rows[1:] > rows[:-1]).all():
            raise _malformed(self._url, f"the rows of shard {shard} do not ascend")
        weights = table["weights"].combine_chunks()
        if weights.null_count:
            return rows, None
        found = np.array(weights.flatten().to_numpy(zero_copy_only=False))
        if len(found) != len(rows):
            raise _malformed(self._url, f"shard {shard} has not one weight for each of its rows")
        return rows, found

    def _opened(self) -> tuple[pq.ParquetFile, Integers]:
        """The open file, and the first shard of each of its row groups; opened once in each process."""
        if self._file is None or self._owner != os.getpid():
            with _readable(self._url), contextlib.suppress(FileNotFoundError):
                file = pq.ParquetFile(storage.open_random(self._url), page_checksum_verification=True)
                _require_schema(file, self._url)
                about = file.metadata
                lines = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
                self._file = file, np.cumsum([0, *lines[:-1]], dtype=np.int64)
                self._owner = os.getpid()
                return self._file
            raise _missing(self._url)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{url}: not a readable Parquet file ({error}); restore it, or select again") from error


def _read_flat(
    file: pq.ParquetFile, url: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], npt.NDArray[np.float32] | None]:
    """counts, rows and weights of all lines, read row group by row group into arrays made once."""
    _require_schema(file, url)
    about = file.metadata
    leaf = next(i for i in range(about.num_columns) if about.schema.column(i).path.startswith("rows."))
    most = sum(about.row_group(group).column(leaf).num_values for group in range(about.num_row_groups))
    counts = np.empty(about.num_rows, dtype=np.int64)
    values = np.empty(most, dtype=np.uint32)
    weights: npt.NDArray[np.float32] | None = None
    line = filled = weighted = 0
    for group in range(about.num_row_groups):
        table = file.read_row_group(group, use_threads=False)
        _require_shards(table, line, group, url)
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


def _require_schema(file: pq.ParquetFile, url: str) -> None:
    schema.require_format(file.schema_arrow.metadata, url)
    if not file.schema_arrow.equals(schema.SELECTION_SCHEMA):
        raise _malformed(url, f"its columns are {file.schema_arrow.names}")


def _require_shards(table: pa.Table, line: int, group: int, url: str) -> None:
    shards = table["shard"].to_numpy()
    if not np.array_equal(shards, np.arange(line, line + len(shards))):
        raise _malformed(url, f"row group {group} does not hold shards {line} to {line + len(shards) - 1} in order")


def _require_ascending(values: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64], url: str) -> None:
    ascending = values[1:] > values[:-1]
    starts = offsets[1:-1]
    ascending[starts[(starts > 0) & (starts < len(values))] - 1] = True
    if not ascending.all():
        place = int(np.argmin(ascending)) + 1
        shard = int(np.searchsorted(offsets, place, side="right")) - 1
        raise _malformed(url, f"the rows of shard {shard} do not ascend")


def _missing(url: str) -> StoreError:
    return StoreError(f"{url}: no such file; restore it, or select again")


def _malformed(url: str, what: str) -> StoreError:
    return StoreError(f"{url}: not a selection of this format: {what}; restore it, or select again")


class SelectionWriter:
    """Writes a selection part by part, in bounded memory; make one with `selection_writer`."""

    def __init__(self, file: BinaryIO):
        self._file = _HashingFile(file)
        self._shards = 0
        self._total = 0
        self._counts: list[Integers] = []
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(self._file, mode="w"),
            schema.SELECTION_SCHEMA,
            compression="zstd",
            use_dictionary=False,
            column_encoding=schema.encodings(schema.SELECTION_SCHEMA),
            write_page_checksum=True,
        )

    def append(
        self,
        counts: npt.NDArray[np.int64],
        rows: npt.NDArray[np.uint32],
        weights: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Write the next part, in row groups of whole shards and about `SELECTION_GROUP_ROWS` selected rows.

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
        group = offsets[:-1] // schema.SELECTION_GROUP_ROWS
        cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(counts)]
        for start, stop in itertools.pairwise(cuts):
            self._parquet.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
        self._shards += len(counts)
        self._total += len(rows)
        self._counts.append(np.asarray(counts, dtype=np.int64))

    @property
    def total(self) -> int:
        """How many rows were written so far."""
        return self._total

    def close(self) -> None:
        """Write the footer; `digest` is final from here on."""
        self._file.tail = bytearray()
        self._parquet.close()

    def for_manifest(self) -> dict[str, str]:
        """What the manifest says of a finished file: digests of all of it and of its footer, and rows of each shard."""
        tail = bytes(self._file.tail or b"")
        counts = itertools.chain.from_iterable(part.tolist() for part in self._counts)
        return {
            "sha256": self.digest,
            "footer_sha256": hashlib.sha256(tail[-footer_bytes(tail) :]).hexdigest(),
            "per_shard": " ".join(map(str, counts)),
        }

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
        self.tail: bytearray | None = None  # what was written since it was set
        self.discards = False
        self.closed = False

    def write(self, data: bytes) -> int:
        if not self.discards:
            self.digest.update(data)
            self._file.write(data)
            if self.tail is not None:
                self.tail += data
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
