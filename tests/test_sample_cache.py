"""SampleCache: exact bytes or none, in any number of threads and processes, within its limit, whatever happens."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynams_stream import sample_cache
from dynams_stream.errors import UsageError
from dynams_stream.sample_cache import SampleCache

MIB = 1 << 20
URL, FINGERPRINT = "s3://bucket/a.tar", 'size=1024;etag="abc";head=9f86d081'


def content(url: str, fingerprint: str, offset: int, size: int) -> bytes:
    """What the sample at `offset` of a shard holds: different for each sample, equal in all processes."""
    seed = hashlib.sha256(f"{url} {fingerprint} {offset}".encode()).digest()
    return (seed * (size // 32 + 1))[:size]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Samples of one size, one after another."""

    url: str = URL
    fingerprint: str = FINGERPRINT
    size: int = 4000

    def offsets(self, rows: range | list[int]) -> list[int]:
        return [512 * (1 + 9 * row) for row in rows]

    def put(self, cache: SampleCache, rows: range | list[int]) -> None:
        offsets = self.offsets(rows)
        names = cache.ids(self.url, self.fingerprint, offsets)
        datas = [content(self.url, self.fingerprint, offset, self.size) for offset in offsets]
        cache.put(list(zip(names, datas, strict=True)))

    def found(self, cache: SampleCache, rows: range | list[int]) -> list[int]:
        """The rows that the cache has; their bytes are checked."""
        found = []
        offsets = self.offsets(rows)
        for row, offset, name in zip(rows, offsets, cache.ids(self.url, self.fingerprint, offsets), strict=True):
            data = cache.get(name, self.size)
            if data is not None:
                assert data == content(self.url, self.fingerprint, offset, self.size)
                found.append(row)
        return found

    def present(self, cache: SampleCache, rows: range | list[int]) -> list[int]:
        names = cache.ids(self.url, self.fingerprint, self.offsets(rows))
        here = cache.present(names)
        return [row for row, name in zip(rows, names, strict=True) if name in here]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[SampleCache]:
    cache = SampleCache(tmp_path / "cache", 64 * MIB)
    cache.begin("first")
    yield cache
    cache.close()


def file_bytes(cache: SampleCache) -> int:
    return os.stat(os.path.join(cache.folder, "samples.sqlite")).st_size


def require_whole(cache: SampleCache) -> None:
    """SQLite finds nothing wrong with the file."""
    cache.close()
    database = sqlite3.connect(os.path.join(cache.folder, "samples.sqlite"))
    try:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT count(*) FROM samples WHERE id NOT IN (SELECT id FROM uses)").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM uses WHERE id NOT IN (SELECT id FROM samples)").fetchone() == (0,)
    finally:
        database.close()


