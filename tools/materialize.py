"""`dynams materialize`: write the selected samples of a round as ordinary tar shards."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from dynams_stream.store import Store
from pipeline.materialize_job import Materialized, MaterializePlan, materialize, plan_materialize
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


@app.command(name="materialize")
def command(
    store: StoreOption,
    out: Annotated[str, typer.Option("--out", help="A new or empty folder or object-store prefix for the shards.")],
    round: Annotated[str, typer.Option("--round", help="A round's number, or latest.")] = "latest",
    samples_per_shard: Annotated[
        int | None,
        typer.Option("--samples-per-shard", min=1, help="Default: as many as the dataset's shards have on average."),
    ] = None,
    prefix: Annotated[str, typer.Option("--prefix", help="Of the shards' names.")] = "selected",
    unique_keys: Annotated[
        bool, typer.Option("--unique-keys", help="Put each sample's number before its key, which may repeat else.")
    ] = False,
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the selected samples of a round as ordinary WebDataset shards, with a manifest of their hashes.

    Killed or stopped, the same command goes on with the shards that are missing; of a finished folder it mends those
    that are gone or cut. With nothing to do it exits 0 at once.

    Example: dynams materialize --store runs/a --out data/selected
    """
    what: dict[str, Any] = {
        "round": round, "samples_per_shard": samples_per_shard, "prefix": prefix, "unique_keys": unique_keys,
    }  # fmt: skip
    if dry_run:
        plan = plan_materialize(Store(store), out, **what)
        show(asdict(plan), plan_in_words(plan), json)
        return
    with progress_bar("materialize", "samples") as progress:
        made = materialize(Store(store), out, **what, workers=workers, progress=progress)
    show({**asdict(made), "samples": made.samples}, in_words(made), json)


def plan_in_words(plan: MaterializePlan) -> str:
    """What would be done, for people."""
    return (
        f"{plan.folder}: would write {plan.missing:,} of {plan.shards:,} shards, {plan.samples:,} samples of round "
        f"{plan.round} in all, about {plan.bytes / 1e6:,.1f} MB"
    )


def in_words(made: Materialized) -> str:
    """The result for people."""
    size = sum(shard.bytes for shard in made.shards) / 1e6
    done = "written before" if not made.written else f"{made.written:,} of them now"
    return (
        f"{made.folder}: round {made.round}, {made.samples:,} samples in {len(made.shards):,} shards, {size:,.1f} MB, "
        f"{done}"
    )


if __name__ == "__main__":
    run(app, name="dynams materialize")
