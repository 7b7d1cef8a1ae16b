"""SelectedSamples: by number, in batches, from threads and workers, with torch's samplers and with Grain."""

from __future__ import annotations

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_stores
import torch
from object_server import ObjectServer
from test_stream import FailsOn, identity
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, WeightedRandomSampler

from dynams_stream import schema, uses
from dynams_stream.errors import RoundNotFoundError, SampleError, ShardChangedError, ShardMissingError
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.samples import SelectedSamples
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from dynams_stream.uses import read_uses
from pipeline.index_job import build_index

COUNTS = (13, 0, 21, 9, 17)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = stream_stores.make_store(tmp_path_factory.mktemp("samples"), COUNTS)
    stream_stores.publish(store, stream_stores.some_rows(store, 0.6))
    return store


@pytest.fixture(scope="module")
def expected(store: Store) -> list[tuple[int, int]]:
    rows = stream_stores.some_rows(store, 0.6)
    return [(shard, row) for shard, selected in enumerate(rows) for row in selected]


def pairs(batch: list[Any]) -> list[tuple[int, int]]:
    return [tuple(sample) for sample in batch]


def test_samples_equal_those_of_the_unshuffled_stream(store: Store) -> None:
    samples = SelectedSamples(store)
    streamed = list(SelectedDataset(store, shuffle=False))
    assert len(samples) == len(streamed)
    assert [samples[number] for number in range(len(samples))] == streamed
    assert samples.__getitems__(range(len(samples))) == streamed
    assert samples[-1] == streamed[-1]
    assert samples[np.int64(3)] == samples[torch.tensor(3)] == streamed[3]


def test_a_batch_comes_in_the_order_asked_for_with_repetitions(store: Store, expected: list[tuple[int, int]]) -> None:
    samples = SelectedSamples(store, prepare=identity)
    asked = [5, 0, -1, 5, 17, 2]
    assert samples.__getitems__(asked) == [expected[number] for number in asked]
    assert samples.__getitems__([]) == []


def test_everything_and_weights(tmp_path: Path) -> None:
    store = stream_stores.make_store(tmp_path, COUNTS)
    assert len(SelectedSamples(store)) == sum(COUNTS)
    rows = stream_stores.some_rows(store, 0.5)
    stream_stores.publish(store, rows, [[shard + row / 64 for row in each] for shard, each in enumerate(rows)])
    samples = SelectedSamples(store)
    assert samples.round == 1
    for sample in samples.__getitems__(range(len(samples))):
        shard, row = identity(sample)
        assert sample["__weight__"] == shard + row / 64
    everything = SelectedSamples(store, round=None)
    assert (everything.round, len(everything)) == (None, sum(COUNTS))
    assert "everything, 60 samples" in repr(everything)


def test_it_stays_with_its_round(tmp_path: Path) -> None:
    store = stream_stores.make_store(tmp_path, COUNTS)
    old = stream_stores.some_rows(store, 0.5, 1)
    stream_stores.publish(store, old)
    samples = SelectedSamples(store, prepare=identity)
    stream_stores.publish(store, stream_stores.some_rows(store, 0.3, 2))
    copy = pickle.loads(pickle.dumps(samples))
    wanted = [(shard, row) for shard, each in enumerate(old) for row in each]
    assert samples.__getitems__(range(len(samples))) == copy.__getitems__(range(len(copy))) == wanted
    with pytest.raises(RoundNotFoundError, match="no published round 7"):
        SelectedSamples(store, round=7)


@pytest.mark.parametrize("index", [33, -34, 10**12])
def test_a_number_out_of_range_is_an_index_error(store: Store, index: int) -> None:
    with pytest.raises(IndexError, match=rf"index {index} is out of range; allowed are -33 to 32"):
        SelectedSamples(store)[index]
    with pytest.raises(TypeError):
        SelectedSamples(store)[1.5]  # type: ignore[index]


def test_nothing_selected_has_no_samples(tmp_path: Path) -> None:
    store = stream_stores.make_store(tmp_path, (3,))
    stream_stores.publish(store, [[]])
    assert len(SelectedSamples(store)) == 0
    with pytest.raises(IndexError, match="nothing is selected"):
        SelectedSamples(store)[0]


def test_trouble_names_shard_row_and_key(tmp_path: Path) -> None:
    store = stream_stores.make_store(tmp_path, COUNTS)
    with pytest.raises(SampleError, match=r"data-002\.tar: row 4, key .*: ValueError: cannot decode") as caught:
        SelectedSamples(store, prepare=FailsOn((2, 4))).__getitems__([0, 17, 3])
    assert (caught.value.shard, caught.value.row) == (store.dataset().urls[2], 4)
    Path(store.dataset().urls[3]).unlink()
    with pytest.raises(ShardMissingError, match=r"data-003\.tar") as missing:
        SelectedSamples(store)[34]
    assert (missing.value.row, bool(missing.value.key)) == (0, True)
    path = Path(store.dataset().urls[4])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        SelectedSamples(store)[-1]


