"""SelectedDataset across processes: DataLoader workers of every kind, StatefulDataLoader, and real ranks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import stream_stores
import torch
import torch.multiprocessing
import webdataset as wds
from test_stream import expected_order, identity
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dynams_stream.errors import SampleError, StateError, UsageError
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 calls it
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),  # on machines of two cores
]

COUNTS = (13, 0, 21, 9, 17)
Batches = list[list[tuple[int, int]]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one round of about half of the samples; tests only read it."""
    store = stream_stores.make_store(tmp_path_factory.mktemp("processes"), COUNTS)
    stream_stores.publish(store, stream_stores.some_rows(store, 0.6))
    return store


@pytest.fixture(scope="module")
def rows(store: Store) -> list[list[int]]:
    return stream_stores.some_rows(store, 0.6)


@pytest.fixture
def own_store(tmp_path: Path) -> Store:
    """A store that a test may change."""
    return stream_stores.make_store(tmp_path, COUNTS)


def pairs(batch: list[Any]) -> list[tuple[int, int]]:
    """A collate function that keeps the samples apart."""
    return [tuple(sample) for sample in batch]


def make(store: Store, batch: int = 4, **options: Any) -> SelectedDataset:
    return SelectedDataset(store, batch_size=batch, **options).map(identity)


def load(dataset: SelectedDataset, workers: int, batch: int = 4, kind: Any = DataLoader, **options: Any) -> Any:
    if workers == 0:
        options = {name: value for name, value in options.items() if name == "snapshot_every_n_steps"}
    return kind(dataset, batch_size=batch, num_workers=workers, collate_fn=pairs, **options)


def cut(samples: list[tuple[int, int]], size: int) -> Batches:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


# ---- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind_follow_the_order_of_each_epoch(
    store: Store, rows: list[list[int]], method: str, persistent: bool
) -> None:
    dataset = make(store)
    loader = load(dataset, 2, multiprocessing_context=method, persistent_workers=persistent)
    for epoch in (3, 1) if persistent or method == "fork" else (3,):  # starting processes takes seconds
        dataset.set_epoch(epoch)
        assert len(loader) == len(cut(expected_order(rows), 4))
        assert list(loader) == cut(expected_order(rows, epoch=epoch), 4)
    if method == "fork":
        assert list(loader) == cut(expected_order(rows, epoch=1), 4)  # and once more without set_epoch


@pytest.mark.parametrize(("ranks", "batch"), [(1, 6), (2, 3), (3, 2)])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_step_holds_the_same_samples_on_every_split(
    store: Store, rows: list[list[int]], ranks: int, batch: int, workers: int
) -> None:
    per_rank = []
    for rank in range(ranks):
        dataset = make(store, batch, rank=rank, world_size=ranks)
        dataset.set_epoch(4)
        per_rank.append(list(load(dataset, workers, batch)))
    order = expected_order(rows, epoch=4)
    order = order[: len(order) - len(order) % ranks]
    assert len({len(batches) for batches in per_rank}) == 1
    found = [sorted(sample for batches in per_rank for sample in batches[step]) for step in range(len(per_rank[0]))]
    assert found == [sorted(step) for step in cut(order, ranks * batch)]


@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_batch_size_each_sample_still_comes_once(store: Store, rows: list[list[int]], workers: int) -> None:
    dataset = SelectedDataset(store).map(identity)
    found = [sample for batch in load(dataset, workers, 3) for sample in batch]
    assert sorted(found) == sorted(expected_order(rows))


def test_webloader_with_workers_and_batched(store: Store, rows: list[list[int]]) -> None:
    dataset = SelectedDataset(store, batch_size=4).map(identity).listed(4)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=2)
    assert [[tuple(each) for each in batch] for batch in loader] == cut(expected_order(rows), 4)


def test_a_new_round_reaches_persistent_workers_at_set_epoch_only(own_store: Store) -> None:
    old, new = stream_stores.some_rows(own_store, 0.5, 1), stream_stores.some_rows(own_store, 0.4, 2)
    stream_stores.publish(own_store, old)
    dataset = make(own_store)
    loader = load(dataset, 2, persistent_workers=True)
    running = iter(loader)
    first = next(running)
    stream_stores.publish(own_store, new)
    assert [first, *running] == cut(expected_order(old), 4)
    assert list(loader) == cut(expected_order(old), 4)
    dataset.set_epoch(1)
    assert len(loader) == len(cut(expected_order(new), 4))
    assert list(loader) == cut(expected_order(new, epoch=1), 4)
    dataset.set_epoch(2, round=None)
    assert sum(map(len, loader)) == sum(COUNTS)


