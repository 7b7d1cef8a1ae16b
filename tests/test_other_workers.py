"""Which workers get the second try of a part, and when failures speak of a shard."""

from __future__ import annotations

import pytest

from pipeline.other_workers import FailedTries, Worker, elsewhere

A0, A1, A2 = (Worker(f"a{number}", f"tcp://10.0.0.1:{40000 + number}") for number in range(3))
B0, B1 = (Worker(f"b{number}", f"tcp://10.0.0.2:{40000 + number}") for number in range(2))
A0_ANEW = Worker("a0", "tcp://10.0.0.1:50000")


@pytest.mark.parametrize(
    ("workers", "failed", "expected"),
    [
        ([A0, A1, B0, B1], [A0], [B0, B1]),  # what the host of a0 lacks, a1 lacks perhaps, too
        ([A0, A1, A2], [A0], [A1, A2]),
        ([A0, A1, B0], [A0, B0], [A1]),
        ([A0_ANEW, A1], [A0], [A1]),
        ([A0], [A0], []),
        ([A0, B0], [], [A0, B0]),
    ],
)
def test_other_hosts_come_first_then_other_workers(
    workers: list[Worker], failed: list[Worker], expected: list[Worker]
) -> None:
    assert elsewhere(workers, failed) == expected


def failed(*tries: tuple[int, Worker]) -> FailedTries:
    made = FailedTries()
    for shard, worker in tries:
        made.add(shard, worker)
    return made


@pytest.mark.parametrize(
    ("tried", "workers", "bad"),
    [
        ([A0], [A0], False),
        ([A0, A0], [A0], True),
        ([A0, A0_ANEW], [A0_ANEW], True),
        ([A0, A0], [A0, A1], False),
        ([A0] * 10, [A0, A1], True),
        ([A0, A1], [A0, A1, A2], True),
        ([A0, A1], [A0, A1, B0], False),
        ([A0, B0], [A0, A1, B0, B1], True),
        ([A0, A0], [], True),
    ],
)
def test_a_shard_is_bad_when_two_places_say_so_where_there_are_two(
    tried: list[Worker], workers: list[Worker], bad: bool
) -> None:
    assert failed(*((3, worker) for worker in tried)).is_bad(3, workers) is bad


def test_who_fails_on_an_earlier_shard_is_not_asked_of_a_later_one() -> None:
    tries = failed((0, A0), (1, A1))  # a0 sees nothing, and shard 1 is missing
    assert tries.next_workers([A0, A1, A2]) == [A2]
    assert tries.next_workers([A0, A1]) == [A1]
    tries.add(1, A1)
    assert not tries.is_bad(0, [A0, A1])
    assert tries.is_bad(1, [A0, A1])
    tries.leave_out(1)
    assert tries.next_workers([A0, A1]) == [A1]
    assert failed().next_workers([A0, A1]) == []
