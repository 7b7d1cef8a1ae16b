"""Cut a selection from score tables and publish the round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from dynams_stream import schema
from dynams_stream.cut import CutResult, ScorePart, exact_cut
from dynams_stream.dataset import Dataset
from dynams_stream.errors import RoundNotFoundError, ScoresIncompleteError, SelectionError
from dynams_stream.faithfulness import Faithfulness
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.selection import selected_count
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from dynams_stream.version import library_version
from pipeline.cores import available_cores
from pipeline.pending import FinishedPart, finished_parts, newest_scores
from pipeline.receipt import total_seconds


@dataclass(frozen=True)
class SelectResult:
    """A published round, and whether this call published it (else it was there already, made the same way)."""

    round: Round
    published: bool


def select_round(
    store: Store,
    *,
    fraction: float | str,
    strategy: str = "distance",
    scores_of: int | None = None,
    workers: int | None = None,
    as_newest: bool = False,
    faithfulness: Faithfulness | None = None,
) -> SelectResult:
    """Select the k smallest scores of the whole dataset and publish the round.

    Args:
        store: an indexed store with score tables.
        fraction: γ, the selected part of all samples; the decimal as written counts.
        strategy: an expression over score columns, such as `distance` or `abs(margin)`, or `random:SEED`.
        scores_of: the round whose score tables are cut; the newest complete ones by default.
        workers: threads that read the tables.
        as_newest: take an earlier round that was cut in the same way only if it is the newest one, so that "latest"
            means this selection afterwards; a training script that is run again needs that.
        faithfulness: how the proxy that scored compared with its model; recorded.

    Returns:
        The round. Scores that were cut with the same parameters already give the round that did it.

    Raises:
        UsageError: for a fraction outside [0, 1].
        ScoresIncompleteError: when score tables are missing.
        SelectionError: when no sample has a value to select on.
        RoundExistsError: when another job published the round first.
    """
    chosen = Strategy.parse(strategy)
    started = _now()
    dataset = store.dataset()
    selected_count(fraction, dataset.samples)
    scored = None if chosen.seed is not None else _scored_round(store, dataset, scores_of)
    parts = {} if scored is None else _complete_parts(store, dataset, scored)
    earlier = _same_selection(store, dataset, scored, fraction, chosen)
    if earlier is not None and (not as_newest or earlier.number == store.round("latest").number):
        return SelectResult(earlier, published=False)
    intent = {"dataset": dataset.digest, "scores_of": scored, "strategy": str(chosen), "fraction": float(fraction)}
    number = _round_to_publish(store, scored, intent)
    result = exact_cut(
        _score_parts(store, dataset, scored),
        fraction=fraction,
        strategy=chosen,
        destination=store.path(schema.selection_path(number)),
        ordered_map=ordered_thread_map(workers or available_cores()),
    )
    if result.scored == 0 and selected_count(fraction, dataset.samples):
        raise SelectionError(
            f"{store.url}: none of {dataset.samples} samples has a value of {chosen}; "
            f"margin, loss and el2n need labels: score with the right --label, or select on distance"
        )
    manifest = _manifest(store, dataset, number, scored, parts, result, started)
    manifest["faithfulness"] = None if faithfulness is None else asdict(faithfulness)
    return SelectResult(store.publish(number, manifest), published=True)


def _scored_round(store: Store, dataset: Dataset, scores_of: int | None) -> int:
    if scores_of is None:
        return newest_scores(store, dataset)
    if scores_of not in store.round_numbers():
        raise RoundNotFoundError(f"{store.url} holds no round {scores_of}; `dynams status` lists them")
    if not finished_parts(store, scores_of) and store.is_published(scores_of):
        reused = store.round(scores_of).manifest["scores_of"]
        return scores_of if reused is None else int(reused)
    return scores_of


def _complete_parts(store: Store, dataset: Dataset, scored: int) -> dict[int, FinishedPart]:
    done = finished_parts(store, scored)
    missing = [part.number for part in dataset.parts if part.number not in done]
    if missing:
        raise ScoresIncompleteError(
            f"{store.url}: round {scored} lacks the score tables of {len(missing)} of {len(dataset.parts)} parts "
            f"(first {missing[:5]}); run dynams score again, it does only what is missing"
        )
    foreign = [number for number, part in done.items() if part.identity["dataset"]["digest"] != dataset.digest]
    if foreign:
        raise ScoresIncompleteError(
            f"{store.url}: the score tables of round {scored} belong to dataset version "
            f"{done[foreign[0]].identity['dataset']['version']}, the newest is {dataset.version}; score it again"
        )
    first = done[dataset.parts[0].number].identity
    mixed = [number for number, part in done.items() if part.identity != first]
    if mixed:
        raise ScoresIncompleteError(
            f"{store.url}: the score tables of round {scored} were not all made by the same scorer and checkpoint "
            f"(part {mixed[0]} differs from part 0); remove those of part {mixed[0]} and run dynams score again"
        )
    return done


def _same_selection(
    store: Store, dataset: Dataset, scored: int | None, fraction: float | str, strategy: Strategy
) -> Round | None:
    """A published round that was cut from the same scores in the same way."""
    for published in reversed(store.rounds()):
        manifest = published.manifest
        source = manifest["scores_of"] if manifest["scores_of"] is not None else published.number
        if not manifest["score_parts"]:
            source = None
        if (
            source == scored
            and manifest["dataset"]["digest"] == dataset.digest
            and manifest["strategy"] == str(strategy)
            and manifest["fraction"] == float(fraction)
        ):
            return published
    return None


def _round_to_publish(store: Store, scored: int | None, intent: Mapping[str, Any]) -> int:
    """The scored round itself while no other selection was begun in it; else a round that will name its scores.

    An interrupted job finds the round it had begun: equal intents make equal bytes.
    """
    if scored is not None and not store.is_published(scored) and store.claim_selection(scored, intent):
        return scored
    for number, claimed in store.claims().items():
        if claimed == intent and not store.is_published(number):
            return number
    return store.claim_round(intent)


def _score_parts(store: Store, dataset: Dataset, scored: int | None) -> list[ScorePart]:
    return [
        ScorePart(
            url=None if scored is None else store.path(schema.scores_path(scored, part.number)),
            number=part.number,
            first_shard=part.first_shard,
            counts=dataset.counts[part.first_shard : part.first_shard + part.shards],
        )
        for part in dataset.parts
    ]


def _manifest(
    store: Store,
    dataset: Dataset,
    number: int,
    scored: int | None,
    parts: Mapping[int, FinishedPart],
    result: CutResult,
    started: str,
) -> dict[str, Any]:
    """What `round.json` records."""
    first = parts[min(parts)] if parts else None
    provenance: Mapping[str, Any] = first.receipt.provenance if first else {}
    return {
        "format": schema.FORMAT_VERSION,
        "round": number,
        "status": "complete",
        "dataset": {"version": dataset.version, "digest": dataset.digest},
        "checkpoint": {"path": provenance["checkpoint"], "sha256": first.identity["checkpoint"]} if first else None,
        "epoch": provenance.get("epoch"),
        "scorer": first.identity["scorer"] if first else None,
        **result.for_manifest(),
        "scores_of": None if scored in (None, number) else scored,
        "score_parts": sorted(parts),
        "library": library_version(),
        "started": provenance.get("started", started),
        "ended": _now(),
        "seconds": {
            name: round(seconds, 3) for name, seconds in total_seconds(part.receipt for part in parts.values()).items()
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
