"""`dynams gc`: what goes, what stays and why, and that a stop at any point loses nothing that is needed."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import stream_stores
import torch
from distributed import Client
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import toy_models
from dynams_stream import ScorerSpec, SelectedDataset, Store, schema, storage, uses
from dynams_stream.errors import LeaseLostError, RoundNotFoundError, StateError, UsageError
from dynams_stream.uses import read_uses
from pipeline import index_job, run_round, select_job
from pipeline.gc_job import Garbage, collect_garbage, find_garbage, remove_garbage
from pipeline.index_job import build_index
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.verify_job import verify_store
from tools.gc_rounds import app

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")
LATER = timedelta(days=30)


@pytest.fixture(scope="module")
def made(digit_shards: list[str], tmp_path_factory: pytest.TempPathFactory, client: Client) -> Path:
    """Rounds 1 (scored), 2 and 3 (cut from 1's tables), 4 (scored), 5 (random), 6 (of 4's tables); do not change it."""
    folder = tmp_path_factory.mktemp("made")
    store = Store(folder / "store")
    build_index(store, digit_shards)
    for seed in (0, 1):
        torch.save(toy_models.linear(seed).state_dict(), folder / f"{seed}.pt")
    score_round(store, SPEC, checkpoint=str(folder / "0.pt"), client=client)
    for fraction in ("0.5", "0.4", "0.3"):
        select_round(store, fraction=fraction, scores_of=1)
    score_round(store, SPEC, checkpoint=str(folder / "1.pt"), client=client)
    select_round(store, fraction="0.3")
    select_round(store, fraction="0.2", strategy="random:1")
    select_round(store, fraction="0.1", scores_of=4)
    assert [one.number for one in store.rounds()] == [1, 2, 3, 4, 5, 6]
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made, tmp_path / "store")
    return Store(tmp_path / "store")


def later(**by: float) -> datetime:
    return datetime.now(UTC) + timedelta(**by)


def collect(store: Store, keep: int, **by: float) -> Garbage:
    found = find_garbage(store, keep=keep, now=later(**(by or {"days": 30})))
    remove_garbage(store, found)
    return found


@pytest.fixture
def old(store: Store) -> Store:
    """The same rounds, all made a month ago: what a test does to them happens now."""
    ago = later(days=-30)
    for number in store.round_numbers():
        path = Path(store.path(schema.manifest_path(number)))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": ago.isoformat()}))
    for path in Path(store.url).rglob("*"):
        os.utime(path, (ago.timestamp(), ago.timestamp()))
    return store


def files(store: Store) -> list[str]:
    """All but leases, which each job leaves."""
    root = Path(store.url)
    found = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(path for path in found if not path.startswith(schema.LEASE_FOLDER))


def numbers(store: Store) -> list[int]:
    return [one.number for one in store.rounds()]


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (1, [4, 6]),
        (2, [4, 5, 6]),
        (3, [4, 5, 6]),
        (4, [1, 3, 4, 5, 6]),
        (5, [1, 2, 3, 4, 5, 6]),
        (99, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_newest_stay_and_what_they_were_cut_from(store: Store, keep: int, stay: list[int]) -> None:
    before = {number: list(SelectedDataset(store, round=number, shuffle=False)) for number in stay}
    shutil.rmtree(store.path(schema.USES_FOLDER))
    found = collect(store, keep)
    assert list(found.rounds) == sorted({1, 2, 3, 4, 5, 6} - set(stay))
    assert numbers(store) == stay
    verified = verify_store(store)
    assert (verified.problems, verified.orphans, verified.unfinished) == ((), (), ())
    assert {number: list(SelectedDataset(store, round=number, shuffle=False)) for number in stay} == before
    for number in found.rounds:
        assert not os.path.exists(store.path(schema.round_path(number)))
        with pytest.raises(RoundNotFoundError):
            store.round(number)
    assert collect(store, keep).rounds == ()


def test_a_removed_rounds_number_is_never_taken_again(store: Store, made: Path, client: Client) -> None:
    collect(store, 1)
    again = score_round(store, SPEC, checkpoint=str(made.parent / "0.pt"), client=client)
    assert (again.number, again.resumed_parts) == (7, 0)
    cut = select_round(store, fraction="0.5", scores_of=7).round
    original = Store(made).round(1)
    assert cut.number == 7
    assert cut.manifest["selection"] == original.manifest["selection"]


# ---- loaders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_round_of_a_running_epoch_stays_and_the_epoch_ends_whole(store: Store, workers: int) -> None:
    dataset = SelectedDataset(store, round=2, batch_size=16).map(lambda sample: (sample["__url__"], sample["__row__"]))
    loader = DataLoader(
        dataset,
        batch_size=16,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="fork" if workers else None,
    )
    running = iter(loader)
    seen = [*next(running)]
    found = collect(store, 1, days=13)
    assert [kept.number for kept in found.kept] == [1, 2, 4]
    assert "saved state" in found.kept[1].why
    for batch in running:
        seen += batch
    assert len(seen) == len(set(seen)) == len(dataset)
    assert collect(store, 1, days=15).rounds == (1, 2)


def test_a_saved_state_keeps_its_round_until_it_is_forgotten(store: Store) -> None:
    dataset = SelectedDataset(store, round=3, batch_size=16)
    state = dataset.state_dict(steps=2)
    (use,) = read_uses(store)
    assert (use.round, use.version) == (3, 1)
    collect(store, 1, days=13)
    restored = SelectedDataset(store, batch_size=16)
    restored.load_state_dict(state)
    assert len(list(restored)) == store.round(3).counts["selected"] - 32
    shutil.rmtree(store.path(schema.USES_FOLDER))
    collect(store, 1, days=13)
    with pytest.raises(StateError, match="round 3, which is not there"):
        SelectedDataset(store, batch_size=16).load_state_dict(state)


def test_marks_are_few_and_go_when_they_are_old(store: Store) -> None:
    dataset = SelectedDataset(store)
    for epoch in range(3):
        dataset.set_epoch(epoch, round=6)
        list(dataset)
    dataset.set_epoch(3, round=5)
    list(dataset)
    list(SelectedDataset(store, round=None))
    assert sorted((use.round, use.version) for use in read_uses(store)) == [(0, 1), (5, 1), (6, 1)]
    assert all(use.who.endswith(f":{os.getpid()}") for use in read_uses(store))
    assert len(collect(store, 1).files) == 3
    assert list(read_uses(store)) == []


def test_only_rank_0_leaves_marks(store: Store) -> None:
    list(SelectedDataset(store, rank=1, world_size=2))
    assert list(read_uses(store)) == []


def test_a_store_that_cannot_be_written_is_read_all_the_same(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    Path(store.path(schema.USES_FOLDER)).write_text("a file, where marks would have their folder")
    dataset = SelectedDataset(store, round=6)
    for epoch in range(2):
        dataset.set_epoch(epoch, round=6 - epoch)
        assert len(list(dataset)) == store.round(6 - epoch).counts["selected"]
    (warning,) = (record for record in caplog.records if "no mark could be left" in record.message)
    assert "`dynams gc` does not know that round 6 is read" in warning.message


def test_a_mark_that_failed_is_left_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacle = Path(store.path(schema.USES_FOLDER))
    obstacle.write_text("a file, where marks would have their folder")
    waiting = SelectedDataset(store, round=6)
    assert list(waiting)
    monkeypatch.setattr(uses, "TRY_AGAIN_AFTER", 0.0)
    trying = SelectedDataset(store, round=5)
    assert list(trying)
    obstacle.unlink()
    assert list(waiting)  # a write that takes long to fail is not tried for each batch
    assert list(read_uses(store)) == []
    assert list(trying)
    assert [use.round for use in read_uses(store)] == [5]


def test_an_epoch_that_takes_long_marks_its_round_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "AGAIN_AFTER", 0.0)
    running = iter(SelectedDataset(store, round=1))
    next(running)
    shutil.rmtree(store.path(schema.USES_FOLDER))
    assert len(list(running)) == store.round(1).counts["selected"] - 1
    assert [use.round for use in read_uses(store)] == [1]


def test_a_loader_that_begins_while_garbage_is_removed_keeps_its_round(old: Store) -> None:
    found = find_garbage(old, keep=1)
    running = iter(SelectedDataset(old, round=2))
    seen = [next(running)]
    removed = remove_garbage(old, found)
    assert (found.rounds, removed.rounds) == ((1, 2, 3, 5), (3, 5))
    why = {kept.number: kept.why for kept in removed.kept}
    assert "in this moment" in why[2]
    assert why[1] == "round 2 is cut from its score tables"
    assert len([*seen, *running]) == old.round(2).counts["selected"]
    assert old.retired() == {3, 5}
    assert verify_store(old).problems == ()


def test_a_round_that_was_the_newest_until_lately_stays(store: Store) -> None:
    found = find_garbage(store, keep=1, now=later(minutes=30))
    assert found.rounds == ()
    assert "was the newest round until 30 min ago" in found.kept[0].why
    assert find_garbage(store, keep=1, now=later(minutes=90)).rounds == (1, 2, 3, 5)


# ---- selections ------------------------------------------------------------------------------------------------------


def test_a_selection_that_was_published_meanwhile_keeps_its_score_tables(old: Store) -> None:
    found = find_garbage(old, keep=1)
    assert select_round(old, fraction="0.1", scores_of=1).round.number == 7
    removed = remove_garbage(old, found)
    assert removed.rounds == (2, 3, 5)
    assert numbers(old) == [1, 4, 6, 7]
    assert verify_store(old).problems == ()


def test_a_selection_that_has_begun_meanwhile_keeps_its_score_tables(
    old: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, cut = find_garbage(old, keep=1), select_job.exact_cut

    def cut_later(*parts: Any, **options: Any) -> Any:
        assert remove_garbage(old, found).rounds == (2, 3, 5)
        return cut(*parts, **options)

    monkeypatch.setattr(select_job, "exact_cut", cut_later)
    assert select_round(old, fraction="0.1", scores_of=1).round.number == 7
    assert verify_store(old).problems == ()


def test_a_selection_that_comes_too_late_says_so(old: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = select_job.complete_parts

    def look_up_before(*arguments: Any) -> Any:
        parts = look_up(*arguments)
        assert collect_garbage(old, keep=1).rounds == (1, 2, 3, 5)
        return parts

    monkeypatch.setattr(select_job, "complete_parts", look_up_before)
    with pytest.raises(RoundNotFoundError, match="removes round 1, or has removed it; run the same command again"):
        select_round(old, fraction="0.1", scores_of=1)
    with pytest.raises(RoundNotFoundError, match="holds no round 1"):
        select_round(old, fraction="0.1", scores_of=1)
    assert numbers(old) == [4, 6]
    assert [kept.number for kept in find_garbage(old, keep=1).kept] == [4]  # what it had claimed keeps nothing
    assert verify_store(old).problems == ()


def test_an_unpublished_round_that_a_selection_goes_on_with_stays(old: Store) -> None:
    intent = {"dataset": old.dataset().digest, "scores_of": 4, "strategy": "entropy", "fraction": 0.25}
    number = old.claim_round(intent)
    os.utime(old.path(schema.claim_path(number)), (1, 1))
    found = find_garbage(old, keep=99)
    assert found.abandoned == (number,)
    storage.write_bytes(old.path(schema.selection_path(number)), b"just cut")
    removed = remove_garbage(old, found)
    assert (removed.abandoned, old.retired()) == ((), set())
    assert list(old.claims(but=range(number))) == [number]


def test_retired_rounds_of_a_run_that_was_stopped_before_it_looked_again_are_taken_back(old: Store) -> None:
    old.retire(1)
    old.retire(4)
    assert collect_garbage(old, keep=3).rounds == (1, 2, 3)
    assert old.retired() == {1, 2, 3}


def test_who_lost_the_lease_removes_nothing_more(old: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = storage.remove

    def overtaken(url: str) -> None:
        if url == old.path(schema.manifest_path(5)):
            folder = Path(old.path(schema.LEASE_FOLDER))
            newest = max(folder.iterdir())
            shutil.copy(newest, folder / f"{int(newest.stem) + 1:06d}.json")
        remove(url)

    monkeypatch.setattr(storage, "remove", overtaken)
    with pytest.raises(LeaseLostError):
        collect_garbage(old, keep=1)
    assert numbers(old) == [1, 2, 3, 4, 6]
    assert old.retired() == {5}


# ---- what is left of jobs --------------------------------------------------------------------------------------------


def test_a_round_that_was_cut_and_never_published_is_abandoned_too(store: Store) -> None:
    number = store.claim_round({"some": "job"})
    for path in (schema.selection_path(number), schema.excluded_path(number), schema.scores_path(number, 0)):
        storage.write_bytes(store.path(path), b"x")
    assert collect(store, 99).abandoned == (number,)
    assert not os.path.exists(store.path(schema.round_path(number)))


def test_claims_without_files_go_as_well(store: Store) -> None:
    number = store.claim_round({"some": "job"})
    assert collect(store, 99, days=13).abandoned == ()
    assert collect(store, 99, days=15).abandoned == (number,)
    assert not storage.exists(store.path(schema.claim_path(number)))


def test_score_tables_that_are_being_cut_stay(store: Store) -> None:
    intent = {"dataset": store.dataset().digest, "scores_of": 1, "strategy": "entropy", "fraction": 0.25}
    number = store.claim_round(intent)
    kept = {one.number: one.why for one in collect(store, 1, days=13).kept}
    assert kept[1] == f"round {number}, which is not published yet, is cut from its score tables"
    assert select_round(store, fraction="0.25", strategy="entropy", scores_of=1).round.number == number
    assert 1 in numbers(store)


def test_what_a_store_cannot_date_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(store.path("index/part-000000-0123456789ab.parquet"), b"x")
    monkeypatch.setattr(storage, "modified", lambda url: 0.0)
    assert find_garbage(store, keep=99, now=later(days=99)).files == ()


def test_weights_are_known_by_name_wherever_the_store_lies(digit_store: Store, client: Client, tmp_path: Path) -> None:
    run_round(digit_store, SPEC, weights=toy_models.linear(), fraction="0.5", client=client)
    moved = Store(shutil.move(digit_store.url, tmp_path / "moved"))
    assert collect(moved, 1).files == ()
    assert len(storage.list_names(moved.path(schema.WEIGHTS_FOLDER))) == 1


def test_an_unpublished_round_stays_until_it_is_abandoned(store: Store, made: Path) -> None:
    identity = {"some": "job"}
    number = store.claim_round(identity)
    storage.write_bytes(store.path(schema.scores_path(number, 0)), b"a part")
    assert find_garbage(store, keep=1, now=later(days=13)).abandoned == ()
    found = collect(store, 1, days=15)
    assert found.abandoned == (number,)
    assert number not in store.claims()
    assert number not in store.round_numbers()
    assert store.claim_round(identity) == number + 1


def test_old_dataset_versions_go_with_their_last_round(digit_shards: list[str], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    build_index(store, digit_shards[:5])
    select_round(store, fraction="0.5", strategy="random:0")
    build_index(store, digit_shards[1:7])
    select_round(store, fraction="0.5", strategy="random:0")
    list(SelectedDataset(store, round=None))
    found = find_garbage(store, keep=1, now=later(days=1))
    assert (found.rounds, found.versions) == ((1,), (1,))
    own = {part.index_file for part in store.dataset(1).parts} - {part.index_file for part in store.dataset(2).parts}
    assert own
    assert found.files == ()
    remove_garbage(store, found)
    assert store.dataset_versions() == [2]
    assert own <= set(collect(store, 1, days=15).files)
    assert set(storage.list_names(store.path(schema.INDEX_FOLDER))) == {
        part.index_file.rsplit("/", 1)[-1] for part in store.dataset().parts
    }
    assert verify_store(store).problems == ()
    assert len(list(SelectedDataset(store, round=2))) == store.round(2).counts["selected"]


@pytest.mark.parametrize("crashed", [False, True])
def test_index_files_that_an_index_job_takes_up_meanwhile_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashed: bool
) -> None:
    """(They are an old version's, or nobody's since an index job was stopped.)"""
    urls = stream_stores.make_shards(tmp_path / "shards", (5, 6, 7, 8))
    store = Store(tmp_path / "store")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if crashed else nullcontext():
        if crashed:
            patch.setattr(index_job, "_publish", stopped)
        build_index(store, urls[:3])
    build_index(store, urls[1:])
    for path in Path(store.url).rglob("*.parquet"):
        os.utime(path, (1, 1))
    found = find_garbage(store, keep=1)
    assert len(found.files) == 3
    dataset = build_index(store, urls[:3]).dataset
    removed = remove_garbage(store, found)
    assert removed.files == ()
    assert verify_store(store).problems == ()
    assert len(list(SelectedDataset(store, round=None))) == dataset.samples == 18


def test_a_version_that_was_the_newest_lately_or_is_selected_from_stays(tmp_path: Path) -> None:
    urls = stream_stores.make_shards(tmp_path / "shards", (5, 6, 7))
    store = Store(tmp_path / "store")
    build_index(store, urls[:2])
    build_index(store, urls)
    assert find_garbage(store, keep=1, now=later(minutes=30)).versions == ()
    assert find_garbage(store, keep=1, now=later(minutes=90)).versions == (1,)
    store.claim_round({"dataset": store.dataset(1).digest, "scores_of": None, "strategy": "random:1", "fraction": 0.5})
    assert find_garbage(store, keep=1, now=later(days=13)).versions == ()
    assert find_garbage(store, keep=1, now=later(days=15)).versions == (1,)


def test_a_version_that_a_loader_reads_whole_stays(digit_shards: list[str], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    build_index(store, digit_shards[:5])
    list(SelectedDataset(store, round=None))
    build_index(store, digit_shards[:7])
    assert find_garbage(store, keep=1, now=later(days=13)).versions == ()
    assert find_garbage(store, keep=1, now=later(days=15)).versions == (1,)


def test_saved_weights_go_with_their_round(digit_store: Store, client: Client) -> None:
    for seed in (0, 1):
        run_round(digit_store, SPEC, weights=toy_models.linear(seed), fraction="0.5", client=client)
    folder = digit_store.path(schema.WEIGHTS_FOLDER)
    assert len(storage.list_names(folder)) == 2
    assert find_garbage(digit_store, keep=1, now=later(days=13)).files == ()  # a job in progress may have saved them
    collect(digit_store, 1)
    assert [storage.join(folder, name) for name in storage.list_names(folder)] == [
        digit_store.round("latest").manifest["checkpoint"]["path"]
    ]


def test_a_stop_at_any_point_leaves_a_sound_store_that_a_rerun_finishes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    """(Each removal in turn is the last one that happens.)"""

    class StoppedError(Exception):
        pass

    whole = Store(shutil.copytree(made, tmp_path / "whole"))
    collect(whole, 1)
    remove, removals, tried = storage.remove, 0, False
    for stop in range(1, 1000):
        store = Store(shutil.copytree(made, tmp_path / f"stopped-{stop}"))
        done = 0

        def counted(url: str) -> None:
            nonlocal done
            done += schema.LEASE_FOLDER not in url
            if done == stop:  # noqa: B023
                raise StoppedError
            remove(url)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "remove", counted)
            try:
                collect(store, 1)
            except StoppedError:
                removals += 1
            else:
                break
        verified = verify_store(store)
        assert verified.problems == ()
        assert {4, 6} <= set(numbers(store))
        if 1 in store.retired() and 1 in store.round_numbers() and not tried:
            tried = True  # nobody goes on in a round that is half removed
            assert score_round(store, SPEC, checkpoint=str(made.parent / "0.pt"), client=client).number == 7
            continue
        collect(store, 1)
        assert files(store) == files(whole)
        shutil.rmtree(store.url)
    assert tried
    assert removals > 10


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(store: Store) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["--store", store.url, *map(str, arguments)])

    before = files(store)
    dry = run("--keep", 1, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    assert (json.loads(dry.stdout)["removed"], json.loads(dry.stdout)["rounds"]) == (False, [])
    assert files(store) == before
    for number in range(1, 7):  # all of them two hours ago
        path = Path(store.path(schema.manifest_path(number)))
        manifest = json.loads(path.read_text())
        manifest["ended"] = later(hours=-2).isoformat()
        path.write_text(json.dumps(manifest))
    told = run("--keep", 1, "--dry-run")
    assert "would remove 4 rounds" in told.stdout
    assert "stays: round 4, round 6 was cut from its score tables" in told.stdout
    assert run("--keep", 1).exit_code == 0
    assert numbers(store) == [4, 6]
    assert run().exit_code == run("--keep", 0).exit_code == 2
    assert isinstance(run("--keep", 1, "--unused-days", 0).exception, UsageError)


def test_the_newest_round_cannot_be_given_up(store: Store) -> None:
    with pytest.raises(UsageError, match="newest round always stays"):
        find_garbage(store, keep=0)


def test_signs_of_use_count_for_two_hours_at_least(store: Store) -> None:
    with pytest.raises(UsageError, match=r"unused_for is 1:00:00; .*less than 2:00:00 \(--unused-days 0.084\)"):
        find_garbage(store, keep=1, unused_for=timedelta(hours=1))
    assert find_garbage(store, keep=1, unused_for=timedelta(days=0.084)).rounds == ()
