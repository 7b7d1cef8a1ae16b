"""The data that `streaming.py` measures on: sets of samples in tar shards, their stores, and lists of what is selected.

A set is a folder, made once:

    set-13kb-100000/
        shards/data-0000.tar …      samples of three members (jpg, cls, json)
        members.npz                 where they lie in the shards
        store/, store-s3/           stores over the shards as local files, and as s3://bucket/set-…/shards/…
        plans/local-0.3.npz …       a round's samples in the order in which `SelectedDataset` streams its epoch 1
        mosaic/, litdata/, …        the same samples in a peer's own format, made by `peers/<peer>.py prepare`

The images are synthetic photographs: smooth noise at four scales, saved as JPEG. A few hundred are made for a set and
used again and again, each time as bytes of their own in the shards, with varied quality so that sizes vary too.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from pipeline.index_job import build_index
from pipeline.select_job import select_round

SHARDS = 20
IMAGES = 256  # distinct ones of a set
STORES = {"local": "store", "store": "store-s3"}
"""By place, a set's store over its shards there."""


@dataclass(frozen=True)
class Kind:
    """What the samples of a set are like: width and height in pixels, and JPEG quality from `low` to `high`."""

    width: int
    height: int
    low: int
    high: int


KINDS = {1: Kind(48, 40, 70, 88), 13: Kind(256, 256, 78, 91), 100: Kind(800, 600, 82, 91)}
"""By kilobytes of the JPEG, on average."""


@dataclass(frozen=True)
class DataSet:
    """A set of samples in the folder of all sets.

    Attributes:
        root: the folder that holds all sets, which the object server serves.
        kilobytes: the size of a sample's JPEG, on average.
        samples: how many there are.
    """

    root: Path
    kilobytes: int
    samples: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"set-{self.kilobytes}kb-{self.samples}"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.root / self.name

    @property
    def shards(self) -> list[Path]:
        """Its tar files."""
        return [self.folder / "shards" / f"data-{shard:04d}.tar" for shard in range(SHARDS)]

    def plan_path(self, place: str, fraction: str) -> Path:
        """Where the list of a round's samples lies; see `make_plan`."""
        return self.folder / "plans" / f"{place}-{fraction}.npz"


# ---- shards ----------------------------------------------------------------------------------------------------------


def photograph(kind: Kind, random: np.random.Generator) -> Image.Image:
    """Smooth random colours at four scales, the finest weakest."""
    total = np.zeros((kind.height, kind.width, 3), dtype=np.float32)
    for cells, weight in ((4, 1.0), (16, 0.5), (64, 0.25), (256, 0.1)):
        rows, columns = max(2, kind.height * cells // 256), max(2, kind.width * cells // 256)
        noise = Image.fromarray(random.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        total += weight * np.asarray(noise.resize((kind.width, kind.height), Image.Resampling.BICUBIC), np.float32)
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def jpegs(kind: Kind) -> list[bytes]:
    """`IMAGES` distinct photographs as JPEG."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(IMAGES):
        sink = io.BytesIO()
        photograph(kind, random).save(sink, "JPEG", quality=int(random.integers(kind.low, kind.high + 1)))
        made.append(sink.getvalue())
    return made


def make_shards(data: DataSet) -> None:
    """Write the tar shards, and where each sample's members lie in them."""
    images = jpegs(KINDS[data.kilobytes])
    order = np.random.default_rng(1).integers(0, IMAGES, data.samples).tolist()
    lies: list[tuple[int, ...]] = []
    data.shards[0].parent.mkdir(parents=True, exist_ok=True)
    for shard, path in enumerate(data.shards):
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(data.samples * shard // SHARDS, data.samples * (shard + 1) // SHARDS):
                offsets = []
                about = json.dumps({"id": number, "source": "benchmark"}).encode()
                members = {"jpg": images[order[number]], "cls": b"%d" % (number % 1000), "json": about}
                for name, content in members.items():
                    info = tarfile.TarInfo(f"{number:08d}.{name}")
                    info.size = len(content)
                    offsets += [tar.offset + tarfile.BLOCKSIZE, len(content)]
                    tar.addfile(info, io.BytesIO(content))
                lies.append((shard, *offsets))
    np.savez(data.folder / "members.npz", lies=np.array(lies, dtype=np.int64))


def make_store(data: DataSet, place: str) -> Store:
    """The store over the local shards, or over those that an object server serves as `s3://bucket`."""
    store = Store(data.folder / STORES[place])
    if not store.dataset_versions():
        served = f"s3://bucket/{data.name}/shards/"
        build_index(store, [served + path.name if place == "store" else str(path) for path in data.shards])
    return store


# ---- plans -----------------------------------------------------------------------------------------------------------


def make_plan(data: DataSet, place: str, fraction: str) -> None:
    """Publish the round that selects `fraction` at random, and list its samples in the order of epoch 1.

    The file holds, besides `round` and `check` (see `peers/protocol.py`), an integer array `spans` of one line for each
    selected sample: its number in the set, its shard, and where its bytes begin and how many they are, from the first
    member's first byte to the last member's last; then begin and end of each member in them.
    """
    path = data.plan_path(place, fraction)
    if path.exists():
        return
    rounds = {
        name: select_round(make_store(data, name), fraction=fraction, strategy="random:1").round.number
        for name in {place, "local"}
    }
    dataset = SelectedDataset(make_store(data, "local"), round=rounds["local"])  # the order is the same of both
    dataset.set_epoch(1)
    numbers = np.array([int(sample["__key__"]) for sample in dataset], dtype=np.int64)
    lies = np.load(data.folder / "members.npz")["lies"][numbers]
    starts = lies[:, 1]
    stops = lies[:, 5] + lies[:, 6]
    bounds = np.stack([lies[:, 1], lies[:, 1] + lies[:, 2], lies[:, 3], lies[:, 3] + lies[:, 4], lies[:, 5], stops], 1)
    spans = np.column_stack([numbers, lies[:, 0], starts, stops - starts, bounds - starts[:, None]])
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".unfinished.npz")
    np.savez(beside, spans=spans, round=rounds[place], check=_check(data, spans))
    os.replace(beside, path)


def _check(data: DataSet, spans: np.ndarray[Any, Any]) -> int:
    """The sum over the selected samples that every contender has to find; see `peers/protocol.py`."""
    total = 0
    for path, shard in zip(data.shards, itertools.count(), strict=False):
        with open(path, "rb") as file:
            for line in spans[spans[:, 1] == shard].tolist():
                content = os.pread(file.fileno(), line[3], line[2])
                total += sum(zlib.crc32(content[begin:end]) for begin, end in zip(line[4::2], line[5::2], strict=True))
    return total


# ---- sets ------------------------------------------------------------------------------------------------------------


def make_set(data: DataSet) -> None:
    """Make the shards, unless they are there."""
    done = data.folder / "made"
    if done.exists():
        return
    shutil.rmtree(data.folder, ignore_errors=True)
    make_shards(data)
    done.touch()


def into_page_cache(data: DataSet) -> int:
    """Read every file of a set once; returns how many bytes there are."""
    files = {path.stat().st_ino: path for path in data.folder.rglob("*") if path.is_file()}  # some are linked twice
    total = 0
    for path in files.values():
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                total += len(block)
    return total
