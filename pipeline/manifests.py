"""What `round.json` records of a selection and of the score tables it was cut from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from dynams_stream import schema
from dynams_stream.cut import CutResult
from dynams_stream.dataset import Dataset
from dynams_stream.version import library_version
from pipeline.pending import FinishedPart
from pipeline.receipt import bad_shards, total_seconds


def round_manifest(
    dataset: Dataset,
    number: int,
    scored: int | None,
    parts: Mapping[int, FinishedPart],
    result: CutResult,
    started: str,
) -> dict[str, Any]:
    """What `round.json` records."""
    first = parts[min(parts)] if parts else None
    provenance: Mapping[str, Any] = first.receipt.provenance if first else {}
    left_out = bad_shards(part.receipt for part in parts.values())
    return {
        "format": schema.FORMAT_VERSION,
        "round": number,
        "status": "partial" if left_out else "complete",
        "bad_shards": [asdict(bad) for bad in left_out],
        "dataset": {"version": dataset.version, "digest": dataset.digest},
        "checkpoint": {"path": provenance["checkpoint"], "sha256": first.identity["checkpoint"]} if first else None,
        "epoch": provenance.get("epoch"),
        "scorer": first.identity["scorer"] if first else None,
        **result.for_manifest(),
        "scores_of": None if scored in (None, number) else scored,
        "score_parts": sorted(parts),
        "score_footers_sha256": [parts[number].footer_sha256 for number in sorted(parts)],
        "library": library_version(),
        "started": provenance.get("started", started),
        "ended": now(),
        "seconds": {
            name: round(seconds, 3) for name, seconds in total_seconds(part.receipt for part in parts.values()).items()
        },
    }


def now() -> str:
    """The time in UTC, as manifests record it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
