"""Indexes many shards at once: in threads where the network is slow, in processes where Python is.

The processes are started plainly, not by multiprocessing, which would import the user's script again: a script that
indexes without an `if __name__ == "__main__"` would start itself over and over. They end with their input, so that
none outlives a caller that was killed.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import TypeVar

from dynams_stream import energon_index, storage
from dynams_stream.errors import DynamsError, MissingExtraError, UsageError
from dynams_stream.index import IndexedShard, index_shard
from dynams_stream.ordered_map import ordered_thread_map
from pipeline.cores import available_cores
from pipeline.own_python import own_command, own_environment

T = TypeVar("T")
Outcome = IndexedShard | str
"""A shard's index, or why it has none."""

REMOTE_THREADS = 16
BATCH_SHARDS = 16
"""Shards that a process is given at once, at most."""
ALONE_SECONDS = 0.5
"""How long this process works alone before it starts others, which takes them about as long."""


def scan_shards(
    urls: Sequence[str], workers: int | None = None, *, from_energon: bool = False
) -> Iterator[tuple[str, Outcome]]:
    """Index shards; each one's URL and outcome, in order, as they are finished.

    Args:
        urls: absolute paths or URLs.
        workers: shards that are read at once; by default one per core, or 16 when some are remote.
        from_energon: cut them by Energon's index, where there is one, and share the workers among fewer shards.

    Raises:
        DynamsError: when an indexing process was killed.
    """
    remote = any(not storage.is_local(url) for url in urls)
    workers = worker_count(workers, remote=remote)
    ranges = -(-workers // max(1, len(urls))) if from_energon else 0

    def index(url: str) -> Outcome:
        return _outcome(url, ranges)

    if remote:
        yield from zip(urls, ordered_thread_map(workers)(index, urls), strict=True)
        return
    stop = time.monotonic() + ALONE_SECONDS
    waiting = iter(urls)
    for url in waiting:
        yield url, index(url)
        if workers > 1 and time.monotonic() > stop:
            break
    rest = list(waiting)
    if rest:
        yield from zip(rest, _in_processes(rest, workers, ranges), strict=True)


def worker_count(workers: int | None, *, remote: bool) -> int:
    """How many shards to read at once.

    Raises:
        UsageError: for fewer than one.
    """
    if workers is None:
        return REMOTE_THREADS if remote else available_cores()
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    return workers


def _outcome(url: str, ranges: int) -> Outcome:
    """The index of one shard, cut by Energon's into so many ranges at once; of none with 0."""
    return attempt(url, lambda: energon_index.index_shard(url, ranges) if ranges else index_shard(url))


def attempt(url: str, work: Callable[[], T]) -> T | str:
    """What `work` on a shard gives, or why it failed: the other shards go on."""
    try:
        return work()
    except MissingExtraError:
        raise
    except DynamsError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  whatever a file system's client raises, the other shards go on
        return f"{url}: {type(error).__name__}: {error}"


# ---- processes -------------------------------------------------------------------------------------------------------


def _in_processes(urls: Sequence[str], workers: int, ranges: int) -> Iterator[Outcome]:
    size = max(1, min(BATCH_SHARDS, len(urls) // (4 * workers)))
    shards = iter(urls)
    batches = list(iter(lambda: list(islice(shards, size)), []))
    idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    processes = [_Process() for _ in range(min(workers, len(batches)))]
    for process in processes:
        idle.put(process)

    def run(batch: list[str]) -> list[Outcome]:
        process = idle.get()
        try:
            return process.index(batch, ranges)
        finally:
            idle.put(process)

    try:
        yield from chain.from_iterable(ordered_thread_map(len(processes))(run, batches))
    finally:
        for process in processes:
            process.stop()


class _Process:
    """A Python process that indexes the shards named on its input."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C in the terminal reaches the caller alone, who then ends the process.
        self._process = subprocess.Popen(
            own_command("pipeline.shard_scan"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=own_environment(),
            start_new_session=True,
        )

    def index(self, urls: list[str], ranges: int) -> list[Outcome]:
        """The outcomes of `urls`, in order; `ranges` as for `_outcome`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise DynamsError("an indexing process has no pipes; run again with workers=1")
        try:
            stdin.write(json.dumps([urls, ranges]).encode() + b"\n")
            stdin.flush()
            outcomes: list[Outcome] = pickle.load(stdout)  # written by this very program a moment ago
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise DynamsError(
                f"an indexing process ended early (exit status {self._process.wait()}); its messages are above. "
                f"What is indexed is kept: run again, with fewer workers if memory was short"
            ) from error
        return outcomes

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()


def _serve() -> None:
    """Read lines with JSON lists of URLs, and `ranges`, from standard input, answer each with the pickled outcomes."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the caller was killed: nobody wants the answer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not get among the answers
    for line in sys.stdin.buffer:
        urls, ranges = json.loads(line)
        pickle.dump([_outcome(url, ranges) for url in urls], answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve()
