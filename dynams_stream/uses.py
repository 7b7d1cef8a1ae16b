"""Marks that loaders leave in a store: this round was begun, or a saved state names it. `dynams gc` spares such rounds.

control/uses/<round>-<dataset version>-<loader>.json      written again at most once an hour; its time is what counts
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dynams_stream import schema, storage
from dynams_stream.store import Store

logger = logging.getLogger(__name__)

AGAIN_AFTER = 3600.0
"""Seconds after which a loader marks the round that it still reads again."""


@dataclass(frozen=True)
class Use:
    """A mark.

    Attributes:
        round: the round's number; 0 for everything.
        version: the dataset version.
        who: host and process that left it.
        time: when, in UTC.
    """

    round: int
    version: int
    who: str
    time: datetime


class UseMarker:
    """Leaves the marks of one loader and its copies in other processes."""

    def __init__(self, store: Store):
        self._store = store
        self._loader = uuid.uuid4().hex[:12]
        self._marked: tuple[int, int, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_marked": None}

    def mark(self, round: int, version: int) -> None:
        """Tell that a round is read or named by a state; costs a small file once an hour. Never fails.

        A store that cannot be written to goes without: whoever collects its garbage has to know its readers.
        """
        now = time.monotonic()
        if self._marked is not None and self._marked[:2] == (round, version) and now - self._marked[2] < AGAIN_AFTER:
            return
        self._marked = (round, version, now)
        url = self._store.path(schema.use_path(round, version, self._loader))
        about = {"who": f"{socket.gethostname()}:{os.getpid()}", "time": datetime.now(UTC).isoformat()}
        try:
            storage.write_bytes(url, json.dumps(about).encode(), durable=False)
        except Exception as error:  # noqa: BLE001 (whatever a store's client raises, training goes on)
            logger.debug("%s: no mark could be left (%r)", url, error)


def read_uses(store: Store) -> Iterator[Use]:
    """All marks in a store; one that cannot be read counts as left now."""
    for name in storage.list_names(store.path(schema.USES_FOLDER)):
        number, _, rest = name.removesuffix(".json").partition("-")
        version = rest.partition("-")[0]
        if not (name.endswith(".json") and number.isdigit() and version.isdigit()):
            continue
        who, when = "unknown", datetime.now(UTC)
        try:
            about = json.loads(storage.read_bytes(store.path(f"{schema.USES_FOLDER}/{name}")))
            who, when = str(about["who"]), datetime.fromisoformat(about["time"])
        except (ValueError, KeyError, OSError, TypeError):
            pass
        yield Use(int(number), int(version), who, when)
