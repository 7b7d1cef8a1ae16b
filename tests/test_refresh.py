"""`dynams index --refresh`: new, changed and removed shards become another version; rounds of the old one stay."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from builders import Entry, plain_entries, tar_bytes
from dynams_stream import SelectedDataset, Store, schema, storage
from dynams_stream.errors import BadShardsError, ShardChangedError, ShardMissingError, StateError, UsageError
from pipeline import shard_scan
from pipeline.index_job import build_index
from pipeline.select_job import select_round
from tools.index_shards import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of four samples."""
    place = tmp_path / "shards"
    place.mkdir()
    for shard in range(5):
        write(place / f"train-{shard:06d}.tar", shard)
    return place


def write(path: Path, shard: int, samples: int = 4) -> None:
    entries = [
        Entry(f"{shard}-{row}.{ext}", f"{shard} {row} {ext}".encode())
        for row in range(samples)
        for ext in ("txt", "cls")
    ]
    path.write_bytes(tar_bytes(entries))


def index(store: Path, *arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["--store", str(store), "--json", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def keys(store: Store, **options: Any) -> list[str]:
    return [sample["__key__"] for sample in SelectedDataset(store, shuffle=False, **options)]


def test_new_changed_and_removed_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "store"
    assert index(place, folder / "*.tar")["new_shards"] == 5
    store = Store(place)
    select_round(store, fraction="0.5", strategy="random:0")
    before = keys(store)
    write(folder / "train-000007.tar", 7)
    write(folder / "train-000001.tar", 1, samples=6)
    os.remove(folder / "train-000003.tar")
    read: list[str] = []
    index_shard = shard_scan.index_shard
    monkeypatch.setattr(shard_scan, "index_shard", lambda url: read.append(Path(url).name) or index_shard(url))
    found = index(place, "--refresh")
    assert sorted(read) == ["train-000001.tar", "train-000007.tar"]
    counts = {name: found[f"{name}_shards"] for name in ("new", "changed", "removed", "reused")}
    assert counts == {"new": 1, "changed": 1, "removed": 1, "reused": 3}
    assert (found["dataset"], found["samples"]) == (2, 22)
    assert keys(store, round=None) == [
        f"{shard}-{row}" for shard, samples in ((0, 4), (1, 6), (2, 4), (4, 4), (7, 4)) for row in range(samples)
    ]
    # the old round is what it was; what is gone or changed is told, not mis-read
    assert store.round(1).dataset().version == 1
    with pytest.raises(ShardChangedError, match=r"train-000001\.tar"):
        keys(store, round=1)
    write(folder / "train-000001.tar", 1)
    os.utime(folder / "train-000001.tar", ns=(0, _time_of(store.dataset(1).fingerprints[1])))
    with pytest.raises(ShardMissingError, match=r"train-000003\.tar"):
        keys(store, round=1)
    write(folder / "train-000003.tar", 3)
    os.utime(folder / "train-000003.tar", ns=(0, _time_of(store.dataset(1).fingerprints[3])))
    assert keys(store, round=1) == before


def _time_of(fingerprint: str) -> int:
    return int(fingerprint.split("time=")[1].split(";")[0])


def test_nothing_new_changes_nothing(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    index(place, folder / "*.tar")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    found = index(place, "--refresh")
    assert (found["published"], found["dataset"], found["new_shards"]) == (False, 1, 0)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_a_state_of_the_old_version_does_not_go_on_with_the_new_one(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    index(place, folder / "*.tar")
    dataset = SelectedDataset(Store(place), batch_size=2, round=None)
    state = dataset.state_dict(steps=3)
    write(folder / "train-000009.tar", 9)
    index(place, "--refresh")
    restored = SelectedDataset(Store(place), batch_size=2, round=None)
    restored.load_state_dict(state)
    assert len(list(restored)) == 14  # of the 20 samples of version 1
    os.remove(storage.join(str(place), "dataset/000001.parquet"))
    with pytest.raises(StateError):
        SelectedDataset(Store(place), batch_size=2, round=None).load_state_dict(state)


def test_names_are_remembered_wherever_it_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "store"
    monkeypatch.chdir(folder.parent)
    (folder / "list.txt").write_text("shards/train-{000000..000002}.tar\n")
    index(place, "@shards/list.txt", "shards/train-000004.tar")
    monkeypatch.chdir(folder)
    (folder / "list.txt").write_text(f"{folder}/train-{{000000..000003}}.tar\n")
    os.remove(folder / "train-000001.tar")
    found = index(place, "--refresh")
    assert (found["new_shards"], found["removed_shards"], found["shards"]) == (1, 1, 4)
    assert index(place, "--refresh", folder / "train-000004.tar")["removed_shards"] == 3
    assert index(place, "--refresh")["shards"] == 1


def test_what_was_never_there_is_an_error_and_so_is_a_lost_disk(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    urls = [str(path) for path in sorted(folder.iterdir())]
    build_index(Store(place), urls)
    with pytest.raises(BadShardsError, match=r"typing-error\.tar"):
        build_index(Store(place), [*urls, str(folder / "typing-error.tar")], drop_removed=True)
    os.remove(urls[0])
    with pytest.raises(BadShardsError, match=r"train-000000\.tar"):
        build_index(Store(place), urls)  # without asking for it nothing is left out
    for url in urls[1:]:
        os.remove(url)
    with pytest.raises(UsageError, match="is their disk mounted"):
        build_index(Store(place), urls, drop_removed=True)
    assert Store(place).dataset_versions() == [1]


def test_without_names_it_asks_for_them(folder: Path, tmp_path: Path) -> None:
    build_index(Store(tmp_path / "store"), [str(folder / "train-000000.tar")])
    for arguments, message in (([], "name the shards"), (["--refresh"], "does not know how its shards were named")):
        done = CliRunner().invoke(app, ["--store", str(tmp_path / "store"), *arguments])
        assert isinstance(done.exception, UsageError)
        assert message in str(done.exception)


@pytest.mark.parametrize(
    ("content", "message"), [("", "shards.json cannot be read"), ("[]", "does not know"), ("{}", "")]
)
def test_damaged_names_are_asked_for_again(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    shards = [str(folder / "train-000000.tar")]
    store = Store(tmp_path / "store")
    assert CliRunner().invoke(app, [*shards, "--store", store.url]).exit_code == 0
    names = Path(store.path(schema.SHARDS_FILE))
    names.write_text(content)
    done = CliRunner().invoke(app, ["--store", store.url, "--refresh"])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
    assert CliRunner().invoke(app, [*shards, "--store", store.url, "--refresh"]).exit_code == 0
    assert json.loads(names.read_text()) == shards


def test_a_shard_that_may_not_be_read_is_not_a_removed_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "store"
    index(place, folder / "*.tar")
    opened = os.open

    def refused(path: str, *arguments: Any) -> int:
        if str(path).endswith("train-000002.tar"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(BadShardsError, match=r"train-000002\.tar"):
        build_index(Store(place), [str(path) for path in sorted(folder.iterdir())], drop_removed=True)


def test_an_unreadable_shard_is_not_a_removed_one(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    index(place, folder / "*.tar")
    (folder / "train-000002.tar").write_bytes(b"no tar" * 1000)
    write(folder / "train-000009.tar", 9)
    with pytest.raises(BadShardsError, match=r"train-000002\.tar"):
        CliRunner().invoke(app, ["--store", str(place), "--refresh"], catch_exceptions=False)
    (folder / "train-000002.tar").write_bytes(tar_bytes(plain_entries(2)))
    assert index(place, "--refresh")["changed_shards"] == 1
