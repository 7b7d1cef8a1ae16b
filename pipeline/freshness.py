"""How far the newest round is behind the newest checkpoint: what people alarm on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime

from dynams_stream import storage
from dynams_stream.store import Round, Store
from pipeline.checkpoints import Checkpoint, checkpoints
from pipeline.run_records import LastRun


@dataclass(frozen=True)
class Freshness:
    """Checkpoints against rounds.

    Attributes:
        place: the folder, or the file, that checkpoints are taken from.
        newest: the newest checkpoint; None where there is none.
        newest_modified: when it was written, in seconds since 1970.
        behind_seconds: how long ago the checkpoint was written that was dealt with last (it has its round, or none was
            due), where a newer one is there; else 0. Before the first, the age of the oldest. It rises until a newer
            one is dealt with, whatever becomes of the files: a trainer may keep its last three, or one that it
            overwrites.
        round_behind_seconds: by how much the newest checkpoint is newer than the one that the newest round was made
            from, whether or not a round is due; None without a round or a checkpoint.
    """

    place: str
    newest: str | None
    newest_modified: float | None
    behind_seconds: float
    round_behind_seconds: float | None


def freshness(store: Store, place: str, last_run: LastRun | None) -> Freshness:
    """What waits in a folder of checkpoints.

    Args:
        store: its newest round counts as made from what was there when its scoring began, where its checkpoint is gone.
        place: a folder, or one file.
        last_run: what was dealt with, a checkpoint that no round was due for included, and whose names count.

    Raises:
        CheckpointError: there is no such folder.
    """
    found = checkpoints(place, None if last_run is None else last_run.epoch_from)
    rounds = store.rounds()
    newest = found[-1] if found else None
    made_from = _round_time(found, rounds[-1], last_run) if rounds else None
    return Freshness(
        place=storage.absolute(place),
        newest=None if newest is None else newest.url,
        newest_modified=None if newest is None else newest.modified,
        behind_seconds=_behind(found, made_from, last_run),
        round_behind_seconds=None if newest is None or made_from is None else max(0.0, newest.modified - made_from),
    )


def _behind(found: list[Checkpoint], made_from: float | None, last_run: LastRun | None) -> float:
    dealt_with = max(made_from or 0.0, (last_run.dealt_with_modified if last_run else None) or 0.0)
    if not found or found[-1].modified <= dealt_with:
        return 0.0
    return max(0.0, time.time() - (dealt_with or found[0].modified))


def _round_time(found: list[Checkpoint], newest: Round, last_run: LastRun | None) -> float:
    """When the newest round's checkpoint was written, or its scoring began where that is not known."""
    path = (newest.manifest["checkpoint"] or {}).get("path")
    started = datetime.fromisoformat(newest.manifest["started"]).timestamp()
    known = [(one.url, one.modified) for one in found]
    if last_run is not None and last_run.dealt_with_modified is not None:
        known.append((str(last_run.dealt_with), last_run.dealt_with_modified))
    return next((written for url, written in known if url == path and written <= started + 1), started)
