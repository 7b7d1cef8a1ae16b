"""Writes the selected samples of a round as ordinary shards: what trains without this library, or moves elsewhere.

round ──samples in (shard, row) order──► runs of `samples_per_shard` ──in parallel──► <prefix>-000000.tar …

A run is one file, written whole or not at all. `plan.json`, created first, says what the folder is made from, so that a
file that is there is done; `manifest.json` comes last, and a file that is not as long as it says is written again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dynams_stream import storage
from dynams_stream.errors import UsageError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.samples import SelectedSamples
from dynams_stream.store import Round, Store
from dynams_stream.version import library_version
from pipeline.cores import available_cores
from pipeline.tar_files import write_tar

FORMAT = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
WEIGHT = "weight"
"""The member that a sample's weight becomes."""
SAMPLES_AT_ONCE = 64
"""Samples that are read together and held in memory, by each worker."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MadeShard:
    """A shard that was written.

    Attributes:
        name: of the file.
        samples, bytes: how many.
        sha256: of its bytes, in hex.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Materialized:
    """What `materialize` made, or found made.

    Attributes:
        folder: where it lies.
        round: the round whose selection it is.
        shards: in order.
        written: how many of them this run wrote.
    """

    folder: str
    round: int
    shards: tuple[MadeShard, ...]
    written: int

    @property
    def samples(self) -> int:
        """How many samples all shards hold."""
        return sum(shard.samples for shard in self.shards)


