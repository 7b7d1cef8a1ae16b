"""A bounded file of this machine that keeps the samples which were fetched, for later epochs and for other processes.

    <folder>/samples.sqlite
        shards       id, url, fingerprint        another fingerprint is another shard; id: 32 bits of a hash of both
        generations  number, name                the selections that were read through this cache, in order
        samples      id, data                    id: shard · 2³¹ + offset / 512
        uses         id, generation              the newest generation that wanted the sample

SQLite keeps it whole when processes are killed, lets several processes write in turns and all of them read at once, and
holds the file to its limit (`max_page_count`). Samples leave some of its pages to the other tables, so that a full
cache still takes note of new rounds and of what they want. When it is full, samples make room that neither of the two
newest generations wanted; neighbouring rounds share most of their samples. Among the others nothing is thrown away: an
epoch reads everything once, in a random order, so that what was used last is needed again last, and throwing away the
least recently used would throw away what comes next. Two selections that alternate (training, validation) stay two
generations; when a third one begins, the older one's samples may go.

Whatever goes wrong with the disk is logged once; reading goes on without the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from dynams_stream.errors import UsageError

logger = logging.getLogger(__name__)

_VERSION: Final = 1
_TABLES: Final = f"""
    CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY, url TEXT, fingerprint TEXT, UNIQUE (url, fingerprint));
    CREATE TABLE IF NOT EXISTS generations (number INTEGER PRIMARY KEY, name TEXT);
    CREATE TABLE IF NOT EXISTS samples (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS uses (id INTEGER PRIMARY KEY, generation INTEGER NOT NULL);
    CREATE INDEX IF NOT EXISTS by_generation ON uses (generation);
    PRAGMA user_version = {_VERSION};
"""
_NEWEST: Final = "SELECT name, number FROM generations ORDER BY number DESC LIMIT ?"
_UNWANTED: Final = """
    SELECT id FROM uses WHERE generation <= (SELECT max(number) FROM generations) - ? ORDER BY generation LIMIT ?
"""
_EMPTY: Final = """
    BEGIN IMMEDIATE; DELETE FROM samples; DELETE FROM uses; COMMIT; VACUUM; PRAGMA wal_checkpoint(TRUNCATE);
"""
_PAGE_BYTES: Final = 4096
_LEAST_BYTES: Final = 1 << 20
_LOG_BYTES: Final = 16 << 20  # SQLite's write-ahead log is cut to this when it has been taken over
_BLOCK: Final = 512
_OFFSET_BITS: Final = 31
_TAKEN: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_BUSY_SECONDS: Final = 0.5
_PAUSE_SECONDS: Final = 60.0
_FULL_SECONDS: Final = 60.0  # until a full cache is tried again; a new generation tries at once
_REMOVED: Final = 512  # samples removed at a time
_KEPT_GENERATIONS: Final = 2
_RESERVE: Final = 64  # samples leave one page in so many to the other tables,
_LEAST_RESERVE: Final = 8  # and at least so many


class SampleCache:
    """Keeps samples of remote shards in a folder of this machine, within a number of bytes.

    Ranks, workers and datasets may share one folder, and give it one limit then. But a full cache spares the two newest
    selections alone: a dataset that gets new rounds keeps its samples better in a folder of its own. It can be pickled
    and survives a fork. The folder has to be on a disk of this machine (SQLite's log does not work over a network).

    Args:
        folder: made if absent. When its file is larger than the limit, which was lowered then, it is begun anew.
        limit_bytes: the most that the samples may take on the disk, 1 MiB or more; a write-ahead log of about 16 MiB
            comes on top.

    Raises:
        UsageError: when the limit is too small or the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int):
        if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes < _LEAST_BYTES:
            raise UsageError(f"limit_bytes has to be an integer from {_LEAST_BYTES:,} on; got {limit_bytes!r}")
        self.folder = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        self.limit_bytes = limit_bytes
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot be made a folder ({error}); give a folder on a disk") from error
        self._start()

    def _start(self) -> None:
        self._reading = _Connection(self.folder, self.limit_bytes)
        self._writing = _Connection(self.folder, self.limit_bytes)
        self._shards: dict[tuple[str, str], int] = {}
        self._generation = 0
        self._generation_name: str | None = None
        self._paused_until = 0.0
        self._full_until = 0.0
        self._warned = False

    def __repr__(self) -> str:
        return f"SampleCache({self.folder!r}, {self.limit_bytes})"

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit_bytes": self.limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # ---- names -------------------------------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """Say which selection is read from now on; one of the newest names goes on with its generation."""
        if name == self._generation_name:
            return
        with self._connected(self._writing) as database:
            if database is None:
                return
            with database:
                database.execute("BEGIN IMMEDIATE")
                newest = dict(database.execute(_NEWEST, (_KEPT_GENERATIONS,)).fetchall())
                if name not in newest:
                    database.execute("INSERT INTO generations (name) VALUES (?)", (name,))
                    newest = dict(database.execute(_NEWEST, (_KEPT_GENERATIONS,)).fetchall())
            self._generation, self._generation_name, self._full_until = newest[name], name, 0.0

    def ids(self, url: str, fingerprint: str, offsets: Sequence[int]) -> list[int]:
        """What the samples at these offsets of a shard are called here; -1 where that cannot be said."""
        shard = self._shards.get((url, fingerprint))
        if shard is None:
            with self._connected(self._writing) as database:
                if database is None:
                    return [-1] * len(offsets)
                shard = self._shards[url, fingerprint] = _shard_id(database, url, fingerprint)
            if shard is None:
                return [-1] * len(offsets)
        base = shard << _OFFSET_BITS
        blocks = (divmod(offset, _BLOCK) for offset in offsets)
        return [-1 if rest or block >> _OFFSET_BITS else base | block for block, rest in blocks]

    # ---- samples -----------------------------------------------------------------------------------------------------

    def present(self, ids: Sequence[int]) -> set[int]:
        """Which of these are here; from now on this generation wants them."""
        rows: list[tuple[int, int]] = []
        with self._connected(self._reading) as database:
            if database is not None:
                rows = database.execute(
                    "SELECT id, generation FROM uses WHERE id IN (SELECT value FROM json_each(?))",
                    (json.dumps(list(ids)),),
                ).fetchall()
        self._want([name for name, generation in rows if generation < self._generation])
        return {name for name, _ in rows}

    def get(self, name: int, size: int) -> bytes | None:
        """One sample of `size` bytes; None when it is not here."""
        with self._connected(self._reading) as database:
            if database is not None:
                found = database.execute("SELECT data FROM samples WHERE id = ?", (name,)).fetchone()
                if found is not None and len(found[0]) == size:
                    return bytes(found[0])
        return None

    def put(self, samples: Sequence[tuple[int, bytes | memoryview]]) -> None:
        """Keep samples, unless there is no room for them."""
        samples = [(name, data) for name, data in samples if name >= 0]
        if not samples or time.monotonic() < self._full_until:
            return
        with self._connected(self._writing) as database:
            if database is None:
                return
            while not self._insert(database, samples):
                if not self._make_room(database):
                    self._full_until = time.monotonic() + _FULL_SECONDS
                    free = self._sample_pages - database.execute("PRAGMA page_count").fetchone()[0]
                    if _PAGE_BYTES * free > 2 * sum(len(data) for _, data in samples) + _LEAST_BYTES:
                        self._warn("the disk is full before the cache is; going on with what fits")
                    return

    @property
    def keeps(self) -> bool:
        """Whether what is put is kept, as far as this process knows: the cache is neither full nor unusable."""
        return time.monotonic() >= max(self._paused_until, self._full_until)

    def used_bytes(self) -> int:
        """Bytes of the file that are in use."""
        with self._connected(self._reading) as database:
            if database is not None:
                return _pages_used(database) * _PAGE_BYTES
        return 0

    def close(self) -> None:
        """Give open files back; they are opened again when they are needed."""
        self._reading.close()
        self._writing.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _sample_pages(self) -> int:
        """How many pages may be in use when a sample is added."""
        pages = self.limit_bytes // _PAGE_BYTES
        return pages - max(_LEAST_RESERVE, pages // _RESERVE)

    def _insert(self, database: sqlite3.Connection, samples: Sequence[tuple[int, bytes | memoryview]]) -> bool:
        """Whether they fitted."""
        try:
            with database:
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT OR REPLACE INTO samples (id, data) VALUES (?, ?)", samples)
                uses = [(name, self._generation) for name, _ in samples]
                database.executemany("INSERT OR REPLACE INTO uses (id, generation) VALUES (?, ?)", uses)
                fitted = _pages_used(database) <= self._sample_pages
                database.execute("COMMIT" if fitted else "ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            return False
        return fitted

    def _make_room(self, database: sqlite3.Connection) -> bool:
        """Remove some samples that no new generation wants; False when there are none."""
        with database:
            database.execute("BEGIN IMMEDIATE")
            oldest = database.execute(_UNWANTED, (_KEPT_GENERATIONS, _REMOVED)).fetchall()
            database.executemany("DELETE FROM samples WHERE id = ?", oldest)
            database.executemany("DELETE FROM uses WHERE id = ?", oldest)
        return bool(oldest)

    def _want(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        with self._connected(self._writing) as database:
            if database is not None:
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    database.executemany(
                        "UPDATE uses SET generation = ? WHERE id = ?", [(self._generation, name) for name in ids]
                    )

    @contextmanager
    def _connected(self, connection: _Connection) -> Iterator[sqlite3.Connection | None]:
        """The database for one thread at a time; None while the disk fails or others keep it locked."""
        with connection.mutex:
            database = None
            if time.monotonic() >= self._paused_until:
                try:
                    database = connection.open()
                except sqlite3.Error as error:
                    self._failed(connection, error)
            try:
                yield database
            except sqlite3.Error as error:
                if database is not None and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                    with suppress(sqlite3.Error):
                        self._make_room(database)  # nothing was written; the next one may find a page
                else:
                    self._failed(connection, error)

    def _failed(self, connection: _Connection, error: sqlite3.Error) -> None:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _TAKEN:
            return  # others write; this one is not kept
        connection.close()
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        self._warn("the cache cannot be used (%s); going on without it", error)

    def _warn(self, text: str, *details: object) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: " + text, self.folder, *details)


class _Connection:
    """A database connection that is made when it is first needed."""

    def __init__(self, folder: str, limit_bytes: int):
        self._path = os.path.join(folder, "samples.sqlite")
        self._most_pages = limit_bytes // _PAGE_BYTES
        self._database: sqlite3.Connection | None = None
        self.mutex = threading.RLock()
        with _ALL_MUTEX:
            _ALL.add(self)

    def open(self) -> sqlite3.Connection:
        """The open database, with its tables."""
        if self._database is None:
            database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                _prepare(database, self._path, self._most_pages)
            except BaseException:
                database.close()
                raise
            self._database = database
        return self._database

    def close(self) -> None:
        with self.mutex:
            if self._database is not None:
                self._database.close()
                self._database = None


_ALL: Final[weakref.WeakSet[_Connection]] = weakref.WeakSet()
_ALL_MUTEX: Final = threading.Lock()
_FORKING: Final[list[_Connection]] = []  # connections whose mutex is held while the process forks


def _before_fork() -> None:
    """Close all files: a child that inherited them would take SQLite's locks for its own, and would damage the file."""
    _ALL_MUTEX.acquire()
    _FORKING.extend(_ALL)
    for each in _FORKING:
        each.mutex.acquire()
        with suppress(sqlite3.Error):
            each.close()


def _after_fork() -> None:
    while _FORKING:
        _FORKING.pop().mutex.release()
    _ALL_MUTEX.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def _shard_id(database: sqlite3.Connection, url: str, fingerprint: str) -> int:
    """A shard's number, 32 bits: from its name, so that it is the same in a file that was made anew meanwhile."""
    number = int.from_bytes(hashlib.sha256(f"{url}\n{fingerprint}".encode()).digest()[:4])
    while True:
        found = database.execute("SELECT id FROM shards WHERE url = ? AND fingerprint = ?", (url, fingerprint))
        if (row := found.fetchone()) is not None:
            return int(row[0])
        database.execute("INSERT OR IGNORE INTO shards VALUES (?, ?, ?)", (number, url, fingerprint))
        number = (number + 1) % 2**32  # for when this one is another shard's


def _prepare(database: sqlite3.Connection, path: str, most_pages: int) -> None:
    deadline = time.monotonic() + 10 * _BUSY_SECONDS
    while True:
        try:
            database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            database.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:  # several processes begin at once
            if error.sqlite_errorcode & 0xFF not in _TAKEN or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
        database.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
    if database.execute("PRAGMA page_count").fetchone()[0] > most_pages:
        logger.warning("%s: larger than limit_bytes is now; removing its samples", path)
        database.executescript(_EMPTY)
    database.execute(f"PRAGMA max_page_count = {most_pages}")


def _pages_used(database: sqlite3.Connection) -> int:
    pages, free = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    return int(pages - free)
