"""`dynams index`: list the shards and write the index."""

from __future__ import annotations

from typing import Annotated

import typer

from dynams_stream.store import Store
from pipeline.index_job import IndexReport, build_index, expand_shards
from tools.command import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    JsonOption,
    StoreOption,
    WorkersOption,
    progress_bar,
    run,
    show,
)

app = typer.Typer(add_completion=False)


@app.command()
def index(
    shards: Annotated[
        list[str], typer.Argument(help="Tar shards: paths, URLs, 'train-{000000..000099}.tar', globs, @list.txt.")
    ],
    store: StoreOption,
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Index tar shards: where every sample's members lie. Reads headers only; runs once for a dataset.

    Example: dynams index 'data/train-{000000..000099}.tar' --store runs/a
    """
    urls = expand_shards(shards)
    if dry_run:
        show({"shards": len(urls), "store": store}, f"would index {len(urls):,} shards into {store}", json)
        return
    with progress_bar("index", "shards") as report:
        result = build_index(Store(store), urls, workers=workers, progress=report)
    show(as_dict(result), in_words(result, store), json)


def as_dict(result: IndexReport) -> dict[str, object]:
    """The report for `--json`."""
    return {
        "dataset": result.dataset.version,
        "parts": len(result.dataset.parts),
        "published": result.published,
        "shards": result.shards,
        "samples": result.samples,
        "repeated_keys": result.repeated_keys,
        "reused_shards": result.reused_shards,
        "seconds": result.seconds,
    }


def in_words(result: IndexReport, store: str) -> str:
    """The report for people."""
    if not result.published:
        return f"{store}: dataset version {result.dataset.version} describes these {result.shards:,} shards already"
    lines = [
        f"{store}: dataset version {result.dataset.version}, {result.samples:,} samples in {result.shards:,} shards, "
        f"{len(result.dataset.parts):,} parts, {result.seconds:.1f} s"
    ]
    if result.repeated_keys:
        lines.append(f"{result.repeated_keys:,} keys come again later in their shard; their samples are kept apart")
    return "\n".join(lines)


if __name__ == "__main__":
    run(app, name="dynams index")
