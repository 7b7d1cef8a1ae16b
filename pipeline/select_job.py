"""Cut a selection from score tables and publish the round."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from distributed import Client

from dynams_stream import schema, storage
from dynams_stream.class_quotas import ClassQuotas
from dynams_stream.cut import ScorePart, exact_cut, rows_by_shard
from dynams_stream.cut_part import task_bytes
from dynams_stream.dataset import Dataset
from dynams_stream.errors import ScoresIncompleteError, UsageError
from dynams_stream.faithfulness import Faithfulness
from dynams_stream.ordered_map import OrderedMap, ordered_thread_map
from dynams_stream.selection import recorded_fraction
from dynams_stream.selection_file import selection_writer
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from pipeline.cluster import dask_client
from pipeline.cores import available_cores
from pipeline.dask_map import ordered_dask_map
from pipeline.guards import examine_selection
from pipeline.intents import round_while_it_can_be_cut, same_selection, selection_intent
from pipeline.label_errors import require_cleanlab, score_history, suspected_label_errors
from pipeline.lease import store_lease
from pipeline.manifests import now, round_manifest
from pipeline.pending import (
    FinishedPart,
    complete_parts,
    finished_parts,
    may_be_replaced,
    require_content,
    require_few_failures,
    score_parts,
    tables_to_cut,
)
from pipeline.receipt import bad_shards

logger = logging.getLogger(__name__)

MOST_DISAGREEMENT = 0.15
"""Share of contradicted labels in a selection above which is warned; where it comes from is in docs/method.md."""

THREADS_BYTES = 320 << 20
"""What the threads of a cut may hold together where their number is not given."""


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
    client: Client | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    as_newest: bool = False,
    class_balance: bool = False,
    min_per_class: int = 0,
    exclude_noisy: bool = False,
    most_disagreement: float = MOST_DISAGREEMENT,
    sample_weight: str | None = None,
    max_errors: int | None = None,
    max_bad_shards: int = 0,
    faithfulness: Faithfulness | None = None,
    still_ours: Callable[[], None] | None = None,
) -> SelectResult:
    """Select the k smallest scores of the whole dataset and publish the round.

    Args:
        store: an indexed store with score tables.
        fraction: γ, the selected part of all samples; the decimal as written counts.
        strategy: an expression over score columns, such as `distance` or `abs(margin)`, or `random:SEED`.
        scores_of: the round whose score tables are cut, in the dataset version that they were made from; by default the
            newest ones of the newest dataset.
        client, scheduler: a Dask cluster whose tasks read the tables, see `pipeline.cluster.dask_client`. Without one
            threads of this process do, which is faster where they reach the tables as fast; the bytes are the same.
        workers: how many threads; by default one per core, or as many as hold `THREADS_BYTES` together.
        as_newest: take an earlier round that was cut in the same way only if it is the newest one, so that "latest"
            means this selection afterwards; a training script that is run again needs that.
        class_balance: each class gives the same share of its samples.
        min_per_class: each class gives at least so many of its smallest scores.
        exclude_noisy: leave out samples whose label is suspected to be wrong (`pipeline.label_errors` has the rule),
            judged by the newest score tables up to those that are cut; `excluded.parquet` of the round lists them.
        most_disagreement: warn when more than this share of the selection has a label that the scorer contradicts.
        sample_weight: an expression over score columns, such as `1 - confidence`: its value becomes the weight of each
            selected sample, which loaders give as `__weight__`. It must be finite and not negative.
        max_errors: failed samples that are accepted, as for scoring: by default 1 % of the dataset, at least 10. They
            are never selected.
        max_bad_shards: shards that scoring had to leave out; with so many a round is still published, as partial. None
            of their samples is selected.
        faithfulness: how the proxy that scored compared with its model; recorded.
        still_ours: called right before the round is published; raises when another job has taken over.

    Returns:
        The round. Scores that were cut with the same parameters already give the round that did it.

    Raises:
        UsageError: for a fraction outside [0, 1], or quotas of classes that cannot be.
        MissingExtraError: cleanlab is needed and missing.
        ScoresIncompleteError: when score tables are missing, were made without too many shards, or lack the scores of
            too many samples.
        ScoringError: when the scoring job refused them: no sample has a label, or a score.
        RoundNotFoundError: when `dynams gc` removes the score tables, or the round that was begun for them.
        StoreBusyError: another job makes the tables that are missing, or may be about to score again what failed, or
            shards that were left out.
        SelectionError: when no sample has a value to select on, or a selected one no weight.
        RoundExistsError: when another job published the round first.
    """
    chosen, quotas = Strategy.parse(strategy), ClassQuotas(class_balance, min_per_class)
    weight = require_options(chosen, quotas, exclude_noisy, sample_weight)
    started = now()
    gamma = recorded_fraction(fraction)
    scored, dataset, parts = _what_to_cut(store, chosen, scores_of, max_bad_shards)
    judged_by = score_history(store, dataset, scored) if exclude_noisy and scored is not None else None
    left_out = [bad.shard for bad in bad_shards(part.receipt for part in parts.values())]
    intent = selection_intent(dataset.digest, scored, str(chosen), gamma, quotas, judged_by, left_out, weight)
    earlier = same_selection(store, intent)
    if earlier is not None and (not as_newest or earlier.number == store.round("latest").number):
        return SelectResult(earlier, published=False)
    if scored is not None:
        receipts = [part.receipt for part in parts.values()]
        require_content(store, parts[0].identity["scorer"].get("label") or "", receipts)
        require_few_failures(store, scored, parts, max_errors)
    with _apart_from_scoring(store, scored, parts) as lease:
        parts_to_cut = score_parts(store, dataset, scored)
        threads = workers or _thread_count(parts_to_cut, chosen, weight, quotas)
        with (
            _ordered_map(client, scheduler, threads) as ordered_map,
            round_while_it_can_be_cut(store, scored, intent) as number,
        ):
            store.require_kept(number, scored)
            if judged_by is not None:
                excluded = suspected_label_errors(store, dataset, judged_by)
                parts_to_cut = [replace(part, excluded=excluded[part.number]) for part in parts_to_cut]
            result = exact_cut(
                parts_to_cut,
                fraction=fraction,
                strategy=chosen,
                destination=store.path(schema.selection_path(number)),
                quotas=quotas,
                sample_weight=weight,
                needs_scores=True,
                ordered_map=ordered_map,
            )
        if judged_by is not None:
            _list_excluded(store, number, parts_to_cut)
        manifest = round_manifest(dataset, number, scored, parts, result, started)
        manifest |= {"class_balance": class_balance, "min_per_class": min_per_class}
        if judged_by is not None:
            listed = storage.file_digest(store.path(schema.excluded_path(number)))
            manifest["excluded"] = {"samples": result.excluded, "judged_by": judged_by, "sha256": listed}
        manifest["guards"] = asdict(examine_selection(store, dataset, number, scored, result, most_disagreement))
        manifest["faithfulness"] = None if faithfulness is None else asdict(faithfulness)
        if left_out:
            logger.warning(f"round {number} is partial: {len(left_out)} shards were left out, first {left_out[0]}")
        return SelectResult(store.publish(number, manifest, still_ours=still_ours or lease), published=True)


def _what_to_cut(
    store: Store, strategy: Strategy, scores_of: int | None, max_bad_shards: int
) -> tuple[int | None, Dataset, dict[int, FinishedPart]]:
    """The round that was scored, its dataset version, and its score tables; a random order needs none."""
    if strategy.seed is not None:
        return None, store.dataset(), {}
    try:
        scored, dataset = tables_to_cut(store, scores_of)
        return scored, dataset, complete_parts(store, dataset, scored, max_bad_shards)
    except ScoresIncompleteError:
        with store_lease(store, "select"):  # busy, it names the job that makes what is missing
            raise


@contextmanager
def _ordered_map(client: Client | None, scheduler: str | None, threads: int) -> Iterator[OrderedMap]:
    """Tasks of a cluster where there is one, else threads."""
    if client is None and scheduler is None:
        yield ordered_thread_map(threads)
        return
    with dask_client(client, scheduler=scheduler) as connected:
        yield ordered_dask_map(connected)


def require_options(
    strategy: Strategy, quotas: ClassQuotas, exclude_noisy: bool, sample_weight: str | None = None
) -> Strategy | None:
    """Refuse what cannot be done, before anything is scored for it; gives the parsed expression of the weights.

    Raises:
        UsageError: a random order reads no labels and no scores; the weights are no expression over scores.
        MissingExtraError: cleanlab is needed and missing.
    """
    if exclude_noisy:
        require_cleanlab()
    if strategy.seed is not None and (quotas or exclude_noisy or sample_weight is not None):
        raise UsageError(
            f"strategy {strategy} reads no score tables; class_balance, min_per_class, exclude_noisy and sample_weight "
            f"need them: select on a score"
        )
    return None if sample_weight is None else parse_weight(sample_weight)


def parse_weight(text: str) -> Strategy:
    """An expression of weights, of the same grammar as what a selection ranks by.

    Raises:
        UsageError: it is none.
    """
    try:
        weight = Strategy.parse(text)
    except UsageError as error:
        raise UsageError(f"sample_weight is written like a strategy. {error}") from error
    if weight.seed is not None:
        raise UsageError(f"sample_weight is {text!r}; write an expression over score columns such as '1 - confidence'")
    return weight


@contextmanager
def _apart_from_scoring(
    store: Store, scored: int | None, parts: Mapping[int, FinishedPart]
) -> Iterator[Callable[[], None] | None]:
    """Keep scoring jobs away while tables are cut that they may replace: those that lack some scores.

    Gives what makes sure that none has taken over; None where no table can change.

    Raises:
        StoreBusyError: one is at work.
        ScoresIncompleteError: one has replaced tables in this moment.
    """
    if scored is None or not may_be_replaced(store, scored, parts):
        yield None
        return
    with store_lease(store, "select") as lease:
        if finished_parts(store, scored) != parts:
            raise ScoresIncompleteError(
                f"{store.url}: score tables of round {scored} were replaced in this moment; run dynams select again"
            )
        yield lease.require


def _thread_count(parts: Sequence[ScorePart], strategy: Strategy, weight: Strategy | None, quotas: ClassQuotas) -> int:
    """As many threads as there are cores, but no more than fit into `THREADS_BYTES` when all have a large part."""
    largest = max((task_bytes(part, strategy, weight, bool(quotas)) for part in parts), default=0)
    return max(1, min(available_cores(), THREADS_BYTES // max(largest, 1)))


def _list_excluded(store: Store, number: int, parts: Iterable[ScorePart]) -> None:
    """Write what was left out into the round's folder."""
    with selection_writer(store.path(schema.excluded_path(number))) as writer:
        for part in parts:
            writer.append(*rows_by_shard(part.counts, part.excluded))
