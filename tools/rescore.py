"""`dynams rescore`: score + select with the newest checkpoint: once, at each new one, every so often, or by cron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from dynams_stream.errors import UsageError
from dynams_stream.schedule import Schedule, make_schedule
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Store
from pipeline.checkpoints import (
    CHECKPOINT_ENDINGS,
    Checkpoint,
    epoch_of,
    epoch_pattern,
    newest_checkpoint,
    require_place,
)
from pipeline.lease import store_lease
from pipeline.rescore import Due, Rescored, due_round, model_beside, rescore
from pipeline.rounds import CHECK_SAMPLES, LEAST_OVERLAP
from pipeline.run_records import recorded_run
from pipeline.select_job import MOST_DISAGREEMENT
from tools.cluster_options import ClusterOption, SchedulerFileOption, SchedulerOption, scheduler_source
from tools.command import (
    ConfigOption,
    DebugOption,
    JsonOption,
    MaxBadShardsOption,
    MaxErrorsOption,
    StoreOption,
    WorkersOption,
    run,
    show,
)
from tools.rescore_triggers import find_trigger, start_runs
from tools.round_report import round_summary, told_partial
from tools.schedule_options import (
    ANNEAL,
    INTERVAL,
    WARMUP,
    AnnealOption,
    BudgetOption,
    FinalOption,
    IntervalOption,
    StepsOption,
    WarmupFractionOption,
    WarmupOption,
)
from tools.scoring_options import (
    BatchSizeOption,
    CompileOption,
    DeviceOption,
    HeadOption,
    InputOption,
    LabelOption,
    LeastSideOption,
    ModelArgsOption,
    ModelOption,
    OnBusyOption,
    PrecisionOption,
    TransformOption,
    WidthOption,
    busy_policy,
    scorer_spec,
    scoring_progress,
)
from tools.select_subset import (
    ClassBalanceOption,
    ExcludeNoisyOption,
    MinPerClassOption,
    MostDisagreementOption,
    SampleWeightOption,
    StrategyOption,
)

app = typer.Typer(add_completion=False)


@app.command(name="rescore")
def rescore_command(
    context: typer.Context,
    store: StoreOption,
    model: ModelOption,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="A file, or a folder: the newest complete one in it.")
    ] = None,
    watch: Annotated[
        str | None, typer.Option("--watch", help="Folder of checkpoints: a round for each newer one, until stopped.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="The newest checkpoint now, then exit.")] = False,
    every: Annotated[
        str | None, typer.Option("--every", help="A run now and each 30m (or 90s, 6h, 1d), until stopped.")
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option("--cron", help="Runs at a crontab line's times in UTC, as '0 */6 * * *', until stopped."),
    ] = None,
    poll: Annotated[float, typer.Option("--poll", min=0.1, help="Seconds between looks at a folder.")] = 5.0,
    max_runtime: Annotated[
        str | None,
        typer.Option("--max-runtime", help="With --watch, --every, --cron: stop a run that lasts longer, such as 6h."),
    ] = None,
    fraction: Annotated[
        str | None, typer.Option("--fraction", help="Selected part of all samples, 0.3 say; or give --schedule.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="Fractions by the checkpoint's epoch: power, linear, … (--epochs).")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Epochs of the training run.")] = None,
    final: FinalOption = None,
    budget: BudgetOption = None,
    warmup: WarmupOption = WARMUP,
    warmup_fraction: WarmupFractionOption = 1.0,
    anneal: AnnealOption = ANNEAL,
    interval: IntervalOption = INTERVAL,
    steps: StepsOption = None,
    epoch_from: Annotated[
        str | None,
        typer.Option(
            "--epoch-from",
            help="Where a checkpoint's name has its epoch: 'model-{epoch}.'; no others are taken. Default: metadata.",
        ),
    ] = None,
    strategy: StrategyOption = "distance",
    class_balance: ClassBalanceOption = False,
    min_per_class: MinPerClassOption = 0,
    exclude_noisy: ExcludeNoisyOption = False,
    most_disagreement: MostDisagreementOption = MOST_DISAGREEMENT,
    sample_weight: SampleWeightOption = None,
    compare_with: Annotated[
        str | None,
        typer.Option(
            "--compare-with",
            help="The model's checkpoint beside each proxy's, such as 'full/{name}.pt': tells how alike they select.",
        ),
    ] = None,
    calibration_samples: Annotated[
        int,
        typer.Option("--calibration-samples", min=0, help="Samples to re-estimate batch normalisation from first."),
    ] = 0,
    check_samples: Annotated[
        int, typer.Option("--check-samples", min=1, help="How many samples to compare on.")
    ] = CHECK_SAMPLES,
    least_overlap: Annotated[
        float, typer.Option("--least-overlap", min=0, max=1, help="Of the two selections, below which to warn.")
    ] = LEAST_OVERLAP,
    fallback: Annotated[
        str | None, typer.Option("--fallback", help='"full" then scores everything with the model.')
    ] = None,
    input: InputOption = None,
    label: LabelOption = None,
    transform: TransformOption = None,
    width: WidthOption = 1.0,
    head: HeadOption = None,
    model_args: ModelArgsOption = "{}",
    batch_size: BatchSizeOption = 256,
    precision: PrecisionOption = "auto",
    compile: CompileOption = False,
    least_side: LeastSideOption = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    cluster: ClusterOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "cpu",
    max_errors: MaxErrorsOption = None,
    max_bad_shards: MaxBadShardsOption = 0,
    on_busy: OnBusyOption = "skip",
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a round from a new checkpoint: score, select, publish. Running loaders take it up at their next set_epoch.

    A checkpoint that has its round already is left alone: nothing to do exits 0 at once (3 while another job works).
    With --watch, --every or --cron each run is a process of its own, so that a crash ends nothing but itself.

    Example: dynams rescore --store runs/a --config run.toml --watch ckpt/
    """
    if fallback is not None and compare_with is None:
        raise UsageError("--fallback needs --compare-with: the model's checkpoint, to compare with and to fall back on")
    fractions = _fractions(
        fraction, schedule, epochs, warmup=warmup, warmup_fraction=warmup_fraction, anneal=anneal, interval=interval,
        final=final, budget=budget, steps=steps,
    )  # fmt: skip
    spec = scorer_spec(
        model, model_args, head, width, input, label, transform, batch_size, precision, compile, least_side
    )
    busy, source = busy_policy(on_busy), scheduler_source(scheduler, scheduler_file, cluster)
    target = Store(store)
    trigger = find_trigger(checkpoint, watch, once, every, cron)
    require_place(trigger.place)
    if epoch_from is not None:
        epoch_pattern(epoch_from)  # a wrong one is refused before anything is started
    if trigger.when is not None:
        start_runs(context, target, trigger, poll=poll, max_runtime=max_runtime, epoch_from=epoch_from, on_busy=busy)
        return
    if max_runtime is not None:
        raise UsageError(
            "--max-runtime is for runs that --watch, --every or --cron start; use timeout(1) for a single one"
        )
    choices = {
        "class_balance": class_balance,
        "min_per_class": min_per_class,
        "exclude_noisy": exclude_noisy,
        "most_disagreement": most_disagreement,
        "sample_weight": sample_weight,
    }
    job = {
        "strategy": strategy, "scheduler": source, "workers": workers, "device": device, "max_errors": max_errors,
        "max_bad_shards": max_bad_shards, "choices": choices, "calibration_samples": calibration_samples,
        "check_samples": check_samples, "least_overlap": least_overlap, "fallback": fallback, "on_busy": busy,
    }  # fmt: skip
    target.dataset()  # where there is none, nothing is written either
    # The lease comes first: what is the newest checkpoint, and what is due, may change while another job is waited for.
    with recorded_run(target, epoch_from) as record, store_lease(target, "round", on_busy=busy):
        record.checkpoint = found = newest_checkpoint(trigger.place, epoch_from, settle=poll)
        epoch = None if found is None else epoch_of(found.url, epoch_from)
        due = _due(target, fractions, trigger.place, found, epoch)
        if found is None or due.fraction is None:
            record.ended("not due")
            _report_not_due(None if found is None else found.url, due, json)
            return
        result = _rescore(target, spec, found.url, due.fraction, epoch, compare_with, job)
        record.ended("published" if result.published else "up to date", round=result.round.number)
    _report(result, json)


