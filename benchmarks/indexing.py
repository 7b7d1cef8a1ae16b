"""Indexing a local shard against Python's tarfile, webdataset's reader and the bare reads of its headers.

    python benchmarks/indexing.py [--samples 5000] [--runs 5]

Shards of samples of three members (jpg, cls, json), about 1, 13 and 100 KB each, in the page cache, one process. The
contenders take turns; the table shows medians, ratios are taken within a turn.

* ours: `dynams_stream.index.index_shard`, which `dynams index` calls for each shard: members found and checked, grouped
  into samples, columns made, the fingerprint read.
* tarfile: `tarfile.open(path, "r:").getmembers()`, the members alone, not grouped.
* webdataset: iterating `webdataset.WebDataset(path)`, which reads all bytes.
* headers: one `os.pread` of 512 bytes for each header, at places known beforehand: the floor of every way that asks for
  one header after the other.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset as wds

from dynams_stream.index import index_shard

KILOBYTES = (1, 13, 100)


def make_shard(path: Path, samples: int, kilobytes: int) -> None:
    """A shard of samples of three members."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for row in range(samples):
            image = random.bytes(int(kilobytes * 1000 * random.uniform(0.7, 1.1)))
            for name, data in (("jpg", image), ("cls", b"%d" % (row % 1000)), ("json", b'{"id": %d}' % row)):
                member = tarfile.TarInfo(f"{row:08d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def contenders(path: str) -> dict[str, Callable[[], int]]:
    """Each goes through the shard once, and gives how many members it found."""
    with tarfile.open(path, "r:") as tar:
        headers = [member.offset for member in tar.getmembers()]

    def ours() -> int:
        return len(index_shard(path).index.offsets)

    def with_tarfile() -> int:
        with tarfile.open(path, "r:") as tar:
            return len(tar.getmembers())

    def webdataset() -> int:
        return 3 * sum(1 for _ in wds.WebDataset(path, shardshuffle=False))

    def bare() -> int:
        pread, descriptor = os.pread, os.open(path, os.O_RDONLY)
        try:
            return sum(len(pread(descriptor, 512, offset)) == 512 for offset in headers)
        finally:
            os.close(descriptor)

    return {"ours": ours, "tarfile": with_tarfile, "webdataset": webdataset, "headers": bare}


def timed(work: Callable[[], int], members: int) -> float:
    """Members a second."""
    began = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    if found != members:
        raise AssertionError(f"{work.__name__} found {found} of {members} members")
    return members / seconds


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Indexing side by side; see the module's docstring.")
    parser.add_argument("--samples", type=int, default=5000, help="of each shard")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print("| sample | ours, members/s | tarfile | webdataset | bare headers | of tarfile | of bare headers |")
    print("|---|---|---|---|---|---|---|")
    for kilobytes in KILOBYTES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.tar"
            make_shard(path, options.samples, kilobytes)
            works = contenders(str(path))
            rates: dict[str, list[float]] = {name: [] for name in works}
            for run in range(options.runs + 1):
                for name, work in works.items():
                    rate = timed(work, 3 * options.samples)
                    if run:  # the first turn warms the page cache
                        rates[name].append(rate)
        medians = [f"{statistics.median(found):,.0f}" for found in rates.values()]
        ratios = [
            statistics.median(a / b for a, b in zip(rates["ours"], rates[other], strict=True))
            for other in ("tarfile", "headers")
        ]
        print(f"| {kilobytes} KB | {' | '.join(medians)} | {ratios[0]:.1f} × | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
