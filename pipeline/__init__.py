"""Dask jobs: index, score, select, publish, rescore. `run_round` is the one function behind all of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.dynamic_selection import DynamicSelection
    from pipeline.rounds import run_round

_MODULES = {"DynamicSelection": "dynamic_selection", "run_round": "rounds"}

__all__ = ["DynamicSelection", "run_round"]


def __getattr__(name: str) -> Any:
    # Imported when used: the commands that need no Dask start at once.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
