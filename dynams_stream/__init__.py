"""DynaMS stream: train on the part of a huge WebDataset that matters now.

The names below are the public ones; everything else may change. They are imported when they are first used, so that
commands which need no torch start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynams_stream.proxy import ParameterSharingProxy, joint_loss
    from dynams_stream.remote_options import RemoteOptions
    from dynams_stream.sample_cache import SampleCache
    from dynams_stream.samples import SelectedSamples
    from dynams_stream.schedule import (
        ConstantSchedule,
        CosineSchedule,
        ExponentialSchedule,
        LinearSchedule,
        PowerSchedule,
        StepSchedule,
    )
    from dynams_stream.scorer import ScorerSpec
    from dynams_stream.selection import Selection
    from dynams_stream.store import Round, Store
    from dynams_stream.stream import SelectedDataset

_MODULES = {
    "ConstantSchedule": "schedule",
    "CosineSchedule": "schedule",
    "ExponentialSchedule": "schedule",
    "LinearSchedule": "schedule",
    "ParameterSharingProxy": "proxy",
    "PowerSchedule": "schedule",
    "RemoteOptions": "remote_options",
    "Round": "store",
    "SampleCache": "sample_cache",
    "ScorerSpec": "scorer",
    "SelectedDataset": "stream",
    "SelectedSamples": "samples",
    "Selection": "selection",
    "StepSchedule": "schedule",
    "Store": "store",
    "joint_loss": "proxy",
}

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "ExponentialSchedule",
    "LinearSchedule",
    "ParameterSharingProxy",
    "PowerSchedule",
    "RemoteOptions",
    "Round",
    "SampleCache",
    "ScorerSpec",
    "SelectedDataset",
    "SelectedSamples",
    "Selection",
    "StepSchedule",
    "Store",
    "joint_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
