"""Checks every file of a store against what manifests and file names say of it; changes nothing.

dataset/<version>   its parts' member indexes: content (their names hold its digest), samples
rounds/<round>      selection: SHA-256, rows; score tables: page checksums, lines, what made them; that the cut is exact
everything else     files that nothing names
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset, Part
from dynams_stream.errors import DynamsError, StoreError
from dynams_stream.index import part_digest, read_part_index
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.store import Round, Store
from pipeline.cores import available_cores
from pipeline.verify_round import Problem, RoundCheck, read_checked, reason_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What `verify_store` found.

    Attributes:
        files: how many files were checked.
        problems: what is wrong, in the order of the store's layout.
        orphans: files that nothing names, relative to the store; harmless, `dynams gc` removes them. None are told
            while a manifest or dataset table cannot be read.
        unfinished: rounds that were begun and not published.
    """

    files: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    unfinished: tuple[int, ...]


def verify_store(
    store: Store, *, shards: bool = False, workers: int | None = None, progress: Progress | None = None
) -> Verification:
    """Read every file that the store's manifests name and compare.

    Args:
        store: an indexed store.
        shards: also look at each shard's size, time (or entity tag) and first header, as readers do.
        workers: files that are read at once; by default one per core.
        progress: called with the files that are checked and all of them.

    Raises:
        NotIndexedError: there is no dataset to check.
    """
    if not store.dataset_versions():
        store.dataset()  # raises, and says how to make one
    problems: list[Problem] = []
    datasets = _datasets(store, problems)
    rounds = _rounds(store, problems)
    whole = not problems  # else files that a damaged manifest names would pass for orphans
    checks = chain(
        _index_checks(store, datasets),
        _round_checks(rounds, datasets),
        _shard_checks(store, datasets) if shards else (),
    )
    total = _how_many(store, datasets, rounds, shards)
    parallel = ordered_thread_map(workers or available_cores())
    for done, found in enumerate(parallel(_run, checks), 1):
        problems += found
        if progress is not None:
            progress(done, total)
    published = {published.number for published in rounds}
    return Verification(
        files=len(datasets) + len(rounds) + total,
        problems=tuple(problems),
        orphans=tuple(orphans(store, datasets.values(), rounds)) if whole else (),
        unfinished=tuple(number for number in store.round_numbers() if number not in published),
    )


Check = Callable[[], list[Problem]]


def _run(check: Check) -> list[Problem]:
    return check()


def _how_many(store: Store, datasets: dict[int, Dataset], rounds: Sequence[Round], shards: bool) -> int:
    """How many checks there will be; they are made one by one, since those of a round hold its selection."""
    indexes = {part.index_file for dataset in datasets.values() for part in dataset.parts}
    of_rounds = sum(1 for _ in _round_checks(rounds, datasets))
    return len(indexes) + of_rounds + (sum(1 for _ in _shard_checks(store, datasets)) if shards else 0)


# ---- manifests -------------------------------------------------------------------------------------------------------


def _datasets(store: Store, problems: list[Problem]) -> dict[int, Dataset]:
    """The readable dataset versions."""
    found = {}
    for version in store.dataset_versions():
        try:
            found[version] = store.dataset(version)
        except Exception as error:  # noqa: BLE001 (of damaged bytes a reader may make anything)
            advice = "restore it from a copy, or index the shards again with dynams index"
            problems.append(Problem(schema.dataset_path(version), reason_of(error), advice))
    return found


def _rounds(store: Store, problems: list[Problem]) -> list[Round]:
    """The rounds with a readable manifest."""
    found = []
    for number in store.round_numbers():
        try:
            if store.is_published(number):
                published = store.round(number)
                _require_manifest(published.manifest)
                found.append(published)
        except StoreError as error:
            advice = "restore it from a copy, or remove the round's folder"
            problems.append(Problem(schema.manifest_path(number), reason_of(error), advice))
    return found


def _require_manifest(manifest: Mapping[str, Any]) -> None:
    """Make sure that what the checks go by is there.

    Raises:
        StoreError: names what is not.
    """
    kinds: dict[str, type | tuple[type, ...]] = {
        "dataset": dict, "selection": dict, "counts": dict, "score_parts": list, "strategy": str,
        "scores_of": (int, type(None)), "checkpoint": (dict, type(None)), "threshold": (int, float, str, type(None)),
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if name not in manifest or not isinstance(manifest[name], kind)]
    needed = {"dataset": ("version", "digest"), "selection": ("sha256",), "counts": ("all", "selected")}
    wrong += [
        f"{name}.{key}"
        for name, keys in needed.items()
        for key in keys
        if name not in wrong and key not in manifest[name]
    ]
    if wrong:
        raise StoreError(f"it lacks what a manifest has: {', '.join(wrong)}")
    if (manifest.get("status") == "partial") != bool(manifest.get("bad_shards")):
        raise StoreError(f"its status, {manifest.get('status')}, does not fit the bad shards that it names")


