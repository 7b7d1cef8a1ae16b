"""`dynams index`: list the shards and write the index."""

from __future__ import annotations

from typing import Annotated

import typer

from dynams_stream.errors import UsageError
from dynams_stream.store import Store
from pipeline.energon_job import EnergonReport, write_energon_indexes
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
    from_energon: Annotated[
        bool,
        typer.Option("--from-energon", help="Read each shard in several ranges at once, by the .tar.idx beside it."),
    ] = False,
    to_energon: Annotated[
        bool,
        typer.Option("--to-energon", help="Write Megatron-Energon's .tar.idx beside each shard that lacks its own."),
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

    With --to-energon and without names, the shards are those that the store holds the index of.

    Example: dynams index 'data/train-{000000..000099}.tar' --store runs/a
    """
    target = Store(store)
    if not (shards or refresh or to_energon):
        raise UsageError("name the shards: paths, URLs, 'train-{000000..000099}.tar', globs or @list.txt")
    if from_energon and not (shards or refresh):
        raise UsageError("--from-energon is about shards that are to be indexed; name them, or give --refresh")
    patterns = shards or (remembered_shards(target) if refresh else [])
    urls = expand_shards(patterns) if patterns else target.dataset().urls
    if dry_run:
        steps = [f"index {len(urls):,} shards into {store}"] * bool(patterns)
        steps += [f"write Energon's index beside {len(urls):,} shards"] * to_energon
        show({"shards": len(urls), "store": store}, f"would {', and '.join(steps)}", json)
        return
    found: dict[str, object] = {}
    words: list[str] = []
    if patterns:
        with progress_bar("index", "shards") as report:
            result = build_index(
                target, urls, workers=workers, progress=report, drop_removed=refresh, from_energon=from_energon
            )
        remember_shards(target, patterns)
        found, words = as_dict(result), [in_words(result, store)]
        if from_energon:
            words += how_read(result)
    if to_energon:
        with progress_bar("Energon's index", "shards") as report:
            written = write_energon_indexes(target, workers=workers, progress=report)
        found |= {"dataset": written.dataset, "shards": written.shards, "energon_written": written.written}
        words.append(written_in_words(written))
    show(found, "\n".join(words), json)


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
        "energon_shards": result.energon_shards,
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


def how_read(result: IndexReport) -> list[str]:
    """For people: which of the shards that this run read Energon's index has led through."""
    read = result.shards - result.reused_shards
    if not read:
        return []
    line = f"{read:,} shards were read, {result.energon_shards:,} of them by the .tar.idx beside them"
    return [line if result.energon_shards == read else f"{line}; the others have none"]


def written_in_words(report: EnergonReport) -> str:
    """For people: what became of Energon's indexes."""
    there = f"; beside the other {report.shards - report.written:,} it is already" * (report.written < report.shards)
    return f"Energon's index written beside {report.written:,} of {report.shards:,} shards{there}"


if __name__ == "__main__":
    run(app, name="dynams index")
