"""Dask jobs: index, score, select, publish, rescore. `run_round` is the one function behind all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.rounds import run_round

__all__ = ["run_round"]


def __getattr__(name: str) -> Any:
    # Imported when used: the commands that need no Dask start at once.
    if name != "run_round":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.rounds import run_round

    return run_round
