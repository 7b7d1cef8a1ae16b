"""A small object server on the loopback that can be told to misbehave: delays, 503s, short bodies, resets, stale tags.

    with ObjectServer(folder) as server:                  GET /bucket/<path below folder>, as S3 and HTTP ask for it
        server.faults = lambda request: "503" if request.number < 3 else None
        …
        server.requests                                   what was asked for, in order

As a program it serves a folder until it is killed, for benchmarks, which count its work to another process:

    python tests/object_server.py FOLDER --delay 0.02     prints the port it listens on
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes close() send a reset


@dataclass(frozen=True)
class Request:
    """One request as it came in.

    Attributes:
        number: 0, 1, … in the order of arrival.
        method, path: as asked for.
        first, stop: the range asked for; None for everything.
        if_match: the version asked for; "" for any.
    """

    number: int
    method: str
    path: str
    first: int | None
    stop: int | None
    if_match: str


Fault = str | float | None
"""None: answer well. A number: seconds to wait before. "503", "500", "404", "403": that status. "short": fewer bytes
than announced, then the connection closes. "clipped": a range shorter than asked for. "reset": no answer, the
connection is reset. "stale": the object has another version. "hang": no answer at all."""


@dataclass
class ObjectServer:
    """Serves the files below a folder under `/bucket/`.

    Args:
        folder: what to serve.
        delay: seconds before each answer.
        etags: whether objects have entity tags.

    Attributes:
        faults: what to do with a request; called in the server's thread.
        requests: what was asked for.
        most_at_once: the most requests that were under way together.
    """

    folder: Path
    delay: float = 0.0
    etags: bool = True
    faults: Callable[[Request], Fault] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    port: int = 0

    def __enter__(self) -> ObjectServer:
        self._loop = asyncio.new_event_loop()
        self._under_way = 0
        self._files: dict[str, tuple[Any, float]] = {}
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes S3 clients come here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def ranges(self) -> list[Request]:
        """The range requests among the requests."""
        return [request for request in self.requests if request.first is not None]

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        server = self._loop.run_until_complete(listening)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()

    # ---- answers, in the server's thread -----------------------------------------------------------------------------

    def content(self, path: str) -> tuple[memoryview, str] | None:
        """The bytes and the version of an object."""
        file = self.folder / path.removeprefix("/bucket/")
        try:
            changed = os.stat(file).st_mtime_ns
        except FileNotFoundError:
            self._files.pop(path, None)
            return None
        if not file.is_file():
            return None
        known = self._files.get(path)
        if known is None or known[1] != changed:
            with open(file, "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            self._files[path] = known = (mapped, changed)
        etag = hashlib.md5(f"{path} {changed}".encode()).hexdigest()
        return memoryview(known[0]), f'"{etag}"'

    def begin(self, connection: _Connection, head: bytes) -> None:
        """Take one request."""
        request = self._parsed(head)
        self.requests.append(request)
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        fault = self.faults(request)
        if fault == "hang":
            return
        wait = self.delay + (fault if isinstance(fault, float) else 0.0)
        kind = fault if isinstance(fault, str) else ""
        if wait:
            self._loop.call_later(wait, self._end, connection, request, kind)
        else:
            self._end(connection, request, kind)

    def _parsed(self, head: bytes) -> Request:
        first_line, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first_line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        first = stop = None
        if "range" in headers:
            begin, _, last = headers["range"].removeprefix("bytes=").partition("-")
            first, stop = int(begin), int(last or 2**62) + 1  # `bytes=5-` goes to the end
        return Request(len(self.requests), method, target.partition("?")[0], first, stop, headers.get("if-match", ""))

    def _end(self, connection: _Connection, request: Request, kind: str) -> None:
        self._under_way -= 1
        transport = connection.transport
        if kind == "reset":
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            transport.close()
            return
        if kind.isdigit():
            transport.write(_headers(int(kind), len(SLOW_DOWN)))
            if request.method != "HEAD":  # whose answer has none: it would begin the next one
                transport.write(SLOW_DOWN)
            return
        found = self.content(request.path)
        if found is None:
            transport.write(_headers(404, 0))
            return
        data, etag = found
        etag = '"another"' if kind == "stale" else etag
        if request.if_match and request.if_match != etag:
            transport.write(_headers(412, 0))
            return
        self._send(transport, request, data, etag if self.etags else "", kind)

    def _send(self, transport: Any, request: Request, data: memoryview, etag: str, kind: str) -> None:
        status, extra = 200, ""
        body = data
        if request.first is not None:
            assert request.stop is not None
            stop = min(request.stop, len(data))
            if kind == "clipped":
                stop = request.first + (stop - request.first) // 2
            if request.first >= len(data):
                transport.write(_headers(416, 0))
                return
            body, status = data[request.first : stop], 206
            extra = f"Content-Range: bytes {request.first}-{stop - 1}/{len(data)}\r\n"
        if etag:
            extra += f"ETag: {etag}\r\n"
        transport.write(_headers(status, len(body), extra))
        if request.method == "HEAD":
            return
        if kind == "short":
            transport.write(body[: len(body) // 2])
            transport.close()
            return
        transport.write(body)


def _headers(status: int, length: int, extra: str = "") -> bytes:
    date = "Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nAccept-Ranges: bytes\r\n"
    return f"HTTP/1.1 {status} Answer\r\nContent-Length: {length}\r\n{date}{extra}\r\n".encode()


class _Connection(asyncio.Protocol):
    """Splits what comes in into requests."""

    def __init__(self, server: ObjectServer):
        self._server = server
        self._received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            self._server.begin(self, head)


def main() -> None:
    """Serve a folder until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay", type=float, default=0.0)
    options = parser.parse_args()
    with ObjectServer(options.folder, delay=options.delay) as server:
        server.requests = _Forgetful()
        print(server.port, flush=True)
        threading.Event().wait()


class _Forgetful(list[Request]):
    """A list that keeps nothing: a benchmark's server answers millions of requests."""

    def append(self, request: Request) -> None:
        return


if __name__ == "__main__":
    main()
