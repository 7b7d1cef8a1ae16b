"""`dynams select`: cut a selection from score tables; publish the round."""

from __future__ import annotations

from typing import Annotated

import typer

from dynams_stream.errors import ScoresIncompleteError
from dynams_stream.selection import selected_count
from dynams_stream.store import Store
from dynams_stream.strategy import Strategy
from pipeline.pending import tables_to_cut
from pipeline.select_job import MOST_DISAGREEMENT, SelectResult, select_round
from tools.cluster_options import ClusterOption, SchedulerFileOption, SchedulerOption, scheduler_source
from tools.command import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    JsonOption,
    MaxBadShardsOption,
    MaxErrorsOption,
    StoreOption,
    WorkersOption,
    run,
    show,
)
from tools.round_report import round_summary, told_partial

app = typer.Typer(add_completion=False)

FractionOption = Annotated[
    str, typer.Option("--fraction", help="Part of all samples to select, 0 … 1; the decimal as written counts.")
]
StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="Expression of scores, smallest values selected: distance, abs(margin), -loss, … or random:SEED.",
    ),
]
ClassBalanceOption = Annotated[
    bool, typer.Option("--class-balance", help="Each class gives the same share of its samples.")
]
MinPerClassOption = Annotated[
    int, typer.Option("--min-per-class", min=0, help="Each class gives at least so many of its smallest scores.")
]
ExcludeNoisyOption = Annotated[
    bool,
    typer.Option("--exclude-noisy", help="Leave out samples whose labels cleanlab suspects, by the rounds so far."),
]
MostDisagreementOption = Annotated[
    float,
    typer.Option(
        "--most-disagreement", min=0, max=1, help="Share of selected labels the scorer may contradict unwarned."
    ),
]

SampleWeightOption = Annotated[
    str | None,
    typer.Option("--sample-weight", help="Weight of each selected sample, by its scores: '1 - confidence', say."),
]


@app.command()
def select(
    store: StoreOption,
    fraction: FractionOption,
    strategy: StrategyOption = "distance",
    round: Annotated[
        int | None, typer.Option("--round", min=1, help="Round whose score tables to cut. Default: the newest.")
    ] = None,
    class_balance: ClassBalanceOption = False,
    min_per_class: MinPerClassOption = 0,
    exclude_noisy: ExcludeNoisyOption = False,
    most_disagreement: MostDisagreementOption = MOST_DISAGREEMENT,
    sample_weight: SampleWeightOption = None,
    max_errors: MaxErrorsOption = None,
    max_bad_shards: MaxBadShardsOption = 0,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    cluster: ClusterOption = None,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Select the samples nearest to the decision boundary and publish the round; loaders see it from then on.

    Threads of this machine read the score tables, or tasks of a Dask cluster that is named; the bytes are the same.

    Example: dynams select --store runs/a --fraction 0.3
    """
    source = scheduler_source(scheduler, scheduler_file, cluster)
    if dry_run:
        _tell(Store(store), fraction, Strategy.parse(strategy), round, json)
        return
    result = select_round(
        Store(store), fraction=fraction, strategy=strategy, scores_of=round, workers=workers,
        class_balance=class_balance, min_per_class=min_per_class, exclude_noisy=exclude_noisy,
        most_disagreement=most_disagreement, sample_weight=sample_weight, max_errors=max_errors,
        max_bad_shards=max_bad_shards, scheduler=source,
    )  # fmt: skip
    show(as_dict(result), in_words(result, store), json)


def _tell(store: Store, fraction: str, strategy: Strategy, round: int | None, json: bool) -> None:
    """What would be selected, and from which score tables; or what is to be done before."""
    scored, dataset, source = None, store.dataset(), ""
    if strategy.seed is None:
        try:
            scored, dataset = tables_to_cut(store, round)
            source = f", from the score tables of round {scored}; fewer if fewer have scores"
        except ScoresIncompleteError as error:
            source = f"; not yet: {error}"
    count = selected_count(fraction, dataset.samples)
    words = f"{store.url}: would select {count:,} of {dataset.samples:,} samples by {strategy}{source}"
    found = {"selected": count, "samples": dataset.samples, "strategy": str(strategy), "scores_of": scored}
    show(found, words, json)


def as_dict(result: SelectResult) -> dict[str, object]:
    """The result for `--json`."""
    return {"round": result.round.number, "published": result.published, **round_summary(result.round)}


def in_words(result: SelectResult, store: str) -> str:
    """The result for people."""
    counts, manifest = result.round.counts, result.round.manifest
    verb = "published" if result.published else "was published before, cut from the same scores in the same way"
    lines = [
        f"{store}: round {result.round.number} {verb}",
        f"{counts['selected']:,} of {counts['all']:,} samples (fraction {manifest['fraction']}), {manifest['strategy']}"
        + (f" up to {manifest['threshold']}" if counts["selected"] else ""),
    ]
    if "excluded" in manifest:
        lines.append(f"{manifest['excluded']['samples']:,} samples left out, whose labels are suspected")
    lines += [f"warning: {text}" for text in manifest.get("guards", {}).get("warnings", ())]
    return "\n".join(lines) + told_partial(result.round)


if __name__ == "__main__":
    run(app, name="dynams select")
