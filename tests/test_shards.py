"""Writing shards: reproducible, whole or absent, and read back by webdataset as they were given."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from builders import data_of, webdataset_samples
from dynams_stream import storage
from dynams_stream.errors import MissingExtraError, UsageError
from pipeline.shards import SOURCES, Source, open_source, write_shards

ROOT = Path(__file__).resolve().parents[1]


def some_samples(count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"{n:06d}", "png": data_of(n, 100 + n), "cls": b"%d" % (n % 10)} for n in range(count)]


def read_back(urls: list[str]) -> list[dict[str, Any]]:
    samples = [sample for url in urls for sample in webdataset_samples(url)]
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in samples]


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_samples_are_read_back_in_order(tmp_path: Path) -> None:
    samples = some_samples(25)
    seen: list[tuple[int, int]] = []
    urls = write_shards(
        samples, tmp_path / "out", prefix="val", samples_per_shard=10, progress=lambda *state: seen.append(state)
    )
    assert urls == [str(tmp_path / "out" / f"val-{n:06d}.tar") for n in range(3)]
    assert [len(webdataset_samples(url)) for url in urls] == [10, 10, 5]
    assert read_back(urls) == samples
    assert seen == [(10, 25), (20, 25), (25, 25)]
    assert sorted(os.listdir(tmp_path / "out")) == [Path(url).name for url in urls]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_shards(some_samples(7), tmp_path / "a", samples_per_shard=4)
    second = write_shards(iter(some_samples(7)), tmp_path / "b", samples_per_shard=4)
    assert [Path(url).read_bytes() for url in first] == [Path(url).read_bytes() for url in second]
    with tarfile.open(first[0]) as shard:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in shard} == {
            (0, 0, 0, "dynams", "dynams", 0o444)
        }
        assert not any(member.pax_headers for member in shard)


def test_a_seed_shuffles_and_no_seed_keeps_the_order(tmp_path: Path) -> None:
    samples = some_samples(30)

    def written(name: str, seed: int | None) -> list[dict[str, Any]]:
        return read_back(write_shards(samples, tmp_path / name, samples_per_shard=8, shuffle_seed=seed))

    one, again, two = written("1", 1), written("1-again", 1), written("2", 2)
    assert one == again
    assert one != samples
    assert one != two
    assert sorted(one, key=lambda sample: sample["__key__"]) == samples
    with pytest.raises(UsageError, match="only a sequence of samples can be shuffled"):
        write_shards(iter(samples), tmp_path / "3", shuffle_seed=1)


def test_shards_that_are_there_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write_shards(some_samples(12), tmp_path, samples_per_shard=3)
    others = write_shards(some_samples(2), tmp_path, prefix="test")
    (tmp_path / "train-notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 4 shards named train-….tar; choose another folder, or overwrite them"):
        write_shards(some_samples(5), tmp_path, samples_per_shard=3)
    urls = write_shards(some_samples(5), tmp_path, samples_per_shard=3, overwrite=True)
    assert read_back(urls) == some_samples(5)
    # No shard of the longer dataset stays behind, where a glob would find it.
    assert sorted(os.listdir(tmp_path)) == sorted([*map(os.path.basename, [*urls, *others]), "train-notes.txt"])


def test_a_failure_leaves_whole_shards_only(tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield from some_samples(14)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(failing(), tmp_path, samples_per_shard=5)
    assert sorted(os.listdir(tmp_path)) == ["train-000000.tar", "train-000001.tar"]
    assert read_back([str(tmp_path / name) for name in sorted(os.listdir(tmp_path))]) == some_samples(10)


def test_a_killed_writer_leaves_no_half_shard_under_its_name(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "import webdataset\n"
        "from pipeline.shards import write_shards\n"
        "write, calls = webdataset.TarWriter.write, iter(range(100))\n"
        "def write_and_die(self, sample):\n"
        "    write(self, sample)\n"
        "    if next(calls) == 13:\n"
        "        self.stream._file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "webdataset.TarWriter.write = write_and_die\n"
        "samples = [{'__key__': f'{n:06d}', 'png': bytes(5000), 'cls': b'1'} for n in range(40)]\n"
        "write_shards(samples, sys.argv[1], samples_per_shard=10)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, timeout=120)
    assert killed.returncode == -9
    whole = sorted(name for name in os.listdir(tmp_path) if name.endswith(".tar"))
    assert whole == ["train-000000.tar"]
    assert len(webdataset_samples(tmp_path / whole[0])) == 10


def test_shards_can_be_written_to_an_object_store() -> None:
    urls = write_shards(some_samples(5), "memory://shards/out", samples_per_shard=3)
    assert urls == ["memory://shards/out/train-000000.tar", "memory://shards/out/train-000001.tar"]
    with tarfile.open(fileobj=BytesIO(storage.read_bytes(urls[1]))) as shard:
        assert shard.getnames() == ["000003.cls", "000003.png", "000004.cls", "000004.png"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "there are no samples"),
        ([{"__key__": "a.b", "png": b""}], r"key 'a\.b' and the members \['png'\] would not be read back"),
        ([{"__key__": "a/", "png": b"", "cls.": b""}, {"__key__": "", "png": b""}], "key '' .* would not be read back"),
        ([{"__key__": "__x__/a", "png": b""}], "would not be read back"),
        ([{"__key__": "a", "PNG": b""}], "would not be read back"),
        ([{"__key__": "a", "png/b": b""}], "would not be read back"),
        ([{"__key__": "a"}], "would not be read back"),
        ([{"__key__": "a", "png": b""}, {"__key__": "a", "cls": b""}], "two samples in a row have the key 'a'"),
    ],
)
def test_what_would_not_be_read_back_is_refused(tmp_path: Path, samples: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_shards(samples, tmp_path)
    assert os.listdir(tmp_path) == []


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples_per_shard must be at least 1, got 0"):
        write_shards(some_samples(1), tmp_path, samples_per_shard=0)
    with pytest.raises(UsageError, match=r"prefix .* got 'a/b'"):
        write_shards(some_samples(1), tmp_path, prefix="a/b")


# ---- sources ---------------------------------------------------------------------------------------------------------


def labelled(source: Source) -> Counter[tuple[bytes, int]]:
    pictures = (np.asarray(Image.open(BytesIO(sample["png"]))) for sample in source)
    return Counter((image.tobytes(), int(sample["cls"])) for image, sample in zip(pictures, source, strict=True))


def test_the_digits_are_split_by_class_for_good() -> None:
    train, test = open_source("digits", "", "train"), open_source("digits", "", "test")
    digits = load_digits()
    every = Counter(
        (np.rint(image / 16 * 255).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    assert (len(train), len(test)) == (1437, 360)
    assert labelled(train) + labelled(test) == every
    for label, count in Counter(digits.target.tolist()).items():
        assert sum(int(sample["cls"]) == label for sample in test) == pytest.approx(count * 360 / 1797, abs=1)
    assert train[5] == open_source("digits", "elsewhere", "train")[5]
    assert list(train[0]) == ["__key__", "png", "cls"]
    # The split is a promise: figures that people compare depend on it.
    assert [int(sample["cls"]) for sample in test[:12]] == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2]


def test_a_source_is_a_sequence() -> None:
    source = open_source("digits", "", "test")
    assert source[-1] == source[359]
    assert source[3:5] == [source[3], source[4]]
    assert [sample["__key__"] for sample in source][:2] == ["000000", "000001"]
    with pytest.raises(IndexError, match="position 360 of 360"):
        source[360]


def test_mnist_is_what_torchvision_reads(mnist_root: Path) -> None:
    source = open_source("mnist", mnist_root, "test")
    truth = torchvision.datasets.MNIST(mnist_root, train=False, download=False)
    assert len(source) == 10_000
    for position in random.Random(1).sample(range(10_000), 200):
        image, label = truth[position]
        sample = source[position]
        found = Image.open(BytesIO(sample["png"]))
        assert (sample["__key__"], int(sample["cls"])) == (f"{position:06d}", label)
        assert (found.mode, found.tobytes()) == (image.mode, image.tobytes())


def fashion_files(root: Path) -> None:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 3)):
        images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
        about = np.array([0x803, count, 28, 28], dtype=">u4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(about + images.tobytes())
        about = np.array([0x801, count], dtype=">u4").tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(about + bytes(range(count)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_is_what_torchvision_reads(tmp_path: Path, split: str) -> None:
    fashion_files(tmp_path)
    source = open_source("fashion_mnist", tmp_path, split)
    truth = torchvision.datasets.FashionMNIST(tmp_path, train=split == "train")
    assert len(source) == len(truth) > 0
    for sample, (image, label) in zip(source, truth, strict=True):
        found = Image.open(BytesIO(sample["png"]))
        assert (found.mode, found.tobytes(), int(sample["cls"])) == (image.mode, image.tobytes(), label)


def make_images(root: Path, names: list[str]) -> dict[str, bytes]:
    files = {}
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = data_of(number, 50 + number)
        (root / name).write_bytes(files[name])
    return files


def test_a_folder_of_images_is_read_like_torchvisions_image_folder(tmp_path: Path) -> None:
    root = tmp_path / "images"
    names = [
        "dog/2.JPG",
        "dog/deep.er/1.v2.jpeg",
        "cat/a.png",
        "cat/a.webp",
        "cat/b.x.png",
        "cat/b_x.png",
        "Zebra/1.tiff",
    ]
    files = make_images(root, names)
    make_images(root, ["cat/readme.txt", "cat/.hidden.png", ".git/x.png", "stray.png"])
    source = open_source("folder", root, "train")
    truth = torchvision.datasets.ImageFolder(
        root, is_valid_file=lambda path: "hidden" not in path and "txt" not in path
    )
    classes = sorted(name for name in truth.classes if name != ".git") if ".git" in truth.classes else truth.classes
    urls = write_shards(source, tmp_path / "shards")
    found = read_back(urls)
    keys = [sample["__key__"] for sample in found]
    assert classes == ["Zebra", "cat", "dog"]
    assert keys == ["Zebra/1", "cat/a", "cat/a-2", "cat/b_x", "cat/b_x-2", "dog/2", "dog/deep_er/1_v2"]
    order = [
        "Zebra/1.tiff",
        "cat/a.png",
        "cat/a.webp",
        "cat/b.x.png",
        "cat/b_x.png",
        "dog/2.JPG",
        "dog/deep.er/1.v2.jpeg",
    ]
    for sample, name in zip(found, order, strict=True):
        extension = name.rsplit(".", 1)[1].lower()
        assert set(sample) == {"__key__", extension, "cls"}
        assert sample[extension] == files[name]
        assert int(sample["cls"]) == classes.index(name.split("/")[0])


def test_a_folder_may_be_split_and_numbers_its_classes_over_all_splits(tmp_path: Path) -> None:
    make_images(tmp_path, ["train/ant/1.png", "train/bee/2.png", "train/cow/3.png", "test/cow/4.png", "val/emu/5.png"])
    train, test = open_source("folder", tmp_path, "train"), open_source("folder", tmp_path, "test")
    assert [(sample["__key__"], int(sample["cls"])) for sample in train] == [("ant/1", 0), ("bee/2", 1), ("cow/3", 2)]
    assert [(sample["__key__"], int(sample["cls"])) for sample in test] == [("cow/4", 2)]


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    make_images(tmp_path, ["train/1.png", "plane/2.png"])
    found = open_source("folder", tmp_path, "train")
    assert [(sample["__key__"], int(sample["cls"])) for sample in found] == [("plane/2", 0), ("train/1", 1)]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_files_are_named(tmp_path: Path, name: str, split: str) -> None:
    if name == "digits":
        assert len(open_source(name, tmp_path / "gone", split)) > 0
        return
    with pytest.raises(UsageError, match=str(tmp_path / "gone")) as caught:
        open_source(name, tmp_path / "gone", split)
    below = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
    assert below.get(name, "a folder for each class") in str(caught.value)


@pytest.mark.parametrize(
    ("open_it", "message"),
    [
        (lambda root: open_source("imagenet", root, "train"), "'imagenet' is unknown; choose from digits, mnist"),
        (lambda root: open_source("mnist", root, "val"), "split 'val' is unknown; choose from train, test"),
        (lambda root: open_source("folder", root, "test"), r"holds the folders \['train'\], none is named 'test'"),
        (lambda root: open_source("folder", root, "train"), "hold no images"),
    ],
)
def test_wrong_sources_are_refused(tmp_path: Path, open_it: Callable[[Path], object], message: str) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        open_it(tmp_path)


def test_missing_scikit_learn_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dynams-stream\[train\]'"):
        open_source("digits", "", "train")
