"""The order of an epoch, and its split over ranks and workers: integers in, integers out, no I/O.

The global order is a pure function of (selected rows per shard, seed, epoch, lanes, `ALGORITHM_VERSION`). It knows
nothing of ranks, workers or batches, which is why a run can be resumed on any number of them:

    shards   b c a                                  permuted by (seed, epoch)
    rows     b2 b3 b0 b1 c0 c1 c2 a0 a1 a2 a3       their selected rows, each shard's from a row of its own on: N = 11
    lanes    0: b2 b3 b0 b1                         cut into L = 3 stretches, which become lanes in a permuted order;
             2: c0 c1 c2                            lane l gets the longer length while l < N mod L
             1: a0 a1 a2 a3
    windows  0: b3 b2 b0 b1                         inside a lane, items are shuffled in windows of W
             1: a2 a0 a1 a3
             2: c1 c2 c0
    order    b3 a2 c1 | b2 a0 c2 | b0 a1 c0 | b1 a3   position p is item p // L of lane p mod L

(That is seed 0, epoch 0, three lanes over shards of 4, 4 and 3 selected rows.) A batch takes its samples from as many
places of the dataset as there are lanes, so that windows may be short. Each shard begins at a row of its own, or lanes
would go through shards that are sorted inside in step; and lanes that follow each other are not neighbours, or a batch
smaller than L would come from a part of the dataset.

Rank r takes every R-th position, from r on, so that with R dividing L it owns whole lanes and reads only their shards.
With 11 samples over 4 ranks (`|` parts the steps):

    position   0 1 2 3 | 4 5 6 7 | 8 9 10
    rank       0 1 2 3 | 0 1 2 3 | -            tail="drop": the last N mod R = 3 are left out, others each epoch
               0 1 2 3 | 0 1 2 3 | 0 1 2 3      tail="pad": rank 3 gets position 11 - 11 = 0 again, marked `__pad__`
               0 1 2 3 | 0 1 2 3 | 0 1 2 3      tail="wrap": the same, unmarked
               0 1 2 3 | 0 1 2 3 | 0 1 2        tail="keep": every sample once; ranks may differ by one

A rank cuts its samples into batches and worker w of W takes the batches w, w + W, …, which is the turn in which torch's
DataLoader asks its workers. Step b of the global batch B = batch · R is positions [b·B, (b+1)·B) on every split.
A resumed epoch goes on the same way from the position `start` that it had come to; resumed at 4 by 2 ranks:

    position   0 1 2 3 | 4 5 | 6 7 | 8 9 | 10
    rank       (done)    0 1 | 0 1 | 0 1 | -

All randomness is SplitMix64 (Steele, Lea, Flood 2014; Vigna's constants) over uint64, and permutations are made by
sorting its values: `numpy.random.Generator` may change its streams between versions (NEP 19), this cannot.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

ALGORITHM_VERSION: Final = 2
"""Raised whenever the same inputs give another order; a state of another version is refused."""

Tail = Literal["drop", "pad", "wrap", "keep"]
TAILS: Final[tuple[str, ...]] = get_args(Tail)

Integers = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

LANES: Final = 960  # many divisors: 1 to 6, 8, 10, 12, 15, 16, 20, 24, 30, 32, 40, 48, 60, 64, … ranks own whole lanes
_POOL_SAMPLES: Final = 16 * 1024  # lanes × window; up to so many are one lane with one window, a uniform shuffle

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_SHARD_STREAM = 1
_WINDOW_STREAM = 2
_LANE_STREAM = 3
_TURN_STREAM = 4


def _ceiling(number: int, divisor: int) -> int:
    return -(-number // divisor)


def default_lanes(total: int, window: int | None = None) -> int:
    """The number of lanes for `total` selected samples: 1 for small selections, else 960 (`docs/order.md` says why).

    With a window of one's own a single lane would mix no more than that, so that small selections get many lanes too.
    """
    if window is None:
        return 1 if total <= _POOL_SAMPLES else LANES
    return max(1, min(LANES, _ceiling(total, window)))


def window_length(total: int, lanes: int) -> int:
    """How many consecutive items of a lane are shuffled together; a lane's windows are about equally long."""
    longest = _ceiling(total, lanes)
    windows = max(1, longest // max(1, _POOL_SAMPLES // lanes))
    return max(1, _ceiling(longest, windows))


class EpochOrder:
    """The global order of one epoch: position → (shard, index into the shard's selected rows).

    Args:
        counts: int64, selected rows of each shard.
        seed: any non-negative integer.
        epoch: 0, 1, …
        lanes: number of lanes L; None for `default_lanes`.
        window: items of a lane that are shuffled together, W; None for `window_length`.
        shuffle: False gives (shard, row) order: one lane, no windows.

    Any position can be asked for in constant time. Memory: four numbers per shard, and the permutations of the windows
    in use (about 2 · L · W numbers of four bytes), never one of all samples.
    """

    def __init__(
        self,
        counts: npt.NDArray[np.integer],
        *,
        seed: int = 0,
        epoch: int = 0,
        lanes: int | None = None,
        window: int | None = None,
        shuffle: bool = True,
    ):
        shards = len(counts)
        self.total = int(np.sum(counts, dtype=np.int64))
        self.shuffle = shuffle
        self.lanes = 1 if not shuffle else default_lanes(self.total, window) if lanes is None else lanes
        self.window = window_length(self.total, self.lanes)
        if window is not None:
            self.window = max(1, min(int(window), _ceiling(self.total, self.lanes)))
        self._counts: Integers = np.asarray(counts, dtype=np.int64)
        self._shards: Integers = np.arange(shards, dtype=np.int64)
        self._turns: Integers = np.zeros(shards, dtype=np.int64)
        lanes_by_start: Integers = np.arange(self.lanes, dtype=np.int64)
        if shuffle and shards:
            self._shards = _permutation(_key(seed, epoch, _SHARD_STREAM), shards)
            self._turns = _turns(_key(seed, epoch, _TURN_STREAM), self._counts)
            lanes_by_start = _permutation(_key(seed, epoch, _LANE_STREAM), self.lanes)
        self._ends: Integers = np.cumsum(self._counts[self._shards])
        self._lane_starts = self._starts_of(lanes_by_start)
        self._window_key = _key(seed, epoch, _WINDOW_STREAM)
        self._windows_per_lane = max(1, _ceiling(_ceiling(self.total, self.lanes), self.window))
        self._permutations: OrderedDict[int, npt.NDArray[np.int32]] = OrderedDict()

    def __len__(self) -> int:
        return self.total

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Where the samples at `positions` lie.

        Args:
            positions: int64, shape (n,), each in [0, N), in any order.

        Returns:
            Shard numbers and indices into each shard's selected rows, both int64 of shape (n,).

        Raises:
            IndexError: when a position is out of range.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.total):
            raise IndexError(
                f"positions {positions.min()} … {positions.max()} are out of range; got {self.total} samples"
            )
        places = self._shuffled(positions) if self.shuffle else positions
        turns = np.searchsorted(self._ends, places, side="right")
        shards = self._shards[turns]
        from_start = places - (self._ends[turns] - self._counts[shards])
        return shards, (from_start + self._turns[shards]) % np.maximum(self._counts[shards], 1)

    def _starts_of(self, lanes_by_start: Integers) -> Integers:
        """int64, shape (lanes,): where each lane starts in the sequence, when they follow each other as given."""
        short, longer = divmod(self.total, self.lanes)
        lengths = short + (lanes_by_start < longer)
        starts = np.empty(self.lanes, dtype=np.int64)
        starts[lanes_by_start] = np.cumsum(lengths) - lengths
        return starts

    def _shuffled(self, positions: Integers) -> Integers:
        """Places in the concatenated sequence of the permuted shards."""
        lane, item = positions % self.lanes, positions // self.lanes
        window, within = item // self.window, item % self.window
        names, rows = np.unique(lane * self._windows_per_lane + window, return_inverse=True)
        shuffled = self._window_permutations(names)[rows, within]
        return self._lane_starts[lane] + window * self.window + shuffled

    def _window_permutations(self, names: Integers) -> npt.NDArray[np.int32]:
        """Permutations of the windows `names`, shape (len(names), W); entries beyond a window's length mean nothing."""
        known = self._permutations
        missing = np.array([name for name in names.tolist() if name not in known], dtype=np.int64)
        if missing.size:
            lane, window = np.divmod(missing, self._windows_per_lane)
            short, longer = divmod(self.total, self.lanes)
            lengths = np.minimum(short + (lane < longer) - window * self.window, self.window)
            made = _permutations(_fold(_fold(np.uint64(self._window_key), lane), window), lengths, self.window)
            known.update(zip(missing.tolist(), made.astype(np.int32), strict=True))
        table = np.empty((len(names), self.window), dtype=np.int32)
        for row, name in enumerate(names.tolist()):
            table[row] = known[name]
            known.move_to_end(name)
        while len(known) > max(2 * self.lanes, len(names)):
            known.popitem(last=False)
        return table


