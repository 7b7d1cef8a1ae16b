"""What the contenders of `streaming.py` have in common: the job they are told, the loop that is timed, their answers.

A contender is a program of its own. `PROGRAM prepare FOLDER` makes its own format from a set's shards; `PROGRAM JOB`
answers each line of its standard input with a line of JSON:

    open γ  →  {"version": …, "reads": …}      another round of the set; what follows streams it
    check   →  {"found": …, "expected": …, …}  one epoch, every member of every sample read and summed up, no clock
    warm    →  {}                              at most a second of what is timed, not timed
    run     →  {"rate": …, "streamed": …, "seconds": …, "epochs": …, …}

A run is whole epochs, one after another, until `Job.seconds` have passed; after `Job.limit` seconds it ends in the
middle of an epoch. Its rate is samples over seconds by the wall clock, everything that an epoch's start costs included.
Contenders that begin each run with an empty cache have at least `WITH_EMPTY_CACHE` seconds: their first samples come
late, the others fast.
What happens to each sample is the same for all contenders:

    no workers, raw      nothing: the sample's members are there as bytes
    no workers, decode   `torchvision.io.decode_jpeg` to RGB, uint8, in the loop
    workers, raw         lists of `BATCH` samples come from torch DataLoader workers, or the contender's own loader's
    workers, decode      the workers decode, and stack `BATCH` images to one tensor

This file knows no contender, and needs nothing but numpy, torch and torchvision: it runs in the peers' environments.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg

BATCH = 64
MEMBERS = ("jpg", "cls", "json")
WITH_EMPTY_CACHE = 20.0
SETTLING = 20.0  # seconds at most
_NAP = 0.2
_BLOCK = 16  # samples between two looks at the clock


@dataclass(frozen=True)
class Job:
    """What a contender is to do.

    Attributes:
        contender: its name, for programs that hold several.
        folder: the set's folder; its name is the set's.
        place: "local", or "store" for shards (and own formats) behind the object server.
        way: "raw" or "decode".
        workers: DataLoader workers.
        seconds, limit: how long a run lasts, at least and at most.
        endpoint: the object server's address; set `environment` of it for S3 clients.
        server: the object server's process id.
        scratch: an empty folder, for caches.
    """

    contender: str
    folder: str
    place: str
    way: str
    workers: int
    seconds: float
    limit: float
    endpoint: str = ""
    server: int = 0
    scratch: str = ""

    def dumps(self) -> str:
        """The job as one argument."""
        return json.dumps(asdict(self))

    @property
    def shards(self) -> list[str]:
        """The local shards."""
        return sorted(str(path) for path in (Path(self.folder) / "shards").glob("*.tar"))

    def served(self, scheme: str, path: str) -> str:
        """The URL of a path below the set's folder at the object server, as "http" or "s3"."""
        root = f"{self.endpoint}/bucket" if scheme == "http" else "s3://bucket"
        return f"{root}/{Path(self.folder).name}/{path}"


class Plan:
    """The samples of a round, in the order in which `SelectedDataset` streams its epoch 1.

    Attributes:
        round: the store's round.
        check: what `Contender.checksum` has to give.
        numbers: int64, each sample's number in the set.
        spans: int64, shape (n, 3): shard, first byte and number of bytes from the first member to the last.
        bounds: int64, shape (n, 6): where the three members begin and end in the span.
    """

    def __init__(self, job: Job, fraction: str):
        with np.load(Path(job.folder) / "plans" / f"{job.place}-{fraction}.npz") as file:
            lines = file["spans"]
            self.round = int(file["round"])
            self.check = int(file["check"])
        self.numbers = lines[:, 0]
        self.spans = lines[:, 1:4]
        self.bounds = lines[:, 4:]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def in_storage_order(self) -> list[int]:
        """The samples' numbers, ascending: the order that is cheapest to read."""
        return sorted(self.numbers.tolist())


def decode(content: bytes) -> torch.Tensor:
    """A JPEG as an RGB image, uint8, channels first."""
    return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), mode=ImageReadMode.RGB)


