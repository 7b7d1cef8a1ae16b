"""One request to a store that answers well, refuses, breaks off or hangs: what is given, and what is raised."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from object_server import SLOW_DOWN, ObjectServer, Request, _headers

from dynams_stream import storage, transport
from dynams_stream.errors import MissingExtraError, ShardChangedError, ShardMissingError, ShardUnreadableError
from dynams_stream.transport import Answer, TransientError, Transport, same_etag

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

DATA = bytes(range(256)) * 40
SECONDS = 0.5
LAST: list[str] = []  # the server that fsspec's file systems know


class PlainServer(ObjectServer):
    """Refuses with the body that such an answer has, not with S3's SlowDown for every status."""

    body = b""

    def _end(self, connection: Any, request: Request, kind: str) -> None:
        if kind.isdigit():
            self._under_way -= 1
            connection.transport.write(_headers(int(kind), len(self.body)) + self.body * (request.method != "HEAD"))
        else:
            super()._end(connection, request, kind)


class WholeServer(ObjectServer):
    """Knows no byte ranges: it always gives everything."""

    def _send(self, answers: Any, request: Request, data: memoryview, etag: str, kind: str) -> None:
        super()._send(answers, dataclasses.replace(request, first=None, stop=None), data, etag, kind)


class FakeAzure(MemoryFileSystem):
    """Names versions as Azure does, and knows no conditions."""

    protocol = "az"
    store: dict[str, Any] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("az://", "memory://")))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {**super().info(path, **options), "etag": f"0x{hashlib.md5(self.cat_file(path)).hexdigest()}"}


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> FakeAzure:
    """Stands in for adlfs."""
    monkeypatch.setitem(_registry, "az", FakeAzure)
    monkeypatch.setattr(FakeAzure, "store", {})
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "somebody")
    return FakeAzure(use_listings_cache=False)


class WeakServer(ObjectServer):
    """Gives weak tags."""

    def content(self, path: str) -> tuple[memoryview, str] | None:
        found = super().content(path)
        return None if found is None else (found[0], f"W/{found[1]}")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[type[ObjectServer], ObjectServer]]:
    """The servers that run, by kind."""
    started: dict[type[ObjectServer], ObjectServer] = {}
    yield started
    for server in started.values():
        server.__exit__()


@pytest.fixture(autouse=True)
def like_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_used_by", None)
    monkeypatch.setattr(transport, "_warned", None)


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """fsspec keeps file systems, which know the configuration and the server of an earlier test."""
    clear = fsspec.get_filesystem_class("s3").clear_instance_cache
    clear()
    yield
    clear()


@pytest.fixture
def serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: dict[type[ObjectServer], ObjectServer]
) -> Callable[..., ObjectServer]:
    """Gives a server of a kind over a folder with `a.tar`, as if just started, and points S3 clients to it."""
    (tmp_path / "a.tar").write_bytes(DATA)

    def start(kind: type[ObjectServer] = PlainServer) -> ObjectServer:
        if kind not in started:
            started[kind] = kind(tmp_path).__enter__()
        server = started[kind]
        fresh = kind(tmp_path)
        for name in ("_parsed", "_send", "body"):
            server.__dict__.pop(name, None)
        for name in ("folder", "faults", "etags", "requests"):
            setattr(server, name, getattr(fresh, name))
        server._files.clear()
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        if [server.endpoint] != LAST:
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            LAST[:] = [server.endpoint]
        return server

    return start


