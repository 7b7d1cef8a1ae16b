"""The store's layout: the only place that spells its paths, columns and format versions.

    <store>/
      dataset/000001.parquet              one line per shard
      index/part-000000-<digest>.parquet  one line per sample: key and members
      rounds/000001/
        scores/part-000000.parquet        one line per sample: the scores of one forward pass
        selection.parquet                 one line per shard: the rows to train on
        round.json                        written last; the round exists from then on
      control/                            claims of round numbers, saved weights, unfinished indexing, loaders' marks

Paths built here are relative to the store, with `/` as separator.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from dynams_stream.errors import StoreError

FORMAT_VERSION = 1
FORMAT_KEY = b"dynams_format"
"""Parquet metadata key of the format version, in every table."""
IDENTITY_KEY = b"dynams_identity"
"""Parquet metadata key of a score part's identity: JSON that says what made it."""
RECEIPT_KEY = b"dynams_receipt"
"""Parquet metadata key of a score part's receipt: JSON with its counts and seconds."""
DATA_DIGEST_KEY = b"dynams_data_sha256"
"""Parquet metadata key of a score part's SHA-256, in hex, of all bytes of the file before its footer."""
SHARDS_KEY = b"dynams_shards"
"""Parquet metadata key of a member index's shards, those without samples included: JSON [first, count]."""
INDEXED_KEY = b"dynams_indexed"
"""Parquet metadata key of unfinished indexing: JSON list of [url, fingerprint, bytes, samples] of its shards."""
GROUPS_KEY = b"dynams_row_groups"
"""Parquet metadata key of how a member index is cut: JSON [lines of a row group, [lines of each shard]]."""
REPEATED_KEY = b"dynams_repeated_keys"
"""Parquet metadata key of a dataset's number of samples whose key another sample of their shard had before."""

DATASET_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("samples", pa.int64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("index_file", pa.string(), nullable=False),
    ],
    metadata={FORMAT_KEY: str(FORMAT_VERSION)},
)

MEMBER_TYPE = pa.struct(
    [
        pa.field("ext", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("members", pa.list_(pa.field("element", MEMBER_TYPE, nullable=False)), nullable=False),
    ],
    metadata={FORMAT_KEY: str(FORMAT_VERSION)},
)

SCORE_COLUMNS = ("distance", "margin", "loss", "el2n", "entropy", "confidence")
"""The float32 columns of a score table, in order; all come from one forward pass."""

SCORES_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("predicted", pa.int32()),
        pa.field("runner_up", pa.int32()),
        *[pa.field(name, pa.float32()) for name in SCORE_COLUMNS],
        pa.field("error", pa.string()),
    ],
    metadata={FORMAT_KEY: str(FORMAT_VERSION)},
)

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("rows", pa.list_(pa.field("element", pa.uint32(), nullable=False)), nullable=False),
        pa.field("weights", pa.list_(pa.field("element", pa.float32(), nullable=False))),
    ],
    metadata={FORMAT_KEY: str(FORMAT_VERSION)},
)

COLUMN_ENCODING = {
    "shard": "DELTA_BINARY_PACKED",
    "row": "DELTA_BINARY_PACKED",
    "key": "DELTA_BYTE_ARRAY",
    "rows.list.element": "DELTA_BINARY_PACKED",
    "members.list.element.offset": "DELTA_BINARY_PACKED",
    "members.list.element.size": "DELTA_BINARY_PACKED",
    **dict.fromkeys(SCORE_COLUMNS, "BYTE_STREAM_SPLIT"),
}
"""Encodings that halve the tables against Parquet's defaults (10 MB against 20 MB for 10⁶ scored samples)."""

ROW_GROUP_ROWS = 131_072
"""Lines of a row group at most. A shard starts a new one, so that reading one shard reads little more than it."""
INDEX_GROUP_ROWS = 1024
"""Lines of a member index's row group: what a loader holds of each lane. Smaller ones take longer to read, and room."""
SELECTION_GROUP_ROWS = 65_536
"""Selected rows of a selection's row group, about: what a loader decodes to get the rows of one shard."""