# ---- loaders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_samplers_choose_the_order(store: Store, expected: list[tuple[int, int]], workers: int) -> None:
    samples = SelectedSamples(store, prepare=identity)
    order = list(RandomSampler(samples, generator=torch.Generator().manual_seed(5)))
    sampler = RandomSampler(samples, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(samples, batch_size=4, sampler=sampler, num_workers=workers, collate_fn=pairs)
    assert [sample for batch in loader for sample in batch] == [expected[number] for number in order]
    ranks = []
    for rank in range(2):
        split = DistributedSampler(samples, num_replicas=2, rank=rank, shuffle=True, seed=3)
        loader = DataLoader(samples, batch_size=4, sampler=split, num_workers=workers, collate_fn=pairs)
        ranks.append([sample for batch in loader for sample in batch])
    assert sorted({*ranks[0], *ranks[1]}) == sorted(expected)
    assert samples.stats().samples == 2 * len(expected) + len(expected) % 2


def test_weighted_sampling_draws_by_the_weights(tmp_path: Path) -> None:
    store = stream_stores.make_store(tmp_path, (4, 4))
    stream_stores.publish(store, [[0, 1], [2, 3]], [[0.0, 1.0], [0.0, 1.0]])
    samples = SelectedSamples(store)
    weights = [sample["__weight__"] for sample in samples.__getitems__(range(4))]
    drawn = [identity(samples[number]) for number in WeightedRandomSampler(weights, 20)]
    assert set(drawn) == {(0, 1), (1, 3)}


def test_threads_read_at_once(store: Store, expected: list[tuple[int, int]]) -> None:
    samples = SelectedSamples(store, prepare=identity)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(samples.__getitem__, list(range(len(samples))) * 20))
    assert found == expected * 20


def test_grain_takes_it_as_a_source(store: Store, expected: list[tuple[int, int]]) -> None:
    grain = pytest.importorskip("grain")
    samples = SelectedSamples(store, prepare=identity)
    dataset = grain.MapDataset.source(samples).shuffle(seed=1).to_iter_dataset(grain.ReadOptions(num_threads=4))
    first = [tuple(sample) for sample in dataset]
    assert sorted(first) == sorted(expected)
    assert first != expected
    batches = list(grain.MapDataset.source(samples)[::2].batch(3, batch_fn=list))
    assert [tuple(sample) for batch in batches for sample in batch] == expected[::2]
    iterator = iter(dataset)
    before = [tuple(next(iterator)) for _ in range(10)]
    state = iterator.get_state()
    iterator = iter(dataset)
    iterator.set_state(state)
    assert before + [tuple(sample) for sample in iterator] == first


# ---- marks -----------------------------------------------------------------------------------------------------------


def test_it_marks_its_round_when_made_and_again_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stream_stores.make_store(tmp_path, (4, 4))
    stream_stores.publish(store, stream_stores.some_rows(store, 0.6))
    folder = Path(store.path(schema.USES_FOLDER))
    samples = SelectedSamples(store)
    (mark,) = folder.iterdir()
    assert [(use.round, use.version) for use in read_uses(store)] == [(1, 1)]
    mark.unlink()
    assert samples[0]
    assert list(folder.iterdir()) == []  # it was left less than an hour ago
    assert pickle.loads(pickle.dumps(samples))[0]  # a copy in another process does not know
    assert list(folder.iterdir()) == [mark]
    monkeypatch.setattr(uses, "AGAIN_AFTER", 0.0)
    samples = SelectedSamples(store)
    shutil.rmtree(folder)
    loader = DataLoader(samples, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context="fork")
    assert sum(map(len, loader)) == len(samples)
    (use,) = read_uses(store)
    assert (use.round, use.who.endswith(f":{os.getpid()}")) == (1, False)


def test_everything_is_marked_with_its_dataset_version(tmp_path: Path) -> None:
    store = stream_stores.make_store(tmp_path, (4, 4))
    assert SelectedSamples(store, round=None)[0]
    assert [(use.round, use.version) for use in read_uses(store)] == [(0, 1)]


# ---- object stores ---------------------------------------------------------------------------------------------------


def test_a_batch_of_an_object_store_is_asked_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = stream_stores.make_shards(tmp_path / "shards", COUNTS)
    with ObjectServer(tmp_path / "shards", delay=0.02) as server:
        store = Store(tmp_path / "store")
        build_index(store, [f"{server.endpoint}/bucket/{Path(url).name}" for url in urls])
        server.requests.clear()
        samples = SelectedSamples(store, remote=RemoteOptions(gap=0), prepare=identity)
        found = samples.__getitems__(range(0, 60, 3))
        assert found == [identity(sample) for sample in list(SelectedDataset(store, shuffle=False))[::3]]
        assert server.most_at_once > 10
        server.requests.clear()
        samples = SelectedSamples(store, remote=RemoteOptions(gap=1 << 20), prepare=identity)
        assert samples.__getitems__(range(0, 60, 3)) == found
        assert len(server.requests) == samples.stats().requests == 4  # one for each shard that has samples
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(samples.__getitem__, range(60)))[::3] == found
