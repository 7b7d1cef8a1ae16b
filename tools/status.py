"""`dynams status`: what the store holds, how old the newest round is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from dynams_stream.store import Round, Store
from pipeline.lease import current_holder
from tools.command import ConfigOption, DebugOption, JsonOption, StoreOption, run, show
from tools.select_subset import round_summary

app = typer.Typer(add_completion=False)


@app.command()
def status(
    store: StoreOption,
    last: Annotated[int, typer.Option("--last", min=1, help="How many of the newest rounds to list.")] = 10,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell what is indexed and published, and how old the newest round is.

    Example: dynams status --store runs/a
    """
    target = Store(store)
    dataset = target.dataset()
    rounds = target.rounds()
    unpublished = sorted(set(target.round_numbers()) - {published.number for published in rounds})
    holder = current_holder(target)
    result = {
        "store": target.url,
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
        "unpublished_rounds": unpublished,
        "newest_round_age_seconds": round(age_seconds(rounds[-1]), 1) if rounds else None,
    }
    at_work = [] if holder is None else [f"at work: {holder}"]
    show(result, "\n".join([in_words(result, rounds[-last:]), *at_work]), json)


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
    return "\n".join(lines)


if __name__ == "__main__":
    run(app, name="dynams status")
