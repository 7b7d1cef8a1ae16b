"""DynamicSelection: rounds on time, failures that do not end a training, background rounds, ranks, states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client

import toy_models
from dynams_stream import LinearSchedule, ParameterSharingProxy, ScorerSpec, SelectedDataset, Store
from dynams_stream.errors import HeadError, ModelError, ScoringError, StateError, UsageError
from dynams_stream.selection import selected_count
from pipeline import DynamicSelection, dynamic_selection

SLIM = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)
SCHEDULE = LinearSchedule(7, warmup=2, anneal=1, interval=2, final=0.2)  # rounds at 2 (0.6) and 4 (0.2)
COUNTS = [1437, 1437, 863, 863, 288, 288, 1437]


@pytest.fixture
def network() -> ParameterSharingProxy:
    torch.manual_seed(0)
    return ParameterSharingProxy(toy_models.small_cnn(), width=0.5)


def train(selection: DynamicSelection, network: ParameterSharingProxy, epochs: Any) -> list[int | None]:
    """Begin epochs, with weights that move in between."""
    rounds = []
    for epoch in epochs:
        rounds.append(selection.begin_epoch(epoch, network))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        selection.wait()
    return rounds


def test_rounds_come_when_the_schedule_says(digit_store: Store, network: ParameterSharingProxy, client: Client) -> None:
    dataset = SelectedDataset(digit_store, batch_size=50)
    selection = DynamicSelection(digit_store, SLIM, SCHEDULE, dataset=dataset, client=client, least_overlap=0)
    counts, rounds = [], []
    for epoch in range(7):
        rounds += train(selection, network, [epoch])
        assert selection.round(epoch) == rounds[-1]
        counts.append(len(list(dataset)))
    assert rounds == [None, None, 1, 1, 2, 2, None]
    assert counts == COUNTS
    assert [one.epoch for one in digit_store.rounds()] == [2, 4]
    assert [selection.trains_proxy(epoch) for epoch in range(7)] == [True] * 4 + [False] * 3
    assert selection.failures == []


def test_a_warm_up_on_random_samples_draws_anew_for_each_epoch(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    schedule = LinearSchedule(5, warmup=2, anneal=1, interval=2, final=0.2, warmup_fraction=0.1)
    dataset = SelectedDataset(digit_store, batch_size=50)
    selection = DynamicSelection(digit_store, SLIM, schedule, dataset=dataset, client=client, least_overlap=0)
    seen = []
    for epoch in range(5):
        train(selection, network, [epoch])
        seen.append({(sample["__url__"], sample["__row__"]) for sample in dataset})
    assert [len(one) for one in seen] == [144, 144, 288, 288, 1437]
    assert seen[0] != seen[1]
    rounds = digit_store.rounds()
    assert [one.manifest["strategy"] for one in rounds] == ["random:0", "random:1", "distance"]
    assert [one.epoch for one in rounds[2:]] == [2]
    assert selection.failures == []


def test_background_rounds_are_ready_when_they_are_due(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    dataset = SelectedDataset(digit_store, batch_size=50)
    selection = DynamicSelection(
        digit_store, SLIM, SCHEDULE, dataset=dataset, client=client, background=True, least_overlap=0
    )
    counts, rounds = [], []
    for epoch in range(7):
        rounds += train(selection, network, [epoch])
        counts.append(len(list(dataset)))
    assert rounds == [None, None, 1, 1, 2, 2, None]
    assert counts == COUNTS, "the schedule is kept"
    assert [one.epoch for one in digit_store.rounds()] == [1, 3], "with the weights of an epoch before"


def test_a_late_round_leaves_the_last_selection_and_is_cut_to_the_fraction_of_the_epoch_that_takes_it_up(
    digit_store: Store,
    network: ParameterSharingProxy,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedule = LinearSchedule(6, warmup=1, final=0.2)  # 0.84, 0.68, 0.52, 0.36, 0.2
    held = threading.Event()
    make_round = dynamic_selection.make_round

    def slow(*arguments: Any, **options: Any) -> Any:
        assert held.wait(60)
        return make_round(*arguments, **options)

    monkeypatch.setattr(dynamic_selection, "make_round", slow)
    dataset = SelectedDataset(digit_store, batch_size=50)
    selection = DynamicSelection(
        digit_store, SLIM, schedule, dataset=dataset, client=client, background=True, least_overlap=0
    )
    assert [selection.begin_epoch(epoch, network) for epoch in range(3)] == [None, None, None]
    assert len(dataset) == 1437
    assert "not ready" in caplog.text
    held.set()
    assert selection.wait(60)
    number = selection.begin_epoch(3, network)
    assert number is not None
    assert len(dataset) == selected_count(schedule.fraction(3), 1437)
    assert digit_store.round(number).manifest["scores_of"] == 1, "cut again from the same scores"
    assert selection.wait(60)
    assert selection.begin_epoch(4, network) == number + 1
    assert len(dataset) == selected_count(schedule.fraction(4), 1437)


def shard_of(store: Store) -> Path:
    return Path(store.dataset().urls[3])


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_round_keeps_the_last_selection_and_says_so(
    digit_store: Store,
    network: ParameterSharingProxy,
    client: Client,
    background: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedule = LinearSchedule(5, warmup=1, final=0.2)
    selection = DynamicSelection(digit_store, SLIM, schedule, client=client, background=background, least_overlap=0)
    assert train(selection, network, [0, 1]) == [None, 1]
    selection.wait()
    hidden = shard_of(digit_store).rename(shard_of(digit_store).with_suffix(".hidden"))
    try:
        kept = train(selection, network, [2, 3])
    finally:
        hidden.rename(hidden.with_suffix(".tar"))
    first = 2 if background else 1  # the round of epoch 2 was ready before the shard went
    assert kept == [first, first]
    assert "training goes on with round" in caplog.text
    assert hidden.with_suffix(".tar").name in selection.failures[0]
    selection.wait()
    again = train(selection, network, [4])
    assert again[0] is not None
    if not background:  # in the background the round of epoch 4 was begun, and failed, in epoch 3
        assert again[0] > first
    else:
        assert again == [first]


def test_before_the_first_round_a_failure_trains_on_everything(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    dataset = SelectedDataset(digit_store, batch_size=50)
    hidden = shard_of(digit_store).rename(shard_of(digit_store).with_suffix(".hidden"))
    try:
        keeping = DynamicSelection(digit_store, SLIM, LinearSchedule(3, final=0.2), dataset=dataset, client=client)
        assert keeping.begin_epoch(0, network) is None
        assert "training goes on with everything" in keeping.failures[0]
        assert len(dataset) == 1437
        raising = DynamicSelection(digit_store, SLIM, LinearSchedule(3, final=0.2), client=client, on_failure="raise")
        with pytest.raises(ScoringError, match=r"train-000003\.tar: no such file"):
            raising.begin_epoch(0, network)
    finally:
        hidden.rename(hidden.with_suffix(".tar"))


def test_what_cannot_mend_itself_is_raised_even_so(digit_store: Store, client: Client) -> None:
    selection = DynamicSelection(digit_store, SLIM, LinearSchedule(3, final=0.2), client=client)
    with pytest.raises(ModelError, match="needs the weights of a ParameterSharingProxy"):
        selection.begin_epoch(0, toy_models.small_cnn())
    for wrong, message in [
        ({"stratgy": "distance"}, "no option 'stratgy'"),
        ({"strategy": "distanse"}, "no score column 'distanse'"),
        ({"fallback": "half"}, "fallback is 'half'"),
        ({"on_failure": "ignore"}, "on_failure is 'ignore'"),
    ]:
        with pytest.raises(UsageError, match=message):
            DynamicSelection(digit_store, SLIM, SCHEDULE, **wrong)  # type: ignore[arg-type]


def test_in_the_background_too_only_what_cannot_mend_itself_is_raised(
    digit_store: Store, network: ParameterSharingProxy, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = LinearSchedule(4, warmup=1, final=0.2)

    def failing(error: Exception) -> DynamicSelection:
        def fail(*arguments: Any, **options: Any) -> Any:
            raise error

        monkeypatch.setattr(dynamic_selection, "make_round", fail)
        selection = DynamicSelection(digit_store, SLIM, schedule, client=client, background=True)
        selection.begin_epoch(0, network)
        selection.wait()
        return selection

    with pytest.raises(ModelError, match="HeadError: no head"):
        failing(HeadError("no head")).begin_epoch(1, network)
    keeping = failing(OSError("disk full"))
    assert keeping.begin_epoch(1, network) is None
    assert "disk full" in keeping.failures[0]


def test_weights_that_cannot_be_saved_early_do_not_end_the_run(
    digit_store: Store, network: ParameterSharingProxy, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(dynamic_selection, "save_for_workers", full)
    schedule = LinearSchedule(3, warmup=1, final=0.2)
    selection = DynamicSelection(digit_store, SLIM, schedule, client=client, background=True, least_overlap=0)
    assert selection.begin_epoch(0, network) is None
    assert "no space left" in selection.failures[0]
    monkeypatch.undo()
    assert selection.begin_epoch(1, network) == 1, "made when it is due, since none was begun early"


def test_a_run_that_goes_on_makes_no_round_twice(
    digit_store: Store, network: ParameterSharingProxy, client: Client
) -> None:
    def selection() -> DynamicSelection:
        return DynamicSelection(digit_store, SLIM, SCHEDULE, client=client, least_overlap=0)

    first = selection()
    assert train(first, network, range(3)) == [None, None, 1]
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {"version": 1, "epoch": 2, "round": 1}
    resumed = selection()
    resumed.load_state_dict(state)
    assert train(resumed, network, [2, 3]) == [1, 1], "other weights by now, and still epoch 2's own round"
    assert train(resumed, network, [4]) == [2]
    assert len(digit_store.rounds()) == 2
    with pytest.raises(StateError, match="no state of DynamicSelection"):
        resumed.load_state_dict({"epoch": 2})


RANKS = """
import json, os, sys, torch, torch.distributed as dist, toy_models
from pathlib import Path
from dynams_stream import LinearSchedule, ParameterSharingProxy, ScorerSpec, SelectedDataset, Store
from pipeline import DynamicSelection
rank, store, background = int(sys.argv[1]), Store(sys.argv[2]), sys.argv[4] == "True"
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=2)
torch.manual_seed(0)
network = ParameterSharingProxy(toy_models.small_cnn(), width=0.5)
spec = ScorerSpec(model="toy_models:small_cnn", input="png", label="cls", transform="toy_models:gray", width=0.5)
dataset = SelectedDataset(store, batch_size=50)
selection = DynamicSelection(store, spec, LinearSchedule(5, warmup=1, final=0.2), dataset=dataset, workers=1,
                             background=background, least_overlap=0, deadline=100)
rounds, counts, hidden = [], [], None
for epoch in range(5):
    rounds.append(selection.begin_epoch(epoch, network))
    selection.wait()
    dist.barrier()
    counts.append(len(list(dataset)))
    if epoch == 2 and rank == 0:
        hidden = Path(store.dataset().urls[3]); hidden.rename(hidden.with_suffix(".hidden"))
    if epoch == 3 and rank == 0:
        hidden.with_suffix(".hidden").rename(hidden)
    dist.barrier()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))
print(json.dumps({"rounds": rounds, "counts": counts, "failures": len(selection.failures)}))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_ranks_take_up_the_same_rounds_and_keep_the_same_after_a_failure(
    digit_store: Store, tmp_path: Path, background: bool
) -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
    arguments = [digit_store.url, f"file://{tmp_path}/meet", str(background)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=250) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert first["rounds"] == second["rounds"]
    assert first["counts"] == second["counts"]
    assert first["counts"][0] == 1437 // 2
    assert first["failures"] == second["failures"] == 1
    rounds = first["rounds"]
    assert rounds[0] is None
    kept = 4 if background else 3  # the round that failed was begun while the shard was away
    assert rounds[kept] == rounds[kept - 1]
    assert len(set(rounds)) == 4
