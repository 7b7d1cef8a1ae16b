"""Checkpoints as a trainer writes them into a folder: which is the newest that is complete, and of which epoch."""

from __future__ import annotations

import os
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


def require_place(place: str) -> None:
    """Refuse a file that is no checkpoint by its name, before anything is started.

    Raises:
        UsageError: names the endings.
    """
    url = storage.absolute(place)
    if not _is_checkpoint(url) and storage.is_local(url) and os.path.isfile(url):
        raise UsageError(
            f"{place}: a file, but no checkpoint by its name; these end in {', '.join(CHECKPOINT_ENDINGS)}"
        )


def require_folder(place: str) -> None:
    """Refuse a place where nothing can be looked for, before anything waits for checkpoints there.

    Raises:
        UsageError: it is no checkpoint by its name, and no folder that is there.
    """
    require_place(place)
    url = storage.absolute(place)
    if not _is_checkpoint(url) and storage.is_local(url) and not storage.exists(url):
        raise UsageError(f"{place}: no such folder; make it, or name the one the trainer writes to")


def _is_checkpoint(url: str) -> bool:
    return url.endswith(CHECKPOINT_ENDINGS)


def checkpoints(place: str, pattern: str | None = None) -> list[Checkpoint]:
    """The checkpoint files in a folder, oldest first; of a place that is a checkpoint that one, where it is there.

    Args:
        place: a folder, or a file.
        pattern: as for `epoch_of`. What else a trainer writes there (last.pt, an optimiser's state) is left out; where
            no name fits, nothing is, so that the pattern can be complained about.

    Raises:
        CheckpointError: when there is no such folder now.
        UsageError: the place is a file, but no checkpoint by its name; or the pattern has no {epoch}.
    """
    url = storage.absolute(place)
    if _is_checkpoint(url):
        version = storage.version(url)
        return [Checkpoint(url, version, storage.modified(url))] if version else []
    require_place(place)
    if storage.is_local(url) and not storage.exists(url):
        raise CheckpointError(f"{place}: no such folder; is its disk mounted? The trainer's checkpoints are looked for")
    found = [
        Checkpoint(storage.join(url, entry.name), entry.version, entry.modified)
        for entry in storage.list_files(url)
        if _is_checkpoint(entry.name) and entry.name[0] != "."
    ]
    return sorted(found if pattern is None else _fitting(found, pattern), key=lambda one: one.order)


def _fitting(found: list[Checkpoint], pattern: str) -> list[Checkpoint]:
    """Names that begin as the pattern does win over those that have it further on: `{epoch}.pt` is not adam-4.pt."""
    number = epoch_pattern(pattern)
    names = {one.url: one.url.rsplit("/", 1)[-1] for one in found}
    return (
        [one for one in found if number.match(names[one.url])]
        or [one for one in found if number.search(names[one.url])]
        or found
    )


class NewestCheckpoint:
    """The newest complete checkpoint of a folder that was not dealt with yet: those it overtook are passed over.

    A file is complete when it is the same at two looks in a row. Looking works the same on local disks, network file
    systems and object stores; events do not.
    """

    def __init__(self, folder: str, pattern: str | None = None):
        self._folder, self._pattern = folder, pattern
        self._before: dict[str, str] = {}
        self._done: Checkpoint | None = None

    def look(self) -> Checkpoint | None:
        """What to take now; None where nothing is new, or the newest is not complete and no other is new."""
        found = checkpoints(self._folder, self._pattern)
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


def newest_checkpoint(
    place: str,
    pattern: str | None = None,
    *,
    settle: float = 5.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Checkpoint | None:
    """A checkpoint itself, or the newest complete one of a folder; None where there is none yet.

    Args:
        place: a file or a folder.
        pattern: as for `checkpoints`.
        settle: seconds between two looks at a file that was written less than a minute ago.
        sleep: waits; given by tests.

    Raises:
        CheckpointError: there is no such file or folder.
    """
    found = checkpoints(place, pattern)
    if _is_checkpoint(storage.absolute(place)):
        if not found:
            raise CheckpointError(f"{place}: no such checkpoint; see that it is there, or name another")
        return found[0]
    if not found:
        return None
    if time.time() - found[-1].modified > OLD_SECONDS:
        return found[-1]
    looks = NewestCheckpoint(place, pattern)
    looks.look()
    sleep(settle)
    return looks.look()


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
    match = epoch_pattern(pattern).search(storage.absolute(checkpoint).rsplit("/", 1)[-1])
    if match is None:
        raise CheckpointError(f"{checkpoint}: no number in its name as {pattern!r} has it; mend --epoch-from")
    return int(match[1])


def epoch_pattern(pattern: str) -> re.Pattern[str]:
    """The pattern of `epoch_of` as a regular expression whose group is the number.

    Raises:
        UsageError: the pattern has no {epoch}.
    """
    before, found, after = pattern.partition("{epoch}")
    if not found:
        raise UsageError(f"{pattern!r} has no {{epoch}} in it, where a checkpoint's name has its number")
    return re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