@pytest.fixture(params=["s3", "http"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["obstore", "fsspec"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """obstore, or fsspec as in a process that was forked after its parent had used obstore."""
    if request.param == "fsspec":
        monkeypatch.setattr(transport, "_used_by", -1)
        monkeypatch.setattr(transport, "_warned", os.getpid())
    return str(request.param)


def url_of(server: ObjectServer, scheme: str, name: str = "a.tar") -> str:
    return f"s3://bucket/{name}" if scheme == "s3" else f"{server.endpoint}/bucket/{name}"


def etag_of(server: ObjectServer) -> str:
    found = server.content("/bucket/a.tar")
    assert found is not None
    return found[1]


def get(url: str, start: int = 10, stop: int = 20, etag: str = "", timeout: float = 5.0) -> Answer:
    return Transport(timeout, 4).get(url, start, stop, etag)


# ---- good answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 10240), (100, 612), (10239, 10240)])
def test_exactly_the_bytes_that_were_asked_for(
    serve: Callable[..., ObjectServer], scheme: str, way: str, start: int, stop: int
) -> None:
    server = serve()
    answer = get(url_of(server, scheme), start, stop, etag_of(server))
    assert bytes(answer.data) == DATA[start:stop]
    assert [(each.method, each.path, each.first, each.stop) for each in server.requests] == [
        ("GET", "/bucket/a.tar", start, stop)
    ]


@pytest.mark.parametrize("quoted", [True, False])
def test_the_expected_version_is_asked_for(
    serve: Callable[..., ObjectServer], scheme: str, way: str, quoted: bool
) -> None:
    server = serve()
    etag = etag_of(server)
    answer = get(url_of(server, scheme), etag=etag if quoted else etag.strip('"'))
    assert [each.if_match for each in server.requests] == [etag]
    assert answer.etag == etag


def test_without_an_expected_version_any_is_taken_and_told(
    serve: Callable[..., ObjectServer], scheme: str, way: str
) -> None:
    server = serve()
    answer = get(url_of(server, scheme))
    assert (bytes(answer.data), answer.etag) == (DATA[10:20], etag_of(server))
    assert [each.if_match for each in server.requests] == [""]
    server.etags = False
    assert get(url_of(server, scheme)).etag == ""


def test_weak_tags_are_not_asked_for_but_compared(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    server = serve(WeakServer)
    etag = etag_of(server)
    assert etag.startswith('W/"')
    assert bytes(get(url_of(server, scheme), etag=etag).data) == DATA[10:20]
    with pytest.raises(ShardChangedError, match=re.escape(f'it was W/"other", now it is {etag}')):
        get(url_of(server, scheme), etag='W/"other"')
    assert [each.if_match for each in server.requests] == ["", ""]


def test_one_transport_serves_many_threads_shards_and_stores(serve: Callable[..., ObjectServer], way: str) -> None:
    server = serve()
    (server.folder / "b.tar").write_bytes(DATA[::-1])
    both = Transport(5.0, 4)
    wrong = []

    def read(number: int) -> None:
        url = url_of(server, "s3" if number % 2 else "http", "b.tar" if number % 3 else "a.tar")
        data = DATA[::-1] if number % 3 else DATA
        for start in range(number, number + 400, 40):
            if bytes(both.get(url, start, start + 50, "").data) != data[start : start + 50]:
                wrong.append((url, start))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(server.requests) == 120
    assert len(both._clients) == 2


@pytest.mark.parametrize(
    "name",
    ["größe/a b.tar", "a+b=c&d.tar", "100%.tar", "a%20b.tar", "a#b.tar", "q?v.tar", "deep//er/a.tar", "[1]~.tar"],
)
def test_keys_are_names_not_addresses(serve: Callable[..., ObjectServer], name: str) -> None:
    server = serve()
    asked = _record_targets(server)
    (server.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (server.folder / name).write_bytes(DATA)
    assert bytes(get(f"s3://bucket/{name}").data) == DATA[10:20]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gr%C3%B6%C3%9Fe/a%20b.tar", "größe/a b.tar"),
        ("größe/a b.tar", "größe/a b.tar"),
        ("100%25.tar", "100%.tar"),
        ("a%2520b.tar", "a%20b.tar"),
        ("a%23b.tar", "a#b.tar"),
        ("q%3Fv.tar", "q?v.tar"),
        ("deep//er/a.tar", "deep//er/a.tar"),
        ("a.tar?signature=abc%2Fdef&expires=9", "a.tar"),
    ],
)
def test_addresses_are_quoted_once_and_keep_their_query(
    serve: Callable[..., ObjectServer], name: str, target: str
) -> None:
    server = serve()
    asked = _record_targets(server)
    (server.folder / target).parent.mkdir(parents=True, exist_ok=True)
    (server.folder / target).write_bytes(DATA)
    assert bytes(get(f"{server.endpoint}/bucket/{name}").data) == DATA[10:20]
    assert len(asked) == 1
    assert ("signature=abc" in asked[0]) == ("signature" in name)


def _record_targets(server: ObjectServer) -> list[str]:
    """Have the server take names as a real one does, unquoted; gives the raw targets of its requests."""
    asked: list[str] = []
    parse = server._parsed

    def parsed(head: bytes) -> Request:
        asked.append(head.split(b" ")[1].decode())
        request = parse(head)
        return dataclasses.replace(request, path=unquote(request.path))

    server._parsed = parsed  # type: ignore[method-assign]
    return asked


# ---- failures that will not pass -------------------------------------------------------------------------------------


def test_a_missing_object(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    url = url_of(serve(), scheme, "nothing.tar")
    with pytest.raises(ShardMissingError, match=f"^{re.escape(url)}: no such file or object") as caught:
        get(url)
    assert caught.value.shard == url


def test_another_version_than_was_expected(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    server = serve()
    url = url_of(server, scheme)
    with pytest.raises(
        ShardChangedError, match=re.escape(f'{url}: not the shard that was indexed (it was "old")')
    ) as it:
        get(url, etag='"old"')
    assert it.value.shard == url
    assert [each.if_match for each in server.requests] == ['"old"']
    server.faults = lambda request: "stale"
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        get(url, etag=etag_of(server))


def test_a_store_that_ignores_the_condition_is_caught(
    serve: Callable[..., ObjectServer], scheme: str, way: str
) -> None:
    server = serve()
    ignoring = server._parsed
    server._parsed = lambda head: dataclasses.replace(ignoring(head), if_match="")  # type: ignore[method-assign]
    message = re.escape(f'(it was "old", now it is {etag_of(server)})')
    with pytest.raises(ShardChangedError, match=message):
        get(url_of(server, scheme), etag='"old"')


def test_a_range_behind_the_end(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    url = url_of(serve(), scheme)
    with pytest.raises(ShardChangedError, match="asked for 20 bytes at 10240, got 0; the shard was truncated"):
        get(url, 10240, 10260)


@pytest.mark.parametrize("status", ["400", "401", "403", "501"])
def test_refusals_are_final(serve: Callable[..., ObjectServer], scheme: str, way: str, status: str) -> None:
    server = serve()
    server.faults = lambda request: status
    url = url_of(server, scheme)
    text = f"^{re.escape(url)}: cannot be read .*; check its address and the credentials$"
    with pytest.raises(ShardUnreadableError, match=text) as caught:
        get(url)
    assert caught.value.shard == url
    assert len(server.requests) == 1


def test_a_name_like_the_code_for_too_many_requests_means_nothing(
    serve: Callable[..., ObjectServer], scheme: str
) -> None:
    server = serve()
    server.faults = lambda request: "403" if request.number == 0 else "reset"
    url = url_of(server, scheme, "SlowDown.tar")
    with pytest.raises(ShardUnreadableError, match="cannot be read"):
        get(url)
    with pytest.raises(TransientError) as caught:
        get(url)
    assert not caught.value.slow_down


def test_a_server_without_byte_ranges(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    url = url_of(serve(WholeServer), scheme)
    if (scheme, way) == ("s3", "fsspec"):  # s3fs does not tell; the bytes are too many
        with pytest.raises(TransientError, match="asked for 10 bytes at 10, got 10240"):
            get(url)
        return
    with pytest.raises(
        ShardUnreadableError, match=f"^{re.escape(url)}: its server gives no byte ranges; serve it from"
    ):
        get(url)


def test_a_redirect_to_nowhere_tells_to_set_the_region(serve: Callable[..., ObjectServer]) -> None:
    """S3's answer to who asks in another region than the bucket's; s3fs finds the right one by itself."""
    server = serve()
    server.faults = lambda request: "301"
    text = r"^s3://bucket/a\.tar: its store says that it is elsewhere.* set the region .*\(AWS_DEFAULT_REGION\)"
    with pytest.raises(ShardUnreadableError, match=text) as caught:
        get("s3://bucket/a.tar")
    assert caught.value.shard == "s3://bucket/a.tar"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("AWS_PROFILE", "nobodys", r"ProfileNotFound: The config profile \(nobodys\) could not be found"),
        ("AWS_ENDPOINT_URL", "no address", "ValueError: Invalid endpoint: no address"),
    ],
)
@pytest.mark.parametrize("ask", [get, lambda url: Transport(5.0, 4).open_reader(url)])
def test_a_wrong_configuration_is_a_typed_error(
    serve: Callable[..., ObjectServer],
    fresh_clients: None,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    reason: str,
    ask: Callable[[str], object],
) -> None:
    serve()
    monkeypatch.setenv(name, value)
    advice = "check its address, the configuration of its store .* and the credentials"
    with pytest.raises(ShardUnreadableError, match=rf"^s3://bucket/a\.tar: .*\({reason}\); {advice}$") as caught:
        ask("s3://bucket/a.tar")
    assert caught.value.shard == "s3://bucket/a.tar"


# ---- failures that may pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "slow_down", "short"),
    [
        ("503", True, False),
        ("429", True, False),
        ("500", False, False),
        ("502", False, False),
        ("504", False, False),
        ("520", False, False),
        ("408", False, False),
        ("reset", False, False),
        ("short", False, False),
        ("clipped", False, True),
        ("hang", False, False),
    ],
)
def test_what_may_pass(
    serve: Callable[..., ObjectServer], scheme: str, way: str, fault: str, slow_down: bool, short: bool
) -> None:
    server = serve()
    server.faults = lambda request: fault
    began = time.monotonic()
    with pytest.raises(TransientError) as caught:
        get(url_of(server, scheme), etag=etag_of(server), timeout=SECONDS)
    assert (caught.value.slow_down, caught.value.short) == (slow_down, short)
    assert time.monotonic() - began < SECONDS + 2
    sent_again_by_aiohttp = way == "fsspec" and fault == "reset"  # a reset of a connection that was kept open
    assert len(server.requests) <= (2 if sent_again_by_aiohttp else 1)  # trying again is for `retries` to decide
    server.faults = lambda request: None
    assert bytes(get(url_of(server, scheme), etag=etag_of(server)).data) == DATA[10:20]


@pytest.mark.parametrize("status", ["503", "500"])
def test_s3_asks_for_fewer_requests_in_words_too(serve: Callable[..., ObjectServer], way: str, status: str) -> None:
    server = serve()
    server.body = SLOW_DOWN  # type: ignore[attr-defined]
    server.faults = lambda request: status
    with pytest.raises(TransientError) as caught:
        get(url_of(server, "s3"))
    assert caught.value.slow_down


def test_a_truncated_object(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    """It looks like an answer that was cut short by accident; that it stays so is for `retries` to notice."""
    url = url_of(serve(), scheme)
    with pytest.raises(TransientError) as caught:
        get(url, 10230, 10250)
    assert caught.value.short


def test_nobody_listens(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    class ShortLived(ObjectServer):
        pass

    server = serve(ShortLived)
    get(url_of(server, scheme))
    server.__exit__()
    with pytest.raises(TransientError):
        get(url_of(server, scheme), timeout=SECONDS)


def test_a_body_that_stops_coming(serve: Callable[..., ObjectServer], scheme: str, way: str) -> None:
    """The timeout is for the whole request, not for its first byte."""
    server = serve()

    def half(answers: Any, request: Request, data: memoryview, etag: str, kind: str) -> None:
        answers.write(_headers(206, 10, f"Content-Range: bytes 10-19/10240\r\nETag: {etag}\r\n") + b"12345")

    server._send = half  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(TransientError):
        get(url_of(server, scheme), timeout=SECONDS)
    assert time.monotonic() - began < SECONDS + 2


# ---- versions --------------------------------------------------------------------------------------------------------


def test_etags_are_the_same_with_and_without_quotes() -> None:
    assert same_etag('"abc"', "abc")
    assert same_etag('W/"abc"', 'W/"abc"')
    assert not same_etag('"abc"', '"abd"')
    assert not same_etag('W/"abc"', '"abc"')


@pytest.mark.parametrize(
    ("url", "etag", "comparable"),
    [
        ("s3://bucket/a", '"abc"', '"abc"'),
        ("az://container/a", "0x8D", "0x8D"),
        ("az://container//a", "0x8D", ""),
        ("s3a://bucket/a", '"abc-12"', '"abc-12"'),
        ("https://host/a", '"abc"', '"abc"'),
        ("gs://bucket/a", "CJDE", ""),
        ("gcs://bucket/a", "CJDE", ""),
        ("memory://a", "abc", ""),
        ("s3://bucket/a", "", ""),
        ("https://host/a", 'W/"abc"', ""),
    ],
)
def test_versions_that_can_be_asked_for(azure: FakeAzure, url: str, etag: str, comparable: str) -> None:
    assert Transport(5.0, 4).comparable_etag(url, etag) == comparable


@pytest.mark.parametrize(
    ("url", "asked_for"), [("s3://bucket/a", True), ("https://host/a", True), ("az://container/a", False)]
)
def test_versions_that_a_forked_process_can_ask_for(
    azure: FakeAzure, monkeypatch: pytest.MonkeyPatch, url: str, asked_for: bool
) -> None:
    monkeypatch.setattr(transport, "_used_by", -1)
    monkeypatch.setattr(transport, "_warned", os.getpid())
    assert Transport(5.0, 4).comparable_etag(url, "abc") == ("abc" if asked_for else "")


# ---- ways in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "extra"), [("s3://bucket/a", "s3"), ("gs://b/a", "gcs"), ("abfs://c/a", "azure"), ("https://h/a", "http")]
)
def test_a_missing_obstore_is_named(monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "obstore" else find(name, *more)
    )
    scheme = url.partition("://")[0]
    message = f"reading {scheme}:// needs obstore: pip install 'dynams-stream[{extra}]'"
    with pytest.raises(MissingExtraError, match=re.escape(message)):
        get(url)


def test_other_protocols_are_read_through_fsspec() -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/transport/a.tar", DATA)
    assert bytes(get("memory://transport/a.tar").data) == DATA[10:20]
    with pytest.raises(TransientError) as caught:
        get("memory://transport/a.tar", 10230, 10250)
    assert caught.value.short
    system.rm_file("/transport/a.tar")
    with pytest.raises(ShardMissingError, match=r"memory://transport/a\.tar: no such file or object"):
        get("memory://transport/a.tar")


def test_importing_it_imports_no_client() -> None:
    code = "import sys, dynams_stream; print(sorted({'obstore', 's3fs', 'aiohttp'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_process_forked_after_obstore_was_used_reads_through_fsspec(
    serve: Callable[..., ObjectServer], scheme: str
) -> None:
    server = serve()
    url, etag = url_of(server, scheme), etag_of(server)
    assert bytes(get(url, etag=etag).data) == DATA[10:20]

    def in_child(records: list[logging.LogRecord]) -> bool:
        own = Transport(5.0, 4)
        datas = [bytes(own.get(url, start, start + 10, etag).data) for start in (0, 50)]
        warned = [record.getMessage() for record in records]
        return (
            datas == [DATA[:10], DATA[50:60]]
            and type(next(iter(own._clients.values()))).__name__ == "_FsspecClient"
            and len(warned) == 1
            and "multiprocessing_context='forkserver'" in warned[0]
        )

    assert _in_fork(in_child)
    assert bytes(get(url, etag=etag).data) == DATA[10:20]  # the parent's is as it was


@pytest.mark.slow
def test_a_forked_child_leaves_the_connections_of_its_parent_alone(
    serve: Callable[..., ObjectServer], fresh_clients: None, scheme: str
) -> None:
    """fsspec takes an inherited file system down: its sockets would leave the event loop's `epoll`, which is shared."""
    server = serve()
    url = url_of(server, scheme)
    assert storage.open_reader(url).pread(0, 10) == DATA[:10]

    def in_child(records: list[logging.LogRecord]) -> bool:
        read = storage.open_reader(url).pread(5, 10) == DATA[5:15]
        gc.collect()
        return read

    for _ in range(2):
        assert _in_fork(in_child)
    again: list[bytes] = []
    reading = threading.Thread(target=lambda: again.append(storage.open_reader(url).pread(0, 10)), daemon=True)
    reading.start()
    reading.join(10)
    assert again == [DATA[:10]]
    assert transport._INHERITED == []


FORKS_FIRST = """
import os, sys
from dynams_stream.transport import Transport

child = os.fork()
own = Transport(5.0, 4)
ok = own.get(sys.argv[1], 0, 4, "").data == bytes(range(4))
ok = ok and type(next(iter(own._clients.values()))).__name__ == "_ObstoreClient"
if child == 0:
    os._exit(0 if ok else 1)
sys.exit(0 if ok and os.waitpid(child, 0)[1] == 0 else 1)
"""


def test_processes_that_fork_before_they_read_all_use_obstore(serve: Callable[..., ObjectServer]) -> None:
    program = [sys.executable, "-c", FORKS_FIRST, url_of(serve(), "s3")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")


def _in_fork(work: Callable[[list[logging.LogRecord]], bool]) -> bool:
    """What `work` returns in a forked child, which is given the records that are logged there."""
    child = os.fork()
    if child == 0:
        ok = False
        try:
            records: list[logging.LogRecord] = []
            handler = logging.Handler()
            handler.emit = records.append  # type: ignore[method-assign]
            transport.logger.addHandler(handler)
            ok = work(records)
        finally:
            os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- signing ---------------------------------------------------------------------------------------------------------


def test_requests_are_signed_as_s3fs_signs_them(
    serve: Callable[..., ObjectServer], fresh_clients: None, way: str
) -> None:
    server = serve()
    heads: list[str] = []
    parse = server._parsed
    server._parsed = lambda head: heads.append(head.decode().lower()) or parse(head)  # type: ignore[method-assign, func-returns-value]
    get(url_of(server, "s3"))
    (head,) = heads
    assert re.search(r"authorization: aws4-hmac-sha256 credential=test/\d{8}/us-east-1/s3/aws4_request", head)
    get(url_of(server, "http"))
    assert "authorization" not in heads[1]


def test_anonymous_requests_are_not_signed(
    serve: Callable[..., ObjectServer], fresh_clients: None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    heads: list[str] = []
    parse = server._parsed
    server._parsed = lambda head: heads.append(head.decode().lower()) or parse(head)  # type: ignore[method-assign, func-returns-value]
    assert bytes(get(url_of(server, "s3")).data) == DATA[10:20]
    assert ["authorization" in head for head in heads] == [False]


def test_fsspecs_configuration_holds_for_both_ways(
    serve: Callable[..., ObjectServer], fresh_clients: None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    for name in server.environment:
        monkeypatch.delenv(name)
    conf = {
        "key": "mine",
        "secret": "x",
        "endpoint_url": server.endpoint,
        "client_kwargs": {"region_name": "eu-west-1"},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", conf)
    heads: list[str] = []
    parse = server._parsed
    server._parsed = lambda head: heads.append(head.decode().lower()) or parse(head)  # type: ignore[method-assign, func-returns-value]
    assert bytes(get(url_of(server, "s3")).data) == DATA[10:20]
    assert re.search(r"credential=mine/\d{8}/eu-west-1/s3/", heads[0])


def test_headers_of_fsspecs_configuration_stay_with_a_version(
    serve: Callable[..., ObjectServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_used_by", -1)
    monkeypatch.setattr(transport, "_warned", os.getpid())
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer mine"}})
    server = serve()
    heads: list[str] = []
    parse = server._parsed
    server._parsed = lambda head: heads.append(head.decode()) or parse(head)  # type: ignore[method-assign, func-returns-value]
    assert bytes(get(url_of(server, "http"), etag=etag_of(server)).data) == DATA[10:20]
    assert ["Authorization: Bearer mine" in head for head in heads] == [True]
    assert [each.if_match for each in server.requests] == [etag_of(server)]


def test_a_real_s3_server(fresh_clients: None, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3", use_listings_cache=False)
        bucket = f"shards-{way}"
        system.mkdir(bucket)
        system.pipe_file(f"{bucket}/a.tar", DATA)
        etag = system.info(f"{bucket}/a.tar")["ETag"]
        answer = get(f"s3://{bucket}/a.tar", etag=etag)
        assert (bytes(answer.data), answer.etag) == (DATA[10:20], etag)
        with pytest.raises(ShardMissingError, match="no such file or object"):
            get(f"s3://{bucket}/b.tar")
        with pytest.raises(ShardChangedError, match="asked for 10 bytes at 20000, got 0"):
            get(f"s3://{bucket}/a.tar", 20000, 20010)
        system.pipe_file(f"{bucket}/a.tar", DATA[::-1])
        with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
            get(f"s3://{bucket}/a.tar", etag=etag)
    finally:
        server.stop()
