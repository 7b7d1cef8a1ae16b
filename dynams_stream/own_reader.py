"""The reader of this process: files, connections and threads are never shared through a fork or a pickle."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from dynams_stream.dataset import Dataset
from dynams_stream.reading import SampleReader
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.sample_cache import SampleCache
from dynams_stream.store import Store

_INHERITED: Final[list[SampleReader]] = []  # a parent's readers: a forked child may not even take them down


class OwnReader:
    """Gives the process's `SampleReader`, made when it is first asked for, and anew for another dataset.

    Args:
        store, remote, cache, count: as `SampleReader` takes them.
    """

    def __init__(
        self, store: Store, *, remote: RemoteOptions | None, cache: SampleCache | None, count: Callable[..., None]
    ):
        self._made_of: dict[str, Any] = {"remote": remote, "cache": cache, "count": count}
        self._store = store
        self._reader: SampleReader | None = None
        self._owner: tuple[int, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_owner": None}

    def of(self, dataset: Dataset) -> SampleReader:
        """The reader of `dataset`."""
        owner = (os.getpid(), dataset.digest)
        if self._reader is None or self._owner != owner:
            if self._reader is not None and self._owner is not None:
                if self._owner[0] == os.getpid():
                    self._reader.close()
                else:
                    self._reader.close_files()
                    _INHERITED.append(self._reader)
            self._reader, self._owner = SampleReader(self._store, dataset, **self._made_of), owner
        return self._reader
