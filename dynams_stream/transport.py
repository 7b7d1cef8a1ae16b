"""One range request to an object store, and what became of it.

obstore (object_store, in Rust) does the transport: with 20 ms added to each request, 64 threads get 2,800 ranges of
13 KB a second through it at 190 µs of CPU each, through s3fs 860 at 1,160 µs (`benchmarks/engines.py`). Its runtime
does not survive a fork, so that a process which was forked after its parent had used it reads through fsspec instead,
as do protocols that obstore does not know, and addresses that it cannot ask for.

Nothing is tried twice here (`retries` does that): each way in asks once, names the version that it expects
(`If-Match`), and tells failures that may pass from those that will not.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import fsspec

from dynams_stream import storage
from dynams_stream.errors import MissingExtraError, ShardChangedError, ShardMissingError, ShardUnreadableError

logger = logging.getLogger(__name__)

_SCHEMES: Final = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
    **dict.fromkeys(("http", "https"), "http"),
}
"""The extra that each protocol belongs to; all of them go through obstore."""
_STATUS: Final = re.compile(r"status code: (\d{3})")
_AGAIN: Final = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})  # 520 and more are proxies' own
_SLOW_DOWN: Final = frozenset({429, 503})
_QUOTE: Final = '"'
_used_by: int | None = None  # the process in which obstore was first used
_warned: int | None = None  # the forked process that has said so
_INHERITED: Final[list[Any]] = []


class Answer(NamedTuple):
    """The bytes of a range, and the version of the object that they are of ("" where the store names none)."""

    data: Any
    etag: str


class TransientError(Exception):
    """A request failed in a way that may pass.

    Args:
        reason: what happened.
        slow_down: whether the store asks for fewer requests.
        short: whether it gave fewer bytes than it was asked for.
    """

    def __init__(self, reason: str, *, slow_down: bool = False, short: bool = False):
        super().__init__(reason)
        self.slow_down = slow_down
        self.short = short


class Transport:
    """Range requests from one process; safe from several threads at once.

    Args:
        timeout: seconds that one request may take.
        connections: how many are kept open.
    """

    def __init__(self, timeout: float, connections: int):
        self._timeout = timeout
        self._connections = connections
        self._clients: dict[tuple[str, bool], _Client] = {}
        self._mutex = threading.Lock()

    def get(self, url: str, start: int, stop: int, etag: str) -> Answer:
        """Bytes `start` to `stop` - 1 of an object, all of them.

        Args:
            url: the object.
            start, stop: which bytes; at least one.
            etag: the version that is expected; "" takes any.

        Raises:
            TransientError: when trying again may help.
            ShardMissingError, ShardChangedError, ShardUnreadableError: when it will not.
        """
        client = self._client(url)
        answer = client(url, start, stop, etag)
        if len(answer.data) != stop - start:
            raise TransientError(storage.short_message(url, start, stop - start, len(answer.data)), short=True)
        if etag and answer.etag and not same_etag(etag, answer.etag):
            raise ShardChangedError(storage.changed_message(url, etag, answer.etag), shard=url)
        return answer

    def _client(self, url: str) -> _Client:
        scheme, _, rest = url.partition("://")
        host, _, path = rest.partition("/")
        root, fits = f"{scheme}://{host}", _fits_obstore(scheme, path)
        client = self._clients.get((root, fits))
        if client is None:
            with self._mutex:
                client = self._clients.get((root, fits))
                if client is None:
                    self._clients[root, fits] = client = self._connect(scheme, root, fits)
        return client

    def _connect(self, scheme: str, root: str, fits: bool) -> _Client:
        if scheme not in _SCHEMES or not fits:
            return _FsspecClient(root, self._timeout)
        if importlib.util.find_spec("obstore") is None:
            raise MissingExtraError(
                f"{root}: reading {scheme}:// needs obstore: pip install 'dynams-stream[{_SCHEMES[scheme]}]'"
            )
        if not _may_use_obstore():
            return _FsspecClient(root, self._timeout)
        return _ObstoreClient(root, self._timeout, self._connections)


_Client = Callable[[str, int, int, str], Answer]


def _fits_obstore(scheme: str, path: str) -> bool:
    """Whether obstore can ask for this path: it knows no empty or relative parts, and in addresses no query strings."""
    if _SCHEMES.get(scheme) == "http" and ("?" in path or "#" in path or "%2f" in path.lower()):
        return False
    return {"", ".", ".."}.isdisjoint(path.split("/"))


def same_etag(one: str, other: str) -> bool:
    """Whether two entity tags name one version; some clients leave the quotes out."""
    return one.strip(_QUOTE) == other.strip(_QUOTE)


def comparable_etag(url: str, etag: str) -> str:
    """The version in a fingerprint as obstore sees it; "" when the two cannot be compared.

    Google's JSON interface, which gcsfs asks, names versions in another way than the XML interface that obstore asks.
    Weak tags cannot be asked for (RFC 9110, section 13.1.1), and fsspec does not give those that it gets.
    """
    comparable = _SCHEMES.get(url.partition("://")[0], "") in ("s3", "azure", "http") and not etag.startswith("W/")
    return etag if comparable else ""


def _if_match(etag: str) -> str:
    """The condition to send: none for a weak tag, which never matches one (RFC 9110, section 13.1.1)."""
    return "" if not etag or etag.startswith("W/") else f'"{etag.strip(_QUOTE)}"'


def _may_use_obstore() -> bool:
    """Whether this process can use obstore; remembers that it does."""
    global _used_by, _warned
    if _used_by is None:
        _used_by = os.getpid()
    if _used_by != os.getpid() and _warned != os.getpid():
        _warned = os.getpid()
        logger.warning(
            "this process was forked after its parent had read from an object store, which obstore does not survive: "
            "going on through fsspec, several times slower; give the DataLoader multiprocessing_context='forkserver'"
        )
    return _used_by == os.getpid()


def _hold_for_child() -> None:
    """Keep fsspec's file systems alive in a child: taken down there, they take their sockets out of the parent's loop.

    The two share it (`epoll`), and the parent would wait for its next answer for ever.
    """
    _INHERITED.append([list(getattr(kind, "_cache", {}).values()) for kind in fsspec.registry.values()])


os.register_at_fork(before=_hold_for_child, after_in_parent=_INHERITED.pop)


# ---- obstore ---------------------------------------------------------------------------------------------------------


class _ObstoreClient:
    """Requests to one bucket, container or host through obstore."""

    def __init__(self, root: str, timeout: float, connections: int):
        import obstore

        self._get = obstore.get
        self._root = root
        self._quotes = _SCHEMES[root.partition("://")[0]] == "http"  # addresses are quoted already, keys are not
        self._store = _open_store(root, timeout, connections)

    def __call__(self, url: str, start: int, stop: int, etag: str) -> Answer:
        options: Any = {"range": (start, stop)}
        if condition := _if_match(etag):
            options["if_match"] = condition
        try:
            path = url[len(self._root) + 1 :]
            result = self._get(self._store, unquote(path) if self._quotes else path, options=options)
            return Answer(result.bytes(), result.meta["e_tag"] or "")
        except FileNotFoundError as error:
            raise ShardMissingError(storage.missing_message(url), shard=url) from error
        except Exception as error:
            raise _judged(error, url, start, stop, etag) from error


def _open_store(root: str, timeout: float, connections: int) -> Any:
    from obstore import store

    scheme, _, name = root.partition("://")
    kind = _SCHEMES[scheme]
    settings: dict[str, Any] = {
        "client_options": {
            "timeout": f"{max(1, round(1000 * timeout))}ms",
            "pool_max_idle_per_host": str(connections),
            "allow_http": True,
        },
        "retry_config": {"max_retries": 0},
    }
    if kind == "s3":
        return store.S3Store(name, **_s3_settings(root), **settings)
    if kind == "gcs":
        return store.GCSStore(name, **settings)
    if kind == "azure":
        return store.AzureStore(name.partition("@")[0], **settings)
    return store.HTTPStore(root, **settings)


def _s3_settings(root: str) -> dict[str, Any]:
    """Endpoint, region and credentials as s3fs finds them: profiles, roles and fsspec's configuration included."""
    from fsspec.asyn import sync

    system = storage.file_system(root)
    system.connect()
    about = system._s3.meta
    settings = {"endpoint": about.endpoint_url, "region": about.region_name or "us-east-1"}
    keys = None if system.anon else system._s3._request_signer._credentials
    if keys is None:
        return settings | {"skip_signature": True}

    def current() -> Mapping[str, Any]:
        frozen = sync(system.loop, keys.get_frozen_credentials)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(keys, "_expiry_time", None),
        }

    return settings | {"credential_provider": current}


