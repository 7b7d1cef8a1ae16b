"""Range planning: every wanted byte is asked for, gaps and lengths are respected, ranges come in the order of need."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dynams_stream.ranges import plan

SPANS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300), st.integers(0, 40)), max_size=60)


def columns(spans: list[tuple[int, int, int]]) -> list[np.ndarray]:
    return [np.array([span[field] for span in spans], dtype=np.int64) for field in range(3)]


def by_hand(spans: list[tuple[int, int, int]], gap: int) -> set[tuple[int, int, int]]:
    """Merged ranges without a limit of length: one span after another."""
    found: list[list[int]] = []
    for shard, offset, size in sorted(spans):
        if found and found[-1][0] == shard and offset - found[-1][2] <= gap:
            found[-1][2] = max(found[-1][2], offset + size)
        else:
            found.append([shard, offset, offset + size])
    return {(shard, start, stop) for shard, start, stop in found}


@given(spans=SPANS, gap=st.integers(0, 50))
def test_ranges_are_the_merged_spans(spans: list[tuple[int, int, int]], gap: int) -> None:
    ranges = plan(*columns(spans), gap=gap, longest=10**9)
    found = list(zip(ranges.shards.tolist(), ranges.starts.tolist(), ranges.stops.tolist(), strict=True))
    assert set(found) == by_hand(spans, gap)
    assert len(set(found)) == len(found)


@given(spans=SPANS, gap=st.integers(0, 50), longest=st.integers(1, 120))
def test_each_span_lies_in_its_range_and_ranges_come_in_the_order_of_need(
    spans: list[tuple[int, int, int]], gap: int, longest: int
) -> None:
    shards, offsets, sizes = columns(spans)
    ranges = plan(shards, offsets, sizes, gap=gap, longest=longest)
    mine = ranges.range_of
    assert np.array_equal(ranges.shards[mine], shards)
    assert (ranges.starts[mine] <= offsets).all()
    assert (offsets + sizes <= ranges.stops[mine]).all()
    first_needs = [int(np.flatnonzero(mine == number)[0]) for number in range(len(ranges))]
    assert first_needs == sorted(first_needs)
    for number in range(len(ranges)):  # a long range holds spans that begin within `longest`, or overlap
        inside = np.flatnonzero(mine == number)
        begins = np.sort(offsets[inside])
        if begins[-1] - begins[0] >= longest:
            ends = np.maximum.accumulate((offsets + sizes)[inside][np.argsort(offsets[inside], kind="stable")])
            late = begins[1:][begins[1:] - begins[0] >= longest]
            assert (late < ends[:-1][begins[1:] - begins[0] >= longest]).any()


@given(spans=SPANS, longest=st.integers(1, 400))
def test_without_a_gap_no_byte_is_read_in_vain(spans: list[tuple[int, int, int]], longest: int) -> None:
    ranges = plan(*columns(spans), gap=0, longest=longest)
    wanted = {(shard, byte) for shard, offset, size in spans for byte in range(offset, offset + size)}
    asked = [
        (shard, byte)
        for shard, start, stop in zip(
            *(each.tolist() for each in (ranges.shards, ranges.starts, ranges.stops)), strict=True
        )
        for byte in range(start, stop)
    ]
    assert set(asked) == wanted
    assert len(asked) == len(wanted)  # and none twice


def test_huge_shards_and_numbers_do_not_overflow() -> None:
    shards = np.array([2**31 - 1, 0, 2**31 - 1], dtype=np.int64)
    offsets = np.array([2**45, 2**45, 2**45 + 10], dtype=np.int64)
    ranges = plan(shards, offsets, np.array([10, 10, 10]), gap=0, longest=100)
    assert ranges.shards.tolist() == [2**31 - 1, 0]
    assert (ranges.stops - ranges.starts).tolist() == [20, 10]


def test_a_hundred_thousand_neighbours_become_ranges_of_the_longest_length() -> None:
    """(Merging that compares all pairs, as fsspec's does, would take minutes here.)"""
    offsets = np.arange(100_000, dtype=np.int64) * 1000
    ranges = plan(np.zeros_like(offsets), offsets, np.full_like(offsets, 100), gap=900, longest=1_000_000)
    assert len(ranges) == 100
    assert (ranges.stops - ranges.starts == 999_100).all()