class FailsAlways:
    def __call__(self, sample: dict[str, Any]) -> None:
        raise ValueError("cannot decode")


def test_an_error_in_a_worker_keeps_its_type_and_text(store: Store) -> None:
    loader = load(SelectedDataset(store, batch_size=4, prepare=FailsAlways()), 1)
    with pytest.raises(SampleError, match=r"data-00\d\.tar: row \d+, key .*: ValueError: cannot decode"):
        list(loader)


# ---- resuming with a plain DataLoader --------------------------------------------------------------------------------


def resume_after_every_step(make_all: Any, save: Any, restore: Any, epoch: int = 1) -> None:
    """Save and restore after every step and compare with the undisturbed run.

    Args:
        make_all: () → (dataset, loader).
        save: (dataset, loader, steps) → state.
        restore: (dataset, loader, state).
    """
    dataset, loader = make_all()
    dataset.set_epoch(epoch)
    whole = list(loader)
    dataset.set_epoch(epoch + 1)
    following = list(loader)
    assert len(whole) > 4
    for step in range(len(whole) + 1):
        dataset, loader = make_all()
        dataset.set_epoch(epoch)
        running = iter(loader)
        before = [next(running) for _ in range(step)]
        state = save(dataset, loader, step)
        del running, loader
        dataset, loader = make_all()
        restore(dataset, loader, state)
        dataset.set_epoch(epoch)
        assert before + list(loader) == whole, f"after step {step}"
        dataset.set_epoch(epoch + 1)
        assert list(loader) == following, f"the next epoch, after step {step}"


@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, True)])
def test_a_plain_dataloader_resumes_after_every_step(store: Store, workers: int, persistent: bool) -> None:
    def make_all() -> tuple[SelectedDataset, Any]:
        dataset = make(store, 5)
        return dataset, load(dataset, workers, 5, persistent_workers=persistent)

    resume_after_every_step(
        make_all,
        save=lambda dataset, loader, steps: json.loads(json.dumps(dataset.state_dict(steps))),
        restore=lambda dataset, loader, state: dataset.load_state_dict(state),
    )


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("reseeded", [False, True])
def test_a_loaded_position_holds_for_one_iteration(
    store: Store, rows: list[list[int]], persistent: bool, reseeded: bool
) -> None:
    """Also when the workers of all iterations have the same base seed."""
    dataset = make(store)
    loader = load(dataset, 2, persistent_workers=persistent)
    whole = cut(expected_order(rows), 4)
    for steps in (3, 1):  # twice: persistent workers have begun before
        state = make(store).state_dict(steps)
        dataset.load_state_dict(state)
        for expected in (whole[steps:], whole, whole):
            if reseeded:
                torch.manual_seed(0)
            assert list(loader) == expected
    dataset.load_state_dict(make(store).state_dict(2))
    assert list(dataset) == [sample for batch in whole[2:] for sample in batch]  # in this process
    assert list(loader) == whole


def test_a_fresh_loader_of_more_workers_starts_from_the_beginning_too(store: Store, rows: list[list[int]]) -> None:
    dataset = make(store)
    dataset.load_state_dict(dataset.state_dict(2))
    whole = cut(expected_order(rows), 4)
    assert list(load(dataset, 1)) == whole[2:]
    assert list(load(dataset, 3)) == whole


def test_without_steps_a_prefetching_loader_gives_no_state(store: Store) -> None:
    dataset = make(store)
    assert dataset.state_dict()["samples"] == 0
    running = iter(load(dataset, 2))
    next(running)
    with pytest.raises(StateError, match=r"call state_dict\(steps\)"):
        dataset.state_dict()
    assert dataset.state_dict(steps=1)["samples"] == 4
    dataset.set_epoch(1)
    assert dataset.state_dict()["samples"] == 0


def test_steps_after_a_resume_count_the_whole_epoch(store: Store, rows: list[list[int]]) -> None:
    whole = cut(expected_order(rows), 4)
    dataset = make(store)
    dataset.load_state_dict(make(store).state_dict(2))
    loader = load(dataset, 2, persistent_workers=True)
    running = iter(loader)
    assert next(running) == whole[2]
    assert dataset.state_dict(steps=3)["samples"] == 12
    with pytest.raises(StateError, match="steps=1 counts fewer batches than the 2"):
        dataset.state_dict(steps=1)
    assert list(loader) == whole  # anew: now steps count from the beginning
    assert dataset.state_dict(steps=1)["samples"] == 4