def _judged(error: Exception, url: str, start: int, stop: int, etag: str) -> Exception:
    """The typed error for what obstore raised; its message holds the status."""
    text = str(error).partition("\n")[0]
    found = _STATUS.search(text)
    status = int(found.group(1)) if found else 0
    kind = type(error).__name__
    slow_down = status in _SLOW_DOWN or "<Code>SlowDown</Code>" in text
    if status in _AGAIN or slow_down:
        return TransientError(text, slow_down=slow_down)
    if kind == "PreconditionError" or status == 412:
        return ShardChangedError(storage.changed_message(url, etag), shard=url)
    if status == 416:
        return ShardChangedError(storage.short_message(url, start, stop - start, 0), shard=url)
    if text.find("Requested ") >= 0 and text.find(", got ") >= 0:
        return TransientError(text, short=True)
    if kind == "NotSupportedError" or "non-partial response" in text:
        reason = "its server gives no byte ranges; serve it from one that does"
        return ShardUnreadableError(f"{url}: {reason}", shard=url)
    if kind == "GenericError" and not status:  # no connection, a reset, a timeout, a body that ends early
        return TransientError(text)
    return ShardUnreadableError(_unreadable_message(url, text), shard=url)


def _unreadable_message(url: str, reason: object) -> str:
    return f"{url}: cannot be read ({reason}); check its address and the credentials"


