"""Score tables tell what made them, and by two digests each of their bytes; damaged ones count as missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynams_stream import Store, schema, storage
from dynams_stream.parquet_footer import footer_bytes, read_footer
from pipeline.pending import finished_parts
from pipeline.receipt import Receipt
from pipeline.score_table import score_table_file

IDENTITY = {"dataset": {"version": 1, "digest": "d" * 64}, "scorer": {"model": "m"}, "checkpoint": "c" * 64}


def score_table(part: int, lines: int = 1000) -> bytes:
    """The score table of a part that is one shard."""
    scores = np.random.default_rng(part).random(lines, dtype=np.float32)
    columns = {
        "shard": np.full(lines, part, dtype=np.int32),
        "row": np.arange(lines, dtype=np.int32),
        "key": pa.array([f"sample {row}" for row in range(lines)]),
        "error": pa.nulls(lines, pa.string()),
        **{name: np.zeros(lines, dtype=np.int32) for name in ("label", "predicted", "runner_up")},
        **dict.fromkeys(schema.SCORE_COLUMNS, scores),
    }
    table = pa.table([columns[name] for name in schema.SCORES_SCHEMA.names], schema=schema.SCORES_SCHEMA)
    receipt = Receipt(part=part, samples=lines, failed=0, labelled=lines, seconds={"read": 0.25})
    return bytes(score_table_file(table, json.dumps(IDENTITY), lambda: receipt)[0])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    for part in range(3):
        storage.write_bytes(store.path(schema.scores_path(1, part)), score_table(part))
    return store


@pytest.mark.parametrize("lines", [1000, 0])
def test_two_digests_settle_each_byte_of_a_table(store: Store, lines: int) -> None:
    data = score_table(0, lines)
    storage.write_bytes(store.path(schema.scores_path(1, 0)), data)
    end = len(data) - footer_bytes(data)
    told = pq.read_metadata(pa.BufferReader(data)).metadata[schema.DATA_DIGEST_KEY].decode()
    assert told == hashlib.sha256(data[:end]).hexdigest()
    assert finished_parts(store, 1)[0].footer_sha256 == hashlib.sha256(data[end:]).hexdigest()


def test_a_footer_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    table = pa.table({"a": [1]}).replace_schema_metadata({"long": "x" * 200_000})
    pq.write_table(table, tmp_path / "long.parquet")
    data = (tmp_path / "long.parquet").read_bytes()
    footer = read_footer(str(tmp_path / "long.parquet"))
    assert len(footer) > 200_000
    assert data.endswith(footer)
    assert data[: len(data) - len(footer)].startswith(b"PAR1")
    assert pq.read_metadata(pa.BufferReader(footer)).num_rows == 1


def test_a_damaged_footer_counts_as_missing_or_tells_what_it_did(store: Store) -> None:
    """Whichever byte changes; Arrow has errors of several kinds for that."""
    url, sound = store.path(schema.scores_path(1, 1)), score_table(1)
    missing = 0
    for place in range(len(sound) - footer_bytes(sound), len(sound), 29):
        damaged = bytearray(sound)
        damaged[place] ^= 0xFF
        Path(url).write_bytes(damaged)
        found = finished_parts(store, 1)
        assert {0, 2} <= set(found)
        if 1 not in found:
            missing += 1
    assert missing > 10
    for short in (b"", b"PAR1", sound[:-1], sound[:100]):
        Path(url).write_bytes(short)
        assert set(finished_parts(store, 1)) == {0, 2}


def test_a_table_that_the_store_cannot_read_is_not_missing(store: Store) -> None:
    url = Path(store.path(schema.scores_path(1, 1)))
    url.unlink()
    url.mkdir()
    with pytest.raises(OSError, match="part-000001"):
        finished_parts(store, 1)
