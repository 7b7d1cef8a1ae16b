"""The cut in one read of each part: the same file as in three, and three reads where a few parts told it wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cut import full_sort, scores_values, selected_rows, write_part, written_fractions

from dynams_stream import class_counts, window_cut
from dynams_stream.class_counts import ClassCounts
from dynams_stream.cut import CutResult, ScorePart, exact_cut
from dynams_stream.cut_part import MOST_CLASSES
from dynams_stream.errors import StoreError
from dynams_stream.ordered_map import ordered_thread_map
from dynams_stream.strategy import Strategy
from pipeline.dask_map import ordered_dask_map

DISTANCE = Strategy.parse("distance")
PARTS = window_cut.LEAST_PARTS


def make_parts(
    folder: Path, scores: Sequence[Sequence[float | None]], labels: Sequence[Sequence[int | None]] | None = None
) -> list[ScorePart]:
    """Parts of one shard each."""
    parts = []
    for number, some in enumerate(scores):
        url = str(folder / f"part-{number:06d}.parquet")
        write_part(url, number, [list(some)], None if labels is None else list(labels[number]))
        parts.append(ScorePart(url, number, number, np.array([len(some)], dtype=np.int64)))
    return parts


def gamma_scores(parts: int = PARTS, samples: int = 200, seed: int = 0) -> list[list[float | None]]:
    """Scores as shuffled shards have them, rounded so that some tie."""
    drawn = np.random.default_rng(seed).gamma(2.0, 1.0, (parts, samples)).round(2)
    return [row.tolist() for row in drawn]


def cut(folder: Path, parts: Sequence[ScorePart], fraction: str = "0.3", **how: Any) -> tuple[CutResult, bytes]:
    destination = folder / "selection.parquet"
    result = exact_cut(parts, fraction=fraction, destination=str(destination), **{"strategy": DISTANCE, **how})
    return result, destination.read_bytes()


def three_reads(folder: Path, parts: Sequence[ScorePart], fraction: str = "0.3", **how: Any) -> tuple[CutResult, bytes]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(window_cut, "LEAST_PARTS", len(parts) + 1)
        return cut(folder, parts, fraction, **how)


@pytest.mark.parametrize("fraction", ["0.001", "0.1", "0.3", "0.5", "0.97", "1"])
def test_one_read_of_each_part_makes_what_three_make(tmp_path: Path, reads: Counter[str], fraction: str) -> None:
    scores = gamma_scores()
    scores[5][7] = scores[40][0] = None
    labels = [[(number + row) % 5 if row % 7 else None for row in range(200)] for number in range(PARTS)]
    parts = make_parts(tmp_path, scores, labels)

    found = cut(tmp_path, parts, fraction)
    assert set(reads) == {part.url for part in parts}
    assert sorted(reads.values()) == [1] * (PARTS - window_cut.SAMPLED_PARTS) + [2] * window_cut.SAMPLED_PARTS

    assert found == three_reads(tmp_path, parts, fraction)
    assert selected_rows(str(tmp_path / "selection.parquet")) == full_sort(scores, fraction)[0]
    assert sum(count["all"] for count in found[0].per_class.values()) == sum(map(len, labels)) - 29 * PARTS


@pytest.mark.parametrize("strategy", ["random:7", "-distance", "distance * 0.5"])
def test_any_order_by_any_number_of_threads(tmp_path: Path, reads: Counter[str], strategy: str) -> None:
    labels = [[1] * 200] * PARTS
    parts = make_parts(tmp_path, gamma_scores(), labels)
    parts[3] = replace(parts[3], excluded=np.array([0, 5, 199], dtype=np.uint32))
    how = {"strategy": Strategy.parse(strategy)}
    expected = three_reads(tmp_path, parts, **how)
    assert expected[0].excluded == 3
    reads.clear()
    for workers in (1, 3):
        assert cut(tmp_path, parts, **how, ordered_map=ordered_thread_map(workers)) == expected
    assert max(reads.values(), default=0) <= 4  # of two cuts


def test_the_largest_key_of_a_random_order_is_a_key(tmp_path: Path, reads: Counter[str]) -> None:
    """Of this seed shard 3, row 5 has 0xFFFFFFFF, which means "not scored" of scores."""
    strategy = Strategy.parse("random:13709802839714891104")
    parts = [ScorePart(None, number, number, np.array([10])) for number in range(PARTS)]
    for fraction, selected in (("0.5", PARTS * 5), ("1", PARTS * 10)):
        found = cut(tmp_path, parts, fraction, strategy=strategy)
        assert found == three_reads(tmp_path, parts, fraction, strategy=strategy)
        assert (found[0].selected, found[0].failed) == (selected, 0)


def test_weights_come_with_it(tmp_path: Path, reads: Counter[str]) -> None:
    parts = make_parts(tmp_path, gamma_scores())
    weights = {"sample_weight": Strategy.parse("distance + 1")}
    assert cut(tmp_path, parts, **weights) == three_reads(tmp_path, parts, **weights)


def test_more_labels_than_classes_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_counts, "MOST_CLASSES", 4)
    parts = make_parts(tmp_path, gamma_scores(), [[row % 5 for row in range(200)]] * PARTS)
    found = cut(tmp_path, parts)
    assert found == three_reads(tmp_path, parts)
    assert not found[0].per_class


def test_tasks_of_a_cluster(tmp_path: Path, client: Client) -> None:
    parts = make_parts(tmp_path, gamma_scores(), [[row % 5 for row in range(200)]] * PARTS)
    expected = cut(tmp_path, parts)
    assert cut(tmp_path, parts, ordered_map=ordered_dask_map(client)) == expected


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=st.lists(st.lists(scores_values, max_size=12), min_size=1, max_size=8),
    fraction=written_fractions,
    sampled=st.integers(1, 4),
    keys=st.integers(1, 20),
    deviations=st.sampled_from([0.0, 5.0]),
    most_bytes=st.sampled_from([20, 100, 1 << 20]),
)
def test_whatever_the_window_the_selection_is_exact(
    tmp_path_factory: pytest.TempPathFactory,
    scores: list[list[float | None]],
    fraction: str,
    sampled: int,
    keys: int,
    deviations: float,
    most_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("window")
    parts = make_parts(folder, scores)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "LEAST_PARTS": 1, "SAMPLED_PARTS": sampled, "SAMPLED_KEYS": keys, "MOST_BYTES": most_bytes,
            "_DEVIATIONS": deviations,
        }.items():  # fmt: skip
            patched.setattr(window_cut, name, value)
        found = cut(folder, parts, fraction)
    assert selected_rows(str(folder / "selection.parquet")) == full_sort(scores, fraction)[0]
    assert found == three_reads(folder, parts, fraction)


def test_parts_that_differ_more_than_the_looked_at_ones_cost_three_more_reads(
    tmp_path: Path, reads: Counter[str]
) -> None:
    spread = np.linspace(0, PARTS - 1, window_cut.SAMPLED_PARTS).astype(int)
    scores = gamma_scores()
    for number in set(range(PARTS)) - set(spread.tolist()):
        scores[number] = [score + 50 for score in scores[number] if score is not None]
    parts = make_parts(tmp_path, scores)
    cut(tmp_path, parts, "0.9")
    assert selected_rows(str(tmp_path / "selection.parquet")) == full_sort(scores, "0.9")[0]
    assert set(reads.values()) == {4, 5}


def test_sorted_parts_are_told_from_the_looked_at_ones(tmp_path: Path, reads: Counter[str]) -> None:
    """Shards of one class each, say: the parts' shares differ, the window is wide, and one read is still enough."""
    values = np.sort(np.random.default_rng(1).gamma(2.0, 1.0, PARTS * 200)).reshape(PARTS, 200)
    scores: list[list[float | None]] = values.tolist()
    parts = make_parts(tmp_path, scores)
    cut(tmp_path, parts)
    assert selected_rows(str(tmp_path / "selection.parquet")) == full_sort(scores, "0.3")[0]
    assert set(reads.values()) == {1, 2}


