"""Class quotas in the exact cut: against a plain greedy choice over the sorted whole."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cut import selected_rows, write_part

from dynams_stream import class_cut
from dynams_stream.class_cut import _Sum
from dynams_stream.class_cut_part import KeyCounts
from dynams_stream.class_quotas import ClassQuotas, settle_quotas
from dynams_stream.cut import CutResult, ScorePart, exact_cut
from dynams_stream.errors import UsageError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.strategy import Strategy

DISTANCE = Strategy.parse("distance")
Sample = tuple[float | None, int | None]

score = st.one_of(st.sampled_from([0.0, 1.0, 1.0, -0.0, None, math.nan, math.inf, 2.5]), st.floats(width=32))
label = st.one_of(st.none(), st.integers(0, 3), st.sampled_from([-7, 2_000_000_000]))
tables = st.lists(st.lists(st.tuples(score, label), max_size=12), min_size=1, max_size=6)
fractions = st.sampled_from(["0", "0.1", "0.25", "0.5", "0.77", "1"])


def write_labelled(folder: Path, shards: list[list[Sample]], shards_per_part: int) -> list[ScorePart]:
    parts = []
    for number, first in enumerate(range(0, len(shards), shards_per_part)):
        mine = shards[first : first + shards_per_part]
        url = str(folder / f"part-{number}.parquet")
        write_part(
            url, first, [[one[0] for one in shard] for shard in mine], [one[1] for shard in mine for one in shard]
        )
        parts.append(ScorePart(url, number, first, np.array([len(shard) for shard in mine], dtype=np.int64)))
    return parts


def greedy(shards: list[list[Sample]], wanted: int, quota: dict[int | None, int]) -> list[list[int]]:
    """Each class's quota of its smallest first, then the smallest of the others: by a sort of everything."""
    ranked = sorted(
        (np.float32(value) + np.float32(0), shard, row, own)
        for shard, samples in enumerate(shards)
        for row, (value, own_label) in enumerate(samples)
        for own in [-(10**12) if own_label is None else own_label]
        if value is not None and not math.isnan(value)
    )
    by_class: dict[int | None, list[tuple[Any, int, int, int]]] = defaultdict(list)
    for entry in ranked:
        by_class[None if entry[3] == -(10**12) else entry[3]].append(entry)
    chosen = {entry[1:3] for own, count in quota.items() for entry in by_class[own][:count]}
    for entry in ranked:
        if len(chosen) >= min(wanted, len(ranked)):
            break
        chosen.add(entry[1:3])
    return [sorted(row for s, row in chosen if s == shard) for shard in range(len(shards))]


def counts_by_class(shards: list[list[Sample]]) -> tuple[Counter[int | None], Counter[int | None]]:
    everything = Counter(own for samples in shards for _, own in samples)
    scored = Counter(own for samples in shards for v, own in samples if v is not None and not math.isnan(v))
    return everything, scored