# ---- the member index ------------------------------------------------------------------------------------------------

_INDEX_AGAIN = "remove it if it is there and run dynams index again: what is missing is made anew"


def _index_checks(store: Store, datasets: dict[int, Dataset]) -> Iterator[Check]:
    """One check a file; versions share files."""
    seen = set()
    for dataset in datasets.values():
        for part in dataset.parts:
            if part.index_file not in seen:
                seen.add(part.index_file)
                counts = dataset.counts[part.first_shard : part.first_shard + part.shards]
                yield partial(_check_index, store, part, counts)


def _check_index(store: Store, part: Part, counts: npt.NDArray[np.int64]) -> list[Problem]:
    url = store.path(part.index_file)
    try:
        read_checked(url)
        indexes = read_part_index(url)
        if [len(index) for index in indexes.values()] != counts.tolist():
            return [Problem(part.index_file, "its samples are not as many as the dataset's table has", _INDEX_AGAIN)]
        if part.index_file != schema.index_path(part.number, part_digest(part.first_shard, list(indexes.values()))):
            return [Problem(part.index_file, "its content is not what its name says", _INDEX_AGAIN)]
    except Exception as error:  # noqa: BLE001 (of damaged bytes a reader may make anything)
        return [Problem(part.index_file, reason_of(error), _INDEX_AGAIN)]
    return []


def _shard_checks(store: Store, datasets: dict[int, Dataset]) -> Iterator[Check]:
    """The newest version's shards: those of earlier ones may be gone for good."""
    newest = datasets.get(store.dataset_versions()[-1])
    if newest is None:
        return
    for url, recorded in zip(newest.urls, newest.fingerprints, strict=True):
        yield partial(_check_shard, store, url, recorded)


def _check_shard(store: Store, url: str, recorded: str) -> list[Problem]:
    try:
        store.open_shard(url, recorded).close()
    except (DynamsError, OSError) as error:
        return [Problem(url, reason_of(error), "restore it, or index the dataset again")]
    return []


# ---- rounds ----------------------------------------------------------------------------------------------------------


def _dataset_of(published: Round, datasets: dict[int, Dataset]) -> Dataset | None:
    """The dataset that a round was made from, where it is there."""
    recorded = published.manifest["dataset"]
    dataset = datasets.get(recorded["version"])
    return dataset if dataset is not None and dataset.digest == recorded["digest"] else None


def _round_checks(rounds: Sequence[Round], datasets: dict[int, Dataset]) -> Iterator[Check]:
    for published in rounds:
        dataset = _dataset_of(published, datasets)
        if dataset is None:
            yield partial(_wrong_dataset, published)
            continue
        if published.manifest["score_parts"] not in ([], [part.number for part in dataset.parts]):
            yield partial(_wrong_parts, published)
            continue
        check = RoundCheck(published, dataset)
        yield check.selection_file
        for part in published.manifest["score_parts"]:
            yield partial(check.score_table, dataset.parts[part])


def _wrong_dataset(published: Round) -> list[Problem]:
    recorded = published.manifest["dataset"]
    what = f"made from dataset version {recorded['version']}, digest {recorded['digest'][:12]}, which is not there"
    advice = "restore that dataset table, or remove the round's folder"
    return [Problem(schema.manifest_path(published.number), what, advice)]


def _wrong_parts(published: Round) -> list[Problem]:
    what = "the score parts that it names are not those of its dataset"
    return [Problem(schema.manifest_path(published.number), what, "restore it from a copy")]


# ---- what nothing names ----------------------------------------------------------------------------------------------


def orphans(store: Store, datasets: Iterable[Dataset], rounds: Sequence[Round]) -> Iterator[str]:
    """Files in the folders of datasets, index and published rounds that no manifest names, relative to the store."""
    indexes = {part.index_file for dataset in datasets for part in dataset.parts}
    for name in storage.list_names(store.path(schema.INDEX_FOLDER)):
        if (path := f"{schema.INDEX_FOLDER}/{name}") not in indexes:
            yield path
    for name in storage.list_names(store.path(schema.DATASET_FOLDER)):
        if not (name.endswith(".parquet") and name.removesuffix(".parquet").isdigit()):
            yield f"{schema.DATASET_FOLDER}/{name}"
    used = {
        schema.scores_path(published.manifest["scores_of"] or published.number, part)
        for published in rounds
        for part in published.manifest["score_parts"]
    }
    for published in rounds:
        number = published.number
        named = {schema.manifest_path(number), schema.selection_path(number), schema.scores_folder(number)}
        if published.manifest.get("excluded"):
            named.add(schema.excluded_path(number))
        for folder, known in ((schema.round_path(number), named), (schema.scores_folder(number), used)):
            for name in storage.list_names(store.path(folder)):
                if (path := f"{folder}/{name}") not in known:
                    yield path
