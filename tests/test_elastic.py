"""Random runs that stop and go on with other ranks, workers and batches: nothing lost, nothing twice, the order kept.

The ranks and the workers of a DataLoader are played here in one process: each worker's whole stream is read with
torch's worker info set, cut into batches as the loader's workers do, and asked for in turn. `test_ranks` has real
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import stream_stores
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream import FailsOn, expected_order, identity

from dynams_stream.errors import SampleError
from dynams_stream.order import substitute
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset

COUNTS = (13, 0, 21, 9, 17)
ROUNDS = (0.6, 1.0, 0.08)

Pair = tuple[int, int]
Batches = list[list[Pair]]


class Leg(NamedTuple):
    """A part of a run: on so many ranks and workers, in batches of so many, until this part of its steps is done."""

    ranks: int
    workers: int
    batch: int
    until: float


class Run(NamedTuple):
    """What stays the same in all legs."""

    round: int
    seed: int
    epoch: int
    lanes: int | None
    window: int | None
    tail: str


legs = st.builds(Leg, st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.floats(0, 1))
runs = st.builds(
    Run,
    round=st.integers(1, len(ROUNDS)),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
    lanes=st.one_of(st.none(), st.integers(1, 7)),
    window=st.one_of(st.none(), st.integers(1, 9)),
    tail=st.sampled_from(["drop", "pad", "wrap", "keep"]),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with three rounds; tests only read it."""
    store = stream_stores.make_store(tmp_path_factory.mktemp("elastic"), COUNTS)
    for number, fraction in enumerate(ROUNDS):
        stream_stores.publish(store, stream_stores.some_rows(store, fraction, number))
    return store


def order_of(store: Store, run: Run) -> list[Pair]:
    """The undisturbed order of the whole epoch."""
    rows = stream_stores.some_rows(store, ROUNDS[run.round - 1], run.round - 1)
    return expected_order(rows, epoch=run.epoch, seed=run.seed, lanes=run.lanes, window=run.window)


@contextmanager
def as_worker(worker: int, workers: int, seed: int) -> Iterator[None]:
    """Make torch believe that this is worker `worker` of a DataLoader iteration."""
    module: Any = torch.utils.data._utils.worker
    info: Any = module.WorkerInfo(id=worker, num_workers=workers, seed=seed + worker, dataset=None)
    module._worker_info, before = info, module._worker_info
    try:
        yield
    finally:
        module._worker_info = before


