"""Store and Round: what has been indexed and published, and how it gets published.

Readers see published rounds only, and open the files that a manifest names.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset, read_dataset, require_distinct_names
from dynams_stream.errors import (
    NotIndexedError,
    RoundExistsError,
    RoundNotFoundError,
    ShardChangedError,
    StoreError,
    UsageError,
)
from dynams_stream.selection import Selection


class SelectionClaim(IntEnum):
    """Whose a round's selection is; false when it is another one's than was asked for."""

    OTHERS = 0
    THERE = 1
    """The same selection was begun before, by a job that was stopped or is at work."""
    MADE = 2
    """This call has claimed it."""


class Store:
    """A local folder or an object-store prefix that holds index, rounds and manifests.

    Args:
        url: folder or prefix, such as `runs/mnist` or `s3://bucket/run`. It need not exist yet.
        shards_at: where the shards lie on this machine when they have moved: a folder that holds them by base name.
            Copies are checked by size and header instead of modification time.

    A store is a handle: cheap to make, picklable, without open files.
    """

    def __init__(self, url: str | os.PathLike[str], *, shards_at: str | os.PathLike[str] | None = None):
        self.url = storage.absolute(url)
        self.shards_at = None if shards_at is None else storage.absolute(shards_at)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def path(self, relative: str) -> str:
        """The full path or URL of a file of this store."""
        return storage.join(self.url, relative)

    def shard_url(self, url: str) -> str:
        """Where to read the shard that was indexed as `url`."""
        return url if self.shards_at is None else storage.join(self.shards_at, url.rsplit("/", 1)[-1])

    def open_shard(
        self,
        url: str,
        fingerprint: str,
        *,
        open_reader: Callable[[str], storage.LocalReader | storage.RemoteReader] = storage.open_reader,
    ) -> storage.LocalReader | storage.RemoteReader:
        """Open a shard and make sure that it holds the bytes that were indexed.

        Args:
            url: the shard's URL as it was indexed.
            fingerprint: what identified it then.
            open_reader: opens it where it lies now.

        Raises:
            ShardMissingError: when it is not there.
            ShardChangedError: when it is another file than the one that was indexed.
            ShardUnreadableError: when it may not be read.
        """
        place = self.shard_url(url)
        reader = open_reader(place)
        found = storage.fingerprint(reader)
        if not storage.same_bytes(fingerprint, found, moved=self.shards_at is not None):
            reader.close()
            raise ShardChangedError(storage.changed_message(place, fingerprint, found), shard=url)
        return reader

    # ---- dataset -----------------------------------------------------------------------------------------------------

    def dataset_versions(self) -> list[int]:
        """Numbers of the indexed dataset versions, ascending."""
        names = storage.list_names(self.path(schema.DATASET_FOLDER))
        return sorted(int(name[: -len(".parquet")]) for name in names if _is_numbered_table(name))

    def dataset(self, version: int | None = None) -> Dataset:
        """One dataset version, the newest by default.

        Raises:
            NotIndexedError: when the store holds none, or not that one.
        """
        versions = self.dataset_versions()
        if not versions:
            raise NotIndexedError(
                f"{self.url} holds no index; run: dynams index 'shards-{{000000..000099}}.tar' --store {self.url}"
            )
        number = versions[-1] if version is None else version
        if number not in versions:
            raise NotIndexedError(f"{self.url} holds no dataset version {number}; it holds {versions}")
        dataset = read_dataset(self.path(schema.dataset_path(number)), number)
        if self.shards_at is not None:
            require_distinct_names(dataset, self.shards_at)
        return dataset

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def round_numbers(self) -> list[int]:
        """Numbers of all rounds that were begun, published or not, ascending."""
        return sorted(int(name) for name in storage.list_names(self.path(schema.ROUNDS_FOLDER)) if name.isdigit())

    def is_published(self, number: int) -> bool:
        """Whether round `number` has its manifest."""
        return storage.exists(self.path(schema.manifest_path(number)))

    def rounds(self) -> list[Round]:
        """All published rounds, oldest first."""
        found = (self._read_round(number) for number in self.round_numbers())
        return [published for published in found if published is not None]

    def round(self, which: int | str = "latest") -> Round:
        """One published round: its number, or "latest".

        Raises:
            RoundNotFoundError: when it is not published.
        """
        if which == "latest":
            for number in reversed(self.round_numbers()):
                published = self._read_round(number)
                if published is not None:
                    return published
            raise RoundNotFoundError(f"{self.url} holds no published round yet; run: dynams score, then dynams select")
        number = round_number(which)
        published = self._read_round(number)
        if published is None:
            raise RoundNotFoundError(f"{self.url} holds no published round {number}; `dynams status` lists them")
        return published

    def _read_round(self, number: int) -> Round | None:
        url = self.path(schema.manifest_path(number))
        try:
            manifest = json.loads(storage.read_bytes(url))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{url}: not the JSON that publishing writes ({error}); restore it") from error
        if manifest.get("format", schema.FORMAT_VERSION) != schema.FORMAT_VERSION:
            raise StoreError(
                f"{url}: format {manifest['format']}, this version reads {schema.FORMAT_VERSION}; "
                f"use the version of dynams-stream that wrote it"
            )
        return Round(store=self, number=number, manifest=manifest)

    # ---- making a round ----------------------------------------------------------------------------------------------

    def claim_round(self, identity: Mapping[str, Any]) -> int:
        """Take the number of a new round for one job, so that no two jobs ever write into one round's folder.

        Args:
            identity: JSON that says what the round is made of; `claims` gives it back, so that the job run again finds
                its own number.
        """
        lowest = 1
        while True:
            number = max([lowest - 1, *self.round_numbers(), *self.claims(), *self.retired()]) + 1
            if self._claim(schema.claim_path(number), identity):
                return number
            lowest = number + 1  # a network file system may go on listing an old state for a while

    def claims(self, *, but: Collection[int] = ()) -> dict[int, dict[str, Any]]:
        """The identity that each claimed round number was taken with; without those that are retired.

        Args:
            but: numbers that are left out, and not read.
        """
        taken = set(self._numbers(schema.CLAIMS_FOLDER)) - self.retired() - set(but)
        found = {number: self._read_claim(schema.claim_path(number)) for number in taken}
        return {number: claim["of"] for number, claim in sorted(found.items()) if claim is not None}

    def retire(self, number: int) -> None:
        """Settle that round `number` is removed for good, whether or not its files are gone already.

        Nobody goes on with what is left of it, and its number is never taken again.
        """
        if number not in self.retired():
            storage.write_bytes(self.path(schema.retired_path(number)), b"{}\n")

    def unretire(self, number: int) -> None:
        """Take back that round `number` is removed, as long as nothing of it is."""
        storage.remove(self.path(schema.retired_path(number)))

    def require_kept(self, *numbers: int | None) -> None:
        """Make sure that nobody removes these rounds; None stands for none.

        Whoever has claimed a round asks after that: `dynams gc` retires a round first and looks for claims then, so one
        of the two hears of the other.

        Raises:
            RoundNotFoundError: one is removed, or about to be.
        """
        for number in numbers:
            if number is not None and storage.exists(self.path(schema.retired_path(number))):
                raise RoundNotFoundError(
                    f"{self.url}: `dynams gc` removes round {number}, or has removed it; run the same command again, "
                    f"and where it names that round's scores, name another round's or score again"
                )

    def retired(self) -> set[int]:
        """The numbers of the rounds that are removed, or being removed."""
        return set(self._numbers(schema.RETIRED_FOLDER))

    def _numbers(self, folder: str) -> list[int]:
        names = (name.removesuffix(".json") for name in storage.list_names(self.path(folder)) if name.endswith(".json"))
        return [int(name) for name in names if name.isdigit()]

    def claim_selection(self, number: int, intent: Mapping[str, Any]) -> SelectionClaim:
        """Settle what will be selected in round `number`; whether it is what `intent` says.

        The first intent wins, and wins again when its job is run again. As one intent makes one sequence of bytes, no
        job can replace the selection that another one publishes. A job that gets OTHERS claims a round of its own.

        Args:
            intent: JSON with everything that the selection's rows depend on.
        """
        made_by = {"pyarrow": pa.__version__, "numpy": np.__version__}  # they may change the bytes
        mine = json.loads(json.dumps({"intent": intent, "made_by": made_by}))
        path = schema.selection_claim_path(number)
        if self._claim(path, mine):
            return SelectionClaim.MADE
        found = self._read_claim(path)
        return SelectionClaim.THERE if found is not None and found["of"] == mine else SelectionClaim.OTHERS

    def _claim(self, path: str, of: Mapping[str, Any]) -> bool:
        token = uuid.uuid4().hex
        text = json.dumps({"token": token, "of": of}, indent=2, allow_nan=False) + "\n"
        try:
            storage.create(self.path(path), text.encode())
        except FileExistsError:
            found = self._read_claim(path)
            return found is not None and found["token"] == token  # ours when a lost answer made the client ask twice
        return True

    def _read_claim(self, path: str) -> dict[str, Any] | None:
        try:
            claim: dict[str, Any] = json.loads(storage.read_bytes(self.path(path)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self.path(path)}: not the JSON of a claim ({error}); remove it") from error
        return claim

    def publish(
        self, number: int, manifest: Mapping[str, Any], *, still_ours: Callable[[], None] | None = None
    ) -> Round:
        """Publish round `number`: create its `round.json`, after all its other files are written.

        Args:
            number: the round.
            manifest: what `round.json` says.
            still_ours: called right before; raises when another job has taken over.

        Raises:
            RoundExistsError: when another job published this round first; its round stays as it is.
            RoundNotFoundError: when the round is removed meanwhile, or the one whose score tables were cut.
            StoreError: when `selection.parquet` is not the file that the manifest names.
        """
        folder, url = self.path(schema.round_path(number)), self.path(schema.manifest_path(number))
        text = (json.dumps(manifest, indent=2, sort_keys=False, allow_nan=False) + "\n").encode()
        self._require_selection(number, manifest)
        storage.remove_leftovers(self.path(schema.scores_folder(number)))
        storage.remove_leftovers(folder, spare=os.path.basename(url))
        if still_ours is not None:
            still_ours()
        self.require_kept(number, manifest.get("scores_of"))
        try:
            storage.create(url, text)
        except FileNotFoundError:
            if not storage.exists(url):  # else: the job that published it has cleared up behind us
                raise
            raise self._exists(number) from None
        except FileExistsError as error:
            # an object store's client repeats a request whose answer it lost; then the manifest there is ours
            if storage.is_local(url) or storage.read_bytes(url) != text:
                raise self._exists(number) from error
        storage.remove_leftovers(folder)
        return self.round(number)

    def _require_selection(self, number: int, manifest: Mapping[str, Any]) -> None:
        url = self.path(schema.selection_path(number))
        expected = manifest["selection"]["sha256"]
        try:
            found = storage.file_digest(url)
        except FileNotFoundError as error:
            raise StoreError(
                f"{url}: not there, round {number} cannot be published without it; select again"
            ) from error
        if found != expected:
            if self.is_published(number):
                raise self._exists(number)
            raise StoreError(
                f"{url}: not the file that was cut (SHA-256 {found[:12]}, expected {expected[:12]}): "
                f"another job wrote over it; select again"
            )

    def _exists(self, number: int) -> RoundExistsError:
        return RoundExistsError(
            f"{self.url}: round {number} was published by another job; look at it with `dynams status` "
            f"and run this one again for a new round"
        )


_SELECTED_IN_MEMORY = 4_000_000
"""Selected rows, 4 bytes each, that a process keeps in memory; larger selections are read by the shard."""


@dataclass(frozen=True, eq=False)
class Round:
    """A published round: a selection and the score tables it was cut from. It never changes.

    Attributes:
        store: where it lies.
        number: 1, 2, …
        manifest: what `round.json` records.
    """

    store: Store
    number: int
    manifest: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Round({self.number} of {self.store.url!r})"

    @property
    def fraction(self) -> float:
        """The fraction that was asked for."""
        return float(self.manifest["fraction"])

    @property
    def epoch(self) -> int | None:
        """The epoch of the checkpoint that was scored, where known."""
        return self.manifest["epoch"]  # type: ignore[no-any-return]

    @property
    def counts(self) -> Mapping[str, int]:
        """all, scored, failed, selected: numbers of samples."""
        return self.manifest["counts"]  # type: ignore[no-any-return]

    @property
    def scores_of(self) -> int | None:
        """The round whose score tables were cut: this one or an earlier one; None where none were (`random`, `own`)."""
        if not self.manifest["score_parts"]:
            return None
        other: int | None = self.manifest["scores_of"]
        return self.number if other is None else other

    def dataset(self) -> Dataset:
        """The dataset version that this round was made from.

        Raises:
            StoreError: when the store's table of that version is not the one the round was made from.
        """
        recorded = self.manifest["dataset"]
        dataset = self.store.dataset(recorded["version"])
        if dataset.digest != recorded["digest"]:
            raise StoreError(
                f"{self.store.url}: round {self.number} was made from another dataset version {recorded['version']} "
                f"(digest {recorded['digest'][:12]}, the store's is {dataset.digest[:12]}); restore that file"
            )
        return dataset

    def selection(self) -> Selection:
        """The rows to train on, checked against the digests in the manifest; a large one is read by the shard.

        Raises:
            StoreError: when the file is missing, or not the one that was published.
        """
        url = self.store.path(schema.selection_path(self.number))
        recorded = self.manifest["selection"]
        if self.counts["selected"] > _SELECTED_IN_MEMORY:
            per_shard = recorded.get("per_shard")
            counts = None if per_shard is None else np.fromstring(per_shard, dtype=np.int64, sep=" ")
            return Selection.open(url, recorded["sha256"], counts, recorded.get("footer_sha256"))
        selection = Selection.read(url)
        if selection.digest != recorded["sha256"]:
            raise StoreError(
                f"{self.store.url}: round {self.number}'s selection.parquet is not the file that was published "
                f"(SHA-256 {selection.digest[:12]}, recorded {recorded['sha256'][:12]}); restore it, or select again"
            )
        return selection

    def scores(self) -> pyarrow.dataset.Dataset:
        """The score tables as a `pyarrow.dataset.Dataset`, one line per sample, sorted by (shard, row).

        Raises:
            StoreError: when the round was cut without scores (a random selection).
        """
        scored = self.scores_of
        if scored is None:
            raise StoreError(
                f"{self.store.url}: round {self.number} has no score tables (strategy "
                f"{self.manifest['strategy']!r} needs none)"
            )
        paths = [self.store.path(schema.scores_path(scored, part)) for part in self.manifest["score_parts"]]
        if storage.is_local(self.store.url):
            return pyarrow.dataset.dataset(paths, schema=schema.SCORES_SCHEMA, format="parquet")
        system = storage.file_system(self.store.url)
        return pyarrow.dataset.dataset(paths, schema=schema.SCORES_SCHEMA, format="parquet", filesystem=system)


def round_number(which: int | str) -> int:
    """The number that a user's `3`, `"3"` or `"000003"` means."""
    if isinstance(which, bool) or not str(which).isdigit() or int(which) < 1:
        raise UsageError(f'a round is a number from 1 on, or "latest"; got {which!r}')
    return int(which)


def _is_numbered_table(name: str) -> bool:
    return name.endswith(".parquet") and name[: -len(".parquet")].isdigit()