# ---- fsspec ----------------------------------------------------------------------------------------------------------


class _FsspecClient:
    """Requests through fsspec's file system of the protocol."""

    def __init__(self, root: str, timeout: float):
        self._kind = _SCHEMES.get(root.partition("://")[0], "")
        self._system = storage.file_system(root)
        if self._kind == "s3":
            self._system = _once_trying(self._system, timeout)
        self._options: dict[str, Any] = {"timeout": timeout} if self._system.async_impl else {}  # for fsspec's `sync`

    def __call__(self, url: str, start: int, stop: int, etag: str) -> Answer:
        try:
            return self._answer(url, start, stop, etag)
        except FileNotFoundError as error:
            raise ShardMissingError(storage.missing_message(url), shard=url) from error
        except Exception as error:
            code = storage.refusal(error)
            if code in ("PreconditionFailed", "412"):
                raise ShardChangedError(storage.changed_message(url, etag), shard=url) from error
            if code in ("InvalidRange", "416"):
                raise ShardChangedError(storage.short_message(url, start, stop - start, 0), shard=url) from error
            raise refused(error, url) from error

    def _answer(self, url: str, start: int, stop: int, etag: str) -> Answer:
        condition = _if_match(etag)
        if self._kind == "s3" and condition:
            bucket, key, _ = self._system.split_path(url)
            found = self._system.call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=condition
            )
            return Answer(self._body(found), found.get("ETag", ""))
        headers = {"headers": {"If-Match": condition}} if self._kind == "http" and condition else {}
        return Answer(self._system.cat_file(url, start=start, end=stop, **headers, **self._options), "")

    def _body(self, found: Mapping[str, Any]) -> bytes:
        from fsspec.asyn import sync

        return bytes(sync(self._system.loop, found["Body"].read))


def _once_trying(system: Any, timeout: float) -> Any:
    """An s3fs of its own that tries nothing again: it and botocore together would try 25 times, for minutes."""
    config = {"retries": {"total_max_attempts": 1}, "read_timeout": timeout, "connect_timeout": timeout}
    own = type(system)(**{**system.storage_options, "config_kwargs": {**system.config_kwargs, **config}})
    own.retries = 1
    return own


def refused(error: Exception, url: str) -> Exception:
    """The error for what fsspec raised and what does not say that the object is gone or another: transient or not."""
    code = storage.refusal(error)
    status = int(code) if code.isdigit() else 0
    if isinstance(error, PermissionError) or (status >= 400 and status not in _AGAIN):
        return ShardUnreadableError(_unreadable_message(url, error), shard=url)
    return TransientError(f"{type(error).__name__}: {error}", slow_down=code == "SlowDown" or status in _SLOW_DOWN)
