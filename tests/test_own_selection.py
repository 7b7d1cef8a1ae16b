"""Selections that were made elsewhere: published, streamed with their weights, refused when they cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from dynams_stream import SelectedDataset, Store
from dynams_stream.errors import UsageError
from pipeline.index_job import build_index
from pipeline.own_selection import publish_rows


def rows_of(store: Store) -> list[np.ndarray]:
    return [np.arange(shard % 3, count, 1 + shard % 4) for shard, count in enumerate(store.dataset().counts.tolist())]


def test_rows_and_weights_are_streamed(digit_store: Store) -> None:
    rows = rows_of(digit_store)
    weights = [(shard + 1) + one / 1000 for shard, one in enumerate(rows)]
    made = publish_rows(digit_store, rows, weights, strategy="mine", epoch=3)
    assert (made.number, made.epoch, made.manifest["strategy"]) == (1, 3, "own:mine")
    assert made.counts["selected"] == sum(map(len, rows))
    assert made.fraction == pytest.approx(sum(map(len, rows)) / 1437)
    urls = digit_store.dataset().urls
    expected = {
        (urls[shard], int(row)): np.float32(weight)
        for shard, one in enumerate(rows)
        for row, weight in zip(one, weights[shard], strict=True)
    }
    dataset = SelectedDataset(digit_store, batch_size=32, seed=1)
    dataset.set_epoch(0)
    streamed = {(sample["__url__"], sample["__row__"]): np.float32(sample["__weight__"]) for sample in dataset}
    assert streamed == expected


def test_the_same_rows_again_are_the_same_round(digit_store: Store) -> None:
    rows = rows_of(digit_store)
    first = publish_rows(digit_store, rows, strategy="mine")
    assert publish_rows(digit_store, rows, strategy="mine").number == first.number
    assert publish_rows(digit_store, [one[:5] for one in rows], strategy="mine").number == 2
    assert publish_rows(digit_store, rows, strategy="mine").number == 3, "the newest is what loaders take"
    assert publish_rows(digit_store, rows, strategy="another's").number == 4
    assert first.selection().weights(0) is None


def test_the_same_rows_of_another_dataset_are_another_round(digit_store: Store, digit_shards: list[str]) -> None:
    rows = rows_of(digit_store)
    first = publish_rows(digit_store, rows, strategy="mine")
    build_index(digit_store, digit_shards[::-1])
    reversed_rows = [one[: len(digit_store.dataset().counts)] for one in rows]
    second = publish_rows(digit_store, [one[:10] for one in reversed_rows], strategy="mine")
    build_index(digit_store, digit_shards)
    third = publish_rows(digit_store, [one[:10] for one in reversed_rows], strategy="mine")
    assert [first.number, second.number, third.number] == [1, 2, 3]
    assert third.dataset().urls == tuple(digit_shards)


def test_rows_that_cannot_be(digit_store: Store) -> None:
    rows = rows_of(digit_store)
    for wrong, message in (
        (rows[:-1], "14 shards were given; the dataset has 15"),
        ([np.array([3, 3]), *rows[1:]], "shard 0: its rows must ascend"),
        ([*rows[:2], np.array([-1, 4]), *rows[3:]], "shard 2: its rows must ascend and lie in 0 … 99"),
        ([*rows[:2], np.array([100]), *rows[3:]], "shard 2"),
    ):
        with pytest.raises(UsageError, match=message):
            publish_rows(digit_store, wrong, strategy="mine")
    weights = [np.ones(len(one)) for one in rows]
    weights[4] = weights[4] * np.nan
    with pytest.raises(UsageError, match="shard 4: one finite weight for each"):
        publish_rows(digit_store, rows, weights, strategy="mine")
    assert digit_store.rounds() == []
