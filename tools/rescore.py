"""`dynams rescore`: score + select when a new checkpoint appears, or once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import typer

from dynams_stream.errors import DynamsError, UsageError
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Store
from pipeline.rescore import Rescored, model_beside, newest_checkpoint, rescore, watch
from pipeline.rounds import CHECK_SAMPLES, LEAST_OVERLAP
from pipeline.select_job import MOST_DISAGREEMENT
from tools.command import (
    ConfigOption,
    DebugOption,
    JsonOption,
    MaxBadShardsOption,
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
    MaxErrorsOption,
    ModelArgsOption,
    ModelOption,
    OnBusyOption,
    PrecisionOption,
    SchedulerOption,
    TransformOption,
    WidthOption,
    busy_policy,
    scorer_spec,
    scoring_progress,
)
from tools.select_subset import (
    ClassBalanceOption,
    ExcludeNoisyOption,
    FractionOption,
    MinPerClassOption,
    MostDisagreementOption,
    StrategyOption,
    round_summary,
    told_partial,
)

app = typer.Typer(add_completion=False)

ATTEMPTS = 3
"""How often a watched checkpoint is tried before the next one is waited for."""


@app.command(name="rescore")
def rescore_command(
    store: StoreOption,
    model: ModelOption,
    fraction: FractionOption,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="Rescore with this file, once.")] = None,
    watched: Annotated[
        str | None, typer.Option("--watch", help="Folder of checkpoints: a round for each new file, until stopped.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="With --watch: the newest checkpoint now, then exit.")] = False,
    every: Annotated[float, typer.Option("--poll", min=0.1, help="Seconds between looks at --watch.")] = 5.0,
    strategy: StrategyOption = "distance",
    class_balance: ClassBalanceOption = False,
    min_per_class: MinPerClassOption = 0,
    exclude_noisy: ExcludeNoisyOption = False,
    most_disagreement: MostDisagreementOption = MOST_DISAGREEMENT,
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
    scheduler: SchedulerOption = None,
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

    Example: dynams rescore --store runs/a --config run.toml --watch ckpt/
    """
    if fallback is not None and compare_with is None:
        raise UsageError("--fallback needs --compare-with: the model's checkpoint, to compare with and to fall back on")
    spec = scorer_spec(model, model_args, head, width, input, label, transform, batch_size, precision, compile)
    guards = {
        "class_balance": class_balance,
        "min_per_class": min_per_class,
        "exclude_noisy": exclude_noisy,
        "most_disagreement": most_disagreement,
    }
    job = {
        "scheduler": scheduler, "workers": workers, "device": device, "max_errors": max_errors, "guards": guards,
        "max_bad_shards": max_bad_shards,
        "calibration_samples": calibration_samples, "check_samples": check_samples, "least_overlap": least_overlap,
        "fallback": fallback, "on_busy": busy_policy(on_busy),
    }  # fmt: skip
    if (checkpoint is None) == (watched is None):
        raise UsageError("give one of --checkpoint FILE and --watch FOLDER")
    if watched is None or once:
        path = checkpoint if checkpoint is not None else newest_checkpoint(str(watched))
        _report(_rescore(store, spec, path, fraction, strategy, compare_with, job), json)
        return
    _watch(
        watched, every, lambda path: _report(_rescore(store, spec, path, fraction, strategy, compare_with, job), json)
    )


def _watch(folder: str, every: float, work: Callable[[str], None]) -> None:
    """Work on each checkpoint that appears, until stopped."""
    say(f"watching {folder} every {every:g} s; Ctrl-C stops")
    for path in watch(folder, every=every):
        _patiently(work, path, every)


def _patiently(work: Callable[[str], None], path: str, every: float) -> None:
    """A passing fault must not cost a checkpoint its round, nor end the watch: try again, then go on with the next."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            work(path)
        except UsageError:
            raise
        except (DynamsError, OSError) as error:
            say(f"{path}: no round: {error}" + ("; trying again" if attempt < ATTEMPTS else ""))
            time.sleep(every * attempt)
        else:
            return


def _rescore(
    store: str,
    spec: ScorerSpec,
    checkpoint: str,
    fraction: str,
    strategy: str,
    compare_with: str | None,
    job: dict[str, object],
) -> Rescored:
    model = None if compare_with is None else model_beside(checkpoint, compare_with)
    with scoring_progress() as progress:
        return rescore(
            Store(store), spec, checkpoint, fraction=fraction, strategy=strategy, model_checkpoint=model,
            progress=progress, **job,
        )  # fmt: skip


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


if __name__ == "__main__":
    run(app, name="dynams rescore")