# ---- the split over ranks and workers --------------------------------------------------------------------------------


def rank_length(total: int, ranks: int, rank: int, tail: str) -> int:
    """How many of `total` positions rank `rank` of `ranks` takes (the module's docstring draws the four tails)."""
    if tail == "keep":
        return max(0, _ceiling(total - rank, ranks))
    return total // ranks if tail == "drop" else _ceiling(total, ranks)


def rank_positions(
    samples: Integers, total: int, ranks: int, rank: int, start: int = 0
) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Positions of a rank's samples number `samples`, counted from position `start` of the epoch on.

    Returns:
        int64 positions in [0, total), and bool marks of those that wrapped around the end.
    """
    positions = start + samples * ranks + rank
    padded = positions >= total
    return np.where(padded, positions % max(total, 1), positions), padded


def worker_length(length: int, worker: int, workers: int, batch: int | None) -> int:
    """How many of a rank's `length` samples worker `worker` of `workers` takes, in batches of `batch` (None: 1)."""
    size = batch or 1
    rounds, rest = divmod(length, size * workers)
    return rounds * size + min(max(rest - worker * size, 0), size)


def worker_samples(first: int, stop: int, worker: int, workers: int, batch: int | None) -> Integers:
    """The rank's sample numbers that are the worker's own samples `first` … `stop` - 1, int64."""
    size = batch or 1
    batches, within = np.divmod(np.arange(first, stop, dtype=np.int64), size)
    return (batches * workers + worker) * size + within


