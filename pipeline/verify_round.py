"""Checks the files of one published round against what its manifest and its dataset say of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset, Part
from dynams_stream.parquet_footer import footer_bytes, read_footer
from dynams_stream.selection import Selection
from dynams_stream.selection_file import read_counts
from dynams_stream.store import Round
from pipeline.receipt import BadShard, Receipt

SELECT_AGAIN = "restore it from a copy, or remove the round's folder and run dynams select again"


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be.

    Attributes:
        path: relative to the store; of a shard, its URL.
        what: is wrong with it.
        advice: what to do.
    """

    path: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.advice}"


class RoundCheck:
    """The files of one round, each by itself."""

    def __init__(self, published: Round, dataset: Dataset):
        self.round, self.manifest, self.dataset = published, published.manifest, dataset

    def selection_file(self) -> list[Problem]:
        """What is wrong with `selection.parquet`."""
        return self._list_of_rows(schema.selection_path(self.round.number), self._wrong_with_selection)

    def excluded_file(self) -> list[Problem]:
        """What is wrong with `excluded.parquet`."""
        return self._list_of_rows(schema.excluded_path(self.round.number), self._wrong_with_excluded)

    def _list_of_rows(self, path: str, wrong: Callable[[str], Iterator[str]]) -> list[Problem]:
        try:
            return [Problem(path, what, SELECT_AGAIN) for what in wrong(self.round.store.path(path))]
        except Exception as error:  # noqa: BLE001 (of damaged bytes a reader may make anything)
            return [Problem(path, reason_of(error), SELECT_AGAIN)]

    def _wrong_with_selection(self, url: str) -> Iterator[str]:
        recorded, counts = self.manifest["selection"], self.round.counts
        if storage.file_digest(url) != recorded["sha256"]:
            yield "not the file that was published: its SHA-256 differs"
            return
        selection = self.round.selection()
        yield from self._wrong_with_rows(selection)
        if (selection.total, self.dataset.samples) != (counts["selected"], counts["all"]):
            yield f"{selection.total} rows of {self.dataset.samples} samples; round.json has {dict(counts)}"
        told = {
            "footer_sha256": sha256(read_footer(url)).hexdigest(),
            "per_shard": " ".join(map(str, read_counts(url).tolist())),
        }
        for name, value in told.items():
            if recorded.get(name, value) != value:  # earlier versions did not record it
                yield f"selection.{name} of round.json is of another file"

    def _wrong_with_excluded(self, url: str) -> Iterator[str]:
        recorded = self.manifest["excluded"]
        found = Selection.read(url)
        if recorded.get("sha256", found.digest) != found.digest:
            yield "not the file that was published: its SHA-256 differs"
            return
        yield from self._wrong_with_rows(found)
        if found.total != recorded["samples"]:
            yield f"it has {found.total} rows; round.json says {recorded['samples']}"

    def _wrong_with_rows(self, selection: Selection) -> Iterator[str]:
        selected, there = selection.counts, self.dataset.counts
        if len(selected) != len(there) or (selected > there).any():
            yield "it does not fit the dataset's shards"
        elif any(selection.rows(shard)[-1] >= there[shard] for shard in np.flatnonzero(selected).tolist()):
            yield "it has rows that its shards do not have"

    def score_table(self, part: Part) -> list[Problem]:
        """What is wrong with the score table of a part."""
        number, scored = self.round.number, self.round.scores_of
        assert scored is not None  # it names the part
        path = schema.scores_path(scored, part.number)
        advice = f"restore it from a copy; loaders go on without it, but round {number} cannot be cut again"
        try:
            data = storage.read_bytes(self.round.store.path(path))
            table = checked_table(data)
            schema.require_format(table.schema.metadata, path)
            what = self._wrong_with_table(part, table) or self._wrong_with_bytes(part, data, table)
        except Exception as error:  # noqa: BLE001 (of damaged bytes a reader may make anything)
            what = reason_of(error)
        return [] if what is None else [Problem(path, what, advice)]

    def _wrong_with_bytes(self, part: Part, data: bytes, table: pa.Table) -> str | None:
        """Whether they are the ones that were scored and cut; earlier versions have not recorded that."""
        end = len(data) - footer_bytes(data)
        wanted = table.schema.metadata.get(schema.DATA_DIGEST_KEY)
        if wanted is not None and sha256(memoryview(data)[:end]).hexdigest() != wanted.decode():
            return "not the table that was scored: its SHA-256 is not the one that it says"
        if (footers := self.manifest.get("score_footers_sha256")) is None:
            return None
        recorded = dict(zip(self.manifest["score_parts"], footers, strict=True))[part.number]
        if sha256(memoryview(data)[end:]).hexdigest() != recorded:
            return "not the table that was cut: its footer has another SHA-256 than round.json says"
        return None

    def _wrong_with_table(self, part: Part, table: pa.Table) -> str | None:
        if not has_lines_of(table, part, self.dataset.counts):
            return f"not one line for each of the part's {part.samples} samples"
        made_from = json.loads(table.schema.metadata.get(schema.IDENTITY_KEY, b"null"))
        if made_from is None or made_from["dataset"]["digest"] != self.dataset.digest:
            return "it was made from another dataset"
        if (made_from["checkpoint"], made_from["scorer"]) != (
            self.manifest["checkpoint"]["sha256"],
            self.manifest["scorer"],
        ):
            return "it was made by another checkpoint or scorer than round.json has"
        bad = Receipt.from_json(table.schema.metadata[schema.RECEIPT_KEY]).bad_shards
        return self._wrong_with_bad_shards(part, table, bad)

    def _wrong_with_bad_shards(self, part: Part, table: pa.Table, bad: Sequence[BadShard]) -> str | None:
        """Whether the part was made without the shards that `round.json` names, and nothing is selected of them."""
        own = range(part.first_shard, part.first_shard + part.shards)
        named = [one for one in self.manifest.get("bad_shards", ()) if one["shard"] in own]
        if [asdict(one) for one in bad] != named:
            return "it was made without other shards than round.json names"
        for one in bad:
            lines = table.filter(pc.equal(table["shard"], one.shard))
            if any(lines[name].null_count < len(lines) for name in schema.SCORE_COLUMNS) or lines["error"].null_count:
                return f"it has scores of shard {one.shard}, which round.json says was left out"
        return None


def checked_table(data: bytes) -> pa.Table:
    """A whole table, with the checksums of its pages compared."""
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)


def has_lines_of(table: pa.Table, part: Part, counts: npt.NDArray[np.int64]) -> bool:
    """Whether a table has one line for each sample of a part, in (shard, row) order.

    Args:
        counts: int64, samples of each of the dataset's shards.
    """
    own = counts[part.first_shard : part.first_shard + part.shards]
    shards = np.repeat(np.arange(part.first_shard, part.first_shard + part.shards), own)
    rows = np.concatenate([np.arange(count) for count in own.tolist()])
    return np.array_equal(table["shard"], shards) and np.array_equal(table["row"], rows)


def reason_of(error: Exception) -> str:
    """An error's first line without the file's own name, which is said already."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split(": ", 1)[1] if text.startswith("/") and ": " in text else text
