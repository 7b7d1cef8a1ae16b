"""A store's state as Prometheus text, for the textfile collector of the node exporter or a push gateway."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dynams_stream.errors import MissingExtraError

_METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dynams_samples": ("Samples of the newest dataset version.", ("dataset", "samples")),
    "dynams_published_rounds": ("Published rounds.", ("published_rounds",)),
    "dynams_newest_round": ("Number of the newest round.", ("newest", "round")),
    "dynams_newest_round_timestamp_seconds": ("When it was published.", ("newest", "ended")),
    "dynams_newest_round_selected_samples": ("Samples it selected.", ("newest", "counts", "selected")),
    "dynams_newest_round_failed_samples": ("Samples it could not rank.", ("newest", "counts", "failed")),
    "dynams_newest_checkpoint_timestamp_seconds": (
        "When the newest checkpoint was written.",
        ("checkpoints", "newest_modified"),
    ),
    "dynams_behind_seconds": (
        "How long ago the checkpoint was written that was dealt with last, where a newer one is there; else 0.",
        ("checkpoints", "behind_seconds"),
    ),
    "dynams_round_behind_seconds": (
        "By how much the newest checkpoint is newer than the one that the newest round was made from.",
        ("checkpoints", "round_behind_seconds"),
    ),
    "dynams_last_run_timestamp_seconds": ("When the last run of dynams rescore ended.", ("last_run", "ended")),
    "dynams_last_run_failures": ("Runs in a row that failed, 0 after a good one.", ("last_run", "failures")),
    "dynams_trigger_seen_timestamp_seconds": ("When what starts runs was last seen.", ("trigger", "seen")),
    "dynams_next_run_timestamp_seconds": ("When the next run is due.", ("trigger", "next_run")),
}
"""Name: help, and where the value is in what `dynams status --json` prints (times become seconds since 1970)."""


def prometheus_text(status: Mapping[str, Any]) -> str:
    """The metrics of a store; those that have no value are left out.

    Args:
        status: what `dynams status --json` prints.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ImportError as error:
        raise MissingExtraError(
            "--prometheus needs prometheus-client: pip install 'dynams-stream[schedule]'"
        ) from error
    registry = CollectorRegistry()
    newest = status["rounds"][-1] if status["rounds"] else None
    values = {name: _value({**status, "newest": newest}, path) for name, (_, path) in _METRICS.items()}
    values["dynams_at_work"] = float(status["at_work"] is not None)
    values["dynams_unpublished_rounds"] = float(len(status["unpublished_rounds"]))
    texts = {name: text for name, (text, _) in _METRICS.items()}
    texts["dynams_at_work"] = "Whether a job holds the store."
    texts["dynams_unpublished_rounds"] = "Rounds that were begun and not published."
    for name, value in values.items():
        if value is not None:
            Gauge(name, texts[name], ["store"], registry=registry).labels(status["store"]).set(value)
    return str(generate_latest(registry).decode())


def _value(status: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    found: Any = status
    for name in path:
        found = None if found is None else found.get(name)
    if isinstance(found, str):
        return datetime.fromisoformat(found).timestamp()
    return None if found is None else float(found)
