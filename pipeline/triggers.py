"""When to start runs of re-scoring: at each new checkpoint, every so often, or on a cron line."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from dynams_stream.errors import MissingExtraError, UsageError
from pipeline.checkpoints import Checkpoint, NewestCheckpoint

if TYPE_CHECKING:
    from apscheduler.triggers.base import BaseTrigger

logger = logging.getLogger(__name__)

Outcome = Literal["done", "busy", "failed"]
"""How a run ended: done or nothing to do; another job held the store; anything else."""
Seen = Callable[[datetime | None], None]
"""Told now and then that the trigger is alive, and when the next run is due, where that is known."""

PAUSES = (60.0, 300.0, 1800.0)
"""Seconds before a watched checkpoint whose run failed is tried again: after the first failure, the second, and each
later one. A passing fault must not cost it its round; a newer checkpoint is taken at once."""
SEEN_SECONDS = 30.0


def watch(
    folder: str,
    run: Callable[[str], Outcome],
    *,
    pattern: str | None = None,
    poll: float = 5.0,
    seen: Seen = lambda due: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run once for the newest checkpoint of a folder, and for each newer one that is complete, until stopped.

    Checkpoints that were overtaken during a run are passed over. While another job holds the store, the newest is tried
    at each look; one that fails is tried again after a while (`PAUSES`).

    Args:
        folder: where the trainer writes.
        run: makes a round from the checkpoint of that path.
        pattern: which names count, as for `pipeline.checkpoints.checkpoints`.
        poll: seconds between looks.
        seen: called at the start and about twice a minute, from another thread.
        sleep, clock: wait, and tell seconds; given by tests.
    """
    looks, failures = _Looks(folder, pattern), _Failures(clock)
    with _heartbeat(seen):
        while True:
            found = looks.newest()
            if found is not None and not failures.is_waiting(found):
                outcome = run(found.url)
                if outcome == "done":
                    looks.done(found)
                elif outcome == "failed":
                    failures.add(found)
            sleep(poll)


@contextmanager
def _heartbeat(seen: Seen) -> Iterator[None]:
    """Tell about twice a minute that a watch is alive, during its runs, too."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(SEEN_SECONDS):
            seen(None)

    seen(None)
    thread = threading.Thread(target=beat, name="dynams-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Looks:
    """Looks at a folder that may not be reachable for a while."""

    def __init__(self, folder: str, pattern: str | None):
        self._folder, self._checkpoints = folder, NewestCheckpoint(folder, pattern)
        self._told = ""

    def newest(self) -> Checkpoint | None:
        """What to run with now, as `NewestCheckpoint.look`; None, with a warning, where the folder cannot be read."""
        try:
            found = self._checkpoints.look()
        except Exception as error:  # noqa: BLE001 (whatever a store's client raises: the next look may be better)
            if str(error) != self._told:
                logger.warning(f"{self._folder} cannot be looked at: {error}; looking again")
                self._told = str(error)
            return None
        self._told = ""
        return found

    def done(self, checkpoint: Checkpoint) -> None:
        """Run with this one, and with those before it, no more."""
        self._checkpoints.done(checkpoint)


class _Failures:
    """When a checkpoint whose runs fail is tried again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._of: tuple[str, str] | None = None
        self._count, self._again = 0, 0.0

    def is_waiting(self, checkpoint: Checkpoint) -> bool:
        """Whether its next try is still to come."""
        return (checkpoint.url, checkpoint.version) == self._of and self._clock() < self._again

    def add(self, checkpoint: Checkpoint) -> None:
        """A run with this one has failed."""
        version = (checkpoint.url, checkpoint.version)
        self._count = self._count + 1 if version == self._of else 1
        pause = PAUSES[min(self._count, len(PAUSES)) - 1]
        self._of, self._again = version, self._clock() + pause
        logger.warning(f"{checkpoint.url}: no round; trying again in {pause:g} s, or with a newer checkpoint")


# ---- by the clock ----------------------------------------------------------------------------------------------------


