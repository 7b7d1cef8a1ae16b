"""Store, Dataset and Round: on tables written by hand, not by the code that usually writes them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynams_stream import schema, storage
from dynams_stream.dataset import Part
from dynams_stream.errors import NotIndexedError, RoundExistsError, RoundNotFoundError, StoreError, UsageError
from dynams_stream.store import SelectionClaim, Store

COUNTS = [3, 0, 2, 4]
PARTS = [0, 0, 1, 1]
ROWS = [[0, 2], [], [1], [0, 1, 3]]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "store" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def write_table(store: Store, path: str, columns: dict[str, Any], kind: pa.Schema) -> str:
    """Write a Parquet file and give its SHA-256."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=kind), sink)
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(store.path(path), data)
    return hashlib.sha256(data).hexdigest()


def write_dataset(store: Store, version: int, counts: list[int] = COUNTS, **changes: Any) -> str:
    shards = len(counts)
    columns = {
        "shard": list(range(shards)),
        "url": [f"/data/train-{shard:06d}.tar" for shard in range(shards)],
        "bytes": [1024 * (shard + 1) for shard in range(shards)],
        "fingerprint": [f"size={1024 * (shard + 1)};time=1;head=00000000" for shard in range(shards)],
        "samples": counts,
        "part": PARTS[:shards],
        "index_file": [f"index/part-{part:06d}-abc.parquet" for part in PARTS[:shards]],
    }
    return write_table(store, schema.dataset_path(version), columns | changes, schema.DATASET_SCHEMA)


def write_selection(store: Store, number: int, rows: list[list[int]] = ROWS) -> str:
    columns = {"shard": list(range(len(rows))), "rows": rows, "weights": [None] * len(rows)}
    return write_table(store, schema.selection_path(number), columns, schema.SELECTION_SCHEMA)


def write_scores(store: Store, number: int, part: int, value: float = 0.5) -> None:
    shard = [s for s in range(4) if PARTS[s] == part for _ in range(COUNTS[s])]
    row = [r for s in range(4) if PARTS[s] == part for r in range(COUNTS[s])]
    columns: dict[str, Any] = {name: [None] * len(row) for name in schema.SCORES_SCHEMA.names}
    columns |= {"shard": shard, "row": row, "key": [str(r) for r in row], "distance": [value] * len(row)}
    write_table(store, schema.scores_path(number, part), columns, schema.SCORES_SCHEMA)


def manifest(number: int, dataset: str = "", selection: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "format": schema.FORMAT_VERSION,
        "round": number,
        "dataset": {"version": 1, "digest": dataset},
        "epoch": 4,
        "strategy": "distance",
        "fraction": 0.6,
        "counts": {"all": 9, "scored": 9, "failed": 0, "selected": 6},
        "selection": {"sha256": selection},
        "scores_of": None,
        "score_parts": [0, 1],
    } | changes


def write_manifest(store: Store, number: int, content: dict[str, Any]) -> None:
    storage.write_bytes(store.path(schema.manifest_path(number)), json.dumps(content).encode())


def write_round(store: Store, number: int, **changes: Any) -> None:
    """A published round, with the dataset it needs."""
    digest = write_dataset(store, 1)
    for part in (0, 1):
        write_scores(store, number, part)
    write_manifest(store, number, manifest(number, digest, write_selection(store, number), **changes))


# ---- dataset ---------------------------------------------------------------------------------------------------------


def test_an_empty_store(store: Store) -> None:
    assert store.dataset_versions() == []
    assert store.round_numbers() == []
    assert store.rounds() == []
    assert store.claims() == {}
    with pytest.raises(NotIndexedError, match="dynams index"):
        store.dataset()
    with pytest.raises(RoundNotFoundError, match="no published round yet"):
        store.round()


def test_reads_a_dataset(store: Store) -> None:
    digest = write_dataset(store, 1)
    dataset = store.dataset()
    assert (dataset.version, dataset.digest, dataset.samples) == (1, digest, 9)
    assert dataset.urls == tuple(f"/data/train-{shard:06d}.tar" for shard in range(4))
    assert dataset.sizes.tolist() == [1024, 2048, 3072, 4096]
    assert dataset.counts.tolist() == COUNTS
    assert dataset.fingerprints[2] == "size=3072;time=1;head=00000000"
    assert dataset.parts == (
        Part(number=0, first_shard=0, shards=2, samples=3, index_file="index/part-000000-abc.parquet"),
        Part(number=1, first_shard=2, shards=2, samples=6, index_file="index/part-000001-abc.parquet"),
    )
    assert dataset.part_of_shard.tolist() == PARTS


