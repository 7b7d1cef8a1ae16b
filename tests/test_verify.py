"""`dynams verify`: every kind of damage to a store's files is found and named, and nothing else is."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import toy_models
from dynams_stream import ScorerSpec, Store, schema, storage
from dynams_stream.errors import NotIndexedError
from dynams_stream.selection_file import selection_writer
from pipeline.gc_job import find_garbage
from pipeline.index_job import build_index
from pipeline.score_job import score_round
from pipeline.select_job import select_round
from pipeline.verify_job import verify_store
from pipeline.weights import save_module
from tools.verify_store import app

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray")


@pytest.fixture(scope="module")
def sound(digit_shards: list[str], tmp_path_factory: pytest.TempPathFactory, client: Client) -> Path:
    """A store with two scored rounds and cuts of many kinds, one of them at random; do not change it."""
    folder = tmp_path_factory.mktemp("sound")
    store = Store(folder / "store")
    build_index(store, digit_shards)
    for seed in (0, 1):
        path = save_module(store, SPEC, toy_models.linear(seed), epoch=seed)
        scored = score_round(store, SPEC, checkpoint=path, client=client).number
        select_round(store, fraction="0.3", scores_of=scored)
    select_round(store, fraction="0.07", strategy="-loss", scores_of=1)
    select_round(store, fraction="0.2", class_balance=True, sample_weight="1 - confidence", scores_of=1)
    select_round(store, fraction=0, scores_of=1)
    select_round(store, fraction=1, strategy="abs(margin)", scores_of=1)
    select_round(store, fraction="0.5", strategy="random:3")
    select_round(store, fraction="0.6", exclude_noisy=True, scores_of=2)
    return folder / "store"


@pytest.fixture(scope="module")
def small(digit_shards: list[str], tmp_path_factory: pytest.TempPathFactory, client: Client) -> Path:
    """A store of three shards and rounds: as scored, by class with weights, with excluded samples; do not change it."""
    store = Store(tmp_path_factory.mktemp("small") / "store")
    build_index(store, digit_shards[:3])
    score_round(store, SPEC, checkpoint=save_module(store, SPEC, toy_models.linear(2), epoch=7), client=client)
    select_round(store, fraction="0.3")
    select_round(store, fraction="0.2", class_balance=True, sample_weight="1 - confidence")
    select_round(store, fraction="0.6", exclude_noisy=True)
    return Path(store.url)


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Store:
    shutil.copytree(sound, tmp_path / "store")
    return Store(tmp_path / "store")


def test_a_sound_store_has_no_problems(store: Store) -> None:
    reports: list[tuple[int, int]] = []
    found = verify_store(store, shards=True, progress=lambda *now: reports.append(now))
    assert (found.problems, found.orphans, found.unfinished) == ((), (), ())
    dataset, rounds = store.dataset(), store.rounds()
    tables = sum(len(published.manifest["score_parts"]) for published in rounds)
    expected = len(dataset.parts) + len(rounds) + tables + len(dataset.urls) + 3  # two weights, one excluded.parquet
    steps = expected + len(rounds)  # each round is cut again
    assert reports == [(number, steps) for number in range(1, steps + 1)]
    assert found.files == expected + 1 + len(rounds)
    assert found.without_hashes == ()


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


def weights_of(store: Store, number: int) -> str:
    """The saved weights that a round was scored with; named by the store's own path from here on."""
    manifest = store.round(number).manifest
    path = store.path(f"{schema.WEIGHTS_FOLDER}/{manifest['checkpoint']['path'].rpartition('/')[2]}")
    edit(store, number, checkpoint=manifest["checkpoint"] | {"path": path})
    return path


def index_of(store: Store, part: int) -> str:
    return store.path(store.dataset().parts[part].index_file)