def test_scores_that_all_tie_are_not_held(tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_cut, "MOST_BYTES", PARTS * 100)
    parts = make_parts(tmp_path, [[1.0] * 50] * PARTS)
    result, _ = cut(tmp_path, parts, "0.5")
    assert (result.ties, result.ties_taken, result.threshold) == (PARTS * 50, PARTS * 25, 1.0)
    assert max(reads.values()) > 3


def test_nothing_is_held_of_more_samples_than_there_is_room_for(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_cut, "MOST_BYTES", PARTS * 50 // 8 - 1)
    cut(tmp_path, make_parts(tmp_path, gamma_scores(samples=50)))
    assert set(reads.values()) == {3}


def test_what_is_held_of_a_part_is_small(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, gamma_scores(samples=1000), [[row % 3 for row in range(1000)]] * PARTS)
    found = window_cut.cut_by_window(parts, DISTANCE, PARTS * 300, map)
    assert found is not None
    assert sum(part.bytes for part in found.parts) < PARTS * 1000 * 1.0  # a bit each, and 12 bytes of some hundredths


def test_lines_of_other_samples_are_refused(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, gamma_scores(samples=20))
    write_part(parts[17].url or "", 16, [[1.0] * 20])
    with pytest.raises(StoreError, match=r"part-000017.*not the samples of part 17"):
        cut(tmp_path, parts)


# ---- counts of classes -----------------------------------------------------------------------------------------------


def counted(labels: Sequence[int]) -> tuple[Any, Any]:
    return np.unique(np.array(labels, dtype=np.int64), return_counts=True)


@given(st.lists(st.tuples(st.lists(st.integers(-5, 20)), st.lists(st.integers(-5, 20))), max_size=6))
def test_counts_of_classes_are_summed(parts: list[tuple[list[int], list[int]]]) -> None:
    counts = ClassCounts()
    for labels, more in parts:
        counts.add(counted([*labels, *more]), counted(labels), counted(more[:2]))
    every = Counter(label for labels, more in parts for label in labels + more)
    selected = Counter(label for labels, more in parts for label in labels + more[:2])
    assert counts.result() == {label: {"all": every[label], "selected": selected[label]} for label in sorted(every)}


def test_too_many_labels_are_no_classes() -> None:
    def labels() -> Iterator[tuple[Any, Any]]:
        yield counted(range(MOST_CLASSES))
        yield counted([MOST_CLASSES])
        yield counted([3])

    counts = ClassCounts()
    for number, some in enumerate(labels()):
        counts.add(some)
        assert len(counts.result()) == (MOST_CLASSES if number == 0 else 0)
