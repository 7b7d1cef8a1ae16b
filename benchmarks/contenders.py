"""This project's loader, and the bare loops that bound it, as contenders of `streaming.py`.

ours         `for sample in dataset` with one `SelectedDataset(store, round=n)` over many epochs, `set_epoch`
             included; with workers torch's DataLoader over it, `batch_size` told to both
ours-first   the same, but each epoch with a dataset made anew, the making included; also the milliseconds until its
             first `BATCH` samples were there
ours-saving  from the object server with fewer requests, as `SAVING` says
pread        the floor: the selected samples' byte ranges from a list made beforehand, in the order in which ours reads
             them; files open; one `os.pread` a sample and nothing else
memory       the ceiling of decoding: the same images decoded from bytes in memory, at most `MOST_IN_MEMORY` of them
obstore      the floor from the object server: `obstore.get_range` for each sample in 64 threads, no order, nothing kept
server       how many requests for the same ranges the server answers to 256 connections of a small client, and how busy
             that kept it: a lower bound of its own ceiling
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers.protocol import BATCH, Contender, Job, Plan, Rows, serve

from dynams_stream.remote_options import RemoteOptions
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from dynams_stream.version import library_version

SAVING: dict[str, Any] = {"lanes": 256, "window": 8, "remote": RemoteOptions(gap=128 << 10)}
"""Neighbours up to 128 KB apart are asked for together, and a chunk of what is read ahead holds the whole pool of 2,048
samples, so that all have their neighbours: a batch is mixed from 256 places of the dataset instead of 960. (`window=4`
with 256 MB of read-ahead saves as much with 960.)"""
STORES = {"local": "store", "store": "store-s3"}  # as in `streaming_data.py`, whose imports take seconds
MOST_IN_MEMORY = 20_000
THREADS = 64
CONNECTIONS = 256


class Ours(Contender):
    """One dataset, epoch after epoch."""

    version = library_version()

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        self._dataset = self._open()
        self._loader = self.loader(self._dataset) if job.workers else None

    def _open(self) -> SelectedDataset:
        job = self.job
        return SelectedDataset(
            Store(Path(job.folder) / STORES[job.place]),
            round=self.plan.round,
            batch_size=BATCH if job.workers else None,
            **(SAVING if job.contender == "ours-saving" else {}),
        )

    def stream(self, epoch: int) -> Iterable[Any]:
        self._dataset.set_epoch(epoch)
        return self._dataset if self._loader is None else self._loader

    def costs(self) -> dict[str, Any]:
        """Requests a sample, and the bytes that were read beyond those of its members, tar headers included."""
        stats = self._dataset.stats()
        return {
            "requests_per_sample": round(stats.requests / max(1, stats.samples), 4),
            "over_read": round(stats.bytes_read / max(1, stats.bytes_used) - 1, 4),
            "retries": stats.retries,
        }


class OursFirst(Ours):
    """A dataset made anew for each epoch."""

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        self._first: list[float] = []

    def reset(self) -> None:
        self._first = []

    def once(self, epoch: int, deadline: float) -> int:
        began = time.perf_counter()
        items = iter(self._open())
        count = sum(1 for _ in itertools.islice(items, BATCH))
        self._first.append(time.perf_counter() - began)
        return count + self._samples(items, deadline)

    def facts(self) -> dict[str, Any]:
        return {"first_batch_ms": round(1000 * statistics.median(self._first), 3)}


class Pread(Contender):
    """The bare loop."""

    reads = "os.pread, our order"

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        files = [os.open(path, os.O_RDONLY) for path in job.shards]
        self._reads = [(files[shard], size, offset) for shard, offset, size in plan.spans.tolist()]
        self._loader = self.loader(Rows(self._read, range(len(plan)))) if job.workers else None

    def _read(self, number: int) -> bytes:
        return os.pread(*self._reads[number])

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._loader or map(self._read, range(len(self.plan)))

    def once(self, epoch: int, deadline: float) -> int:
        if self.job.workers:
            return super().once(epoch, deadline)
        read = os.pread
        for file, size, offset in self._reads:
            read(file, size, offset)
        return len(self._reads)


class Memory(Contender):
    """The images' bytes in a list."""

    reads = "decoded from memory"

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        files = [os.open(path, os.O_RDONLY) for path in job.shards]
        places = zip(plan.spans[:MOST_IN_MEMORY].tolist(), plan.bounds[:MOST_IN_MEMORY].tolist(), strict=True)
        self._images_there = [
            os.pread(files[shard], stop - start, offset + start) for (shard, offset, _), (start, stop, *_) in places
        ]
        rows = range(len(self._images_there))
        self._loader = self.loader(Rows(self._images_there.__getitem__, rows)) if job.workers else None

    def jpg(self, sample: Any) -> bytes:
        content: bytes = sample
        return content

    def stream(self, epoch: int) -> Iterable[Any]:
        return self._loader or self._images_there