def _fractions(
    fraction: str | None, schedule: str | None, epochs: int | None, *, steps: int | None, **arguments: Any
) -> str | Schedule:
    """One fraction for all rounds, or a schedule of them."""
    if (fraction is None) == (schedule is None):
        raise UsageError("give one of --fraction 0.3, and --schedule power with --epochs and --final (or --budget)")
    if schedule is None:
        return str(fraction)
    if epochs is None:
        raise UsageError(f"--schedule {schedule} needs --epochs: how many the training run has")
    return make_schedule(schedule, steps=steps, epochs=epochs, **arguments)


def _due(store: Store, fractions: str | Schedule, place: str, found: Checkpoint | None, epoch: int | None) -> Due:
    if found is None:
        return Due(None, f"no complete checkpoint yet in {place} ({', '.join(CHECKPOINT_ENDINGS)})")
    return due_round(store, fractions, found.url, epoch) if isinstance(fractions, Schedule) else Due(fractions)


def _rescore(
    store: Store,
    spec: ScorerSpec,
    checkpoint: str,
    fraction: float | str,
    epoch: int | None,
    compare_with: str | None,
    job: Mapping[str, Any],
) -> Rescored:
    model = None if compare_with is None else model_beside(checkpoint, compare_with)
    with scoring_progress() as progress:
        return rescore(
            store, spec, checkpoint, fraction=fraction, epoch=epoch, model_checkpoint=model, progress=progress, **job
        )


def _report(result: Rescored, as_json: bool) -> None:
    published = result.round
    counts = published.counts
    words = "published" if result.published else "up to date"
    show(
        {
            "checkpoint": result.checkpoint,
            "round": published.number,
            "published": result.published,
            **round_summary(published),
        },
        f"round {published.number} {words}: {counts['selected']:,} of {counts['all']:,} samples, "
        f"checkpoint {result.checkpoint}{told_partial(published)}",
        as_json,
    )


def _report_not_due(checkpoint: str | None, due: Due, as_json: bool) -> None:
    of = "" if checkpoint is None else f"; checkpoint {checkpoint}"
    show(
        {"checkpoint": checkpoint, "round": None, "published": False, "reason": due.reason},
        f"no round is due: {due.reason}{of}",
        as_json,
    )


if __name__ == "__main__":
    run(app, name="dynams rescore")
