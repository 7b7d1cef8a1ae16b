"""When to make a round: once, or whenever a new checkpoint appears in a folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dynams_stream import storage
from dynams_stream.errors import CheckpointError, UsageError
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from pipeline.rounds import make_round, require_round
from pipeline.weights import SavedWeights

logger = logging.getLogger(__name__)

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
    model_checkpoint: str | None = None,
    **options: Any,
) -> Rescored:
    """Score and select with one checkpoint; a checkpoint that has its round already gives that one.

    Args:
        store, scorer, checkpoint, fraction, strategy: as for `pipeline.run_round`.
        model_checkpoint: the weights of the model whose proxy the checkpoint is, to compare the two with; None for no
            comparison.
        options: further arguments of `pipeline.rounds.make_round`: guards, fallback, scheduler, workers, progress, …

    Raises:
        UsageError: arguments that no round can be made with.
        DynamsError: of the step that failed.
    """
    # wrong arguments are refused before the scoring, not after
    require_round(fraction, strategy, options.get("fallback"), options.get("guards"))
    if Strategy.parse(strategy).seed is not None:
        raise UsageError(f"strategy {strategy!r} needs no checkpoint; use dynams select")
    if model_checkpoint is not None and scorer.width == 1:
        raise UsageError("there is nothing to compare a scorer of width 1 with: it is the model; name its --width")
    path = storage.absolute(checkpoint)
    weights = SavedWeights(path, None if model_checkpoint is None else storage.absolute(model_checkpoint))
    made = make_round(store, scorer, weights, fraction=fraction, strategy=strategy, as_newest=False, **options)
    return Rescored(path, made.round, made.published)


def model_beside(checkpoint: str, pattern: str) -> str | None:
    """The model's checkpoint beside a proxy's: `pattern` with {name} filled in, the proxy's file name without ending.

    Returns:
        None, with a warning, where there is no such file.

    Raises:
        UsageError: the pattern has no {name}.
    """
    if "{name}" not in pattern:
        raise UsageError(f"{pattern!r} has no {{name}} in it, for which a checkpoint's name without ending is put in")
    name = storage.absolute(checkpoint).rsplit("/", 1)[-1].rpartition(".")[0]
    path = storage.absolute(pattern.replace("{name}", name))
    if not storage.exists(path):
        logger.warning(f"{path}: not there; {checkpoint} is not compared with its model")
        return None
    return path


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
