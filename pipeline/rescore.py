"""When to make a round: once, or whenever a new checkpoint appears in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dynams_stream import storage
from dynams_stream.errors import CheckpointError, UsageError
from dynams_stream.scorer import ScorerSpec
from dynams_stream.selection import selected_count
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from pipeline.score_job import score_round
from pipeline.select_job import select_round

CHECKPOINT_ENDINGS = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Rescored:
    """The round of a checkpoint, and whether this call published it."""

    checkpoint: str
    round: Round
    published: bool


def rescore(
    store: Store,
    scorer: ScorerSpec,
    checkpoint: str,
    *,
    fraction: float | str,
    strategy: str = "distance",
    guards: Mapping[str, Any] | None = None,
    **job: Any,
) -> Rescored:
    """Score and select with one checkpoint; a checkpoint that has its round already gives that one.

    Args:
        store, scorer, checkpoint, fraction, strategy: as for `pipeline.run_round`.
        guards: class_balance, min_per_class, exclude_noisy and most_disagreement of `select_round`.
        job: further arguments of `pipeline.score_job.score_round`: scheduler, workers, device, progress, …
    """
    selected_count(fraction, 0)  # wrong arguments are refused before the scoring, not after
    if Strategy.parse(strategy).seed is not None:
        raise UsageError(f"strategy {strategy!r} needs no checkpoint; use dynams select")
    path = storage.absolute(checkpoint)
    scored = score_round(store, scorer, checkpoint=path, **job)
    result = select_round(
        store, fraction=fraction, strategy=strategy, scores_of=scored.number, workers=job.get("workers"),
        **(guards or {}),
    )  # fmt: skip
    return Rescored(path, result.round, result.published)


def checkpoints(folder: str) -> list[str]:
    """The checkpoint files in a folder, oldest first.

    Raises:
        UsageError: when there is no such folder.
    """
    place = storage.absolute(folder)
    if storage.is_local(place) and not storage.exists(place):
        raise UsageError(f"--watch {folder}: no such folder; make it, or name the one the trainer writes to")
    names = [name for name in storage.list_names(place) if name.endswith(CHECKPOINT_ENDINGS) and name[0] != "."]
    urls = [storage.join(place, name) for name in names]
    return sorted(urls, key=lambda url: (storage.modified(url), url))


def watch(
    folder: str, *, every: float = 5.0, sleep: Callable[[float], None] = time.sleep, forever: bool = True
) -> Iterator[str]:
    """Checkpoints to rescore: the newest that is there now, then each one that appears, once it is complete.

    A file is complete when its size and time stayed the same over two looks, `every` seconds apart. Polling works the
    same on local disks, network file systems and object stores.

    Args:
        folder: where the trainer writes.
        every: seconds between looks.
        sleep: waits; given by tests.
        forever: go on after the first look that finds nothing new (else return then).
    """
    seen: dict[str, str] = {}
    settled: dict[str, str] = {}
    for url in checkpoints(folder)[:-1]:
        settled[url] = storage.version(url)
    while True:
        fresh = False
        for url in checkpoints(folder):
            version = storage.version(url)
            if settled.get(url) == version:
                continue
            if seen.get(url) == version:
                settled[url] = version
                yield url
            seen[url] = version
            fresh = True
        if not fresh and not forever:
            return
        sleep(every)


def newest_checkpoint(folder: str) -> str:
    """The newest checkpoint in a folder.

    Raises:
        CheckpointError: when there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint yet ({', '.join(CHECKPOINT_ENDINGS)})")
    return found[-1]
