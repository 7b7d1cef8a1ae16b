"""Streaming a random γ: this loader, its peers, and the bare loops that bound it, side by side.

    python benchmarks/streaming.py            a small grid in some minutes (`make bench`), its table and plots
    python benchmarks/streaming.py --full     γ × sample size × raw or JPEG decode × local or store × 0 or 2 workers
    python benchmarks/streaming.py --table    table and plots of what `--full` has measured (`--quick`: the small one)

Makes sets of samples of three members (jpg, cls, json) in 20 tar shards each (`streaming_data.py`), indexes them and
publishes a random round for each γ. The full grid's sets are larger than the processor's caches and smaller than the
page cache: 200,000 samples of 1 KB, 100,000 of 13 KB, 10,000 of 100 KB, with the peers' own formats 9 GB on disk. (A
small γ of them does fit the caches, for the bare loop as for everybody else.)

Every contender (`contenders.py`, `peers/*.py`, whose docstrings say what each does and why so) gets a process of its
own and streams some of the selection untimed. Then they take turns: one run each, three times, first another
contender each time. `peers/protocol.py` says what a run is. Medians are over the turns, ratios are taken within a
turn. Of raw samples without workers, each contender first proves that it streams exactly the selected ones, bytes and
all, once.

"local" shards lie in the page cache, which they are read into beforehand. "store" shards are behind the tests' object
server, a process of its own that waits 20 ms before each answer. On the loopback bandwidth costs next to nothing, which
flatters whoever reads whole shards; so requests a sample and bytes read in excess stand beside ours.

Each measurement is appended to a file of JSON lines when its turn is over; what is in the file is not measured again
(`--fresh` begins anew, and the small grid always does), so that an interrupted run goes on. Give `--folder` to keep the
data for that. Peers need an environment of their own (`peers/requirements.txt`); those that are missing are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import streaming_table
from contender_process import ContenderError, ContenderProcess
from peers.protocol import Job
from streaming_data import DataSet, into_page_cache, make_plan, make_set
from streaming_grid import (
    ENTRIES,
    FRACTIONS,
    PLACES,
    SAMPLES,
    WAYS,
    WORKERS,
    Cell,
    Entry,
    full_grid,
    quick_grid,
)

HERE = Path(__file__).resolve().parent
SERVER = HERE.parent / "tests" / "object_server.py"
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"

DELAY = 0.02
SLOW = ("litdata-subset",)  # left out of the small grid
PATIENCE = 2  # runs from the store, or with workers, may last so many times as long: they take a while to get going
MOST_CHECKED = 30_000  # samples that are streamed from the store to check a peer
UNCHECKED = ("pread", "obstore", "server", "ours-first", "litdata-subset")  # yield no samples, are another's twin, slow


# ---- results ---------------------------------------------------------------------------------------------------------


class Results:
    """The file of JSON lines: `{"kind": "machine" | "check" | "run" | "error", …}`."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def lines(self) -> list[dict[str, Any]]:
        """Everything that has been written."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def add(self, *lines: dict[str, Any]) -> None:
        """Append lines, all or none of them."""
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def turns(self, cell: Cell) -> dict[str, set[int]]:
        """By contender, the turns that have been measured of a cell."""
        about, turns = asdict(cell), {}
        for line in self.lines():
            if line["kind"] == "run" and all(line[name] == value for name, value in about.items()):
                turns.setdefault(line["contender"], set()).add(line["turn"])
        return turns


def machine() -> dict[str, Any]:
    """What the measurements ran on."""
    information = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in information.splitlines() if "model name" in line), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "kind": "machine",
        "at": _now(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


# ---- a cell ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all cells are measured with.

    Attributes:
        root: the folder of all sets.
        results: where measurements go.
        endpoint, server: the object server's address and process id.
        peers_python: the interpreter of the peers' environment.
        names: the contenders that may take part.
        runs: turns of a cell.
        seconds, limit: how long a run lasts, at least and at most.
    """

    root: Path
    results: Results
    endpoint: str
    server: int
    peers_python: Path
    names: tuple[str, ...]
    runs: int
    seconds: float
    limit: float

    def measure(self, cells: Sequence[Cell]) -> None:
        """Measure what is missing of cells that differ in their fraction alone, with the same processes."""
        missing = {cell: self._missing(cell) for cell in cells}
        entries = [entry for entry in ENTRIES if any(entry in found for found in missing.values())]
        with ExitStack() as stack:
            processes = {entry: self._process(stack, cells[0], entry) for entry in entries}
            for cell, turns_of in missing.items():
                if not turns_of:
                    continue
                began = time.monotonic()
                for entry in turns_of:
                    if processes[entry].has_ended:  # at another fraction
                        processes[entry] = self._process(stack, cell, entry)
                ready = [entry for entry in turns_of if self._get_ready(cell, processes[entry])]
                for turn in range(self.runs):
                    order = [processes[entry] for entry in ready if turn in turns_of[entry]]
                    first = turn % max(1, len(order))
                    self._take_turns(cell, turn, order[first:] + order[:first])
                say(f"{_named(cell)}: {time.monotonic() - began:.0f} s")

    def _missing(self, cell: Cell) -> dict[Entry, list[int]]:
        """By contender, the turns of a cell that have not been measured."""
        done = self.results.turns(cell)
        found = {
            entry: [turn for turn in range(self.runs) if turn not in done.get(entry.name, set())]
            for entry in self.entries(cell)
        }
        return {entry: turns for entry, turns in found.items() if turns}

    def entries(self, cell: Cell) -> list[Entry]:
        """The contenders of a cell that can run here and have their format."""
        data = DataSet(self.root, cell.kilobytes, cell.samples)
        return [
            entry
            for entry in ENTRIES
            if entry.name in self.names
            and entry.takes_part(cell)
            and (not entry.format or _made(data, entry.format).exists())
        ]

    def _process(self, stack: ExitStack, cell: Cell, entry: Entry) -> ContenderProcess:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=self.root, ignore_cleanup_errors=True))
        python = str(self.peers_python) if entry.peer else sys.executable
        command = [python, str(HERE / entry.program), self._job(cell, entry, scratch).dumps()]
        process = ContenderProcess(entry.name, command, environment(self.endpoint))
        stack.callback(process.close)
        return process

    def _get_ready(self, cell: Cell, process: ContenderProcess) -> bool:
        """Have a contender open a cell's round, prove that it streams it and warm up; say so when it cannot."""
        try:
            process.open(cell.fraction)
            if self._is_checked(cell, process.name):
                self._check(cell, process)
            process.ask("warm")
        except ContenderError as error:
            self._fail(cell, error)
            return False
        return True

    @staticmethod
    def _is_checked(cell: Cell, name: str) -> bool:
        few = cell.place == "local" or cell.samples * float(cell.fraction) <= MOST_CHECKED
        return cell.is_plain and name not in UNCHECKED and (few or name.startswith("ours"))  # ours tells its costs too

    def _check(self, cell: Cell, process: ContenderProcess) -> None:
        answer = process.ask("check")
        if answer.pop("found") != answer["expected"]:
            raise ContenderError(f"{process.name}: does not stream exactly what is selected")
        self.results.add({"kind": "check", **asdict(cell), "contender": process.name, **answer})

    def _job(self, cell: Cell, entry: Entry, scratch: str) -> Job:
        return Job(
            contender=entry.name,
            folder=str(DataSet(self.root, cell.kilobytes, cell.samples).folder),
            place=cell.place,
            way=cell.way,
            workers=cell.workers,
            seconds=self.seconds,
            limit=self.limit * (PATIENCE if cell.place == "store" or cell.workers else 1),
            endpoint=self.endpoint,
            server=self.server,
            scratch=scratch,
        )

    def _take_turns(self, cell: Cell, turn: int, processes: Sequence[ContenderProcess]) -> None:
        lines = []
        for process in processes:
            about = {"kind": "run", **asdict(cell), "contender": process.name, "turn": turn, "at": _now()}
            try:
                lines.append({**about, **process.about, **process.ask("run")})
            except ContenderError as error:
                self._fail(cell, error)
        self.results.add(*lines)

    def _fail(self, cell: Cell, error: ContenderError) -> None:
        say(f"{_named(cell)}: {error}")
        self.results.add({"kind": "error", **asdict(cell), "at": _now(), "error": str(error)})


