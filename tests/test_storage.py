"""The one door to bytes: on local files, in fsspec's memory and on a real local S3 server."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import re
import threading
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dynams_stream import storage
from dynams_stream.errors import MissingExtraError, ShardChangedError, ShardMissingError, StoreError, UsageError


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder or prefix of each kind."""
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


@pytest.fixture
def s3_folder(s3_bucket: str) -> str:
    return f"{s3_bucket}/{uuid.uuid4().hex}"


# ---- names -----------------------------------------------------------------------------------------------------------


def test_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("runs/a") == str(tmp_path / "runs/a")
    assert storage.absolute(Path("runs")) == str(tmp_path / "runs")
    assert storage.absolute("~/a/../b") == "/home/someone/b"
    assert storage.absolute("file:///data/a.tar") == "/data/a.tar"
    assert storage.absolute("s3://bucket/run/") == "s3://bucket/run"


@pytest.mark.parametrize("url", ["pipe:cat a.tar", "pipe:rm -rf /", ""])
def test_shell_pipes_and_empty_names_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match=re.escape("s3://bucket/key")):
        storage.absolute(url)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'dynams-stream[s3]'")):
        storage.open_reader("s3://bucket/a.tar")
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'dynams-stream[azure]'")):
        storage.exists("az://bucket/a.tar")
    with pytest.raises(MissingExtraError, match=re.escape("fsspec's package for sftp://")):
        storage.exists("sftp://host/a.tar")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UsageError, match="no protocol 'nosuch'"):
        storage.read_bytes("nosuch://a/b")


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"some bytes", os.urandom(300_000)])
def test_writes_and_reads_back(folder: str, data: bytes) -> None:
    url = storage.join(folder, "deep/er/file.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, data)
    assert storage.exists(url)
    assert storage.read_bytes(url) == data
    with storage.open_sequential(url) as file:
        assert file.read() == data
    with storage.open_random(url) as file:
        file.seek(max(0, len(data) - 10))
        assert file.read() == data[-10:]
    storage.write_bytes(url, b"other")
    assert storage.read_bytes(url) == b"other"
    assert storage.list_names(storage.join(folder, "deep/er")) == ["file.bin"]


def test_missing_files(folder: str) -> None:
    url = storage.join(folder, "nothing")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)
    with pytest.raises(FileNotFoundError):
        storage.open_random(url)
    for opened in (storage.open_reader, storage.open_sequential):
        with pytest.raises(ShardMissingError, match="no such file or object") as caught:
            opened(url)
        assert caught.value.shard == url
    assert storage.list_names(folder) == []
    assert storage.list_names(storage.join(folder, "nowhere")) == []
    storage.remove(url)


def fail_while_writing(url: str) -> None:
    with storage.atomic_writer(url) as file:
        file.write(b"half of it")
        file.flush()
        raise KeyboardInterrupt


def test_nothing_appears_before_the_block_ends(folder: str) -> None:
    url = storage.join(folder, "table.parquet")
    with storage.atomic_writer(url) as file:
        file.write(b"one")
        file.flush()
        assert not storage.exists(url)
    assert storage.read_bytes(url) == b"one"


def test_a_failed_block_leaves_nothing(folder: str) -> None:
    url = storage.join(folder, "table.parquet")
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(url)
    assert storage.list_names(folder) == []


def test_a_failed_block_leaves_the_old_file(folder: str) -> None:
    url = storage.join(folder, "table.parquet")
    storage.write_bytes(url, b"old")
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(url)
    assert storage.list_names(folder) == ["table.parquet"]
    assert storage.read_bytes(url) == b"old"


def test_two_writers_at_once_do_not_touch_each_other(folder: str) -> None:
    """As a score table and a log are, and as threads do: the inner end must not publish the outer file."""
    outer_url, inner_url = storage.join(folder, "outer"), storage.join(folder, "inner")
    with storage.atomic_writer(outer_url) as outer:
        outer.write(b"first half ")
        storage.write_bytes(inner_url, b"inner")
        assert storage.read_bytes(inner_url) == b"inner"
        assert not storage.exists(outer_url)
        storage.create(storage.join(folder, "created"), b"now")
        assert storage.read_bytes(storage.join(folder, "created")) == b"now"
        outer.write(b"second half")
    assert storage.read_bytes(outer_url) == b"first half second half"


