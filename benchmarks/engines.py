"""Which client asks an object store for ranges: obstore, s3fs, fsspec's HTTP, urllib3, with 20 ms added to each answer.

    python benchmarks/engines.py [--requests 4000] [--runs 3] [--delay 0.02]

Each gets the same random ranges of 13 KB of one object from `tests/object_server.py`, which runs in a process of its
own on this machine, 64 and 128 at a time, in a process of its own, in turns; the table shows medians. CPU is the client
process's, per request. "obstore, threads" is what `dynams_stream.transport` does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SERVER = Path(__file__).resolve().parents[1] / "tests" / "object_server.py"
OBJECT_BYTES, RANGE_BYTES = 256 << 20, 13_000
AT_ONCE = (64, 128)
Ranges = list[tuple[int, int]]


def with_obstore(endpoint: str, ranges: Ranges, at_once: int) -> int:
    """Its synchronous call in threads, as the loader uses it."""
    import obstore
    from obstore.store import S3Store

    store = S3Store("bucket", endpoint=endpoint, client_options={"allow_http": True}, retry_config={"max_retries": 0})
    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(lambda span: len(obstore.get(store, "object", options={"range": span}).bytes()), ranges))


def with_obstore_asyncio(endpoint: str, ranges: Ranges, at_once: int) -> int:
    """Its coroutines in one event loop."""
    import obstore
    from obstore.store import S3Store

    store = S3Store("bucket", endpoint=endpoint, client_options={"allow_http": True}, retry_config={"max_retries": 0})

    async def everything() -> int:
        places = asyncio.Semaphore(at_once)

        async def one(start: int, stop: int) -> int:
            async with places:
                return len(await obstore.get_range_async(store, "object", start=start, end=stop))

        return sum(await asyncio.gather(*(one(*span) for span in ranges)))

    return asyncio.run(everything())


def with_s3fs(endpoint: str, ranges: Ranges, at_once: int) -> int:
    """`cat_ranges`, fsspec's documented way to get many ranges."""
    import s3fs

    system = s3fs.S3FileSystem(config_kwargs={"max_pool_connections": at_once})
    return _cat_ranges(system, "bucket/object", ranges, at_once)


def with_fsspec_http(endpoint: str, ranges: Ranges, at_once: int) -> int:
    """`cat_ranges` over plain HTTP."""
    import fsspec

    return _cat_ranges(fsspec.filesystem("http"), f"{endpoint}/bucket/object", ranges, at_once)


def _cat_ranges(system: object, path: str, ranges: Ranges, at_once: int) -> int:
    starts, stops = zip(*ranges, strict=True)
    paths = [path] * len(ranges)
    found = system.cat_ranges(paths, list(starts), list(stops), on_error="raise", batch_size=at_once)  # type: ignore[attr-defined]
    return sum(map(len, found))


def with_urllib3(endpoint: str, ranges: Ranges, at_once: int) -> int:
    """A pool of connections in threads, unsigned."""
    import urllib3

    pool = urllib3.PoolManager(maxsize=at_once)

    def one(span: tuple[int, int]) -> int:
        headers = {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        return len(pool.request("GET", f"{endpoint}/bucket/object", headers=headers).data)

    with ThreadPoolExecutor(at_once) as threads:
        return sum(threads.map(one, ranges))


ENGINES: dict[str, Callable[[str, Ranges, int], int]] = {
    "obstore, threads": with_obstore,
    "obstore, asyncio": with_obstore_asyncio,
    "s3fs": with_s3fs,
    "fsspec http": with_fsspec_http,
    "urllib3, threads": with_urllib3,
}


def measure(engine: str, endpoint: str, requests: int, at_once: int) -> None:
    """Print one measurement as JSON; connections are open before the clock runs."""
    draw = random.Random(0)
    ranges = [
        (start, start + RANGE_BYTES)
        for start in (draw.randrange(OBJECT_BYTES - RANGE_BYTES) for _ in range(requests + at_once))
    ]
    get = ENGINES[engine]
    get(endpoint, ranges[:at_once], at_once)
    began, cpu = time.perf_counter(), time.process_time()
    received = get(endpoint, ranges[at_once:], at_once)
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    assert received == requests * RANGE_BYTES
    print(json.dumps({"rate": requests / seconds, "cpu": 1e6 * used / requests}))


def main() -> None:
    """Run the engines in turns and print the table."""
    parser = argparse.ArgumentParser(description="Clients for range requests side by side; see the module's docstring.")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds that the server adds to each request")
    parser.add_argument("--measure", nargs=3, metavar=("ENGINE", "ENDPOINT", "AT_ONCE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        engine, endpoint, at_once = options.measure
        measure(engine, endpoint, options.requests, int(at_once))
        return
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "object").write_bytes(random.Random(1).randbytes(1 << 20) * (OBJECT_BYTES >> 20))
        command = [sys.executable, str(SERVER), folder, "--delay", str(options.delay)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
            environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
            for _ in range(options.runs):
                for at_once in AT_ONCE:
                    for engine in ENGINES:
                        command = [sys.executable, __file__, "--requests", str(options.requests)]
                        command += ["--measure", engine, endpoint, str(at_once)]
                        told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                        found.setdefault((engine, at_once), []).append(json.loads(told.stdout))
        finally:
            server.kill()
    print("| client | at once | requests a second | CPU a request, µs |\n|---|---|---|---|")
    for (engine, at_once), runs in found.items():
        rate, cpu = (statistics.median(run[name] for run in runs) for name in ("rate", "cpu"))
        print(f"| {engine} | {at_once} | {rate:,.0f} | {cpu:,.0f} |")


if __name__ == "__main__":
    main()
