"""The whole job with shards, store and checkpoint in an object store: a real S3 server, real worker processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import torch
import webdataset as wds
from distributed import Client

import toy_models
from dynams_stream import ScorerSpec, SelectedDataset, Store, schema, storage
from dynams_stream.errors import RoundExistsError
from dynams_stream.uses import read_uses
from pipeline.cluster import dask_client
from pipeline.gc_job import find_garbage, remove_garbage
from pipeline.index_job import build_index
from pipeline.materialize_job import materialize
from pipeline.rescore import rescore
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.verify_job import verify_store

pytestmark = pytest.mark.slow
SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")


@pytest.fixture(scope="module")
def workers(s3_bucket: str) -> Iterator[Client]:
    """Two worker processes that know the way to the server."""
    with dask_client(workers=2) as client:
        yield client


@pytest.fixture(scope="module")
def remote(s3_bucket: str, digit_shards: list[str], workers: Client, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An indexed store in the bucket, two rounds of two checkpoints there, all through S3."""
    root, system = f"{s3_bucket}/job", fsspec.filesystem("s3", use_listings_cache=False)
    for path in map(Path, digit_shards):
        system.put_file(str(path), f"{root}/shards/{path.name}")
    for seed in (0, 1):
        path = tmp_path_factory.mktemp("checkpoint") / "linear.pt"
        torch.save(toy_models.linear(seed).state_dict(), path)
        system.put_file(str(path), f"{root}/ckpt/{seed}.pt")
    store = Store(f"{root}/store")
    build_index(store, [f"{root}/shards/{Path(url).name}" for url in digit_shards])
    for seed in (0, 1):
        made = rescore(store, SPEC, f"{root}/ckpt/{seed}.pt", fraction="0.3", client=workers)
        assert (made.published, made.round.number) == (True, seed + 1)
    return store


@pytest.fixture(scope="module")
def local(remote: Store, digit_shards: list[str], client: Client, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same on a local disk."""
    folder = tmp_path_factory.mktemp("local")
    store = Store(folder / "store")
    build_index(store, digit_shards)
    for seed in (0, 1):
        torch.save(toy_models.linear(seed).state_dict(), folder / f"{seed}.pt")
        scored = score_round(store, SPEC, checkpoint=str(folder / f"{seed}.pt"), client=client).number
        select_round(store, fraction="0.3", scores_of=scored)
    return store


def scores(store: Store, number: int) -> pa.Table:
    return store.round(number).scores().to_table()


def test_scores_and_selections_are_those_of_a_local_store(remote: Store, local: Store) -> None:
    for number in (1, 2):
        assert scores(remote, number).equals(scores(local, number))
        there, here = (one.round(number).manifest["selection"]["sha256"] for one in (remote, local))
        assert there == here


def test_doing_it_again_does_nothing(remote: Store, workers: Client) -> None:
    before = {
        name: storage.version(name) for name in fsspec.filesystem("s3").find(f"{remote.url}/rounds", withdirs=False)
    }
    root = remote.url.removesuffix("/store")
    again = rescore(remote, SPEC, f"{root}/ckpt/1.pt", fraction="0.3", client=workers)
    assert (again.published, again.round.number) == (False, 2)
    after = {
        name: storage.version(name) for name in fsspec.filesystem("s3").find(f"{remote.url}/rounds", withdirs=False)
    }
    assert after == before


def test_a_published_round_cannot_be_published_over(remote: Store) -> None:
    before = storage.read_bytes(remote.path(schema.manifest_path(1)))
    with pytest.raises(RoundExistsError):
        remote.publish(1, {**remote.round(1).manifest, "library": "another"})
    assert storage.read_bytes(remote.path(schema.manifest_path(1))) == before


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")}


def test_loaders_read_the_same_samples_and_leave_their_mark(remote: Store, local: Store) -> None:
    found = [plain(sample) for sample in SelectedDataset(remote, round=1, shuffle=False)]
    assert found == [plain(sample) for sample in SelectedDataset(local, round=1, shuffle=False)]
    assert [(use.round, use.version) for use in read_uses(remote)] == [(1, 1)]


def test_the_selection_becomes_shards_in_the_store(remote: Store, local: Store, tmp_path: Path) -> None:
    there = materialize(remote, f"{remote.url}-selected", samples_per_shard=100)
    here = materialize(local, str(tmp_path / "selected"), samples_per_shard=100)
    assert there.shards == here.shards
    for shard in there.shards:
        data = storage.read_bytes(storage.join(there.folder, shard.name))
        assert hashlib.sha256(data).hexdigest() == shard.sha256
    urls = [storage.join(here.folder, shard.name) for shard in here.shards]
    assert [plain(sample) for sample in wds.WebDataset(urls, shardshuffle=False)] == [
        plain(sample) for sample in SelectedDataset(remote, round=2, shuffle=False)
    ]
    assert materialize(remote, there.folder, samples_per_shard=100).written == 0


def test_it_is_verified_damaged_and_collected_like_a_local_one(remote: Store, workers: Client) -> None:
    assert verify_store(remote, shards=True).problems == ()
    url = remote.path(schema.selection_path(1))
    sound = storage.read_bytes(url)
    storage.write_bytes(url, sound[:-9] + b"x" + sound[-8:])
    assert [problem.path for problem in verify_store(remote).problems] == [schema.selection_path(1)]
    storage.write_bytes(url, sound)
    select_round(remote, fraction="0.2", scores_of=2)
    now = datetime.now(UTC)
    assert find_garbage(remote, keep=1, now=now + timedelta(days=13)).rounds == ()  # round 1 was read just now
    found = find_garbage(remote, keep=1, now=now + timedelta(days=15))
    assert found.rounds == (1,)
    remove_garbage(remote, found)
    assert [one.number for one in remote.rounds()] == [2, 3]
    assert remote.round_numbers() == [2, 3]
    verified = verify_store(remote)
    assert (verified.problems, verified.orphans, verified.unfinished) == ((), (), ())
    root = remote.url.removesuffix("/store")
    again = rescore(remote, SPEC, f"{root}/ckpt/0.pt", fraction="0.3", client=workers)
    assert (again.published, again.round.number) == (True, 4)
    assert json.loads(storage.read_bytes(remote.path(schema.manifest_path(4))))["counts"]["selected"] == 432