def _named(cell: Cell) -> str:
    return f"{cell.place}, {cell.kilobytes} KB, {cell.way}, {cell.workers} workers, γ = {cell.fraction}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def say(text: str) -> None:
    """Progress goes to standard error."""
    print(text, file=sys.stderr, flush=True)


# ---- the data --------------------------------------------------------------------------------------------------------


def environment(endpoint: str) -> dict[str, str]:
    """What makes S3 clients ask the object server."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT_URL": endpoint} if endpoint else keys


@contextmanager
def object_server(root: Path, delay: float) -> Iterator[tuple[str, int]]:
    """The tests' object server over all sets, as a process of its own: its address and process id."""
    command = [sys.executable, str(SERVER), str(root), "--delay", str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid
        finally:
            process.terminate()


def make_data(root: Path, cells: Sequence[Cell], names: Sequence[str], peers_python: Path) -> None:
    """Make the sets, stores, plans and own formats that the cells need."""
    with object_server(root, 0.0) as (endpoint, _):  # one for all sets: clients are kept, with the address they know
        os.environ.update(environment(endpoint))
        for kilobytes, samples in dict.fromkeys((cell.kilobytes, cell.samples) for cell in cells):
            data = DataSet(root, kilobytes, samples)
            mine = [cell for cell in cells if cell.kilobytes == kilobytes]
            say(f"{data.name}: shards, index, rounds")
            make_set(data)
            for place, fraction in dict.fromkeys((cell.place, cell.fraction) for cell in mine):
                make_plan(data, place, fraction)
            for entry in ENTRIES:
                if entry.format and entry.name in names and any(entry.takes_part(cell) for cell in mine):
                    _make_format(data, entry, peers_python)
            say(f"{data.name}: {into_page_cache(data) / 1e9:.1f} GB")


def _made(data: DataSet, own_format: str) -> Path:
    return data.folder / f"{own_format}.made"


def _make_format(data: DataSet, entry: Entry, python: Path) -> None:
    if _made(data, entry.format).exists():
        return
    say(f"{data.name}: {entry.format}")
    command = [str(python), str(HERE / entry.program), "prepare", str(data.folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        say(f"{entry.name} cannot be measured: {made.stderr.strip().splitlines()[-1:]}")
        return
    _made(data, entry.format).touch()


# ---- the program -----------------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Streaming rates side by side; see the module's docstring.")
    parser.add_argument("--quick", action="store_true", help="a small grid (the default)")
    parser.add_argument("--full", action="store_true", help="the whole grid, or what the options below leave of it")
    parser.add_argument("--table", action="store_true", help="measure nothing: table and plots of the results alone")
    parser.add_argument("--results", type=Path, help="JSON lines (default: runs/bench/streaming[-quick].jsonl)")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--folder", type=Path, help="keep the sets there (default: a temporary folder)")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="interpreter of the peers' environment")
    parser.add_argument("--samples", type=int, help="samples of each set")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="a run lasts at least so long, and whole epochs")
    parser.add_argument("--limit", type=float, help="and ends after so long; twice, from the store or with workers")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SAMPLES, default=list(SAMPLES), help="kilobytes")
    parser.add_argument("--fractions", nargs="+", choices=FRACTIONS, default=FRACTIONS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--contenders", nargs="+", choices=[entry.name for entry in ENTRIES])
    parser.add_argument("--json", action="store_true", help="the table as one JSON object a line")
    options = parser.parse_args(arguments)
    options.quick = options.quick or not (options.full or options.table)
    name = "streaming-quick.jsonl" if options.quick else "streaming.jsonl"
    options.results = options.results or Path("runs/bench") / name
    options.seconds = options.seconds or (0.3 if options.quick else 1.0)
    options.limit = options.limit or (0.6 if options.quick else 3.0)
    return options


def measure(options: argparse.Namespace, root: Path) -> None:
    """Make the data in `root` and measure the grid."""
    cells = quick_grid(options) if options.quick else full_grid(options)
    peers = options.peers_python.exists()
    known = [entry.name for entry in ENTRIES if peers or not entry.peer]
    wanted = options.contenders or ([name for name in known if name not in SLOW] if options.quick else known)
    names = tuple(name for name in wanted if name in known)
    if not peers:
        say(f"{options.peers_python} is not there: mosaic, litdata and Energon are left out")
    make_data(root, cells, names, options.peers_python)
    results = Results(options.results)
    if options.fresh or options.quick:
        options.results.unlink(missing_ok=True)
    results.add(machine())
    with object_server(root, DELAY) as (endpoint, server):
        bench = Bench(
            root=root,
            results=results,
            endpoint=endpoint,
            server=server,
            peers_python=options.peers_python,
            names=names,
            runs=options.runs,
            seconds=options.seconds,
            limit=options.limit,
        )
        for _, group in itertools.groupby(cells, lambda cell: replace(cell, fraction="")):
            bench.measure(list(group))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, and print its table."""
    options = parsed(arguments)
    if not options.table:
        if options.folder is None:
            with tempfile.TemporaryDirectory() as root:
                measure(options, Path(root))
        else:
            options.folder.mkdir(parents=True, exist_ok=True)
            measure(options, options.folder.resolve())
    lines = Results(options.results).lines()
    if options.json:
        for row in streaming_table.rows(lines):
            print(json.dumps(row))
        return
    print(streaming_table.markdown(lines))
    for path in streaming_table.plots(lines, options.results.with_suffix("")):
        say(f"plot: {path}")


if __name__ == "__main__":
    main()
