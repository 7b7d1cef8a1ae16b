"""webdataset: `WebDataset(shards, shardshuffle=False).select(…)`, its documented way to stream a part of a dataset.

Timed: iterating the pipeline, once an epoch. Every shard is read from its first byte to its last, and `select` keeps
the samples whose `__key__` is in a set; webdataset has no index, so there is no way to read less. Shards are not
shuffled, which is the cheaper order. With workers, whole shards are split over them (`split_by_worker`, the default),
`.batched` makes the batches in the workers, and `WebLoader(…, batch_size=None)` passes them on, as its README
advises.

From the object server whole shards are read too, over HTTP in the way that webdataset has built in: a `curl` process
for each shard (`webdataset.gopen`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import webdataset as wds
from protocol import BATCH, Contender, Job, Plan, serve


class Select(Contender):
    """Reads everything, and keeps what is selected."""

    version = wds.__version__

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        self.reads = "select, every shard read whole"
        self._keys = {f"{number:08d}" for number in plan.numbers.tolist()}
        urls = job.shards
        if job.place == "store":
            urls = [job.served("http", f"shards/{os.path.basename(path)}") for path in urls]
        pipeline = wds.WebDataset(urls, shardshuffle=False, empty_check=False).select(self._selected)
        if job.workers:
            pipeline = pipeline.batched(BATCH, collation_fn=self.collate)
            pipeline = wds.WebLoader(
                pipeline, batch_size=None, num_workers=job.workers, persistent_workers=True, shuffle=False
            )
        self._pipeline = pipeline

    def _selected(self, sample: dict[str, Any]) -> bool:
        return sample["__key__"] in self._keys

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._pipeline  # type: ignore[no-any-return]


if __name__ == "__main__":
    serve(Select)
