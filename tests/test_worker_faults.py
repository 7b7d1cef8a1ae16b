"""Workers in trouble: killed ones, bad samples counted over all of them, stale plans, shards that change under way."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import stream_stores
import webdataset as wds
from test_stream import FailsOn, expected_order, identity
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from dynams_stream import schema
from dynams_stream.errors import SampleError, ShardChangedError, ShardUnreadableError, StateError
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it

COUNTS = (13, 0, 21, 9, 17)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return stream_stores.make_store(tmp_path, COUNTS)


def pairs(batch: list[Any]) -> list[tuple[int, int]]:
    return [tuple(sample) for sample in batch]


# ---- killed workers --------------------------------------------------------------------------------------------------


class KillsItself:
    """A `prepare` that ends its process, as the kernel does when memory runs out."""

    def __init__(self, *at: tuple[int, int]):
        self.at = at

    def __call__(self, sample: dict[str, Any]) -> tuple[int, int]:
        if identity(sample) in self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return identity(sample)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader, wds.WebLoader])
def test_a_killed_worker_is_an_error_within_seconds(store: Store, kind: Any, method: str) -> None:
    order = expected_order([list(range(count)) for count in COUNTS])
    dataset = SelectedDataset(store, batch_size=4, prepare=KillsItself(order[30]))
    loader = kind(dataset, batch_size=4, num_workers=2, collate_fn=pairs, multiprocessing_context=method)
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"DataLoader worker \(pid\(?s?\)? \d+\).*(killed by signal|exited unexpectedly)"
    ):
        list(loader)
    assert time.monotonic() - began < 30


# ---- bad samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_skipped_samples_are_counted_over_all_workers(store: Store, method: str) -> None:
    order = expected_order([list(range(count)) for count in COUNTS])
    bad = [order[0], order[5], order[10], order[15]]  # two for each of the workers
    options = {"batch_size": 5, "num_workers": 2, "collate_fn": pairs, "multiprocessing_context": method}
    dataset = SelectedDataset(store, batch_size=5, prepare=FailsOn(*bad), on_error="skip", max_errors=4)
    assert sum(map(len, DataLoader(dataset, **options))) == sum(COUNTS)
    assert dataset.stats().skipped == 4
    assert dataset.stats().samples == sum(COUNTS)
    assert sum(map(len, DataLoader(dataset, **options))) == sum(COUNTS)  # a new iteration may skip as many again
    dataset = SelectedDataset(store, batch_size=5, prepare=FailsOn(*bad), on_error="skip", max_errors=3)
    with pytest.raises(SampleError, match=r"error 4 of this iteration, max_errors=3"):
        list(DataLoader(dataset, **options))


@pytest.mark.slow
def test_persistent_workers_count_each_iteration_for_itself(store: Store) -> None:
    dataset = SelectedDataset(store, batch_size=5, prepare=FailsOn((2, 4), (4, 9)), on_error="skip", max_errors=3)
    loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=pairs, persistent_workers=True)
    for epoch in range(6):
        dataset.set_epoch(epoch)
        assert sum(map(len, loader)) == sum(COUNTS)
    assert 12 <= dataset.stats().skipped <= 18  # a bad sample may stand in for the other one


def test_a_bad_sample_is_logged_once_over_the_epochs(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    dataset = SelectedDataset(store, prepare=FailsOn((2, 4)), on_error="skip", max_errors=1)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            dataset.set_epoch(epoch)
            assert (2, 4) not in list(dataset)
    assert [record.getMessage().split(": ValueError")[0] for record in caplog.records] == [
        f"skipped (1 of at most 1): {store.dataset().urls[2]}: row 4, key 'xx/0004'"
    ]
    assert dataset.stats().skipped == 3


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_a_shard_cut_short_in_mid_epoch_is_detected(store: Store) -> None:
    path = Path(store.dataset().urls[2])
    running = iter(SelectedDataset(store, shuffle=False))
    while next(running)["__url__"] != str(path):
        pass
    os.truncate(path, 4096)
    with pytest.raises(ShardChangedError, match=r"data-002\.tar: .*asked for \d+ bytes at \d+, got \d+") as caught:
        list(running)
    assert (caught.value.shard, caught.value.key is None) == (str(path), False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_overwritten_between_epochs_is_detected(store: Store, workers: int) -> None:
    path = Path(store.dataset().urls[2])
    other = path.read_bytes().replace(b"2004", b"9999")
    dataset = SelectedDataset(store, batch_size=4)
    loader = DataLoader(
        dataset,
        batch_size=4,
        num_workers=workers,
        collate_fn=list,
        persistent_workers=workers > 0,
        prefetch_factor=None,
    )
    assert sum(map(len, loader)) == sum(COUNTS)
    with open(path, "r+b") as file:  # as `cp` does: the same file, which is open in the reader, with other bytes
        file.write(other)
    dataset.set_epoch(1)
    with pytest.raises(ShardChangedError, match=r"data-002\.tar: not the shard that was indexed"):
        list(loader)


def test_a_shard_that_cannot_be_read_is_named(store: Store) -> None:
    path = Path(store.dataset().urls[2])
    path.unlink()
    path.mkdir()
    with pytest.raises(ShardUnreadableError, match=r"data-002\.tar.*a folder, not a file") as caught:
        list(SelectedDataset(store))
    assert caught.value.shard == str(path)
    assert isinstance(caught.value.row, int)


def test_a_disk_that_fails_is_no_decoding_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if size > 600 and "data-003" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(5, "Input/output error")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(
        ShardUnreadableError, match=r"data-003\.tar: \d+ bytes at \d+ cannot be read .*Input/output error"
    ):
        list(SelectedDataset(store))


# ---- stale plans -----------------------------------------------------------------------------------------------------


class Detached(IterableDataset[Any]):
    """Takes a dataset to a worker as bytes, as some launchers do: without the memory that it shares with its maker."""

    def __init__(self, data: bytes):
        self.data = data
        self.dataset: SelectedDataset | None = None

    def __iter__(self) -> Any:
        if self.dataset is None:
            self.dataset = pickle.loads(self.data)
        return iter(self.dataset)


def test_a_persistent_worker_that_set_epoch_cannot_reach_says_so(store: Store) -> None:
    dataset = SelectedDataset(store, batch_size=4).map(identity)
    loader = DataLoader(
        Detached(pickle.dumps(dataset)), batch_size=4, num_workers=1, collate_fn=pairs, persistent_workers=True
    )
    assert [pair for batch in loader for pair in batch] == expected_order([list(range(count)) for count in COUNTS])
    dataset.set_epoch(1)
    with pytest.raises(StateError, match="a copy of the dataset that set_epoch does not reach"):
        list(loader)


def test_a_worker_that_finds_another_round_than_the_main_process_says_so(store: Store) -> None:
    stream_stores.publish(store, stream_stores.some_rows(store, 0.5))
    dataset = SelectedDataset(store, batch_size=4).map(identity)
    other = Store(store.url)
    stream_stores.publish(other, stream_stores.some_rows(store, 0.4, 1))
    for path in (schema.selection_path, schema.manifest_path):  # somebody breaks the rule that rounds never change
        os.replace(other.path(path(2)), store.path(path(1)))
    manifest = json.loads(Path(store.path(schema.manifest_path(1))).read_text())
    assert manifest["counts"]["selected"] > 0
    loader = DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=pairs, multiprocessing_context="spawn")
    with pytest.raises(StateError, match="round 1 is not here what it is in the main process"):
        list(loader)
