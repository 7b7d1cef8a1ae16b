"""`dynams materialize`: byte-identical samples as ordinary shards, whole or not at all, gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from typer.testing import CliRunner

from builders import Entry, tar_bytes
from dynams_stream import SelectedDataset, Store, storage
from dynams_stream.errors import RoundNotFoundError, ShardMissingError, UsageError
from dynams_stream.uses import read_uses
from pipeline.index_job import build_index
from pipeline.materialize_job import materialize
from pipeline.own_selection import publish_rows
from pipeline.select_job import select_round
from tools.materialize import app


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Key and members, without where they came from."""
    return {name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")}


def samples_of(urls: list[str]) -> list[dict[str, Any]]:
    """As webdataset reads them."""
    return [plain(sample) for sample in wds.WebDataset(urls, shardshuffle=False)]


def selected(store: Store, round: int | None) -> list[dict[str, Any]]:
    """As the loader reads them."""
    return [plain(sample) for sample in SelectedDataset(store, round=round, shuffle=False)]


@pytest.fixture
def store(digit_store: Store) -> Store:
    select_round(digit_store, fraction="0.3", strategy="random:1")
    return digit_store


def urls_of(made: Any) -> list[str]:
    return [storage.join(made.folder, shard.name) for shard in made.shards]


@pytest.mark.parametrize(("size", "workers"), [(None, None), (1, 2), (50, 1), (10_000, 3)])
def test_webdataset_reads_the_selected_samples_byte_for_byte(
    store: Store, tmp_path: Path, size: int | None, workers: int | None
) -> None:
    seen: list[tuple[int, int]] = []
    made = materialize(
        store, str(tmp_path / "out"), samples_per_shard=size, workers=workers, progress=lambda *now: seen.append(now)
    )
    assert [(use.round, use.version) for use in read_uses(store)] == [(1, 1)]  # its round stays while it goes on
    assert samples_of(urls_of(made)) == selected(store, 1)
    assert made.samples == 432
    assert [shard.samples for shard in made.shards][:-1] == [size or 96] * (len(made.shards) - 1)
    for url, shard in zip(urls_of(made), made.shards, strict=True):
        data = Path(url).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert seen[-1] == (432, 432)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["selection"] == store.round(1).manifest["selection"]["sha256"]
    assert [shard["name"] for shard in manifest["shards"]] == [shard.name for shard in made.shards]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        ["plan.json", "manifest.json", *(s.name for s in made.shards)]
    )


def test_the_shards_can_be_indexed_and_read_with_this_library(store: Store, tmp_path: Path) -> None:
    made = materialize(store, str(tmp_path / "out"))
    again = Store(tmp_path / "again")
    build_index(again, urls_of(made))
    assert selected(again, None) == selected(store, 1)


