"""Removes what no reader can need any more: old rounds, dataset versions, saved weights, files that nothing names.

A published round stays when one of these holds:

1. it is among the newest `keep`
2. a round that stays was cut from its score tables
3. it was the newest until less than an hour ago: a loader may have looked it up and not have opened it yet
4. a loader has begun an epoch of it, or saved a state that names it, less than `unused_for` ago (`control/uses`)

A round that was begun and not published stays until nothing was written to it for `unused_for`. Removal may be stopped
anywhere: the number is retired, then the manifest goes, so that readers find no round, then the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import UsageError
from dynams_stream.store import Round, Store
from dynams_stream.uses import Use, read_uses
from pipeline.lease import store_lease
from pipeline.verify_job import orphans

UNUSED_FOR = timedelta(days=14)
LATELY = timedelta(hours=1)


@dataclass(frozen=True)
class Kept:
    """A round that stays though it is not among the newest.

    Attributes:
        number: the round.
        why: in words.
    """

    number: int
    why: str


@dataclass(frozen=True)
class Garbage:
    """What can go.

    Attributes:
        rounds: published rounds.
        abandoned: rounds that were begun and never published.
        versions: dataset versions.
        files: other files, relative to the store.
        kept: older rounds that stay.
    """

    rounds: tuple[int, ...]
    abandoned: tuple[int, ...]
    versions: tuple[int, ...]
    files: tuple[str, ...]
    kept: tuple[Kept, ...]


def find_garbage(
    store: Store, *, keep: int, unused_for: timedelta = UNUSED_FOR, now: datetime | None = None
) -> Garbage:
    """Tell what can go; see the module's docstring for the rules.

    Args:
        store: an indexed store.
        keep: how many of the newest rounds stay in any case, at least 1.
        unused_for: how long ago the last sign of use has to be.
        now: the time; given by tests.

    Raises:
        UsageError: keep is below 1.
        StoreError: a manifest or dataset table cannot be read: `dynams verify` first.
    """
    if keep < 1:
        raise UsageError(f"keep is {keep}; the newest round always stays: 1 or more is needed")
    now = now or datetime.now(UTC)
    rounds = store.rounds()
    uses = [use for use in read_uses(store) if now - use.time < unused_for]
    kept = _kept(rounds, keep, uses, now)
    newest = {published.number for published in rounds[-keep:]}
    staying = [published for published in rounds if published.number in newest or published.number in kept]
    gone = [published for published in rounds if published not in staying]
    versions = {version: store.dataset(version) for version in store.dataset_versions()}
    spare = _spare_versions(versions, staying, uses)
    stale = _Stale(store, now - unused_for)
    return Garbage(
        rounds=tuple(published.number for published in gone),
        abandoned=tuple(_abandoned(store, rounds, kept, stale)),
        versions=tuple(spare),
        files=tuple(
            itertools.chain(
                _index_files(versions, spare),
                stale.of(orphans(store, versions.values(), staying)),
                stale.of(_unused_weights(store, staying)),
                stale.of(f"{schema.USES_FOLDER}/{name}" for name in storage.list_names(store.path(schema.USES_FOLDER))),
            )
        ),
        kept=tuple(Kept(number, why) for number, why in sorted(kept.items()) if number not in newest),
    )


def remove_garbage(store: Store, garbage: Garbage) -> None:
    """Remove it. Run again after a stop, `find_garbage` finds what is left.

    Raises:
        StoreBusyError: another job works on the store.
    """
    with store_lease(store, "gc"):
        _remove(store, garbage)


def _remove(store: Store, garbage: Garbage) -> None:
    for number in sorted({*garbage.rounds, *garbage.abandoned, *_half_removed(store)}, reverse=True):
        _remove_round(store, number)  # later rounds first: they may be cut from the tables of earlier ones
    for version in garbage.versions:
        storage.remove(store.path(schema.dataset_path(version)))
    for path in garbage.files:
        storage.remove(store.path(path))


# ---- rounds ----------------------------------------------------------------------------------------------------------


def _kept(rounds: Sequence[Round], keep: int, uses: Iterable[Use], now: datetime) -> dict[int, str]:
    """Why rounds stay, by number; of the newest only what others need of them."""
    there = {published.number: published for published in rounds}
    kept: dict[int, str] = {}
    for use in sorted(uses, key=lambda use: use.time):
        if use.round in there:
            kept[use.round] = f"read, or named by a saved state, {_ago(now - use.time)} ago ({use.who})"
    for older, newer in itertools.pairwise(rounds):
        since = now - datetime.fromisoformat(newer.manifest["ended"])
        if since < LATELY:
            kept.setdefault(older.number, f"was the newest round until {_ago(since)} ago")
    newest = {published.number for published in rounds[-keep:]}
    for published in reversed(rounds):  # tables are always of an earlier round
        scored = published.manifest["scores_of"]
        if (published.number in newest or published.number in kept) and scored is not None:
            kept.setdefault(scored, f"round {published.number} was cut from its score tables")
    return kept


def _abandoned(store: Store, rounds: Sequence[Round], kept: dict[int, str], stale: _Stale) -> list[int]:
    """Rounds without a manifest that nobody works on; a crashed job's tables stay as long as it may be run again."""
    published, retired = {one.number for one in rounds}, store.retired()
    begun = [number for number in store.round_numbers() if number not in published and number not in kept]
    return [number for number in begun if number in retired or stale.is_folder(schema.round_path(number))]