def run_on_schedule(trigger: BaseTrigger, run: Callable[[], object], *, seen: Seen, at_once: bool) -> None:
    """Run whenever a trigger says so, one run at a time, until stopped or a run raises.

    Times that pass during a run are made up for by one run right after it, and so is a time that the machine slept
    through.

    Args:
        trigger: `every(…)` or `cron(…)`.
        run: makes a round.
        seen: called twice a minute and before and after each run with the next time.
        at_once: whether the first run is due now.
    """
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.schedulers.background import BackgroundScheduler
    from apscheduler.triggers.interval import IntervalTrigger

    # APScheduler drops the times at which its job still runs. So its job only tells that a run is due.
    due = threading.Event()
    scheduler = BackgroundScheduler(timezone=UTC, executors={"default": ThreadPoolExecutor(2)})

    def tell() -> None:
        job = scheduler.get_job("rescore")
        seen(None if job is None else job.next_run_time)

    settings = {"coalesce": True, "misfire_grace_time": None}
    now = {"next_run_time": datetime.now(UTC)}
    scheduler.add_job(due.set, trigger, id="rescore", **settings, **(now if at_once else {}))
    scheduler.add_job(tell, IntervalTrigger(seconds=int(SEEN_SECONDS)), id="seen", **settings, **now)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a sign of life that comes late is no news
    scheduler.start()
    try:
        while True:
            due.wait()
            due.clear()
            tell()
            run()
            tell()
    finally:
        scheduler.shutdown(wait=False)


def every(seconds: float) -> BaseTrigger:
    """Each `seconds` seconds, counted from the start.

    Raises:
        MissingExtraError: APScheduler is not installed.
    """
    require_apscheduler()
    from apscheduler.triggers.interval import IntervalTrigger

    return IntervalTrigger(seconds=seconds, timezone=UTC)


_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def cron(line: str) -> BaseTrigger:
    """A crontab line of five fields, in UTC, as cron reads it.

    APScheduler 3 counts the days of the week from Monday, cron from Sunday (0 and 7): they are handed over by name.
    Where days of the month and of the week are both given, either will do, as in cron.

    Raises:
        UsageError: it is none.
        MissingExtraError: APScheduler is not installed.
    """
    require_apscheduler()
    from apscheduler.triggers.combining import OrTrigger
    from apscheduler.triggers.cron import CronTrigger

    fields = line.split()
    if len(fields) != 5:
        raise UsageError(f"--cron {line!r} has {len(fields)} fields; give minute, hour, day, month and day of the week")
    minute, hour, day, month, weekday = fields

    def trigger(day: str, day_of_week: str) -> BaseTrigger:
        try:
            return CronTrigger(
                minute=minute, hour=hour, day=day, month=month.lower(), day_of_week=day_of_week, timezone=UTC
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"--cron {line!r}: {error}") from error

    days = _days_by_name(weekday, line)
    if day.startswith("*") or weekday.startswith("*"):
        return trigger(day, days)
    return OrTrigger([trigger(day, "*"), trigger("*", days)])


def _days_by_name(field: str, line: str) -> str:
    """cron's days of the week as names: `1-5` is `mon,tue,wed,thu,fri`."""
    if field == "*":
        return field
    found: set[int] = set()
    for piece in field.lower().split(","):
        span, _, step = piece.partition("/")
        first, dash, last = ("0", "-", "6") if span == "*" else span.partition("-")
        try:
            start = _day_number(first)
            stop = _day_number(last) if dash else (6 if step else start)
            by = int(step) if step else 1
        except ValueError:
            raise UsageError(f"--cron {line!r}: {piece!r} is no day of the week; give 0-7 or sun-sat") from None
        if stop < start or by < 1:
            raise UsageError(f"--cron {line!r}: {piece!r} names no day of the week")
        found |= {number % 7 for number in range(start, stop + 1, by)}
    return ",".join(_DAYS[number] for number in sorted(found))


def _day_number(text: str) -> int:
    number = int(text) if text.isdecimal() else _DAYS.index(text)
    if number > 7:
        raise ValueError(text)
    return number


def require_apscheduler() -> None:
    """Refuse schedules where they cannot be kept.

    Raises:
        MissingExtraError: names the extra.
    """
    try:
        import apscheduler  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--every and --cron need APScheduler: pip install 'dynams-stream[schedule]'") from error
