"""The exact cut side by side with DuckDB, Polars and dask.dataframe: seconds and memory on the same Parquet files.

    python benchmarks/selection.py                       # 10⁷ rows, some minutes
    python benchmarks/selection.py --rows 100000000      # the figure of the design, 2.5 GB of disk
    python benchmarks/selection.py --rows 1000000000 --runs 1 --only dynams        # 25 GB of disk

Each contender selects the γ smallest distances of round 1 and writes them: ours publishes the round, as `dynams select`
does; the others write a Parquet file of (shard, row). A contender is a process of its own, with two threads (ours and
dask's on a cluster: two worker processes of one, whose start is not counted), and begins once it has imported all. They
take turns; the table has medians of the seconds, and the most memory that one of a contender's processes held. The
floor only reads the column that all of them need.

Only ours takes exactly k samples and settles ties by (shard, row). DuckDB, Polars: all up to the k-th smallest, ties
included. dask.dataframe's quantile is an approximation; how far off it is, is told. With `class_balance` ours does
more: each class gives the same share of its samples.

Where ours and DuckDB take part, they are compared once, when all is measured: our threshold and rows with what DuckDB
gives for `ORDER BY distance, shard, row LIMIT k`. With more than 10⁸ rows, which it would sort on disk, the threshold
alone.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

THREADS = 2
PEERS_PYTHON = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
"""Of the environment that has Polars and pandas (`make bench-peers`); without it they are left out."""
PEERS = ("Polars", "dask.dataframe")

Result = TypeVar("Result")


OURS, BY_CLASS = "dynams, threads", "dynams, class_balance"
"""The contender that the others are compared with, and the one that does more."""
COMPARISON = "comparison"
"""Named like a contender, it is what compares ours with DuckDB."""
SORTED_ROWS = 100_000_000
"""With more rows DuckDB is not asked to sort them."""


@dataclass(frozen=True)
class Outcome:
    """What a contender did.

    Attributes:
        selected: how many samples.
        seconds: for that.
        sha256: of our `selection.parquet`, which is the same whoever makes it; "" of others.
    """

    selected: int
    seconds: float
    sha256: str = ""


def ours_in_threads(folder: Path, fraction: str) -> Outcome:
    """`dynams select --workers 2`."""
    return _ours(folder, fraction=fraction, workers=THREADS)


def ours_by_class(folder: Path, fraction: str) -> Outcome:
    """`dynams select --workers 2 --class-balance`."""
    return _ours(folder, fraction=fraction, workers=THREADS, class_balance=True)


def ours_as_tasks(folder: Path, fraction: str) -> Outcome:
    """`dynams select --scheduler …`, on two workers."""
    from pipeline.cluster import dask_client

    with dask_client(workers=THREADS) as client:
        client.wait_for_workers(THREADS)
        return _ours(folder, fraction=fraction, client=client)


def _ours(folder: Path, **how: Any) -> Outcome:
    from dynams_stream.store import Store
    from pipeline.select_job import select_round

    store = Store(folder)
    made, seconds = timed(lambda: select_round(store, **how).round)
    return Outcome(made.counts["selected"], seconds, made.manifest["selection"]["sha256"])


def duckdb_(folder: Path, fraction: str) -> Outcome:
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

    return Outcome(*timed(work))


def polars_(folder: Path, fraction: str) -> Outcome:
    """`quantile`, then a filter, both lazy and streamed."""
    import polars

    tables = polars.scan_parquet(f"{folder}/rounds/000001/scores/*.parquet")
    distance = polars.col("distance")
    output = folder / "polars.parquet"

    def work() -> None:
        threshold = tables.select(distance.quantile(float(fraction), "lower")).collect(engine="streaming").item()
        tables.filter(distance <= threshold).select("shard", "row").sink_parquet(output, compression="zstd")

    _, seconds = timed(work)
    return Outcome(int(polars.scan_parquet(output).select(polars.len()).collect().item()), seconds)


def dask_dataframe(folder: Path, fraction: str) -> Outcome:
    """Its (approximate) `quantile`, then a filter."""
    import dask.dataframe
    import pyarrow.dataset

    from pipeline.cluster import dask_client

    output = folder / "dask.parquet"
    with dask_client(workers=THREADS) as client, client.as_current():
        client.wait_for_workers(THREADS)

        def work() -> None:
            columns = ["shard", "row", "distance"]
            tables = dask.dataframe.read_parquet(f"{folder}/rounds/000001/scores/*.parquet", columns=columns)
            threshold = tables["distance"].quantile(float(fraction)).compute()
            tables[tables["distance"] <= threshold][["shard", "row"]].to_parquet(output, compression="zstd")

        _, seconds = timed(work)
    return Outcome(pyarrow.dataset.dataset(output).count_rows(), seconds)


def floor(folder: Path, fraction: str) -> Outcome:
    """The column of distances read once, in two threads, and nothing done with it."""
    import pyarrow.parquet as pq

    tables = sorted((folder / "rounds/000001/scores").glob("*.parquet"))

    def rows(table: Path) -> int:
        return int(pq.ParquetFile(table, pre_buffer=True).read(columns=["distance"], use_threads=False).num_rows)

    def work() -> int:
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(pool.map(rows, tables))

    return Outcome(*timed(work))


CONTENDERS: dict[str, Callable[[Path, str], Outcome]] = {
    OURS: ours_in_threads,
    "dynams, Dask tasks": ours_as_tasks,
    BY_CLASS: ours_by_class,
    "DuckDB": duckdb_,
    "Polars": polars_,
    "dask.dataframe": dask_dataframe,
    "floor: distances read once": floor,
}


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What work gives, and its seconds."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


# ---- whether ours is right -------------------------------------------------------------------------------------------


def compare_with_duckdb(folder: Path, fraction: str) -> str:
    """Select once more, and hold it against DuckDB; gives what was compared, in words.

    Raises:
        AssertionError: they differ.
    """
    import duckdb
    import numpy as np

    from dynams_stream.store import Store
    from pipeline.select_job import select_round

    made = select_round(Store(folder), fraction=fraction, workers=THREADS).round
    selected = made.counts["selected"]
    tables = f"'{folder}/rounds/000001/scores/*.parquet'"
    connection = duckdb.connect()
    connection.execute(f"SET threads = {THREADS}")
    border = f"{made.manifest['threshold']!r}::FLOAT"
    query = f"SELECT count(*) FILTER (distance < {border}), count(*) FILTER (distance <= {border}) FROM {tables}"
    below, up_to = connection.execute(query).fetchone()
    assert below < selected <= up_to, f"{below:,} rows are below our threshold, {up_to:,} up to it, k is {selected:,}"
    if made.counts["all"] > SORTED_ROWS:
        return f"DuckDB finds the same threshold: {below:,} rows below it, {up_to:,} up to it, k is {selected:,}"
    nearest = f"SELECT shard, row FROM {tables} ORDER BY distance, shard, row LIMIT {selected}"
    theirs = connection.execute(f"SELECT shard, row FROM ({nearest}) ORDER BY shard, row").fetchnumpy()
    selection = made.selection()
    shards = np.repeat(np.arange(len(selection.counts)), selection.counts)
    assert np.array_equal(theirs["shard"], shards), "DuckDB selects other shards' samples"
    ends = np.cumsum(selection.counts)
    for shard, (start, stop) in enumerate(zip(ends - selection.counts, ends, strict=True)):
        assert np.array_equal(theirs["row"][start:stop], selection.rows(shard)), f"DuckDB has other rows of {shard}"
    return f"DuckDB selects the same {selected:,} rows, with the same threshold"


# ---- one contender, in a process of its own --------------------------------------------------------------------------


def contend(name: str, folder: Path, fraction: str) -> None:
    """Print one JSON line."""
    if name == COMPARISON:
        print(json.dumps({"found": compare_with_duckdb(folder, fraction)}))
    else:
        print(json.dumps(asdict(CONTENDERS[name](folder, fraction))))


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
    print(table(runs))
    wrong = different(runs)
    if OURS in names and "DuckDB" in names:
        found = run_contender(COMPARISON, folder, options.fraction)
        print(found.get("found", ""))
        wrong += [found["error"]] if "error" in found else []
    if wrong:
        raise SystemExit("\n".join(wrong))


def different(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which of our runs made another file than equal ones, or took another number of samples."""
    ours = {name: [run for run in found if run.get("sha256")] for name, found in runs.items()}
    digests = {run["sha256"] for name, found in ours.items() if name != BY_CLASS for run in found}
    of_classes = {run["sha256"] for run in ours.get(BY_CLASS, [])}
    numbers = {run["selected"] for found in ours.values() for run in found}
    told = (("selections", digests), ("selections by class", of_classes), ("numbers of samples", numbers))
    return [f"our runs made different {what}: {sorted(found)}" for what, found in told if len(found) > 1]


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Medians, against ours where it ran."""
    lines = ["| | seconds | times ours | most memory of a process | selected |", "|---|---|---|---|---|"]
    ours = [run["seconds"] for run in runs.get(OURS, []) if "error" not in run]
    for name, found in runs.items():
        failed = [run["error"] for run in found if "error" in run]
        if failed:
            lines.append(f"| {name} | – | – | – | {failed[0]} |")
            continue
        seconds = statistics.median(run["seconds"] for run in found)
        times = f"{seconds / statistics.median(ours):.1f}" if ours else "–"
        memory = max(run["megabytes"] for run in found)
        lines.append(f"| {name} | {seconds:.1f} | {times} | {memory:,.0f} MB | {found[0]['selected']:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