@pytest.mark.parametrize(("old", "new"), [((2, 3, 2), (3, 2, 0)), ((1, 4, 0), (2, 2, 2)), ((3, 2, 1), (1, 5, 2))])
def test_states_move_between_ranks_workers_and_batches(store: Store, rows: list[list[int]], old: Any, new: Any) -> None:
    """(ranks, batch, workers) before and after; what was consumed and what follows make up the order."""
    order = expected_order(rows)
    ranks, batch, workers = old
    steps = 2
    consumed, states = [], []
    for rank in range(ranks):
        dataset = make(store, batch, rank=rank, world_size=ranks)
        running = iter(load(dataset, workers, batch))
        consumed.append([next(running) for _ in range(steps)])
        states.append(dataset.state_dict(steps))
    position = ranks * batch * steps
    assert sorted(sample for rank in consumed for each in rank for sample in each) == sorted(order[:position])
    ranks, batch, workers = new
    per_rank = []
    for rank in range(ranks):
        dataset = make(store, batch, rank=rank, world_size=ranks)
        dataset.load_state_dict(states[0])
        per_rank.append(list(load(dataset, workers, batch)))
    left = order[position:]
    left = left[: len(left) - len(left) % ranks]
    found = [sorted(sample for batches in per_rank for sample in batches[step]) for step in range(len(per_rank[0]))]
    assert found == [sorted(step) for step in cut(left, ranks * batch)]


# ---- StatefulDataLoader ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (1, {}),
        (2, {"persistent_workers": True}),
        (3, {"snapshot_every_n_steps": 3}),
        (2, {"snapshot_every_n_steps": 4, "persistent_workers": True}),
    ],
)
def test_a_stateful_dataloader_resumes_after_every_step(store: Store, workers: int, options: dict[str, Any]) -> None:
    def make_all() -> tuple[SelectedDataset, Any]:
        dataset = make(store, 6)
        return dataset, load(dataset, workers, 6, StatefulDataLoader, **options)

    def restore(dataset: SelectedDataset, loader: Any, state: dict[str, Any]) -> None:
        if not state.get("_iterator_finished"):  # a finished loader begins anew, as it would have without a restart
            loader.load_state_dict(state)
        else:
            dataset.load_state_dict(SelectedDataset.global_state(state))

    resume_after_every_step(make_all, lambda dataset, loader, steps: loader.state_dict(), restore)


def test_a_stateful_dataloader_resumes_twice_and_keeps_the_order(store: Store, rows: list[list[int]]) -> None:
    whole = cut(expected_order(rows), 3)
    state: dict[str, Any] | None = None
    found: Batches = []
    for _ in range(3):
        loader = load(make(store, 3), 2, 3, StatefulDataLoader)
        if state is not None:
            loader.load_state_dict(state)
        running = iter(loader)
        found += [next(running) for _ in range(3)]
        state = loader.state_dict()
        del running, loader
    loader = load(make(store, 3), 2, 3, StatefulDataLoader)
    loader.load_state_dict(state)
    assert found + list(loader) == whole


