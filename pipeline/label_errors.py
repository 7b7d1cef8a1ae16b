"""Suspected label errors, by confident learning over the history of a store's score tables.

The rule is cleanlab's (Northcutt, Jiang and Chuang 2021, "Confident learning: estimating uncertainty in dataset
labels", arXiv 1911.00068): with t_j the mean probability of class j over the samples labelled j, the samples that the
model puts into another class k with a probability of at least t_k make the off-diagonal of the confident joint. As many
samples as it counts are suspected: those whose label has the lowest probability.

A sample's probabilities are the means over several score tables, each from another moment of training. A table keeps
two of them, the label's (exp(−loss)) and the predicted class's (confidence); what is left is spread evenly over the
others. That is exact for one table: the rule asks for no third class.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.cut import kth_bin
from dynams_stream.cut_part import BINS, NOT_SCORED, score_keys
from dynams_stream.dataset import Dataset, Part
from dynams_stream.errors import MissingExtraError, SelectionError
from dynams_stream.store import Store
from pipeline.pending import finished_parts

MOST_TABLES = 5
"""Rounds that are looked back on."""
_BLOCK_ELEMENTS = 1 << 22
"""Probabilities in memory at once: samples × classes."""
_COLUMNS = ("label", "predicted", "confidence", "loss")

Positions = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]


def require_cleanlab() -> None:
    """Make sure that cleanlab is there.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("cleanlab") is None:
        raise MissingExtraError("exclude_noisy asks cleanlab for label errors: pip install 'dynams-stream[noise]'")


def score_history(store: Store, dataset: Dataset, newest: int) -> list[int]:
    """The newest `MOST_TABLES` rounds up to `newest` that have all score tables of this dataset, oldest first.

    Only those scored with the labels that `newest` was scored with: others say nothing about these.
    """
    found: list[int] = []
    label = None
    for number in reversed([one for one in store.round_numbers() if one <= newest]):
        done = finished_parts(store, number)
        if len(done) < len(dataset.parts) or done[0].identity["dataset"]["digest"] != dataset.digest:
            continue
        label = done[0].identity["scorer"]["label"] if label is None else label
        if done[0].identity["scorer"]["label"] == label:
            found.append(number)
        if len(found) == MOST_TABLES:
            break
    return found[::-1]


def suspected_label_errors(store: Store, dataset: Dataset, tables: Sequence[int]) -> dict[int, Positions]:
    """For each part, by number, the ascending positions of its samples whose labels are suspected to be wrong.

    Reads the tables three times. Keeps 4 bytes of each suspected sample, and those of all in a temporary file, where
    TMPDIR says.

    Args:
        store: where they lie.
        dataset: whose samples.
        tables: rounds with score tables, of the same dataset.

    Raises:
        MissingExtraError: cleanlab is not installed.
        SelectionError: the samples have no labels, or only one.
    """
    require_cleanlab()
    from cleanlab.experimental.label_issues_batched import LabelInspector

    classes = _classes(store, dataset, tables)
    if len(classes) < 2:
        raise SelectionError(
            f"{store.url}: the samples have {len(classes)} distinct label(s); label errors can be told from two on"
        )
    inspector = LabelInspector(num_class=len(classes), store_results=False, verbose=False)
    for part in dataset.parts:
        for _, labels, probabilities in _blocks(store, part, tables, classes):
            inspector.update_confident_thresholds(labels, probabilities)
    with TemporaryFile() as qualities:
        for part in dataset.parts:
            quality = np.full(part.samples, np.nan, dtype=np.float32)
            for positions, labels, probabilities in _blocks(store, part, tables, classes):
                quality[positions] = inspector.score_label_quality(labels, probabilities)
            qualities.write(quality.data)
        return _lowest(qualities, dataset.parts, int(inspector.get_num_issues(silent=True)))


