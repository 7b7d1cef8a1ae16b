"""Real ranks over gloo: equal steps, one round for all, a rank killed in mid-epoch and the run resumed on one fewer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import stream_stores
from test_stream import expected_order

from dynams_stream.store import Store

COUNTS = (13, 0, 21, 9, 17)

Pair = tuple[int, int]

TRAINING = """
    import json, os, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader
    from dynams_stream.stream import SelectedDataset

    def identity(sample):
        return int(sample["__url__"][-7:-4]), sample["__row__"]

    def main(options):
        rank, ranks, folder = options["rank"], options["ranks"], options["folder"]
        meet = f"file://{folder}/meet-{options['name']}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
        dataset = SelectedDataset(options["store"], batch_size=options["batch"]).map(identity)
        workers = {"num_workers": options["workers"]}
        if options["workers"]:
            workers |= {"multiprocessing_context": options["method"], "persistent_workers": options["persistent"]}
        loader = DataLoader(dataset, batch_size=options["batch"], collate_fn=list, **workers)
        step = 0
        if options["state"]:
            dataset.load_state_dict(options["state"])
            step = options["state"]["steps"]
        with open(f"{folder}/{options['name']}-{rank}.jsonl", "a", buffering=1) as log:
            for epoch in range(options["state"]["epoch"] if options["state"] else 0, options["epochs"]):
                dataset.set_epoch(epoch)
                for batch in loader:
                    step += 1
                    dist.all_reduce(torch.ones(1))  # a step that all ranks take together
                    log.write(json.dumps([epoch, step, batch]) + "\\n")
                    if rank == 0:
                        with open(f"{folder}/state.tmp", "w") as file:
                            json.dump(dataset.state_dict(step), file)
                        os.replace(f"{folder}/state.tmp", f"{folder}/state.json")
                    if (rank, epoch, step) == tuple(options["dies"] or ()):
                        os.kill(os.getpid(), 9)
                step = 0
        dist.destroy_process_group()

    if __name__ == "__main__":
        main(json.loads(sys.argv[1]))
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return stream_stores.make_store(tmp_path / "data", COUNTS)


def start(program: str, folder: Path, ranks: int, **options: Any) -> list[subprocess.Popen[bytes]]:
    """Processes that run a program, one for each rank."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return [
        subprocess.Popen(
            [sys.executable, str(path), json.dumps({"rank": rank, "ranks": ranks, "folder": str(folder), **options})],
            env=environment,
            stderr=open(folder / f"stderr-{rank}", "w"),
        )
        for rank in range(ranks)
    ]


def ended(processes: list[subprocess.Popen[bytes]], seconds: float = 120) -> list[int]:
    """Exit statuses; kills what does not end in time."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    late = [process for process in processes if process.poll() is None]
    for process in late:
        process.kill()
    assert not late, "some ranks did not end"
    return [process.wait() for process in processes]


def consumed(folder: Path, name: str, ranks: int, epoch: int) -> list[list[list[Pair]]]:
    """Each rank's batches of an epoch."""
    found = []
    for rank in range(ranks):
        lines = [json.loads(line) for line in (folder / f"{name}-{rank}.jsonl").read_text().splitlines()]
        found.append([[tuple(pair) for pair in batch] for of, _, batch in lines if of == epoch])
    return found


def in_order(per_rank: list[list[list[Pair]]]) -> list[Pair]:
    """All samples in the order of their positions."""
    flat = [[sample for batch in batches for sample in batch] for batches in per_rank]
    return [samples[i] for i in range(max(map(len, flat))) for samples in flat if i < len(samples)]


