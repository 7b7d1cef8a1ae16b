"""Positioned reads of a shard in an object store, each tried again until a deadline, as the loader does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, TypeVar

from dynams_stream import storage
from dynams_stream.errors import DynamsError
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.retries import Retries
from dynams_stream.store import Store
from dynams_stream.transport import Transport, refused

T = TypeVar("T")

OPTIONS: Final = RemoteOptions(timeout=60, deadline=60)
"""A request is for megabytes here. A part whose shard stays away is tried once more, when the others are done."""


def retries(options: RemoteOptions) -> Retries:
    """The retry layer of a job: nobody counts its requests, and it can be run again."""
    return Retries(options, lambda **counted: None, advice="run the same command again: what is scored is kept")


RETRIES = retries(OPTIONS)
"""Of all requests for shards that this process makes."""
_TRANSPORT: Final = Transport(OPTIONS.timeout, OPTIONS.in_flight)
_NEVER: Final = threading.Event()


class RetryingReader:
    """As `storage.RemoteReader`, of a shard that holds what was indexed.

    Args:
        store: knows where shards have moved.
        url: of the shard, as it was indexed.
        fingerprint: what identified it then.

    Raises, also its `pread`:
        ShardMissingError, ShardChangedError: when the shard is gone, or not what was indexed.
        ShardUnreadableError: when the deadline passes.
    """

    def __init__(self, store: Store, url: str, fingerprint: str):
        self._place = store.shard_url(url)
        self._reader = self._until_done(
            lambda: store.open_shard(url, fingerprint, open_reader=_TRANSPORT.open_reader), "its description"
        )
        self.size = self._reader.size

    def pread(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        return self._until_done(lambda: self._reader.pread(offset, size), f"bytes {offset} to {offset + size - 1}")

    def close(self) -> None:
        """Nothing is held."""

    def _until_done(self, ask: Callable[[], T], what: str) -> T:
        def once() -> T:
            try:
                return ask()
            except DynamsError:
                raise
            except Exception as error:
                raise refused(error, self._place) from error

        return RETRIES.until_done(once, self._place, what, _NEVER)


def open_reader(store: Store, url: str, fingerprint: str) -> storage.Reader:
    """Open a shard, local or remote, and make sure that it holds the bytes that were indexed.

    Raises:
        ShardError: as `Store.open_shard`; of remote shards only after the deadline what may pass.
    """
    if storage.is_local(store.shard_url(url)):
        return store.open_shard(url, fingerprint)
    return RetryingReader(store, url, fingerprint)
