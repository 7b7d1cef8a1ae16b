"""The one door to bytes: range reads, atomic writes, listing, create-if-absent and fingerprints.

Local paths go straight to the operating system; `scheme://` URLs go through fsspec (`s3://`, `gs://`, `az://` and
`http://` need the extras `dynams-stream[s3]`, `[gcs]`, `[azure]` and `[http]`). Shell pipes are refused.

A fingerprint says which bytes a shard held when it was indexed:

    size=30720;time=1732412345678901234;head=9f86d081     local: bytes, modification time in ns, CRC-32 of the first 512
    size=30720;etag="d41d8cd98f00b204";head=9f86d081      object store
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, Protocol, cast

import fsspec
import pyarrow as pa
from fsspec.utils import tokenize

from dynams_stream.errors import (
    MissingExtraError,
    ShardChangedError,
    ShardMissingError,
    ShardUnreadableError,
    StoreError,
    StoreFullError,
    UsageError,
)

HEADER_BYTES = 512
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
    **dict.fromkeys(("http", "https"), "http"),
}


def absolute(url: str | os.PathLike[str]) -> str:
    """An absolute local path, or the URL as it is.

    Raises:
        UsageError: for an empty name, or a `pipe:` URL, which would run a shell command.
    """
    text = os.fspath(url)
    if not text:
        raise UsageError("got an empty path; give a file, a folder or a URL such as s3://bucket/key")
    if text.startswith("pipe:"):
        raise UsageError(f"{text!r} would run a shell command; give a path or a URL such as s3://bucket/key instead")
    if text.startswith("file://"):
        text = text[len("file://") :]
    if _SCHEME.match(text):
        return text.rstrip("/")
    return os.path.abspath(os.path.expanduser(text))


def is_local(url: str) -> bool:
    """Whether `url` names a file of this machine."""
    return _SCHEME.match(url) is None


def join(base: str, relative: str) -> str:
    """`relative` (with `/`) below `base`."""
    return f"{base}/{relative}" if relative else base


def file_system(url: str) -> fsspec.AbstractFileSystem:
    """fsspec's file system for a remote URL.

    Raises:
        MissingExtraError: when the protocol's package is not installed.
        UsageError: when fsspec does not know the protocol.
    """
    protocol = url.split("://", 1)[0]
    try:
        # fsspec shares one instance between threads; its cached listings would hide what other processes write
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'dynams-stream[{extra}]'" if extra else f"install fsspec's package for {protocol}://"
        raise MissingExtraError(f"{url}: {error}. To read {protocol}:// {hint}") from error
    except ValueError as error:
        raise UsageError(f"{url}: fsspec knows no protocol {protocol!r}") from error


# ---- reading ---------------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Positioned reads of one open file or object."""

    size: int
    """Length in bytes when it was opened."""

    def pread(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; ShardChangedError when there are fewer."""

    def close(self) -> None:
        """Give the file handle back."""


class LocalReader:
    """Positioned reads of a local file, safe from several threads at once."""

    descriptor = -1

    def __init__(self, path: str):
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ShardMissingError(missing_message(path), shard=path) from error
        except OSError as error:
            advice = "raise `ulimit -n`" if error.errno in (errno.EMFILE, errno.ENFILE) else "see that it may be read"
            raise ShardUnreadableError(f"{path}: cannot be opened ({error}); {advice}", shard=path) from error
        self.path = path
        status = os.fstat(self.descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ShardUnreadableError(f"{path}: a folder, not a file; name the shards in it", shard=path)
        self.size = status.st_size
        self.modified = status.st_mtime_ns

    def was_written(self) -> bool:
        """Whether the file was written to since it was opened."""
        status = os.fstat(self.descriptor)
        return (status.st_size, status.st_mtime_ns) != (self.size, self.modified)

    def pread(self, offset: int, size: int) -> bytes:
        pieces: list[bytes] = []
        done = 0
        try:
            # a signal or a network file system may cut a read short; only an empty read is the end
            while done < size and (data := os.pread(self.descriptor, size - done, offset + done)):
                pieces.append(data)
                done += len(data)
        except OSError as error:
            raise ShardUnreadableError(
                f"{self.path}: {size} bytes at {offset} cannot be read ({error}); check the disk", shard=self.path
            ) from error
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) != size:
            raise ShardChangedError(short_message(self.path, offset, size, len(data)), shard=self.path)
        return data

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


class RemoteReader:
    """Positioned reads of an object through fsspec, one range request each.

    Args:
        url: the object.
        system: the file system to ask instead of the one that all share.
        options: what its methods take besides.
    """

    def __init__(self, url: str, system: fsspec.AbstractFileSystem | None = None, **options: object):
        self.url = url
        self._system = system or file_system(url)
        self._options = options
        try:
            self._about = self._system.info(url, **options)
        except FileNotFoundError as error:
            refused = error.__cause__  # over HTTP fsspec takes whatever it could not ask for as missing
            if url.startswith("http") and refused is not None and getattr(refused, "status", 0) not in (404, 410):
                raise refused from None
            raise ShardMissingError(missing_message(url), shard=url) from error
        if self._about["size"] is None:
            raise ShardUnreadableError(f"{url}: its server does not say how large it is; use another one", shard=url)
        self.size = int(self._about["size"])
        self.etag = str(self._about.get("ETag") or self._about.get("etag") or self._about.get("generation") or "")

    def pread(self, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        try:
            data = bytes(self._system.cat_file(self.url, start=offset, end=offset + size, **self._options))
        except FileNotFoundError as error:
            raise ShardMissingError(missing_message(self.url), shard=self.url) from error
        except OSError as error:
            if refusal(error) != "InvalidRange":  # how S3 says that the object ends before `offset`
                raise
            data = b""
        if len(data) != size:
            raise ShardChangedError(short_message(self.url, offset, size, len(data)), shard=self.url)
        return data

    def close(self) -> None:
        return None


def missing_message(url: str) -> str:
    """What to say of a shard that is not there."""
    return f"{url}: no such file or object; restore it, or index the dataset again without it"


def changed_message(url: str, indexed: str, found: str = "") -> str:
    """What to say of a shard that is not the one that was indexed."""
    now = f", now it is {found}" if found else ""
    return (
        f"{url}: not the shard that was indexed (it was {indexed}{now}); "
        f"restore it, or index the dataset again with `dynams index` and score a new round"
    )


def short_message(url: str, offset: int, wanted: int, found: int) -> str:
    """What to say when a range ends too early."""
    return (
        f"{url}: asked for {wanted} bytes at {offset}, got {found}; "
        f"the shard was truncated or rewritten after it was indexed: restore it, or index the dataset again"
    )


def open_reader(url: str) -> LocalReader | RemoteReader:
    """Open a file or object for positioned reads.

    Raises:
        ShardMissingError: when it is not there.
    """
    return LocalReader(url) if is_local(url) else RemoteReader(url)


def open_sequential(url: str) -> BinaryIO:
    """Open a file or object to be read (and seeked) from front to back."""
    try:
        if is_local(url):
            return open(url, "rb", buffering=1 << 20)
        return cast(BinaryIO, file_system(url).open(url, "rb", cache_type="readahead", block_size=8 << 20))
    except FileNotFoundError as error:
        raise ShardMissingError(missing_message(url), shard=url) from error


def open_random(url: str) -> BinaryIO:
    """Open a table's file for the scattered reads of a Parquet reader.

    Local files are opened by Arrow itself: its threads would call a Python file's methods, and one that still does when
    the interpreter ends aborts the process.
    """
    if is_local(url):
        return cast(BinaryIO, pa.OSFile(url, "rb"))
    return cast(BinaryIO, file_system(url).open(url, "rb", cache_type="none"))


def read_bytes(url: str) -> bytes:
    """The whole file or object; FileNotFoundError when it is not there."""
    if is_local(url):
        with open(url, "rb") as file:
            return file.read()
    return bytes(file_system(url).cat_file(url))


def file_digest(url: str) -> str:
    """SHA-256 of a whole file or object in hex, read in pieces; FileNotFoundError when it is not there."""
    digest = hashlib.sha256()
    with open_sequential(url) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(reader: LocalReader | RemoteReader) -> str:
    """What identifies the bytes behind an open reader (see the module's docstring for the form)."""
    head = zlib.crc32(reader.pread(0, min(HEADER_BYTES, reader.size)))
    if isinstance(reader, LocalReader):
        return f"size={reader.size};time={reader.modified};head={head:08x}"
    return f"size={reader.size};etag={reader.etag};head={head:08x}"


def etag_of(fingerprint: str) -> str:
    """The entity tag in an object's fingerprint, "" when it has none."""
    _, found, rest = fingerprint.partition(";etag=")
    return rest.rpartition(";head=")[0] if found else ""


def same_bytes(recorded: str, found: str, *, moved: bool) -> bool:
    """Whether two fingerprints name the same bytes; a `moved` copy is compared by size and header alone."""
    if recorded == found:
        return True
    if not moved:
        return False
    return _without_version(recorded) == _without_version(found)


def _without_version(text: str) -> list[str]:
    return [field for field in text.split(";") if field.startswith(("size=", "head="))]


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_writer(url: str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under `url` whole, when the block ends without an error, or not at all.

    Local: written beside its place, fsynced, renamed. Object store: written to a temporary file of this machine, then
    one PUT (or one multipart upload completed last). Several may be open at a time, in any number of threads. A local
    file that is not `durable` is not waited for: after a power cut it may be empty.

    Raises:
        StoreFullError: there is no room for it.
    """
    with _room_for(url), _local_writer(url, durable) if is_local(url) else _remote_writer(url) as file:
        yield file


@contextmanager
def _room_for(url: str) -> Iterator[None]:
    """Of a disk that is full, or a quota that is used up, say which file found it so."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise StoreFullError(
            f"{url}: no room to write it ({os.strerror(error.errno)}); free some space or raise the quota, then run "
            f"the same command again: what is done is kept"
        ) from error


@contextmanager
def _remote_writer(url: str) -> Iterator[BinaryIO]:
    # not fsspec's transactions: all threads share one, which commits whatever any of them has open
    with tempfile.NamedTemporaryFile(prefix="dynams-") as remote:
        yield cast(BinaryIO, remote)
        remote.flush()
        file_system(url).put_file(remote.name, url)


@contextmanager
def _local_writer(url: str, durable: bool) -> Iterator[BinaryIO]:
    temporary = _temporary_name(url)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        try:
            os.replace(temporary, url)
        except FileNotFoundError as error:
            raise StoreError(
                f"{url}: another job on this store removed the unfinished file as a leftover; run again when it is done"
            ) from error
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    if durable:
        _sync_folder(url)


def write_bytes(url: str, data: bytes, *, durable: bool = True) -> None:
    """Write or replace a whole file or object atomically; `durable` as for `atomic_writer`."""
    with atomic_writer(url, durable=durable) as file:
        file.write(data)


def create(url: str, data: bytes) -> None:
    """Write a whole file or object only if none is there: a hard link locally, a conditional PUT in an object store.

    Raises:
        FileExistsError: when there is one already; it is left as it was.
        StoreFullError: there is no room for it.
    """
    with _room_for(url):
        if is_local(url):
            _create_local(url, data)
        else:
            _create_remote(url, data)


def _create_local(url: str, data: bytes) -> None:
    temporary = _temporary_name(url)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _link(temporary, url)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)
    _sync_folder(url)


def _link(temporary: str, url: str) -> None:
    try:
        os.link(temporary, url)
    except FileExistsError:
        if os.stat(temporary).st_nlink != 2:  # else it is ours: a network file system repeated a request it had done
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        raise StoreError(
            f"{url}: its file system has no hard links, which create a file only if it is absent; "
            f"keep the store on one that has, or in an object store"
        ) from error


def _create_remote(url: str, data: bytes) -> None:
    system = file_system(url)
    if url.split("://", 1)[0] not in _CONDITIONAL:
        raise StoreError(
            f"{url}: cannot create a file only if it is absent there, which publishing needs; "
            f"use a store on {', '.join(sorted(_CONDITIONAL))} or a shared folder"
        )
    for wait in (0.1, 0.3, 1.0, 3.0, None):
        try:
            system.pipe_file(url, data, mode="create")
            return
        except FileExistsError:
            raise
        except OSError as error:
            code = refusal(error)
            if code == "PreconditionFailed":
                raise FileExistsError(url) from error
            if code != "ConditionalRequestConflict" or wait is None:  # S3 asks to try again when two PUTs meet
                raise
            time.sleep(wait)


def refusal(error: Exception) -> str:
    """The code with which an object store refused a request, "" when none is known.

    s3fs keeps it in the error's cause, gcsfs calls it `code`, and aiohttp `status`.
    """
    response = getattr(error.__cause__, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", getattr(error, "code", getattr(error, "status", ""))))
    return {"412": "PreconditionFailed", "409": "ConditionalRequestConflict"}.get(code, code)


def _temporary_name(path: str) -> str:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")


def _sync_folder(path: str) -> None:
    """Make a rename or link in the folder of `path` survive a power cut; some shared file systems refuse it."""
    with suppress(OSError):
        descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- names -----------------------------------------------------------------------------------------------------------


def list_names(folder: str) -> list[str]:
    """Sorted names of what lies directly in a folder or prefix; empty when there is none."""
    if is_local(folder):
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
    system = file_system(folder)
    with suppress(FileNotFoundError):
        return sorted({entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in system.ls(folder, detail=True)})
    return []


@dataclass(frozen=True)
class Listed:
    """A file or object as a listing shows it.

    Attributes:
        name: without its folder.
        size: in bytes.
        modified: when it was last written, in seconds since 1970; 0 where the store does not say.
        version: a text that changes whenever it is written.
    """

    name: str
    size: int
    modified: float
    version: str


def list_files(folder: str) -> list[Listed]:
    """The files that lie directly in a folder or prefix, by one listing; empty when there is none."""
    if is_local(folder):
        files = []
        for name in list_names(folder):
            with suppress(FileNotFoundError):  # it went in this moment
                status = os.stat(join(folder, name))
                if stat.S_ISREG(status.st_mode):
                    files.append(Listed(name, status.st_size, status.st_mtime, _version(status)))
        return files
    system = file_system(folder)
    with suppress(FileNotFoundError):
        entries = [entry for entry in system.ls(folder, detail=True) if entry["type"] == "file"]
        return [
            Listed(entry["name"].rsplit("/", 1)[-1], int(entry["size"]), _written(system, entry), tokenize(entry))
            for entry in entries
        ]
    return []


_WRITTEN_FIELDS = ("LastModified", "last_modified", "mtime", "updated")
"""What fsspec's object stores call the time in their listings."""


def _written(system: fsspec.AbstractFileSystem, entry: Mapping[str, Any]) -> float:
    told = next((entry[name] for name in _WRITTEN_FIELDS if name in entry), None)
    if isinstance(told, (int, float)):
        return float(told)
    if not isinstance(told, datetime):
        try:
            told = system.modified(entry["name"])
        except (FileNotFoundError, NotImplementedError):
            return 0.0
    return float(told.timestamp())


def exists(url: str) -> bool:
    """Whether a file, folder or object of that name is there now."""
    if is_local(url):
        return os.path.exists(url)
    return bool(file_system(url).exists(url))


def modified(url: str) -> float:
    """When a file or object was last written, in seconds since 1970; 0 when it is gone or the store does not say."""
    try:
        if is_local(url):
            return os.stat(url).st_mtime
        return float(file_system(url).modified(url).timestamp())
    except (FileNotFoundError, NotImplementedError):
        return 0.0


def version(url: str) -> str:
    """A text that changes whenever the file or object is written; empty when it is gone."""
    try:
        if is_local(url):
            return _version(os.stat(url))
        system = file_system(url)
        system.invalidate_cache()
        return str(system.ukey(url))
    except FileNotFoundError:
        return ""


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def remove(url: str) -> None:
    """Remove one file or object; nothing happens when it is gone already."""
    with suppress(FileNotFoundError):
        if is_local(url):
            os.remove(url)
        else:
            file_system(url).rm_file(url)


def remove_folder(url: str) -> None:
    """Remove an empty local folder; nothing happens when it is not empty, or gone. Object stores have no folders."""
    if is_local(url):
        with suppress(OSError):
            os.rmdir(url)


def remove_leftovers(folder: str, *, spare: str | None = None) -> None:
    """Remove what killed writers left in a local folder; object stores never show half-written objects.

    Args:
        folder: where to look.
        spare: a file name whose unfinished files stay, since another job may be about to create it.
    """
    if is_local(folder):
        for name in list_names(folder):
            if name.startswith(".") and name.endswith(".tmp") and not (spare and name.startswith(f".{spare}.")):
                remove(os.path.join(folder, name))