def test_the_newest_dataset_unless_told_otherwise(store: Store) -> None:
    for version in (1, 2, 9, 10):
        write_dataset(store, version, COUNTS[:2])
    storage.write_bytes(store.path("dataset/notes.txt"), b"a stranger")
    storage.write_bytes(store.path("dataset/copy.parquet"), b"another")
    write_dataset(store, 11)
    assert store.dataset_versions() == [1, 2, 9, 10, 11]
    assert store.dataset().version == 11
    assert store.dataset(9).samples == 3
    with pytest.raises(NotIndexedError, match=r"no dataset version 3; it holds \[1, 2, 9, 10, 11\]"):
        store.dataset(3)


def test_a_dataset_of_another_format_is_refused(store: Store) -> None:
    write_dataset(store, 1)
    table = pq.read_table(pa.BufferReader(storage.read_bytes(store.path(schema.dataset_path(1)))))
    for metadata, complaint in (({schema.FORMAT_KEY: b"2"}, "format 2, this version reads 1"), ({}, "format unknown")):
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        storage.write_bytes(store.path(schema.dataset_path(1)), sink.getvalue().to_pybytes())
        with pytest.raises(StoreError, match=complaint):
            store.dataset()
    storage.write_bytes(store.path(schema.dataset_path(1)), b"not parquet")
    with pytest.raises(StoreError, match="not a readable Parquet file"):
        store.dataset()


def test_shards_may_have_moved() -> None:
    assert Store("/runs/a").shard_url("s3://bucket/train/a.tar") == "s3://bucket/train/a.tar"
    assert Store("/runs/a", shards_at="/local/copy").shard_url("s3://bucket/train/a.tar") == "/local/copy/a.tar"
    assert Store("/runs/a", shards_at="s3://b/c/").shard_url("/data/a.tar") == "s3://b/c/a.tar"


def test_a_store_is_a_handle_that_crosses_to_workers(store: Store) -> None:
    write_round(store, 1)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.url == store.url
    assert repr(copy) == f"Store({store.url!r})"
    assert pickle.loads(pickle.dumps(store.round())).selection().total == 6


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_reads_a_round(store: Store) -> None:
    write_round(store, 1)
    found = store.round()
    assert (found.number, found.fraction, found.epoch) == (1, 0.6, 4)
    assert found.counts == {"all": 9, "scored": 9, "failed": 0, "selected": 6}
    assert found.dataset().counts.tolist() == COUNTS
    selection = found.selection()
    assert [selection.rows(shard).tolist() for shard in range(4)] == ROWS
    table = found.scores().to_table(columns=["shard", "row", "distance"])
    assert table["shard"].to_pylist() == [s for s in range(4) for _ in range(COUNTS[s])]
    assert table["row"].to_pylist() == [r for s in range(4) for r in range(COUNTS[s])]
    assert set(table["distance"].to_pylist()) == {0.5}


def test_rounds_come_in_order_of_their_numbers(store: Store) -> None:
    for number in (9, 10, 2, 1_000_000, 999_999):
        write_round(store, number)
    assert [found.number for found in store.rounds()] == [2, 9, 10, 999_999, 1_000_000]
    assert store.round("latest").number == 1_000_000
    assert storage.list_names(store.path("rounds"))[:3] == ["000002", "000009", "000010"]


def test_a_round_is_there_once_its_manifest_is(store: Store) -> None:
    write_round(store, 1)
    digest = write_selection(store, 2)
    for part in (0, 1):
        write_scores(store, 2, part)
    storage.write_bytes(store.path("rounds/000002/.round.json.0123.tmp"), b"{}")
    assert store.round_numbers() == [1, 2]
    assert not store.is_published(2)
    assert [found.number for found in store.rounds()] == [1]
    assert store.round().number == 1
    for which in (2, "2", "000002"):
        with pytest.raises(RoundNotFoundError, match="no published round 2"):
            store.round(which)
    published = store.publish(2, manifest(2, selection=digest))
    assert published.number == 2
    assert store.round().number == 2
    assert store.round("000001").number == 1


