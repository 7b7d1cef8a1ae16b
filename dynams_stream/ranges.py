"""Which byte ranges to ask for: pure planning, linear in the number of samples.

wanted   ▓▓░▓▓▓░░░░░░░░░░▓▓░▓      bytes of one shard; ▓ belongs to a wanted sample
ranges   [────]          [──]      neighbours are asked for together when the gap between them is small
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ranges:
    """Ranges to ask for, in the order in which they are first needed.

    Attributes:
        shards, starts, stops: int64, shape (ranges,): shard number, first byte, and the byte after the last.
        range_of: int64, shape (samples,): the range that holds each wanted span.
    """

    shards: Integers
    starts: Integers
    stops: Integers
    range_of: Integers

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self.starts)


def plan(shards: Integers, offsets: Integers, sizes: Integers, *, gap: int, longest: int) -> Ranges:
    """Merge wanted spans into ranges.

    Args:
        shards, offsets, sizes: int64, shape (samples,): shard number, first byte and length of each wanted span, in the
            order in which they will be needed. Spans may come twice or overlap.
        gap: spans of one shard are asked for together when at most so many bytes lie between them.
        longest: a range of more bytes is cut between spans, so that several requests share it. No span is cut.

    Returns:
        The ranges: every span lies within one, and without `gap` they hold no byte that is in no span.
    """
    if not len(shards):
        nothing = np.zeros(0, dtype=np.int64)
        return Ranges(nothing, nothing, nothing, nothing)
    by_place = np.lexsort((offsets, shards))
    sorted_shards, starts = shards[by_place], offsets[by_place]
    # a shard's number times a number above all ends keeps shards apart, so that one running maximum serves them all
    width = int((offsets + sizes).max()) + gap + 1
    lifted = sorted_shards.astype(object) * width if width > 2**62 // (int(shards.max()) + 1) else sorted_shards * width
    ends = np.maximum.accumulate(lifted + starts + sizes[by_place]) - lifted
    new_shard = np.diff(sorted_shards, prepend=sorted_shards[0] - 1) != 0
    begins = new_shard.copy()
    begins[1:] |= starts[1:] - ends[:-1] > gap
    begins |= _cuts(starts, begins, longest) & _ends_before(starts, ends)
    firsts = np.flatnonzero(begins)
    number_of = np.cumsum(begins) - 1
    stops = np.maximum.reduceat(starts + sizes[by_place], firsts)
    needed = np.minimum.reduceat(by_place, firsts)
    by_need = np.argsort(needed)
    rank_of = np.empty(len(by_need), dtype=np.int64)
    rank_of[by_need] = np.arange(len(by_need))
    range_of = np.empty(len(shards), dtype=np.int64)
    range_of[by_place] = rank_of[number_of]
    return Ranges(sorted_shards[firsts][by_need], starts[firsts][by_need], stops[by_need], range_of)


def _cuts(starts: Integers, begins: npt.NDArray[np.bool_], longest: int) -> npt.NDArray[np.bool_]:
    """Where a merged run passes another multiple of `longest` bytes from its beginning."""
    run_starts = starts[np.maximum.accumulate(np.where(begins, np.arange(len(starts)), 0))]
    step = (starts - run_starts) // longest
    return np.diff(step, prepend=0) > 0


def _ends_before(starts: Integers, ends: Integers) -> npt.NDArray[np.bool_]:
    """Whether everything before a span ends at or before its start, so that a cut there divides no span."""
    return np.concatenate([np.ones(1, dtype=np.bool_), starts[1:] >= ends[:-1]])
