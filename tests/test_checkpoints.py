"""Checkpoints in a folder: order, which is the newest that is complete, and of which epoch."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fsspec
import pytest
import torch

import toy_models
from dynams_stream import ParameterSharingProxy
from dynams_stream.errors import CheckpointError, UsageError
from pipeline.checkpoints import (
    NewestCheckpoint,
    checkpoints,
    epoch_of,
    newest_checkpoint,
    require_folder,
    require_place,
)


def put(folder: Path, name: str, content: str, seconds: float) -> str:
    path = folder / name
    path.write_text(content)
    os.utime(path, (seconds, seconds))
    return str(path)


def names(folder: str) -> list[str]:
    return [one.url.rsplit("/", 1)[-1] for one in checkpoints(folder)]


def test_oldest_first_and_by_number_within_a_time(tmp_path: Path) -> None:
    for name, seconds in (("9.pt", 50), ("10.pt", 50), ("100.safetensors", 50), ("best.pth", 40), ("a-2.pt", 50)):
        put(tmp_path, name, name, seconds)
    put(tmp_path, ".11.pt", "being written", 60)
    put(tmp_path, "notes.txt", "none", 60)
    (tmp_path / "folder.pt").mkdir()
    assert names(str(tmp_path)) == ["best.pth", "9.pt", "10.pt", "100.safetensors", "a-2.pt"]
    with pytest.raises(CheckpointError, match="no such folder"):  # it may be there again: no matter of usage
        checkpoints(str(tmp_path / "none"))


def test_a_place_that_makes_no_sense_is_refused_at_the_start(tmp_path: Path) -> None:
    other = put(tmp_path, "last.ckpt", "another ending", 10)
    for check in (require_place, require_folder, checkpoints):
        with pytest.raises(UsageError, match=r"last\.ckpt: a file, but no checkpoint .* end in \.safetensors, \.pt"):
            check(other)
        check(str(tmp_path))
        check("later.pt")
    require_place(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="none: no such folder"):
        require_folder(str(tmp_path / "none"))


def test_with_a_pattern_only_names_that_fit_it_count(tmp_path: Path) -> None:
    for name, seconds in (("last.pt", 50), ("best.pt", 60)):
        put(tmp_path, name, name, seconds)
    assert [one.url for one in checkpoints(str(tmp_path), "{epoch}.pt")] == [
        str(tmp_path / "last.pt"),
        str(tmp_path / "best.pt"),
    ]
    put(tmp_path, "optimizer-4.pt", "in front", 70)
    assert newest(tmp_path, "{epoch}.pt") == "optimizer-4.pt"
    put(tmp_path, "4.pt", "four", 40)
    assert newest(tmp_path, "{epoch}.pt") == "4.pt"
    assert newest(tmp_path, "optimizer-{epoch}.") == "optimizer-4.pt"
    assert newest(tmp_path, None) == "optimizer-4.pt"
    with pytest.raises(UsageError, match=r"no \{epoch\} in it"):
        newest(tmp_path, "4")


def newest(folder: Path, pattern: str | None) -> str:
    found = newest_checkpoint(str(folder), pattern)
    assert found is not None
    return found.url.rsplit("/", 1)[-1]


def test_an_object_stores_listing_is_enough() -> None:
    system = fsspec.filesystem("memory")
    place = f"memory://checkpoints-{time.time_ns()}"
    for name in ("2.pt", "1.pt", "notes.txt"):
        system.pipe(f"{place}/{name}", name.encode())
        time.sleep(0.01)
    assert names(place) == ["2.pt", "1.pt"]
    before = {one.url: one.version for one in checkpoints(place)}
    system.pipe(f"{place}/2.pt", b"written again")
    after = {one.url: one.version for one in checkpoints(place)}
    assert {url.rsplit("/", 1)[-1] for url in before if before[url] != after[url]} == {"2.pt"}
    assert names(place) == ["1.pt", "2.pt"]
    assert checkpoints(place + "-none") == []


def test_only_the_newest_that_is_the_same_at_two_looks_is_taken(tmp_path: Path) -> None:
    looks = NewestCheckpoint(str(tmp_path))
    assert looks.look() is None
    put(tmp_path, "1.pt", "one", 10)
    put(tmp_path, "2.pt", "half", 20)
    assert looks.look() is None  # a first look at both
    put(tmp_path, "2.pt", "half and more", 21)
    first = looks.look()
    assert first is not None
    assert first.url == str(tmp_path / "1.pt")  # the newer one is still being written
    assert looks.look().url == str(tmp_path / "2.pt")  # type: ignore[union-attr]
    put(tmp_path, "3.pt", "three", 30)
    second = looks.look()
    assert second is not None
    looks.done(second)
    third = looks.look()
    assert third is not None
    assert third.url == str(tmp_path / "3.pt")
    looks.done(third)
    assert looks.look() is None
    put(tmp_path, "2.pt", "an older one, written anew", 25)
    assert [looks.look(), looks.look()] == [None, None]  # the third has overtaken it
    put(tmp_path, "2.pt", "written anew", 40)
    assert looks.look() is None
    assert looks.look().url == str(tmp_path / "2.pt")  # type: ignore[union-attr]


def test_a_newest_that_is_removed_does_not_bring_back_an_older_one(tmp_path: Path) -> None:
    put(tmp_path, "1.pt", "one", 10)
    path = put(tmp_path, "2.pt", "two", 20)
    looks = NewestCheckpoint(str(tmp_path))
    looks.look()
    found = looks.look()
    assert found is not None
    looks.done(found)
    os.remove(path)
    assert [looks.look(), looks.look()] == [None, None]


def test_once_takes_an_old_file_at_once_and_looks_twice_at_a_fresh_one(tmp_path: Path) -> None:
    slept: list[float] = []
    assert newest_checkpoint(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match=r"1\.pt: no such checkpoint"):
        newest_checkpoint(str(tmp_path / "1.pt"))
    old = put(tmp_path, "1.pt", "one", time.time() - 3600)
    assert newest_checkpoint(old) == newest_checkpoint(str(tmp_path), sleep=slept.append)
    assert (newest(tmp_path, None), slept) == ("1.pt", [])
    fresh = put(tmp_path, "2.pt", "half", time.time())
    found = newest_checkpoint(str(tmp_path), settle=7, sleep=slept.append)
    assert found is not None
    assert (found.url, slept) == (fresh, [7])

    def goes_on(seconds: float) -> None:
        put(tmp_path, "2.pt", "half and more", time.time())

    found = newest_checkpoint(str(tmp_path), sleep=goes_on)
    assert found is not None
    assert found.url == old
    os.remove(old)
    assert newest_checkpoint(str(tmp_path), sleep=goes_on) is None  # it is still being written


def test_the_epoch_comes_from_metadata_or_the_name(tmp_path: Path) -> None:
    path = str(tmp_path / "model-12.safetensors")
    ParameterSharingProxy(toy_models.small_cnn(), width=0.5).save(path, epoch=7)
    assert epoch_of(path) == 7
    assert epoch_of(path, "model-{epoch}.") == 12
    assert epoch_of("s3://bucket/run/epoch=3-step=400.pt", "epoch={epoch}-") == 3
    plain = str(tmp_path / "3.pt")
    torch.save({}, plain)
    assert epoch_of(plain) is None
    with pytest.raises(CheckpointError, match="no number in its name"):
        epoch_of(plain, "epoch={epoch}")
    with pytest.raises(UsageError, match=r"no \{epoch\} in it"):
        epoch_of(plain, "epoch")
