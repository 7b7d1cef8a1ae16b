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

ATTEMPTS = 3
"""How often a watched checkpoint is tried before a newer one is waited for."""
SEEN_SECONDS = 30.0


def watch(
    folder: str,
    run: Callable[[str], Outcome],
    *,
    poll: float = 5.0,
    seen: Seen = lambda due: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Run once for the newest checkpoint of a folder, and for each newer one that is complete, until stopped.

    Checkpoints that were overtaken during a run are passed over. While another job holds the store, the newest is tried
    at each look; one that fails is tried three times, since a passing fault must not cost it its round.

    Args:
        folder: where the trainer writes.
        run: makes a round from the checkpoint of that path.
        poll: seconds between looks.
        seen: called at the start and about twice a minute, from another thread.
        sleep: waits; given by tests.
    """
    looks, failures = _Looks(folder), _Failures()
    with _heartbeat(seen):
        while True:
            pause = 1
            found = looks.newest()
            if found is not None:
                outcome = run(found.url)
                pause = failures.after(found, outcome)
                if outcome == "done" or (outcome == "failed" and pause == 0):
                    looks.done(found)
            sleep(poll * max(1, pause))


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

    def __init__(self, folder: str):
        self._folder, self._checkpoints = folder, NewestCheckpoint(folder)
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
    """Counts how often one version of a checkpoint failed in a row."""

    def __init__(self) -> None:
        self._of: tuple[str, str] | None = None
        self._count = 0

    def after(self, checkpoint: Checkpoint, outcome: Outcome) -> int:
        """How many looks to let pass before the next try; 0 when it was tried often enough."""
        if outcome != "failed":
            return 1
        version = (checkpoint.url, checkpoint.version)
        self._count = self._count + 1 if version == self._of else 1
        self._of = version
        if self._count < ATTEMPTS:
            logger.warning(f"{checkpoint.url}: no round; trying again")
            return self._count
        logger.warning(f"{checkpoint.url}: no round in {ATTEMPTS} tries; waiting for a newer checkpoint")
        return 0


# ---- by the clock ----------------------------------------------------------------------------------------------------


def run_on_schedule(trigger: BaseTrigger, run: Callable[[], None], *, seen: Seen, at_once: bool) -> None:
    """Run at each time that the trigger names, until stopped or until a run raises, which is raised here.

    Runs never overlap. Times that pass during a run are made up for by one run after it; one that the machine slept
    through, however late.

    Args:
        trigger: of `every` or `cron`.
        run: one run; called from another thread.
        seen: called twice a minute and after each run with the next time.
        at_once: whether the first run is due now.
    """
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.schedulers.blocking import BlockingScheduler
    from apscheduler.triggers.interval import IntervalTrigger

    scheduler = BlockingScheduler(timezone=UTC, executors={"default": ThreadPoolExecutor(2)})
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that waits)
            failure.append(error)
            scheduler.shutdown(wait=False)
        else:
            tell()

    def tell() -> None:
        job = scheduler.get_job("rescore")
        seen(None if job is None else job.next_run_time)

    settings = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
    now = {"next_run_time": datetime.now(UTC)}
    scheduler.add_job(guarded, trigger, id="rescore", **settings, **(now if at_once else {}))
    scheduler.add_job(tell, IntervalTrigger(seconds=int(SEEN_SECONDS)), id="seen", **settings, **now)
    # "maximum number of running instances reached" and the like are how runs are kept from overlapping
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    try:
        scheduler.start()
    finally:
        if scheduler.running:
            scheduler.shutdown(wait=False)
    if failure:
        raise failure[0]


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