DATASET_FOLDER = "dataset"
INDEX_FOLDER = "index"
ROUNDS_FOLDER = "rounds"
CLAIMS_FOLDER = "control/claims"
SHARDS_FILE = "control/shards.json"
"""How the shards were named when they were indexed last: JSON list of patterns."""
WEIGHTS_FOLDER = "control/weights"
INDEXING_FOLDER = "control/indexing"
CALLS_FOLDER = "control/calls"
USES_FOLDER = "control/uses"
LEASE_FOLDER = "control/lease"
RETIRED_FOLDER = "control/retired"
LAST_RUN_FILE = "control/rescore/last_run.json"
"""How the last run of `dynams rescore` ended."""
TRIGGER_FILE = "control/rescore/trigger.json"
"""What starts runs of `dynams rescore`, and when it was last seen."""


def number_name(number: int) -> str:
    """The name of dataset version or round `number`: six digits at least."""
    return f"{number:06d}"


def dataset_path(version: int) -> str:
    """Path of the table of shards of dataset `version` (1, 2, …)."""
    return f"{DATASET_FOLDER}/{number_name(version)}.parquet"


def index_path(part: int, digest: str) -> str:
    """Path of the member index of `part`; `digest` names its content, so that versions can share files."""
    return f"{INDEX_FOLDER}/part-{part:06d}-{digest}.parquet"


def round_path(number: int) -> str:
    """Folder of round `number` (1, 2, …)."""
    return f"{ROUNDS_FOLDER}/{number_name(number)}"


def indexing_path(digest: str) -> str:
    """Path of the index of some shards while a dataset is being indexed; `digest` names the shards and their bytes."""
    return f"{INDEXING_FOLDER}/{digest}.parquet"


def scores_folder(number: int) -> str:
    """Folder of the score tables of round `number`."""
    return f"{round_path(number)}/scores"


def scores_path(number: int, part: int) -> str:
    """Path of the score table of `part` in round `number`."""
    return f"{scores_folder(number)}/part-{part:06d}.parquet"


def selection_path(number: int) -> str:
    """Path of the selection of round `number`."""
    return f"{round_path(number)}/selection.parquet"


def excluded_path(number: int) -> str:
    """The rows that were excluded before the cut of round `number`, in the form of a selection."""
    return f"{round_path(number)}/excluded.parquet"


def manifest_path(number: int) -> str:
    """Path of the manifest whose appearance publishes round `number`."""
    return f"{round_path(number)}/round.json"


def claim_path(number: int) -> str:
    """Path of the file whose creation gives the number of a round to one job."""
    return f"{CLAIMS_FOLDER}/{number_name(number)}.json"


def selection_claim_path(number: int) -> str:
    """Path of the file whose creation settles which selection will be written into round `number`."""
    return f"{CLAIMS_FOLDER}/{number_name(number)}-selection.json"


def use_path(number: int, version: int, loader: str) -> str:
    """Path of a loader's mark that it reads round `number`, or everything (0), of dataset `version`."""
    return f"{USES_FOLDER}/{number_name(number)}-{number_name(version)}-{loader}.json"


def lease_path(number: int) -> str:
    """Path of the lease of that number: the highest one is in force."""
    return f"{LEASE_FOLDER}/{number_name(number)}.json"


def retired_path(number: int) -> str:
    """Path of the file that tells that round `number` is removed, or being removed, for good."""
    return f"{RETIRED_FOLDER}/{number_name(number)}.json"


def encodings(schema: pa.Schema) -> dict[str, str]:
    """The entries of `COLUMN_ENCODING` that apply to `schema`, as `pyarrow.parquet.ParquetWriter` takes them."""
    return {column: code for column, code in COLUMN_ENCODING.items() if column.split(".")[0] in schema.names}


def require_format(metadata: Mapping[bytes, bytes] | None, url: str) -> None:
    """Refuse a table that a newer or foreign program wrote.

    Raises:
        StoreError: names the file and the format found.
    """
    found = (metadata or {}).get(FORMAT_KEY)
    if found != str(FORMAT_VERSION).encode():
        raise StoreError(
            f"{url}: format {found.decode() if found else 'unknown'}, this version reads {FORMAT_VERSION}; "
            f"use the version of dynams-stream that wrote it"
        )
