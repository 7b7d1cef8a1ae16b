"""Which score tables there are and what they lack, told from themselves: their metadata says what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.cut import ScorePart
from dynams_stream.dataset import Dataset
from dynams_stream.errors import RoundNotFoundError, ScoresIncompleteError, ScoringError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.parquet_footer import read_footer
from dynams_stream.store import Round, Store
from pipeline.receipt import Receipt, allowed_failures, bad_shards, failed_samples, first_errors, name_bad_shards

FOOTER_THREADS = 8


@dataclass(frozen=True)
class FinishedPart:
    """A score table that is there.

    Attributes:
        identity: what it was made from.
        receipt: of the job that made it.
        footer_sha256: digest of its footer, which holds one of the rest: together they settle each byte.
    """

    identity: Mapping[str, Any]
    receipt: Receipt
    footer_sha256: str


def finished_parts(store: Store, number: int) -> dict[int, FinishedPart]:
    """Every score table of a round by its part's number; unreadable ones count as missing and are written again."""
    found = ordered_thread_map(FOOTER_THREADS)(_read_footer, _score_tables(store, number))
    return {part.receipt.part: part for part in found if part is not None}


def _score_tables(store: Store, number: int) -> list[str]:
    """Where the score tables of a round lie."""
    folder = store.path(schema.scores_folder(number))
    names = [name for name in storage.list_names(folder) if name.startswith("part-") and name.endswith(".parquet")]
    return [storage.join(folder, name) for name in sorted(names)]


def _read_footer(url: str) -> FinishedPart | None:
    footer = read_footer(url)  # raises where the store fails: a table that cannot be read now is not missing
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer)).metadata or {}
        identity = json.loads(metadata[schema.IDENTITY_KEY])
        _ = identity["dataset"]["digest"]  # what all ask of an identity
        return FinishedPart(
            identity=identity,
            receipt=Receipt.from_json(metadata[schema.RECEIPT_KEY]),
            footer_sha256=hashlib.sha256(footer).hexdigest(),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError):  # thrift's is an OSError
        return None


def unpublished_rounds(store: Store, published: Collection[Round]) -> list[int]:
    """Rounds that were begun, but neither they nor a round that was cut from their score tables is published."""
    done = {number for one in published for number in (one.number, one.scores_of)}
    return [number for number in sorted(store.round_numbers()) if number not in done]


def are_published(store: Store, number: int) -> bool:
    """Whether a published round was cut from the score tables of round `number`: they never change from then on."""
    return any(number in (published.number, published.scores_of) for published in store.rounds())


def may_be_replaced(store: Store, number: int, parts: Mapping[int, FinishedPart]) -> bool:
    """Whether a scoring job may write some of a round's complete score tables anew: those that lack scores."""
    lacking = any(part.receipt.failed or part.receipt.bad_shards for part in parts.values())
    return lacking and not are_published(store, number)


def scored_round(store: Store, identity: Mapping[str, Any]) -> int | None:
    """The newest round whose score tables were, or are being, made from `identity`."""
    claims = store.claims()
    for number in sorted({*claims, *store.round_numbers()} - store.retired(), reverse=True):
        if number in claims:
            if claims[number] == identity:
                return number
        elif any(part.identity == identity for part in finished_parts(store, number).values()):
            return number
    return None


def newest_scores(store: Store, dataset: Dataset) -> int:
    """The newest round with score tables of its own for this dataset, judged by the first of them.

    Raises:
        ScoresIncompleteError: when there is none, or the newest one has too few tables.
    """
    for number in sorted(set(store.round_numbers()) - store.retired(), reverse=True):
        tables = _score_tables(store, number)
        first = _first_part(tables)
        if first is None or first.identity["dataset"]["digest"] != dataset.digest:
            continue
        if len(tables) < len(dataset.parts):
            raise ScoresIncompleteError(
                f"{store.url}: the newest score tables, of round {number}, are not complete ({len(tables)} of "
                f"{len(dataset.parts)} parts); run dynams score again to finish them, or name an earlier round"
            )
        return number
    raise ScoresIncompleteError(
        f"{store.url} holds no score tables of its newest dataset; run: dynams score --store {store.url} --model …"
    )


def tables_to_cut(store: Store, scores_of: int | None) -> tuple[int, Dataset]:
    """The round whose score tables are to be cut, and the dataset version that they were made from.

    The newest tables of the newest dataset; or those of the named round, or that it was cut from, even where the
    dataset has been indexed anew since they were made.

    Raises:
        RoundNotFoundError: there is no round of that number.
        ScoresIncompleteError: there are no complete tables.
    """
    if scores_of is None:
        newest = store.dataset()
        return newest_scores(store, newest), newest
    if scores_of not in store.round_numbers():
        raise RoundNotFoundError(f"{store.url} holds no round {scores_of}; `dynams status` lists them")
    if not _score_tables(store, scores_of) and store.is_published(scores_of):
        scores_of = store.round(scores_of).scores_of or scores_of
    return scores_of, scored_dataset(store, scores_of)


