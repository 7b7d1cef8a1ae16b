"""`dynams status`: what the store holds, how old the newest round is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from dynams_stream.errors import DynamsError, UsageError
from dynams_stream.store import Round, Store
from pipeline.freshness import freshness
from pipeline.lease import Holder, current_holder
from pipeline.pending import unpublished_rounds
from pipeline.run_records import LastRun, TriggerState, last_run, trigger
from tools.command import ConfigOption, DebugOption, JsonOption, StoreOption, run, say, show
from tools.prometheus import prometheus_text
from tools.round_report import round_summary

app = typer.Typer(add_completion=False)


@app.command()
def status(
    store: StoreOption,
    last: Annotated[int, typer.Option("--last", min=1, help="How many of the newest rounds to list.")] = 10,
    checkpoints: Annotated[
        str | None,
        typer.Option("--checkpoints", help="Folder of checkpoints to compare with. Default: dynams rescore's."),
    ] = None,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="Print metrics as Prometheus text.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell what is indexed and published, how old the newest round is, and how re-scoring is doing.

    Example: dynams status --store runs/a
    """
    if json and prometheus:
        raise UsageError("--json and --prometheus are two forms of the same; give one of them")
    target = Store(store)
    rounds = target.rounds()
    result = as_dict(target, rounds, last, checkpoints)
    if prometheus:
        print(prometheus_text(result), end="", flush=True)
        return
    show(result, in_words(result, rounds[-last:]), json)


def as_dict(store: Store, rounds: list[Round], last: int, place: str | None) -> dict[str, Any]:
    """The state for `--json`."""
    dataset = store.dataset()
    holder, ran, starts = current_holder(store), last_run(store), trigger(store)
    place = place or (None if starts is None else starts.checkpoints)
    return {
        "store": store.url,
        "at_work": None if holder is None else asdict(holder),
        "dataset": {
            "version": dataset.version,
            "shards": len(dataset.urls),
            "samples": dataset.samples,
            "bytes": int(dataset.sizes.sum()),
            "parts": len(dataset.parts),
        },
        "rounds": [{"round": published.number, **round_summary(published)} for published in rounds[-last:]],
        "published_rounds": len(rounds),
        "unpublished_rounds": unpublished_rounds(store, rounds),
        "newest_round_age_seconds": round(age_seconds(rounds[-1]), 1) if rounds else None,
        "checkpoints": None if place is None else _freshness(store, place, ran),
        "last_run": None if ran is None else asdict(ran),
        "trigger": None if starts is None else _alive(starts),
    }


def _alive(starts: TriggerState) -> dict[str, Any]:
    """A trigger without its signs of life where it was stopped in order: nobody should miss them."""
    return asdict(starts) | ({} if starts.ended is None else {"seen": None, "next_run": None})


def _freshness(store: Store, place: str, ran: LastRun | None) -> dict[str, Any] | None:
    try:
        return asdict(freshness(store, place, ran))
    except DynamsError as error:  # the folder went; the rest can be told
        say(f"checkpoints: {error}")
        return None


def age_seconds(published: Round) -> float:
    """Seconds since a round was published."""
    return (datetime.now(UTC) - datetime.fromisoformat(published.manifest["ended"])).total_seconds()


def _partial(manifest: Mapping[str, Any]) -> str:
    left_out = len(manifest.get("bad_shards", ()))
    return f", partial: {left_out} shards left out" if left_out else ""


def in_words(result: dict[str, object], rounds: list[Round]) -> str:
    """The state for people."""
    dataset: dict[str, int] = result["dataset"]  # type: ignore[assignment]
    lines = [
        f"{result['store']}",
        f"dataset version {dataset['version']}: {dataset['samples']:,} samples in {dataset['shards']:,} shards, "
        f"{dataset['bytes'] / 1e6:,.1f} MB, {dataset['parts']:,} parts",
    ]
    if not rounds:
        lines.append("no round is published yet; next: dynams score, then dynams select")
    else:
        lines.append(
            f"{'round':>6} {'epoch':>5} {'selected':>12} {'failed':>7}  {'threshold':>10}  strategy, published"
        )
    for published in rounds:
        manifest, counts = published.manifest, published.counts
        threshold = manifest["threshold"]
        shown = f"{threshold:.5g}" if isinstance(threshold, float) else str(threshold)
        epoch = "" if published.epoch is None else str(published.epoch)
        lines.append(
            f"{published.number:>6} {epoch:>5} {counts['selected']:>12,} {counts['failed']:>7,}  {shown:>10}  "
            f"{manifest['strategy']}, {manifest['ended']}{_partial(manifest)}"
        )
    if result["unpublished_rounds"]:
        lines.append(f"begun, not published: {result['unpublished_rounds']}; run the command that began them again")
    return "\n".join([*lines, *_rescoring_in_words(result)])


def _rescoring_in_words(result: Mapping[str, Any]) -> list[str]:
    """Who is at work, how the last run of `dynams rescore` ended, what starts the next one, and what waits."""
    lines = []
    if result["at_work"]:
        lines.append(f"at work: {Holder(**result['at_work'])}")
    if result["last_run"]:
        lines.append(f"last run: {LastRun(**result['last_run'])}")
    if result["trigger"]:
        lines.append(f"runs start: {TriggerState(**result['trigger'])}")
    if result["checkpoints"]:
        behind = result["checkpoints"]["behind_seconds"]
        state = f"rounds are {timedelta(seconds=round(behind))} behind" if behind else "none waits for its round"
        lines.append(f"checkpoints: {result['checkpoints']['place']}, {state}")
    return lines


if __name__ == "__main__":
    run(app, name="dynams status")
