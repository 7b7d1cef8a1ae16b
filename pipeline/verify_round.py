"""Checks the files of one published round against what its manifest and its dataset say of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynams_stream import schema, storage
from dynams_stream.cut_part import score_keys
from dynams_stream.dataset import Dataset, Part
from dynams_stream.errors import DynamsError
from dynams_stream.selection import Selection
from dynams_stream.store import Round
from dynams_stream.strategy import Strategy
from pipeline.receipt import BadShard, Receipt

_SELECT_AGAIN = "restore it from a copy, or remove the round's folder and run dynams select again"


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
    """The files of one round; its selection is read once."""

    def __init__(self, published: Round, dataset: Dataset):
        self.round, self.manifest, self.dataset = published, published.manifest, dataset
        self._one_at_a_time = threading.Lock()

    @cached_property
    def selection(self) -> Selection:
        return self.round.selection()

    def selection_file(self) -> list[Problem]:
        """What is wrong with `selection.parquet`."""
        path = schema.selection_path(self.round.number)
        try:
            if storage.file_digest(self.round.store.path(path)) != self.manifest["selection"]["sha256"]:
                return [Problem(path, "not the file that was published: its SHA-256 differs", _SELECT_AGAIN)]
            return [Problem(path, what, _SELECT_AGAIN) for what in self._wrong_with_rows()]
        except Exception as error:  # noqa: BLE001 (of damaged bytes a reader may make anything)
            return [Problem(path, reason_of(error), _SELECT_AGAIN)]

    def _wrong_with_rows(self) -> Iterator[str]:
        selected, there, counts = self.selection.counts, self.dataset.counts, self.round.counts
        if len(selected) != len(there) or (selected > there).any():
            yield "it does not fit the dataset's shards"
        elif any(self.selection.rows(shard)[-1] >= there[shard] for shard in np.flatnonzero(selected).tolist()):
            yield "it has rows that its shards do not have"
        if (self.selection.total, self.dataset.samples) != (counts["selected"], counts["all"]):
            yield f"{self.selection.total} rows of {self.dataset.samples} samples; round.json has {dict(counts)}"

    def score_table(self, part: Part) -> list[Problem]:
        """What is wrong with the score table of a part."""
        number = self.round.number
        path = schema.scores_path(self.manifest["scores_of"] or number, part.number)
        advice = f"restore it from a copy; loaders go on without it, but round {number} cannot be cut again"
        try:
            table = read_checked(self.round.store.path(path))
            schema.require_format(table.schema.metadata, path)
            what = self._wrong_with_table(part, table)
        except Exception as error:  # noqa: BLE001 (of damaged bytes a reader may make anything)
            what = reason_of(error)
        return [] if what is None else [Problem(path, what, advice)]

    def _wrong_with_table(self, part: Part, table: pa.Table) -> str | None:
        counts = self.dataset.counts[part.first_shard : part.first_shard + part.shards]
        shards = np.repeat(np.arange(part.first_shard, part.first_shard + part.shards), counts)
        rows = np.concatenate([np.arange(count) for count in counts.tolist()])
        if not (np.array_equal(table["shard"], shards) and np.array_equal(table["row"], rows)):
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
        if (what := self._wrong_with_bad_shards(part, table, bad)) is not None:
            return what
        if not self._is_exact(part, table):
            return f"round {self.round.number} does not select its smallest values of {self.manifest['strategy']}"
        return None

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

    def _is_exact(self, part: Part, table: pa.Table) -> bool:
        """Whether all samples below the recorded threshold are selected, and none above it.

        True where a table cannot tell: with quotas of classes or excluded samples, or where the selection is damaged.
        """
        if any(self.manifest.get(name) for name in ("class_balance", "min_per_class", "excluded")):
            return True
        counts = self.dataset.counts[part.first_shard : part.first_shard + part.shards].tolist()
        chosen = [np.zeros(count, dtype=bool) for count in counts]
        try:
            with self._one_at_a_time:
                for shard, selected in enumerate(chosen, part.first_shard):
                    selected[self.selection.rows(shard)] = True
        except (DynamsError, IndexError, OSError):
            return True
        selected, threshold = np.concatenate(chosen), self.manifest["threshold"]
        if threshold is None:
            return not selected.any()
        strategy = Strategy.parse(self.manifest["strategy"])
        keys = score_keys(strategy.evaluate({name: table[name].to_numpy() for name in strategy.columns}))
        border = score_keys(np.array([threshold], dtype=np.float32))[0]
        return bool(selected[keys < border].all() and not selected[keys > border].any())


def read_checked(url: str) -> pa.Table:
    """A whole table, with the checksums of its pages compared."""
    with storage.open_random(url) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)


def reason_of(error: Exception) -> str:
    """An error's first line without the file's own name, which is said already."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split(": ", 1)[1] if text.startswith("/") and ": " in text else text