# ---- the object server -----------------------------------------------------------------------------------------------


class Obstore(Contender):
    """Range requests in threads."""

    reads = f"get_range in {THREADS} threads"

    def __init__(self, job: Job, plan: Plan):
        import obstore
        from obstore.store import S3Store

        super().__init__(job, plan)
        self.version = obstore.__version__
        self._get = obstore.get_range
        options: Any = {"allow_http": True, "pool_max_idle_per_host": str(THREADS)}
        self._store = S3Store("bucket", endpoint=job.endpoint, client_options=options)
        self._ranges = _ranges(job, plan)
        self._threads = ThreadPoolExecutor(THREADS)

    def once(self, epoch: int, deadline: float) -> int:
        ranges = iter(self._ranges)
        return sum(self._threads.map(lambda _: self._some(ranges, deadline), range(THREADS)))

    def _some(self, ranges: Iterator[tuple[str, int, int]], deadline: float) -> int:
        count = 0
        for path, start, size in ranges:
            self._get(self._store, path, start=start, length=size)
            count += 1
            if time.perf_counter() >= deadline:
                break
        return count


class Server(Contender):
    """As many requests as the server answers."""

    reads = f"{CONNECTIONS} connections"

    def __init__(self, job: Job, plan: Plan):
        super().__init__(job, plan)
        head = "GET /bucket/{} HTTP/1.1\r\nHost: here\r\nRange: bytes={}-{}\r\n\r\n"
        ranges = _ranges(job, plan)
        self._requests = [head.format(path, start, start + size - 1).encode() for path, start, size in ranges]
        self._busy = self._began = 0.0

    def reset(self) -> None:
        self._busy, self._began = _processor_seconds(self.job.server), time.perf_counter()

    def once(self, epoch: int, deadline: float) -> int:
        return asyncio.run(self._ask(deadline))

    async def _ask(self, deadline: float) -> int:
        loop = asyncio.get_running_loop()
        port = int(self.job.endpoint.rpartition(":")[2])
        requests = iter(self._requests)
        asking = [_Asking(requests, deadline, loop.create_future()) for _ in range(CONNECTIONS)]
        for each in asking:
            await loop.create_connection(lambda each=each: each, "127.0.0.1", port)  # type: ignore[misc]
        await asyncio.gather(*(each.done for each in asking))
        return sum(each.answers for each in asking)

    def facts(self) -> dict[str, Any]:
        busy = _processor_seconds(self.job.server) - self._busy
        return {"server_busy": round(busy / (time.perf_counter() - self._began), 3)}


class _Asking(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, requests: Iterator[bytes], deadline: float, done: asyncio.Future[None]):
        self._requests = requests
        self._deadline = deadline
        self.done = done
        self.answers = 0
        self._left = 0  # bytes of the answer's body that have not come yet

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._next()

    def _next(self) -> None:
        request = next(self._requests, None) if time.perf_counter() < self._deadline else None
        if request is not None:
            self._transport.write(request)
        else:
            self._transport.close()
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        if not self._left:  # the server writes the head of an answer at once
            head, _, body = data.partition(b"\r\n\r\n")
            self._left = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]) - len(body)
        else:
            self._left -= len(data)
        if not self._left:
            self.answers += 1
            self._next()


def _ranges(job: Job, plan: Plan) -> list[tuple[str, int, int]]:
    """Path below the bucket, first byte and size of each selected sample, in our order."""
    paths = [f"{Path(job.folder).name}/shards/{os.path.basename(path)}" for path in job.shards]
    return [(paths[shard], offset, size) for shard, offset, size in plan.spans.tolist()]


def _processor_seconds(process: int) -> float:
    """How long a process has kept processors busy."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


CONTENDERS = {
    "ours": Ours,
    "ours-first": OursFirst,
    "ours-saving": Ours,
    "pread": Pread,
    "memory": Memory,
    "obstore": Obstore,
    "server": Server,
}


if __name__ == "__main__":
    serve(lambda job, plan: CONTENDERS[job.contender](job, plan))
