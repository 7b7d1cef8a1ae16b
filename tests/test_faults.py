"""Scoring jobs that are killed, stopped, or run out of disk, as real processes; what the rerun makes of them."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from distributed import Client
from PIL import Image

import toy_models
from dynams_stream import ScorerSpec, Store, schema
from dynams_stream.checkpoint import checkpoint_digest
from dynams_stream.errors import CheckpointError
from pipeline.index_job import build_index
from pipeline.lease import current_holder
from pipeline.pending import finished_parts
from pipeline.score_job import score_round
from pipeline.score_part import worker_scorer
from pipeline.shards import open_source, write_shards

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:slow_gray", batch_size=37)
PARTS = 15

pytestmark = pytest.mark.slow  # commands and clusters start anew in every test


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "linear.pt"
    torch.save(toy_models.linear().state_dict(), path)
    return path


@pytest.fixture
def checkpoint(weights: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(weights, tmp_path / "linear.pt"))


@pytest.fixture(scope="module")
def undisturbed(
    digit_shards: list[str], weights: Path, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    store = Store(tmp_path_factory.mktemp("undisturbed") / "store")
    build_index(store, digit_shards)
    return tables(store, score_round(store, SPEC, checkpoint=str(weights), client=client).number)


def tables(store: Store, number: int) -> pa.Table:
    parts = sorted(finished_parts(store, number))
    return pa.concat_tables(pq.read_table(store.path(schema.scores_path(number, part))) for part in parts)


def written(store: Store, number: int = 1) -> dict[str, int]:
    """The tables that are there, and when each was written."""
    folder = Path(store.path(schema.scores_folder(number)))
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}


def until(true: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(store: Store, checkpoint: Path, *more: str, transform: str = "slow_gray") -> list[str]:
    return [
        sys.executable, "-m", "tools.cli", "score", "--store", store.url, "--checkpoint", str(checkpoint),
        "--model", "toy_models:linear", "--transform", f"toy_models:{transform}", "--batch-size", "37", "--json", *more,
    ]  # fmt: skip


def start(arguments: list[str], **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload]


def finish(arguments: list[str]) -> dict[str, object]:
    """Run a command that must succeed; what it prints."""
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def require_undisturbed_rerun(store: Store, undisturbed: pa.Table, arguments: list[str]) -> None:
    """The rerun does what is missing and nothing else, and ends with the tables of a job that nothing happened to."""
    done = written(store)
    assert 0 < len(done) < PARTS
    assert current_holder(store) is None
    assert finish(arguments)["resumed_parts"] == len(done)
    assert {name: written(store)[name] for name in done} == done
    assert tables(store, 1).equals(undisturbed)


class Cluster:
    """A scheduler and two workers with their nannies, processes as `dask scheduler` and `dask worker` start them."""

    def __init__(self, folder: Path):
        file = folder / f"scheduler-{time.monotonic_ns()}.json"
        where = ["--scheduler-file", str(file)]
        self.scheduler = self._start("dask_scheduler", *where, "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        until(lambda: file.exists() and bool(file.read_text()))
        self.address = json.loads(file.read_text())["address"]
        place = ["--local-directory", str(folder), "--no-dashboard", "--nthreads", "1"]
        self.workers = [self._start("dask_worker", *where, *place) for _ in range(2)]
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)

    def _start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        log = subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{program}", *options], env=ENVIRONMENT, stdout=log, stderr=log
        )

    def worker_processes(self) -> list[int]:
        with Client(self.address, set_as_default=False) as client:
            return sorted(client.run(os.getpid).values())

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                process.terminate()
        for process in (*self.workers, self.scheduler):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_nothing(
    digit_store: Store, checkpoint: Path, undisturbed: pa.Table, cluster: Cluster
) -> None:
    before = cluster.worker_processes()
    job = start(command(digit_store, checkpoint, "--scheduler", cluster.address))
    until(lambda: len(written(digit_store)) >= 2)
    os.kill(before[0], signal.SIGKILL)
    said, complaint = job.communicate(timeout=120)
    assert job.returncode == 0, complaint
    assert (json.loads(said)["scored"], json.loads(said)["resumed_parts"]) == (1437, 0)
    assert tables(digit_store, 1).equals(undisturbed)
    after = cluster.worker_processes()
    assert before[0] not in after  # its nanny has started another
    assert before[1] in after


def test_a_killed_scheduler_fails_the_job_and_the_next_one_goes_on(
    digit_store: Store, checkpoint: Path, undisturbed: pa.Table, cluster: Cluster, tmp_path: Path
) -> None:
    job = start(command(digit_store, checkpoint, "--scheduler", cluster.address))
    until(lambda: len(written(digit_store)) >= 2)
    cluster.scheduler.kill()
    _, complaint = job.communicate(timeout=30)
    assert job.returncode == 1, complaint
    assert f"the connection to the Dask scheduler at {cluster.address} is lost; what is done is kept" in complaint
    assert "run the same command again" in complaint
    assert "Traceback" not in complaint
    cluster.stop()  # its workers have no scheduler any more
    other = Cluster(tmp_path)
    try:
        require_undisturbed_rerun(
            digit_store, undisturbed, command(digit_store, checkpoint, "--scheduler", other.address)
        )
    finally:
        other.stop()


def test_a_killed_client_s_rerun_goes_on(
    digit_store: Store, checkpoint: Path, undisturbed: pa.Table, cluster: Cluster
) -> None:
    arguments = command(digit_store, checkpoint, "--scheduler", cluster.address)
    job = start(arguments)
    until(lambda: len(written(digit_store)) >= 2)
    job.kill()
    job.communicate(timeout=30)
    time.sleep(2)  # the parts that run may be written, or be given up
    require_undisturbed_rerun(digit_store, undisturbed, arguments)


def test_the_local_cluster_killed_is_told(digit_store: Store, checkpoint: Path, undisturbed: pa.Table) -> None:
    arguments = command(digit_store, checkpoint, "--workers", "1")
    job = start(arguments)
    until(lambda: len(written(digit_store)) >= 2)
    children = psutil.Process(job.pid).children()
    assert len(children) == 1
    children[0].kill()
    _, complaint = job.communicate(timeout=30)
    assert job.returncode == 1, complaint
    assert "the connection to the Dask scheduler" in complaint
    require_undisturbed_rerun(digit_store, undisturbed, arguments)


def test_a_part_whose_worker_always_dies_is_named_and_the_others_are_done(
    digit_store: Store,
    digit_shards: list[str],
    checkpoint: Path,
    undisturbed: pa.Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums = [
        toy_models.pixel_sum(Image.open(io.BytesIO(sample["png"])))
        for sample in wds.WebDataset(digit_shards, shardshuffle=False)
    ]
    deadly = next(value for value in sums[250:] if sums.count(value) == 1)
    part = sums.index(deadly) // 100
    marker = tmp_path / "marker"
    marker.write_text(str(deadly))
    monkeypatch.setitem(ENVIRONMENT, "DYNAMS_TEST_MARKER", str(marker))
    arguments = command(digit_store, checkpoint, "--workers", "1", transform="deadly_gray")
    failed = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert failed.returncode == 1, failed.stderr
    assert "1 of 15 parts could not be scored" in failed.stderr
    assert f"part {part}: its worker died, and again when it was run alone" in failed.stderr
    assert "give them more memory or lower the batch size" in failed.stderr
    assert len(written(digit_store)) == PARTS - 1
    marker.unlink()
    require_undisturbed_rerun(digit_store, undisturbed, arguments)


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_lets_the_parts_that_run_finish(digit_store: Store, checkpoint: Path, undisturbed: pa.Table) -> None:
    arguments = command(digit_store, checkpoint, "--workers", "2", transform="slower_gray")
    job = start(arguments)
    until(lambda: len(written(digit_store)) >= 2)
    time.sleep(0.5)  # both workers may have been between two parts
    before = len(written(digit_store))
    job.terminate()
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 143, complaint
    assert "stopped by SIGTERM; run the same command again to go on" in complaint
    assert "the parts that run" in complaint
    assert before < len(written(digit_store)) <= before + 5  # those that ran, and some that ended in between
    assert not list(Path(digit_store.url).rglob("*.tmp"))
    assert json.loads(Path(digit_store.path(schema.lease_path(1))).read_text())["given_back"] is True
    require_undisturbed_rerun(digit_store, undisturbed, arguments)


def test_a_second_sigterm_stops_at_once(
    digit_store: Store, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setitem(ENVIRONMENT, "DYNAMS_TEST_MARKER", str(marker))
    job = start(command(digit_store, checkpoint, "--workers", "1", transform="very_slow_gray"))
    until(marker.exists)
    job.terminate()
    assert job.stderr is not None
    while "SIGTERM" not in (line := job.stderr.readline()):
        assert line, "it ended without a word"
    job.terminate()
    _, complaint = job.communicate(timeout=25)  # a part takes longer, and so does the grace with what follows it
    assert job.returncode == 143, complaint
    assert written(digit_store) == {}
    assert current_holder(digit_store) is None


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven_store(tmp_path: Path) -> Store:
    """Parts of 100 samples, and then larger ones, whose tables are twice as large and more."""
    digits = open_source("digits", "", "train")
    shards = write_shards([digits[row] for row in range(600)], tmp_path / "shards", prefix="a", samples_per_shard=100)
    shards += write_shards(
        [digits[row] for row in range(600, 1437)], tmp_path / "shards", prefix="b", samples_per_shard=300
    )
    store = Store(tmp_path / "store")
    build_index(store, shards)
    assert [part.samples for part in store.dataset().parts] == [100] * 6 + [300, 300, 237]
    return store


def test_a_table_that_finds_no_room_is_named(uneven_store: Store, checkpoint: Path, undisturbed: pa.Table) -> None:
    """(No file may be larger than some, as a quota has it. That needs no rights; a real full disk follows.)"""
    arguments = command(uneven_store, checkpoint, "--workers", "1")
    job = start(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)))
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 1, complaint
    assert f"{uneven_store.path(schema.scores_path(1, 6))}: no room to write it (File too large)" in complaint
    assert "free some space or raise the quota, then run the same command again: what is done is kept" in complaint
    folder = Path(uneven_store.path(schema.scores_folder(1)))
    assert sorted(path.name for path in folder.iterdir()) == [f"part-{part:06d}.parquet" for part in range(6)]
    assert finish(arguments)["resumed_parts"] == 6
    assert tables(uneven_store, 1).drop_columns(["shard", "row"]).equals(undisturbed.drop_columns(["shard", "row"]))


ON_A_FULL_DISK = """
set -e
store=$1; copy=$2; shift 2
mkdir "$copy"; cp -a "$store/." "$copy"
mount -t tmpfs -o size=1m none "$store"
cp -a "$copy/." "$store"
free=$(df --output=avail -B1 "$store" | tail -1)
head -c $((free - 49152)) /dev/zero > "$store/ballast"
set +e
"$@"; echo "exit $?"
ls -A "$store/rounds/000001/scores"
rm "$store/ballast"
"$@"; echo "exit $?"
rm -r "$copy"; cp -a "$store" "$copy"
"""


def test_a_full_disk(digit_store: Store, checkpoint: Path, undisturbed: pa.Table, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here, not even in a namespace of one's own")
    copy = tmp_path / "copy"
    job = ["unshare", "-rm", "sh", "-c", ON_A_FULL_DISK, "sh", digit_store.url, str(copy)]
    done = subprocess.run(
        [*job, *command(digit_store, checkpoint, "--workers", "1")],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert "no room to write it (No space left on device)" in done.stderr, done.stderr
    first, *there, second, last = done.stdout.splitlines()
    assert (first, last) == ("exit 1", "exit 0")
    assert there == [f"part-{part:06d}.parquet" for part in range(len(there))]  # whole ones, and nothing else
    assert 0 < len(there) < PARTS
    assert json.loads(second)["resumed_parts"] == len(there)
    assert tables(Store(copy), 1).equals(undisturbed)


# ---- a checkpoint that is replaced -----------------------------------------------------------------------------------


def test_a_checkpoint_replaced_during_the_job(
    digit_store: Store, checkpoint: Path, undisturbed: pa.Table, client: Client
) -> None:
    arguments = command(digit_store, checkpoint, "--workers", "1")
    old = checkpoint.read_bytes()
    job = start(arguments)
    until(lambda: len(written(digit_store)) >= 2)
    new = checkpoint.with_name("new.pt")
    torch.save(toy_models.linear(seed=1).state_dict(), new)
    os.replace(new, checkpoint)
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 1, complaint
    assert f"{checkpoint} was replaced while the job ran (its SHA-256 was " in complaint
    done = written(digit_store)
    assert 2 <= len(done) < PARTS
    assert tables(digit_store, 1).equals(undisturbed.slice(0, tables(digit_store, 1).num_rows))  # of the old ones alone
    assert (finish(arguments)["round"], written(digit_store)) == (2, done)
    assert tables(digit_store, 2)["key"].equals(undisturbed["key"])
    assert not tables(digit_store, 2)["distance"].equals(undisturbed["distance"])
    assert len({str(part.identity) for part in finished_parts(digit_store, 2).values()}) == 1
    checkpoint.write_bytes(old)  # the old round can still be finished
    again = finish(arguments)
    assert (again["round"], again["resumed_parts"]) == (1, len(done))
    assert tables(digit_store, 1).equals(undisturbed)


def test_a_removed_checkpoint_goes_on_in_memory_and_touching_one_does_no_harm(checkpoint: Path, tmp_path: Path) -> None:
    digest = checkpoint_digest(str(checkpoint))
    scorer = worker_scorer(SPEC, str(checkpoint), digest, "cpu")
    checkpoint.touch()
    touched = worker_scorer(SPEC, str(checkpoint), digest, "cpu")
    assert touched is not scorer
    checkpoint.rename(tmp_path / "away.pt")
    assert worker_scorer(SPEC, str(checkpoint), digest, "cpu") is touched
    torch.save(toy_models.linear(seed=1).state_dict(), checkpoint)
    with pytest.raises(CheckpointError, match="was replaced while the job ran"):
        worker_scorer(SPEC, str(checkpoint), digest, "cpu")
