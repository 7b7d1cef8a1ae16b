"""Wrong labels and a long tail: how many, which, and always the same ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dynams_stream.errors import UsageError
from dynams_stream.samples import SelectedSamples
from pipeline.shards import Source, open_source
from tools.training_config import DataConfig, RunConfig
from tools.training_data import long_tailed, mislabelled, prepare_data, wrong_places


def data(**changes: float) -> DataConfig:
    return DataConfig(dataset="digits", transform="toy_models:gray", **changes)


def labels(source: Source) -> np.ndarray:
    return np.array([int(source[place]["cls"]) for place in range(len(source))])


def test_wrong_labels_are_as_many_as_said_and_always_the_same() -> None:
    plain = open_source("digits", "", "train")
    config = data(wrong_labels=0.1)
    noisy = mislabelled(plain, config)
    before, after = labels(plain), labels(noisy)
    changed = np.flatnonzero(before != after)
    assert len(changed) == round(0.1 * 1437) == 144
    assert changed.tolist() == wrong_places(1437, config).tolist()
    assert [noisy[place]["png"] for place in (3, 700)] == [plain[place]["png"] for place in (3, 700)]
    shifts = Counter(((after - before) % 10)[changed].tolist())
    assert set(shifts) == set(range(1, 10)), "every other class"
    assert max(shifts.values()) < 35  # 16 expected of each of nine
    assert labels(mislabelled(plain, config)).tolist() == after.tolist()
    assert labels(mislabelled(plain, data(wrong_labels=0.1, seed=1))).tolist() != after.tolist()
    assert mislabelled(plain, data()) is plain


def test_a_long_tail_falls_geometrically() -> None:
    plain = open_source("digits", "", "train")
    tail = long_tailed(plain, data(imbalance=20))
    before, after = Counter(labels(plain).tolist()), Counter(labels(tail).tolist())
    for label in range(10):
        assert after[label] == max(1, round(before[label] * 20 ** (-label / 9)))
    keys = [tail[place]["__key__"] for place in range(len(tail))]
    assert keys == sorted(keys), "the order stays"
    assert long_tailed(plain, data()) is plain


def test_one_class_cannot_be_mislabelled() -> None:
    one = Source(5, lambda place: {"__key__": str(place), "cls": b"3"})
    with pytest.raises(UsageError, match="a dataset of one class"):
        mislabelled(one, data(wrong_labels=0.5))


def test_only_the_training_shards_are_changed(tmp_path: Path) -> None:
    def config(**changes: float) -> RunConfig:
        return RunConfig(
            out=tmp_path,
            data=data(**changes),
            model={"factory": "toy_models:small_cnn"},
            training={"epochs": 2},
            selection={"final": 0.5, "warmup": 1},
        )

    train, test = prepare_data(config(wrong_labels=0.5))
    wrong = sum(
        int(sample["cls"]) != label
        for sample, label in zip(
            SelectedSamples(train, round=None), labels(open_source("digits", "", "train")), strict=True
        )
    )
    assert wrong == round(0.5 * 1437)
    right = labels(open_source("digits", "", "test")).tolist()
    assert [int(sample["cls"]) for sample in SelectedSamples(test, round=None)] == right
    assert prepare_data(config(wrong_labels=0.5))[0].dataset().digest == train.dataset().digest
    with pytest.raises(UsageError, match="holds shards of"):
        prepare_data(config())
