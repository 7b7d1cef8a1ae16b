"""What commands tell of a round that they have published or found."""

from __future__ import annotations

from dynams_stream.store import Round
from pipeline.receipt import BadShard, name_bad_shards


def round_summary(published: Round) -> dict[str, object]:
    """What `select`, `rescore` and `status` tell of a round."""
    manifest = published.manifest
    names = ("status", "epoch", "strategy", "fraction", "threshold", "counts", "scores_of", "ended")
    return {name: manifest[name] for name in names} | {
        name: manifest.get(name) for name in ("bad_shards", "guards", "faithfulness", "sample_weight")
    }


def told_partial(published: Round) -> str:
    """The warning for people, on a line of its own, when a round lacks shards; nothing else."""
    left_out = [BadShard(**bad) for bad in published.manifest.get("bad_shards", ())]
    if not left_out:
        return ""
    return f"\nwarning: the round is partial: {len(left_out)} shards were left out:{name_bad_shards(left_out)}"
