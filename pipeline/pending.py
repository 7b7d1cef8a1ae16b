"""What a round still lacks, told from the score tables themselves: their metadata says what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import ScoresIncompleteError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.store import Store
from pipeline.receipt import Receipt

FOOTER_THREADS = 8


@dataclass(frozen=True)
class FinishedPart:
    """A score table that is there: what it was made from, and its receipt."""

    identity: Mapping[str, Any]
    receipt: Receipt


def finished_parts(store: Store, number: int) -> dict[int, FinishedPart]:
    """Every score table of a round by its part's number; unreadable ones count as missing and are written again."""
    folder = store.path(schema.scores_folder(number))
    names = [name for name in storage.list_names(folder) if name.startswith("part-") and name.endswith(".parquet")]
    found = ordered_thread_map(FOOTER_THREADS)(_read_footer, [storage.join(folder, name) for name in names])
    return {part.receipt.part: part for part in found if part is not None}


def _read_footer(url: str) -> FinishedPart | None:
    try:
        with storage.open_random(url) as file:
            metadata = pq.read_metadata(file).metadata or {}
        return FinishedPart(
            identity=json.loads(metadata[schema.IDENTITY_KEY]),
            receipt=Receipt.from_json(metadata[schema.RECEIPT_KEY]),
        )
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError):
        return None


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
    """The newest round with score tables of its own for this dataset.

    Raises:
        ScoresIncompleteError: when there is none, or the newest one is not complete.
    """
    for number in sorted(set(store.round_numbers()) - store.retired(), reverse=True):
        done = finished_parts(store, number)
        if any(part.identity["dataset"]["digest"] != dataset.digest for part in done.values()):
            continue
        if done and len(done) < len(dataset.parts):
            raise ScoresIncompleteError(
                f"{store.url}: the newest score tables, of round {number}, are not complete ({len(done)} of "
                f"{len(dataset.parts)} parts); run dynams score again to finish them, or name an earlier round"
            )
        if done:
            return number
    raise ScoresIncompleteError(
        f"{store.url} holds no score tables of its newest dataset; run: dynams score --store {store.url} --model …"
    )
