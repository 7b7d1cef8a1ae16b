"""Checkpoints as a trainer writes them into a folder: which is the newest that is complete, and of which epoch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from dynams_stream import storage
from dynams_stream.errors import CheckpointError, UsageError

CHECKPOINT_ENDINGS = (".safetensors", ".pt", ".pth")
OLD_SECONDS = 60.0
"""A file that was last written so long ago needs no second look to be taken for complete."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file at one look.

    Attributes:
        url: its path or URL.
        version: changes whenever it is written.
        modified: when it was last written, in seconds since 1970.
    """

    url: str
    version: str
    modified: float

    @property
    def order(self) -> tuple[float, list[object]]:
        """Oldest first; of files of one time by the numbers in their names, so that 10.pt follows 9.pt."""
        name = self.url.rsplit("/", 1)[-1]
        return self.modified, [(0, int(text), "") if text.isdecimal() else (1, 0, text) for text in _pieces(name)]


def _pieces(name: str) -> list[str]:
    return [text for text in re.split(r"(\d+)", name) if text]


def checkpoints(folder: str) -> list[Checkpoint]:
    """The checkpoint files in a folder, oldest first.

    Raises:
        UsageError: when there is no such folder.
    """
    place = storage.absolute(folder)
    if storage.is_local(place) and not storage.exists(place):
        raise UsageError(f"{folder}: no such folder; make it, or name the one the trainer writes to")
    found = [
        Checkpoint(storage.join(place, entry.name), entry.version, entry.modified)
        for entry in storage.list_files(place)
        if entry.name.endswith(CHECKPOINT_ENDINGS) and entry.name[0] != "."
    ]
    return sorted(found, key=lambda one: one.order)


class NewestCheckpoint:
    """The newest complete checkpoint of a folder that was not dealt with yet: those it overtook are passed over.

    A file is complete when it is the same at two looks in a row. Looking works the same on local disks, network file
    systems and object stores; events do not.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._before: dict[str, str] = {}
        self._done: Checkpoint | None = None

    def look(self) -> Checkpoint | None:
        """What to take now; None where nothing is new, or the newest is not complete and no other is new."""
        found = checkpoints(self._folder)
        complete = [one for one in found if self._before.get(one.url) == one.version]
        self._before = {one.url: one.version for one in found}
        if not complete or self._is_past(complete[-1]):
            return None
        return complete[-1]

    def done(self, checkpoint: Checkpoint) -> None:
        """Deal with this one no more, nor with any older one."""
        self._done = checkpoint

    def _is_past(self, found: Checkpoint) -> bool:
        last = self._done
        if last is None:
            return False
        return found.order < last.order or (found.url, found.version) == (last.url, last.version)


def newest_checkpoint(place: str, *, settle: float = 5.0, sleep: Callable[[float], None] = time.sleep) -> str:
    """A checkpoint itself, or the newest complete one of a folder.

    Args:
        place: a file or a folder.
        settle: seconds between two looks at a file that was written less than a minute ago.
        sleep: waits; given by tests.

    Raises:
        CheckpointError: when there is none in the folder, or none that is complete.
    """
    if place.endswith(CHECKPOINT_ENDINGS):
        return storage.absolute(place)
    found = checkpoints(place)
    if not found:
        raise CheckpointError(f"{place}: no checkpoint yet ({', '.join(CHECKPOINT_ENDINGS)})")
    if time.time() - found[-1].modified > OLD_SECONDS:
        return found[-1].url
    looks = NewestCheckpoint(place)
    looks.look()
    sleep(settle)
    complete = looks.look()
    if complete is None:
        raise CheckpointError(f"{place}: no checkpoint is complete yet; {found[-1].url} is still being written")
    return complete.url


def epoch_of(checkpoint: str, pattern: str | None = None) -> int | None:
    """The epoch after which a checkpoint was saved, as its metadata or its name tells.

    Args:
        checkpoint: path or URL.
        pattern: what precedes and follows the number in the file's name, such as `model-{epoch}.`; wins over metadata.

    Raises:
        UsageError: the pattern has no {epoch}.
        CheckpointError: the name does not fit the pattern.
    """
    if pattern is None:
        from dynams_stream.checkpoint import checkpoint_epoch  # loads torch, which `dynams status` can do without

        return checkpoint_epoch(checkpoint)
    before, found, after = pattern.partition("{epoch}")
    if not found:
        raise UsageError(f"{pattern!r} has no {{epoch}} in it, where a checkpoint's name has its number")
    name = storage.absolute(checkpoint).rsplit("/", 1)[-1]
    match = re.search(re.escape(before) + r"(\d+)" + re.escape(after), name)
    if match is None:
        raise CheckpointError(f"{checkpoint}: no number in its name as {pattern!r} has it; mend --epoch-from")
    return int(match[1])
