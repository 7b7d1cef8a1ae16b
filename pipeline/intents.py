"""What a selection is made from: equal intents make equal bytes, so that the same call finds its round again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from dynams_stream import schema, storage
from dynams_stream.class_quotas import ClassQuotas
from dynams_stream.errors import SelectionError, UsageError
from dynams_stream.store import Round, SelectionClaim, Store
from dynams_stream.strategy import Strategy


def selection_intent(
    digest: str,
    scored: int | None,
    strategy: str,
    fraction: float,
    quotas: ClassQuotas,
    judged_by: list[int] | None,
    left_out: list[int],
    weight: Strategy | str | None = None,
) -> dict[str, Any]:
    """The intent of a selection.

    Args:
        digest: of the dataset.
        scored: round whose tables are cut; None for a random order.
        strategy: canonical text.
        fraction: γ.
        quotas: what is asked of classes.
        judged_by: rounds whose tables told suspected label errors.
        left_out: shards that scoring left out.
        weight: expression of the samples' weights.
    """
    intent = {"dataset": digest, "scores_of": scored, "strategy": strategy, "fraction": fraction}
    if quotas:
        intent |= {"class_balance": quotas.balance, "min_per_class": quotas.least}
    if judged_by is not None:
        intent["judged_by"] = judged_by
    if left_out:  # tables made without shards may be replaced by others with them
        intent["bad_shards"] = left_out
    if weight is not None:
        intent["sample_weight"] = str(weight)
    return intent


def same_selection(store: Store, intent: Mapping[str, Any]) -> Round | None:
    """A published round that was cut from the same scores in the same way."""
    return next((one for one in reversed(store.rounds()) if _intent_of(one) == intent), None)


def _intent_of(published: Round) -> dict[str, Any]:
    manifest = published.manifest
    quotas = ClassQuotas(manifest.get("class_balance", False), manifest.get("min_per_class", 0))
    return selection_intent(
        manifest["dataset"]["digest"],
        published.scores_of,
        manifest["strategy"],
        manifest["fraction"],
        quotas,
        manifest.get("excluded", {}).get("judged_by"),
        [bad["shard"] for bad in manifest.get("bad_shards", ())],
        manifest.get("sample_weight"),
    )


class ClaimedRound(NamedTuple):
    """A round to publish a selection in.

    Attributes:
        number: of the round.
        made: the claim's file, relative to the store, where this call has made it; None where it was there.
    """

    number: int
    made: str | None


def round_to_publish(store: Store, scored: int | None, intent: Mapping[str, Any]) -> ClaimedRound:
    """The scored round itself while no other selection was begun in it; else a round that will name its scores.

    It is later than all that are published, so that loaders take it up as the latest. An interrupted job finds the
    round it had begun: equal intents make equal bytes.
    """
    newest = max((published.number for published in store.rounds()), default=0)
    if scored is not None and scored > newest:
        claim = store.claim_selection(scored, intent)
        if claim:
            made = schema.selection_claim_path(scored) if claim is SelectionClaim.MADE else None
            return ClaimedRound(scored, made)
    for number, claimed in store.claims().items():
        if claimed == intent and number > newest:
            return ClaimedRound(number, None)
    number = store.claim_round(intent)
    return ClaimedRound(number, schema.claim_path(number))


@contextmanager
def round_while_it_can_be_cut(store: Store, scored: int | None, intent: Mapping[str, Any]) -> Iterator[int]:
    """`round_to_publish` for the time of the cut: what refuses the selection gives back what was claimed for it here.

    A refusal comes from the intent and the score tables alone, before anything has been written under its name. So it
    meets every job with this intent, and none of them writes into the round that another intent may claim afterwards.
    """
    number, made = round_to_publish(store, scored, intent)
    try:
        yield number
    except (UsageError, SelectionError):
        if made is not None:
            storage.remove_folder(store.path(schema.round_path(number)))
            storage.remove(store.path(made))
        raise
