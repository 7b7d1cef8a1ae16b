"""What is told of a selection before anyone trains on it: emptied classes, and labels that the scorer contradicts."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.cut import CutResult
from dynams_stream.dataset import Dataset
from dynams_stream.selection import Selection
from dynams_stream.store import Store

logger = logging.getLogger(__name__)

MOST_PARTS = 32
"""Parts whose selected samples are looked at."""
_MOST_EXCLUDED = 0.3
"""Share of suspected labels that no dataset worth training on has."""
_MOST_NAMED = 20
"""Classes that a message names."""


@dataclass(frozen=True)
class Guards:
    """What was found; in `round.json`.

    Attributes:
        emptied_classes: labels that samples have and none of the selected ones has.
        label_disagreement: share of the selected, labelled samples that the scorer takes for another class (margin
            below zero) and gives their label less than chance (loss above ln C, C the number of distinct labels), of at
            most 32 parts; None without labels or scores.
        warnings: what was told about them.
    """

    emptied_classes: tuple[int, ...]
    label_disagreement: float | None
    warnings: tuple[str, ...]


def examine_selection(
    store: Store, dataset: Dataset, number: int, scored: int | None, result: CutResult, most_disagreement: float
) -> Guards:
    """Look at the selection that was cut for round `number`, and warn in the log.

    Args:
        store, dataset: where it lies.
        number: the round.
        scored: the round whose score tables were cut; None for a random order.
        result: of the cut.
        most_disagreement: share of contradicted labels above which to warn.
    """
    counts = result.per_class
    emptied = tuple(label for label, one in counts.items() if one["selected"] == 0) if result.selected else ()
    disagreement = None
    if scored is not None and len(counts) > 1 and result.selected:
        disagreement = _label_disagreement(store, dataset, number, scored, result, math.log(len(counts)))
    warnings = []
    if emptied:
        named = ", ".join(map(str, emptied[:_MOST_NAMED])) + (", …" if len(emptied) > _MOST_NAMED else "")
        warnings.append(
            f"the selection has no sample of {len(emptied)} of {len(counts)} classes ({named}); min_per_class or "
            f"class_balance keeps some of each"
        )
    if disagreement is not None and disagreement > most_disagreement:
        warnings.append(
            f"{100 * disagreement:.0f} % of the selected samples have a label that the scorer gives less than chance "
            f"(bound {100 * most_disagreement:.0f} %): wrong labels, perhaps. exclude_noisy leaves suspected ones out; "
            f"select on distance, which does not look at labels"
        )
    if result.excluded > _MOST_EXCLUDED * result.samples:
        warnings.append(
            f"{100 * result.excluded / result.samples:.0f} % of all labels are suspected: the scorer has not learnt "
            f"enough to judge them; leave exclude_noisy out for the first rounds, or warm up longer"
        )
    for warning in warnings:
        logger.warning(f"round {number}: {warning}")
    return Guards(emptied, disagreement, tuple(warnings))


def _label_disagreement(
    store: Store, dataset: Dataset, number: int, scored: int, result: CutResult, high_loss: float
) -> float | None:
    per_shard = np.fromstring(result.selection["per_shard"], dtype=np.int64, sep=" ")
    url, footer = store.path(schema.selection_path(number)), result.selection["footer_sha256"]
    selection = Selection.open(url, result.sha256, per_shard, footer)
    generator = np.random.default_rng(int(dataset.digest[:16], 16))
    filled = [part for part in dataset.parts if per_shard[part.first_shard : part.first_shard + part.shards].any()]
    chosen = np.sort(generator.choice(len(filled), min(MOST_PARTS, len(filled)), replace=False)).tolist()
    labelled = against = 0
    for part in (filled[place] for place in chosen):
        starts = np.cumsum(dataset.counts[part.first_shard : part.first_shard + part.shards])
        offsets = np.concatenate([[0], starts[:-1]])
        rows = np.concatenate(
            [selection.rows(part.first_shard + at).astype(np.int64) + offset for at, offset in enumerate(offsets)]
        )
        with storage.open_random(store.path(schema.scores_path(scored, part.number))) as file:
            table = pq.read_table(file, columns=["margin", "loss"]).take(rows)
        margin, loss = (table[name].to_numpy() for name in ("margin", "loss"))
        labelled += int((~np.isnan(margin)).sum())
        against += int(((margin < 0) & (loss > high_loss)).sum())
    return against / labelled if labelled else None
