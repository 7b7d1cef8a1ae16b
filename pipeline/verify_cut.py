"""Makes a published round's cut again from its score tables, and compares all that follows from them with `round.json`.

score tables ──footers──► checkpoint, scorer, bad shards, …   ┐
             ──exact_cut──► rows and weights, threshold, ties, ├─► what `round.json` and `selection.parquet` have to say
                            counts, also per class             ┘
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from dynams_stream import schema, storage
from dynams_stream.class_quotas import ClassQuotas
from dynams_stream.cut import CutResult, ScorePart, exact_cut
from dynams_stream.dataset import Dataset
from dynams_stream.ordered_map import OrderedMap
from dynams_stream.selection import Selection
from dynams_stream.store import Round
from dynams_stream.strategy import Strategy
from pipeline.manifests import round_manifest
from pipeline.pending import finished_parts, score_parts
from pipeline.verify_round import SELECT_AGAIN, Problem, reason_of

_TOLD_BY_NOTHING = ("selection", "library", "started", "ended", "seconds")
"""Of what `round_manifest` gives, what is not compared: times, and the selection's bytes, whose rows are."""
_SHOWN = 60
"""Characters of a value that a message shows."""


def check_cut(published: Round, dataset: Dataset, ordered_map: OrderedMap) -> list[Problem]:
    """What is wrong with a round whose score tables are sound; nothing can be said of one that was made elsewhere.

    Takes the room of another selection in a temporary folder, where TMPDIR says.
    """
    number = published.number
    if published.manifest["strategy"].startswith("own:"):
        return []
    manifest_path, selection_path = schema.manifest_path(number), schema.selection_path(number)
    try:
        with TemporaryDirectory(prefix="dynams-") as folder:
            destination = storage.join(folder, "selection.parquet")
            made = _cut(published, dataset, destination, ordered_map)
            problems = [
                Problem(manifest_path, what, "restore it from a copy")
                for what in _differences(published.manifest, _manifest(published, dataset, made))
            ]
            if made.sha256 != published.manifest["selection"]["sha256"] and not _same_rows(
                published.selection(), Selection.open(destination, made.sha256)
            ):
                what = "other samples or weights than its score tables give when they are cut again"
                problems.append(Problem(selection_path, what, SELECT_AGAIN))
            return problems
    except Exception as error:  # noqa: BLE001 (of damaged values a reader may make anything)
        return [Problem(manifest_path, f"its cut cannot be made again: {reason_of(error)}", "restore it from a copy")]


def _cut(published: Round, dataset: Dataset, destination: str, ordered_map: OrderedMap) -> CutResult:
    manifest, weight = published.manifest, published.manifest.get("sample_weight")
    parts = score_parts(published.store, dataset, published.scores_of)
    if manifest.get("excluded"):
        rows = Selection.read(published.store.path(schema.excluded_path(published.number)))
        parts = [replace(part, excluded=_positions(part, rows)) for part in parts]
    return exact_cut(
        parts,
        fraction=manifest["fraction"],
        strategy=Strategy.parse(manifest["strategy"]),
        destination=destination,
        quotas=ClassQuotas(manifest.get("class_balance", False), manifest.get("min_per_class", 0)),
        sample_weight=None if weight is None else Strategy.parse(weight),
        ordered_map=ordered_map,
    )


def _positions(part: ScorePart, excluded: Selection) -> npt.NDArray[np.uint32]:
    """The excluded samples of a part, counted through it."""
    starts = (np.cumsum(part.counts) - part.counts).tolist()
    found = [excluded.rows(shard) + start for shard, start in enumerate(starts, part.first_shard)]
    return np.concatenate(found).astype(np.uint32)


def _manifest(published: Round, dataset: Dataset, made: CutResult) -> dict[str, Any]:
    """What `round.json` has to say."""
    scored = published.scores_of
    parts = {} if scored is None else finished_parts(published.store, scored)
    entries = round_manifest(dataset, published.number, scored, parts, made, started="")
    found: dict[str, Any] = json.loads(json.dumps(entries))
    return {name: value for name, value in found.items() if name not in _TOLD_BY_NOTHING}


def _differences(manifest: Mapping[str, Any], expected: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Entries of a manifest that should be others, in words; earlier versions wrote fewer."""
    for name, value in expected.items():
        found = manifest.get(name, value)
        if isinstance(value, dict) and isinstance(found, dict) and value.keys() == found.keys():
            yield from _differences(found, value, f"{within}{name}.")
        elif found != value:
            yield f"its {within}{name} is {_short(found)}; its score tables give {_short(value)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _same_rows(one: Selection, other: Selection) -> bool:
    """Whether two selections are the same, though another version of Parquet's writer made other bytes of them."""
    return np.array_equal(one.counts, other.counts) and all(
        np.array_equal(one.rows(shard), other.rows(shard)) and np.array_equal(one.weights(shard), other.weights(shard))
        for shard in range(len(one.counts))
    )