def materialize(
    store: Store,
    folder: str,
    *,
    round: int | str = "latest",
    samples_per_shard: int | None = None,
    prefix: str = "selected",
    unique_keys: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Materialized:
    """Write the selected samples of a round, their members' bytes as they are; only the shards that are missing.

    Args:
        store: an indexed store.
        folder: an empty or new local folder or object-store prefix, or one that the same call began.
        round: a round's number, or "latest".
        samples_per_shard: of each shard but the last; by default as many as the dataset's shards have on average.
        prefix: of the shards' names.
        unique_keys: put each sample's number in the selection and a slash before its key, as keys may repeat between
            the shards of a dataset.
        workers: shards that are written at once; by default one per core.
        progress: called with the samples that are written and all of them.

    A selection's weights become a member `weight` of each sample, its text.

    Raises:
        RoundNotFoundError: there is no such round.
        UsageError: the folder holds something else, or samples that follow each other have the same key.
        ShardError: a shard of the dataset cannot be read.
    """
    published, place = store.round(round), storage.absolute(folder)
    plan = _plan(published, samples_per_shard, prefix, unique_keys)
    finished = _claim(place, plan)
    runs, there = list(_runs(plan)), _there(place, finished)
    if finished is not None and all(name in there for name, *_ in runs):
        return Materialized(place, published.number, finished, 0)
    samples = SelectedSamples(store, round=published.number)
    write = partial(_write_run, samples, place, plan, there)
    shards, done = [], 0
    for made in ordered_thread_map(workers or available_cores())(write, runs):
        shards.append(made)
        done += made.samples
        if progress is not None:
            progress(done, plan["samples"])
    manifest = {**plan, "shards": [asdict(made) for made in shards], "library": library_version()}
    storage.remove_leftovers(place)
    storage.write_bytes(storage.join(place, MANIFEST), (json.dumps(manifest, indent=2) + "\n").encode())
    return Materialized(place, published.number, tuple(shards), sum(name not in there for name, *_ in runs))


@dataclass(frozen=True)
class MaterializePlan:
    """What `materialize` would do.

    Attributes:
        folder: where.
        round: whose selection.
        samples, shards: that it holds and makes.
        missing: how many of the shards are not there.
        bytes: about what all of them take, by the mean size of a sample.
    """

    folder: str
    round: int
    samples: int
    shards: int
    missing: int
    bytes: int


def plan_materialize(
    store: Store,
    folder: str,
    *,
    round: int | str = "latest",
    samples_per_shard: int | None = None,
    prefix: str = "selected",
    unique_keys: bool = False,
) -> MaterializePlan:
    """What `materialize` would do, with the same arguments and errors; writes nothing."""
    published, place = store.round(round), storage.absolute(folder)
    plan, dataset = _plan(published, samples_per_shard, prefix, unique_keys), published.dataset()
    names, there = [name for name, *_ in _runs(plan)], set(storage.list_names(place))
    of_all = plan["samples"] / max(1, dataset.samples)
    missing = sum(name not in there for name in names)
    return MaterializePlan(
        place, published.number, plan["samples"], len(names), missing, int(dataset.sizes.sum() * of_all)
    )


def _plan(published: Round, samples_per_shard: int | None, prefix: str, unique_keys: bool) -> dict[str, Any]:
    """What decides each byte of the shards."""
    dataset = published.dataset()
    if samples_per_shard is None:
        samples_per_shard = max(1, -(-dataset.samples // len(dataset.urls)))
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}; 1 or more is needed")
    if not prefix or "/" in prefix:
        raise UsageError(f"the prefix of the shards' names must be a part of a file name; got {prefix!r}")
    return {
        "format": FORMAT,
        "round": published.number,
        "dataset": dataset.digest,
        "selection": published.manifest["selection"]["sha256"],
        "samples": published.counts["selected"],
        "samples_per_shard": samples_per_shard,
        "prefix": prefix,
        "unique_keys": unique_keys,
    }


def _claim(place: str, plan: dict[str, Any]) -> tuple[MadeShard, ...] | None:
    """Make the folder this plan's, or find it so; its shards when all are made.

    Raises:
        UsageError: it holds something else.
    """
    url, text = storage.join(place, PLAN), (json.dumps(plan, indent=2) + "\n").encode()
    names = storage.list_names(place)
    if PLAN not in names and any(not name.startswith(".") for name in names):
        raise UsageError(f"{place} holds other files ({names[0]}, …); name an empty folder, or a new one")
    try:
        storage.create(url, text)
    except FileExistsError:
        if (found := storage.read_bytes(url)) != text:
            raise UsageError(
                f"{place} is made from something else ({_difference(found, plan)}); name another folder, or empty it"
            ) from None
    try:
        manifest = json.loads(storage.read_bytes(storage.join(place, MANIFEST)))
        return tuple(MadeShard(**shard) for shard in manifest["shards"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # one that is damaged is written again
        return None


def _there(place: str, finished: Sequence[MadeShard] | None) -> dict[str, MadeShard | None]:
    """The files that need not be written, and what a manifest says of them."""
    sizes = {file.name: file.size for file in storage.list_files(place)}
    if finished is None:
        return dict.fromkeys(sizes)
    return {shard.name: shard for shard in finished if sizes.get(shard.name) == shard.bytes}


def _difference(found: bytes, plan: dict[str, Any]) -> str:
    try:
        other = json.loads(found)
        return ", ".join(
            f"{name} {other.get(name)!r}, not {plan[name]!r}" for name in plan if other.get(name) != plan[name]
        )
    except ValueError:
        return f"its {PLAN} cannot be read"


def _runs(plan: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """File name, first sample and stop of each shard."""
    size, total = plan["samples_per_shard"], plan["samples"]
    for number, first in enumerate(range(0, total, size)):
        yield f"{plan['prefix']}-{number:06d}.tar", first, min(total, first + size)


def _write_run(
    samples: SelectedSamples,
    place: str,
    plan: dict[str, Any],
    there: Mapping[str, MadeShard | None],
    run: tuple[str, int, int],
) -> MadeShard:
    name, first, stop = run
    url = storage.join(place, name)
    if (known := there.get(name)) is not None:
        return known
    if name in there:
        reader = storage.open_reader(url)
        reader.close()
        return MadeShard(name, stop - first, reader.size, storage.file_digest(url))
    size, digest = write_tar(url, _members(samples, first, stop, plan["unique_keys"]))
    return MadeShard(name, stop - first, size, digest)


def _members(samples: SelectedSamples, first: int, stop: int, unique_keys: bool) -> Iterator[dict[str, Any]]:
    """Key and members of some samples, a few of them in memory.

    Raises:
        UsageError: two in a row have the same key, or one has a member where its weight would go.
    """
    previous = None
    for start in range(first, stop, SAMPLES_AT_ONCE):
        for place, sample in enumerate(samples.__getitems__(range(start, min(stop, start + SAMPLES_AT_ONCE))), start):
            key, weight = sample["__key__"], sample.get("__weight__")
            where = f"{sample['__url__']}, row {sample['__row__']}, key {key!r}"
            if weight is not None:
                if WEIGHT in sample:
                    raise UsageError(f"{where}: it has a member {WEIGHT!r} of its own, where its weight would go")
                sample[WEIGHT] = repr(float(weight)).encode()
            if unique_keys:
                sample["__key__"] = f"{place:012d}/{key}"
            elif key == previous:
                raise UsageError(
                    f"{where}: the sample before it has the same key, they would be read back as one; ask for unique "
                    f"keys (--unique-keys)"
                )
            previous = key
            yield sample
