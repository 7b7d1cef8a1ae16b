"""When runs are started: at the newest checkpoint, every so often, and on cron lines as cron reads them."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from apscheduler.triggers.interval import IntervalTrigger
from hypothesis import given, settings
from hypothesis import strategies as st

from dynams_stream.errors import UsageError
from pipeline import triggers
from pipeline.triggers import PAUSES, Outcome, cron, every, run_on_schedule, watch


class Stopped(Exception):  # noqa: N818
    """Ends a watch."""


class Trainer:
    """Writes checkpoints between the looks of a watch, and answers its runs."""

    def __init__(self, folder: Path, writes: dict[int, str], answers: dict[str, list[Outcome]], looks: int):
        self.folder, self.writes, self.answers, self.looks = folder, writes, answers, looks
        self.look, self.slept, self.runs, self.seen = 0, [], [], 0
        self.pattern: str | None = None

    def run(self, path: str) -> Outcome:
        name = Path(path).name
        self.runs.append((self.look, name))
        waiting = self.answers.get(name)
        return waiting.pop(0) if waiting else "done"

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.look += 1
        if self.look == self.looks:
            raise Stopped
        if name := self.writes.get(self.look):
            (self.folder / name).write_text(f"{name} {self.look}")
            os.utime(self.folder / name, (1000 + self.look, 1000 + self.look))

    def tell(self, due: datetime | None) -> None:
        assert due is None
        self.seen += 1


def followed(trainer: Trainer) -> list[tuple[int, str]]:
    with pytest.raises(Stopped):
        watch(
            str(trainer.folder), trainer.run, pattern=trainer.pattern, poll=2, seen=trainer.tell, sleep=trainer.sleep,
            clock=lambda: 2.0 * trainer.look,
        )  # fmt: skip
    return trainer.runs


def test_each_newer_checkpoint_is_run_once_it_is_complete(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, {1: "1.pt", 2: "2.pt", 3: "3.pt", 8: "2.pt"}, {}, looks=12)
    assert followed(trainer) == [(2, "1.pt"), (3, "2.pt"), (4, "3.pt"), (9, "2.pt")]
    assert set(trainer.slept) == {2}
    assert trainer.seen == 1  # and about twice a minute


def test_a_folder_that_is_away_for_a_while_is_looked_at_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(tmp_path / "ckpt", {1: "1.pt", 8: "2.pt"}, {}, looks=12)
    trainer.folder.mkdir()
    usual = trainer.sleep

    def sleep(seconds: float) -> None:
        usual(seconds)
        if trainer.look == 4:
            trainer.folder.rename(tmp_path / "away")
        if trainer.look == 7:
            (tmp_path / "away").rename(trainer.folder)

    trainer.sleep = sleep  # type: ignore[method-assign]
    assert followed(trainer) == [(2, "1.pt"), (9, "2.pt")]
    assert sum("cannot be looked at" in text for text in caplog.messages) == 1


def test_a_watch_gives_signs_of_itself_during_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triggers, "SEEN_SECONDS", 0.02)
    trainer = Trainer(tmp_path, {1: "1.pt"}, {}, looks=5)

    def run(path: str) -> Outcome:
        before, deadline = trainer.seen, time.monotonic() + 20
        while trainer.seen < before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return "done"

    trainer.run = run  # type: ignore[method-assign]
    followed(trainer)
    assert not [thread for thread in threading.enumerate() if thread.name == "dynams-heartbeat"]


def test_checkpoints_that_appear_during_a_run_are_passed_over_for_the_newest(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, {1: "1.pt"}, {}, looks=10)
    usual = trainer.run

    def run(path: str) -> Outcome:
        if path.endswith("1.pt"):
            for number in range(2, 6):
                (tmp_path / f"{number}.pt").write_text("written during the run")
        return usual(path)

    trainer.run = run  # type: ignore[method-assign]
    assert [name for _, name in followed(trainer)] == ["1.pt", "5.pt"]


def test_a_busy_store_costs_no_checkpoint_its_round(tmp_path: Path) -> None:
    busy: list[Outcome] = ["busy"] * 7
    trainer = Trainer(tmp_path, {1: "1.pt"}, {"1.pt": busy}, looks=14)
    assert followed(trainer) == [(look, "1.pt") for look in range(2, 10)]


def test_a_failing_checkpoint_is_tried_again_after_longer_and_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert PAUSES[0] >= 60  # a passing fault has minutes to pass
    assert sorted(PAUSES) == list(PAUSES)
    monkeypatch.setattr(triggers, "PAUSES", (4.0, 10.0))
    trainer = Trainer(tmp_path, {1: "1.pt"}, {"1.pt": ["failed"] * 4}, looks=40)
    assert followed(trainer) == [(look, "1.pt") for look in (2, 4, 9, 14, 19)]  # the last one is done
    assert set(trainer.slept) == {2}
    assert sum("1.pt: no round; trying again in 10 s" in text for text in caplog.messages) == 3


def test_a_newer_checkpoint_does_not_wait_for_one_that_fails(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, {1: "1.pt", 5: "2.pt", 8: "1.pt"}, {"1.pt": ["failed", "done"]}, looks=14)
    assert followed(trainer) == [(2, "1.pt"), (6, "2.pt"), (9, "1.pt")]


def test_files_beside_the_numbered_ones_are_passed_over(tmp_path: Path) -> None:
    writes = {1: "1.pt", 2: "last.pt", 3: "optimizer-1.pt", 6: "2.pt", 7: "best.pt"}
    trainer = Trainer(tmp_path, writes, {}, looks=12)
    trainer.pattern = "{epoch}.pt"
    assert followed(trainer) == [(2, "1.pt"), (7, "2.pt")]


# ---- by the clock ----------------------------------------------------------------------------------------------------


def times(line: str, start: datetime, count: int) -> list[datetime]:
    trigger, found, last = cron(line), [], start
    for _ in range(count):
        following = trigger.get_next_fire_time(None, last)
        if following is None:
            break
        found.append(following)
        last = following + timedelta(seconds=1)
    return found


def matches(line: str, moment: datetime) -> bool:
    """Whether cron would run a line at that minute, from its manual page: each field by itself."""

    def allowed(field: str, low: int, high: int) -> set[int]:
        found: set[int] = set()
        for piece in field.split(","):
            span, _, step = piece.partition("/")
            first, _, last = span.partition("-")
            bounds = (low, high) if span == "*" else (int(first), int(last or (high if step else first)))
            found |= set(range(bounds[0], bounds[1] + 1, int(step or 1)))
        return found

    minute, hour, day, month, weekday = line.split()
    in_month = moment.day in allowed(day, 1, 31)
    in_week = (moment.isoweekday() % 7) in {number % 7 for number in allowed(weekday, 0, 7 if weekday != "*" else 6)}
    either = not (day.startswith("*") or weekday.startswith("*"))
    return (
        moment.minute in allowed(minute, 0, 59)
        and moment.hour in allowed(hour, 0, 23)
        and moment.month in allowed(month, 1, 12)
        and ((in_month or in_week) if either else (in_month and in_week))
    )


spans = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda pair: f"{min(pair)}-{max(pair)}")
weekdays = st.one_of(
    st.just("*"), st.just("7"), st.integers(0, 6).map(str), spans, spans.map(lambda text: f"{text}/2"),
    st.just("*/2"), st.just("1,5"), st.just("5-7"),
)  # fmt: skip
month_days = st.one_of(st.just("*"), st.just("*/9"), st.integers(1, 28).map(str), st.just("1,15"))


@settings(max_examples=60, deadline=None)
@given(weekday=weekdays, day=month_days, hour=st.sampled_from(["3", "*/6", "22"]))
def test_cron_lines_run_when_cron_would(weekday: str, day: str, hour: str) -> None:
    line = f"0 {hour} {day} * {weekday}"
    start = datetime(2026, 2, 20, 1, 30, tzinfo=UTC)
    hours = (start.replace(minute=0) + timedelta(hours=number) for number in range(1, 24 * 60))
    expected = [moment for moment in hours if matches(line, moment)][:12]
    assert times(line, start, len(expected)) == expected


def test_days_have_names_too() -> None:
    friday = datetime(2026, 11, 27, 6, tzinfo=UTC)
    assert times("0 6 * * Fri", datetime(2026, 11, 26, tzinfo=UTC), 2) == [friday, friday + timedelta(days=7)]
    assert times("0 6 * * mon-fri", friday + timedelta(hours=1), 1) == [friday + timedelta(days=3)]
    assert times("30 0 1 Jan *", friday, 1) == [datetime(2027, 1, 1, 0, 30, tzinfo=UTC)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0 6 * *", "has 4 fields"),
        ("0 6 * * * *", "has 6 fields"),
        ("61 * * * *", "61"),
        ("0 25 * * *", "25"),
        ("0 0 * * 8", "'8' is no day of the week"),
        ("0 0 * * fre", "'fre' is no day of the week"),
        ("0 0 * * 5-2", "'5-2' names no day"),
        ("0 0 * * 1/0", "'1/0' names no day"),
        ("0 0 * * mon-", "is no day of the week"),
        ("@daily", "has 1 fields"),
    ],
)
def test_wrong_cron_lines_are_refused(line: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        cron(line)


def test_runs_do_not_overlap_and_missed_ones_are_made_up_for_once() -> None:
    """Times at 0, 0.3 and 0.6 s, and then none: the first run lasts through the others, and one run follows it."""
    began, running, most, seen = 0, 0, 0, []
    lock = threading.Lock()

    def run() -> None:
        nonlocal began, running, most
        with lock:
            began, running, most = began + 1, running + 1, max(most, running + 1)
        time.sleep(1.0 if began == 1 else 0.1)
        if began == 2:
            signal.setitimer(signal.ITIMER_REAL, 0.7)
        with lock:
            running -= 1

    def stop(*_: object) -> None:
        raise Stopped

    usual = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 20)
    thrice = IntervalTrigger(seconds=0.3, end_date=datetime.now(UTC) + timedelta(seconds=0.8), timezone=UTC)
    try:
        with pytest.raises(Stopped):
            run_on_schedule(thrice, run, seen=seen.append, at_once=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert (most, began) == (1, 2)
    assert len(seen) >= 4  # before and after each run


def test_a_run_that_raises_ends_the_schedule() -> None:
    def run() -> None:
        raise UsageError("wrong usage")

    seen: list[datetime | None] = []
    with pytest.raises(UsageError, match="wrong usage"):
        run_on_schedule(every(3600), run, seen=seen.append, at_once=True)
    assert max(filter(None, seen)) > datetime.now(UTC) + timedelta(seconds=3000)  # before a run the next one is told
