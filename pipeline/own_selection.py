"""Publish a selection that was made elsewhere: rows of each shard, and weights where there are any."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynams_stream import schema
from dynams_stream.cut import CutResult
from dynams_stream.dataset import Dataset
from dynams_stream.errors import UsageError
from dynams_stream.selection_file import selection_writer
from dynams_stream.store import Round, Store
from pipeline.intents import round_to_publish
from pipeline.manifests import now, round_manifest

Rows = npt.NDArray[np.uint32]
Weights = npt.NDArray[np.float32]


def publish_rows(
    store: Store,
    rows: Sequence[npt.NDArray[np.integer]],
    weights: Sequence[npt.NDArray[np.floating]] | None = None,
    *,
    strategy: str,
    epoch: int | None = None,
) -> Round:
    """Publish a round that selects given rows; loaders stream it like any other.

    Args:
        store: an indexed store.
        rows: for each shard in order its selected rows, ascending, from 0 on.
        weights: for each shard the weights of its rows, which samples carry as `__weight__`; float32.
        strategy: what chose them, in a word or two; recorded as `own:…`.
        epoch: recorded.

    Returns:
        The round. The newest one is returned as it is when it holds the same rows and weights of the same dataset.

    Raises:
        UsageError: rows that do not ascend or that a shard has not, or weights that do not fit them.
    """
    started, dataset = now(), store.dataset()
    selected = [np.asarray(one, dtype=np.int64) for one in rows]
    weighted = None if weights is None else [np.asarray(one, dtype=np.float32) for one in weights]
    _require_rows(dataset, selected, weighted)
    digest = hashlib.sha256()
    for one in [*selected, *(weighted or [])]:
        digest.update(len(one).to_bytes(8, "little") + one.tobytes())
    intent = {"dataset": dataset.digest, "strategy": f"own:{strategy}", "rows": digest.hexdigest()}
    newest = store.rounds()[-1:]
    if newest and _made_from(newest[0]) == intent:
        return newest[0]
    number = round_to_publish(store, None, intent).number
    with selection_writer(store.path(schema.selection_path(number))) as writer:
        for part in dataset.parts:
            own = slice(part.first_shard, part.first_shard + part.shards)
            writer.append(
                np.array([len(one) for one in selected[own]], dtype=np.int64),
                np.concatenate(selected[own]).astype(np.uint32),
                None if weighted is None else np.concatenate(weighted[own]),
            )
    result = CutResult(
        fraction=repr(writer.total / dataset.samples),
        strategy=f"own:{strategy}",
        threshold=None,
        ties=0,
        ties_taken=0,
        samples=dataset.samples,
        scored=dataset.samples,
        excluded=0,
        selected=writer.total,
        per_class={},
        selection=writer.for_manifest(),
    )
    manifest = round_manifest(dataset, number, None, {}, result, started)
    return store.publish(number, {**manifest, "epoch": epoch, "rows_digest": digest.hexdigest()})


def _made_from(published: Round) -> dict[str, Any]:
    manifest = published.manifest
    return {
        "dataset": manifest["dataset"]["digest"],
        "strategy": manifest["strategy"],
        "rows": manifest.get("rows_digest"),
    }


def _require_rows(dataset: Dataset, rows: list[npt.NDArray[np.int64]], weights: list[Weights] | None) -> None:
    if len(rows) != len(dataset.urls) or (weights is not None and len(weights) != len(rows)):
        raise UsageError(f"rows (and weights) of {len(rows)} shards were given; the dataset has {len(dataset.urls)}")
    for shard, (one, samples) in enumerate(zip(rows, dataset.counts.tolist(), strict=True)):
        if len(one) and not (one[0] >= 0 and one[-1] < samples and (np.diff(one) > 0).all()):
            raise UsageError(f"shard {shard}: its rows must ascend and lie in 0 … {samples - 1}")
        if weights is not None and (len(weights[shard]) != len(one) or not np.isfinite(weights[shard]).all()):
            raise UsageError(f"shard {shard}: one finite weight for each of its {len(one)} rows is needed")