def batches_of(dataset: SelectedDataset, workers: int, batch: int) -> Batches:
    """What a DataLoader over the dataset yields."""
    streams: list[Batches] = []
    seed = int(torch.randint(1 << 40, ()).item())
    for worker in range(max(1, workers)):
        if workers:
            with as_worker(worker, workers, seed):
                samples = list(dataset)
        else:
            samples = list(dataset)
        streams.append([samples[i : i + batch] for i in range(0, len(samples), batch)])
    steps = sum(map(len, streams))
    return [streams[step % len(streams)][step // len(streams)] for step in range(steps)]


def make(store: Store, run: Run, leg: Leg, rank: int, **options: Any) -> SelectedDataset:
    dataset = SelectedDataset(
        store, batch_size=leg.batch, round=run.round, seed=run.seed, lanes=run.lanes, window=run.window, tail=run.tail,
        rank=rank, world_size=leg.ranks, **{"prepare": identity, **options},
    )  # fmt: skip
    dataset.set_epoch(run.epoch)
    return dataset


def play(store: Store, run: Run, leg: Leg, state: dict[str, Any] | None, **options: Any) -> tuple[list[Batches], Any]:
    """What each rank consumes in a leg, and the state after it."""
    datasets = [make(store, run, leg, rank, **options) for rank in range(leg.ranks)]
    if state is not None:
        for dataset in datasets:
            dataset.load_state_dict(json.loads(json.dumps(state)))
            dataset.set_epoch(run.epoch)
    batches = [batches_of(dataset, leg.workers, leg.batch) for dataset in datasets]
    done = round(leg.until * max(map(len, batches)))
    states = [dataset.state_dict((0 if state is None else state["steps"]) + done) for dataset in datasets]
    assert all(other == states[0] for other in states), "states differ between ranks"
    assert len(json.dumps(states[0])) < 600
    return [each[:done] for each in batches], states[0]


def consumed(found: list[Batches]) -> list[Pair]:
    """The samples of a leg in the order of their positions."""
    per_rank = [[sample for batch in batches for sample in batch] for batches in found]
    longest = max(map(len, per_rank), default=0)
    return [samples[i] for i in range(longest) for samples in per_rank if i < len(samples)]


@settings(max_examples=150, deadline=None)
@given(run=runs, legs=st.lists(legs, min_size=1, max_size=4))
def test_a_run_in_legs_is_the_undisturbed_run(store: Store, run: Run, legs: list[Leg]) -> None:
    order = order_of(store, run)
    state: dict[str, Any] | None = None
    position = 0
    for leg in [*legs, legs[-1]._replace(until=1.0)]:
        found, state = play(store, run, leg, state)
        left = len(order) - position
        together = consumed(found)
        fresh = order[position : position + len(together)]
        assert together[: len(fresh)] == fresh
        if run.tail in ("pad", "wrap"):  # ranks are filled up with the first samples of the order
            assert together[len(fresh) :] == [order[i % len(order)] for i in range(len(together) - len(fresh))]
            assert len(together) - len(fresh) < leg.ranks
        else:
            assert len(together) <= left
        if run.tail != "keep":
            assert len({len(batches) for batches in found}) == 1, "ranks take different numbers of steps"
            assert len({sum(map(len, batches)) for batches in found}) == 1
        position = state["samples"]
        assert position in (min(len(order), position), len(order))
    dropped = len(order) % legs[-1].ranks if run.tail == "drop" else 0
    assert position == len(order)
    assert left - len(fresh) <= max(dropped, legs[-1].ranks - 1 if run.tail == "drop" else 0)


splits_of_six = st.sampled_from([(1, 0), (1, 2), (2, 0), (2, 3), (3, 1), (6, 2)])


@settings(max_examples=60, deadline=None)
@given(run=runs, batch=st.integers(1, 3), splits=st.lists(splits_of_six, min_size=2, max_size=4))
def test_each_step_of_a_global_batch_is_the_same_on_every_split(
    store: Store, run: Run, batch: int, splits: list[tuple[int, int]]
) -> None:
    """Global batches of 6 · batch; what is left at the end depends on the tail and the ranks."""
    whole = len(order_of(store, run)) // (6 * batch)
    steps = []
    for ranks, workers in splits:
        leg = Leg(ranks, workers, 6 * batch // ranks, 1.0)
        found, _ = play(store, run, leg, None)
        steps.append([sorted(sample for batches in found for sample in batches[step]) for step in range(whole)])
    assert all(other == steps[0] for other in steps)


@settings(max_examples=60, deadline=None)
@given(run=runs, leg=legs, bad=st.sets(st.integers(0, 59), max_size=5))
def test_a_bad_sample_is_replaced_by_the_same_one_on_every_split(
    store: Store, run: Run, leg: Leg, bad: set[int]
) -> None:
    order = order_of(store, run)
    broken = {order[position] for position in bad if position < len(order)}
    if len(broken) >= len(order):
        return
    stand_ins = {}
    for position in range(len(order)):
        attempt = 0
        while order[place := substitute(position, attempt, len(order)) if attempt else position] in broken:
            attempt += 1
        stand_ins[position] = order[place]
    fails = FailsOn(*broken)
    options = {"prepare": fails, "on_error": "skip", "max_errors": 10_000}
    found, _ = play(store, run, leg._replace(until=1.0), None, **options)
    together = consumed(found)
    assert together == [stand_ins[position % len(order)] for position in range(len(together))]
    lengths = {sum(map(len, batches)) for batches in found}
    assert len(lengths) == 1 or run.tail == "keep"
    if broken and run.tail != "drop":
        with pytest.raises(SampleError, match="cannot decode"):
            play(store, run, leg._replace(until=1.0), None, prepare=fails)


@settings(max_examples=40, deadline=None)
@given(run=runs, ranks=st.integers(1, 5), workers=st.integers(0, 3))
def test_over_epochs_drop_leaves_out_different_samples_and_the_rest_comes_once(
    store: Store, run: Run, ranks: int, workers: int
) -> None:
    run = run._replace(tail="drop")
    left_out = []
    for epoch in range(6):
        this = run._replace(epoch=run.epoch + epoch)
        found, _ = play(store, this, Leg(ranks, workers, 2, 1.0), None)
        samples = consumed(found)
        assert len(set(samples)) == len(samples)
        selection = set(order_of(store, this))
        assert set(samples) <= selection
        assert len(selection) - len(samples) == len(selection) % ranks
        left_out.append(frozenset(selection - set(samples)))
    if len(selection) > 20 and len(selection) % ranks:
        assert len(set(left_out)) > 1
