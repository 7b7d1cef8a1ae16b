"""How far the newest round is behind the newest checkpoint: what people alarm on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime

from dynams_stream import storage
from dynams_stream.store import Round, Store
from pipeline.checkpoints import CHECKPOINT_ENDINGS, Checkpoint, checkpoints
from pipeline.run_records import LastRun


@dataclass(frozen=True)
class Freshness:
    """Checkpoints against rounds.

    Attributes:
        place: the folder, or the file, that checkpoints are taken from.
        newest: the newest checkpoint; None where there is none.
        newest_modified: when it was written, in seconds since 1970.
        behind_seconds: for how long the oldest checkpoint has waited that is newer than the newest round's; 0 when none
            is. (The newest one's age would stay small while a trainer goes on and nothing is scored.)
    """

    place: str
    newest: str | None
    newest_modified: float | None
    behind_seconds: float


def freshness(store: Store, place: str, last_run: LastRun | None) -> Freshness:
    """What waits in a folder of checkpoints.

    Args:
        store: its newest round counts as made from what was there when its scoring began, where its checkpoint is gone.
        place: a folder, or one file.
        last_run: what it dealt with, a checkpoint that no round was due for included.

    Raises:
        UsageError: there is no such folder.
    """
    found = _found(place)
    rounds = store.rounds()
    dealt_with = max(_round_time(found, rounds[-1]) if rounds else 0.0, _run_time(found, last_run))
    waiting = [one for one in found if one.modified > dealt_with]
    newest = found[-1] if found else None
    return Freshness(
        place=storage.absolute(place),
        newest=None if newest is None else newest.url,
        newest_modified=None if newest is None else newest.modified,
        behind_seconds=max(0.0, time.time() - waiting[0].modified) if waiting else 0.0,
    )


def _found(place: str) -> list[Checkpoint]:
    if not place.endswith(CHECKPOINT_ENDINGS):
        return checkpoints(place)
    url = storage.absolute(place)
    version = storage.version(url)
    return [Checkpoint(url, version, storage.modified(url))] if version else []


def _round_time(found: list[Checkpoint], newest: Round) -> float:
    """When the newest round's checkpoint was written, or its scoring began where that is not known."""
    path = (newest.manifest["checkpoint"] or {}).get("path")
    started = datetime.fromisoformat(newest.manifest["started"]).timestamp()
    return next((one.modified for one in found if one.url == path and one.modified <= started + 1), started)


def _run_time(found: list[Checkpoint], last_run: LastRun | None) -> float:
    if last_run is None or last_run.ending in ("failed", "stopped"):
        return 0.0
    began = datetime.fromisoformat(last_run.began).timestamp()
    return next((one.modified for one in found if one.url == last_run.checkpoint and one.modified <= began + 1), 0.0)