def cut(parts: list[ScorePart], folder: Path, fraction: str, quotas: ClassQuotas, **options: Any) -> CutResult:
    destination = str(folder / "selection.parquet")
    return exact_cut(
        parts, fraction=fraction, strategy=DISTANCE, destination=destination, quotas=quotas, **options
    )  # fmt: skip


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=tables, fraction=fractions, least=st.integers(1, 4), shards_per_part=st.integers(1, 4))
def test_each_class_gives_its_least_and_scores_decide_on_the_rest(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[list[Sample]],
    fraction: str,
    least: int,
    shards_per_part: int,
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    parts = write_labelled(folder, shards, shards_per_part)
    everything, scored = counts_by_class(shards)
    wanted = min(math.ceil(Fraction(fraction) * sum(everything.values())), sum(scored.values()))
    quota = {own: min(least, scored[own]) for own in everything if own is not None}
    if sum(quota.values()) > wanted:
        with pytest.raises(UsageError, match=f"min_per_class={least}"):
            cut(parts, folder, fraction, ClassQuotas(least=least))
        return
    result = cut(parts, folder, fraction, ClassQuotas(least=least))
    rows = selected_rows(str(folder / "selection.parquet"))
    assert rows == greedy(shards, wanted, quota)
    assert result.selected == sum(map(len, rows)) == wanted
    selected = Counter(shards[s][r][1] for s, mine in enumerate(rows) for r in mine)
    assert {own: counts["selected"] for own, counts in result.per_class.items()} == {
        own: selected[own] for own in everything if own is not None
    }
    assert {own: counts["all"] for own, counts in result.per_class.items()} == {
        own: count for own, count in everything.items() if own is not None
    }


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=tables, fraction=fractions, shards_per_part=st.integers(1, 4))
def test_balanced_classes_give_the_same_share_each(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[Sample]], fraction: str, shards_per_part: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    parts = write_labelled(folder, shards, shards_per_part)
    everything, scored = counts_by_class(shards)
    wanted = min(math.ceil(Fraction(fraction) * sum(everything.values())), sum(scored.values()))
    cut(parts, folder, fraction, ClassQuotas(balance=True))
    rows = selected_rows(str(folder / "selection.parquet"))
    selected = Counter(shards[s][r][1] for s, mine in enumerate(rows) for r in mine)
    assert sum(selected.values()) == wanted
    assert rows == greedy(shards, wanted, selected), "of each class the smallest"
    if scored == everything and everything:
        share = Fraction(wanted, sum(everything.values()))
        for own, count in everything.items():
            assert math.floor(share * count) <= selected[own] <= math.ceil(share * count)


