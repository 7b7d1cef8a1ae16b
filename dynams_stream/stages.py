"""Pipeline stages: which of them hold samples back, and a `batched` that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from webdataset import filters

from dynams_stream.errors import UsageError

_PASSING: Final = tuple(
    getattr(filters, name).f
    for name in (
        *("map", "decode", "xdecode", "to_tuple", "map_tuple", "map_dict", "rename", "rename_keys", "extract_keys"),
        *("select", "rsample", "log_keys", "info", "associate"),
    )
)
"""webdataset's stages that give at most one sample for each that they take, and keep none."""


def holds_back(stage: Any) -> bool:
    """Whether `stage` may have taken samples that it has not given yet: all do that are not known to pass them on."""
    return not isinstance(stage, Batches) and getattr(stage, "f", None) not in _PASSING


def stage_name(stage: Any) -> str:
    """How a user knows the stage: `.shuffle`, or the name of its function or class."""
    name = getattr(getattr(stage, "f", stage), "__name__", type(stage).__name__)
    return f".{name.lstrip('_')}" if hasattr(stage, "f") else name


class Batches:
    """Groups samples into batches as soon as they are complete; webdataset's stage takes one sample more first.

    Args:
        size: samples of a batch.
        collate: makes a batch of a list of samples; None leaves the list.
        partial: whether a shorter last batch is given.
    """

    def __init__(self, size: int, collate: Callable[[list[Any]], Any] | None, partial: bool):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"batches hold 1 sample or more; got {size!r}")
        self.size, self.collate, self.partial = size, collate, partial

    def __call__(self, stream: Iterator[Any]) -> Iterator[Any]:
        batch: list[Any] = []
        for sample in stream:
            batch.append(sample)
            if len(batch) == self.size:
                yield batch if self.collate is None else self.collate(batch)
                batch = []
        if batch and self.partial:
            yield batch if self.collate is None else self.collate(batch)
