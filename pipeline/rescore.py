"""One run of re-scoring: a round from a checkpoint, unless it has one or the schedule asks for none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from dynams_stream import storage
from dynams_stream.errors import CheckpointError, UsageError
from dynams_stream.schedule import Schedule
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from pipeline.rounds import make_round, require_round
from pipeline.weights import SavedWeights

logger = logging.getLogger(__name__)


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
        options: further arguments of `pipeline.rounds.make_round`: choices, fallback, scheduler, workers, progress, …

    Raises:
        UsageError: arguments that no round can be made with.
        DynamsError: of the step that failed.
    """
    # wrong arguments are refused before the scoring, not after
    require_round(fraction, strategy, options.get("fallback"), options.get("choices"))
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


@dataclass(frozen=True)
class Due:
    """What a schedule asks for after a checkpoint: a fraction, or no round for a reason in words."""

    fraction: float | str | None
    reason: str = ""


def due_round(store: Store, schedule: Schedule, checkpoint: str, epoch: int | None) -> Due:
    """The fraction of the round that a checkpoint has to make, where the schedule asks for one.

    A checkpoint that was saved after epoch e makes the round that epoch e + 1 trains on. A round is due once in each
    interval: with the checkpoint before its first epoch, or a later one of the same interval where that was missed.

    Args:
        store: its newest round tells whether the interval has one.
        schedule: epoch → fraction.
        checkpoint: for the message.
        epoch: after which it was saved.

    Raises:
        CheckpointError: the epoch is not known.
    """
    if epoch is None:
        raise CheckpointError(
            f"{checkpoint} does not say after which epoch it was saved, which a schedule needs; save it with "
            f"network.save(path, epoch=…), or tell where its name has the number: --epoch-from 'model-{{epoch}}.'"
        )
    following = epoch + 1
    if following >= schedule.epochs:
        return Due(None, f"epoch {epoch} is the schedule's last")
    if schedule.round(following) is None:
        return Due(None, f"epoch {following} trains on everything")
    if schedule.draws(following):
        return Due(None, f"epoch {following} trains on random samples")
    first = max(start for start in range(following + 1) if schedule.starts_round(start))
    rounds = store.rounds()
    newest = rounds[-1].epoch if rounds else None
    if newest is not None and first - 1 <= newest < epoch:
        return Due(None, f"epochs {first} … have their round, {rounds[-1].number}, of epoch {newest}")
    return Due(schedule.fraction(following))
