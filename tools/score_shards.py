"""`dynams score`: score tables for one round with a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dynams_stream import storage
from dynams_stream.store import Store
from pipeline.cluster import job_script
from pipeline.receipt import allowed_failures, name_bad_shards
from pipeline.score_job import ScoredRound, ScorePlan, first_extensions, plan_round, score_round
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
    say,
    show,
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
    time_split,
)

app = typer.Typer(add_completion=False)


@app.command()
def score(
    store: StoreOption,
    model: ModelOption,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help=".safetensors or plain state-dict .pt file.")],
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
    epoch: Annotated[int | None, typer.Option("--epoch", help="Recorded with the round.")] = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    cluster: ClusterOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "cpu",
    max_errors: MaxErrorsOption = None,
    max_bad_shards: MaxBadShardsOption = 0,
    on_busy: OnBusyOption = "skip",
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score every sample of the store's dataset with one checkpoint, as one Dask task per part.

    Killed or stopped, the same command goes on with the parts that are missing; finished, it exits 0 at once.

    Example: dynams score --store runs/a --model my_models:resnet18 --checkpoint ckpt/12.safetensors
    """
    target, source = Store(store), scheduler_source(scheduler, scheduler_file, cluster)
    spec = scorer_spec(
        model, model_args, head, width, input, label, transform, batch_size, precision, compile, least_side
    )
    settled = spec.resolved(first_extensions(target, target.dataset()), device)
    if input is None or label is None:
        found = [f"input: {settled.input}"] * (input is None) + [f"label: {settled.label or 'none'}"] * (label is None)
        say(f"{', '.join(found)} (as the first shard shows)")
    if dry_run:
        plan = plan_round(target, settled, storage.absolute(checkpoint), device, max_bad_shards)
        script = job_script(source)
        text = plan_in_words(plan, store) + (f"\nby batch jobs such as this one:\n\n{script}" if script else "")
        show(plan_as_dict(plan) | ({"job_script": script} if script else {}), text, json)
        return
    with scoring_progress() as progress:
        result = score_round(
            target, settled, checkpoint=storage.absolute(checkpoint), epoch=epoch, scheduler=source,
            workers=workers, device=device, max_errors=max_errors, max_bad_shards=max_bad_shards,
            progress=progress, on_busy=busy_policy(on_busy),
        )  # fmt: skip
    show(as_dict(result), in_words(result, store, max_errors), json)


def plan_as_dict(plan: ScorePlan) -> dict[str, object]:
    """What would be done, for `--json`."""
    return {
        "round": plan.number,
        "parts": len(plan.dataset.parts),
        "pending_parts": len(plan.pending),
        "samples": plan.dataset.samples,
        "pending_samples": plan.pending_samples,
        "pending_bytes": plan.pending_bytes,
    }


def plan_in_words(plan: ScorePlan, store: str) -> str:
    """What would be done, for people."""
    where = "a new round" if plan.number is None else f"round {plan.number}"
    return (
        f"{store}: would score {plan.pending_samples:,} of {plan.dataset.samples:,} samples into {where}: "
        f"{len(plan.pending):,} of {len(plan.dataset.parts):,} parts, {plan.pending_bytes / 1e6:,.1f} MB of shards"
    )


def as_dict(result: ScoredRound) -> dict[str, object]:
    """The result for `--json`."""
    return {
        "round": result.number,
        "samples": result.samples,
        "scored": result.samples - result.failed,
        "failed": result.failed,
        "parts": result.parts,
        "resumed_parts": result.resumed_parts,
        "seconds": dict(result.seconds),
        "wall_seconds": result.wall_seconds,
        "errors": list(result.errors),
        "bad_shards": [asdict(bad) for bad in result.bad_shards],
    }


def in_words(result: ScoredRound, store: str, max_errors: int | None = None) -> str:
    """The result for people; `max_errors` is what the command was given."""
    following = "next: dynams select"
    if max_errors is not None and result.failed > allowed_failures(None, result.samples):
        following += f" --max-errors {max_errors}"
    if result.resumed_parts == result.parts and not result.bad_shards:
        return f"{store}: round {result.number} is scored already, {result.samples:,} samples; {following}"
    lines = [
        f"{store}: round {result.number}, {result.samples:,} samples = {result.samples - result.failed:,} scored + "
        f"{result.failed:,} failed, {result.wall_seconds:.1f} s ({time_split(result.seconds)})"
    ]
    if result.resumed_parts:
        lines.append(f"{result.resumed_parts} of {result.parts} parts were done before")
    lines += [f"  {error}" for error in result.errors]
    if not result.bad_shards:
        return "\n".join([*lines, following])
    left_out = f"warning: {len(result.bad_shards)} shards were left out:{name_bad_shards(result.bad_shards)}"
    return "\n".join([*lines, left_out, f"{following} --max-bad-shards {len(result.bad_shards)}"])


if __name__ == "__main__":
    run(app, name="dynams score")