def test_bytes_depend_on_neither_workers_nor_parts(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shards: list[list[Sample]] = [
        [(float(draw.integers(0, 30)) / 4, int(draw.integers(0, 5))) for _ in range(draw.integers(0, 80))]
        for _ in range(30)
    ]
    files = set()
    for workers, per_part in ((1, 1), (2, 1), (4, 1)):
        folder = tmp_path / f"{workers}"
        parts = write_labelled(folder, shards, per_part)
        cut(parts, folder, "0.3", ClassQuotas(balance=True, least=9), ordered_map=ordered_thread_map(workers))
        files.add((folder / "selection.parquet").read_bytes())
    assert len(files) == 1
    folder = tmp_path / "other parts"
    cut(write_labelled(folder, shards, 7), folder, "0.3", ClassQuotas(balance=True, least=9))
    assert selected_rows(str(folder / "selection.parquet")) == selected_rows(str(tmp_path / "1/selection.parquet"))


def test_each_part_is_read_three_times(tmp_path: Path, reads: Counter[str]) -> None:
    parts = write_labelled(tmp_path, [[(1.0, row % 3) for row in range(20)] for _ in range(6)], 2)
    cut(parts, tmp_path, "0.5", ClassQuotas(balance=True, least=2))
    assert reads == Counter({part.url: 3 for part in parts})


def test_tasks_hold_little_when_everything_ties(tmp_path: Path) -> None:
    sizes = []

    def measured(function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        for item in items:
            result = function(item)
            sizes.append(max((one.nbytes for one in vars(result).values() if isinstance(one, np.ndarray)), default=0))
            yield result

    parts = write_labelled(tmp_path, [[(0.0, row % 2) for row in range(3000)] for _ in range(3)], 1)
    cut(parts, tmp_path, "0.002", ClassQuotas(least=5), ordered_map=measured)
    assert selected_rows(str(tmp_path / "selection.parquet")) == [list(range(18)), [], []]
    assert max(sizes) < 1000


def test_sparse_counts_are_summed_in_little_memory() -> None:
    draw = np.random.default_rng(3)
    expected = np.zeros(150_000, dtype=np.int64)
    tracemalloc.start()
    try:
        total = _Sum()
        for _ in range(80):
            keys = np.unique(draw.integers(0, len(expected), 60_000))
            counts = draw.integers(1, 9, len(keys))
            expected[keys] += counts
            total.add(KeyCounts(keys << 16, counts))
        found = total.result()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found.keys, np.flatnonzero(expected) << 16)
    np.testing.assert_array_equal(found.counts, expected[expected > 0])
    assert peak < 24_000_000  # the sum is 2.4 MB, what is added 70 MB


def test_thresholds_do_not_depend_on_how_many_counts_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(4)
    shards = [[(draw.choice([0.5, 1.0, draw.random()]), draw.randrange(9)) for _ in range(60)] for _ in range(6)]
    parts = write_labelled(tmp_path, shards, 2)
    whole = cut(parts, tmp_path, "0.3", ClassQuotas(True, 5))
    monkeypatch.setattr(class_cut, "_BLOCK", 7)
    monkeypatch.setattr(class_cut, "_LEAST_WAITING", 5)
    assert cut(parts, tmp_path, "0.3", ClassQuotas(True, 5)) == whole


def test_an_excluded_sample_is_never_selected(tmp_path: Path) -> None:
    parts = write_labelled(tmp_path, [[(float(row), row % 2) for row in range(10)]], 1)
    out = [ScorePart(parts[0].url, 0, 0, parts[0].counts, np.array([0, 1, 3], dtype=np.uint32))]
    destination = str(tmp_path / "selection.parquet")
    for quotas, expected in (
        (None, [2, 4, 5]),
        (ClassQuotas(least=2), [2, 4, 5, 7]),
        (ClassQuotas(balance=True), [2, 4, 5, 7]),
    ):
        fraction = "0.3" if quotas is None else "0.4"
        result = exact_cut(out, fraction=fraction, strategy=DISTANCE, destination=destination, quotas=quotas)
        assert selected_rows(destination) == [expected]
        assert (result.scored, result.excluded, result.failed) == (10, 3, 0)
    result = exact_cut(out, fraction=1, strategy=DISTANCE, destination=destination)
    assert selected_rows(destination) == [[2, 4, 5, 6, 7, 8, 9]]
    random = [ScorePart(None, 0, 0, np.array([10]), np.array([0, 9], dtype=np.uint32))]
    exact_cut(random, fraction=1, strategy=Strategy.parse("random:3"), destination=destination)
    assert selected_rows(destination) == [list(range(1, 9))]


def test_quotas_that_cannot_be(tmp_path: Path) -> None:
    parts = write_labelled(tmp_path, [[(1.0, 0), (2.0, 1)]], 1)
    destination = str(tmp_path / "selection.parquet")
    with pytest.raises(UsageError, match="random order reads no labels"):
        exact_cut(
            parts, fraction=1, strategy=Strategy.parse("random"), destination=destination, quotas=ClassQuotas(True)
        )
    with pytest.raises(UsageError, match="min_per_class is -1"):
        ClassQuotas(least=-1)
    assert not Path(destination).exists()
    assert not ClassQuotas()


def test_shares_within_bounds_by_hand() -> None:
    def settled(quotas: ClassQuotas, wanted: int, samples: list[int], scored: list[int]) -> list[int]:
        arrays = [np.array(one, dtype=np.int64) for one in (samples, scored)]
        return settle_quotas(quotas, wanted, *arrays, np.ones(len(samples), dtype=bool)).tolist()

    balanced = ClassQuotas(balance=True)
    assert settled(balanced, 10, [50, 30, 20], [50, 30, 20]) == [5, 3, 2]
    assert settled(balanced, 4, [10, 10, 10], [10, 10, 10]) == [2, 1, 1], "the remainder goes to the lower class"
    assert settled(balanced, 10, [50, 30, 20], [2, 30, 20]) == [2, 5, 3], "8 left, by 30 : 20, is 4.8 and 3.2"
    assert settled(ClassQuotas(balance=True, least=4), 10, [90, 9, 1], [90, 9, 1]) == [5, 4, 1]
    assert settled(ClassQuotas(least=4), 10, [90, 9, 1], [90, 9, 1]) == [4, 4, 1]
