"""The model beside its proxy: scores a sample of the rows that a proxy has scored with the model itself.

score tables ──some rows of some parts──► the proxy's scores ─┐
shards ──the same rows──► the model's scores                  ─┴─► Faithfulness
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from distributed import Client

from dynams_stream import schema, storage
from dynams_stream.checkpoint import checkpoint_digest
from dynams_stream.dataset import Dataset, Part
from dynams_stream.errors import DynamsError, ScoringError
from dynams_stream.faithfulness import Columns, Faithfulness, compare_scorers
from dynams_stream.index import read_part_index
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Store
from dynams_stream.strategy import Strategy
from pipeline.batch_scores import scored_batches
from pipeline.in_flight import result_of
from pipeline.part_reader import Decoder, ShardRows, open_indexed
from pipeline.pending import scored_dataset
from pipeline.receipt import Clock
from pipeline.score_job import ScoredRound
from pipeline.score_part import worker_scorer

MOST_PARTS = 32
"""Parts that the compared rows are taken from, so that few index files and score tables are read."""


@dataclass(frozen=True, eq=False)
class PartRows:
    """Some rows of a part.

    Attributes:
        part: which.
        urls, fingerprints: of its shards.
        rows: int64, ascending, counted through the part: 0 is the first row of its first shard.
    """

    part: Part
    urls: tuple[str, ...]
    fingerprints: tuple[str, ...]
    rows: npt.NDArray[np.int64]


def compare_with_model(
    store: Store,
    scored: ScoredRound,
    checkpoint: str,
    *,
    strategy: Strategy,
    fraction: float | str,
    samples: int,
    client: Client,
    device: str = "cpu",
) -> Faithfulness:
    """Score some rows with the model, and compare with the score tables that its proxy made.

    Args:
        store: where they lie.
        scored: the proxy's tables.
        checkpoint: the model's weights.
        strategy, fraction: the selection that is compared.
        samples: how many rows; always the same ones of the same dataset.
        client: where to score: one task.
        device: "cpu" or "cuda".

    Raises:
        ScoringError: when the model cannot score; what the proxy scored is kept.
    """
    dataset = scored_dataset(store, scored.number)
    chosen = _without(dataset, sample_rows(dataset, samples), {bad.shard for bad in scored.bad_shards})
    spec, digest = replace(scored.spec, width=1.0), checkpoint_digest(checkpoint)
    task = client.submit(score_rows, store, chosen, spec, checkpoint, digest, device, pure=False)
    proxy = _read_scores(store, scored.number, chosen)
    try:
        model = result_of(client, task)
    except DynamsError:
        raise
    except Exception as error:  # whatever ends a worker: it was sized for the proxy, perhaps
        raise ScoringError(
            f"the model could not score {samples} samples beside its proxy: {type(error).__name__}: {error}; give the "
            f"workers memory for it, or leave the comparison out with check_samples=0"
        ) from error
    return compare_scorers(proxy, model, strategy=strategy, fraction=fraction)


def _without(dataset: Dataset, chosen: list[PartRows], shards: Collection[int]) -> list[PartRows]:
    """The rows that are not of some shards."""
    found = []
    for some in chosen:
        first = some.part.first_shard
        ends = np.cumsum(dataset.counts[first : first + some.part.shards])
        left_out = np.isin(first + np.searchsorted(ends, some.rows, side="right"), list(shards))
        if not left_out.all():
            found.append(replace(some, rows=some.rows[~left_out]))
    return found


def sample_rows(dataset: Dataset, samples: int, seed: int = 0) -> list[PartRows]:
    """Rows at random, but the same ones for the same dataset and seed: from at most 32 parts, each of theirs alike."""
    generator = np.random.default_rng([int(dataset.digest[:16], 16), seed])
    filled = [part for part in dataset.parts if part.samples]
    numbers = np.sort(generator.choice(len(filled), min(MOST_PARTS, len(filled)), replace=False))
    parts = [filled[number] for number in numbers]
    ends = np.cumsum([part.samples for part in parts])
    places = np.sort(generator.choice(ends[-1], min(samples, ends[-1]), replace=False))
    found = []
    for part, end in zip(parts, ends, strict=True):
        own = slice(part.first_shard, part.first_shard + part.shards)
        inside = (places >= end - part.samples) & (places < end)
        rows = places[inside] - (end - part.samples)
        if len(rows):
            found.append(PartRows(part, dataset.urls[own], dataset.fingerprints[own], rows))
    return found


def score_rows(
    store: Store, chosen: list[PartRows], spec: ScorerSpec, checkpoint: str, sha256: str, device: str
) -> dict[str, npt.NDArray[np.float32]]:
    """The score columns of some rows, in order; NaN where a sample failed. Runs on a worker."""
    scorer = worker_scorer(spec, checkpoint, sha256, device)
    decode = Decoder(scorer, Clock())
    decoded = map(decode, row_batches(store, chosen, spec.batch_size))
    batches = [columns for _, columns in scored_batches(scorer, decoded, Clock())]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in schema.SCORE_COLUMNS}


def row_batches(store: Store, chosen: list[PartRows], batch_size: int) -> Iterator[list[ShardRows]]:
    """The rows, in runs of `batch_size`, ready to be read."""
    pieces: list[ShardRows] = []
    for some in chosen:
        indexes = read_part_index(store.path(some.part.index_file))
        starts = np.cumsum([0, *(len(indexes[some.part.first_shard + i]) for i in range(some.part.shards))])
        shards = np.searchsorted(starts, some.rows, side="right") - 1
        for position in np.unique(shards).tolist():
            shard = some.part.first_shard + position
            url = some.urls[position]
            reader = open_indexed(store, url, some.fingerprints[position])
            for row in (some.rows[shards == position] - starts[position]).tolist():
                pieces.append(ShardRows(shard, url, reader, indexes[shard], row, row + 1))
                if len(pieces) == batch_size:
                    yield pieces
                    pieces = []
    if pieces:
        yield pieces


def _read_scores(store: Store, number: int, chosen: list[PartRows]) -> Columns:
    """The columns of the same rows from score tables, NaN for null."""
    columns: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in schema.SCORE_COLUMNS}
    for some in chosen:
        with storage.open_random(store.path(schema.scores_path(number, some.part.number))) as file:
            table = pq.read_table(file, columns=list(schema.SCORE_COLUMNS)).take(some.rows)
        for name, parts in columns.items():
            parts.append(table[name].to_numpy().astype(np.float32))
    return {name: np.concatenate(parts) for name, parts in columns.items()}
