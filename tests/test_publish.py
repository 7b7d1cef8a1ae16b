"""Publishing a round in real processes: killed between any two file operations, raced, and watched."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynams_stream import schema, storage
from dynams_stream.cut import ScorePart, exact_cut
from dynams_stream.dataset import Dataset
from dynams_stream.errors import DynamsError, RoundExistsError
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy

FORK = multiprocessing.get_context("fork")
COUNTS = np.array([7, 0, 5, 9, 4], dtype=np.int64)
PARTS = np.array([0, 0, 0, 1, 1], dtype=np.int32)


# ---- a small publisher, as pipeline/ is a large one ------------------------------------------------------------------


def write_dataset(store: Store) -> None:
    shards = len(COUNTS)
    columns = {
        "shard": list(range(shards)),
        "url": [f"/data/{shard}.tar" for shard in range(shards)],
        "bytes": [512] * shards,
        "fingerprint": ["size=512;time=1;head=00000000"] * shards,
        "samples": COUNTS,
        "part": PARTS,
        "index_file": ["index/part.parquet"] * shards,
    }
    with storage.atomic_writer(store.path(schema.dataset_path(1))) as file:
        pq.write_table(pa.table(columns, schema=schema.DATASET_SCHEMA), file)


def distances(seed: int) -> list[list[float]]:
    """Scores with many ties, for each shard."""
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, 6, size=count) / 4).tolist() for count in COUNTS]


def expected_rows(seed: int, fraction: str) -> list[list[int]]:
    everything = [(d, s, r) for s, shard in enumerate(distances(seed)) for r, d in enumerate(shard)]
    chosen = sorted(everything)[: -int(-float(fraction) * len(everything) // 1)]
    return [sorted(r for _, s, r in chosen if s == shard) for shard in range(len(COUNTS))]


def score_parts(store: Store, dataset: Dataset, number: int) -> list[ScorePart]:
    return [
        ScorePart(
            url=store.path(schema.scores_path(number, part.number)),
            number=part.number,
            first_shard=part.first_shard,
            counts=dataset.counts[part.first_shard : part.first_shard + part.shards],
        )
        for part in dataset.parts
    ]


def write_scores(part: ScorePart, seed: int) -> None:
    shards = range(part.first_shard, part.first_shard + len(part.counts))
    rows = [(shard, row) for shard in shards for row in range(COUNTS[shard])]
    columns: dict[str, Any] = {name: [None] * len(rows) for name in schema.SCORES_SCHEMA.names}
    columns |= {"shard": [shard for shard, _ in rows], "row": [row for _, row in rows], "key": ["k"] * len(rows)}
    columns["distance"] = [distances(seed)[shard][row] for shard, row in rows]
    with storage.atomic_writer(part.url or "") as file:
        pq.write_table(pa.table(columns, schema=schema.SCORES_SCHEMA), file)


def score(store: Store, seed: int) -> int:
    """Write the score tables that are missing; the number of their round."""
    identity = {"seed": seed}
    own = [number for number, claim in store.claims().items() if claim == identity]
    number = own[0] if own else store.claim_round(identity)
    for part in score_parts(store, store.dataset(), number):
        if not storage.exists(part.url or ""):
            write_scores(part, seed)
    return number


def select(store: Store, scored: int, fraction: str, *, before_publishing: Callable[[], Any] = lambda: None) -> Round:
    """Cut and publish: in the scored round, or in a new one when the former is for another selection."""
    intent = {"fraction": fraction, "scores_of": scored}
    for published in store.rounds():
        if published.manifest["intent"] == intent:
            return published
    if not store.is_published(scored) and store.claim_selection(scored, intent):
        number = scored
    else:
        own = [number for number, claim in store.claims().items() if claim == intent]
        number = own[0] if own else store.claim_round(intent)
    dataset = store.dataset()
    result = exact_cut(
        score_parts(store, dataset, scored),
        fraction=fraction,
        strategy=Strategy.parse("distance"),
        destination=store.path(schema.selection_path(number)),
    )
    before_publishing()
    manifest = {
        "intent": intent,
        "dataset": {"version": dataset.version, "digest": dataset.digest},
        "epoch": None,
        "scores_of": None if scored == number else scored,
        "score_parts": [part.number for part in dataset.parts],
        "made_by": os.getpid(),
    }
    return store.publish(number, manifest | result.for_manifest())


def publish(store: Store, seed: int, fraction: str) -> Round:
    return select(store, score(store, seed), fraction)


def check_round(found: Round, seed: int, fraction: str) -> None:
    """A reader's view of a round: everything that the manifest names is there and right."""
    dataset = found.dataset()
    assert dataset.counts.tolist() == COUNTS.tolist()
    selection = found.selection()
    rows = [selection.rows(shard).tolist() for shard in range(len(COUNTS))]
    assert rows == expected_rows(seed, fraction)
    assert found.counts["selected"] == selection.total == sum(map(len, rows))
    scores = found.scores().to_table(columns=["distance"])["distance"].to_pylist()
    assert scores == [distance for shard in distances(seed) for distance in shard]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one published round, which the tests copy."""
    folder = tmp_path_factory.mktemp("undisturbed")
    store = Store(folder)
    write_dataset(store)
    check_round(publish(store, seed=1, fraction="0.5"), 1, "0.5")
    return folder


@pytest.fixture
def store(undisturbed: Path, tmp_path: Path) -> Store:
    shutil.copytree(undisturbed, tmp_path / "store")
    return Store(tmp_path / "store")


# ---- killed ----------------------------------------------------------------------------------------------------------

FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.truncate"}


def die_before(operation: int, folder: str) -> None:
    """SIGKILL this process before its n-th file operation below `folder`; fsyncs count as well."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and any(isinstance(path, str) and path.startswith(folder) for path in arguments[:2]):
            count()

    original = os.fsync

    def fsync(file: int) -> None:
        count()
        original(file)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def publish_and_die(url: str, operation: int) -> None:
    die_before(operation, url)
    publish(Store(url), seed=2, fraction="0.3")


