"""The exact cut side by side with DuckDB, Polars and dask.dataframe: seconds and memory on the same Parquet files.

    python benchmarks/selection.py                       # 10⁷ rows, some minutes
    python benchmarks/selection.py --rows 100000000      # the figure of the design, 1 GB of disk
    python benchmarks/selection.py --rows 1000000000 --runs 1 --only "dynams, threads"        # 10 GB of disk

Each contender selects the γ smallest distances of round 1 and writes them: ours publishes the round, as `dynams select`
does; the others write a Parquet file of (shard, row). A contender is a process of its own, with two threads (ours and
dask's on a cluster: two worker processes of one, whose start is not counted), and begins once it has imported all. They
take turns; the table has medians of the seconds, and the most memory that one of a contender's processes held.

Only ours takes exactly k samples and settles ties by (shard, row). DuckDB, Polars: all up to the k-th smallest, ties
included. dask.dataframe's quantile is an approximation; how far off it is, is told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

THREADS = 2
PEERS_PYTHON = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
"""Of the environment that has Polars and pandas (`make bench-peers`); without it they are left out."""
PEERS = ("Polars", "dask.dataframe")


def ours_in_threads(folder: Path, fraction: str) -> tuple[int, float]:
    """`dynams select --workers 2`."""
    from dynams_stream.store import Store
    from pipeline.select_job import select_round

    store = Store(folder)

    def work() -> int:
        return int(select_round(store, fraction=fraction, workers=THREADS).round.counts["selected"])

    return timed(work)


def ours_as_tasks(folder: Path, fraction: str) -> tuple[int, float]:
    """`dynams select --scheduler …`, on two workers."""
    from dynams_stream.store import Store
    from pipeline.cluster import dask_client
    from pipeline.select_job import select_round

    store = Store(folder)
    with dask_client(workers=THREADS) as client:
        client.wait_for_workers(THREADS)

        def work() -> int:
            return int(select_round(store, fraction=fraction, client=client).round.counts["selected"])

        return timed(work)


def duckdb_(folder: Path, fraction: str) -> tuple[int, float]:
    """`quantile_disc`, then a filter."""
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"SET threads = {THREADS}")
    tables = f"'{folder}/rounds/000001/scores/*.parquet'"

    def work() -> int:
        (threshold,) = connection.execute(f"SELECT quantile_disc(distance, {fraction}) FROM {tables}").fetchone()
        query = f"SELECT shard, row FROM {tables} WHERE distance <= {threshold!r}::FLOAT"
        output = folder / "duckdb.parquet"
        (count,) = connection.execute(f"COPY ({query}) TO '{output}' (FORMAT parquet, COMPRESSION zstd)").fetchone()
        return int(count)

    return timed(work)


def polars_(folder: Path, fraction: str) -> tuple[int, float]:
    """`quantile`, then a filter, both lazy and streamed."""
    import polars

    tables = polars.scan_parquet(f"{folder}/rounds/000001/scores/*.parquet")
    distance = polars.col("distance")
    output = folder / "polars.parquet"

    def work() -> int:
        threshold = tables.select(distance.quantile(float(fraction), "lower")).collect(engine="streaming").item()
        tables.filter(distance <= threshold).select("shard", "row").sink_parquet(output, compression="zstd")
        return 0

    _, seconds = timed(work)
    return int(polars.scan_parquet(output).select(polars.len()).collect().item()), seconds


def dask_dataframe(folder: Path, fraction: str) -> tuple[int, float]:
    """Its (approximate) `quantile`, then a filter."""
    import dask.dataframe
    import pyarrow.dataset

    from pipeline.cluster import dask_client

    output = folder / "dask.parquet"
    with dask_client(workers=THREADS) as client, client.as_current():
        client.wait_for_workers(THREADS)

        def work() -> int:
            columns = ["shard", "row", "distance"]
            tables = dask.dataframe.read_parquet(f"{folder}/rounds/000001/scores/*.parquet", columns=columns)
            threshold = tables["distance"].quantile(float(fraction)).compute()
            tables[tables["distance"] <= threshold][["shard", "row"]].to_parquet(output, compression="zstd")
            return 0

        _, seconds = timed(work)
    return pyarrow.dataset.dataset(output).count_rows(), seconds


CONTENDERS: dict[str, Callable[[Path, str], tuple[int, float]]] = {
    "dynams, threads": ours_in_threads,
    "dynams, Dask tasks": ours_as_tasks,
    "DuckDB": duckdb_,
    "Polars": polars_,
    "dask.dataframe": dask_dataframe,
}


def timed(work: Callable[[], int]) -> tuple[int, float]:
    """What work gives, and its seconds."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


