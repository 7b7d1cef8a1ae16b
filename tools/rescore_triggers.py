"""What starts runs of `dynams rescore`: --watch, --every, --cron. Each run is the same command in its own process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import typer

from dynams_stream.errors import UsageError
from dynams_stream.store import Store
from pipeline import triggers
from pipeline.checkpoints import checkpoints
from pipeline.run_process import RunProcess
from pipeline.run_records import TriggerRecord, record_crash
from tools.command import EXIT_BUSY, EXIT_USAGE, same_command, say


@dataclass(frozen=True)
class Trigger:
    """When to run, and on what.

    Attributes:
        place: the checkpoint, or the folder whose newest one is taken.
        when: None for once, now; else "watch", "every" or "cron".
        text: the duration or the cron line.
    """

    place: str
    when: str | None = None
    text: str = ""

    def __str__(self) -> str:
        return f"{self.when} {self.text or self.place}"


def find_trigger(checkpoint: str | None, watch: str | None, once: bool, every: str | None, cron: str | None) -> Trigger:
    """What the flags ask for.

    Raises:
        UsageError: flags that contradict each other, no checkpoint, or no duration or cron line.
        MissingExtraError: APScheduler is needed and missing.
    """
    place = checkpoint if checkpoint is not None else watch
    if place is None or (checkpoint is not None and watch is not None):
        raise UsageError("give one of --checkpoint FILE_OR_FOLDER and --watch FOLDER")
    if every is not None and cron is not None:
        raise UsageError("give one of --every and --cron")
    by_clock = ("every", every) if every is not None else ("cron", cron)
    if once:
        return Trigger(place)
    if by_clock[1] is None:
        return Trigger(place) if watch is None else Trigger(place, "watch")
    if watch is not None:
        raise UsageError(f"--watch runs at each new checkpoint; with --{by_clock[0]} name the folder by --checkpoint")
    trigger = Trigger(place, by_clock[0], by_clock[1])
    _by_clock(trigger)  # before anything is started
    return trigger


def start_runs(context: typer.Context, store: Store, trigger: Trigger, *, poll: float, max_runtime: str | None) -> None:
    """Start runs when the trigger says so, until stopped.

    Raises:
        UsageError: when a run ends with wrong usage: the next ones would, too.
    """
    store.dataset()  # a store without one is told at once, not by each run
    record = TriggerRecord(store, str(trigger), trigger.place)
    most = None if max_runtime is None else seconds_of(max_runtime, "--max-runtime")
    command = [sys.executable, "-m", "tools.rescore", *same_command(context, watch=None, every=None, cron=None)]
    process = RunProcess(command, max_seconds=most)

    def run(place: str) -> triggers.Outcome:
        status = process.run(f"--checkpoint={place}", "--once")
        return "failed" if process.is_stopped else _outcome(store, place, status)

    try:
        if trigger.when == "watch":
            checkpoints(trigger.place)  # a folder that is not there is told before the first wait
            say(f"watching {trigger.place} every {poll:g} s; Ctrl-C stops")
            triggers.watch(trigger.place, run, poll=poll, seen=record.seen)
        else:
            say(f"{trigger} on {trigger.place}; Ctrl-C stops")
            _run_by_clock(trigger, run, record.seen)
    finally:
        process.stop()
        record.ended()


def _run_by_clock(trigger: Trigger, run: Callable[[str], triggers.Outcome], seen: triggers.Seen) -> None:
    triggers.run_on_schedule(_by_clock(trigger), lambda: run(trigger.place), seen=seen, at_once=trigger.when == "every")


def _by_clock(trigger: Trigger) -> triggers.BaseTrigger:
    if trigger.when == "cron":
        return triggers.cron(trigger.text)
    return triggers.every(seconds_of(trigger.text, "--every"))


def _outcome(store: Store, place: str, status: int) -> triggers.Outcome:
    """What a run's exit status means; its own messages were on stderr."""
    if status == 0:
        return "done"
    if status == EXIT_BUSY:
        return "busy"
    if status == EXIT_USAGE:
        raise UsageError("the run ended with wrong usage (above); no later one would do better")
    if status < 0:
        say(f"{place}: the run's process was ended by signal {-status}")
        record_crash(store, place, status)
    return "failed"


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str, option: str) -> float:
    """Seconds of a duration such as 90s, 30m, 6h, 1d or 1h30m.

    Raises:
        UsageError: it is none, or nothing.
    """
    pieces = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in pieces)
    if "".join(number + unit for number, unit in pieces) != text or seconds <= 0:
        raise UsageError(f"{option} {text!r} is no duration; give 90s, 30m, 6h, 1d or 1h30m")
    return seconds
