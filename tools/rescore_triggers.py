"""What starts runs of `dynams rescore`: --watch, --every, --cron. Each run is the same command in its own process."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from dynams_stream.errors import UsageError
from dynams_stream.store import Store
from pipeline import triggers
from pipeline.checkpoints import CHECKPOINT_ENDINGS, require_folder
from pipeline.lease import OnBusy, current_holder
from pipeline.own_python import own_command, own_environment
from pipeline.run_process import Ended, run_process
from pipeline.run_records import TriggerRecord, record_failure
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


def start_runs(
    context: typer.Context,
    store: Store,
    trigger: Trigger,
    *,
    poll: float,
    max_runtime: str | None,
    epoch_from: str | None,
    on_busy: OnBusy,
) -> None:
    """Start runs when the trigger says so, until stopped.

    Raises:
        UsageError: the very first run ends with wrong usage: the next ones would, too.
    """
    store.dataset()  # a store without one is told at once, not by each run
    require_folder(trigger.place)  # and so is a folder that is not there
    record = TriggerRecord(store, str(trigger), trigger.place)
    is_watch = trigger.when == "watch"
    # A watch waits for another job itself, and takes what is the newest then.
    waits = on_busy == "wait" and not is_watch
    changes = {"on_busy": "wait" if waits else "skip", "max_runtime": None}
    arguments = same_command(context, watch=None, every=None, cron=None, **changes)
    run = Runs(store, arguments, waits=waits, max_runtime=max_runtime)
    try:
        if is_watch:
            say(f"watching {trigger.place} every {poll:g} s; Ctrl-C stops")
            triggers.watch(trigger.place, run, pattern=epoch_from, poll=poll, seen=record.seen)
        else:
            say(f"{trigger} on {trigger.place}; Ctrl-C stops")
            at_once = trigger.when == "every"
            triggers.run_on_schedule(_by_clock(trigger), lambda: run(trigger.place), seen=record.seen, at_once=at_once)
    finally:
        record.ended()


def _by_clock(trigger: Trigger) -> triggers.BaseTrigger:
    if trigger.when == "cron":
        return triggers.cron(trigger.text)
    return triggers.every(seconds_of(trigger.text, "--every"))


class Runs:
    """Starts the runs of a trigger, each in its own process, and tells what became of them.

    Args:
        store: which the runs work on.
        arguments: of a run's command, but for its checkpoint.
        waits: whether a run waits for another job, rather than not being started.
        max_runtime: after which a run is stopped, as `--max-runtime` has it.
    """

    def __init__(self, store: Store, arguments: Sequence[str], *, waits: bool, max_runtime: str | None):
        self._store, self._waits, self._max_runtime = store, waits, max_runtime
        self._max_seconds = None if max_runtime is None else seconds_of(max_runtime, "--max-runtime")
        self._command = own_command("tools.rescore", *arguments)
        self._is_first = True
        self._busy_with: int | None = None

    def __call__(self, place: str) -> triggers.Outcome:
        """Run with the checkpoint or the folder of that path.

        Raises:
            UsageError: the very first run ended with wrong usage.
        """
        if not self._waits and self._is_busy():
            return "busy"
        command = [*self._command, f"--checkpoint={place}", "--once"]
        try:
            ended = run_process(command, max_seconds=self._max_seconds, environment=own_environment())
        except OSError as error:  # no memory for another process, perhaps
            return self._failed(place, f"its process could not be started: {error}")
        is_first, self._is_first = self._is_first, False
        if ended.status == EXIT_USAGE and is_first:
            raise UsageError("the run ended with wrong usage (above); no later one would do better")
        return self._outcome(place, ended)

    def _is_busy(self) -> bool:
        """Whether another job holds the store; told once of each."""
        try:
            holder = current_holder(self._store)
        except Exception:  # noqa: BLE001 (whatever a store's client raises: the run tells and records it)
            return False
        if holder is not None and holder.number != self._busy_with:
            say(f"{self._store.url} is busy: {holder}; no run is started")
        self._busy_with = None if holder is None else holder.number
        return holder is not None

    def _outcome(self, place: str, ended: Ended) -> triggers.Outcome:
        """What a run's end means; its own messages were on stderr, and mostly it has recorded how it ended."""
        if ended.status == 0:
            return "done"
        if ended.too_long:
            return self._failed(place, f"lasted longer than --max-runtime {self._max_runtime}, and was stopped")
        if ended.status == EXIT_BUSY:
            return "busy"
        if ended.status < 0:
            number = -ended.status
            return self._failed(place, f"its process was ended by signal {number} ({signal.Signals(number).name})")
        return "failed"

    def _failed(self, place: str, error: str) -> triggers.Outcome:
        say(f"{place}: the run failed: {error}")
        record_failure(self._store, place if place.endswith(CHECKPOINT_ENDINGS) else None, error)
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
