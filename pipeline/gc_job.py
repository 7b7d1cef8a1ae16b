"""Removes what no reader can need any more: old rounds, dataset versions, saved weights, files that nothing names.

A published round stays when one of these holds:

1. it is among the newest `keep`
2. a round that stays was cut from its score tables
3. it was the newest until less than an hour ago: a loader may have looked it up and not have opened it yet
4. a loader has read it, or saved a state that names it, less than `unused_for` ago (`control/uses`)
5. a selection that was begun less than `unused_for` ago is cut from its score tables

A dataset version stays for like reasons: rounds, loaders and selections need it, or it was the newest lately. A round
that was begun and not published stays until nothing was written to it for `unused_for`, and so do other files.

    retire the number ──► look once more ──needed by now──► take it back
                                └──────────garbage still──► the manifest goes, then the rest

Loaders, `dynams select` and `dynams index` may start at any moment, without the lease. A selection claims its round,
then looks at what is retired (`Store.require_kept`): so either it is seen here, or it sees that it is too late. An
index job writes each file anew that the newest version does not name. Removal may be stopped anywhere: a round
without a manifest is finished by the next run, as readers find none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import UsageError
from dynams_stream.store import Round, Store
from dynams_stream.uses import Use, read_uses
from pipeline.lease import store_lease
from pipeline.orphans import orphans

UNUSED_FOR = timedelta(days=14)
LEAST_UNUSED_FOR = timedelta(hours=2)
"""Loaders say once an hour that they still read a round (`uses.AGAIN_AFTER`), and clocks differ."""
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
        unused_since: what was used or written after that is no garbage; in UTC.
    """

    rounds: tuple[int, ...]
    abandoned: tuple[int, ...]
    versions: tuple[int, ...]
    files: tuple[str, ...]
    kept: tuple[Kept, ...]
    unused_since: str


def find_garbage(
    store: Store, *, keep: int, unused_for: timedelta = UNUSED_FOR, now: datetime | None = None
) -> Garbage:
    """Tell what can go; see the module's docstring for the rules.

    Args:
        store: an indexed store.
        keep: how many of the newest rounds stay in any case, at least 1.
        unused_for: how long ago the last sign of use has to be, at least two hours.
        now: the time; given by tests.

    Raises:
        UsageError: keep is below 1, or unused_for below two hours.
        StoreError: a manifest or dataset table cannot be read: `dynams verify` first.
    """
    if keep < 1:
        raise UsageError(f"keep is {keep}; the newest round always stays: 1 or more is needed")
    if unused_for < LEAST_UNUSED_FOR:
        raise UsageError(
            f"unused_for is {unused_for}; loaders say only once an hour that they still read a round, so less than "
            f"{LEAST_UNUSED_FOR} (--unused-days 0.084) would remove rounds in use"
        )
    now = now or datetime.now(UTC)
    rounds = store.rounds()
    stale = _Stale(store, now - unused_for)
    uses = _uses(store, stale)
    begun = _begun(store, [published.number for published in rounds], stale)
    kept = _kept(rounds, keep, uses, _cuts(store, rounds, begun), now)
    newest = {published.number for published in rounds[-keep:]}
    staying = [published for published in rounds if published.number in newest or published.number in kept]
    gone = [published for published in rounds if published not in staying]
    versions = {version: store.dataset(version) for version in store.dataset_versions()}
    lately = _newest_lately(versions, _Stale(store, now - LATELY))
    spare = [version for version in _spare_versions(versions, staying, uses, begun) if version not in lately]
    return Garbage(
        rounds=tuple(published.number for published in gone),
        abandoned=tuple(_abandoned(store, rounds, kept, stale)),
        versions=tuple(spare),
        files=tuple(_other_files(store, versions, spare, staying, stale)),
        kept=tuple(Kept(number, why) for number, why in sorted(kept.items()) if number not in newest),
        unused_since=stale.before.isoformat(),
    )


def collect_garbage(store: Store, *, keep: int, unused_for: timedelta = UNUSED_FOR) -> Garbage:
    """Find and remove garbage while no scoring job works on the store; arguments and errors as for `find_garbage`.

    Returns:
        What was removed.

    Raises:
        StoreBusyError: another job works on it.
        LeaseLostError: another job took over; the rest stays.
    """
    with store_lease(store, "gc") as lease:
        found = find_garbage(store, keep=keep, unused_for=unused_for)
        return remove_garbage(store, found, still_ours=lease.require)


def remove_garbage(store: Store, garbage: Garbage, *, still_ours: Callable[[], None] = lambda: None) -> Garbage:
    """Remove what is garbage still. Run again after a stop, `find_garbage` finds what is left.

    Args:
        store: where it was found.
        garbage: what `find_garbage` gave.
        still_ours: called before each removal of a round, and of the rest; raises when another job has taken over.

    Returns:
        What was removed, and why the rest stays.
    """
    stale = _Stale(store, datetime.fromisoformat(garbage.unused_since))
    spared = _remove_rounds(store, {*garbage.rounds, *garbage.abandoned}, stale, still_ours)
    staying = store.rounds()
    versions = {version: store.dataset(version) for version in store.dataset_versions()}
    begun = _begun(store, [published.number for published in staying], stale)
    spare = [
        version
        for version in _spare_versions(versions, staying, _uses(store, stale), begun)
        if version in garbage.versions
    ]
    files = [path for path in _other_files(store, versions, spare, staying, stale) if path in set(garbage.files)]
    still_ours()
    for version in spare:
        storage.remove(store.path(schema.dataset_path(version)))
    return replace(
        garbage,
        rounds=tuple(number for number in garbage.rounds if number not in spared),
        abandoned=tuple(number for number in garbage.abandoned if number not in spared),
        versions=tuple(spare),
        files=tuple(path for path in files if _remove_file(store, path, stale)),
        kept=tuple(sorted([*garbage.kept, *itertools.starmap(Kept, spared.items())], key=lambda kept: kept.number)),
    )


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


