"""SelectedDataset in one process: content, order, states, tails, trouble."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_stores
import torch
import webdataset as wds
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dynams_stream import local_shards, members, reading, storage
from dynams_stream.errors import (
    RoundNotFoundError,
    SampleError,
    ShardChangedError,
    ShardMissingError,
    StateError,
    StoreError,
    UsageError,
)
from dynams_stream.members import MemberTables
from dynams_stream.order import EpochOrder, substitute
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it

COUNTS = (13, 0, 21, 9, 17)


def identity(sample: dict[str, Any]) -> tuple[int, int]:
    """(shard, row) of a sample of these stores."""
    return int(sample["__url__"][-7:-4]), sample["__row__"]


def expected_order(rows: list[list[int]], epoch: int = 0, seed: int = 0, **options: Any) -> list[tuple[int, int]]:
    """The pure order of the selected rows."""
    order = EpochOrder(np.array([len(each) for each in rows]), seed=seed, epoch=epoch, **options)
    shards, ranks = order.locate(np.arange(order.total))
    return [(shard, rows[shard][rank]) for shard, rank in zip(shards.tolist(), ranks.tolist(), strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    """A store with one round of about half of the samples; tests only read it."""
    store = stream_stores.make_store(folder, COUNTS)
    stream_stores.publish(store, stream_stores.some_rows(store, 0.6))
    return store


@pytest.fixture(scope="module")
def rows(store: Store) -> list[list[int]]:
    return stream_stores.some_rows(store, 0.6)


@pytest.fixture
def own_store(tmp_path: Path) -> Store:
    """A store that a test may change."""
    return stream_stores.make_store(tmp_path, COUNTS)


# ---- content ---------------------------------------------------------------------------------------------------------


def test_samples_equal_webdatasets(store: Store, rows: list[list[int]]) -> None:
    theirs = stream_stores.webdataset_samples(store.dataset().urls)
    found = list(SelectedDataset(store))
    assert [identity(sample) for sample in found] == expected_order(rows)
    for sample in found:
        shard, row = identity(sample)
        assert sample == {**theirs[shard][row], "__row__": row}


def test_everything_is_streamed_without_a_round_and_when_asked(own_store: Store) -> None:
    all_samples = [(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)]
    assert sorted(map(identity, SelectedDataset(own_store.url))) == all_samples
    stream_stores.publish(own_store, stream_stores.some_rows(own_store, 0.3))
    assert sorted(map(identity, SelectedDataset(own_store, round=None))) == all_samples
    assert len(list(SelectedDataset(own_store, round=1))) < len(all_samples)


def test_without_shuffling_samples_come_in_shard_and_row_order(store: Store, rows: list[list[int]]) -> None:
    found = [identity(sample) for sample in SelectedDataset(store, shuffle=False)]
    assert found == [(shard, row) for shard, selected in enumerate(rows) for row in selected]


def test_weights_come_with_their_samples(own_store: Store) -> None:
    rows = stream_stores.some_rows(own_store, 0.5)
    stream_stores.publish(own_store, rows, [[shard + row / 64 for row in each] for shard, each in enumerate(rows)])
    for sample in SelectedDataset(own_store):
        shard, row = identity(sample)
        assert sample["__weight__"] == shard + row / 64


def test_only_selected_samples_are_read(store: Store, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int, int]] = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        read.append((descriptor, offset, size))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    dataset = SelectedDataset(store)
    wanted = sum(sum(len(value) for value in sample.values() if isinstance(value, bytes)) for sample in dataset)
    headers = [each for each in read if each[1:] == (0, storage.HEADER_BYTES)]
    assert len(headers) == sum(1 for each in rows if each)
    ranges = [each for each in read if each not in headers]
    assert len(ranges) == sum(map(len, rows))
    padding = 3 * (2 * 512 + 512)  # between four members: a header and padding, and more for a long name
    assert wanted <= sum(size for *_, size in ranges) <= wanted + len(ranges) * padding
    stats = dataset.stats()
    assert (stats.samples, stats.bytes_used, stats.requests) == (len(ranges), wanted, len(ranges))
    assert stats.bytes_read == sum(size for *_, size in ranges)


def test_members_far_apart_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stream_stores.make_store(tmp_path, (12, 8))
    monkeypatch.setattr(members, "_GAP_BYTES", 200)  # now a header of 512 bytes is far
    theirs = stream_stores.webdataset_samples(store.dataset().urls)
    for sample in SelectedDataset(store):
        shard, row = identity(sample)
        assert sample == {**theirs[shard][row], "__row__": row}


def test_moved_shards_are_read_and_keep_their_name(store: Store, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for url in store.dataset().urls:
        (copies / os.path.basename(url)).write_bytes(Path(url).read_bytes())
    here = list(SelectedDataset(store))
    there = list(SelectedDataset(Store(store.url, shards_at=copies)))
    assert [sample.pop("__local_path__") for sample in there] == [
        str(copies / os.path.basename(sample.pop("__local_path__"))) for sample in here
    ]
    assert there == here


def test_few_open_files_and_a_small_index_cache_are_enough(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(SelectedDataset(store))
    monkeypatch.setattr(local_shards, "_MOST_OPEN", 2)
    monkeypatch.setattr(reading, "MemberTables", functools.partial(MemberTables, budget=1))
    dataset = SelectedDataset(store)
    assert list(dataset) == whole
    reader = dataset.pipeline[0]._reader._reader
    assert len(reader._local._readers) <= 2
    assert len(reader.tables._pieces) <= 4  # as many as one chunk needs


# ---- pipeline --------------------------------------------------------------------------------------------------------


def test_fluid_stages_work_as_in_webdataset(store: Store, rows: list[list[int]]) -> None:
    dataset = SelectedDataset(store).decode(only="cls").to_tuple("jpg", "cls").map_tuple(len, int).batched(4)
    batches = list(dataset)
    labels = [label for batch in batches for label in batch[1].tolist()]
    assert labels == [shard * 1000 + row for shard, row in expected_order(rows)]
    theirs = stream_stores.webdataset_samples(store.dataset().urls)
    sizes = [size for batch in batches for size in batch[0].tolist()]
    assert sizes == [len(theirs[shard][row]["jpg"]) for shard, row in expected_order(rows)]


def test_set_epoch_reaches_all_copies(store: Store, rows: list[list[int]]) -> None:
    base = SelectedDataset(store)
    derived = base.map(identity)
    base.set_epoch(5)
    assert list(derived) == expected_order(rows, epoch=5)
    derived.set_epoch(6)
    assert [identity(sample) for sample in base] == expected_order(rows, epoch=6)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_copies_made_otherwise_work_on_their_own(store: Store, rows: list[list[int]], clone: Any) -> None:
    dataset = SelectedDataset(store).map(identity)
    dataset.set_epoch(3)
    other = clone(dataset)
    dataset.set_epoch(4)
    assert list(other) == expected_order(rows, epoch=3)
    other.set_epoch(5)
    assert list(dataset) == expected_order(rows, epoch=4)


def test_an_iteration_keeps_the_epoch_it_began_with(store: Store, rows: list[list[int]]) -> None:
    dataset = SelectedDataset(store).map(identity)
    running = iter(dataset)
    dataset.set_epoch(1)
    assert list(running) == expected_order(rows, epoch=0)


def test_webloader_and_dataloader_without_workers(store: Store, rows: list[list[int]]) -> None:
    dataset = SelectedDataset(store, batch_size=4).map(identity)
    loader = wds.WebLoader(dataset, batch_size=4, num_workers=0, collate_fn=list)
    assert [sample for batch in loader for sample in batch] == expected_order(rows)
    plain = DataLoader(dataset, batch_size=4, collate_fn=list)
    assert len(plain) == -(-sum(map(len, rows)) // 4)
    assert [sample for batch in plain for sample in batch] == expected_order(rows)


def test_repeat_and_with_epoch_go_round(store: Store, rows: list[list[int]]) -> None:
    total = sum(map(len, rows))
    dataset = SelectedDataset(store).map(identity).with_epoch(2 * total + 3)
    assert list(dataset) == (expected_order(rows) * 3)[: 2 * total + 3]
    with pytest.raises(StateError, match="with_epoch and repeat"):
        dataset.state_dict()


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "meta.pyd", "pkl.gz"])
def test_decode_refuses_pickles(tmp_path: Path, extension: str) -> None:
    import gzip

    payload = pickle.dumps({"a": 1}) if extension != "pth" else _torch_bytes({"a": 1})
    if extension.endswith("gz"):
        payload = gzip.compress(payload)
    store = _store_of(tmp_path, [{"cls": b"7", extension: payload}])
    with pytest.raises(SampleError, match=r"row 0, key 's0': the member .* would be unpickled"):
        list(SelectedDataset(store).decode())
    assert next(iter(SelectedDataset(store).decode(allow_pickle=True)))[extension] == {"a": 1}
    assert next(iter(SelectedDataset(store).decode(only=["cls"])))["cls"] == 7


def test_xdecode_refuses_pickles(tmp_path: Path) -> None:
    store = _store_of(tmp_path, [{"pyd": pickle.dumps(1)}])
    with pytest.raises(SampleError, match="would be unpickled"):
        list(SelectedDataset(store).xdecode())
    assert next(iter(SelectedDataset(store).xdecode(allow_pickle=True)))["pyd"] == 1


def _torch_bytes(value: Any) -> bytes:
    import io

    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def _store_of(folder: Path, samples: list[dict[str, bytes]]) -> Store:
    path = folder / "data-000.tar"
    with wds.TarWriter(str(path), encoder=False) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": f"s{number}", **sample})
    store = Store(folder / "store")
    stream_stores.build_index(store, [str(path)])
    return store


# ---- ranks and tails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("tail", ["drop", "pad", "wrap", "keep"])
def test_ranks_share_the_selection(store: Store, rows: list[list[int]], ranks: int, tail: str) -> None:
    order = expected_order(rows)
    shares = []
    for rank in range(ranks):
        dataset = SelectedDataset(store, rank=rank, world_size=ranks, tail=tail)
        samples = list(dataset)
        assert len(samples) == len(dataset)
        positions = range(rank, len(order) + (-len(order)) % ranks, ranks)
        for sample, position in zip(samples, positions, strict=False):
            assert identity(sample) == order[position % len(order)]
            assert sample.get("__pad__", False) == (tail == "pad" and position >= len(order))
        shares.append(len(samples))
    full, rest = divmod(len(order), ranks)
    expected = {"drop": [full] * ranks, "keep": [full + (rank < rest) for rank in range(ranks)]}
    assert shares == expected.get(tail, [full + (rest > 0)] * ranks)


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_a_rewritten_shard_is_detected(own_store: Store) -> None:
    path = Path(own_store.dataset().urls[2])
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ShardChangedError, match=r"data-002\.tar: not the shard that was indexed") as caught:
        list(SelectedDataset(own_store))
    assert caught.value.shard == str(path)
    assert isinstance(caught.value.row, int)
    assert caught.value.key


def test_a_missing_shard_is_named(own_store: Store) -> None:
    path = own_store.dataset().urls[3]
    os.remove(path)
    with pytest.raises(ShardMissingError, match=r"data-003\.tar") as caught:
        list(SelectedDataset(own_store))
    assert (caught.value.shard, caught.value.key is None) == (path, False)


def unchanged(batch: Any) -> Any:
    return batch


class FailsOn:
    """A `prepare` that fails for some samples."""

    def __init__(self, *bad: tuple[int, int]):
        self.bad = bad

    def __call__(self, sample: dict[str, Any]) -> tuple[int, int]:
        if identity(sample) in self.bad:
            raise ValueError("cannot decode")
        return identity(sample)


def test_an_error_of_prepare_names_the_sample(store: Store, rows: list[list[int]]) -> None:
    bad = expected_order(rows)[5]
    with pytest.raises(SampleError, match=rf"row {bad[1]}, key .*: ValueError: cannot decode") as caught:
        list(SelectedDataset(store, prepare=FailsOn(bad)))
    assert (caught.value.shard, caught.value.row) == (store.dataset().urls[bad[0]], bad[1])
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_a_later_stage_names_the_sample(store: Store, rows: list[list[int]]) -> None:
    bad = expected_order(rows)[5]
    with pytest.raises(SampleError, match=rf"row {bad[1]}, key .*: ValueError: cannot decode") as caught:
        list(SelectedDataset(store).map(FailsOn(bad)))
    assert (caught.value.shard, caught.value.row) == (store.dataset().urls[bad[0]], bad[1])


def test_skipped_samples_are_replaced_by_the_fixed_rule(
    store: Store, rows: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    order = expected_order(rows)
    total = len(order)
    first = order[5]
    second = order[substitute(5, 1, total)]  # the first one's substitute fails too
    expected = list(order)
    expected[5] = order[substitute(5, 2, total)]
    expected[substitute(5, 1, total)] = order[substitute(substitute(5, 1, total), 1, total)]
    with caplog.at_level(logging.WARNING):
        dataset = SelectedDataset(store, prepare=FailsOn(first, second), on_error="skip", max_errors=3)
        assert list(dataset) == expected
        assert len(caplog.records) == 2  # each bad sample once
        assert list(dataset) == expected  # a new iteration may skip as many again
    assert f"row {first[1]}" in caplog.text
    with pytest.raises(SampleError, match=r"error 3 of this iteration, max_errors=2"):
        list(SelectedDataset(store, prepare=FailsOn(first, second), on_error="skip", max_errors=2))


def test_samples_of_a_missing_shard_can_be_skipped(own_store: Store) -> None:
    os.remove(own_store.dataset().urls[3])
    dataset = SelectedDataset(own_store, on_error="skip", max_errors=100)
    found = [identity(sample) for sample in dataset]
    assert len(found) == sum(COUNTS)
    assert {shard for shard, _ in found} == {0, 2, 4}


def test_when_nothing_can_be_read_it_says_so(tmp_path: Path) -> None:
    store = _store_of(tmp_path, [{"cls": b"1"}, {"cls": b"2"}])
    with pytest.raises(SampleError, match="none of the 2 selected samples can be read"):
        list(SelectedDataset(store, prepare=FailsOn((0, 0), (0, 1)), on_error="skip", max_errors=99))


def test_a_selection_of_rows_that_are_not_there_is_refused(own_store: Store) -> None:
    stream_stores.publish(own_store, [[0, 13], [], [], [], []])
    with pytest.raises(StoreError, match=r"names row 13 of .*data-000\.tar, which has 13 samples"):
        list(SelectedDataset(own_store))


def test_a_selection_of_other_shards_is_refused(own_store: Store) -> None:
    stream_stores.publish(own_store, [[0], [], []])
    with pytest.raises(StoreError, match="selects from 3 shards, dataset version 1 has 5"):
        SelectedDataset(own_store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size has to be an integer from 1 on, or None for no batches; got 0"),
        ({"seed": -1}, "seed has to be an integer from 0 on; got -1"),
        ({"lanes": 0}, "lanes has to be"),
        ({"tail": "cut"}, "tail has to be one of 'drop', 'pad', 'wrap', 'keep'; got 'cut'"),
        ({"on_error": "ignore"}, "on_error has to be one of 'raise', 'skip'; got 'ignore'"),
        ({"max_errors": -1}, "max_errors"),
        ({"round": 0}, 'a round is a number from 1 on, or "latest"; got 0'),
        ({"rank": 0}, "rank and world_size go together; got rank=0, world_size=None"),
        ({"rank": 2, "world_size": 2}, "rank has to be below world_size=2; got 2"),
    ],
)
def test_wrong_arguments_are_named(store: Store, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SelectedDataset(store, **arguments)


def test_an_unknown_round_is_refused(store: Store) -> None:
    with pytest.raises(RoundNotFoundError, match="no published round 7"):
        SelectedDataset(store, round=7)
    with pytest.raises(UsageError, match="epoch has to be an integer from 0 on; got -1"):
        SelectedDataset(store).set_epoch(-1)


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_a_new_round_is_taken_up_at_set_epoch_and_not_in_between(own_store: Store) -> None:
    old, new = stream_stores.some_rows(own_store, 0.5, 1), stream_stores.some_rows(own_store, 0.4, 2)
    stream_stores.publish(own_store, old)
    dataset = SelectedDataset(own_store).map(identity)
    running = iter(dataset)
    first = [next(running), next(running)]
    stream_stores.publish(own_store, new)
    assert first + list(running) == expected_order(old)
    assert list(dataset) == expected_order(old)  # another pass of the same epoch
    dataset.set_epoch(1)
    assert list(dataset) == expected_order(new, epoch=1)
    assert len(dataset) == sum(map(len, new))
    dataset.set_epoch(2, round=1)
    assert list(dataset) == expected_order(old, epoch=2)
    dataset.set_epoch(3, round=None)
    assert len(list(dataset)) == sum(COUNTS)
    dataset.set_epoch(4)
    assert list(dataset) == expected_order(new, epoch=4)


# ---- states ----------------------------------------------------------------------------------------------------------


def batches_of(loader: Any) -> Iterator[list[tuple[int, int]]]:
    for batch in loader:
        yield [tuple(sample) for sample in batch]


def test_a_state_is_small_json(store: Store) -> None:
    dataset = SelectedDataset(store, batch_size=4, seed=9, rank=1, world_size=2)
    running = iter(dataset)
    for _ in range(8):
        next(running)
    state = dataset.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["samples"], state["batch"], state["steps"], state["round"], state["epoch"]) == (16, 8, 2, 1, 0)
    assert len(json.dumps(state)) < 600


def test_resuming_after_every_sample_equals_an_undisturbed_run(store: Store, rows: list[list[int]]) -> None:
    order = expected_order(rows, epoch=2)
    for taken in range(len(order) + 1):
        dataset = SelectedDataset(store).map(identity)
        dataset.set_epoch(2)
        running = iter(dataset)
        before = [next(running) for _ in range(taken)]
        state = dataset.state_dict()
        resumed = SelectedDataset(store).map(identity)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        resumed.set_epoch(2)
        assert before + list(resumed) == order
        assert list(resumed) == order  # the position held for one iteration
        assert resumed.state_dict()["samples"] == len(order)
        resumed.set_epoch(3)
        assert list(resumed) == expected_order(rows, epoch=3)


@pytest.mark.parametrize("stateful", [False, True])
def test_loaders_without_workers_resume_after_every_step(store: Store, rows: list[list[int]], stateful: bool) -> None:
    kind = StatefulDataLoader if stateful else DataLoader

    def make() -> tuple[SelectedDataset, Any]:
        dataset = SelectedDataset(store, batch_size=3).map(identity)
        return dataset, kind(dataset, batch_size=3, collate_fn=list)

    dataset, loader = make()
    dataset.set_epoch(1)
    whole = list(loader)
    for step in range(len(whole) + 1):
        dataset, loader = make()
        dataset.set_epoch(1)
        running = iter(loader)
        before = [next(running) for _ in range(step)]
        state = loader.state_dict() if stateful else dataset.state_dict()
        dataset, loader = make()
        (loader if stateful else dataset).load_state_dict(state)
        assert before + list(loader) == whole
        dataset.set_epoch(2)
        assert [sample for batch in loader for sample in batch] == expected_order(rows, epoch=2)


@pytest.mark.parametrize("lanes", [None, 3])
@pytest.mark.parametrize(("old", "new"), [((1, 4), (3, 2)), ((3, 2), (1, 4)), ((2, 3), (2, 5)), ((5, 1), (2, 2))])
@pytest.mark.parametrize("tail", ["drop", "keep"])
def test_a_state_moves_to_other_ranks_and_batches(
    store: Store, rows: list[list[int]], old: tuple[int, int], new: tuple[int, int], lanes: int | None, tail: str
) -> None:
    options: dict[str, Any] = {"lanes": lanes, "tail": tail}
    order = expected_order(rows, lanes=lanes)
    for steps in range(len(order) // (old[0] * old[1]) + 1):
        states = []
        for rank in range(old[0]):
            dataset = SelectedDataset(store, batch_size=old[1], rank=rank, world_size=old[0], **options)
            states.append(dataset.state_dict(steps))
        assert all(state == states[0] for state in states)
        position = states[0]["samples"]
        shares = []
        for rank in range(new[0]):
            dataset = SelectedDataset(
                store, batch_size=new[1], rank=rank, world_size=new[0], tail=tail
            )  # lanes adopted
            dataset.load_state_dict(states[0])
            shares.append([identity(sample) for sample in dataset])
        step = [[shares[r][i] for r in range(new[0]) if i < len(shares[r])] for i in range(len(shares[0]))]
        left = order[position:]
        kept = len(left) if tail == "keep" else len(left) - len(left) % new[0]
        assert [sample for each in step for sample in each] == left[:kept]


def test_a_state_of_a_resumed_epoch_counts_all_its_steps(store: Store, rows: list[list[int]]) -> None:
    """Second resume, with another batch size in between."""
    order = expected_order(rows)
    first = SelectedDataset(store, batch_size=4)
    state = first.state_dict(steps=2)
    second = SelectedDataset(store, batch_size=3).map(identity)
    second.load_state_dict(state)
    running = iter(second)
    for _ in range(6):
        next(running)
    assert second.state_dict()["samples"] == 14
    assert second.state_dict(steps=4) == second.state_dict()
    with pytest.raises(StateError, match="steps=1 counts fewer batches than the 2"):
        second.state_dict(steps=1)
    third = SelectedDataset(store, batch_size=5).map(identity)
    third.load_state_dict(second.state_dict(steps=4))
    assert list(third) == order[14:]
    list(third)  # from the beginning again, so steps count from there
    assert third.state_dict(steps=1)["samples"] == 5


def test_a_finished_epoch_stays_finished_on_other_ranks(store: Store) -> None:
    dataset = SelectedDataset(store, batch_size=4, rank=0, world_size=5)
    list(dataset)
    state = dataset.state_dict()
    assert state == dataset.state_dict(steps=-(-len(dataset) // 4))
    for ranks in (1, 2, 3):
        resumed = SelectedDataset(store, batch_size=4, rank=0, world_size=ranks)
        resumed.load_state_dict(state)
        resumed.set_epoch(0)
        assert list(resumed) == []
        resumed.set_epoch(1)
        assert len(list(resumed)) == len(resumed) > 0


def test_a_finished_state_stays_finished_after_an_earlier_epoch_was_set(store: Store) -> None:
    dataset = SelectedDataset(store, batch_size=4)
    dataset.set_epoch(5)
    list(dataset)
    state = dataset.state_dict()
    resumed = SelectedDataset(store, batch_size=4)
    resumed.set_epoch(0)
    resumed.load_state_dict(state)
    resumed.set_epoch(5)
    assert list(resumed) == []
    resumed.set_epoch(6)
    assert len(list(resumed)) == len(resumed) > 0


def test_a_state_pins_its_round(own_store: Store) -> None:
    old, new = stream_stores.some_rows(own_store, 0.5, 1), stream_stores.some_rows(own_store, 0.4, 2)
    stream_stores.publish(own_store, old)
    state = SelectedDataset(own_store, batch_size=4).state_dict(steps=2)
    stream_stores.publish(own_store, new)
    dataset = SelectedDataset(own_store, batch_size=4).map(identity)
    dataset.load_state_dict(state)
    dataset.set_epoch(0, round="latest")
    dataset.set_epoch(0)
    with pytest.raises(StateError, match=r"is of round 1, set_epoch asks for round 2"):
        dataset.set_epoch(0, round=2)
    with pytest.raises(StateError, match=r"is of round 1, set_epoch asks for everything \(no round\)"):
        dataset.set_epoch(0, round=None)
    assert list(dataset) == expected_order(old)[8:]
    dataset.set_epoch(0)  # now the epoch starts anew
    assert list(dataset) == expected_order(new)
    dataset.load_state_dict(state)
    dataset.set_epoch(1)
    assert list(dataset) == expected_order(new, epoch=1)


def test_a_state_of_everything_resumes_without_the_round_published_since(own_store: Store) -> None:
    dataset = SelectedDataset(own_store, batch_size=4)
    state = dataset.state_dict(steps=3)
    assert state["round"] is None
    stream_stores.publish(own_store, stream_stores.some_rows(own_store, 0.4))
    resumed = SelectedDataset(own_store).map(identity)
    resumed.load_state_dict(state)
    resumed.set_epoch(0, round="latest")
    everything = [list(range(count)) for count in COUNTS]
    assert list(resumed) == expected_order(everything)[12:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "made with seed = 5, this dataset has 0"),
        ({"algorithm": 0}, "made with algorithm = 0, this dataset has 2"),
        ({"shuffle": False}, "made with shuffle = False, this dataset has True"),
        ({"selection": "abc"}, "made with selection = 'abc'"),
        ({"dataset": "abc"}, "made with dataset = 'abc'"),
        ({"version": 1}, "format version 1, this program reads 2"),
        ({"round": 9}, "the state is of round 9, which is not there"),
        ({"round": None, "dataset": "abc"}, "of a dataset .digest abc. that .* does not hold"),
    ],
)
def test_states_of_something_else_are_refused(store: Store, change: dict[str, Any], message: str) -> None:
    state = SelectedDataset(store, batch_size=4).state_dict(steps=1)
    with pytest.raises(StateError, match=message):
        SelectedDataset(store).load_state_dict({**state, **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", None),
        ("round", 0),
        ("round", "latest"),
        ("samples", "1"),
        ("samples", -3),
        ("lanes", 0),
        ("steps", 1.5),
    ],
)
def test_damaged_states_are_refused(store: Store, field: str, value: Any) -> None:
    state = SelectedDataset(store, batch_size=4).state_dict(steps=1)
    with pytest.raises(StateError, match=f"the state has {field} = {value!r}, which no state has"):
        SelectedDataset(store).load_state_dict({**state, field: value})
    without = {name: each for name, each in state.items() if name != field}
    with pytest.raises(StateError, match="no state of a SelectedDataset" if field == "samples" else f"{field} = None"):
        SelectedDataset(store).load_state_dict(without)


def test_a_state_beyond_the_end_is_refused(store: Store, rows: list[list[int]]) -> None:
    total = sum(map(len, rows))
    state = SelectedDataset(store, batch_size=4).state_dict(steps=1)
    with pytest.raises(StateError, match=f"says that {total + 1} of {total} selected samples were consumed"):
        SelectedDataset(store).load_state_dict({**state, "samples": total + 1})


@pytest.mark.parametrize("kind", ["select", "map", "after batches"])
@pytest.mark.parametrize("workers", [0, 1])
def test_steps_do_not_tell_where_an_epoch_stands_when_samples_are_dropped(
    store: Store, rows: list[list[int]], kind: str, workers: int
) -> None:
    bad = expected_order(rows)[6]
    dataset = SelectedDataset(store, batch_size=4).map(identity)
    loaded = {
        "select": lambda: dataset.select(lambda sample: sample != bad),
        "map": lambda: dataset.map(lambda sample: None if sample == bad else sample),
        "after batches": lambda: dataset.listed(4).select(lambda batch: bad not in batch),
    }[kind]()
    size = None if kind == "after batches" else 4
    loader = DataLoader(loaded, batch_size=size, num_workers=workers, collate_fn=list if size else unchanged)
    running = iter(loader)
    assert list(next(running)) == expected_order(rows)[:4]
    seen = 1 + len(list(running))
    with pytest.raises(StateError, match="a stage of the pipeline drops samples"):
        dataset.state_dict(steps=seen)
    if workers == 0:
        assert dataset.state_dict()["samples"] == sum(map(len, rows))  # counted where they are read
    dataset.set_epoch(1)
    assert dataset.state_dict(steps=0)["samples"] == 0


def test_what_is_no_state_is_refused(store: Store) -> None:
    dataset = SelectedDataset(store, batch_size=4)
    loader = StatefulDataLoader(dataset, batch_size=4, collate_fn=list)
    iter(loader)
    with pytest.raises(StateError, match=r"a StatefulDataLoader's; load it there, or SelectedDataset\.global_state"):
        dataset.load_state_dict(loader.state_dict())
    with pytest.raises(StateError, match="no state of a SelectedDataset; got 3"):
        dataset.load_state_dict(3)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="no state of a StatefulDataLoader"):
        SelectedDataset.global_state({})


@pytest.mark.parametrize("stage", ["shuffle", "unbatched", "slice", "own", "wds.batched"])
def test_buffering_stages_refuse_a_state(store: Store, stage: str) -> None:
    dataset = SelectedDataset(store)
    pipelines = {
        "shuffle": lambda: dataset.shuffle(10),
        "unbatched": lambda: dataset.to_tuple("cls").batched(2).unbatched(),
        "slice": lambda: dataset.slice(5),
        "own": lambda: dataset.compose(lambda stream: stream),
        "wds.batched": lambda: dataset.to_tuple("cls").compose(wds.batched(3)),
    }
    pipeline = pipelines[stage]()
    with pytest.raises(StateError, match="may hold samples back, so no state can be given"):
        pipeline.state_dict()
    running = iter(pipeline)
    next(running)
    with pytest.raises(StateError, match="may hold samples back"):
        dataset.state_dict()  # asked of the dataset that the pipeline was made from


def test_batched_holds_nothing_back(store: Store, rows: list[list[int]]) -> None:
    dataset = SelectedDataset(store).to_tuple("cls").batched(4, partial=False)
    running = iter(dataset)
    next(running)
    next(running)
    assert dataset.state_dict()["samples"] == 8
    assert 2 + len(list(running)) == sum(map(len, rows)) // 4


def test_steps_need_a_batch_size(store: Store) -> None:
    with pytest.raises(UsageError, match="give SelectedDataset the loader's batch_size"):
        SelectedDataset(store).state_dict(steps=3)