class Contender:
    """One way to stream a selection. Subclasses give `stream`, and say in their docstring what they do and why so.

    Attributes:
        version: of the package that is measured.
        reads: how it reads, in a few words.
        caches: whether each run begins with an empty cache.
    """

    version = ""
    reads = ""
    caches = False

    def __init__(self, job: Job, plan: Plan):
        self.job = job
        self.plan = plan

    # ---- what a contender is -----------------------------------------------------------------------------------------

    def stream(self, epoch: int) -> Iterable[Any]:
        """One epoch: samples without workers, batches with them."""
        raise NotImplementedError

    def members(self, sample: Any) -> Sequence[bytes]:
        """The three members of a sample."""
        return [sample[name] for name in MEMBERS]

    def jpg(self, sample: Any) -> bytes:
        """The image's bytes."""
        content: bytes = sample["jpg"]
        return content

    def reset(self) -> None:
        """Called before each run, outside its clock."""

    def facts(self) -> dict[str, Any]:
        """What else is to be known of the last run."""
        return {}

    def costs(self) -> dict[str, Any]:
        """What the epochs so far have cost; asked when all of them were whole."""
        return {}

    # ---- what is timed -----------------------------------------------------------------------------------------------

    def once(self, epoch: int, deadline: float) -> int:
        """One epoch, or its part before the deadline; returns how many samples there were."""
        items = iter(self.stream(epoch))
        if self.job.workers:
            return self._batches(items, deadline)
        return (self._images if self.job.way == "decode" else self._samples)(items, deadline)

    @staticmethod
    def _samples(items: Iterator[Any], deadline: float) -> int:
        count, before = 0, -1
        while count != before and time.perf_counter() < deadline:
            before = count
            for _ in itertools.islice(items, _BLOCK):
                count += 1
        return count

    def _images(self, items: Iterator[Any], deadline: float) -> int:
        count = 0
        for sample in items:
            decode(self.jpg(sample))
            count += 1
            if time.perf_counter() >= deadline:
                break
        return count

    @staticmethod
    def _batches(items: Iterator[Any], deadline: float) -> int:
        count = 0
        for batch in items:
            count += len(batch)
            if time.perf_counter() >= deadline:
                break
        return count

    def checksum(self) -> int:
        """The sum of the CRC-32 of all members of all samples of an epoch: the same in any order."""
        return sum(zlib.crc32(content) for sample in self.stream(0) for content in self.members(sample))

    # ---- DataLoaders -------------------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch: a list of raw samples, or one tensor of images."""
        if self.job.way == "raw":
            return list(samples)
        return torch.stack([decode(self.jpg(sample)) for sample in samples])

    def loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """torch's DataLoader over a dataset, the same for all."""
        return DataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=self.job.workers,
            collate_fn=self.collate,
            persistent_workers=True,
            **options,
        )


class Rows(Dataset[Any]):
    """A map-style dataset of `read(i)` for the given i, in that order."""

    def __init__(self, read: Callable[[int], Any], numbers: Sequence[int]):
        self._read = read
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Any:
        return self._read(self._numbers[place])


# ---- serving ---------------------------------------------------------------------------------------------------------


def serve(make: Callable[[Job, Plan], Contender], prepare: Callable[[Path], None] | None = None) -> None:
    """The main program of a contender."""
    answers = _own_stdout()
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    torch.set_num_threads(1)
    if sys.argv[1] == "prepare":
        assert prepare is not None
        prepare(Path(sys.argv[2]))
        return
    job = Job(**json.loads(sys.argv[1]))
    epochs = itertools.count(1)
    contender: Contender | None = None
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "open":
            if contender is not None:
                vars(contender).clear()  # ends its workers; the garbage collector would have them wait for ten seconds
            contender = make(job, Plan(job, *arguments))
        _answer(answers, _done(command, contender, epochs))


def _done(command: str, contender: Contender, epochs: Iterator[int]) -> dict[str, Any]:
    """Do what a line of the input says, and what to answer."""
    if command == "open":
        return {"version": contender.version, "reads": contender.reads}
    if command == "run":
        return run(contender, epochs)
    contender.reset()
    if command == "check":
        return {"found": contender.checksum(), "expected": contender.plan.check, **contender.costs()}
    contender.once(next(epochs), time.perf_counter() + min(1.0, contender.job.limit))
    return {}


def run(contender: Contender, epochs: Iterator[int]) -> dict[str, Any]:
    """Time one run."""
    job = contender.job
    limit = max(job.limit, WITH_EMPTY_CACHE) if contender.caches else job.limit
    contender.reset()
    samples = done = 0
    began, busy = time.perf_counter(), time.process_time()
    while True:
        samples += contender.once(next(epochs), began + limit)
        done += 1
        seconds = time.perf_counter() - began
        if seconds >= job.seconds or contender.caches:
            break
    if seconds >= limit:
        settle()
    return {
        "rate": samples / seconds,
        "streamed": samples,
        "seconds": round(seconds, 4),
        "processor_seconds": round(time.process_time() - busy, 4),  # of this process, its workers not among it
        "epochs": done,
        **contender.facts(),
    }


def settle() -> None:
    """Wait until what an epoch that was cut short has left under way is over: it would cost the next contender time."""
    deadline, quiet = time.monotonic() + SETTLING, 0
    while quiet < 2 and time.monotonic() < deadline:
        before = _busy_seconds()
        time.sleep(_NAP)
        quiet = quiet + 1 if _busy_seconds() - before < 0.1 * _NAP else 0


def _busy_seconds() -> float:
    """Processor time of this process and its workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _own_stdout() -> int:
    """A file descriptor for answers; what libraries print goes to standard error from here on."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def _answer(answers: int, content: dict[str, Any]) -> None:
    os.write(answers, json.dumps(content).encode() + b"\n")


# ---- reading the shards ----------------------------------------------------------------------------------------------


def all_samples(folder: Path) -> Iterator[dict[str, bytes]]:
    """All samples of a set in storage order, to make another format of."""
    import webdataset as wds

    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    for sample in wds.WebDataset(shards, shardshuffle=False, empty_check=False):
        yield {name: sample[name] for name in MEMBERS}