def in_child(work: Callable[[], None]) -> int:
    """Start a forked child that does `work`; gives its process id. Its exit status is 0 when it raised nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:  # noqa: BLE001 (pytest must not go on in the child)
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def require_success(*children: int) -> None:
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 511, 4096, 300_000])
def test_samples_come_back_exactly(cache: SampleCache, size: int) -> None:
    shard = Shard(size=size)
    assert shard.found(cache, range(5)) == shard.present(cache, range(5)) == []
    shard.put(cache, [0, 2, 3])
    assert shard.found(cache, range(5)) == shard.present(cache, range(5)) == [0, 2, 3]


def test_views_of_a_larger_buffer_are_kept_as_what_they_show(cache: SampleCache) -> None:
    buffer = memoryview(bytes(range(256)) * 100)
    names = cache.ids(URL, FINGERPRINT, [512, 1024])
    cache.put([(names[0], buffer[100:200]), (names[1], buffer[5000:9000])])
    assert cache.get(names[0], 100) == bytes(buffer[100:200])
    assert cache.get(names[1], 4000) == bytes(buffer[5000:9000])


def test_another_shard_or_fingerprint_is_another_sample(cache: SampleCache) -> None:
    shards = [
        Shard(),
        Shard(fingerprint='size=1024;etag="abd";head=9f86d081'),
        Shard(url="s3://bucket/b.tar"),
        Shard(url="s3://bucket/a.tar\n", fingerprint="x"),
        Shard(url="s3://bucket/a.tar", fingerprint="\nx"),
        Shard(url="", fingerprint=""),
    ]
    for number, shard in enumerate(shards):
        shard.put(cache, range(number, 20, 6))
    for number, shard in enumerate(shards):
        assert shard.found(cache, range(20)) == list(range(number, 20, 6))


def test_a_sample_of_another_size_is_not_that_sample(cache: SampleCache) -> None:
    (name,) = cache.ids(URL, FINGERPRINT, [512])
    cache.put([(name, b"twelve bytes")])
    assert cache.get(name, 12) == b"twelve bytes"
    assert cache.get(name, 11) is cache.get(name, 13) is cache.get(name, 0) is None


def test_what_is_put_twice_is_kept_once(cache: SampleCache) -> None:
    shard = Shard()
    shard.put(cache, range(10))
    used = cache.used_bytes()
    for _ in range(5):
        shard.put(cache, range(10))
    assert shard.found(cache, range(10)) == list(range(10))
    assert cache.used_bytes() <= used + 8 * 4096


def test_offsets_that_have_no_name_are_not_kept(cache: SampleCache) -> None:
    offsets = [512, 513, 2**40 - 512, 2**40, 2**62]
    names = cache.ids(URL, FINGERPRINT, offsets)
    assert [name >= 0 for name in names] == [True, False, True, False, False]
    cache.put([(name, str(offset).encode()) for name, offset in zip(names, offsets, strict=True)])
    assert cache.get(names[0], 3) == b"512"
    assert cache.get(names[2], len(str(offsets[2]))) == str(offsets[2]).encode()
    assert cache.present(names) == {names[0], names[2]}
    assert cache.get(-1, 3) is None


def test_shards_whose_hashes_meet_are_kept_apart(cache: SampleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """All get the highest number there is, and have to move on, round the end."""
    same = SimpleNamespace(sha256=lambda data: SimpleNamespace(digest=lambda: b"\xff" * 32))
    monkeypatch.setattr(sample_cache, "hashlib", same)
    shards = [Shard(url=f"s3://bucket/{number}.tar") for number in range(4)]
    for shard in shards:
        shard.put(cache, range(3))
    numbers = [cache.ids(shard.url, shard.fingerprint, [2**40 - 512])[0] >> 31 for shard in shards]
    assert numbers == [2**32 - 1, 0, 1, 2]
    again = SampleCache(cache.folder, 64 * MIB)
    assert [shard.found(again, range(5)) for shard in shards] == [[0, 1, 2]] * 4
    again.close()


def test_many_samples_can_be_asked_for_at_once(cache: SampleCache) -> None:
    shard = Shard(size=10)
    shard.put(cache, range(0, 40_000, 4))
    assert shard.present(cache, range(40_000)) == list(range(0, 40_000, 4))


# ---- lifetime --------------------------------------------------------------------------------------------------------


def test_it_outlives_its_process_and_its_object(cache: SampleCache) -> None:
    Shard().put(cache, range(30))
    cache.close()
    assert Shard().found(cache, range(40)) == list(range(30))  # opened again
    other = SampleCache(cache.folder, 64 * MIB)
    assert Shard().found(other, range(40)) == list(range(30))
    other.close()


def test_it_can_be_pickled(cache: SampleCache) -> None:
    Shard().put(cache, range(10))
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.limit_bytes) == (cache.folder, cache.limit_bytes)
    assert repr(copy) == repr(cache) == f"SampleCache({cache.folder!r}, {64 * MIB})"
    assert Shard().found(copy, range(10)) == list(range(10))
    Shard().put(copy, [10])
    assert Shard().found(cache, range(11)) == list(range(11))
    copy.close()


def test_a_folder_is_made_and_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = SampleCache("~/deep/er", MIB)
    assert cache.folder == str(tmp_path / "deep/er")
    monkeypatch.chdir(tmp_path)
    relative = SampleCache("deep/er", MIB)
    monkeypatch.chdir("/")
    Shard().put(relative, [1])
    assert Shard().found(cache, [1]) == [1]
    cache.close()
    relative.close()


@pytest.mark.parametrize("limit", [0, -1, MIB - 1, 1e9, "64 MiB", None, True])
def test_wrong_limits_are_refused(tmp_path: Path, limit: Any) -> None:
    with pytest.raises(UsageError, match=f"limit_bytes has to be an integer from 1,048,576 on; got {limit!r}"):
        SampleCache(tmp_path, limit)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"file/cache: cannot be made a folder .*; give a folder on a disk"):
        SampleCache(tmp_path / "file" / "cache", MIB)


# ---- a file that is made anew ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, False])
def test_a_file_made_anew_by_another_process_gives_no_bytes_of_another_sample(cache: SampleCache, closed: bool) -> None:
    """Numbers of shards that were remembered from the old file must not mean others in the new one."""
    mine = [Shard(url=f"s3://bucket/mine-{number}.tar") for number in range(5)]
    theirs = [Shard(url=f"s3://bucket/theirs-{number}.tar") for number in range(5)]
    for shard in mine:
        shard.put(cache, range(3))
    if closed:
        cache.close()
    shutil.rmtree(cache.folder)
    os.mkdir(cache.folder)
    other = SampleCache(cache.folder, 64 * MIB)
    for shard in theirs:
        shard.put(other, range(10))
    for shard in mine:
        assert set(shard.found(cache, range(10))) <= {0, 1, 2}  # their bytes are checked
        shard.put(cache, range(5))
    cache.close()
    for shard in theirs:
        assert shard.found(other, range(10)) == list(range(10))
    for shard in mine:
        assert set(shard.found(other, range(10))) <= set(range(5))
    other.close()


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_threads_share_it(cache: SampleCache) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        shard = Shard(url=f"s3://bucket/{number % 3}.tar")
        try:
            for row in range(number, 60, 8):
                shard.put(cache, [row])
                assert shard.found(cache, [row]) == [row]
                shard.found(cache, range(60))
        except BaseException as error:  # noqa: BLE001
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for number in range(3):
        rows = sorted(row for other in range(number, 8, 3) for row in range(other, 60, 8))
        assert Shard(url=f"s3://bucket/{number}.tar").found(cache, range(60)) == rows
    require_whole(cache)


def test_a_forked_child_reads_and_writes_and_its_parent_goes_on(cache: SampleCache) -> None:
    Shard().put(cache, range(10))

    def work() -> None:
        assert Shard().found(cache, range(20)) == list(range(10))
        Shard().put(cache, range(10, 20))
        assert Shard().found(cache, range(20)) == list(range(20))

    child = in_child(work)
    Shard().put(cache, range(20, 40))
    require_success(child)
    assert Shard().found(cache, range(50)) == list(range(40))
    require_whole(cache)


def test_a_parent_that_closes_takes_nothing_away_from_its_children(cache: SampleCache) -> None:
    """A child that had inherited open files would count its parent's locks as its own: the file was damaged then."""
    Shard().put(cache, range(20))
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()

    def work() -> None:
        Shard(url="child-1").put(cache, range(200))
        os.write(to_parent, b"x")
        os.read(from_parent, 1)
        for first in range(0, 400, 20):
            Shard(url="child-2").put(cache, range(first, first + 20))
        assert Shard(url="child-1").found(cache, range(200)) == list(range(200))
        assert Shard(url="child-2").found(cache, range(400)) == list(range(400))

    child = in_child(work)
    os.read(from_child, 1)
    cache.close()
    Shard(url="parent-1").put(cache, range(200))
    os.write(to_child, b"x")
    for first in range(0, 400, 20):
        Shard(url="parent-2").put(cache, range(first, first + 20))
    require_success(child)
    for descriptor in (from_child, to_parent, from_parent, to_child):
        os.close(descriptor)
    for url, rows in (("child-1", 200), ("child-2", 400), ("parent-1", 200), ("parent-2", 400)):
        Shard(url=url).found(cache, range(rows))
    assert Shard().found(cache, range(20)) == list(range(20))
    require_whole(cache)


