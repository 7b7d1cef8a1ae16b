"""Local shards: announced to the kernel only when they come from a disk, few open at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_stores
from test_stream import expected_order, identity

from dynams_stream import local_shards
from dynams_stream.local_shards import LocalShards
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset

COUNTS = (13, 0, 21, 9, 17)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stream_stores.make_store(tmp_path_factory.mktemp("local"), COUNTS)


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(shard, first byte, bytes) of every notice to the kernel."""
    notices: list[tuple[str, int, int]] = []

    def advise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        notices.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), start, size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return notices


def disk(monkeypatch: pytest.MonkeyPatch, blocks: Any) -> None:
    """Let the kernel's count of blocks read from disks be what `blocks()` says."""
    monkeypatch.setattr(local_shards, "_disk_reads", blocks)


def test_samples_from_the_page_cache_are_read_without_notice(
    store: Store, announced: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(monkeypatch, lambda: 7)
    assert len(list(SelectedDataset(store))) == sum(COUNTS)
    assert announced == []


def test_samples_from_a_disk_are_announced_before_they_are_read(
    store: Store, announced: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = iter(range(1000))
    disk(monkeypatch, lambda: next(reads))
    stream_stores.publish(store, stream_stores.some_rows(store, 0.4))
    dataset = SelectedDataset(store, prepare=identity)
    order = expected_order(stream_stores.some_rows(store, 0.4))
    assert list(dataset) == order
    source = dataset.pipeline[0]
    index = source._reader._reader.tables
    shards, rows = (np.array(column) for column in zip(*order, strict=True))
    found = index.find(shards, rows)
    for shard, start, size in zip(shards.tolist(), found.offsets.tolist(), found.spans.tolist(), strict=True):
        name = os.path.basename(store.dataset().urls[shard])
        assert any(n == name and begin <= start and start + size <= begin + b for n, begin, b in announced)
    assert len(announced) < len(order)  # neighbours are announced together


def test_a_whole_shard_is_announced_at_once(
    store: Store, announced: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = iter(range(1000))
    disk(monkeypatch, lambda: next(reads))
    assert len(list(SelectedDataset(store, round=None))) == sum(COUNTS)
    assert sorted(name for name, _, _ in announced) == ["data-000.tar", "data-002.tar", "data-003.tar", "data-004.tar"]


def test_a_missing_shard_is_an_error_of_its_samples_not_of_the_notice(
    tmp_path: Path, announced: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = iter(range(1000))
    disk(monkeypatch, lambda: next(reads))
    store = stream_stores.make_store(tmp_path, COUNTS)
    os.remove(store.dataset().urls[3])
    dataset = SelectedDataset(store, on_error="skip", max_errors=100, prepare=identity)
    assert {shard for shard, _ in dataset} == {0, 2, 4}


def test_few_files_are_open_and_a_chunk_goes_round_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_shards, "_MOST_OPEN", 2)
    shards = LocalShards(store, store.dataset())
    everything = np.array([0, 2, 3, 4] * 5)
    shards.begin_chunk(everything, np.zeros(20, dtype=np.int64), np.full(20, 512))
    opened = 0
    for shard in everything.tolist():
        if shard not in shards.descriptors:
            shards.open(shard)
            opened += 1
        assert shards.pread(shard, 0, 512) == Path(store.dataset().urls[shard]).read_bytes()[:512]
        assert len(shards.descriptors) <= 2
    assert opened < 20  # closing the oldest would open each file anew each time
    shards.close()
    assert shards.descriptors == {}
    assert len(shards.pread(4, 512, 100)) == 100


MANY_FILES = """
import os, resource, sys
from dynams_stream.stream import SelectedDataset

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
train, validation = SelectedDataset(sys.argv[1]), SelectedDataset(sys.argv[1])
train_keys = [sample["__key__"] for sample in train]
if os.fork() == 0:
    os._exit(train_keys != [sample["__key__"] for sample in train])
assert os.wait()[1] == 0
validation_keys = [sample["__key__"] for sample in validation]
taken = []
while True:
    try:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
assert [sample["__key__"] for sample in train] == train_keys == validation_keys
print(len(train_keys))
train.pipeline[0]._reader._reader.close()
taken += [os.open("/dev/null", os.O_RDONLY) for _ in range(32)]
list(train)
"""


def test_datasets_share_the_files_that_a_process_may_open(tmp_path: Path) -> None:
    store = stream_stores.make_store(tmp_path, [2] * 60)
    run = subprocess.run(
        [sys.executable, "-c", MANY_FILES, store.url], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.stdout == "120\n", run.stderr
    assert "cannot be opened ([Errno 24] Too many open files" in run.stderr.splitlines()[-1]
    assert "raise `ulimit -n`" in run.stderr.splitlines()[-1]


def test_open_files_and_descriptors_are_given_back(store: Store) -> None:
    before = len(os.listdir("/proc/self/fd"))
    dataset = SelectedDataset(store)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        list(dataset)
    assert len(os.listdir("/proc/self/fd")) <= before + 4 + 3  # a file for each shard, and shared memory
    dataset.pipeline[0]._reader._reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 3