DAMAGES: dict[str, tuple[Callable[[Store], object], str]] = {
    "selection flipped": (lambda s: flip(s.path(schema.selection_path(1))), r"000001/selection\.parquet: .*SHA-256"),
    "selection gone": (lambda s: os.remove(s.path(schema.selection_path(2))), r"000002/selection\.parquet: "),
    "selection of others": (lambda s: other_selection(s, 1), r"000001/selection\.parquet: other samples"),
    "excluded flipped": (lambda s: flip(s.path(schema.excluded_path(8))), r"000008/excluded\.parquet: "),
    "excluded gone": (
        lambda s: os.remove(s.path(schema.excluded_path(8))),
        r"000008/excluded\.parquet: no such file",
    ),
    "excluded of others": (
        lambda s: shutil.copy(s.path(schema.selection_path(1)), s.path(schema.excluded_path(8))),
        r"000008/excluded\.parquet: .*SHA-256",
    ),
    "excluded named, never there": (
        lambda s: edit(s, 1, excluded={"samples": 3, "judged_by": [1]}),
        r"000001/excluded\.parquet: ",
    ),
    "weights flipped": (lambda s: flip(weights_of(s, 2)), r"control/weights/\w+\.safetensors: .*SHA-256"),
    "weights gone": (lambda s: os.remove(weights_of(s, 1)), r"control/weights/\w+\.safetensors: not there"),
    "wrong counts": (
        lambda s: edit(s, 1, counts={"all": 1437, "scored": 5, "failed": 1432, "selected": 432}),
        r"000001/round\.json: its counts\.scored is 5; its score tables give 1437; restore",
    ),
    "wrong classes": (lambda s: edit(s, 4, classes={}), r"000004/round\.json: its classes is \{\}; .*\"selected\""),
    "wrong ties": (
        lambda s: edit(s, 1, ties={"at_threshold": 77, "taken": 1}),
        r"000001/round\.json: its ties\.at_threshold is 77; ",
    ),
    "wrong quota": (lambda s: edit(s, 1, min_per_class=40), r"000001/round\.json: its threshold is "),
    "a quota that cannot be": (lambda s: edit(s, 1, min_per_class=-1), r"000001/round\.json: its cut cannot be made"),
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
    assert [problem.path for problem in found.problems] == [schema.dataset_path(1)]
    assert "rounds 1, 2, 3, 4, 5, 6, 7, 8 were made from" in found.problems[0].what


def changed(value: Any) -> Any:
    """Another value of the same kind, as near as can be."""
    match value:
        case None:
            return 7
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value[:-1] + ("y" if value[-1:] == "x" else "x")
        case dict():
            return {name: changed(one) for name, one in value.items()}
    return value[:-1] if value else [1]


def leaves(manifest: dict[str, Any], within: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all numbers and texts of a manifest that something else tells."""
    for name, value in manifest.items():
        if name in TOLD_BY_NOTHING or (*within, name) in TOLD_BY_NOTHING:
            continue
        if isinstance(value, dict):
            yield from leaves(value, (*within, name))
        elif value is not None:
            yield (*within, name)


# Nothing else holds these; and a minimum that each class reaches anyway changes nothing.
TOLD_BY_NOTHING = {
    "library", "started", "ended", "seconds", "guards", "faithfulness", "min_per_class", ("excluded", "judged_by"),
}  # fmt: skip


def change_a_byte(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)


def whole_table(file: Path | str | io.BytesIO) -> pa.Table:
    """A table with all that its footer says of it."""
    return pq.ParquetFile(file, page_checksum_verification=True).read()


def rewrite_a_table(path: Path, data: st.DataObject) -> None:
    """One value changes; the writer makes all checksums anew."""
    table = whole_table(path)
    place = data.draw(st.integers(0, table.num_columns - 1))
    values = table.column(place).to_pylist()
    line = data.draw(st.integers(0, len(values) - 1))
    field = table.schema.field(place)
    values[line] = "x" if values[line] is None and field.type == pa.string() else changed(values[line])
    if field.name == "weights" and values[line] == 7:
        values[line] = [7.0]
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), path, write_page_checksum=True)


def change_a_manifest(path: Path, data: st.DataObject) -> None:
    manifest = json.loads(path.read_text())
    *within, name = data.draw(st.sampled_from(list(leaves(manifest))))
    entries = manifest
    for step in within:
        entries = entries[step]
    entries[name] = changed(entries[name])
    path.write_text(json.dumps(manifest))


CHANGES = [("**/*.*", change_a_byte), ("**/*.parquet", rewrite_a_table), ("**/round.json", change_a_manifest)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_or_value_is_found_unless_the_file_reads_the_same(
    small: Path, tmp_path: Path, data: st.DataObject
) -> None:
    target = tmp_path / "changed"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(small, target)
    pattern, change = data.draw(st.sampled_from(CHANGES))
    path = data.draw(st.sampled_from(sorted(path for path in target.glob(pattern) if "control" not in path.parts)))
    before = path.read_bytes()
    change(path, data)
    if verify_store(Store(target), shards=True).problems:
        return
    assert change is change_a_byte, path
    if path.suffix == ".parquet":  # (of a manifest that is still one, some names and values are nobody's)
        assert whole_table(path).equals(whole_table(io.BytesIO(before))), path


def aged(store: Store) -> None:
    """Let all score tables and manifests be as earlier versions wrote them: without SHA-256."""
    for path in Path(store.url).glob("rounds/*/scores/*.parquet"):
        rewrite(path, lambda table: table)
    for path in Path(store.url).glob("rounds/*/round.json"):
        manifest = json.loads(path.read_text())
        manifest.get("excluded", {}).pop("sha256", None)
        path.write_text(json.dumps({name: of for name, of in manifest.items() if name != "score_footers_sha256"}))


def rewrite(path: Path | str, change: Callable[[pa.Table], pa.Table], *, keep: bool = False) -> None:
    """Write a score table again, with changed lines; without its SHA-256 unless it is to be kept."""
    table = whole_table(path)
    about = {name: of for name, of in table.schema.metadata.items() if keep or name != schema.DATA_DIGEST_KEY}
    pq.write_table(change(table).replace_schema_metadata(about), path, write_page_checksum=True)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


def test_rounds_of_earlier_versions_are_sound_and_told(store: Store) -> None:
    aged(store)
    found = verify_store(store)
    assert found.problems == ()
    assert found.without_hashes == (1, 2, 3, 4, 5, 6, 8)
    assert "rounds 1, 2, 3, 4, 5, 6, 8; of these" in CliRunner().invoke(app, ["--store", store.url]).stdout


def test_a_table_rewritten_on_the_same_side_of_the_threshold_is_found(store: Store) -> None:
    """Nothing but the tables' hashes can tell: every selection of it stays what it is."""
    url, loss = store.path(schema.scores_path(2, 0)), np.zeros(store.dataset().parts[0].samples)
    rewrite(url, lambda table: with_column(table, "loss", loss), keep=True)
    found = verify_store(store).problems
    assert {str(problem) for problem in found if "the table that was scored: its SHA-256" in problem.what}
    assert {problem.path for problem in found} == {"rounds/000002/scores/part-000000.parquet"}
    rewrite(url, lambda table: table)  # without the hash: it is the footer's that tells
    assert all("its footer has another SHA-256" in problem.what for problem in verify_store(store).problems)


def test_ties_that_others_took_are_found_in_rounds_of_earlier_versions_too(store: Store) -> None:
    aged(store)
    threshold = store.round(1).manifest["threshold"]

    def all_tied(table: pa.Table) -> pa.Table:
        distances = table["distance"].to_numpy()
        return with_column(table, "distance", np.where(distances < threshold, np.float32(threshold), distances))

    rewrite(store.path(schema.scores_path(1, 0)), all_tied)
    found = [problem for problem in verify_store(store).problems if "/000001/" in problem.path]
    assert any("its ties.at_threshold is 1; its score tables give" in problem.what for problem in found), found


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
    removed = [
        "dataset/.000002.parquet.0123.tmp", "index/part-000000-0123456789ab.parquet", "rounds/000001/notes.txt",
        "rounds/000001/scores/part-000099.parquet", "rounds/000003/.round.json.12.tmp",
    ]  # fmt: skip
    anybodys = [
        "stray.bin", "rounds/notes.txt", "control/stray.bin", "control/claims/mine.json", "control/uses/.a.json.1.tmp",
        "control/weights/weights.pt",
    ]  # fmt: skip
    being_written = ["rounds/000002/.round.json.9.tmp", "control/lease/.000001.json.8.tmp"]
    for path in [*removed, *anybodys, *being_written, "rounds/000009/scores/.part-000000.parquet.1.tmp"]:
        storage.write_bytes(store.path(path), b"x")
    long_ago = time.time() - 30 * 86400
    for path in [*removed, *anybodys]:
        os.utime(store.path(path), (long_ago, long_ago))
    found = verify_store(store)
    assert found.problems == ()
    assert sorted(found.orphans) == sorted([*removed, *anybodys])
    assert found.unfinished == (9,)
    garbage = find_garbage(store, keep=9).files
    assert sorted(garbage) == sorted([*removed, "control/uses/.a.json.1.tmp", "control/weights/weights.pt"])


def test_shards_in_the_stores_folder_are_no_strangers(digit_shards: list[str], tmp_path: Path) -> None:
    urls = [shutil.copy(url, tmp_path) for url in digit_shards[:2]]
    build_index(Store(tmp_path), urls)
    assert verify_store(Store(tmp_path)).orphans == ()
    shutil.copy(urls[0], tmp_path / "other.tar")
    assert verify_store(Store(tmp_path)).orphans == ("other.tar",)


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
