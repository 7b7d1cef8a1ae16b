"""Megatron-Energon: `WebdatasetFileStore["key.ext"]`, its random access by file name, for the selected keys.

Energon's loader takes no list of rows: `subset` is a range of rows ("Dataset Subsets"). What its documentation offers
for scattered ones, and what each gave for γ = 0.3 and 0.01 of 20,000 samples of 13 KB, in samples a second:

* auxiliary data ("Crude Datasets and Auxiliary Data"): a prepared dataset as a `FileStore` that reads files by name,
  byte ranges from its SQLite index: 6,000 and 3,900. This is what is timed: three reads a sample (jpg, cls, json), in
  storage order. Each opens the tar file anew; that is the store's own doing.
* the `exclude` list of `split.yaml` ("Data Preparation") with all samples that are not selected, streamed by
  `get_loader(get_val_dataset(…))`: 2,400 and 95, since the headers of all samples are read.
* a join of a dataset that holds the selected keys with the whole ("Joining Datasets", `nonmatch: skip`): less than the
  plain loader, since it reads from both, and a join index has to be prepared for each selection.

At γ = 1 the plain loader gave 4,400, the file store as much as at 0.3. With workers: torch's DataLoader over a
map-style dataset of the same reads, the store opened in each worker. It is not measured from the object server: the
file store reads one member at a time and opens the shard for each, three requests of 20 ms and more after one
another.

The dataset is the set's own tar files, linked into a folder and prepared by `energon prepare`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.energon import __version__
from megatron.energon.cache.file_store import WebdatasetFileStore
from megatron.energon.epathlib import EPath
from protocol import MEMBERS, Contender, Job, Plan, Rows, serve


class ByName(Contender):
    """Random access by key, in storage order."""

    version = __version__
    reads = "file store, by name, storage order"

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        self._rows = plan.in_storage_order
        self._store: WebdatasetFileStore | None = None
        if job.workers:
            self._loader = self.loader(Rows(self._read, self._rows))

    def _read(self, number: int) -> dict[str, bytes]:
        if self._store is None:
            self._store = WebdatasetFileStore(EPath(str(Path(self.job.folder) / "energon")))
        store = self._store
        return {name: store[f"{number:08d}.{name}"][0] for name in MEMBERS}

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._loader if self.job.workers else map(self._read, self._rows)


def prepare(folder: Path) -> None:
    """Link the shards and have energon index them."""
    own = folder / "energon"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    for shard in sorted((folder / "shards").glob("*.tar")):
        os.link(shard, own / shard.name)
    command = Path(sys.executable).with_name("energon")
    options = ["--non-interactive", "--no-progress", "--num-workers", "2", "--split-parts", "train:.*"]
    subprocess.run([command, "prepare", *options, "--sample-type", "CrudeWebdataset", own], check=True)


if __name__ == "__main__":
    serve(ByName, prepare)
