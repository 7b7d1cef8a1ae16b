"""`dynams verify`: every kind of damage to a store's files is found and named, and nothing else is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import toy_models
from dynams_stream import ScorerSpec, Store, schema, storage
from dynams_stream.errors import NotIndexedError
from dynams_stream.selection_file import selection_writer
from pipeline.index_job import build_index
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.verify_job import verify_store
from tools.verify_store import app

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")


@pytest.fixture(scope="module")
def sound(digit_shards: list[str], tmp_path_factory: pytest.TempPathFactory, client: Client) -> Path:
    """A store with two scored rounds, cuts by several strategies, one by class and one at random; do not change it."""
    folder = tmp_path_factory.mktemp("sound")
    store = Store(folder / "store")
    build_index(store, digit_shards)
    for seed in (0, 1):
        path = folder / f"{seed}.pt"
        torch.save(toy_models.linear(seed).state_dict(), path)
        scored = score_round(store, SPEC, checkpoint=str(path), client=client).number
        select_round(store, fraction="0.3", scores_of=scored)
    select_round(store, fraction="0.07", strategy="-loss", scores_of=1)
    select_round(store, fraction="0.2", class_balance=True, scores_of=1)
    select_round(store, fraction=0, scores_of=1)
    select_round(store, fraction=1, strategy="abs(margin)", scores_of=1)
    select_round(store, fraction="0.5", strategy="random:3")
    return folder / "store"


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Store:
    shutil.copytree(sound, tmp_path / "store")
    return Store(tmp_path / "store")


def named_files(store: Store) -> list[str]:
    """All files that manifests name, relative to the store."""
    root = Path(store.url)
    return sorted(
        str(path.relative_to(root)) for name in ("dataset", "index", "rounds") for path in root.glob(f"{name}/**/*.*")
    )


def test_a_sound_store_has_no_problems(store: Store) -> None:
    reports: list[tuple[int, int]] = []
    found = verify_store(store, shards=True, progress=lambda *now: reports.append(now))
    assert (found.problems, found.orphans, found.unfinished) == ((), (), ())
    dataset, rounds = store.dataset(), store.rounds()
    tables = sum(len(published.manifest["score_parts"]) for published in rounds)
    expected = len(dataset.parts) + len(rounds) + tables + len(dataset.urls)
    assert reports == [(number, expected) for number in range(1, expected + 1)]
    assert found.files == expected + 1 + len(rounds)


def flip(path: str) -> None:
    """Change some bytes of the file's first pages."""
    data = bytearray(Path(path).read_bytes())
    for place in range(len(data) // 8, len(data) // 8 + 32):
        data[place] ^= 0xFF
    Path(path).write_bytes(data)


def other_selection(store: Store, number: int) -> None:
    """Let round `number` select other rows, with a manifest that fits."""
    url = store.path(schema.selection_path(number))
    dataset, selection = store.dataset(), store.round(number).selection()
    manifest_path = Path(store.path(schema.manifest_path(number)))
    counts = dataset.counts
    rows = [selection.rows(shard).copy() for shard in range(len(counts))]
    free = next(row for row in range(int(counts[0])) if row not in rows[0])
    rows[0] = rows[0].copy()
    rows[0][0] = free
    rows[0].sort()
    os.remove(url)
    with selection_writer(url) as writer:
        for part in dataset.parts:
            own = rows[part.first_shard : part.first_shard + part.shards]
            writer.append(np.array([len(one) for one in own], dtype=np.int64), np.concatenate(own).astype(np.uint32))
    manifest = json.loads(manifest_path.read_text())
    manifest["selection"] = writer.for_manifest()
    manifest_path.write_text(json.dumps(manifest))


def swap_tables(store: Store) -> None:
    """Put the other checkpoint's scores of a part in a round's place."""
    shutil.copy(store.path(schema.scores_path(2, 0)), store.path(schema.scores_path(1, 0)))


def swap_parts(store: Store) -> None:
    shutil.copy(store.path(schema.scores_path(1, 1)), store.path(schema.scores_path(1, 0)))


def edit(store: Store, number: int, **changes: object) -> None:
    """Change a manifest behind everybody's back."""
    path = Path(store.path(schema.manifest_path(number)))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index_of(store: Store, part: int) -> str:
    return store.path(store.dataset().parts[part].index_file)


DAMAGES: dict[str, tuple[Callable[[Store], object], str]] = {
    "selection flipped": (lambda s: flip(s.path(schema.selection_path(1))), r"000001/selection\.parquet: .*SHA-256"),
    "selection gone": (lambda s: os.remove(s.path(schema.selection_path(2))), r"000002/selection\.parquet: "),
    "selection of others": (lambda s: other_selection(s, 1), r"scores/part-000000\.parquet: round 1 does not select"),
    "scores flipped": (lambda s: flip(s.path(schema.scores_path(2, 1))), r"000002/scores/part-000001\.parquet: "),
    "scores gone": (lambda s: os.remove(s.path(schema.scores_path(1, 0))), r"000001/scores/part-000000\.parquet: "),
    "scores of another checkpoint": (swap_tables, r"000001/scores/part-000000\.parquet: .*another checkpoint"),
    "scores of another part": (swap_parts, r"000001/scores/part-000000\.parquet: not one line"),
    "index flipped": (lambda s: flip(index_of(s, 0)), r"index/part-000000-\w+\.parquet: .*dynams index again"),
    "index gone": (lambda s: os.remove(index_of(s, 1)), r"index/part-000001-\w+\.parquet: "),
    "index of another part": (
        lambda s: shutil.copy(index_of(s, 1), index_of(s, 0)),
        r"index/part-000000-\w+\.parquet: ",
    ),
    "manifest torn": (
        lambda s: Path(s.path(schema.manifest_path(3))).write_text('{"format": 1,'),
        r"rounds/000003/round\.json: not the JSON",
    ),
    "manifest without its selection": (
        lambda s: edit(s, 2, selection=None),
        r"000002/round\.json: it lacks .*selection",
    ),
    "manifest with fewer parts": (lambda s: edit(s, 1, score_parts=[0]), r"000001/round\.json: .*score parts"),
    "manifest with unknown parts": (lambda s: edit(s, 1, score_parts=[99]), r"000001/round\.json: .*score parts"),
    "dataset torn": (
        lambda s: os.truncate(s.path(schema.dataset_path(1)), 100),
        r"dataset/000001\.parquet: .*index the shards again",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(store: Store, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(store)
    found = verify_store(store, workers=1)
    assert any(re.search(message, str(problem)) for problem in found.problems), found.problems
    assert all(problem.advice for problem in found.problems)


def test_all_rounds_of_a_changed_dataset_table_are_named(store: Store) -> None:
    table = pq.read_table(store.path(schema.dataset_path(1)))
    pq.write_table(table, store.path(schema.dataset_path(1)), compression="none")
    found = verify_store(store)
    assert [problem.path for problem in found.problems] == [f"rounds/{number:06d}/round.json" for number in range(1, 8)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_is_found_unless_the_file_reads_the_same(
    sound: Path, tmp_path: Path, data: st.DataObject
) -> None:
    target = tmp_path / "flipped"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(sound, target)
    path = target / data.draw(st.sampled_from(named_files(Store(target))))
    content = bytearray(path.read_bytes())
    before = pq.read_table(path) if path.suffix == ".parquet" else None
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    if verify_store(Store(target), shards=True).problems or before is None:
        return  # (of a manifest that is still one, most values are nobody's but its author's)
    after = pq.ParquetFile(path, page_checksum_verification=True).read()
    assert after.equals(before), path


def test_what_the_advice_says_mends_a_damaged_index(store: Store, digit_shards: list[str]) -> None:
    flip(index_of(store, 0))
    (problem,) = verify_store(store).problems
    assert problem.advice == "remove it if it is there and run dynams index again: what is missing is made anew"
    os.remove(store.path(problem.path))
    build_index(store, digit_shards)
    assert verify_store(store).problems == ()
    assert store.dataset_versions() == [1]


def test_no_orphans_are_told_while_a_manifest_cannot_be_read(store: Store) -> None:
    os.truncate(store.path(schema.dataset_path(1)), 100)
    found = verify_store(store, shards=True)
    assert found.orphans == ()
    assert {problem.path for problem in found.problems} >= {"dataset/000001.parquet", "rounds/000001/round.json"}


def test_files_that_nothing_names_are_told_and_are_no_problem(store: Store) -> None:
    extra = [
        "dataset/.000002.parquet.0123.tmp", "index/part-000000-0123456789ab.parquet", "rounds/000001/notes.txt",
        "rounds/000001/scores/part-000099.parquet", "rounds/000003/.round.json.12.tmp",
    ]  # fmt: skip
    for path in extra:
        storage.write_bytes(store.path(path), b"x")
    storage.write_bytes(store.path("rounds/000009/scores/.part-000000.parquet.1.tmp"), b"x")
    found = verify_store(store)
    assert found.problems == ()
    assert sorted(found.orphans) == sorted(extra)
    assert found.unfinished == (9,)


def test_shards_are_looked_at_when_asked(sound: Path, tmp_path: Path, digit_shards: list[str]) -> None:
    copies = tmp_path / "shards"
    copies.mkdir()
    urls = [shutil.copy(url, copies) for url in digit_shards[:3]]
    store = Store(tmp_path / "store")
    build_index(store, urls)
    os.truncate(urls[1], 2048)
    os.remove(urls[2])
    assert verify_store(store).problems == ()
    found = verify_store(store, shards=True)
    assert [problem.path for problem in found.problems] == urls[1:]
    assert "not the shard that was indexed" in found.problems[0].what


def test_the_command_exits_1_with_problems(store: Store) -> None:
    sound = CliRunner().invoke(app, ["--store", store.url])
    assert sound.exit_code == 0, sound.output
    assert "0 with problems" in sound.stdout
    flip(store.path(schema.selection_path(1)))
    broken = CliRunner().invoke(app, ["--store", store.url, "--json"])
    assert broken.exit_code == 1
    result = json.loads(broken.stdout)
    assert [problem["path"] for problem in result["problems"]] == ["rounds/000001/selection.parquet"]


def test_an_empty_folder_asks_for_an_index(tmp_path: Path) -> None:
    with pytest.raises(NotIndexedError, match="dynams index"):
        verify_store(Store(tmp_path))
