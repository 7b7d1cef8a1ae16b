"""One range request to an object store, and what became of it.

obstore (object_store, in Rust) does the transport: with 20 ms added to each request, 64 threads get 2,800 ranges of
13 KB a second through it at 200 µs of CPU each, through s3fs 780 at 1,280 µs (`benchmarks/engines.py`). Its runtime
does not survive a fork, so that a process which was forked after its parent had used it reads through fsspec instead,
as do protocols that obstore does not know, and addresses that it cannot ask for.

Nothing is tried twice here (`retries` does that): each way in asks once, names the version that it expects
(`If-Match`), and tells failures that may pass from those that will not. Through fsspec, versions are asked for on S3
and over HTTP alone; of other protocols it takes what it is given.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import fsspec

from dynams_stream import storage
from dynams_stream.errors import (
    DynamsError,
    MissingExtraError,
    ShardChangedError,
    ShardMissingError,
    ShardUnreadableError,
)

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

    def comparable_etag(self, url: str, etag: str) -> str:
        """The version in a fingerprint as it can be asked for here; "" when it cannot.

        Weak tags cannot be asked for (RFC 9110, section 13.1.1).
        """
        return etag if self._client(url).compares and not etag.startswith("W/") else ""

    def open_reader(self, url: str) -> storage.RemoteReader:
        """A reader that asks once for each of its answers, and does not wait for one longer than the timeout."""
        with _setting_up(url):
            system, options = _once_trying(url, self._timeout)
        return storage.RemoteReader(url, system, **options)

    def _client(self, url: str) -> _Client:
        scheme, _, rest = url.partition("://")
        host, _, path = rest.partition("/")
        root, fits = f"{scheme}://{host}", _fits_obstore(scheme, path)
        client = self._clients.get((root, fits))
        if client is None:
            with self._mutex:
                client = self._clients.get((root, fits))
                if client is None:
                    with _setting_up(url):
                        client = self._connect(scheme, root, fits)
                    self._clients[root, fits] = client
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


@contextmanager
def _setting_up(url: str) -> Iterator[None]:
    """What fails without any request is of the user's making."""
    try:
        yield
    except DynamsError:
        raise
    except Exception as error:
        reason = f"cannot be asked for ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        advice = "check its address, the configuration of its store (region, endpoint, profile) and the credentials"
        raise ShardUnreadableError(f"{url}: {reason}; {advice}", shard=url) from error


def _fits_obstore(scheme: str, path: str) -> bool:
    """Whether obstore can ask for this path: it knows no empty or relative parts, and in addresses no query strings."""
    if _SCHEMES.get(scheme) == "http" and ("?" in path or "#" in path or "%2f" in path.lower()):
        return False
    return {"", ".", ".."}.isdisjoint(path.split("/"))


def same_etag(one: str, other: str) -> bool:
    """Whether two entity tags name one version; some clients leave the quotes out."""
    return one.strip(_QUOTE) == other.strip(_QUOTE)


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
    """Requests to one bucket, container or host through obstore.

    Attributes:
        compares: whether the versions in fingerprints are those that it asks for. Google's JSON interface, which gcsfs
            asks, names them in another way than the XML interface that obstore asks.
    """

    def __init__(self, root: str, timeout: float, connections: int):
        import obstore

        kind = _SCHEMES[root.partition("://")[0]]
        self.compares = kind != "gcs"
        self._get = obstore.get
        self._root = root
        self._quotes = kind == "http"  # addresses are quoted already, keys are not
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
        return ShardUnreadableError(_without_ranges_message(url), shard=url)
    if "redirect without LOCATION" in text:
        advice = "set the region of its bucket (AWS_DEFAULT_REGION), or the endpoint of its store (AWS_ENDPOINT_URL)"
        return ShardUnreadableError(f"{url}: its store says that it is elsewhere ({text}); {advice}", shard=url)
    if kind == "GenericError" and not status:  # no connection, a reset, a timeout, a body that ends early
        return TransientError(text)
    return ShardUnreadableError(_unreadable_message(url, text), shard=url)


