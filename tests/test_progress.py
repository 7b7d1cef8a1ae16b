"""`tools/progress.py`: what a log says of a command that goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from tools.progress import _columns, line_reporter


def lines(capsys: pytest.CaptureFixture[str], *reports: tuple[float, dict[str, object]]) -> list[str]:
    """What is said of reports at those seconds after the beginning."""
    seconds = iter([0.0, *(when for when, _ in reports)])
    report = line_reporter("score", "samples", clock=lambda: next(seconds))
    for _, about in reports:
        report(**about)
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_line_each_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    reports = [(float(second), {"done": 100 * second, "total": 9000}) for second in range(1, 91)]
    assert lines(capsys, *reports) == [
        "score: 3,000 of 9,000 samples, 100/s, 0:01:00 left",
        "score: 6,000 of 9,000 samples, 100/s, 0:00:30 left",
        "score: 9,000 of 9,000 samples, 100/s, 0:00:00 left",
    ]


def test_work_of_an_earlier_run_is_no_speed_of_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, (40.0, {"done": 1060, "total": 2000, "resumed": 1000, "note": "(read 3 %)"})) == [
        "score: 1,060 of 2,000 samples, 1.5/s, 0:10:27 left (read 3 %)"
    ]


def test_nothing_done_yet_has_no_end_in_sight(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, (31.0, {"done": 5, "total": 7, "resumed": 5})) == ["score: 5 of 7 samples, 0/s"]


@pytest.mark.parametrize("seconds", [5, 40, 3600])
def test_a_bar_tells_how_long_it_takes_however_long_one_part_does(seconds: int) -> None:
    now = 0.0
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bar = Progress(*_columns("score", "samples"), console=console, get_time=lambda: now, auto_refresh=False)
    task = bar.add_task("score", total=None, note="", resumed=0)

    assert "-:--:--" in bar.columns[5].render(bar.tasks[0])
    for part in range(1, 4):
        now = float(part * seconds)
        bar.update(task, completed=1000 + 10 * part, total=1040, resumed=1000)
    assert str(bar.columns[5].render(bar.tasks[0])) == {5: "0:00:05", 40: "0:00:40", 3600: "1:00:00"}[seconds]
