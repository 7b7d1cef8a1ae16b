"""The grid of `streaming.py`: its cells, and who takes part in which."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

SAMPLES = {1: 200_000, 13: 100_000, 100: 10_000}
FRACTIONS = ("1", "0.3", "0.1", "0.03", "0.01")
WAYS = ("raw", "decode")
PLACES = ("local", "store")
WORKERS = (0, 2)


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        kilobytes, samples: which set.
        place, way, workers: as in `peers.protocol.Job`.
        fraction: γ as it was selected.
    """

    kilobytes: int
    samples: int
    place: str
    way: str
    workers: int
    fraction: str

    @property
    def is_plain(self) -> bool:
        """Raw samples, no workers: where contenders are checked, and the bare loops are bare."""
        return self.way == "raw" and self.workers == 0


@dataclass(frozen=True)
class Entry:
    """A contender: its program, whether it is of the peers' environment, its own format, and where it takes part."""

    name: str
    program: str
    peer: bool = False
    format: str = ""
    places: tuple[str, ...] = PLACES
    ways: tuple[str, ...] = WAYS
    with_workers: bool = True

    def takes_part(self, cell: Cell) -> bool:
        """Whether there is something to measure in a cell."""
        return cell.place in self.places and cell.way in self.ways and (self.with_workers or not cell.workers)


ENTRIES = (
    Entry("ours", "contenders.py"),
    Entry("ours-first", "contenders.py", ways=("raw",), with_workers=False),
    Entry("ours-saving", "contenders.py", places=("store",)),
    Entry("pread", "contenders.py", places=("local",), ways=("raw",)),
    Entry("memory", "contenders.py", ways=("decode",)),
    Entry("obstore", "contenders.py", places=("store",), ways=("raw",), with_workers=False),
    Entry("server", "contenders.py", places=("store",), ways=("raw",), with_workers=False),
    Entry("webdataset", "peers/webdataset_select.py"),
    Entry("mosaic", "peers/mosaic.py", peer=True, format="mosaic"),
    Entry("litdata", "peers/litdata_subset.py", peer=True, format="litdata"),
    Entry(
        "litdata-subset",
        "peers/litdata_subset.py",
        peer=True,
        format="litdata",
        places=("local",),
        ways=("raw",),
        with_workers=False,
    ),
    Entry("energon", "peers/energon.py", peer=True, format="energon", places=("local",)),
)


def full_grid(options: argparse.Namespace) -> list[Cell]:
    """Every cell that the options do not exclude."""
    return [
        Cell(kilobytes, options.samples or SAMPLES[kilobytes], place, way, workers, fraction)
        for kilobytes, place, way, workers, fraction in itertools.product(
            options.sizes, options.places, options.ways, options.workers, options.fractions
        )
    ]


def quick_grid(options: argparse.Namespace) -> list[Cell]:
    """The cells whose figures are promised, on a small set."""
    samples = options.samples or 20_000
    cells = [Cell(13, samples, "local", "raw", 0, fraction) for fraction in ("1", "0.3", "0.1", "0.01")]
    cells.append(Cell(13, samples, "local", "decode", 0, "0.3"))
    cells.append(Cell(13, samples, "store", "raw", 0, "0.3"))
    return cells