def _lowest(file: BinaryIO, parts: Sequence[Part], wanted: int) -> dict[int, Positions]:
    """The positions, by part, of the `wanted` lowest of a file's float32 values, ties to the first; never a NaN's.

    Found as the cut finds its threshold: the high halves of the values' keys first, then the low ones.
    """

    def keys() -> Iterator[npt.NDArray[np.uint32]]:
        file.seek(0)
        for part in parts:
            yield score_keys(np.frombuffer(file.read(4 * part.samples), dtype=np.float32))

    high = sum(np.bincount(one[one != NOT_SCORED] >> np.uint32(16), minlength=BINS) for one in keys())
    wanted = min(wanted, int(high.sum()))
    if wanted == 0:
        return {part.number: np.zeros(0, dtype=np.uint32) for part in parts}
    high_bin, before = kth_bin(high, wanted)
    low = sum(np.bincount(one[one >> 16 == high_bin] & np.uint32(0xFFFF), minlength=BINS) for one in keys())
    low_bin, before_inside = kth_bin(low, wanted - before)
    threshold, left = high_bin << 16 | low_bin, wanted - before - before_inside
    found = {}
    for part, one in zip(parts, keys(), strict=True):
        ties = np.flatnonzero(one == threshold)[:left]
        left -= len(ties)
        found[part.number] = np.union1d(np.flatnonzero(one < threshold), ties).astype(np.uint32)
    return found


def _classes(store: Store, dataset: Dataset, tables: Sequence[int]) -> Integers:
    """The distinct labels, ascending."""
    found = [
        table["label"].drop_null().unique().to_numpy().astype(np.int64)
        for part in dataset.parts
        for table in _tables(store, part, tables[-1:], ("label",))
    ]
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *found]))


def _blocks(
    store: Store, part: Part, tables: Sequence[int], classes: Integers
) -> Iterator[tuple[Integers, Integers, npt.NDArray[np.float64]]]:
    """(positions, labels as numbers of `classes`, mean probabilities) of a part's samples that have both, by blocks."""
    columns = [_columns(table) for table in _tables(store, part, tables, _COLUMNS)]
    known = np.logical_and.reduce([one["known"] for one in columns])
    positions = np.flatnonzero(known)
    step = max(1, _BLOCK_ELEMENTS // len(classes))
    for first in range(0, len(positions), step):
        some = positions[first : first + step]
        labels = np.searchsorted(classes, columns[-1]["label"][some])
        each = [_probabilities({name: one[name][some] for name in _COLUMNS}, labels, classes) for one in columns]
        yield some, labels, np.mean(each, axis=0)


def _columns(table: pa.Table) -> dict[str, Any]:
    filled = {name: table[name].to_numpy() for name in ("confidence", "loss")}
    filled |= {name: table[name].cast(pa.int64()).fill_null(-1).to_numpy() for name in ("label", "predicted")}
    filled["known"] = table["label"].is_valid().to_numpy() & ~np.isnan(filled["loss"]) & (filled["predicted"] >= 0)
    return filled


def _probabilities(columns: Mapping[str, Any], labels: Integers, classes: Integers) -> npt.NDArray[np.float64]:
    """(samples, classes), each row's sum 1: the label's, the predicted class's, and the rest spread over the others."""
    rows = np.arange(len(labels))
    of_label = np.exp(-columns["loss"].astype(np.float64))
    place = np.searchsorted(classes, columns["predicted"]).clip(max=len(classes) - 1)
    # A class that nothing is labelled with is one of the others, whose probability is spread.
    other = (classes[place] == columns["predicted"]) & (place != labels)
    of_predicted = np.where(other, columns["confidence"].astype(np.float64), 0.0)
    others = len(classes) - 1 - other
    rest = np.where(others > 0, np.clip(1 - of_label - of_predicted, 0, None) / np.maximum(others, 1), 0.0)
    found = np.repeat(rest[:, None], len(classes), axis=1)
    found[rows[other], place[other]] = of_predicted[other]
    found[rows, labels] = of_label
    normalised: npt.NDArray[np.float64] = found / found.sum(axis=1, keepdims=True)
    return normalised


def _tables(store: Store, part: Part, tables: Sequence[int], columns: Sequence[str]) -> Iterator[pa.Table]:
    for number in tables:
        with storage.open_random(store.path(schema.scores_path(number, part.number))) as file:
            yield pq.read_table(file, columns=list(columns))