def test_a_fork_in_the_middle_of_other_threads_writes_leaves_all_locks_free(cache: SampleCache) -> None:
    stop = threading.Event()

    def write() -> None:
        row = 0
        while not stop.is_set():
            Shard(url="threads").put(cache, [row % 50])
            Shard(url="threads").found(cache, [row % 50])
            row += 1

    def work() -> None:
        deadline = time.monotonic() + 20
        own = Shard(url=f"child-{os.getpid()}")
        while own.found(cache, range(5)) != list(range(5)):
            assert time.monotonic() < deadline
            own.put(cache, range(5))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(8):
        time.sleep(0.02)
        children.append(in_child(work))
    stop.set()
    for thread in threads:
        thread.join()
    require_success(*children)
    require_whole(cache)


WRITER = """
import sys
from test_sample_cache import MIB, Shard
from dynams_stream import sample_cache

sample_cache._BUSY_SECONDS = 20.0  # on a busy machine a turn may take long
folder, number = sys.argv[1], int(sys.argv[2])
cache = sample_cache.SampleCache(folder, 64 * MIB)
cache.begin("first")
input()
for first in range(0, 200, 5):
    Shard(url=f"s3://bucket/{number}.tar").put(cache, range(first, first + 5))
    Shard(url="s3://bucket/shared.tar").put(cache, range(first, first + 5))
    assert Shard(url=f"s3://bucket/{number}.tar").found(cache, range(200)) == list(range(first + 5))
"""