@pytest.mark.parametrize(
    ("ranks", "workers", "method", "persistent"),
    [(2, 2, "fork", True), (3, 1, "spawn", False), (2, 1, "forkserver", True), (3, 0, "", False)],
)
def test_ranks_take_equal_steps_through_the_whole_order(
    store: Store, tmp_path: Path, ranks: int, workers: int, method: str, persistent: bool
) -> None:
    rows = stream_stores.some_rows(store, 0.6)
    stream_stores.publish(store, rows)
    options = {"workers": workers, "method": method, "persistent": persistent, "batch": 3, "epochs": 2}
    run = start(TRAINING, tmp_path, ranks, name="whole", store=store.url, state=None, dies=None, **options)
    assert ended(run) == [0] * ranks
    for epoch in range(2):
        per_rank = consumed(tmp_path, "whole", ranks, epoch)
        assert len({len(batches) for batches in per_rank}) == 1
        order = expected_order(rows, epoch=epoch)
        assert in_order(per_rank) == order[: len(order) - len(order) % ranks]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (0, "")])
def test_a_killed_rank_and_a_resume_on_one_rank_fewer_lose_nothing(
    store: Store, tmp_path: Path, workers: int, method: str
) -> None:
    rows = stream_stores.some_rows(store, 0.9)
    stream_stores.publish(store, rows)
    options = {"workers": workers, "method": method, "persistent": False, "epochs": 2, "store": store.url}
    run = start(TRAINING, tmp_path, 3, name="first", batch=2, state=None, dies=[2, 1, 4], **options)
    statuses = ended(run)
    assert statuses[2] == -signal.SIGKILL
    assert all(status != 0 for status in statuses)  # the others fail at the next step, they do not hang
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["epoch"], state["samples"]) == (1, 6 * state["steps"])
    stream_stores.publish(store, stream_stores.some_rows(store, 0.3, 7))  # the state's round counts, not the newest
    run = start(TRAINING, tmp_path, 2, name="second", batch=3, state=state, dies=None, **options)
    assert ended(run) == [0, 0]
    order = expected_order(rows, epoch=1)
    before = in_order([batches[: state["steps"]] for batches in consumed(tmp_path, "first", 3, 1)])
    after = in_order(consumed(tmp_path, "second", 2, 1))
    left_out = (len(order) - state["samples"]) % 2
    assert before + after == order[: len(order) - left_out]


DISAGREEING = """
    import json, sys
    import torch.distributed as dist
    from dynams_stream.errors import StateError
    from dynams_stream.stream import SelectedDataset

    options = json.loads(sys.argv[1])
    rank, folder = options["rank"], options["folder"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options["ranks"])
    told = []
    dataset = SelectedDataset(options["store"], batch_size=2)
    for arguments in (
        {"epoch": 1, "round": 1 + (rank == 1)},
        {"epoch": 1 + (rank == 1)},
        {"epoch": 1, "round": "latest" if rank else 2},
        {"epoch": 3},
    ):
        try:
            dataset.set_epoch(**arguments)
            told.append(dataset.state_dict()["round"])
        except StateError as error:
            told.append(str(error))
    if rank == 1:
        dataset.load_state_dict({**dataset.state_dict(), "samples": 4, "steps": 1})
    try:
        dataset.set_epoch(3)
    except StateError as error:
        told.append(str(error))
    try:
        SelectedDataset(options["store"], seed=rank)
    except StateError as error:
        told.append(str(error))
    json.dump(told, open(f"{folder}/{rank}.json", "w"))
    dist.destroy_process_group()
"""


def test_ranks_that_were_told_different_things_all_say_so(store: Store, tmp_path: Path) -> None:
    for fraction in (0.5, 0.4):
        stream_stores.publish(store, stream_stores.some_rows(store, fraction))
    assert ended(start(DISAGREEING, tmp_path, 3, store=store.url)) == [0, 0, 0], (tmp_path / "stderr-0").read_text()
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert told[0] == told[1] == told[2]
    assert told[0] == [
        "rank 1 was given round = 2, rank 0 1; give all ranks the same",
        "rank 1 was given epoch = 2, rank 0 1; give all ranks the same",
        "rank 1 was given round = 'latest', rank 0 2; give all ranks the same",
        2,
        "rank 1 was given position = 4, rank 0 0; give all ranks the same",
        "rank 1 was given seed = 1, rank 0 0; give all ranks the same",
    ]