@pytest.mark.parametrize(("workers", "every"), [(0, 1), (2, 1), (2, 3)])
def test_a_finished_stateful_dataloader_goes_on_with_the_epoch_that_is_set(
    store: Store, rows: list[list[int]], workers: int, every: int
) -> None:
    options = {"snapshot_every_n_steps": every}
    loader = load(make(store), workers, 4, StatefulDataLoader, **options)
    list(loader)
    state = loader.state_dict()
    dataset = make(store)
    loader = load(dataset, workers, 4, StatefulDataLoader, **options)
    loader.load_state_dict(state)
    dataset.set_epoch(1)
    assert list(loader) == cut(expected_order(rows, epoch=1), 4)
    dataset.set_epoch(2)
    assert list(loader) == cut(expected_order(rows, epoch=2), 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unfinished_stateful_dataloader_goes_on_with_its_own_epoch_and_says_so(
    store: Store, rows: list[list[int]], workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = load(make(store), workers, 4, StatefulDataLoader)
    next(iter(loader))
    state = loader.state_dict()
    dataset = make(store)
    loader = load(dataset, workers, 4, StatefulDataLoader)
    loader.load_state_dict(state)
    dataset.set_epoch(1)
    logging.getLogger("dynams_stream.source").addHandler(shown := logging.StreamHandler())
    try:
        assert list(loader) == cut(expected_order(rows), 4)[1:]
    finally:
        logging.getLogger("dynams_stream.source").removeHandler(shown)
    assert "set_epoch chose epoch 1, but the state that was loaded since goes on with epoch 0" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("every", [1, 3])
def test_a_loaders_state_becomes_movable(store: Store, rows: list[list[int]], workers: int, every: int) -> None:
    order = expected_order(rows)
    loader = load(make(store), workers, 4, StatefulDataLoader, snapshot_every_n_steps=every)
    states = [loader.state_dict()]
    for _ in loader:
        states.append(loader.state_dict())
    finished = loader.state_dict()
    for steps, loaders in enumerate(states):
        state = SelectedDataset.global_state(loaders)
        assert state == make(store).state_dict(steps)
        assert json.loads(json.dumps(state)) == state
        shares = []
        for rank in range(2):
            dataset = make(store, 2, rank=rank, world_size=2)
            dataset.load_state_dict(state)
            shares.append(list(dataset))
        left = order[4 * steps :]
        left = left[: len(left) - len(left) % 2]
        assert [sample for pair in zip(*shares, strict=True) for sample in pair] == left
    assert SelectedDataset.global_state(finished)["samples"] == len(order)


def test_a_state_loaded_into_the_dataset_and_its_stateful_loader_counts_on(store: Store, rows: list[list[int]]) -> None:
    """A movable state, resumed by a StatefulDataLoader, whose own state is then resumed and made movable again."""
    whole = cut(expected_order(rows), 4)
    dataset = make(store)
    dataset.load_state_dict(make(store).state_dict(2))
    loader = load(dataset, 2, 4, StatefulDataLoader)
    running = iter(loader)
    assert [next(running) for _ in range(3)] == whole[2:5]
    state = loader.state_dict()
    assert SelectedDataset.global_state(state) == make(store).state_dict(5)
    dataset = make(store)
    loader = load(dataset, 2, 4, StatefulDataLoader)
    loader.load_state_dict(state)
    assert list(loader) == whole[5:]
    assert list(loader) == whole


def test_a_stateful_loader_pins_the_round_of_its_state(own_store: Store) -> None:
    old, new = stream_stores.some_rows(own_store, 0.5, 1), stream_stores.some_rows(own_store, 0.4, 2)
    stream_stores.publish(own_store, old)
    loader = load(make(own_store), 2, 4, StatefulDataLoader)
    running = iter(loader)
    before = [next(running), next(running)]
    state = loader.state_dict()
    stream_stores.publish(own_store, new)
    dataset = make(own_store)
    loader = load(dataset, 2, 4, StatefulDataLoader, persistent_workers=True)
    loader.load_state_dict(state)
    dataset.set_epoch(0)
    assert before + list(loader) == cut(expected_order(old), 4)
    dataset.set_epoch(1)
    assert list(loader) == cut(expected_order(new, epoch=1), 4)


def test_the_dataset_knows_where_the_workers_of_a_stateful_loader_went_on(own_store: Store) -> None:
    old, new = stream_stores.some_rows(own_store, 0.5, 1), stream_stores.some_rows(own_store, 0.4, 2)
    stream_stores.publish(own_store, old)
    dataset = make(own_store)
    dataset.set_epoch(3)
    loader = load(dataset, 2, 4, StatefulDataLoader)
    running = iter(loader)
    before = [next(running), next(running)]
    state = loader.state_dict()
    stream_stores.publish(own_store, new)
    for epochs in ([3], []):  # the dataset is told of the newer round, or of nothing; the workers know better
        dataset = make(own_store)
        for epoch in epochs:
            dataset.set_epoch(epoch)
        loader = load(dataset, 2, 4, StatefulDataLoader)
        loader.load_state_dict(state)
        running = iter(loader)
        after = [next(running)]
        global_state = dataset.state_dict(steps=3)
        assert (global_state["epoch"], global_state["round"], global_state["samples"]) == (3, 1, 12)
        moved = make(own_store)
        moved.load_state_dict(global_state)
        assert before + after + list(load(moved, 0)) == cut(expected_order(old, epoch=3), 4)
        list(running)


def test_a_stateful_loaders_state_of_other_batches_is_refused(store: Store) -> None:
    loader = load(SelectedDataset(store).map(identity), 2, 4, StatefulDataLoader)  # batches of 4, but not told so
    running = iter(loader)
    next(running)
    state = loader.state_dict()
    with pytest.raises(StateError, match="leaves gaps in the order; give SelectedDataset the loader's batch_size"):
        SelectedDataset.global_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": None}, "made with batch_size = None, this dataset has 4"),
        ({"worker": 1}, "made with worker = 1, this dataset has 0; make a movable state"),
        ({"workers": 3}, "made with workers = 3, this dataset has 2; use as many workers"),
        ({"rank": 1}, "made with rank = 1, this dataset has 0"),
        ({"ranks": 2}, "made with ranks = 2, this dataset has 1"),
    ],
)
def test_a_workers_state_fits_that_worker_only(
    store: Store, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = load(make(store), 2, 4, StatefulDataLoader)
    next(iter(loader))
    state = loader.state_dict()["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]
    dataset = make(store)
    with pytest.raises(StateError, match="this is one worker's state"):
        dataset.load_state_dict(state)
    here = torch.utils.data._utils.worker.WorkerInfo(id=0, num_workers=2, seed=1, dataset=dataset)
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", here)
    dataset.load_state_dict(state)
    with pytest.raises(StateError, match=message):
        dataset.load_state_dict({**state, **change})
    with pytest.raises(UsageError, match="set_epoch was called in a DataLoader worker"):
        dataset.set_epoch(1)


def test_a_stateful_loader_over_a_buffer_is_refused_in_words(store: Store) -> None:
    loader = load(make(store).shuffle(10), 0, 4, StatefulDataLoader)
    next(iter(loader))
    with pytest.raises(StateError, match=r"the stage \.shuffle may hold samples back"):
        loader.state_dict()


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _rank_with_copy(rank: int, dataset: SelectedDataset, folder: str) -> None:
    """One of several processes that were given the same dataset as an argument."""
    dataset.load_state_dict(dataset.state_dict(steps=rank + 1))
    found = list(load(dataset, 1))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def test_processes_that_were_given_a_dataset_have_their_own_positions(
    store: Store, rows: list[list[int]], tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(_rank_with_copy, (make(store), str(tmp_path)), nprocs=2)
    whole = cut(expected_order(rows), 4)
    for rank in range(2):
        found = [pairs(batch) for batch in json.loads((tmp_path / f"{rank}.json").read_text())]
        assert found == whole[rank + 1 :]


RANK = """
    import json, sys, time
    import torch.distributed as dist
    from dynams_stream.stream import SelectedDataset

    store, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dataset = SelectedDataset(store, batch_size=2)
    found = []
    for epoch in range(25):
        time.sleep(0.01 + 0.02 * rank)  # the ranks come to the store at different times
        dataset.set_epoch(epoch)
        samples = [[int(s["__url__"][-7:-4]), s["__row__"]] for s in dataset]
        assert len(samples) == len(dataset)
        found.append((dataset.state_dict()["round"], samples))
    try:
        dataset.set_epoch(99, round=12345)
    except Exception as error:
        found.append((type(error).__name__, []))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()
"""


def test_two_ranks_agree_on_the_latest_round_while_rounds_are_published(own_store: Store, tmp_path: Path) -> None:
    published = {None: [list(range(count)) for count in COUNTS]}
    code = textwrap.dedent(RANK)
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, own_store.url, str(rank), str(tmp_path)], env=os.environ
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 100
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        if (tmp_path / "meet").exists():  # the ranks have started
            rows = stream_stores.some_rows(own_store, 0.5, len(published))
            published[stream_stores.publish(own_store, rows).number] = rows
        time.sleep(0.02)
    assert [process.wait(10) for process in started] == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    rounds = [number for number, _ in found[0]]
    assert rounds == [number for number, _ in found[1]]
    assert rounds.pop() == "RoundNotFoundError"
    assert len(set(rounds)) > 1  # or nothing was published meanwhile
    for epoch, number in enumerate(rounds):
        order = expected_order(published[number], epoch=epoch)
        for rank in range(2):
            assert [tuple(sample) for sample in found[rank][epoch][1]] == order[rank::2][: len(order) // 2]
