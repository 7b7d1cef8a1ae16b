"""Store, Dataset and Round: what has been indexed and published, and how it gets published.

Readers see published rounds only, and open the files that a manifest names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.errors import NotIndexedError, RoundExistsError, RoundNotFoundError, StoreError, UsageError
from dynams_stream.selection import Selection


@dataclass(frozen=True)
class Part:
    """A fixed run of consecutive shards: the unit of work, commit and resume.

    Attributes:
        number: 0-based number of the part.
        first_shard: number of its first shard.
        shards: how many shards it holds.
        samples: how many samples they hold together.
        index_file: path of its member index, relative to the store.
    """

    number: int
    first_shard: int
    shards: int
    samples: int
    index_file: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """The shards of one dataset version, in order.

    Attributes:
        version: 1, 2, …
        digest: SHA-256 of the table's file, in hex.
        urls: URL of each shard.
        sizes: int64, bytes of each shard.
        fingerprints: what identified each shard's bytes when it was indexed.
        counts: int64, samples in each shard.
        parts: the parts, in order.
    """

    version: int
    digest: str
    urls: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    fingerprints: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    parts: tuple[Part, ...]

    @property
    def samples(self) -> int:
        """How many samples all shards hold."""
        return int(self.counts.sum())

    @cached_property
    def part_of_shard(self) -> npt.NDArray[np.int32]:
        """int32, for each shard the number of its part."""
        return np.repeat(np.arange(len(self.parts), dtype=np.int32), [part.shards for part in self.parts])


class Store:
    """A local folder or an object-store prefix that holds index, rounds and manifests.

    Args:
        url: folder or prefix, such as `runs/mnist` or `s3://bucket/run`. It need not exist yet.
        shards_at: where the shards lie on this machine when they have moved: a folder that holds them by base name.
            Copies are checked by size and header instead of modification time.

    A store is a handle: cheap to make, picklable, without open files.
    """

    def __init__(self, url: str | os.PathLike[str], *, shards_at: str | os.PathLike[str] | None = None):
        self.url = storage.absolute(url)
        self.shards_at = None if shards_at is None else storage.absolute(shards_at)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def path(self, relative: str) -> str:
        """The full path or URL of a file of this store."""
        return storage.join(self.url, relative)

    def shard_url(self, url: str) -> str:
        """Where to read the shard that was indexed as `url`."""
        return url if self.shards_at is None else storage.join(self.shards_at, url.rsplit("/", 1)[-1])

    # ---- dataset -----------------------------------------------------------------------------------------------------

    def dataset_versions(self) -> list[int]:
        """Numbers of the indexed dataset versions, ascending."""
        names = storage.list_names(self.path(schema.DATASET_FOLDER))
        return sorted(int(name[: -len(".parquet")]) for name in names if _is_numbered_table(name))

    def dataset(self, version: int | None = None) -> Dataset:
        """One dataset version, the newest by default.

        Raises:
            NotIndexedError: when the store holds none, or not that one.
        """
        versions = self.dataset_versions()
        if not versions:
            raise NotIndexedError(
                f"{self.url} holds no index; run: dynams index 'shards-{{000000..000099}}.tar' --store {self.url}"
            )
        number = versions[-1] if version is None else version
        if number not in versions:
            raise NotIndexedError(f"{self.url} holds no dataset version {number}; it holds {versions}")
        return _read_dataset(self.path(schema.dataset_path(number)), number)

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def round_numbers(self) -> list[int]:
        """Numbers of all rounds that were begun, published or not, ascending."""
        return sorted(int(name) for name in storage.list_names(self.path(schema.ROUNDS_FOLDER)) if name.isdigit())

    def is_published(self, number: int) -> bool:
        """Whether round `number` has its manifest."""
        return storage.exists(self.path(schema.manifest_path(number)))

    def rounds(self) -> list[Round]:
        """All published rounds, oldest first."""
        return [self._read_round(number) for number in self.round_numbers() if self.is_published(number)]

    def round(self, which: int | str = "latest") -> Round:
        """One published round: its number, or "latest".

        Raises:
            RoundNotFoundError: when it is not published.
        """
        numbers = self.round_numbers()
        if which == "latest":
            for number in reversed(numbers):
                if self.is_published(number):
                    return self._read_round(number)
            raise RoundNotFoundError(f"{self.url} holds no published round yet; run: dynams score, then dynams select")
        number = round_number(which)
        if number not in numbers or not self.is_published(number):
            raise RoundNotFoundError(f"{self.url} holds no published round {number}; `dynams status` lists them")
        return self._read_round(number)

    def _read_round(self, number: int) -> Round:
        text = storage.read_bytes(self.path(schema.manifest_path(number)))
        return Round(store=self, number=number, manifest=json.loads(text))

    def publish(self, number: int, manifest: Mapping[str, Any]) -> Round:
        """Publish round `number`: create its `round.json`, after all its other files are written.

        Raises:
            RoundExistsError: when another job published this round first; its round stays as it is.
        """
        for folder in (schema.scores_folder(number), schema.round_path(number)):
            storage.remove_leftovers(self.path(folder))
        text = json.dumps(manifest, indent=2, sort_keys=False, allow_nan=False) + "\n"
        try:
            storage.create(self.path(schema.manifest_path(number)), text.encode())
        except FileExistsError as error:
            raise RoundExistsError(
                f"{self.url}: round {number} was published by another job; look at it with `dynams status` "
                f"and run this one again for a new round"
            ) from error
        return self._read_round(number)


@dataclass(frozen=True, eq=False)
class Round:
    """A published round: a selection and the score tables it was cut from. It never changes.

    Attributes:
        store: where it lies.
        number: 1, 2, …
        manifest: what `round.json` records.
    """

    store: Store
    number: int
    manifest: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Round({self.number} of {self.store.url!r})"

    @property
    def fraction(self) -> float:
        """The fraction that was asked for."""
        return float(self.manifest["fraction"])

    @property
    def epoch(self) -> int | None:
        """The epoch of the checkpoint that was scored, where known."""
        return self.manifest["epoch"]  # type: ignore[no-any-return]

    @property
    def counts(self) -> Mapping[str, int]:
        """all, scored, failed, selected: numbers of samples."""
        return self.manifest["counts"]  # type: ignore[no-any-return]

    def dataset(self) -> Dataset:
        """The dataset version that this round was made from.

        Raises:
            StoreError: when the store's table of that version is not the one the round was made from.
        """
        recorded = self.manifest["dataset"]
        dataset = self.store.dataset(recorded["version"])
        if dataset.digest != recorded["digest"]:
            raise StoreError(
                f"{self.store.url}: round {self.number} was made from another dataset version {recorded['version']} "
                f"(digest {recorded['digest'][:12]}, the store's is {dataset.digest[:12]}); restore that file"
            )
        return dataset

    def selection(self) -> Selection:
        """The rows to train on, checked against the digest in the manifest."""
        selection = Selection.read(self.store.path(schema.selection_path(self.number)))
        expected = self.manifest["selection"]["sha256"]
        if selection.digest != expected:
            raise StoreError(
                f"{self.store.url}: round {self.number}'s selection.parquet is not the file that was published "
                f"(SHA-256 {selection.digest[:12]}, recorded {expected[:12]}); restore it, or select again"
            )
        return selection

    def scores(self) -> pyarrow.dataset.Dataset:
        """The score tables as a `pyarrow.dataset.Dataset`, one line per sample, sorted by (shard, row).

        Raises:
            StoreError: when the round was cut without scores (a random selection).
        """
        scored = self.manifest["scores_of"] if self.manifest["scores_of"] is not None else self.number
        parts = self.manifest["score_parts"]
        if not parts:
            raise StoreError(
                f"{self.store.url}: round {self.number} has no score tables (strategy "
                f"{self.manifest['strategy']!r} needs none)"
            )
        paths = [self.store.path(schema.scores_path(scored, part)) for part in parts]
        if storage.is_local(self.store.url):
            return pyarrow.dataset.dataset(paths, schema=schema.SCORES_SCHEMA, format="parquet")
        system = storage.file_system(self.store.url)
        return pyarrow.dataset.dataset(paths, schema=schema.SCORES_SCHEMA, format="parquet", filesystem=system)


def round_number(which: int | str) -> int:
    """The number that a user's `3`, `"3"` or `"000003"` means."""
    if isinstance(which, bool) or not str(which).isdigit() or int(which) < 1:
        raise UsageError(f'a round is a number from 1 on, or "latest"; got {which!r}')
    return int(which)


def _is_numbered_table(name: str) -> bool:
    return name.endswith(".parquet") and name[: -len(".parquet")].isdigit()


def _read_dataset(url: str, version: int) -> Dataset:
    data = storage.read_bytes(url)
    table = pq.read_table(pa.BufferReader(data))
    schema.require_format(table.schema.metadata, url)
    parts = table["part"].to_numpy()
    counts = table["samples"].to_numpy()
    first, shards = np.unique(parts, return_index=True)[1], np.bincount(parts)
    index_files = table["index_file"].to_pylist()
    return Dataset(
        version=version,
        digest=hashlib.sha256(data).hexdigest(),
        urls=tuple(table["url"].to_pylist()),
        sizes=table["bytes"].to_numpy(),
        fingerprints=tuple(table["fingerprint"].to_pylist()),
        counts=counts,
        parts=tuple(
            Part(number, int(start), int(length), int(counts[start : start + length].sum()), index_files[start])
            for number, (start, length) in enumerate(zip(first, shards, strict=True))
        ),
    )
