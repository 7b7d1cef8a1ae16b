"""Selection: for each shard the rows to train on, all in memory or read by the shard when they are needed."""

from __future__ import annotations

import decimal
import hashlib
import math
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from dynams_stream import selection_file
from dynams_stream.errors import UsageError

Integers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint32]
Weights = npt.NDArray[np.float32]

_HELD_BYTES: Final = 32 << 20  # rows of a selection read by the shard that are kept, at least those in use


def _exact(fraction: float | str | Decimal) -> Fraction:
    """The decimal as written, exactly: 0.07 is 7/100, not the float next to it.

    Raises:
        UsageError: unless it is a number in [0, 1], with no more digits than a float carries, which records it.
    """
    try:
        written = Decimal(str(fraction).strip())
    except decimal.InvalidOperation:
        written = Decimal("NaN")
    if not (written.is_finite() and 0 <= written <= 1):
        raise UsageError(f"a fraction is a number from 0 to 1; got {fraction!r}")
    carried = repr(float(written))
    if Decimal(carried) != written:
        raise UsageError(f"a fraction has no more digits than a float carries; got {fraction}, write {carried}")
    return Fraction(written)


def recorded_fraction(fraction: float | str | Decimal) -> float:
    """The fraction as `round.json` has it: the same for 0.07, "0.070" and a float32 that prints as 0.07.

    Raises:
        UsageError: unless the fraction is a number in [0, 1].
    """
    return float(_exact(fraction))


def selected_count(fraction: float | str | Decimal, samples: int) -> int:
    """⌈fraction · samples⌉, with the fraction as the decimal it is written as: 0.07 of 100 is 7.

    Raises:
        UsageError: unless the fraction is a number in [0, 1], with no more digits than a float carries.
    """
    return math.ceil(_exact(fraction) * samples)


class _Source(Protocol):
    """Where the rows come from."""

    def rows(self, shard: int) -> Rows: ...
    def weights(self, shard: int) -> Weights | None: ...
    def rows_at(self, shards: Integers, places: Integers) -> Integers: ...
    def weights_at(self, shards: Integers, places: Integers) -> Weights | None: ...


class Selection:
    """For each shard the sorted rows to train on, and optional weights.

    Made by `everything`, `read` (all in memory, 4 bytes a row) or `open` (read by the shard, in bounded memory).

    Attributes:
        counts: int64, shape (shards,): selected rows of each shard.
        digest: SHA-256 of `selection.parquet` in hex; of `everything`, a digest of the dataset's digest.
    """

    def __init__(self, counts: Integers, digest: str, source: _Source):
        self.counts = counts
        self.digest = digest
        self._source = source

    @property
    def total(self) -> int:
        """How many samples are selected."""
        return int(self.counts.sum())

    def rows(self, shard: int) -> Rows:
        """The selected rows of `shard`, uint32, ascending."""
        return self._source.rows(shard)

    def weights(self, shard: int) -> Weights | None:
        """The weights of `rows(shard)`, float32; None when the selection has none."""
        return self._source.weights(shard)

    def rows_at(self, shards: Integers, places: Integers) -> Integers:
        """`rows(shard)[place]` of each pair, int64.

        Args:
            shards, places: int64, shape (n,).
        """
        return self._source.rows_at(shards, places)

    def weights_at(self, shards: Integers, places: Integers) -> Weights | None:
        """`weights(shard)[place]` of each pair, float32; None when the selection has none."""
        return self._source.weights_at(shards, places)

    @classmethod
    def everything(cls, counts: Integers, dataset_digest: str) -> Selection:
        """All rows of all shards, made on demand.

        Args:
            counts: int64, shape (shards,): samples in each shard.
            dataset_digest: the digest of the dataset that `counts` is from.
        """
        counts = np.asarray(counts, dtype=np.int64)
        digest = hashlib.sha256(f"everything of {dataset_digest}".encode()).hexdigest()
        return cls(counts, digest, _Everything(counts))

    @classmethod
    def read(cls, url: str) -> Selection:
        """Read a whole `selection.parquet` into memory.

        Raises:
            StoreError: when it is missing, of another format, or not a line for every shard with ascending rows.
        """
        digest, counts, rows, weights = selection_file.read_whole(url)
        return cls(counts, digest, _InMemory(counts, rows, weights))

    @classmethod
    def open(cls, url: str, digest: str, counts: Integers | None = None, footer_digest: str | None = None) -> Selection:
        """Open a `selection.parquet` whose rows are read by the shard, when they are needed.

        Args:
            url: the file.
            digest: its SHA-256 in hex, as the manifest has it.
            counts: int64, selected rows of each shard, as the manifest has them; read from the file when None.
            footer_digest: SHA-256 of its footer in hex, which is checked; without it the whole file is.

        Raises:
            StoreError: when it is missing, of another format, or not the file that was published.
        """
        selection_file.require_digest(url, digest, footer_digest)
        if counts is None:
            counts = selection_file.read_counts(url)
        return cls(counts, digest, _ByShard(url, counts))


