"""`dynams gc`: remove old rounds, and files that nothing names any more."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

import typer

from dynams_stream.store import Store
from pipeline.gc_job import UNUSED_FOR, Garbage, collect_garbage, find_garbage
from tools.command import ConfigOption, DebugOption, DryRunOption, JsonOption, StoreOption, run, show

app = typer.Typer(add_completion=False)


@app.command()
def gc(
    store: StoreOption,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many of the newest rounds stay in any case.")],
    unused_days: Annotated[
        float,
        typer.Option(
            "--unused-days",
            min=0,
            help="Rounds stay that a loader read, or a state named, within so long: 0.084 or more.",
        ),
    ] = UNUSED_FOR / timedelta(days=1),
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove old rounds, and the dataset versions, weights and other files that only they needed.

    A round that a running epoch or a saved loader state may need stays: loaders leave marks in the store.

    Example: dynams gc --store runs/a --keep 5 --dry-run
    """
    target = Store(store)
    target.dataset()  # where there is none, nothing is written either
    look = find_garbage if dry_run else collect_garbage
    found = look(target, keep=keep, unused_for=timedelta(days=unused_days))
    show({"removed": not dry_run, **asdict(found)}, in_words(found, store, dry_run), json)


def in_words(found: Garbage, store: str, dry_run: bool) -> str:
    """The result for people."""
    verb = "would remove" if dry_run else "removed"
    lines = [
        f"{store}: {verb} {len(found.rounds)} rounds, {len(found.abandoned)} that were never published, "
        f"{len(found.versions)} dataset versions, {len(found.files)} other files"
    ]
    for name, numbers in (("rounds", found.rounds), ("never published", found.abandoned), ("versions", found.versions)):
        if numbers:
            lines.append(f"  {name}: {', '.join(map(str, numbers))}")
    lines += [f"  stays: round {kept.number}, {kept.why}" for kept in found.kept]
    return "\n".join(lines)


if __name__ == "__main__":
    run(app, name="dynams gc")