@pytest.mark.parametrize("which", [0, -1, "newest", "", "1.5", True, "²x"])
def test_rounds_have_numbers(store: Store, which: Any) -> None:
    with pytest.raises(UsageError, match="a number from 1 on"):
        store.round(which)


def test_strangers_in_rounds_are_no_rounds(store: Store) -> None:
    write_round(store, 1)
    storage.write_bytes(store.path("rounds/README.txt"), b"a stranger")
    storage.write_bytes(store.path("rounds/backup of 1/round.json"), b"{}")
    assert store.round_numbers() == [1]
    assert [found.number for found in store.rounds()] == [1]


def test_a_manifest_of_another_format_is_refused(store: Store) -> None:
    write_round(store, 1)
    write_manifest(store, 1, manifest(1, format=2))
    with pytest.raises(StoreError, match="format 2, this version reads 1"):
        store.round()
    storage.write_bytes(store.path(schema.manifest_path(1)), b"{ half")
    with pytest.raises(StoreError, match=r"round\.json: not the JSON"):
        store.rounds()


def test_another_selection_than_the_published_one_is_refused(store: Store) -> None:
    write_round(store, 1)
    write_selection(store, 1, [[0, 1], [], [1], [0, 1, 3]])
    with pytest.raises(StoreError, match=r"selection\.parquet is not the file that was published"):
        store.round().selection()
    storage.remove(store.path(schema.selection_path(1)))
    with pytest.raises(StoreError, match="no such file"):
        store.round().selection()


def test_another_dataset_than_the_rounds_is_refused(store: Store) -> None:
    write_round(store, 1)
    write_dataset(store, 2, COUNTS[:2])
    assert store.round().dataset().version == 1
    write_dataset(store, 1, [3, 1, 1, 4])
    with pytest.raises(StoreError, match="another dataset version 1"):
        store.round().dataset()


def test_scores_are_the_files_that_the_manifest_names(store: Store) -> None:
    write_round(store, 1)
    write_scores(store, 1, 1, value=0.25)
    storage.write_bytes(store.path("rounds/000001/scores/.part-000001.parquet.0123.tmp"), b"half a table")
    storage.write_bytes(store.path("rounds/000001/scores/part-000002.parquet"), b"of another job")
    storage.write_bytes(store.path("rounds/000001/scores/README.txt"), b"a stranger")
    table = store.round().scores().to_table(columns=["distance"])
    assert table["distance"].to_pylist() == [0.5] * 3 + [0.25] * 6
    assert len(store.round().scores().files) == 2


def test_scores_of_an_earlier_round(store: Store) -> None:
    write_round(store, 1)
    digest = write_selection(store, 2)
    write_manifest(store, 2, manifest(2, selection=digest, scores_of=1))
    assert store.round(2).scores().count_rows() == 9
    assert sorted(store.round(2).scores().files) == sorted(store.round(1).scores().files)


def test_a_random_selection_has_no_scores(store: Store) -> None:
    write_round(store, 1, score_parts=[], strategy="random:3")
    with pytest.raises(StoreError, match=r"no score tables \(strategy 'random:3' needs none\)"):
        store.round().scores()


# ---- publishing ------------------------------------------------------------------------------------------------------


def test_publishing_happens_once(store: Store) -> None:
    digest = write_selection(store, 1)
    store.publish(1, manifest(1, selection=digest))
    before = storage.read_bytes(store.path(schema.manifest_path(1)))
    with pytest.raises(RoundExistsError, match="round 1 was published by another job"):
        store.publish(1, manifest(1, selection=digest, fraction=0.9))
    assert storage.read_bytes(store.path(schema.manifest_path(1))) == before


def test_only_the_selection_that_was_cut_is_published(store: Store) -> None:
    digest = write_selection(store, 1)
    with pytest.raises(StoreError, match="not the file that was cut"):
        store.publish(1, manifest(1, selection="0" * 64))
    storage.remove(store.path(schema.selection_path(1)))
    with pytest.raises(StoreError, match="not there, round 1 cannot be published"):
        store.publish(1, manifest(1, selection=digest))
    assert not store.is_published(1)


@pytest.mark.parametrize("retired", [2, 1])
def test_a_round_that_is_removed_or_whose_scores_are_is_not_published(store: Store, retired: int) -> None:
    digest = write_selection(store, 2)
    store.retire(retired)
    with pytest.raises(
        RoundNotFoundError, match=rf"`dynams gc` removes round {retired}, .* run the same command again"
    ):
        store.publish(2, manifest(2, selection=digest, scores_of=1))
    assert not store.is_published(2)
    store.unretire(retired)
    assert store.retired() == set()
    assert store.publish(2, manifest(2, selection=digest, scores_of=1)).number == 2


