"""Writes WebDataset shards from scikit-learn's digits, torchvision's datasets or a folder of images.

Shards are reproducible to the byte: the same samples and options give the same files.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynams_stream import storage
from dynams_stream.errors import MissingExtraError, UsageError
from pipeline.tar_files import write_tar

Sample = dict[str, bytes]

SOURCES = ("digits", "mnist", "fashion_mnist", "folder")
# torchvision's CIFAR loaders unpickle the dataset's files, which nothing here does; use a folder of its images.
SPLITS = ("train", "test")
DIGITS_SEED = 0
DIGITS_TEST_SAMPLES = 360
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"})
_SPLIT_FOLDERS = frozenset({"train", "test", "val"})


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    samples: Iterable[dict[str, Any]],
    folder: str | os.PathLike[str],
    *,
    prefix: str = "train",
    samples_per_shard: int = 3000,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write samples as `<folder>/<prefix>-000000.tar`, `-000001.tar`, …; each appears whole or not at all.

    Args:
        samples: `{"__key__": str, extension: bytes, …}`, such as `open_source` gives; a sequence when it is to be
            shuffled. Other fields that begin with an underscore are not written.
        folder: a folder or object-store prefix.
        prefix: begin of the shards' names.
        samples_per_shard: how many samples a shard takes; the last one may have fewer.
        shuffle_seed: None keeps the order.
        overwrite: replace the shards of that prefix that are there.
        progress: called with the samples written and all of them (0 when their number is not known).

    Returns:
        The shards' absolute paths or URLs, in order.

    Raises:
        UsageError: when there are shards of that prefix already, no samples, or a sample that would not be read back as
            it is written.
    """
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    if not prefix or "/" in prefix:
        raise UsageError(f"the prefix of the shards' names must be a part of a file name, got {prefix!r}")
    place = storage.absolute(folder)
    there = _shards_there(place, prefix)
    if there and not overwrite:
        raise UsageError(
            f"{place} holds {len(there)} shards named {prefix}-….tar; choose another folder, or overwrite them "
            f"(--overwrite)"
        )
    total = len(samples) if isinstance(samples, Sequence) else 0
    stream = _in_order(samples, shuffle_seed)
    written: list[str] = []
    done = 0
    while chunk := list(itertools.islice(stream, samples_per_shard)):
        name = f"{prefix}-{len(written):06d}.tar"
        write_tar(storage.join(place, name), chunk)
        written.append(storage.join(place, name))
        there.discard(name)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    if not written:
        raise UsageError("there are no samples to write")
    for name in there:  # more shards than now: they would be taken for shards of this dataset
        storage.remove(storage.join(place, name))
    return written


def _shards_there(place: str, prefix: str) -> set[str]:
    name = re.compile(re.escape(prefix) + r"-\d{6,}\.tar")
    return {found for found in storage.list_names(place) if name.fullmatch(found)}


def _in_order(samples: Iterable[dict[str, Any]], shuffle_seed: int | None) -> Iterator[dict[str, Any]]:
    if shuffle_seed is None:
        return iter(samples)
    if not isinstance(samples, Sequence):
        raise UsageError("only a sequence of samples can be shuffled; give a list, or no shuffle_seed")
    order = np.random.default_rng(shuffle_seed).permutation(len(samples))
    return (samples[position] for position in order.tolist())


# ---- sources ---------------------------------------------------------------------------------------------------------


class Source(Sequence[Sample]):
    """A dataset as samples, each made when it is asked for.

    Args:
        length: number of samples.
        sample: gives the sample at a position.
    """

    def __init__(self, length: int, sample: Callable[[int], Sample]):
        self._length = length
        self._sample = sample

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[index] for index in range(*position.indices(self._length))]
        if not -self._length <= position < self._length:
            raise IndexError(f"position {position} of {self._length} samples")
        return self._sample(position % self._length)


