"""The local cluster: it answers, it needs no main guard, and it ends with its parent however that one ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from distributed import Client

from dynams_stream.errors import UsageError
from pipeline.cluster import dask_client, worker_threads

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
        pytest.raises(UsageError, match="cannot reach the Dask scheduler at"),
        dask_client(scheduler="tcp://127.0.0.1:9"),
    ):
        pass
    with pytest.raises(UsageError, match="at least 1; got 0"), dask_client(workers=0):
        pass


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
