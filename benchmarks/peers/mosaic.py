"""mosaicml-streaming: `StreamingDataset[i]` over the selected indices.

The package has no documented way to stream given rows: `Stream(proportion=…, choose=…)` picks rows of its own. What
its documentation offers for any row is random access ("Random access", README: `dataset[i]`), and that is what is
timed, in our order, over MDS shards of 64 MB with the columns jpg, cls, json as `bytes`. Storage order is no faster,
since each access opens the shard file and reads one sample; slower are lists of indices (`dataset[[…]]`),
`torch.utils.data.Subset`, and iterating the whole dataset (8,000 samples a second) to keep what is selected.

With workers: torch's DataLoader over a map-style dataset of the same accesses.

From the object server: `StreamingDataset(remote="s3://…", local=<empty folder>)`, the same accesses in storage order,
so that each shard is downloaded once, when its first sample is asked for: whole shards, as the package has no byte
ranges. A run is one epoch with an empty cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import streaming
from protocol import MEMBERS, Contender, Job, Plan, Rows, all_samples, serve
from streaming import MDSWriter, StreamingDataset

SHARD_BYTES = 1 << 26


class Mosaic(Contender):
    """Random access to MDS shards, local ones."""

    version = streaming.__version__
    reads = "dataset[i], our order"

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        self._rows = plan.numbers.tolist()
        self._open(local=str(Path(job.folder) / "mosaic"))

    def _open(self, **where: str) -> None:
        self._dataset = StreamingDataset(shuffle=False, batch_size=1, **where)
        if self.job.workers:
            self._loader = self.loader(Rows(self._dataset.__getitem__, self._rows))

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._loader if self.job.workers else map(self._dataset.__getitem__, self._rows)


class FromStore(Mosaic):
    """The same with an empty local folder before each run."""

    reads = "dataset[i], storage order, every shard downloaded whole, empty cache"
    caches = True

    def __init__(self, job: Job, plan: Plan):
        os.environ["S3_ENDPOINT_URL"] = job.endpoint
        Contender.__init__(self, job, plan)
        self._rows = plan.in_storage_order
        self._cache = ""

    def reset(self) -> None:
        streaming.base.util.clean_stale_shared_memory()
        shutil.rmtree(self._cache, ignore_errors=True)
        self._cache = tempfile.mkdtemp(dir=self.job.scratch)
        self._open(remote=self.job.served("s3", "mosaic"), local=self._cache)


def prepare(folder: Path) -> None:
    """Write the set as MDS shards."""
    shutil.rmtree(folder / "mosaic", ignore_errors=True)
    columns = dict.fromkeys(MEMBERS, "bytes")
    with MDSWriter(out=str(folder / "mosaic"), columns=columns, size_limit=SHARD_BYTES) as writer:
        for sample in all_samples(folder):
            writer.write(sample)


def make(job: Job, plan: Plan) -> Contender:
    """The contender for a job's place."""
    return (FromStore if job.place == "store" else Mosaic)(job, plan)


if __name__ == "__main__":
    serve(make, prepare)