def open_source(name: str, root: str | os.PathLike[str], split: str) -> Source:
    """Open a dataset that lies on this machine; nothing is downloaded.

    Each sample has a `__key__` (its zero-padded position; of a folder the path without extension, dots replaced), the
    image (`png`; of a folder the file as it is) and `cls`, the class as ASCII digits.

    Args:
        name: one of `SOURCES`.
        root: where torchvision looks for its files; the folder of images (with folders `train` and `test`, or the
            classes themselves). Not used by the digits, which scikit-learn brings along.
        split: train or test.

    Raises:
        UsageError: for an unknown name or split, or when files are missing.
        MissingExtraError: when scikit-learn is needed and missing.
    """
    if name not in SOURCES:
        raise UsageError(f"the dataset {name!r} is unknown; choose from {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise UsageError(f"the split {split!r} is unknown; choose from {', '.join(SPLITS)}")
    if name == "digits":
        return _digits(split)
    if name == "folder":
        return _image_folder(Path(root), split)
    return _torchvision(name, Path(root), split)


def _digits(split: str) -> Source:
    """scikit-learn's 1,797 digits of 8×8 pixels; 360 of them, drawn by class with seed 0, are for tests."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError(
            f"the digits come with scikit-learn ({error}); pip install 'dynams-stream[train]'"
        ) from error
    digits = load_digits()
    labels: np.ndarray = digits.target
    train, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_SAMPLES, stratify=labels, random_state=DIGITS_SEED
    )
    chosen = np.sort(train if split == "train" else test)
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return _images(images, labels[chosen])


def _torchvision(name: str, root: Path, split: str) -> Source:
    from torchvision import datasets

    made: dict[str, tuple[Any, str]] = {
        "mnist": (datasets.MNIST, "MNIST/raw"),
        "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
    }
    dataset_class, below = made[name]
    try:
        dataset = dataset_class(root, train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"{name}: no usable files in {root.resolve() / below} ({str(error).splitlines()[0]}); "
            f"give the folder that holds {below} as root"
        ) from error
    return _images(np.asarray(dataset.data), np.asarray(dataset.targets))


def _images(images: np.ndarray, labels: np.ndarray) -> Source:
    """uint8 images, shape (n, height, width) or (n, height, width, 3), as PNG samples."""
    digits = max(6, len(str(len(images) - 1)))

    def sample(position: int) -> Sample:
        file = io.BytesIO()
        Image.fromarray(images[position]).save(file, "PNG")
        return {
            "__key__": f"{position:0{digits}d}",  # type: ignore[dict-item]
            "png": file.getvalue(),
            "cls": b"%d" % int(labels[position]),
        }

    return Source(len(images), sample)


def _image_folder(root: Path, split: str) -> Source:
    classes, folder = _classes(root, split)
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted(_files(folder / name))
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS
    ]
    if not files:
        raise UsageError(f"{folder.resolve()}: its folders {classes[:5]} hold no images ({sorted(IMAGE_EXTENSIONS)})")
    keys = _keys([path.relative_to(folder) for path, _ in files])

    def sample(position: int) -> Sample:
        path, label = files[position]
        return {
            "__key__": keys[position],  # type: ignore[dict-item]
            path.suffix[1:].lower(): path.read_bytes(),
            "cls": b"%d" % label,
        }

    return Source(len(files), sample)


def _classes(root: Path, split: str) -> tuple[list[str], Path]:
    """The sorted class names, and the folder of the split that holds a folder for each."""
    below = _folders(root)
    if not below:
        raise UsageError(f"{root.resolve()}: no folder with a folder for each class")
    if not set(below) <= _SPLIT_FOLDERS:
        return below, root
    if split not in below:
        raise UsageError(f"{root.resolve()} holds the folders {below}, none is named {split!r}")
    # All splits together: a class without test images must not shift the numbers of the others.
    return sorted({name for part in below for name in _folders(root / part)}), root / split


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _keys(paths: list[Path]) -> list[str]:
    """A key for each file: its path without extension, dots replaced, numbered where two would be the same."""
    taken: set[str] = set()
    keys = []
    for path in paths:
        plain = path.with_suffix("").as_posix().replace(".", "_")
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        key = next(key for key in itertools.chain([plain], numbered) if key not in taken)
        taken.add(key)
        keys.append(key)
    return keys