def test_publishing_clears_up_behind_killed_writers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = write_selection(store, 1)
    write_scores(store, 1, 0)
    for name in ("scores/.part-000001.parquet.0.tmp", ".selection.parquet.1.tmp", ".round.json.2.tmp"):
        (tmp_path / "rounds/000001" / name).write_bytes(b"half")
    store.publish(1, manifest(1, selection=digest))
    assert storage.list_names(store.path("rounds/000001")) == ["round.json", "scores", "selection.parquet"]
    assert storage.list_names(store.path("rounds/000001/scores")) == ["part-000000.parquet"]


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_claims_count_up_from_what_is_there(store: Store) -> None:
    assert store.claim_round({"identity": {"a": 1}}) == 1
    assert store.claim_round({"identity": {"a": 1}}) == 2
    write_round(store, 9)
    assert store.claim_round({"b": [1, None, "x"]}) == 10
    assert store.claims() == {1: {"identity": {"a": 1}}, 2: {"identity": {"a": 1}}, 10: {"b": [1, None, "x"]}}
    storage.write_bytes(store.path("control/claims/notes.txt"), b"a stranger")
    assert list(store.claims()) == [1, 2, 10]


def test_one_intent_has_a_rounds_selection(store: Store) -> None:
    number = store.claim_round({})
    claim = store.claim_selection(number, {"strategy": "distance", "fraction": 0.5, "parts": (1, 2)})
    assert claim is SelectionClaim.MADE
    claim = store.claim_selection(number, {"strategy": "distance", "fraction": 0.5, "parts": [1, 2]})
    assert claim is SelectionClaim.THERE
    assert not store.claim_selection(number, {"strategy": "distance", "fraction": 0.4, "parts": [1, 2]})
    assert store.claim_selection(store.claim_round({}), {"strategy": "distance", "fraction": 0.4})
    assert list(store.claims()) == [1, 2]
    assert list(store.claims(but=[1, 7])) == [2]


def test_a_broken_claim_is_named(store: Store) -> None:
    store.claim_round({})
    storage.write_bytes(store.path("control/claims/000001.json"), b"{ half")
    with pytest.raises(StoreError, match=r"claims/000001\.json: not the JSON of a claim"):
        store.claims()


def claim_many(url: str, name: str, gate: Any, outcome: Any) -> None:
    store = Store(url)
    gate.wait()
    outcome.put((name, [store.claim_round({"by": name}) for _ in range(15)]))


def test_racing_processes_claim_different_numbers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, outcome = context.Barrier(3), context.SimpleQueue()
    names = ["a", "b", "c"]
    processes = [context.Process(target=claim_many, args=(str(tmp_path), name, gate, outcome)) for name in names]
    for process in processes:
        process.start()
    numbers = dict(outcome.get() for _ in processes)
    for process in processes:
        process.join()
    assert sorted(number for mine in numbers.values() for number in mine) == list(range(1, 46))
    claims = Store(tmp_path).claims()
    assert all(claims[number] == {"by": name} for name, mine in numbers.items() for number in mine)


def test_claims_go_on_when_listings_lag(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system that caches folders: the conflict itself tells that the number is taken."""
    for _ in range(3):
        store.claim_round({})
    monkeypatch.setattr(storage, "list_names", lambda folder: [])
    assert store.claim_round({}) == 4


def test_an_answer_lost_on_the_way_is_no_conflict(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client repeats a request whose answer it lost, and is told that the file is there: its own."""
    original = storage.create

    def repeated(url: str, data: bytes) -> None:
        original(url, data)
        raise FileExistsError(url)

    digest = write_selection(store, 1)
    monkeypatch.setattr(storage, "create", repeated)
    assert store.claim_round({}) == 2
    assert list(store.claims()) == [2]
    if not storage.is_local(store.url):
        assert store.publish(1, manifest(1, selection=digest)).number == 1


def test_an_exact_numpy_count_is_kept(store: Store) -> None:
    write_dataset(store, 1, [2**40, 1])
    assert store.dataset().samples == 2**40 + 1
    assert store.dataset().counts.dtype == np.int64
