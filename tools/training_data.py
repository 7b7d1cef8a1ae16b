"""The shards of a reference training run, written once: training images as they are, mislabelled or long-tailed."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from dynams_stream.errors import UsageError
from dynams_stream.store import Store
from pipeline.index_job import build_index
from pipeline.shards import Sample, Source, open_source, write_shards
from tools.progress import progress_bar
from tools.training_config import DataConfig, RunConfig

_NOT_IN_SHARDS = {"transform", "train_transform", "input", "label"}
"""Settings of the data that do not change its shards."""

Integers = npt.NDArray[np.int64]


def prepare_data(config: RunConfig) -> tuple[Store, Store]:
    """The train and test shards below `out`, each folder with its index; written once.

    Raises:
        UsageError: when the shards there were made from other data.
    """
    made_from, wanted = config.out / "shards" / "data.json", config.data.model_dump(exclude=_NOT_IN_SHARDS)
    if not made_from.exists():
        made_from.parent.mkdir(parents=True, exist_ok=True)
        made_from.write_text(json.dumps(wanted))
    elif {**_defaults(), **json.loads(made_from.read_text())} != wanted:
        raise UsageError(
            f"{made_from.parent} holds shards of {made_from.read_text()}, the configuration asks for "
            f"{json.dumps(wanted)}; name another --out, or remove that folder"
        )
    return _prepare_split(config, "train"), _prepare_split(config, "test")


def _defaults() -> dict[str, object]:
    """What a setting was before it existed."""
    fields = DataConfig.model_fields.items()
    return {name: field.default for name, field in fields if name not in _NOT_IN_SHARDS and not field.is_required()}


def _prepare_split(config: RunConfig, split: str) -> Store:
    data, folder = config.data, config.out / "shards" / split
    store = Store(folder)
    if store.dataset_versions():  # indexed after the last shard was written, so they are all there
        return store
    source = open_source(data.dataset, data.root, split)
    if split == "train":
        source = mislabelled(long_tailed(source, data), data)
    with progress_bar(f"shard {split}", "samples") as report:
        urls = write_shards(
            source, folder, prefix=split, samples_per_shard=data.samples_per_shard, overwrite=True, progress=report
        )
    build_index(store, urls)
    return store


def long_tailed(source: Source, data: DataConfig) -> Source:
    """The samples that stay when class c of C keeps one imbalance^(c / (C − 1))-th of its samples, at least one.

    (The exponential profile of Cui et al. 2019, "Class-balanced loss based on effective number of samples".)
    """
    if data.imbalance == 1:
        return source
    labels = _labels(source, data)
    generator = np.random.default_rng([data.seed, 1])
    classes = np.unique(labels)
    kept = []
    for number, label in enumerate(classes.tolist()):
        share = data.imbalance ** (-number / max(1, len(classes) - 1))
        places = np.flatnonzero(labels == label)
        kept.append(generator.permutation(places)[: max(1, round(share * len(places)))])
    chosen = np.sort(np.concatenate(kept)).tolist()
    return Source(len(chosen), lambda position: source[chosen[position]])


def mislabelled(source: Source, data: DataConfig) -> Source:
    """The samples with ⌊wrong_labels · N⌉ labels replaced by another class of the dataset, each alike likely."""
    if data.wrong_labels == 0:
        return source
    labels = _labels(source, data)
    wrong = wrong_places(len(labels), data)
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UsageError(f"{data.dataset}: a dataset of one class cannot be mislabelled; leave out data.wrong_labels")
    shifts = np.random.default_rng([data.seed, 2]).integers(1, len(classes), len(wrong))
    others = classes[(np.searchsorted(classes, labels[wrong]) + shifts) % len(classes)]
    replaced = dict(zip(wrong.tolist(), others.tolist(), strict=True))

    def sample(position: int) -> Sample:
        found: Sample = source[position]
        return found if position not in replaced else {**found, data.label: b"%d" % replaced[position]}

    return Source(len(source), sample)


def wrong_places(samples: int, data: DataConfig) -> Integers:
    """Which samples get a wrong label: int64, ascending places in the training images."""
    generator = np.random.default_rng([data.seed, 3])
    return np.sort(generator.choice(samples, round(data.wrong_labels * samples), replace=False))


def _labels(source: Source, data: DataConfig) -> Integers:
    return np.array([int(source[place][data.label]) for place in range(len(source))], dtype=np.int64)
