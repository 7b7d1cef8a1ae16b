"""Where the cluster comes from: one that runs already, or a local one that ends with its parent however that ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from dask_processes import ENVIRONMENT, scheduler, worker
from distributed import Client
from test_score_job import tables

import toy_models
from dynams_stream import Store
from dynams_stream.errors import ScoringError, UsageError
from pipeline import cluster
from pipeline.cluster import dask_client, worker_threads
from tools.cluster_options import scheduler_source

ROOT = Path(__file__).resolve().parents[1]


def test_a_given_client_is_used_and_left_open(client: Client) -> None:
    with dask_client(client) as same:
        assert same is client
    assert client.submit(lambda: 21 * 2).result() == 42
    assert worker_threads(client) == 2


def test_an_address_is_connected_to(client: Client) -> None:
    with dask_client(scheduler=client.scheduler.address) as other:
        assert other is not client
        assert other.submit(sum, [1, 2, 3]).result() == 6
    assert client.status == "running"


def test_what_cannot_be_reached_or_started() -> None:
    with (
        pytest.raises(ScoringError, match="cannot reach the Dask scheduler at"),  # it may be there the next time
        dask_client(scheduler="tcp://127.0.0.1:9"),
    ):
        pass
    with pytest.raises(UsageError, match="at least 1; got 0"), dask_client(workers=0):
        pass
    with pytest.raises(UsageError, match="an address looks like tcp://host:8786"), dask_client(scheduler="localhost"):
        pass


# ---- a scheduler file ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduler_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a `dask scheduler` with two `dask worker` processes, whose names Dask made up."""
    with scheduler(tmp_path_factory.mktemp("dask") / "scheduler.json") as file, worker(file), worker(file):
        yield file


@pytest.mark.slow
def test_scoring_through_a_scheduler_file_gives_the_tables_of_a_local_cluster(
    digit_store: Store, tmp_path: Path, scheduler_file: Path
) -> None:
    torch.save(toy_models.linear().state_dict(), tmp_path / "linear.pt")
    command = [
        sys.executable, "-m", "tools.cli", "score", "--store", digit_store.url, "--checkpoint", tmp_path / "linear.pt",
        "--model", "toy_models:linear", "--transform", "toy_models:gray", "--json",
    ]  # fmt: skip
    found = []
    for source in (["--workers", "2"], ["--scheduler-file", scheduler_file]):
        done = subprocess.run([*command, *source], capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["round"], result["resumed_parts"], result["scored"]) == (1, 0, 1437)
        found.append(tables(digit_store, 1))
        for table in Path(digit_store.path("rounds/000001/scores")).iterdir():
            table.unlink()
    assert found[0].num_rows == 1437
    assert found[1].equals(found[0])


def test_a_scheduler_file_that_appears_later_is_waited_for(tmp_path: Path, scheduler_file: Path) -> None:
    later = tmp_path / "scheduler.json"
    later.write_text(json.dumps({"address": "tcp://127.0.0.1:9"}))  # of a scheduler that has ended
    timer = threading.Timer(1.5, later.write_text, [scheduler_file.read_text()])
    timer.start()
    with dask_client(scheduler=str(later)) as client:
        assert client.submit(sum, [1, 2], pure=False).result() == 3
    timer.join()


@pytest.mark.parametrize(
    ("content", "kind", "complaint"),
    [
        (None, ScoringError, r"s\.json: no such .*; start: dask scheduler --scheduler-file .*s\.json \(.* for 1 s\)"),
        ("{", UsageError, r"s\.json: not a scheduler file as `dask scheduler` writes it"),
        ('{"id": 1}', UsageError, r"not a scheduler file"),
        (
            '{"address": "tcp://127.0.0.1:9"}',
            ScoringError,
            r"cannot reach the Dask scheduler at tcp://127\.0\.0\.1:9.*s\.json",
        ),
    ],
)
def test_a_scheduler_file_that_is_of_no_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, kind: type[Exception], complaint: str
) -> None:
    monkeypatch.setattr(cluster, "SCHEDULER_FILE_SECONDS", 1)
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(kind, match=complaint), dask_client(scheduler=str(path)):
        pass


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("tcp://h:1", "s.json", None), "--scheduler and --scheduler-file exclude each other"),
        ((None, "s.json", "c.toml"), "--scheduler-file and --cluster exclude each other"),
        (("s.json", None, None), "--scheduler takes an address .* use --scheduler-file s.json"),
        (("c.toml", None, None), "--scheduler takes an address .* use --cluster c.toml"),
        ((None, "s.txt", None), r"--scheduler-file s\.txt: the name of a scheduler file ends in \.json"),
        ((None, None, "c.yaml"), r"--cluster c\.yaml: the name of a cluster's description ends in \.toml"),
    ],
)
def test_one_flag_says_where_the_scheduler_is(flags: tuple[str | None, str | None, str | None], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        scheduler_source(*flags)


def test_each_flag_is_taken() -> None:
    assert scheduler_source(None, None, None) is None
    assert scheduler_source("tcp://h:1", None, None) == "tcp://h:1"
    assert scheduler_source(None, "s.json", None) == "s.json"
    assert scheduler_source(None, None, "c.toml") == "c.toml"


@pytest.mark.parametrize("command", ["score", "rescore"])
def test_the_commands_refuse_two_of_them(command: str, tmp_path: Path) -> None:
    arguments = ["--store", tmp_path, "--model", "m:f", "--checkpoint", "c.pt"]
    arguments += ["--fraction", "0.1"] if command == "rescore" else []
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", command, *arguments, "--scheduler", "tcp://h:1", "--cluster", "c.toml"],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "--scheduler and --cluster exclude each other" in done.stderr


def test_a_cluster_without_workers_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "WORKER_SECONDS", 0.6)
    monkeypatch.setattr(cluster, "MOMENT_SECONDS", 0.3)
    with (
        scheduler(tmp_path / "s.json") as file,
        dask_client(scheduler=str(file)) as client,
        pytest.raises(ScoringError, match=r"no workers after 0\.6 s; look at its jobs"),
    ):
        worker_threads(client)
    assert "no workers yet; waiting for up to 0.6 s" in caplog.text


# ---- a local cluster -------------------------------------------------------------------------------------------------


SCRIPT = """
import sys, time
from pipeline.cluster import dask_client
with dask_client(workers=1) as client:
    print(client.submit(lambda: "scored").result(), flush=True)
    if len(sys.argv) > 1:
        time.sleep(600)
"""


def test_a_script_needs_no_main_guard_and_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, "scored\n"), done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_cluster_ends_with_a_killed_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script, "wait"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "scored\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(how)
    process.wait()
    process.stdout.close()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [child.cmdline() for child in alive]
    assert len(gone) == len(children)
