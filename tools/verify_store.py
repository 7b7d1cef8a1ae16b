"""`dynams verify`: check every file of a store against its manifests."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dynams_stream.store import Store
from pipeline.verify_job import Verification, verify_store
from tools.command import (
    EXIT_FAILED,
    ConfigOption,
    DebugOption,
    JsonOption,
    StoreOption,
    WorkersOption,
    run,
    show,
)
from tools.progress import progress_bar

app = typer.Typer(add_completion=False)

LISTED = 50
"""Problems and orphans that are printed; --json has all."""


@app.command()
def verify(
    store: StoreOption,
    shards: Annotated[bool, typer.Option("--shards", help="Also look whether the shards are those indexed.")] = False,
    workers: WorkersOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read every file that the store's manifests name, and compare: hashes, counts, what made it; make each cut again.

    Changes nothing. Exits 1 when a file is not what it should be; files that nothing names are told, and are no fault.

    Example: dynams verify --store runs/a --shards
    """
    with progress_bar("verify", "files") as progress:
        found = verify_store(Store(store), shards=shards, workers=workers, progress=progress)
    result = {
        "files": found.files,
        "problems": [asdict(problem) for problem in found.problems],
        "orphans": list(found.orphans),
        "unfinished_rounds": list(found.unfinished),
        "rounds_without_hashes": list(found.without_hashes),
    }
    show(result, in_words(found, store), json)
    if found.problems:
        raise typer.Exit(EXIT_FAILED)


def in_words(found: Verification, store: str) -> str:
    """The result for people."""
    lines = [f"{store}: {found.files:,} files checked, {len(found.problems):,} with problems"]
    lines += _some([str(problem) for problem in found.problems])
    if found.orphans:
        lines.append(
            f"{len(found.orphans):,} files that nothing names (dynams gc removes those in dataset/, index/, rounds/N/):"
        )
        lines += _some(list(found.orphans))
    if found.unfinished:
        lines.append(f"begun, not published: rounds {', '.join(map(str, found.unfinished))}")
    if found.without_hashes:
        lines.append(
            f"from before score tables had hashes: rounds {', '.join(map(str, found.without_hashes))}; of these the "
            f"pages' checksums and the cut were compared"
        )
    return "\n".join(lines)


def _some(texts: list[str]) -> list[str]:
    rest = [f"  … and {len(texts) - LISTED:,} more"] if len(texts) > LISTED else []
    return [*(f"  {text}" for text in texts[:LISTED]), *rest]


if __name__ == "__main__":
    run(app, name="dynams verify")
