"""Marks that readers leave in a store: this round is read, or a saved state names it. `dynams gc` spares such rounds.

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
TRY_AGAIN_AFTER = 60.0
"""Seconds after which a mark that could not be left is tried again; a store may take long to fail."""


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
        self._marked: tuple[int, int] | None = None
        self._due = 0.0  # when the next mark is
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_marked": None}

    def mark(self, round: int, version: int) -> None:
        """Tell that a round is read or named by a state; costs a small file once an hour. Never fails.

        A store that cannot be written to goes without, which is told once: whoever collects its garbage has to know its
        readers.
        """
        now = time.monotonic()
        if self._marked == (round, version) and now < self._due:
            return
        self._marked, self._due = (round, version), now + TRY_AGAIN_AFTER  # other threads go on reading meanwhile
        url = self._store.path(schema.use_path(round, version, self._loader))
        about = {"who": f"{socket.gethostname()}:{os.getpid()}", "time": datetime.now(UTC).isoformat()}
        try:
            storage.write_bytes(url, json.dumps(about).encode(), durable=False)
        except Exception as error:  # noqa: BLE001 (whatever a store's client raises, training goes on)
            self._due = time.monotonic() + TRY_AGAIN_AFTER
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s: no mark could be left (%r); `dynams gc` does not know that round %d is read, which stays only "
                    "while it is among the newest --keep",
                    url,
                    error,
                    round,
                )
        else:
            self._due = now + AGAIN_AFTER


def read_uses(store: Store, round: int | None = None) -> Iterator[Use]:
    """The marks in a store, all or those of a round; one that cannot be read counts as left now."""
    for name in storage.list_names(store.path(schema.USES_FOLDER)):
        number, _, rest = name.removesuffix(".json").partition("-")
        version = rest.partition("-")[0]
        if not (name.endswith(".json") and number.isdigit() and version.isdigit()):
            continue
        if round is not None and int(number) != round:
            continue
        who, when = "unknown", datetime.now(UTC)
        try:
            about = json.loads(storage.read_bytes(store.path(f"{schema.USES_FOLDER}/{name}")))
            who, when = str(about["who"]), datetime.fromisoformat(about["time"])
        except (ValueError, KeyError, OSError, TypeError):
            pass
        yield Use(int(number), int(version), who, when)