def _unreadable_message(url: str, reason: object) -> str:
    return f"{url}: cannot be read ({reason}); check its address and the credentials"


def _without_ranges_message(url: str) -> str:
    return f"{url}: its server gives no byte ranges; serve it from one that does"


# ---- fsspec ----------------------------------------------------------------------------------------------------------


class _FsspecClient:
    """Requests through fsspec's file system of the protocol.

    Attributes:
        compares: whether versions are asked for, and compared: the other file systems cannot do it.
    """

    def __init__(self, root: str, timeout: float):
        self._kind = _SCHEMES.get(root.partition("://")[0], "")
        self.compares = self._kind in ("s3", "http")
        self._system, self._options = _once_trying(root, timeout)

    def __call__(self, url: str, start: int, stop: int, etag: str) -> Answer:
        try:
            return self._answer(url, start, stop, etag)
        except FileNotFoundError as error:
            raise ShardMissingError(storage.missing_message(url), shard=url) from error
        except DynamsError:
            raise
        except Exception as error:
            code = storage.refusal(error)
            if code in ("PreconditionFailed", "412"):
                raise ShardChangedError(storage.changed_message(url, etag), shard=url) from error
            if code in ("InvalidRange", "416"):
                raise ShardChangedError(storage.short_message(url, start, stop - start, 0), shard=url) from error
            raise refused(error, url) from error

    def _answer(self, url: str, start: int, stop: int, etag: str) -> Answer:
        condition = _if_match(etag)
        if self._kind == "s3":
            bucket, key, _ = self._system.split_path(url)
            wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}
            found = self._system.call_s3("get_object", **wanted, **({"IfMatch": condition} if condition else {}))
            return Answer(self._body(found), found.get("ETag", ""))
        if self._kind == "http":
            answer: Answer = self._waited_for(self._over_http, url, start, stop, condition, **self._options)
            return answer
        return Answer(self._system.cat_file(url, start=start, end=stop, **self._options), "")

    async def _over_http(self, url: str, start: int, stop: int, condition: str) -> Answer:
        """As the file system's own `cat_file`, which does not give the version of the answer."""
        options = dict(self._system.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
        if condition:
            headers["If-Match"] = condition
        session = await self._system.set_session()
        async with session.get(self._system.encode_url(url), headers=headers, **options) as answer:
            self._system._raise_not_found_for_status(answer, url)
            if answer.status != 206:
                raise ShardUnreadableError(_without_ranges_message(url), shard=url)
            return Answer(await answer.read(), answer.headers.get("ETag", ""))

    def _body(self, found: Mapping[str, Any]) -> bytes:
        return bytes(self._waited_for(found["Body"].read))

    def _waited_for(self, ask: Any, *arguments: Any, **options: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self._system.loop, ask, *arguments, **options)


_Client = _ObstoreClient | _FsspecClient


def _once_trying(url: str, timeout: float) -> tuple[Any, dict[str, Any]]:
    """fsspec's file system of a protocol, and what its methods take for the timeout.

    S3's tries nothing again: s3fs and botocore together would try 25 times, for minutes.
    """
    system = storage.file_system(url)
    if _SCHEMES.get(url.partition("://")[0]) == "s3":
        config = {"retries": {"total_max_attempts": 1}, "read_timeout": timeout, "connect_timeout": timeout}
        system = type(system)(**{**system.storage_options, "config_kwargs": {**system.config_kwargs, **config}})
        system.retries = 1
        system.connect()  # what is wrong with the configuration shows here
    return system, {"timeout": timeout} if system.async_impl else {}


def refused(error: Exception, url: str) -> Exception:
    """The error for what fsspec raised and what does not say that the object is gone or another: transient or not."""
    code = storage.refusal(error)
    status = int(code) if code.isdigit() else 0
    if isinstance(error, PermissionError) or (status >= 400 and status not in _AGAIN):
        return ShardUnreadableError(_unreadable_message(url, error), shard=url)
    return TransientError(f"{type(error).__name__}: {error}", slow_down=code == "SlowDown" or status in _SLOW_DOWN)