def _begun(store: Store, published: Collection[int], stale: _Stale) -> dict[int, dict[str, Any]]:
    """What the rounds were claimed for that are none of the published ones and were worked on lately."""
    return {number: claim for number, claim in store.claims(but=published).items() if not stale.is_round(number)}


def _cuts(store: Store, rounds: Sequence[Round], begun: Mapping[int, Mapping[str, Any]]) -> dict[int, int]:
    """Begun rounds that are cut from the score tables of another one, and of which; of a removed one none can be."""
    removed = store.retired() - {published.number for published in rounds}
    cuts = {number: claim["scores_of"] for number, claim in begun.items() if isinstance(claim.get("scores_of"), int)}
    return {number: scored for number, scored in cuts.items() if scored not in removed}


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


def _remove_rounds(
    store: Store, going: Collection[int], stale: _Stale, still_ours: Callable[[], None]
) -> dict[int, str]:
    """Remove rounds; why some stay, by number, which somebody needs by now."""
    still_ours()
    published = {one.number: one for one in store.rounds()}
    retired = store.retired()
    for number in retired & published.keys() - set(going):
        store.unretire(number)  # a run was stopped before it looked once more
    spared: dict[int, str] = {}
    for number in sorted(going, reverse=True):  # later ones first: they may be cut from the tables of earlier ones
        still_ours()
        store.retire(number)
        half_removed = number in retired and number not in published
        why = None if half_removed else _needed_by_now(store, number, published, stale)
        if why is None:
            still_ours()
            _remove_round(store, number)
            published.pop(number, None)
        else:
            store.unretire(number)
            spared[number] = why
    return spared


def _needed_by_now(store: Store, number: int, published: Mapping[int, Round], stale: _Stale) -> str | None:
    """Why a retired round has to stay after all; None when it does not.

    Args:
        store: where it lies.
        number: the round.
        published: the rounds that are published and stay, as far as was known when the first one was removed.
        stale: tells what is used.
    """
    if number not in published and not stale.is_round(number):
        return "a job has gone on with it"
    uses = _uses(store, stale, number)
    if uses:
        return f"read, or named by a saved state, in this moment ({uses[0].who})"
    cuts = {other: claim.get("scores_of") for other, claim in _begun(store, published.keys(), stale).items()}
    cuts |= {other: one.manifest["scores_of"] for other, one in published.items()}
    needing = [other for other, scored in cuts.items() if scored == number]
    return f"round {needing[0]} is cut from its score tables" if needing else None


def _remove_round(store: Store, number: int) -> None:
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
        self.before = before
        self._store = store

    def of(self, paths: Iterable[str]) -> list[str]:
        """Those of some files, relative to the store."""
        return [path for path in paths if 0 < storage.modified(self._store.path(path)) < self.before.timestamp()]

    def is_round(self, number: int) -> bool:
        """Whether that holds for all that there is of a round: its files and claims, or its empty folder."""
        folders = schema.scores_folder(number), schema.round_path(number)
        listed = [file.modified for folder in folders for file in storage.list_files(self._store.path(folder))]
        claims = [path for path in _claims_of(number) if storage.exists(self._store.path(path))]
        others = claims if listed or claims else [schema.round_path(number)]
        return len(self.of(others)) == len(others) and all(0 < time < self.before.timestamp() for time in listed)


def _uses(store: Store, stale: _Stale, round: int | None = None) -> list[Use]:
    """The marks, of all rounds or one, that count still."""
    return [use for use in read_uses(store, round) if use.time > stale.before]


def _spare_versions(
    versions: Mapping[int, Dataset],
    staying: Iterable[Round],
    uses: Iterable[Use],
    begun: Mapping[int, Mapping[str, Any]],
) -> list[int]:
    """Dataset versions that no round, no loader and no selection that was begun needs; the newest one stays."""
    needed = {published.manifest["dataset"]["version"] for published in staying} | {use.version for use in uses}
    digests = [claim.get("dataset") for claim in begun.values()]
    return [
        version
        for version, dataset in versions.items()
        if version != max(versions) and version not in needed and dataset.digest not in digests
    ]


def _newest_lately(versions: Collection[int], lately: _Stale) -> set[int]:
    """Dataset versions whose successor came lately: a loader or a selection may have begun before."""
    return {
        version
        for version, successor in itertools.pairwise(sorted(versions))
        if not lately.of([schema.dataset_path(successor)])
    }


def _other_files(
    store: Store, versions: Mapping[int, Dataset], spare: Sequence[int], staying: Sequence[Round], stale: _Stale
) -> list[str]:
    """Files that nothing which stays needs, and that were not written lately."""
    marks = [f"{schema.USES_FOLDER}/{name}" for name in storage.list_names(store.path(schema.USES_FOLDER))]
    return stale.of(
        itertools.chain(
            _index_files(versions, spare),
            orphans(store, versions.values(), staying),
            _unused_weights(store, staying),
            marks,
        )
    )


def _remove_file(store: Store, path: str, stale: _Stale) -> bool:
    """Remove a file unless it was written again meanwhile; whether it was removed."""
    if not stale.of([path]):
        return False
    storage.remove(store.path(path))
    return True


def _index_files(versions: Mapping[int, Dataset], spare: Sequence[int]) -> list[str]:
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
    minutes = max(0, int(passed.total_seconds()) // 60)  # clocks may differ
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days"