def _half_removed(store: Store) -> set[int]:
    """Rounds that a stopped removal has left."""
    return store.retired() & {*store.round_numbers(), *(_claim_numbers(store))}


def _claim_numbers(store: Store) -> list[int]:
    names = storage.list_names(store.path(schema.CLAIMS_FOLDER))
    return [
        int(name[:-5].split("-")[0]) for name in names if name.endswith(".json") and name[:-5].split("-")[0].isdigit()
    ]


def _remove_round(store: Store, number: int) -> None:
    store.retire(number)
    storage.remove(store.path(schema.manifest_path(number)))
    for folder in (schema.scores_folder(number), schema.round_path(number)):
        for name in storage.list_names(store.path(folder)):
            if f"{folder}/{name}" != schema.scores_folder(number):
                storage.remove(store.path(f"{folder}/{name}"))
        storage.remove_folder(store.path(folder))
    for path in (schema.selection_claim_path(number), schema.claim_path(number)):
        storage.remove(store.path(path))


# ---- files -----------------------------------------------------------------------------------------------------------


class _Stale:
    """Tells files that were last written before a moment."""

    def __init__(self, store: Store, before: datetime):
        self._store, self._before = store, before.timestamp()

    def of(self, paths: Iterable[str]) -> list[str]:
        """Those of some files, relative to the store."""
        return [path for path in paths if storage.modified(self._store.path(path)) < self._before]

    def is_folder(self, folder: str) -> bool:
        """Whether a folder (of files, and of folders of files) has nothing else in it."""
        names = [f"{folder}/{name}" for name in storage.list_names(self._store.path(folder))]
        inside = [f"{name}/{file}" for name in names for file in storage.list_names(self._store.path(name))]
        return len(self.of([*names, *inside])) == len(names) + len(inside)


def _spare_versions(versions: dict[int, Dataset], staying: Sequence[Round], uses: Iterable[Use]) -> list[int]:
    """Dataset versions that no round and no loader needs; the newest one stays."""
    needed = {published.manifest["dataset"]["version"] for published in staying} | {use.version for use in uses}
    return [version for version in versions if version != max(versions) and version not in needed]


def _index_files(versions: dict[int, Dataset], spare: Sequence[int]) -> list[str]:
    """Member indexes that only spare dataset versions name."""
    named: dict[bool, set[str]] = {True: set(), False: set()}
    for version, dataset in versions.items():
        named[version in spare].update(part.index_file for part in dataset.parts)
    return sorted(named[True] - named[False])


def _unused_weights(store: Store, staying: Sequence[Round]) -> list[str]:
    """Weights that rounds were scored with and that were saved for that alone."""
    needed = {(published.manifest["checkpoint"] or {}).get("path") for published in staying}
    paths = [f"{schema.WEIGHTS_FOLDER}/{name}" for name in storage.list_names(store.path(schema.WEIGHTS_FOLDER))]
    return [path for path in paths if store.path(path) not in needed]


def _ago(passed: timedelta) -> str:
    days, seconds = passed.days, passed.seconds
    return (
        f"{days} days"
        if days > 1
        else f"{24 * days + seconds // 3600} h"
        if passed > LATELY
        else f"{seconds // 60} min"
    )