# ---- one contender, in a process of its own --------------------------------------------------------------------------


def contend(name: str, folder: Path, fraction: str) -> None:
    """Print one JSON line."""
    selected, seconds = CONTENDERS[name](folder, fraction)
    print(json.dumps({"selected": selected, "seconds": seconds}))


def run_contender(name: str, folder: Path, fraction: str) -> dict[str, Any]:
    """One run; what it wrote is removed again."""
    environment = {**os.environ, "POLARS_MAX_THREADS": str(THREADS), "OMP_NUM_THREADS": str(THREADS)}
    python = str(PEERS_PYTHON) if name in PEERS else sys.executable
    command = [python, __file__, "--contender", name, "--folder", str(folder), "--fraction", fraction]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    memory = MostMemory(process.pid)
    try:
        output, complaint = process.communicate()
    finally:
        memory.stop()
        clear(folder)
    if process.returncode:
        lines = complaint.strip().splitlines() or [f"exit status {process.returncode}"]
        return {"error": lines[-1][:200]}
    return {**json.loads(output.splitlines()[-1]), "megabytes": memory.most / 1e6}


class MostMemory(threading.Thread):
    """Looks at the resident memory of a process and its children, ten times a second.

    Attributes:
        most: bytes, of the process that had most.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.most = 0
        self._process = psutil.Process(pid)
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Look until told to stop."""
        while not self._stopped.wait(0.1):
            with suppress(psutil.Error):
                for process in [self._process, *self._process.children(recursive=True)]:
                    with suppress(psutil.Error):
                        self.most = max(self.most, process.memory_info().rss)

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self.join()


def clear(folder: Path) -> None:
    """Remove what contenders wrote: the tables stay, the round is not published."""
    names = ["rounds/000001/round.json", "rounds/000001/selection.parquet", "control/claims/000001-selection.json"]
    for path in [*(folder / name for name in names), *folder.glob("*.parquet")]:
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


# ---- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser(description="The exact cut against other tools; see the docstring.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--fraction", default="0.3")
    parser.add_argument("--only", default="", help="contenders whose name holds this text")
    parser.add_argument("--folder", type=Path, help="where the store is made, or found")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, options.folder, options.fraction)
        return
    from selection_data import make_store, size_on_disk

    folder = options.folder or Path("runs/bench/selection") / str(options.rows)
    store = make_store(folder, options.rows, THREADS)
    print(f"{options.rows:,} rows, {len(store.dataset().parts)} tables, {size_on_disk(store) / 1e6:,.0f} MB")
    names = [name for name in CONTENDERS if options.only in name and (name not in PEERS or PEERS_PYTHON.exists())]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.runs):
        for name in names:
            runs[name].append(run_contender(name, folder, options.fraction))
            print(f"{number + 1}/{options.runs} {name}: {json.dumps(runs[name][-1])}", file=sys.stderr, flush=True)
    print(table(runs, names[0]))


def table(runs: dict[str, list[dict[str, Any]]], base: str) -> str:
    """Medians, against the first contender."""
    lines = ["| | seconds | times ours | most memory of a process | selected |", "|---|---|---|---|---|"]
    reference = statistics.median(run["seconds"] for run in runs[base])
    for name, found in runs.items():
        failed = [run["error"] for run in found if "error" in run]
        if failed:
            lines.append(f"| {name} | – | – | – | {failed[0]} |")
            continue
        seconds = statistics.median(run["seconds"] for run in found)
        memory = max(run["megabytes"] for run in found)
        lines.append(
            f"| {name} | {seconds:.1f} | {seconds / reference:.1f} | {memory:,.0f} MB | {found[0]['selected']:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
