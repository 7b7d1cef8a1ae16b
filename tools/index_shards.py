"""`dynams index`: list the shards and write the index."""

from __future__ import annotations

from typing import Annotated

import typer

from dynams_stream.errors import UsageError
from dynams_stream.store import Store
from pipeline.index_job import IndexReport, build_index
from pipeline.shard_list import expand_shards, remember_shards, remembered_shards
from tools.command import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    JsonOption,
    StoreOption,
    WorkersOption,
    run,
    show,
)
from tools.progress import progress_bar

app = typer.Typer(add_completion=False)


@app.command()
def index(
    store: StoreOption,
    shards: Annotated[
        list[str] | None,
        typer.Argument(help="Tar shards: paths, URLs, 'train-{000000..000099}.tar', globs, @list.txt."),
    ] = None,
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="Take in new, changed and removed shards; named as last time unless given."),
    ] = False,
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Index tar shards: where every sample's members lie. Reads headers only; runs once for a dataset.

    When shards have come, changed or gone, --refresh publishes another version of the dataset, and reads only the new
    and changed ones. Rounds of the old version stay as they are.

    Example: dynams index 'data/train-{000000..000099}.tar' --store runs/a
    """
    target = Store(store)
    if not shards and not refresh:
        raise UsageError("name the shards: paths, URLs, 'train-{000000..000099}.tar', globs or @list.txt")
    patterns = shards or remembered_shards(target)
    urls = expand_shards(patterns)
    if dry_run:
        show({"shards": len(urls), "store": store}, f"would index {len(urls):,} shards into {store}", json)
        return
    with progress_bar("index", "shards") as report:
        result = build_index(target, urls, workers=workers, progress=report, drop_removed=refresh)
    remember_shards(target, patterns)
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
        "new_shards": result.new_shards,
        "changed_shards": result.changed_shards,
        "removed_shards": result.removed_shards,
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
    if result.dataset.version > 1:
        lines.append(
            f"{result.new_shards:,} shards are new, {result.changed_shards:,} changed, {result.removed_shards:,} gone "
            f"since version {result.dataset.version - 1}; score and select again for a round of this one"
        )
    if result.repeated_keys:
        lines.append(f"{result.repeated_keys:,} keys come again later in their shard; their samples are kept apart")
    return "\n".join(lines)


if __name__ == "__main__":
    run(app, name="dynams index")