def test_many_threads_write(folder: str) -> None:
    def work(number: int) -> None:
        storage.write_bytes(storage.join(folder, f"{number}"), b"%d" % number * 1000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.list_names(folder) == [str(number) for number in range(8)]
    for number in range(8):
        assert storage.read_bytes(storage.join(folder, f"{number}")) == b"%d" % number * 1000


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".table.parquet.0123.tmp").write_bytes(b"half")
    (tmp_path / "table.parquet").write_bytes(b"whole")
    (tmp_path / ".hidden").write_bytes(b"not ours")
    storage.remove_leftovers(str(tmp_path))
    assert storage.list_names(str(tmp_path)) == [".hidden", "table.parquet"]
    storage.remove_leftovers(str(tmp_path / "nowhere"))


# ---- create ----------------------------------------------------------------------------------------------------------


def test_create_happens_once(folder: str) -> None:
    url = storage.join(folder, "round.json")
    storage.create(url, b"first")
    with pytest.raises(FileExistsError):
        storage.create(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert storage.list_names(folder) == ["round.json"]
    storage.remove(url)
    assert not storage.exists(url)
    storage.create(url, b"third")
    assert storage.read_bytes(url) == b"third"


def test_a_link_that_a_network_file_system_made_twice_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.link

    def repeated(source: str, target: str) -> None:
        original(source, target)
        original(source, target)

    monkeypatch.setattr(os, "link", repeated)
    storage.create(str(tmp_path / "round.json"), b"ours")
    with pytest.raises(FileExistsError):
        storage.create(str(tmp_path / "round.json"), b"theirs")
    assert (tmp_path / "round.json").read_bytes() == b"ours"


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="no hard links"):
        storage.create(str(tmp_path / "round.json"), b"ours")
    assert storage.list_names(str(tmp_path)) == []


def test_a_writer_whose_file_was_cleared_away_says_so(tmp_path: Path) -> None:
    def cleared() -> None:
        with storage.atomic_writer(str(tmp_path / "table.parquet")) as file:
            file.write(b"x")
            storage.remove_leftovers(str(tmp_path), spare="round.json")
            assert storage.list_names(str(tmp_path)) == []

    with pytest.raises(StoreError, match="removed the unfinished file"):
        cleared()
    (tmp_path / ".round.json.0.tmp").write_bytes(b"x")
    storage.remove_leftovers(str(tmp_path), spare="round.json")
    assert storage.list_names(str(tmp_path)) == [".round.json.0.tmp"]


def test_digests_of_whole_files(folder: str) -> None:
    data = os.urandom(3_000_000)
    storage.write_bytes(storage.join(folder, "a"), data)
    assert storage.file_digest(storage.join(folder, "a")) == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        storage.file_digest(storage.join(folder, "b"))


def create_together(url: str, data: bytes, gate: Any, outcome: Any) -> None:
    gate.wait()
    try:
        storage.create(url, data)
        outcome.put(data)
    except FileExistsError:
        outcome.put(None)


