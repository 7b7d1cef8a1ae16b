"""Files of a store that nothing names."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence

from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset
from dynams_stream.store import Round, Store

WRITING_SECONDS = 3600.0
"""A temporary file that was written to so lately may be another job's, about to be given its name."""

_CONTROL = {
    schema.CLAIMS_FOLDER: r"\d+(-selection)?\.json",
    schema.WEIGHTS_FOLDER: r"[^.].*\.safetensors",
    schema.INDEXING_FOLDER: r"[^.].*\.parquet",
    schema.CALLS_FOLDER: r"[^.].*\.json",
    schema.USES_FOLDER: r"\d+-\d+-.+\.json",
    schema.LEASE_FOLDER: r"\d+\.json",
    schema.RETIRED_FOLDER: r"\d+\.json",
    schema.LAST_RUN_FILE.rpartition("/")[0]: "|".join(
        re.escape(path.rpartition("/")[2]) for path in (schema.LAST_RUN_FILE, schema.TRIGGER_FILE)
    ),
}
"""What the names in the folders of `control/` look like; jobs come and go, no manifest lists what they leave."""


def orphans(store: Store, datasets: Iterable[Dataset], rounds: Sequence[Round]) -> Iterator[str]:
    """Files in the folders of datasets, index and published rounds that no manifest names, relative to the store."""
    indexes = {part.index_file for dataset in datasets for part in dataset.parts}
    for name in storage.list_names(store.path(schema.INDEX_FOLDER)):
        if (path := f"{schema.INDEX_FOLDER}/{name}") not in indexes:
            yield path
    for name in storage.list_names(store.path(schema.DATASET_FOLDER)):
        if not (name.endswith(".parquet") and name.removesuffix(".parquet").isdigit()):
            yield f"{schema.DATASET_FOLDER}/{name}"
    used = {
        schema.scores_path(published.scores_of, part)
        for published in rounds
        if published.scores_of is not None
        for part in published.manifest["score_parts"]
    }
    for published in rounds:
        number = published.number
        named = {schema.manifest_path(number), schema.selection_path(number), schema.scores_folder(number)}
        if published.manifest.get("excluded"):
            named.add(schema.excluded_path(number))
        for folder, known in ((schema.round_path(number), named), (schema.scores_folder(number), used)):
            for name in storage.list_names(store.path(folder)):
                if (path := f"{folder}/{name}") not in known:
                    yield path


def strangers(store: Store, datasets: Iterable[Dataset]) -> Iterator[str]:
    """What lies where no job puts it: beside the store's folders, in `rounds/` or `control/`; relative to the store.

    They may be anybody's, so nothing removes them. Shards that lie in the store's folder are none.
    """
    top = {path.partition("/")[0] for path in (schema.DATASET_FOLDER, schema.INDEX_FOLDER, schema.ROUNDS_FOLDER)}
    control = schema.SHARDS_FILE.partition("/")[0]
    shards = {
        url.removeprefix(f"{store.url}/").partition("/")[0]
        for dataset in datasets
        for url in dataset.urls
        if url.startswith(f"{store.url}/")
    }
    expected = {
        "": "|".join(map(re.escape, {*top, control, *shards, *(f"{name}.idx" for name in shards)})),
        schema.ROUNDS_FOLDER: r"\d+",
        control: "|".join(re.escape(path.split("/")[1]) for path in (*_CONTROL, schema.SHARDS_FILE)),
        **_CONTROL,
    }
    for folder, pattern in expected.items():
        known = re.compile(pattern)
        for name in storage.list_names(store.path(folder) if folder else store.url):
            if not known.fullmatch(name):
                yield storage.join(folder, name) if folder else name


def is_being_written(store: Store, path: str) -> bool:
    """Whether a file has a temporary name and was written to lately."""
    name = path.rpartition("/")[2]
    if not (name.startswith(".") and name.endswith(".tmp")):
        return False
    return time.time() - storage.modified(store.path(path)) < WRITING_SECONDS