def scored_dataset(store: Store, number: int) -> Dataset:
    """The dataset version that the score tables of a round were made from; the newest where there are none.

    Raises:
        ScoresIncompleteError: that version is not there any more.
    """
    version = _dataset_version(store, number)
    if version is not None and version not in store.dataset_versions():
        raise ScoresIncompleteError(
            f"{store.url}: the score tables of round {number} belong to dataset version {version}, which was removed; "
            f"run dynams score again"
        )
    return store.dataset(version)


def _dataset_version(store: Store, number: int) -> int | None:
    """The dataset version that the first readable score table of a round names."""
    first = _first_part(_score_tables(store, number))
    return None if first is None else int(first.identity["dataset"]["version"])


def _first_part(tables: Iterable[str]) -> FinishedPart | None:
    """Of the first readable score table."""
    return next((part for part in map(_read_footer, tables) if part is not None), None)


def score_parts(store: Store, dataset: Dataset, scored: int | None) -> list[ScorePart]:
    """The parts of a dataset as they are cut: from the score tables of round `scored`, or without any."""
    return [
        ScorePart(
            url=None if scored is None else store.path(schema.scores_path(scored, part.number)),
            number=part.number,
            first_shard=part.first_shard,
            counts=dataset.counts[part.first_shard : part.first_shard + part.shards],
        )
        for part in dataset.parts
    ]


def complete_parts(store: Store, dataset: Dataset, scored: int, max_bad_shards: int) -> dict[int, FinishedPart]:
    """The score tables of a round, one for each part of the dataset and all made in the same way.

    Raises:
        ScoresIncompleteError: some are missing, of another dataset or another scorer, or lack too many shards.
    """
    done = finished_parts(store, scored)
    foreign = [number for number, part in done.items() if part.identity["dataset"]["digest"] != dataset.digest]
    if foreign:
        raise ScoresIncompleteError(
            f"{store.url}: the score table of part {foreign[0]} of round {scored} does not belong to dataset version "
            f"{dataset.version} as it is now; remove it and run dynams score again"
        )
    missing = [part.number for part in dataset.parts if part.number not in done]
    if missing:
        raise ScoresIncompleteError(
            f"{store.url}: round {scored} lacks the score tables of {len(missing)} of {len(dataset.parts)} parts "
            f"(first {missing[:5]}); run dynams score again, it does only what is missing"
        )
    first = done[dataset.parts[0].number].identity
    mixed = [number for number, part in done.items() if part.identity != first]
    if mixed:
        raise ScoresIncompleteError(
            f"{store.url}: the score tables of round {scored} were not all made by the same scorer and checkpoint "
            f"(part {mixed[0]} differs from part 0); remove those of part {mixed[0]} and run dynams score again"
        )
    left_out = bad_shards(part.receipt for part in done.values())
    if len(left_out) > max_bad_shards:
        raise ScoresIncompleteError(
            f"{store.url}: round {scored} was scored without {len(left_out)} shards, {max_bad_shards} may be left out "
            f"(--max-bad-shards):{name_bad_shards(left_out)}\n"
            f"mend them and run dynams score again, or allow so many for a round that is partial"
        )
    return done


def require_content(store: Store, label: str, receipts: Collection[Receipt]) -> None:
    """Refuse score tables that had no error in any sample's eyes and are yet of no use.

    Args:
        label: what samples were labelled by, "" for nothing.

    Raises:
        ScoringError: every sample failed, or none has such a label.
    """
    samples = sum(receipt.samples for receipt in receipts)
    if samples and samples == sum(receipt.failed for receipt in receipts):
        reasons = first_errors(receipts) + tuple(bad.reason for bad in bad_shards(receipts)[:20])
        shown = "\n  ".join(reasons)
        raise ScoringError(f"{store.url}: every one of {samples} samples failed:\n  {shown}")
    if samples and label and not any(receipt.labelled for receipt in receipts):
        raise ScoringError(
            f"{store.url}: none of {samples} samples has a label {label!r}; score again with the right --label, or "
            f"without labels with --label ''"
        )


def require_few_failures(store: Store, number: int, parts: Mapping[int, FinishedPart], max_errors: int | None) -> None:
    """Refuse score tables that the scoring job itself would not have accepted.

    Raises:
        ScoresIncompleteError: more samples failed than may; lists the first ones.
    """
    receipts = [part.receipt for part in parts.values()]
    failed, samples = failed_samples(receipts), sum(receipt.samples for receipt in receipts)
    limit = allowed_failures(max_errors, samples)
    if failed > limit:
        shown = "\n  ".join(first_errors(receipts))
        raise ScoresIncompleteError(
            f"{store.url}: {failed} of {samples} samples failed in round {number}, {limit} are allowed (--max-errors):"
            f"\n  {shown}\nmend what failed and run dynams score again, or allow so many: they are never selected"
        )
