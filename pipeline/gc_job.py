"""Removes what no reader can need any more: old rounds, dataset versions, saved weights, files that nothing names.

A published round stays when one of these holds:

1. it is among the newest `keep`
2. a round that stays was cut from its score tables
3. it was the newest until less than an hour ago: a loader may have looked it up and not have opened it yet
4. a loader has begun an epoch of it, or saved a state that names it, less than `unused_for` ago (`control/uses`)
5. a selection that was begun less than `unused_for` ago is cut from its score tables

A round that was begun and not published stays until nothing was written to it for `unused_for`. Removal may be stopped
anywhere: the number is retired, then the manifest goes, so that readers find no round, then the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import UsageError
from dynams_stream.store import Round, Store
from dynams_stream.uses import Use, read_uses
from pipeline.lease import store_lease
from pipeline.orphans import orphans

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
    stale = _Stale(store, now - unused_for)
    kept = _kept(rounds, keep, uses, _begun_cuts(store, rounds, stale), now)
    newest = {published.number for published in rounds[-keep:]}
    staying = [published for published in rounds if published.number in newest or published.number in kept]
    gone = [published for published in rounds if published not in staying]
    versions = {version: store.dataset(version) for version in store.dataset_versions()}
    spare = _spare_versions(versions, staying, uses)
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


def collect_garbage(store: Store, *, keep: int, unused_for: timedelta = UNUSED_FOR) -> Garbage:
    """Find and remove garbage while no other job works on the store; arguments as for `find_garbage`.

    Raises:
        StoreBusyError: another job works on it.
    """
    with store_lease(store, "gc"):
        found = find_garbage(store, keep=keep, unused_for=unused_for)
        remove_garbage(store, found)
    return found


def remove_garbage(store: Store, garbage: Garbage) -> None:
    """Remove it. Run again after a stop, `find_garbage` finds what is left."""
    for number in sorted({*garbage.rounds, *garbage.abandoned}, reverse=True):
        _remove_round(store, number)  # later rounds first: they may be cut from the tables of earlier ones
    for version in garbage.versions:
        storage.remove(store.path(schema.dataset_path(version)))
    for path in garbage.files:
        storage.remove(store.path(path))


# ---- rounds ----------------------------------------------------------------------------------------------------------


def _kept(
    rounds: Sequence[Round], keep: int, uses: Iterable[Use], cuts: Mapping[int, int], now: datetime
) -> dict[int, str]:
    """Why rounds stay, by number; of the newest only what others need of them.

    Args:
        cuts: rounds that are being cut, and whose score tables they are cut from.
    """
    there = {published.number: published for published in rounds}
    kept: dict[int, str] = {}
    for use in sorted(uses, key=lambda use: use.time):
        if use.round in there:
            kept[use.round] = f"read, or named by a saved state, {_ago(now - use.time)} ago ({use.who})"
    for older, newer in itertools.pairwise(rounds):
        since = now - datetime.fromisoformat(newer.manifest["ended"])
        if since < LATELY:
            kept.setdefault(older.number, f"was the newest round until {_ago(since)} ago")
    for number, scored in cuts.items():
        kept.setdefault(scored, f"round {number}, which is not published yet, is cut from its score tables")
    newest = {published.number for published in rounds[-keep:]}
    for published in reversed(rounds):  # tables are always of an earlier round
        scored = published.manifest["scores_of"]
        if (published.number in newest or published.number in kept) and scored is not None:
            kept.setdefault(scored, f"round {published.number} was cut from its score tables")
    return kept


def _begun_cuts(store: Store, rounds: Sequence[Round], stale: _Stale) -> dict[int, int]:
    """Rounds that were claimed and not published for selections of another round's score tables, and which round's."""
    published = {one.number for one in rounds}
    return {
        number: claim["scores_of"]
        for number, claim in store.claims().items()
        if number not in published and isinstance(claim.get("scores_of"), int) and not stale.is_round(number)
    }


def _abandoned(store: Store, rounds: Sequence[Round], kept: Mapping[int, str], stale: _Stale) -> list[int]:
    """Rounds without a manifest that nobody works on; a crashed job's tables stay as long as it may be run again."""
    retired = store.retired()
    begun = {*store.round_numbers(), *_claimed(store)} - {one.number for one in rounds} - set(kept)
    return sorted(number for number in begun if number in retired or stale.is_round(number))


def _claimed(store: Store) -> set[int]:
    """The numbers of all rounds with claims, also those that a stopped removal has left."""
    names = (name.removesuffix(".json") for name in storage.list_names(store.path(schema.CLAIMS_FOLDER)))
    numbers = (name.removesuffix("-selection") for name in names)
    return {int(number) for number in numbers if number.isdigit()}


def _remove_round(store: Store, number: int) -> None:
    store.retire(number)
    storage.remove(store.path(schema.manifest_path(number)))
    for path in (*_round_files(store, number), *_claims_of(number)):
        storage.remove(store.path(path))
    for folder in (schema.scores_folder(number), schema.round_path(number)):
        storage.remove_folder(store.path(folder))


def _round_files(store: Store, number: int) -> list[str]:
    """All files of a round, relative to the store."""
    scores, folder = schema.scores_folder(number), schema.round_path(number)
    files = [f"{folder}/{name}" for name in storage.list_names(store.path(folder))]
    return [f"{scores}/{name}" for name in storage.list_names(store.path(scores))] + [
        path for path in files if path != scores
    ]


def _claims_of(number: int) -> tuple[str, str]:
    return schema.selection_claim_path(number), schema.claim_path(number)


# ---- files -----------------------------------------------------------------------------------------------------------


class _Stale:
    """Tells what was last written before a moment; what a store cannot date was not."""

    def __init__(self, store: Store, before: datetime):
        self._store, self._before = store, before.timestamp()

    def of(self, paths: Iterable[str]) -> list[str]:
        """Those of some files, relative to the store."""
        return [path for path in paths if 0 < storage.modified(self._store.path(path)) < self._before]

    def is_round(self, number: int) -> bool:
        """Whether that holds for all that there is of a round: its files and claims, or its empty folder."""
        claims = [path for path in _claims_of(number) if storage.exists(self._store.path(path))]
        there = [*_round_files(self._store, number), *claims] or [schema.round_path(number)]
        return len(self.of(there)) == len(there)


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
    """Weights that rounds were scored with and that were saved for that alone. Their names tell their content."""
    checkpoints = [published.manifest["checkpoint"] for published in staying]
    needed = {checkpoint["path"].rsplit("/", 1)[-1] for checkpoint in checkpoints if checkpoint is not None}
    names = storage.list_names(store.path(schema.WEIGHTS_FOLDER))
    return [f"{schema.WEIGHTS_FOLDER}/{name}" for name in names if name not in needed]


def _ago(passed: timedelta) -> str:
    minutes = int(passed.total_seconds()) // 60
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days"