def test_equal_calls_make_equal_bytes_and_a_rerun_does_nothing(store: Store, tmp_path: Path) -> None:
    made = [materialize(store, str(tmp_path / name), workers=workers) for name, workers in (("a", 1), ("b", 4))]
    assert made[0].shards == made[1].shards
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    again = materialize(store, str(tmp_path / "a"))
    assert (again.shards, again.written) == (made[0].shards, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == times


def test_what_is_missing_is_written_again(store: Store, tmp_path: Path) -> None:
    made = materialize(store, str(tmp_path / "out"), samples_per_shard=50)
    for name in ("manifest.json", made.shards[2].name, made.shards[5].name):
        os.remove(tmp_path / "out" / name)
    again = materialize(store, str(tmp_path / "out"), samples_per_shard=50)
    assert (again.written, again.shards) == (2, made.shards)


def test_a_finished_folder_is_mended(store: Store, tmp_path: Path) -> None:
    made = materialize(store, str(tmp_path / "out"), samples_per_shard=50)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    os.remove(tmp_path / "out" / made.shards[1].name)
    os.truncate(tmp_path / "out" / made.shards[4].name, 1024)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-00000[0235].tar")}
    again = materialize(store, str(tmp_path / "out"), samples_per_shard=50)
    assert (again.written, again.shards) == (2, made.shards)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert materialize(store, str(tmp_path / "out"), samples_per_shard=50).written == 0


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"shards": [{"nam'])
def test_a_damaged_manifest_is_written_again(store: Store, tmp_path: Path, damage: str) -> None:
    made = materialize(store, str(tmp_path / "out"), samples_per_shard=100)
    manifest = tmp_path / "out" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(damage)
    again = materialize(store, str(tmp_path / "out"), samples_per_shard=100)
    assert (again.shards, again.written) == (made.shards, 0)
    assert manifest.read_text() == whole


def test_a_folder_of_something_else_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"holds other files \(photo\.jpg"):
        materialize(store, str(tmp_path / "mine"))
    materialize(store, str(tmp_path / "out"))
    with pytest.raises(UsageError, match="samples_per_shard 96, not 7"):
        materialize(store, str(tmp_path / "out"), samples_per_shard=7)
    select_round(store, fraction="0.1", strategy="random:1")
    with pytest.raises(UsageError, match="round 1, not 2"):
        materialize(store, str(tmp_path / "out"))
    with pytest.raises(RoundNotFoundError):
        materialize(store, str(tmp_path / "other"), round=9)


def test_equal_keys_in_a_row_ask_for_unique_ones(tmp_path: Path) -> None:
    urls = []
    for shard in range(2):
        path = tmp_path / f"train-{shard}.tar"
        entries = [Entry(f"{key}.{ext}", f"{shard} {key} {ext}".encode()) for key in "ab" for ext in ("txt", "cls")]
        path.write_bytes(tar_bytes(entries))
        urls.append(str(path))
    store = Store(tmp_path / "store")
    build_index(store, urls)
    publish_rows(store, [np.array([0]), np.array([0, 1])], strategy="mine")
    with pytest.raises(UsageError, match=r"train-1\.tar, row 0, key 'a': .*same key.*--unique-keys"):
        materialize(store, str(tmp_path / "out"), samples_per_shard=9)
    made = materialize(store, str(tmp_path / "unique"), samples_per_shard=9, unique_keys=True)
    found = samples_of(urls_of(made))
    assert [sample["__key__"] for sample in found] == ["000000000000/a", "000000000001/a", "000000000002/b"]
    assert [sample["txt"] for sample in found] == [b"0 a txt", b"1 a txt", b"1 b txt"]


def test_weights_become_members(digit_store: Store, tmp_path: Path) -> None:
    rows = [np.arange(3) for _ in digit_store.dataset().urls]
    weights = [np.array([0.5, 1.25, shard]) for shard in range(len(rows))]
    publish_rows(digit_store, rows, weights, strategy="weighted")
    made = materialize(digit_store, str(tmp_path / "out"))
    assert [float(sample["weight"]) for sample in samples_of(urls_of(made))] == np.concatenate(weights).tolist()


def test_a_weight_takes_no_members_place(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    path.write_bytes(tar_bytes([Entry("a.txt", b"x"), Entry("a.weight", b"80 kg")]))
    store = Store(tmp_path / "store")
    build_index(store, [str(path)])
    publish_rows(store, [np.array([0])], [np.array([0.5])], strategy="weighted")
    with pytest.raises(UsageError, match="has a member 'weight' of its own"):
        materialize(store, str(tmp_path / "out"))
    publish_rows(store, [np.array([0])], strategy="mine")
    made = materialize(store, str(tmp_path / "plain"))
    assert samples_of(urls_of(made)) == [{"__key__": "a", "txt": b"x", "weight": b"80 kg"}]


def test_a_missing_shard_is_named_and_leaves_no_manifest(store: Store, digit_shards: list[str], tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for url in digit_shards[:-1]:
        (copies / Path(url).name).write_bytes(Path(url).read_bytes())
    moved = Store(store.url, shards_at=copies)
    with pytest.raises(ShardMissingError, match=Path(digit_shards[-1]).name):
        materialize(moved, str(tmp_path / "out"), samples_per_shard=30)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (copies / Path(digit_shards[-1]).name).write_bytes(Path(digit_shards[-1]).read_bytes())
    made = materialize(moved, str(tmp_path / "out"), samples_per_shard=30)
    assert 0 < made.written < len(made.shards)
    assert samples_of(urls_of(made)) == selected(store, 1)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_shards(store: Store, tmp_path: Path) -> None:
    expected = materialize(store, str(tmp_path / "whole"), samples_per_shard=2).shards
    command = [
        sys.executable, "-m", "tools.materialize", "--store", store.url, "--out", str(tmp_path / "out"),
        "--samples-per-shard", "2", "--workers", "1",
    ]  # fmt: skip
    kills = 0
    while kills < 3:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "out").glob("*.tar")))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "out").glob("*.tar"))) > before + 10:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        if process.returncode == 0:
            break
    assert kills >= 1
    assert subprocess.run(command, check=True, capture_output=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["sha256"] for shard in manifest["shards"]] == [shard.sha256 for shard in expected]
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


def test_the_command(store: Store, tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["--store", store.url, "--out", str(tmp_path / "out"), *map(str, arguments)])

    first = run("--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["samples"] == 432
    assert "5 shards" in run().stdout
    assert "written before" in run().stdout
    assert isinstance(run("--round", "0").exception, UsageError)


def test_a_dry_run_tells_and_writes_nothing(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["--store", store.url, "--out", str(out), "--samples-per-shard", "100", "--json"]
    told = json.loads(CliRunner().invoke(app, [*command, "--dry-run"]).stdout)
    size = sum(store.dataset().sizes.tolist())
    assert told == {
        "folder": str(out), "round": 1, "samples": 432, "shards": 5, "missing": 5, "bytes": size * 432 // 1437,
    }  # fmt: skip
    assert not out.exists()
    CliRunner().invoke(app, command)
    (out / "selected-000002.tar").unlink()
    assert json.loads(CliRunner().invoke(app, [*command, "--dry-run"]).stdout) == told | {"missing": 1}