def substitute(position: int, attempt: int, total: int) -> int:
    """The position that stands in for the unreadable sample at `position`, at attempt 1, 2, …

    It is (position + attempt · stride) mod N, where stride is the first number from 0.618·N on that has no divisor in
    common with N: attempts reach every other sample before one comes again, and neighbours get far-away substitutes.
    """
    stride = max(1, total * 618 // 1000)
    while math.gcd(stride, total) != 1:
        stride += 1
    return (position + attempt * stride) % total


# ---- randomness ------------------------------------------------------------------------------------------------------


def _mix(words: _Words) -> _Words:
    """SplitMix64's output function, elementwise (uint64 arithmetic wraps around)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _fold(key: _Words | np.uint64, number: Integers) -> _Words:
    """Keys of their own for each `number` below `key`."""
    return _mix((number.astype(np.uint64) ^ key) + np.uint64(_GOLDEN))


def _key(*numbers: int) -> int:
    """One 64-bit key for a tuple of non-negative integers."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = _mix((key ^ np.uint64(number & _MASK)) + np.uint64(_GOLDEN))
    return int(key[0])


def _permutation(key: int, length: int) -> Integers:
    """A permutation of 0 … length - 1, int64."""
    made: Integers = _permutations(np.array([key], dtype=np.uint64), np.array([length]), length)[0]
    return made


def _turns(key: int, counts: Integers) -> Integers:
    """For each shard a number from 0 to its count - 1, int64."""
    words = _fold(np.uint64(key), np.arange(len(counts), dtype=np.int64))
    turns: Integers = (words % np.maximum(counts, 1).astype(np.uint64)).astype(np.int64)
    return turns


def _permutations(keys: _Words, lengths: Integers, width: int) -> Integers:
    """For each key a permutation of 0 … length - 1, in the first `length` columns of an int64 table of `width`.

    Item i is sorted by the i-th SplitMix64 value of its key, whose low bits are replaced by i: no ties, so that the
    result depends on no sorting algorithm.
    """
    low = np.uint64((1 << max(1, (width - 1).bit_length())) - 1)
    items = np.arange(width, dtype=np.uint64)
    values = _mix(keys[:, None] + (items + np.uint64(1)) * np.uint64(_GOLDEN))
    values[np.arange(width) >= lengths[:, None]] = np.uint64(_MASK)  # beyond a short window: sorted last
    values = (values & ~low) | items
    values.sort(axis=1)
    return (values & low).astype(np.int64)