def run_and_kill(store: Store, operation: int) -> bool:
    """Whether the publisher was killed; anything but that and success fails the test."""
    child = FORK.Process(target=publish_and_die, args=(store.url, operation))
    child.start()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def snapshot(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def check_reader(store: Store) -> int:
    """A fresh reader sees round 1 as it was and, if there is a second round, all of it; how many it sees."""
    reader = Store(store.url)
    found = reader.rounds()
    assert [each.number for each in found] in ([1], [1, 2])
    check_round(found[0], 1, "0.5")
    if len(found) == 2:
        check_round(found[1], 2, "0.3")
        assert reader.round("latest").number == 2
    return len(found)


def stages(store: Store) -> Iterator[Store]:
    """A copy of the store for every operation that a publisher can be killed before."""
    for operation in range(1, 1000):
        copy = f"{store.url}-{operation}"
        shutil.copytree(store.url, copy)
        killed = Store(copy)
        if not run_and_kill(killed, operation):
            assert operation > 40  # scores of two parts, selection, claims and manifest take many operations
            return
        yield killed
        shutil.rmtree(copy)
    pytest.fail("the publisher never finished")


@pytest.mark.slow
def test_a_publisher_killed_anywhere(store: Store) -> None:
    before = snapshot(store.url)
    undisturbed = Store(f"{store.url}-whole")
    shutil.copytree(store.url, undisturbed.url)
    publish(undisturbed, seed=2, fraction="0.3")
    whole = snapshot(undisturbed.url)

    seen = []
    for killed in stages(store):
        after = snapshot(killed.url)
        assert {path: after[path] for path in before} == before
        seen.append(check_reader(killed))
        assert publish(Store(killed.url), seed=2, fraction="0.3").number == 2
        assert check_reader(killed) == 2
        finished = snapshot(killed.url)
        for path, data in whole.items():
            if path.endswith(".parquet"):
                assert finished[path] == data, path
        assert {path for path in finished if path.startswith("rounds") and "round.json." not in path} == {
            path for path in whole if path.startswith("rounds")
        }
    assert seen == sorted(seen)
    assert seen[-1] == 2  # also killed after publishing, before it has cleared up
    assert seen.count(1) > 30


def test_a_publisher_killed_again_and_again(store: Store) -> None:
    """Each attempt dies a little later than the one before it got."""
    attempts = 0
    for operation in range(2, 400, 3):
        attempts += 1
        if not run_and_kill(store, operation):
            break
        check_reader(store)
    assert attempts > 5
    assert check_reader(store) == 2


# ---- raced -----------------------------------------------------------------------------------------------------------


def select_together(url: str, fraction: str, gate: Any, outcome: Any) -> None:
    """Two jobs that select from one scored round; they meet just before publishing."""
    try:
        found = select(Store(url), 2, fraction, before_publishing=gate.wait)
        outcome.put((fraction, found.number, found.manifest["made_by"] == os.getpid()))
    except (DynamsError, threading.BrokenBarrierError) as error:
        outcome.put((fraction, repr(error), False))


def race(store: Store, fractions: list[str]) -> list[tuple[str, Any, bool]]:
    gate, outcome = FORK.Barrier(len(fractions), timeout=20), FORK.SimpleQueue()
    processes = [FORK.Process(target=select_together, args=(store.url, f, gate, outcome)) for f in fractions]
    for process in processes:
        process.start()
    results: list[tuple[str, Any, bool]] = [outcome.get() for _ in processes]
    for process in processes:
        process.join()
    return results


def test_of_two_equal_jobs_one_publishes(store: Store) -> None:
    score(store, 2)
    for attempt in range(8):
        copy = Store(f"{store.url}-{attempt}")
        shutil.copytree(store.url, copy.url)
        results = race(copy, ["0.3", "0.3"])
        assert sorted(won for _, _, won in results) == [False, True]
        assert any(str(number).startswith("RoundExistsError('") for _, number, _ in results)
        assert check_reader(copy) == 2
        assert storage.list_names(copy.path("rounds/000002")) == ["round.json", "scores", "selection.parquet"]


def test_two_different_selections_get_a_round_each(store: Store) -> None:
    """Neither can write over the other's selection: the second to come makes a round that names the scores."""
    score(store, 2)
    for attempt in range(8):
        copy = Store(f"{store.url}-{attempt}")
        shutil.copytree(store.url, copy.url)
        results = race(copy, ["0.3", "0.6"])
        assert all(won for _, _, won in results)
        assert sorted(number for _, number, _ in results) == [2, 3]
        for fraction, number, _ in results:
            found = Store(copy.url).round(number)
            check_round(found, 2, fraction)
            assert found.manifest["scores_of"] == (None if number == 2 else 2)


def test_a_late_publisher_leaves_the_round_as_it_is(store: Store) -> None:
    scored = score(store, 2)

    def overtaken() -> None:
        select(Store(store.url), scored, "0.3")

    with pytest.raises(RoundExistsError, match="round 2 was published by another job"):
        select(store, scored, "0.3", before_publishing=overtaken)
    assert check_reader(store) == 2


# ---- watched ---------------------------------------------------------------------------------------------------------


def publish_many(url: str, rounds: int) -> None:
    for seed in range(2, 2 + rounds):
        publish(Store(url), seed, "0.3")


def test_a_reader_never_sees_half_a_round(store: Store) -> None:
    writer = FORK.Process(target=publish_many, args=(store.url, 25))
    writer.start()
    looks = 0
    seen = {1}
    while writer.is_alive() or looks == 0:
        latest = Store(store.url).round("latest")
        if latest.number not in seen:
            check_round(latest, latest.number, "0.3")
        seen.add(latest.number)
        looks += 1
    writer.join()
    assert writer.exitcode == 0
    assert [found.number for found in store.rounds()] == list(range(1, 27))
    for found in store.rounds()[1:]:
        check_round(found, found.number, "0.3")
    assert len(seen) > 2


def test_a_manifest_is_plain_json(store: Store) -> None:
    text = storage.read_bytes(store.path("rounds/000001/round.json"))
    assert json.loads(text)["counts"] == {"all": 25, "scored": 25, "failed": 0, "selected": 13}
