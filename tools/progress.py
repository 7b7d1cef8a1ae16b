"""How far a command is, on stderr: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from tools.command import say, stderr

LINE_SECONDS = 30.0
"""How often a log gets a line."""

Report = Callable[..., None]


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Report]:
    """Gives `report(done, total, note="", resumed=0)`, where `resumed` of the `done` were there before this run."""
    if not stderr.is_terminal:
        yield line_reporter(label, unit)
        return
    with Progress(*_columns(label, unit), console=stderr, transient=True) as bar:
        task = bar.add_task(label, total=None, note="", resumed=0)

        def report(done: int, total: int, note: str = "", resumed: int = 0) -> None:
            bar.update(task, completed=done, total=total, note=note, resumed=resumed)

        yield report


def _columns(label: str, unit: str) -> tuple[ProgressColumn, ...]:
    return (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        _Left(),
        TextColumn("{task.fields[note]}"),
    )


class _Rate(ProgressColumn):
    """Items a second since the bar began, without what an earlier run had done."""

    def render(self, task: Task) -> Text:
        return Text(_rate(_speed(task)), style="progress.data.speed")


class _Left(ProgressColumn):
    """How long the others will take at that rate. (rich's own forgets what is older than 30 s, as parts may be.)"""

    def render(self, task: Task) -> Text:
        return Text(_left((task.total or 0) - task.completed, _speed(task)) or "-:--:--", style="progress.remaining")


def _speed(task: Task) -> float:
    fresh = task.completed - task.fields.get("resumed", 0)
    return fresh / task.elapsed if task.elapsed else 0.0


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 or rate == 0 else f"{rate:.2g}/s"


def _left(count: float, rate: float) -> str:
    """As 0:01:30; "" where no end is in sight."""
    return str(timedelta(seconds=round(count / rate))) if rate > 0 else ""


def line_reporter(label: str, unit: str, clock: Callable[[], float] = time.monotonic) -> Report:
    """Says every `LINE_SECONDS` how many are done, how many a second, how long the others will take at that rate."""
    began = last = clock()

    def report(done: int, total: int, note: str = "", resumed: int = 0) -> None:
        nonlocal last
        now = clock()
        if now - last < LINE_SECONDS:
            return
        last = now
        rate = (done - resumed) / (now - began)
        left = _left(total - done, rate)
        say(f"{label}: {done:,} of {total:,} {unit}, {_rate(rate)}{f', {left} left' if left else ''} {note}".rstrip())

    return report
