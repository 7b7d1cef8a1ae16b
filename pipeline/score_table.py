"""The score table of one part: it grows batch by batch, and becomes a Parquet file that says what made it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from dynams_stream import schema
from pipeline.receipt import Receipt

ERRORS_KEPT = 10
"""Failed samples that a receipt names; the table names all."""


@dataclass(eq=False)
class Batch:
    """Decoded samples, in (shard, row) order.

    Attributes:
        shards, rows, keys, labels: of each; -1 is no label.
        errors: what failed about it, or None.
        inputs: for each shape (and dtype) of input, the positions in the batch that have it and their stacked inputs;
            what failed is in none.
    """

    shards: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    inputs: list[tuple[list[int], Tensor]] = field(default_factory=list)


class ScoreTable:
    """The lines of one part, appended batch by batch in (shard, row) order.

    Args:
        bad_shards: numbers of the shards whose samples nobody can look at; they are counted, and not named one by one.
    """

    def __init__(self, bad_shards: Collection[int] = ()) -> None:
        self._tables: list[pa.Table] = []
        self._bad_shards = list(bad_shards)
        self.lines = 0
        self.errors: list[str] = []
        self.failed = 0
        self.unread = 0
        self.labelled = 0

    def add(self, batch: Batch, scores: Mapping[str, np.ndarray]) -> None:
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
        self.lines += len(failed)
        self.failed += int(failed.sum())
        self.labelled += int((~unlabelled).sum())
        unread = np.isin(batch.shards, self._bad_shards)
        self.unread += int(unread.sum())
        for position in np.flatnonzero(failed & ~unread)[: max(0, ERRORS_KEPT - len(self.errors))]:
            self.errors.append(
                f"shard {batch.shards[position]}, row {batch.rows[position]}, key {batch.keys[position]!r}: "
                f"{reasons[position]}"
            )

    def table(self) -> pa.Table:
        """All lines so far, in (shard, row) order."""
        return pa.concat_tables(self._tables) if self._tables else schema.SCORES_SCHEMA.empty_table()

    def parquet(self, identity: str, receipt: Callable[[], Receipt]) -> tuple[memoryview, Receipt]:
        """The file's bytes, and the receipt that its footer holds.

        Args:
            identity: JSON that says what decided the scores.
            receipt: called when all lines are encoded, so that it can count the seconds of that.
        """
        return score_table_file(self.table(), identity, receipt)


def score_table_file(table: pa.Table, identity: str, receipt: Callable[[], Receipt]) -> tuple[memoryview, Receipt]:
    """`ScoreTable.parquet` of lines that are there already, in `schema.SCORES_SCHEMA` and (shard, row) order."""
    buffer = io.BytesIO()
    writer = pq.ParquetWriter(
        buffer,
        schema.SCORES_SCHEMA,
        compression="zstd",
        use_dictionary=["error", "label", "predicted", "runner_up"],
        column_encoding=schema.encodings(schema.SCORES_SCHEMA),
        write_page_checksum=True,
    )
    for start, stop in _shard_runs(table["shard"].to_numpy()):
        writer.write_table(table.slice(start, stop - start), row_group_size=schema.ROW_GROUP_ROWS)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()  # all of the file but its footer, which `close` writes
    made = receipt()
    writer.add_key_value_metadata(
        {
            schema.IDENTITY_KEY.decode(): identity,
            schema.RECEIPT_KEY.decode(): json.dumps(asdict(made)),
            schema.DATA_DIGEST_KEY.decode(): digest,
        }
    )
    writer.close()
    return buffer.getbuffer(), made


def _shard_runs(shards: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each shard's lines, so that a reader of one shard reads its row group alone."""
    borders = np.flatnonzero(np.diff(shards)) + 1
    edges = [0, *borders.tolist(), len(shards)]
    return ((start, stop) for start, stop in pairwise(edges) if stop > start)
