"""Checks every file of a store against what manifests and file names say of it; changes nothing.

dataset/<version>   its parts' member indexes: content (their names hold its digest), samples
control/weights     SHA-256
rounds/<round>      selection, excluded rows: SHA-256, rows
                    score tables: SHA-256, page checksums, lines, what made them
                    where all are sound: the cut, made again, and what `round.json` says of it
everything else     files that nothing names
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset, Part
from dynams_stream.errors import DynamsError, StoreError
from dynams_stream.index import part_digest, read_part_index
from dynams_stream.ordered_map import OrderedMap, ordered_thread_map
from dynams_stream.store import Round, Store
from pipeline.cores import available_cores
from pipeline.orphans import is_being_written, orphans, strangers
from pipeline.pending import unpublished_rounds
from pipeline.verify_cut import check_cut
from pipeline.verify_round import Problem, RoundCheck, checked_table, has_lines_of, reason_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What `verify_store` found.

    Attributes:
        files: how many files were checked.
        problems: what is wrong, in the order of the store's layout.
        orphans: files (and folders) that nothing names, relative to the store, but for those that another job seems to
            be writing; harmless. None are told while a manifest or dataset table cannot be read.
        unfinished: rounds that were begun and not published.
        without_hashes: published rounds from before score tables had hashes; of these tables only the pages' checksums,
            and what the cut made of them, could be compared.
    """

    files: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    unfinished: tuple[int, ...]
    without_hashes: tuple[int, ...] = ()