def test_of_racing_processes_exactly_one_creates(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        url = str(tmp_path / f"{attempt}" / "round.json")
        gate, outcome = context.Barrier(2), context.SimpleQueue()
        both = [
            context.Process(target=create_together, args=(url, name * 5000, gate, outcome)) for name in (b"a", b"b")
        ]
        for process in both:
            process.start()
        results = [outcome.get() for _ in both]
        for process in both:
            process.join()
        winners = [data for data in results if data is not None]
        assert len(winners) == 1
        assert Path(url).read_bytes() == winners[0]
        assert storage.list_names(str(tmp_path / f"{attempt}")) == ["round.json"]


def test_create_in_s3_is_decided_by_the_server(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the object appears after any look that the client may have taken."""
    url = storage.join(s3_folder, "round.json")
    system = storage.file_system(url)
    original = system.s3.put_object

    async def put_object(**request: Any) -> Any:
        assert request["IfNoneMatch"] == "*"
        await original(Bucket=request["Bucket"], Key=request["Key"], Body=b"the other job's")
        return await original(**request)

    monkeypatch.setattr(system.s3, "put_object", put_object)
    with pytest.raises(FileExistsError):
        storage.create(url, b"ours")
    monkeypatch.undo()
    assert storage.read_bytes(url) == b"the other job's"


def test_create_in_s3_tries_again_when_two_puts_meet(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers 409 ConditionalRequestConflict then, and asks to upload again."""
    from botocore.exceptions import ClientError

    url = storage.join(s3_folder, "round.json")
    system = storage.file_system(url)
    original = system.s3.put_object
    answers = ["ConditionalRequestConflict", "ConditionalRequestConflict", ""]

    async def put_object(**request: Any) -> Any:
        if code := answers.pop(0):
            raise ClientError({"Error": {"Code": code, "Message": "try again"}}, "PutObject")
        return await original(**request)

    monkeypatch.setattr(system.s3, "put_object", put_object)
    storage.create(url, b"ours")
    assert answers == []
    assert storage.read_bytes(url) == b"ours"
    answers.append("AccessDenied")
    with pytest.raises(PermissionError):
        storage.create(url, b"ours")


def test_create_refuses_stores_without_a_condition(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="only if it is absent"):
        storage.create(f"local://{tmp_path}/round.json", b"x")
    assert list(tmp_path.iterdir()) == []


# ---- listing ---------------------------------------------------------------------------------------------------------


def test_lists_what_is_there_now(folder: str) -> None:
    for name in ("000010/round.json", "000009/round.json", "a.parquet"):
        storage.write_bytes(storage.join(folder, name), b"x")
    assert storage.list_names(folder) == ["000009", "000010", "a.parquet"]
    storage.write_bytes(storage.join(folder, "000011/round.json"), b"x")
    assert storage.list_names(folder) == ["000009", "000010", "000011", "a.parquet"]
    assert storage.exists(storage.join(folder, "000011/round.json"))
    assert storage.exists(storage.join(folder, "000011"))
    storage.remove(storage.join(folder, "a.parquet"))
    assert storage.list_names(folder) == ["000009", "000010", "000011"]


def other_client(url: str) -> Any:
    """A file system that shares no cache with the one that `storage` uses, as another machine's would not."""
    return fsspec.get_filesystem_class(url.split("://")[0])(skip_instance_cache=True)


def test_sees_what_other_machines_write_to_s3(s3_folder: str) -> None:
    url = storage.join(s3_folder, "shard.tar")
    other_client(url).pipe_file(url, b"a" * 600)
    assert storage.list_names(s3_folder) == ["shard.tar"]
    before = storage.fingerprint(storage.open_reader(url))
    assert storage.open_reader(url).size == 600
    other_client(url).pipe_file(url, b"a" * 599 + b"b")  # the same size, and the same first 512 bytes
    after = storage.fingerprint(storage.open_reader(url))
    assert after != before
    other_client(url).pipe_file(url, b"a" * 700)
    assert storage.open_reader(url).size == 700
    with storage.open_random(url) as file:
        assert len(file.read()) == 700
    other_client(url).pipe_file(storage.join(s3_folder, "later"), b"x")
    assert storage.exists(storage.join(s3_folder, "later"))
    assert storage.list_names(s3_folder) == ["later", "shard.tar"]
    other_client(url).rm_file(url)
    assert not storage.exists(url)
    assert storage.list_names(s3_folder) == ["later"]


def read_in_child(url: str, outcome: Any) -> None:
    outcome.put((storage.read_bytes(url), storage.open_reader(url).pread(1, 2)))


def test_s3_works_in_a_forked_worker(s3_folder: str) -> None:
    """DataLoader workers fork from a process that has used the object store already."""
    url = storage.join(s3_folder, "a")
    storage.write_bytes(url, b"abcd")
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    child = context.Process(target=read_in_child, args=(url, outcome))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert outcome.get() == (b"abcd", b"bc")


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_reads_exact_ranges(folder: str) -> None:
    data = os.urandom(10_000)
    url = storage.join(folder, "shard.tar")
    storage.write_bytes(url, data)
    reader = storage.open_reader(url)
    assert reader.size == len(data)
    for offset, size in ((0, 1), (0, 10_000), (9_999, 1), (512, 1024), (5, 0), (10_000, 0)):
        assert reader.pread(offset, size) == data[offset : offset + size]
    reader.close()
    reader.close()


@pytest.mark.parametrize(("offset", "size"), [(9_990, 11), (10_000, 1), (20_000, 5), (0, 10_001)])
def test_a_range_beyond_the_end_means_a_changed_shard(folder: str, offset: int, size: int) -> None:
    url = storage.join(folder, "shard.tar")
    storage.write_bytes(url, bytes(10_000))
    reader = storage.open_reader(url)
    with pytest.raises(ShardChangedError, match=f"asked for {size} bytes at {offset}") as caught:
        reader.pread(offset, size)
    assert caught.value.shard == url
    assert pickle.loads(pickle.dumps(caught.value)).shard == url
    reader.close()


def test_a_shard_that_goes_while_it_is_read_from_s3(s3_folder: str) -> None:
    url = storage.join(s3_folder, "shard.tar")
    storage.write_bytes(url, bytes(1000))
    reader = storage.open_reader(url)
    storage.remove(url)
    with pytest.raises(ShardMissingError, match="no such file or object"):
        reader.pread(0, 100)


def test_a_shard_truncated_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(10_000))
    reader = storage.open_reader(str(path))
    os.truncate(path, 5_000)
    assert reader.pread(4_000, 1_000) == bytes(1_000)
    with pytest.raises(ShardChangedError, match="got 500"):
        reader.pread(4_500, 1_000)
    reader.close()


def test_short_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(1000)
    (tmp_path / "shard.tar").write_bytes(data)
    reader = storage.open_reader(str(tmp_path / "shard.tar"))
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: original(file, min(size, 300), offset))
    assert reader.pread(50, 900) == data[50:950]
    reader.close()


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_what_was_rewritten(folder: str) -> None:
    url = storage.join(folder, "shard.tar")
    seen = []
    for data in (b"a" * 2000, b"a" * 2001, b"b" + b"a" * 1999):
        storage.write_bytes(url, data)
        reader = storage.open_reader(url)
        seen.append(storage.fingerprint(reader))
        assert storage.fingerprint(reader) == seen[-1]
        reader.close()
    assert len(set(seen)) == 3
    assert all(not storage.same_bytes(a, b, moved=moved) for a in seen for b in seen if a != b for moved in (0, 1))
    assert all(storage.same_bytes(a, a, moved=moved) for a in seen for moved in (False, True))


def test_a_moved_copy_is_compared_by_size_and_header(tmp_path: Path, folder: str) -> None:
    data = os.urandom(3000)
    copy, original = str(tmp_path / "copy.tar"), storage.join(folder, "shard.tar")
    Path(copy).write_bytes(data)
    os.utime(copy, ns=(1, 1))
    storage.write_bytes(original, data)
    recorded = storage.fingerprint(storage.open_reader(original))
    found = storage.fingerprint(storage.open_reader(copy))
    assert not storage.same_bytes(recorded, found, moved=False)
    assert storage.same_bytes(recorded, found, moved=True)
    Path(copy).write_bytes(data + b"x")
    assert not storage.same_bytes(recorded, storage.fingerprint(storage.open_reader(copy)), moved=True)
    Path(copy).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert not storage.same_bytes(recorded, storage.fingerprint(storage.open_reader(copy)), moved=True)


def test_the_form_of_a_local_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(b"123456789")
    os.utime(path, ns=(5, 1234567890123456789))
    fingerprint = storage.fingerprint(storage.open_reader(str(path)))
    assert fingerprint == "size=9;time=1234567890123456789;head=cbf43926"  # CRC-32's published check value