def test_processes_that_write_at_once_lose_nothing(cache: SampleCache) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    program = [sys.executable, "-c", textwrap.dedent(WRITER), cache.folder]
    writers = [
        subprocess.Popen([*program, str(number)], env=environment, stdin=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    for name in ("0", "1", "2", "shared"):
        assert Shard(url=f"s3://bucket/{name}.tar").found(cache, range(210)) == list(range(200))
    require_whole(cache)


def test_a_writer_that_is_killed_leaves_a_whole_cache(cache: SampleCache) -> None:
    chance = random.Random(0)
    shard = Shard(size=20_000)

    def work() -> None:
        while True:
            for first in range(0, 400, 10):
                shard.put(cache, range(first, first + 10))

    for _ in range(12):
        child = in_child(work)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = shard.found(cache, range(400))
        assert len(found) % 10 == 0  # all samples of a range or none
        assert shard.present(cache, range(400)) == found
    assert len(found) == 400 or found
    require_whole(cache)


def test_others_go_on_while_one_holds_the_file_for_long(cache: SampleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give up keeping a sample rather than wait, say nothing, and keep samples again afterwards."""
    Shard().put(cache, range(3))
    cache.close()
    monkeypatch.setattr(sample_cache, "_BUSY_SECONDS", 0.05)
    holder = sqlite3.connect(os.path.join(cache.folder, "samples.sqlite"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    Shard().put(cache, [3])
    cache.begin("second")
    assert Shard().found(cache, range(5)) == [0, 1, 2]
    assert Shard(url="new").found(cache, range(5)) == []
    holder.execute("COMMIT")
    holder.close()
    Shard().put(cache, [4])
    assert Shard().found(cache, range(5)) == [0, 1, 2, 4]


# ---- the limit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [700, 13_000, 200_000])
def test_the_file_never_grows_beyond_its_limit(tmp_path: Path, size: int) -> None:
    cache = SampleCache(tmp_path, 2 * MIB)
    shard, most = Shard(size=size), 0
    rows = 10 * MIB // size
    step = max(1, rows // 40)
    for generation in range(3):
        cache.begin(str(generation))
        cache._full_until = 0.0
        for first in range(0, rows, step):
            shard.put(cache, range(first, min(rows, first + step)))
            most = max(most, file_bytes(cache))
    cache.close()
    most = max(most, file_bytes(cache))
    assert 1.5 * MIB < most <= 2 * MIB
    cache.begin("after")
    assert 0.6 * 2 * MIB < len(shard.found(cache, range(rows))) * size <= 2 * MIB
    require_whole(cache)


def test_the_log_beside_it_stays_small(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, 48 * MIB)
    most = 0
    for first in range(0, 3000, 20):
        Shard(size=13_000).put(cache, range(first, first + 20))
        most = max(most, sum(os.stat(file).st_size for file in tmp_path.iterdir()))
    assert most <= (48 + 16 + 1) * MIB
    cache.close()


def test_several_processes_keep_one_limit(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, 2 * MIB)

    def work(number: int) -> Callable[[], None]:
        def writing() -> None:
            for first in range(0, 200, 10):
                Shard(url=str(number), size=10_000).put(cache, range(first, first + 10))
                assert file_bytes(cache) <= 2 * MIB
                Shard(url=str(number), size=10_000).found(cache, range(200))

        return writing

    require_success(*[in_child(work(number)) for number in range(3)])
    assert file_bytes(cache) <= 2 * MIB
    assert sum(len(Shard(url=str(number), size=10_000).found(cache, range(200))) for number in range(3)) > 100
    require_whole(cache)


def test_a_full_cache_keeps_what_it_has(tmp_path: Path) -> None:
    """An epoch reads everything once: what was used last is needed again last."""
    cache = SampleCache(tmp_path, 2 * MIB)
    cache.begin("first")
    shard = Shard(size=13_000)
    for first in range(0, 1000, 10):
        shard.put(cache, range(first, first + 10))
    kept = shard.found(cache, range(1000))
    assert kept == list(range(len(kept)))
    cache._full_until = 0.0
    shard.put(cache, range(500, 510))
    assert shard.found(cache, range(1000)) == kept
    cache.close()


def test_a_full_cache_is_not_tried_again_for_some_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SampleCache(tmp_path, MIB)
    shard = Shard(size=13_000)
    shard.put(cache, range(60))
    shard.put(cache, range(60, 80))  # does not fit
    small = Shard(url="small", size=10)
    small.put(cache, [0])
    assert small.found(cache, [0]) == []
    later = time.monotonic() + sample_cache._FULL_SECONDS
    monkeypatch.setattr(sample_cache, "time", SimpleNamespace(monotonic=lambda: later))
    small.put(cache, [0])
    assert small.found(cache, [0]) == [0]
    cache.close()


def test_what_no_new_generation_wanted_makes_room(tmp_path: Path) -> None:
    """Two generations are kept: the newest, and the one before it."""
    cache = SampleCache(tmp_path, 2 * MIB)
    shard = Shard(size=13_000)
    cache.begin("1")
    shard.put(cache, range(60))
    cache.begin("2")
    assert shard.present(cache, range(20, 50)) == list(range(20, 50))
    shard.put(cache, range(100, 150))
    cache.begin("3")
    assert shard.present(cache, range(30, 40)) == list(range(30, 40))
    shard.put(cache, range(200, 300))  # rows 0 … 19 and 50 … 59 were wanted in generation 1 alone
    kept = shard.found(cache, range(300))
    assert not {*range(20), *range(50, 60)} & set(kept)
    assert set(kept) >= {*range(20, 50), *range(100, 150)}
    cache.close()


def test_room_is_made_even_when_much_has_to_go(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, 4 * MIB)
    small, large = Shard(url="small", size=700), Shard(url="large", size=900_000)
    cache.begin("1")
    for first in range(0, 4000, 200):
        small.put(cache, range(first, first + 200))
    before = len(small.found(cache, range(4000)))
    assert before > 3000
    cache.begin("2")
    cache.begin("3")
    cache._full_until = 0.0
    large.put(cache, range(3))
    assert large.found(cache, range(3)) == [0, 1, 2]
    assert len(small.found(cache, range(4000))) < before
    require_whole(cache)


def test_a_full_cache_goes_on_with_the_next_rounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a round shares with the last one is found, and what is new in it takes the place of what nobody wants."""
    cache = SampleCache(tmp_path, 6 * MIB)
    shards = [Shard(url=f"s3://bucket/{number}.tar", size=700) for number in range(4)]

    def read(name: str, rows: range, shard: Shard) -> list[int]:
        """As an epoch does: the rows that were found at its beginning; the others are put."""
        cache.begin(name)
        found = shard.present(cache, rows)
        missing = sorted({*rows} - {*found})
        for first in range(0, len(missing), 100):
            shard.put(cache, missing[first : first + 100])
        return found

    read("1", range(9000), shards[0])
    kept = shards[0].found(cache, range(9000))
    assert 4000 < len(kept) < 8000
    assert read("2", range(1000, 10_000), shards[0]) == [row for row in kept if row >= 1000]
    assert read("3", range(2000, 11_000), shards[0]) == [row for row in kept if row >= 2000]
    new = {*shards[0].found(cache, range(11_000))} - {*kept}
    assert len(new) > 500  # in the place of rows that round 1 alone has wanted
    for number, shard in enumerate(shards[1:]):
        read(f"{number}, other shards", range(9000), shard)
    assert len(shards[3].present(cache, range(9000))) > 500
    assert caplog.records == []
    assert file_bytes(cache) <= 6 * MIB
    require_whole(cache)


def test_a_cache_without_a_free_page_finds_one_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pages that samples leave to other tables are used up; new names of shards need more."""
    cache = SampleCache(tmp_path, MIB)
    for number in range(3):
        cache.begin(str(number))
        Shard(size=13_000).put(cache, range(10 * number, 10 * number + 10))
    cache.close()
    pages = file_bytes(cache) // 4096
    monkeypatch.setattr(cache._writing, "_most_pages", pages)
    unnamed = 0
    for number in range(40):
        unnamed += cache.ids(f"{number} {'x' * 500}", FINGERPRINT, [512])[0] < 0
        assert Shard(size=13_000).found(cache, range(10, 30)) == list(range(10, 30))
    assert 1 <= unnamed <= 3
    assert Shard(size=13_000).found(cache, range(10)) == []
    assert caplog.records == []
    assert file_bytes(cache) // 4096 == pages
    require_whole(cache)


def test_a_lowered_limit_holds_for_a_file_that_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = SampleCache(tmp_path, 4 * MIB)
    Shard(size=13_000).put(before, range(200))
    before.close()
    assert file_bytes(before) > 2 * MIB
    after = SampleCache(tmp_path, MIB)
    assert Shard(size=13_000).found(after, range(200)) == []
    Shard(size=13_000).put(after, range(20))
    assert Shard(size=13_000).found(after, range(200)) == list(range(20))
    assert file_bytes(after) <= MIB
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/samples.sqlite: larger than limit_bytes is now; removing its samples"
    ]
    require_whole(after)
    again = SampleCache(tmp_path, MIB)
    assert Shard(size=13_000).found(again, range(200)) == list(range(20))
    again.close()


def test_selections_that_alternate_keep_each_others_samples(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, 2 * MIB)
    training, validation = Shard(size=13_000), Shard(url="validation", size=13_000)
    for epoch in range(3):
        cache.begin("training")
        training.put(cache, range(60, 120) if epoch else range(60))
        cache.begin("validation")
        validation.put(cache, range(60))
        assert training.found(cache, range(60)) == list(range(60))
    assert validation.found(cache, range(60)) == list(range(60))
    cache.close()


def test_processes_that_name_the_same_selection_share_a_generation(cache: SampleCache) -> None:
    other = SampleCache(cache.folder, 64 * MIB)
    generations = []
    for name in ("first", "second", "second", "first", "third"):
        for each in (cache, other):
            each.begin(name)
            generations.append(each._generation)
    assert generations == [1, 1, 2, 2, 2, 2, 1, 1, 3, 3]
    other.close()


# ---- trouble ---------------------------------------------------------------------------------------------------------


def require_useless(cache: SampleCache) -> None:
    """It has nothing and keeps nothing, and nothing is raised."""
    cache.begin("some")
    Shard().put(cache, range(3))
    assert Shard().present(cache, range(3)) == Shard().found(cache, range(3)) == []
    assert cache.used_bytes() == 0


@pytest.mark.parametrize("damage", [b"no database" * 1000, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_damaged_file_is_logged_once_and_reading_goes_on(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "samples.sqlite").write_bytes(damage)
    cache = SampleCache(tmp_path, MIB)
    for _ in range(3):
        require_useless(cache)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    text = caplog.records[0].getMessage()
    assert text.startswith(f"{tmp_path}: the cache cannot be used (")
    assert text.endswith("); going on without it")


def test_a_file_that_is_damaged_while_it_is_used(cache: SampleCache, caplog: pytest.LogCaptureFixture) -> None:
    for first in range(0, 2000, 100):
        Shard().put(cache, range(first, first + 100))
    cache.close()
    path = os.path.join(cache.folder, "samples.sqlite")
    with open(path, "r+b") as file:  # all inner pages of the trees; the leaves' bytes stay as they are
        for page in range(file_bytes(cache) // 4096):
            file.seek(page * 4096)
            if page and file.read(1) in (b"\x05", b"\x02"):
                file.seek(page * 4096)
                file.write(b"\xee" * 100)
    assert Shard().found(cache, range(10)) == []
    Shard().put(cache, range(5000, 5010))
    assert Shard().found(cache, range(2000)) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{cache.folder}: the cache cannot be used (database disk image is malformed); going on without it"
    ]


def test_it_is_tried_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples.sqlite").write_bytes(b"no database" * 1000)
    cache = SampleCache(tmp_path, MIB)
    require_useless(cache)
    (tmp_path / "samples.sqlite").unlink()
    Shard().put(cache, [1])
    assert Shard().found(cache, [1]) == []
    later = time.monotonic() + sample_cache._PAUSE_SECONDS
    monkeypatch.setattr(sample_cache, "time", SimpleNamespace(monotonic=lambda: later, sleep=time.sleep))
    Shard().put(cache, [1])
    assert Shard().found(cache, [1]) == [1]
    cache.close()


def test_a_folder_that_is_removed_under_it(cache: SampleCache, caplog: pytest.LogCaptureFixture) -> None:
    Shard().put(cache, [1])
    cache.close()
    shutil.rmtree(cache.folder)
    for _ in range(2):
        require_useless(cache)
    assert len(caplog.records) == 1


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are the user's alone."""
    folder = Path(tempfile.mkdtemp(prefix="dynams-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("filled", [False, True])
def test_a_folder_that_may_only_be_read(anyones: Path, filled: bool) -> None:
    cache = SampleCache(anyones, MIB)
    if filled:
        Shard().put(cache, range(3))
    cache.close()

    def work() -> None:
        os.setgid(65534)
        os.setuid(65534)
        records: list[logging.LogRecord] = []
        sample_cache.logger.addFilter(lambda record: bool(records.append(record)))
        for _ in range(2):
            require_useless(cache)
        assert len(records) == 1

    require_success(in_child(work))
    assert Shard().found(cache, range(3)) == ([0, 1, 2] if filled else [])
    cache.close()


FULL_DISK = """
import logging, os, sys
from test_sample_cache import MIB, Shard
from dynams_stream.sample_cache import SampleCache

records = []
logging.getLogger("dynams_stream").addFilter(records.append)
handler = logging.Handler()
handler.emit = records.append
logging.getLogger().addHandler(handler)
cache = SampleCache(sys.argv[1], 64 * MIB)
cache.begin("first")
shard = Shard(size=13_000)
for first in range(0, 600, 10):
    shard.put(cache, range(first, first + 10))
kept = shard.found(cache, range(600))
assert kept == list(range(len(kept))), kept
assert len(records) == 1, records
assert records[0].getMessage().endswith("the disk is full before the cache is; going on with what fits"), records
cache.close()
fresh = SampleCache(sys.argv[1], 64 * MIB)
print(len(shard.found(fresh, range(600))))
"""


def test_a_full_disk_is_logged_once_and_what_is_there_stays(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    mount = f"mount -t tmpfs -o size=5m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    command = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    program = ["unshare", "-rm", "sh", "-c", command, sys.executable, textwrap.dedent(FULL_DISK)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert 20 <= int(done.stdout) < 400


# ---- anything at all -------------------------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 3), st.integers(0, 30), st.integers(1, 20)),
    st.tuples(st.just("read"), st.integers(0, 3), st.integers(0, 30), st.integers(1, 30)),
    st.tuples(st.just("begin"), st.integers(0, 3), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("close"), st.integers(0, 3), st.just(0), st.just(0)),
    st.tuples(st.just("fork"), st.integers(0, 3), st.integers(0, 30), st.integers(1, 20)),
    st.tuples(st.just("anew"), st.just(0), st.just(0), st.just(0)),
)


@given(history=st.lists(steps, max_size=25))
@settings(deadline=None, max_examples=40)
def test_whatever_happens_no_sample_has_anothers_bytes(history: list[tuple[str, int, int, int]]) -> None:
    """Two objects over one folder and one limit, forks, closings and removed files, in any order."""
    with tempfile.TemporaryDirectory() as folder:
        caches = [SampleCache(folder, MIB) for _ in range(2)]
        for what, number, first, count in history:
            cache, shard = caches[number % 2], Shard(url=str(number // 2), size=9000)
            rows = range(first, first + count)
            if what == "put":
                cache._full_until = 0.0
                shard.put(cache, rows)
            elif what == "begin":
                cache.begin(str(first))
            elif what == "close":
                cache.close()
            elif what == "fork":
                child = in_child(lambda cache=cache, shard=shard, rows=rows: shard.put(cache, rows))  # type: ignore[misc]
                shard.put(caches[1 - number % 2], rows)
                require_success(child)
            elif what == "anew":
                for name in os.listdir(folder):
                    os.unlink(os.path.join(folder, name))
                caches[number % 2].close()
            for each in (Shard(url=str(which), size=9000) for which in range(2)):
                each.found(caches[number % 2], range(50))
        for cache in caches:
            cache.close()


def test_it_is_what_a_spawned_process_gets(cache: SampleCache) -> None:
    Shard().put(cache, range(5))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_rows_found, (cache,)) == list(range(5))
    assert Shard().found(cache, range(10)) == list(range(6))


def _rows_found(cache: SampleCache) -> list[int]:
    found = Shard().found(cache, range(10))
    Shard().put(cache, [5])
    return found