def verify_store(
    store: Store, *, shards: bool = False, workers: int | None = None, progress: Progress | None = None
) -> Verification:
    """Read every file that the store's manifests name and compare.

    Args:
        store: an indexed store.
        shards: also look at each shard's size, time (or entity tag) and first header, as readers do.
        workers: files that are read at once; by default one per core.
        progress: called with how many files are checked and cuts made again, and how many there are of both.

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
        _weight_checks(store, rounds),
        _round_checks(rounds, datasets),
        _shard_checks(store, datasets) if shards else (),
    )
    files = _how_many(store, datasets, rounds, shards)
    parallel = ordered_thread_map(workers or available_cores())
    for done, found in enumerate(chain(parallel(_run, checks), _cut_checks(rounds, datasets, problems, parallel)), 1):
        problems += found
        if progress is not None:
            progress(done, files + len(rounds))
    unnamed = chain(orphans(store, datasets.values(), rounds), strangers(store, datasets.values())) if whole else ()
    return Verification(
        files=len(datasets) + len(rounds) + files,
        problems=tuple(problems),
        orphans=tuple(path for path in unnamed if not is_being_written(store, path)),
        unfinished=tuple(unpublished_rounds(store, rounds)),
        without_hashes=tuple(
            one.number for one in rounds if one.manifest["score_parts"] and "score_footers_sha256" not in one.manifest
        ),
    )


Check = Callable[[], list[Problem]]


def _run(check: Check) -> list[Problem]:
    return check()


def _how_many(store: Store, datasets: dict[int, Dataset], rounds: Sequence[Round], shards: bool) -> int:
    """How many files there are to check."""
    indexes = {part.index_file for dataset in datasets.values() for part in dataset.parts}
    others = chain(_weight_checks(store, rounds), _round_checks(rounds, datasets))
    return len(indexes) + sum(1 for _ in others) + (sum(1 for _ in _shard_checks(store, datasets)) if shards else 0)


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


_NEEDED: Mapping[str, type | tuple[type, ...]] = {
    "dataset.version": int, "dataset.digest": str, "selection.sha256": str, "counts.all": int, "counts.selected": int,
    "score_parts": list, "strategy": str, "fraction": (int, float), "scores_of": (int, NoneType),
    "checkpoint": (dict, NoneType), "threshold": (int, float, str, NoneType),
}  # fmt: skip
"""Entries that the checks go by."""
_LATER: Mapping[str, type | tuple[type, ...]] = {
    "score_footers_sha256": list, "excluded": dict, "bad_shards": list, "sample_weight": (str, NoneType),
}  # fmt: skip
"""Those that earlier versions did not write."""


def _has(manifest: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> bool:
    """Whether an entry, or one within another (`counts.all`), is there and of a kind."""
    found: Any = manifest
    for step in name.split("."):
        if not isinstance(found, Mapping) or step not in found:
            return False
        found = found[step]
    return isinstance(found, kind)


def _require_manifest(manifest: Mapping[str, Any]) -> None:
    """Make sure that what the checks go by is there.

    Raises:
        StoreError: names what is not.
    """
    wrong = [name for name, kind in _NEEDED.items() if not _has(manifest, name, kind)]
    wrong += [name for name, kind in _LATER.items() if name in manifest and not _has(manifest, name, kind)]
    if manifest.get("checkpoint") is not None:
        wrong += [name for name in ("checkpoint.path", "checkpoint.sha256") if not _has(manifest, name, str)]
    if "score_parts" not in wrong and not all(isinstance(part, int) for part in manifest["score_parts"]):
        wrong.append("score_parts")
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
                yield partial(_check_index, store, part, dataset.counts)


def _check_index(store: Store, part: Part, counts: npt.NDArray[np.int64]) -> list[Problem]:
    url = store.path(part.index_file)
    try:
        if not has_lines_of(checked_table(storage.read_bytes(url)), part, counts):
            return [Problem(part.index_file, "its lines are not the samples of the dataset's table", _INDEX_AGAIN)]
        indexes = read_part_index(url)
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


# ---- weights that were saved for scoring -----------------------------------------------------------------------------

_DIGEST_NAME = re.compile(r"([0-9a-f]{16})\.safetensors")


def _weight_checks(store: Store, rounds: Sequence[Round]) -> Iterator[Check]:
    """Of those that a round was scored with, and of all whose names hold a digest."""
    digests: dict[str, str] = {}
    needed = set()
    for checkpoint in (published.manifest["checkpoint"] for published in rounds):
        folder, _, name = (checkpoint["path"] if checkpoint else "").rpartition("/")
        if f"/{folder}".endswith(f"/{schema.WEIGHTS_FOLDER}"):
            digests[name] = checkpoint["sha256"]
            if folder == store.path(schema.WEIGHTS_FOLDER):  # else of another store, or of this one before it was moved
                needed.add(name)
    there = storage.list_names(store.path(schema.WEIGHTS_FOLDER))
    for name in sorted(needed.union(name for name in there if name in digests or _DIGEST_NAME.fullmatch(name))):
        yield partial(_check_weights, store, f"{schema.WEIGHTS_FOLDER}/{name}", digests.get(name))


def _check_weights(store: Store, path: str, recorded: str | None) -> list[Problem]:
    advice = "restore it from a copy; loaders go on without it, but nothing can be scored with it again"
    try:
        found = storage.file_digest(store.path(path))
    except FileNotFoundError:
        return [Problem(path, "not there, though a round was scored with it", advice)]
    named = _DIGEST_NAME.fullmatch(path.rpartition("/")[2])
    if recorded not in (None, found) or (named is not None and not found.startswith(named[1])):
        return [Problem(path, "not the weights that were saved: their SHA-256 differs", advice)]
    return []


# ---- rounds ----------------------------------------------------------------------------------------------------------


def _dataset_of(published: Round, datasets: dict[int, Dataset]) -> Dataset | None:
    """The dataset that a round was made from, where it is there."""
    recorded = published.manifest["dataset"]
    dataset = datasets.get(recorded["version"])
    return dataset if dataset is not None and dataset.digest == recorded["digest"] else None


def _round_checks(rounds: Sequence[Round], datasets: dict[int, Dataset]) -> Iterator[Check]:
    of_changed: dict[int, list[int]] = {}
    for published in rounds:
        dataset = _dataset_of(published, datasets)
        if dataset is None:
            version = published.manifest["dataset"]["version"]
            if version in datasets:
                of_changed.setdefault(version, []).append(published.number)
            else:
                yield partial(_missing_dataset, published)
            continue
        if published.manifest["score_parts"] not in ([], [part.number for part in dataset.parts]):
            yield partial(_wrong_parts, published)
            continue
        check = RoundCheck(published, dataset)
        yield check.selection_file
        if published.manifest.get("excluded"):
            yield check.excluded_file
        for part in published.manifest["score_parts"]:
            yield partial(check.score_table, dataset.parts[part])
    for version, numbers in of_changed.items():
        yield partial(_changed_dataset, version, numbers)


def _cut_checks(
    rounds: Sequence[Round], datasets: dict[int, Dataset], problems: Sequence[Problem], parallel: OrderedMap
) -> Iterator[list[Problem]]:
    """Each round's problems, none of those whose files have some already; asked for when the files are checked."""
    damaged = {problem.path for problem in problems}
    for published in rounds:
        dataset, number = _dataset_of(published, datasets), published.number
        files = {schema.manifest_path(number), schema.selection_path(number), schema.excluded_path(number)}
        if (scored := published.scores_of) is not None:
            files |= {schema.scores_path(scored, part) for part in published.manifest["score_parts"]}
        yield [] if dataset is None or files & damaged else check_cut(published, dataset, parallel)


def _changed_dataset(version: int, numbers: Sequence[int]) -> list[Problem]:
    what = f"not the table that rounds {', '.join(map(str, numbers))} were made from: its digest is another"
    return [Problem(schema.dataset_path(version), what, "restore it from a copy")]


def _missing_dataset(published: Round) -> list[Problem]:
    recorded = published.manifest["dataset"]
    what = f"made from dataset version {recorded['version']}, digest {recorded['digest'][:12]}, which is not there"
    advice = "restore that dataset table, or remove the round's folder"
    return [Problem(schema.manifest_path(published.number), what, advice)]


def _wrong_parts(published: Round) -> list[Problem]:
    what = "the score parts that it names are not those of its dataset"
    return [Problem(schema.manifest_path(published.number), what, "restore it from a copy")]
