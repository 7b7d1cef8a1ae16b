"""What a place names: a dataset version and a selection of it, found in a store and read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dynams_stream.dataset import Dataset
from dynams_stream.errors import RoundNotFoundError, StoreError
from dynams_stream.progress import EVERYTHING
from dynams_stream.selection import Selection
from dynams_stream.store import Store


@dataclass(frozen=True, eq=False)
class Content:
    """A dataset version and a selection of it.

    Attributes:
        round: number of the round; `EVERYTHING` for all samples.
        version: number of the dataset version.
        dataset: its shards.
        selection: the selected rows.
    """

    round: int
    version: int
    dataset: Dataset
    selection: Selection

    @property
    def check(self) -> int:
        """A number that stands for the dataset and the selection; equal in all processes that read the same."""
        digest = hashlib.sha256(f"{self.dataset.digest} {self.selection.digest}".encode()).digest()
        return int.from_bytes(digest[:7])


def find_content(store: Store, which: int | str | None) -> tuple[int, int]:
    """The round and the dataset version that `which` means now.

    Args:
        store: where to look.
        which: a round's number, "latest" (everything while there is none), or None for everything.

    Raises:
        RoundNotFoundError, NotIndexedError: when there is none.
    """
    if which is not None:
        try:
            found = store.round(which)
            return found.number, int(found.manifest["dataset"]["version"])
        except RoundNotFoundError:
            if which != "latest":
                raise
    versions = store.dataset_versions()
    return EVERYTHING, versions[-1] if versions else store.dataset().version


def read_content(store: Store, number: int, version: int, known: Content | None = None) -> Content:
    """The dataset and the selection of a round.

    Args:
        store: where they lie.
        number: the round, or `EVERYTHING`.
        version: the dataset version, for everything.
        known: what was read before; its dataset is taken over when it is the same.

    Raises:
        StoreError: when something is missing, damaged, or does not belong together.
    """
    if number == EVERYTHING:
        dataset = known.dataset if known and known.version == version else store.dataset(version)
        return Content(EVERYTHING, version, dataset, Selection.everything(dataset.counts, dataset.digest))
    found = store.round(number)
    recorded = found.manifest["dataset"]
    if known and (known.dataset.version, known.dataset.digest) == (recorded["version"], recorded["digest"]):
        dataset = known.dataset
    else:
        dataset = found.dataset()
    selection = found.selection()
    if len(selection.counts) != len(dataset.counts):
        raise StoreError(
            f"{store.url}: round {number} selects from {len(selection.counts)} shards, dataset version "
            f"{dataset.version} has {len(dataset.counts)}; select again"
        )
    return Content(number, version, dataset, selection)