class _Everything:
    """Every row of every shard."""

    def __init__(self, counts: Integers):
        self._counts = counts

    def rows(self, shard: int) -> Rows:
        return np.arange(self._counts[shard], dtype=np.uint32)

    def weights(self, shard: int) -> Weights | None:
        return None

    def rows_at(self, shards: Integers, places: Integers) -> Integers:
        return places

    def weights_at(self, shards: Integers, places: Integers) -> Weights | None:
        return None


class _InMemory:
    """All rows in one array."""

    def __init__(self, counts: Integers, rows: Rows, weights: Weights | None):
        self._rows = rows
        self._weights = weights
        self._offsets: Integers = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

    def rows(self, shard: int) -> Rows:
        return self._rows[self._offsets[shard] : self._offsets[shard + 1]]

    def weights(self, shard: int) -> Weights | None:
        return None if self._weights is None else self._weights[self._offsets[shard] : self._offsets[shard + 1]]

    def rows_at(self, shards: Integers, places: Integers) -> Integers:
        rows: Integers = self._rows[self._offsets[shards] + places].astype(np.int64)
        return rows

    def weights_at(self, shards: Integers, places: Integers) -> Weights | None:
        return None if self._weights is None else self._weights[self._offsets[shards] + places]


class _ByShard:
    """Rows that are read when a shard is first needed, and kept while others are needed more seldom."""

    def __init__(self, url: str, counts: Integers):
        self._reader = selection_file.ShardRowsReader(url, counts)
        self._shards: OrderedDict[int, tuple[Rows, Weights | None]] = OrderedDict()
        self._held = 0

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_shards": OrderedDict(), "_held": 0}

    def rows(self, shard: int) -> Rows:
        return self._load([shard])[0][0]

    def weights(self, shard: int) -> Weights | None:
        return self._load([shard])[0][1]

    def rows_at(self, shards: Integers, places: Integers) -> Integers:
        distinct, number = np.unique(shards, return_inverse=True)
        lists = [rows for rows, _ in self._load(distinct.tolist())]
        starts = np.cumsum([0, *map(len, lists[:-1])])
        return np.concatenate(lists)[starts[number] + places].astype(np.int64)

    def weights_at(self, shards: Integers, places: Integers) -> Weights | None:
        distinct, number = np.unique(shards, return_inverse=True)
        found = [weights for _, weights in self._load(distinct.tolist())]
        lists = [weights for weights in found if weights is not None]
        if len(lists) < len(found):
            return None
        starts = np.cumsum([0, *map(len, lists[:-1])])
        weights: Weights = np.concatenate(lists)[starts[number] + places]
        return weights

    def _load(self, shards: list[int]) -> list[tuple[Rows, Weights | None]]:
        wanted = set(shards)
        for shard in shards:
            if shard in self._shards:
                self._shards.move_to_end(shard)
        found = []
        for shard in shards:
            known = self._shards.get(shard)
            if known is None:
                self._shards[shard] = known = self._reader.read(shard)
                self._held += sum(each.nbytes for each in known if each is not None)
                while self._held > _HELD_BYTES and next(iter(self._shards)) not in wanted:
                    dropped = self._shards.popitem(last=False)[1]
                    self._held -= sum(each.nbytes for each in dropped if each is not None)
            found.append(known)
        return found
