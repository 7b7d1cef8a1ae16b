"""Samples and selected samples of each class, summed over the parts of a dataset."""

from __future__ import annotations

import numpy as np

from dynams_stream.cut_part import MOST_CLASSES, Counts


class ClassCounts:
    """Counts by label; none at all once there are more than `MOST_CLASSES` labels, which are no classes."""

    def __init__(self) -> None:
        self._labels = self._all = self._selected = np.empty(0, dtype=np.int64)
        self._too_many = False

    def add(self, samples: tuple[Counts, Counts], *selected: tuple[Counts, Counts]) -> None:
        """Add distinct labels and how often each occurs: of all samples, and of selected ones in several counts."""
        labels = np.concatenate([samples[0], *(some for some, _ in selected)])
        if self._too_many or not len(labels):
            return
        self._make_room(labels)
        if len(self._labels) > MOST_CLASSES:
            self._labels = self._all = self._selected = np.empty(0, dtype=np.int64)
            self._too_many = True
            return
        for total, (values, counts) in ((self._all, samples), *((self._selected, some) for some in selected)):
            total[np.searchsorted(self._labels, values)] += counts

    def _make_room(self, labels: Counts) -> None:
        places = np.searchsorted(self._labels, labels)
        if len(self._labels) and np.array_equal(self._labels[np.minimum(places, len(self._labels) - 1)], labels):
            return  # all are known, and nothing has to be sorted
        merged = np.union1d(self._labels, labels)
        places = np.searchsorted(merged, self._labels)
        every, selected = np.zeros((2, len(merged)), dtype=np.int64)
        every[places], selected[places] = self._all, self._selected
        self._labels, self._all, self._selected = merged, every, selected

    def result(self) -> dict[int, dict[str, int]]:
        """For each label, ascending, how many samples have it ("all") and how many selected ones ("selected")."""
        columns = zip(self._labels.tolist(), self._all.tolist(), self._selected.tolist(), strict=True)
        return {label: {"all": every, "selected": selected} for label, every, selected in columns}
