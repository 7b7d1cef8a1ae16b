"""The order against a slow one written from DESIGN section 7 alone, and its split over ranks and workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynams_stream.order import (
    ALGORITHM_VERSION,
    TAILS,
    EpochOrder,
    default_lanes,
    rank_length,
    rank_positions,
    substitute,
    window_length,
    worker_length,
    worker_samples,
)

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15

counts_lists = st.lists(st.integers(0, 40), min_size=1, max_size=12)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 1000)
lane_numbers = st.one_of(st.none(), st.integers(1, 30))


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def key(*numbers: int) -> int:
    found = 0
    for number in numbers:
        found = mix(((found ^ number) + GOLDEN) & MASK)
    return found


def permuted(seed_key: int, items: list, width: int) -> list:
    bits = max(1, (width - 1).bit_length())
    values = [mix((seed_key + (i + 1) * GOLDEN) & MASK) >> bits for i in range(len(items))]
    return [items[i] for i in sorted(range(len(items)), key=lambda i: (values[i], i))]


def slow_order(counts: list[int], seed: int, epoch: int, lanes: int, window: int) -> list[tuple[int, int]]:
    """The order as DESIGN states it, with plain lists."""
    shards = permuted(key(seed, epoch, 1), list(range(len(counts))), len(counts))
    turns = [mix(((key(seed, epoch, 4) ^ shard) + GOLDEN) & MASK) % max(count, 1) for shard, count in enumerate(counts)]
    sequence = [(s, (rank + turns[s]) % counts[s]) for s in shards for rank in range(counts[s])]
    short, longer = divmod(len(sequence), lanes)
    cut: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
    for lane in permuted(key(seed, epoch, 3), list(range(lanes)), lanes):
        length = short + (lane < longer)
        cut[lane] = sequence[:length]
        del sequence[:length]
    shuffled = []
    for lane, items in enumerate(cut):
        windows = [items[i : i + window] for i in range(0, len(items), window)]
        lane_key = mix(((key(seed, epoch, 2) ^ lane) + GOLDEN) & MASK)
        shuffled.append(
            [
                item
                for number, content in enumerate(windows)
                for item in permuted(mix(((lane_key ^ number) + GOLDEN) & MASK), content, window)
            ]
        )
    return [shuffled[p % lanes][p // lanes] for p in range(sum(counts))]


def whole_order(order: EpochOrder) -> list[tuple[int, int]]:
    shards, ranks = order.locate(np.arange(order.total))
    return list(zip(shards.tolist(), ranks.tolist(), strict=True))


def everyone(
    order_length: int, ranks: int, workers: int, batch: int | None, tail: str, start: int = 0
) -> list[list[int]]:
    """For each rank the positions it yields, in the turn in which a DataLoader asks its workers."""
    result = []
    for rank in range(ranks):
        length = rank_length(order_length - start, ranks, rank, tail)
        queues = []
        for worker in range(workers):
            samples = worker_samples(0, worker_length(length, worker, workers, batch), worker, workers, batch)
            positions, _ = rank_positions(samples, order_length, ranks, rank, start)
            size = batch or 1
            queues.append([positions[i : i + size].tolist() for i in range(0, len(positions), size)])
        taken: list[int] = []
        turn = 0
        while any(queues):
            if queues[turn % workers]:
                taken += queues[turn % workers].pop(0)
            turn += 1
        result.append(taken)
    return result


@settings(max_examples=150, deadline=None)
@given(counts=counts_lists, seed=seeds, epoch=epochs, lanes=st.integers(1, 30))
def test_the_order_is_the_one_of_the_design(counts: list[int], seed: int, epoch: int, lanes: int) -> None:
    order = EpochOrder(np.array(counts), seed=seed, epoch=epoch, lanes=lanes)
    assert whole_order(order) == slow_order(counts, seed, epoch, lanes, window_length(sum(counts), lanes))


@pytest.mark.parametrize(("lanes", "total"), [(1, 150_000), (16, 150_000), (64, 150_000)])
def test_lanes_of_several_windows_follow_the_design_too(lanes: int, total: int) -> None:
    counts = [total // 3, total // 2, total - total // 3 - total // 2]
    window = window_length(total, lanes)
    assert total / lanes > 1.9 * window  # or this test would not test windows
    order = EpochOrder(np.array(counts), seed=7, epoch=3, lanes=lanes)
    expected = slow_order(counts, 7, 3, lanes, window)
    found: list[tuple[int, int]] = []
    for start in range(0, total, 5000):
        shards, ranks = order.locate(np.arange(start, min(start + 5000, total)))
        found += zip(shards.tolist(), ranks.tolist(), strict=True)
    assert found == expected


@settings(max_examples=150, deadline=None)
@given(
    counts=counts_lists,
    seed=seeds,
    epoch=epochs,
    lanes=lane_numbers,
    ranks=st.integers(1, 7),
    workers=st.integers(1, 5),
    batch=st.one_of(st.none(), st.integers(1, 9)),
    tail=st.sampled_from(TAILS),
)
def test_every_selected_sample_is_taken_exactly_once(counts, seed, epoch, lanes, ranks, workers, batch, tail) -> None:
    total = sum(counts)
    order = EpochOrder(np.array(counts), seed=seed, epoch=epoch, lanes=lanes)
    taken = everyone(total, ranks, workers, batch, tail)
    flat = sorted(position for rank in taken for position in rank)
    if tail == "keep":
        assert flat == list(range(total))
    elif tail == "drop":
        assert flat == list(range(total - total % ranks))
        assert len({len(rank) for rank in taken}) == 1
    else:
        extra = -total % ranks
        assert sorted(set(flat)) == list(range(total))
        assert len(flat) == (total + extra if total else 0)
        assert len({len(rank) for rank in taken}) == 1
    assert sorted(whole_order(order)) == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]


@settings(max_examples=150, deadline=None)
@given(
    total=st.integers(0, 300),
    ranks=st.integers(1, 7),
    workers=st.integers(1, 5),
    batch=st.integers(1, 9),
    start=st.integers(0, 300),
)
def test_a_step_holds_the_same_positions_on_every_split(total, ranks, workers, batch, start) -> None:
    start = min(start, total)
    taken = everyone(total, ranks, workers, batch, "drop", start)
    step = batch * ranks
    for first in range(0, total - start - step + 1, step):
        mine = {p for rank in taken for p in rank[first // ranks : first // ranks + batch]}
        assert mine == set(range(start + first, start + first + step))
    left = (total - start) // ranks  # a short last step keeps every rank equally long too
    assert [len(rank) for rank in taken] == [left] * ranks


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(0, 200),
    workers=st.integers(1, 6),
    batch=st.one_of(st.none(), st.integers(1, 9)),
    cut=st.integers(0, 200),
)
def test_a_worker_can_start_anywhere_in_its_samples(length, workers, batch, cut) -> None:
    for worker in range(workers):
        count = worker_length(length, worker, workers, batch)
        whole = worker_samples(0, count, worker, workers, batch).tolist()
        begin = min(cut, count)
        assert worker_samples(begin, count, worker, workers, batch).tolist() == whole[begin:]
        assert all(sample < length for sample in whole)


@settings(max_examples=60, deadline=None)
@given(counts=counts_lists, seed=seeds, epoch=epochs, lanes=lane_numbers, start=st.integers(0, 500))
def test_any_position_is_found_without_those_before(counts, seed, epoch, lanes, start) -> None:
    whole = whole_order(EpochOrder(np.array(counts), seed=seed, epoch=epoch, lanes=lanes))
    fresh = EpochOrder(np.array(counts), seed=seed, epoch=epoch, lanes=lanes)
    shards, ranks = fresh.locate(np.arange(min(start, len(whole)), len(whole)))
    assert list(zip(shards.tolist(), ranks.tolist(), strict=True)) == whole[start:]


def test_the_example_of_the_docstring() -> None:
    order = EpochOrder(np.array([4, 4, 3]), seed=0, epoch=0, lanes=3)
    assert " ".join("abc"[shard] + str(row) for shard, row in whole_order(order)) == "b3 a2 c1 b2 a0 c2 b0 a1 c0 b1 a3"


def test_the_order_is_pinned() -> None:
    """If this fails, the order has changed: raise ALGORITHM_VERSION, or states of older runs resume wrongly."""
    assert ALGORITHM_VERSION == 2
    order = EpochOrder(np.array([3, 0, 5, 2]), seed=42, epoch=9)
    assert whole_order(order) == [(3, 0), (2, 1), (2, 3), (2, 4), (2, 0), (0, 0), (0, 1), (2, 2), (0, 2), (3, 1)]
    large = EpochOrder(np.full(50, 40_000), seed=1, epoch=2)
    assert (large.lanes, large.window) == (960, 18)
    shards, ranks = large.locate(np.array([0, 1, 959, 960, 1_000_000, 1_999_999]))
    assert list(zip(shards.tolist(), ranks.tolist(), strict=True)) == [
        (12, 19083),
        (4, 18425),
        (7, 35367),
        (12, 19073),
        (46, 2183),
        (43, 9398),
    ]


def test_epochs_and_seeds_give_other_orders() -> None:
    counts = np.array([50, 60, 70])
    orders = {tuple(whole_order(EpochOrder(counts, seed=seed, epoch=epoch))) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_without_shuffling_it_is_shard_and_row_order() -> None:
    order = EpochOrder(np.array([2, 0, 3]), seed=5, epoch=5, lanes=4, shuffle=False)
    assert whole_order(order) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert order.lanes == 1


@pytest.mark.parametrize(
    ("total", "lanes"),
    [(0, 1), (1, 1), (16_384, 1), (16_385, 960), (1_000_000, 960), (10**9, 960)],
)
def test_lanes_depend_on_the_number_of_samples_alone(total: int, lanes: int) -> None:
    assert default_lanes(total) == lanes
    assert 960 % lanes == 0


@pytest.mark.parametrize("total", [1000, 16_384])
def test_a_small_window_mixes_small_selections_too(total: int) -> None:
    counts = np.full(10, total // 10)
    order = EpochOrder(counts, window=4)
    assert sorted(whole_order(order)) == whole_order(EpochOrder(counts, shuffle=False))
    shards = order.locate(np.arange(100))[0]
    assert len(np.unique(shards)) == 10
    assert unevenness(order.locate(np.arange(order.total))[0], 100) < 1.5


@pytest.mark.parametrize("total", [1, 100, 16_384, 20_000, 100_000, 1_000_000, 10**9])
def test_the_shuffle_pool_is_large_enough(total: int) -> None:
    lanes = default_lanes(total)
    window = window_length(total, lanes)
    assert lanes * window >= min(total, 15_000)
    assert window <= -(-total // lanes)


def unevenness(labels: np.ndarray, batch: int) -> float:
    """χ² per degree of freedom of the labels in a batch, averaged: about 1 after a uniform shuffle."""
    classes = int(labels.max()) + 1
    batches = labels[: len(labels) // batch * batch].reshape(-1, batch)
    expected = batch * np.bincount(labels, minlength=classes) / len(labels)
    counts = np.stack([np.bincount(each, minlength=classes) for each in batches])
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (classes - 1))


@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize(("shards", "rows"), [(20, 3000), (1000, 300), (1000, 1000), (100, 300)])
def test_batches_are_mixed_as_well_as_by_a_uniform_shuffle(shards: int, rows: int, batch: int) -> None:
    """Also when shards hold one class each, and when each shard is sorted by class inside."""
    order = EpochOrder(np.full(shards, rows), seed=3, epoch=1)
    assert order.lanes > 1
    shard, row = order.locate(np.arange(order.total))
    assert unevenness(shard * 10 // shards, batch) < 1.25
    assert unevenness(row * 10 // rows, batch) < 1.25


@settings(max_examples=60, deadline=None)
@given(counts=counts_lists, seed=seeds, epoch=epochs, lanes=st.integers(1, 9), window=st.integers(1, 50))
def test_a_window_can_be_chosen(counts: list[int], seed: int, epoch: int, lanes: int, window: int) -> None:
    order = EpochOrder(np.array(counts), seed=seed, epoch=epoch, lanes=lanes, window=window)
    used = max(1, min(window, -(-sum(counts) // lanes)))
    assert order.window == used
    assert whole_order(order) == slow_order(counts, seed, epoch, lanes, used)


def test_a_small_selection_is_shuffled_uniformly() -> None:
    """Each of 24 orders of 4 samples is about equally frequent (χ² with 23 degrees of freedom, p = 0.0001 at 56)."""
    seen: dict[tuple[tuple[int, int], ...], int] = {}
    for epoch in range(4800):
        found = tuple(whole_order(EpochOrder(np.array([4]), seed=11, epoch=epoch)))
        seen[found] = seen.get(found, 0) + 1
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 56


def test_what_is_dropped_differs_between_epochs() -> None:
    dropped = [whole_order(EpochOrder(np.array([13, 10]), seed=0, epoch=epoch))[20:] for epoch in range(20)]
    assert len({sample for tail in dropped for sample in tail}) > 10


def test_memory_stays_small_over_a_long_epoch() -> None:
    order = EpochOrder(np.full(100, 10_000), seed=0, epoch=0)
    for start in range(0, 1_000_000, 50_000):
        order.locate(np.arange(start, start + 4096))
    assert len(order._permutations) <= 2 * order.lanes


def test_the_padded_positions_begin_anew_and_are_marked() -> None:
    positions, marks = rank_positions(np.arange(3), 11, 4, 3)
    assert positions.tolist() == [3, 7, 0]
    assert marks.tolist() == [False, False, True]
    positions, marks = rank_positions(np.arange(1), 2, 7, 6)  # fewer samples than ranks: around more than once
    assert positions.tolist() == [0]
    assert marks.tolist() == [True]


def test_an_unknown_position_is_refused() -> None:
    with pytest.raises(IndexError, match=r"positions 0 … 5 are out of range; got 5 samples"):
        EpochOrder(np.array([2, 3])).locate(np.arange(6))


@given(total=st.integers(1, 400), position=st.integers(0, 399))
def test_substitutes_reach_every_other_sample(total: int, position: int) -> None:
    position %= total
    found = [substitute(position, attempt, total) for attempt in range(1, total)]
    assert sorted([*found, position]) == list(range(total))
