"""litdata: `StreamingDataset(…)[i]` over the selected indices, and `StreamingDataset.subset(indices)`.

`subset` ("Load a subset of the remote dataset", README) is the documented way to stream given rows. In 0.2.76 each
run of neighbouring rows becomes a visit to a chunk, which costs about a millisecond: a scattered subset streams at
under 1,000 samples a second. Random access ("accessing individual samples", README, `dataset[42]`) to the same rows
in storage order is the fastest documented way, a hundred times as fast, since a chunk stays mapped while its rows are
read. (In our order it is as slow as `subset`: only a few chunks stay mapped.) "litdata" is the random access,
"litdata-subset" the other.

Chunks have 64 MB, the default, and samples are dicts of jpg, cls and json as bytes; `shuffle=False`; the local chunks
are mapped in place ("POSIX-fast", automatic). With workers: torch's DataLoader over a map-style dataset of the same
accesses, and litdata's own `StreamingDataLoader` for `subset`.

From the object server random access asks for two byte ranges a sample, one after the other, and `subset` gave 200
samples a second. The fastest is to iterate the whole dataset, whose chunks are then downloaded ahead by several
requests at a time, and to keep what is selected; see `FromStore`. A run is one epoch with an empty cache.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"

import litdata
from litdata.streaming import downloader
from litdata.streaming.cache import Cache
from protocol import BATCH, Contender, Job, Plan, Rows, all_samples, serve
from torch.utils.data import IterableDataset


class Index(Contender):
    """Random access in storage order."""

    version = litdata.__version__
    reads = "dataset[i], storage order"

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        self._rows = plan.in_storage_order
        self._dataset = litdata.StreamingDataset(str(Path(job.folder) / "litdata"), shuffle=False)
        if job.workers:
            self._loader = self.loader(Rows(self._dataset.__getitem__, self._rows))

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._loader if self.job.workers else map(self._dataset.__getitem__, self._rows)


class Subset(Contender):
    """`subset(indices)`, iterated."""

    version = litdata.__version__
    reads = "subset, storage order"

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        whole = litdata.StreamingDataset(str(Path(job.folder) / "litdata"), shuffle=False)
        self._dataset = whole.subset(plan.in_storage_order)
        if job.workers:
            self._dataset = litdata.StreamingDataLoader(
                self._dataset,
                batch_size=BATCH,
                num_workers=job.workers,
                collate_fn=self.collate,
                persistent_workers=True,
            )

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._dataset


class FromStore(Contender):
    """The whole dataset from the object server, of which the selected samples are kept.

    litdata downloads through obstore, which refuses plain HTTP unless it is told otherwise, and litdata has no option
    to tell it; real stores speak HTTPS, so the benchmark does it for litdata.
    """

    version = litdata.__version__
    reads = "iterated whole, every chunk downloaded, empty cache"
    caches = True

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        self._numbers = frozenset(plan.numbers.tolist())
        self._cache = ""

    def reset(self) -> None:
        shutil.rmtree(self._cache, ignore_errors=True)
        self._cache = tempfile.mkdtemp(dir=self.job.scratch)
        whole = litdata.StreamingDataset(
            self.job.served("s3", "litdata"),
            cache_dir=self._cache,
            shuffle=False,
            storage_options={"endpoint_url": self.job.endpoint},
            max_pre_download=4,
        )
        kept = Kept(whole, self._numbers)
        self._source = self.loader(kept) if self.job.workers else kept

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._source


class Kept(IterableDataset[Any]):
    """The samples of a dataset whose number is one of the given ones."""

    def __init__(self, whole: Iterable[Any], numbers: frozenset[int]):
        self._whole = whole
        self._numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        numbers, loads = self._numbers, json.loads
        return (sample for sample in self._whole if loads(sample["json"])["id"] in numbers)


def prepare(folder: Path) -> None:
    """Write the set as chunks, through the cache that `litdata.optimize` writes with."""
    shutil.rmtree(folder / "litdata", ignore_errors=True)
    cache = Cache(str(folder / "litdata"), chunk_bytes="64MB")
    for number, sample in enumerate(all_samples(folder)):
        cache[number] = sample
    cache.done()
    cache.merge()


def make(job: Job, plan: Plan) -> Contender:
    """The contender for a job's place and name."""
    if job.place == "store":
        return FromStore(job, plan)
    return (Subset if job.contender == "litdata-subset" else Index)(job, plan)


if __name__ == "__main__":
    serve(make, prepare)
