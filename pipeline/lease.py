"""One job on a store at a time: a lease that its holder renews, that a dead holder loses, and that a late one has lost.

    control/lease/000001.json, 000002.json, …       the highest number is the newest lease; who, what job, renewed when

Each number is created only if it is absent, so of two jobs that ask at once one gets it, and is written by its holder
alone from then on. A lease can be taken over when it was given back; when its holder is a process of this machine that
is gone; or when nobody renewed it for `EXPIRES` and a little more, since clocks differ. A holder that was paused for so
long finds a higher number when it wakes, and publishes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from dynams_stream import schema, storage
from dynams_stream.errors import LeaseLostError, StoreBusyError, StoreError, UsageError
from dynams_stream.store import Store

logger = logging.getLogger(__name__)

EXPIRES = timedelta(seconds=120)
"""After so long without a sign of its holder a lease may be taken over."""
CLOCKS_DIFFER = timedelta(seconds=60)
RENEW_SECONDS = 20.0
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """A lease as its file has it.

    Attributes:
        number: 1, 2, …; of the newest lease the highest.
        job: what is done, such as "score".
        host, pid: who does it.
        process: tells the process from others that have had its number, on this machine since it was started.
        since, renewed: in UTC.
        given_back: whether the job has ended.
    """

    number: int
    job: str
    host: str
    pid: int
    process: str
    since: str
    renewed: str
    given_back: bool = False

    def __str__(self) -> str:
        return f"{self.job} (process {self.pid} on {self.host}, since {self.since}, last sign of it {self.renewed})"

    @property
    def is_free(self) -> bool:
        """Whether another job may take the lease over."""
        silent = datetime.now(UTC) - datetime.fromisoformat(self.renewed)
        return self.given_back or silent > EXPIRES + CLOCKS_DIFFER or self._is_dead()

    def _is_dead(self) -> bool:
        """Whether its process ran on this machine and is gone; False where that cannot be known."""
        machine, _, started = self.process.rpartition("/")
        mine = _machine()
        return bool(mine) and machine == mine and _start_of(self.pid) != started


OnBusy = Literal["fail", "wait"]


@contextmanager
def store_lease(store: Store, job: str, *, on_busy: OnBusy = "fail") -> Iterator[Lease]:
    """Hold the store's lease for the time of a block. Jobs within a job of this process share it.

    Args:
        store: whose lease.
        job: what is done, for those who find the store busy.
        on_busy: "wait" waits for another job to end, "fail" fails at once.

    Raises:
        StoreBusyError: another job holds the lease; names it.
        UsageError: on_busy is none of the two.
    """
    if on_busy not in ("fail", "wait"):
        raise UsageError(f'on_busy is {on_busy!r}; "fail" or "wait" is needed')
    own = os.getpid(), store.url  # a forked process shares nothing with its parent
    one_at_a_time = _LOCKS.setdefault(own, threading.Lock())
    with one_at_a_time:
        lease = _SHARED.get(own)
        if lease is None:
            lease = _SHARED[own] = _acquire(store, job, on_busy)
        lease.users += 1
    try:
        yield lease
    finally:
        with one_at_a_time:
            lease.users -= 1
            if lease.users == 0:
                del _SHARED[own]
                lease.give_back()


def current_holder(store: Store) -> Holder | None:
    """Who holds the store's lease; None when nobody does."""
    newest = _newest(store)
    return None if newest is None or newest.is_free else newest


class Lease:
    """A lease that this process holds, renewed by a thread until it is given back."""

    def __init__(self, store: Store, holder: Holder):
        self._store, self._holder = store, holder
        self.users = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="dynams-lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Make sure that no other job has taken over; asked right before something is published.

        Raises:
            LeaseLostError: one has.
        """
        newest = max(_numbers(self._store), default=0)
        if newest > self._holder.number:
            raise LeaseLostError(
                f"{self._store.url}: this job gave no sign of itself for more than {EXPIRES.seconds} s; another "
                f"took over: {_read(self._store, newest)}; nothing was published, what was scored is kept: run it again"
            )

    def give_back(self) -> None:
        """Let the next job have it."""
        self._ended.set()
        self._thread.join()
        self._write(given_back=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            self._write(given_back=False)

    def _write(self, *, given_back: bool) -> None:
        said = replace(self._holder, renewed=_now(), given_back=given_back)
        try:
            if max(_numbers(self._store), default=0) <= self._holder.number:
                storage.write_bytes(self._store.path(schema.lease_path(said.number)), _text(said))
        except Exception as error:  # noqa: BLE001 (whatever a store's client raises: the next time may be better)
            logger.warning(f"{self._store.url}: the lease could not be renewed: {error}")


_SHARED: dict[tuple[int, str], Lease] = {}
"""The leases that this process holds, by process and store."""
_LOCKS: dict[tuple[int, str], threading.Lock] = {}


def _acquire(store: Store, job: str, on_busy: OnBusy) -> Lease:
    told = False
    while True:
        newest = _newest(store)
        if newest is None or newest.is_free:
            mine = Holder(
                number=1 if newest is None else newest.number + 1,
                job=job,
                host=socket.gethostname(),
                pid=os.getpid(),
                process=f"{_machine()}/{_start_of(os.getpid())}",
                since=_now(),
                renewed=_now(),
            )
            if _take(store, mine):
                _remove_old(store, mine.number)
                return Lease(store, mine)
            continue  # another job was faster
        if on_busy == "fail":
            raise StoreBusyError(f"{store.url} is busy: {newest}; wait for it to end, or stop it")
        if not told:
            logger.warning(f"{store.url} is busy: {newest}; waiting for it to end")
            told = True
        time.sleep(POLL_SECONDS)


def _take(store: Store, mine: Holder) -> bool:
    """Create a lease's file; whether it is in force then."""
    url = store.path(schema.lease_path(mine.number))
    try:
        storage.create(url, _text(mine))
    except FileExistsError:
        if _read(store, mine.number) != mine:  # else it is ours: a client whose answer was lost has asked twice
            return False
    if max(_numbers(store)) > mine.number:  # others have had the number, given it back and removed it meanwhile
        storage.remove(url)
        return False
    return True


def _remove_old(store: Store, newest: int) -> None:
    """Remove leases that are over; they do no harm where they cannot be removed."""
    try:
        for number in _numbers(store):
            if number < newest:
                storage.remove(store.path(schema.lease_path(number)))
    except Exception as error:  # noqa: BLE001 (the lease is ours already, and has to be given back)
        logger.debug("%s: old leases stay: %r", store.url, error)


# ---- files -----------------------------------------------------------------------------------------------------------


def _numbers(store: Store) -> list[int]:
    names = storage.list_names(store.path(schema.LEASE_FOLDER))
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def _newest(store: Store) -> Holder | None:
    while numbers := _numbers(store):
        holder = _read(store, numbers[-1])
        if holder is not None:
            return holder  # else it was removed in this moment: there is a higher one
    return None


def _read(store: Store, number: int) -> Holder | None:
    url = store.path(schema.lease_path(number))
    try:
        return Holder(**json.loads(storage.read_bytes(url)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{url}: not the JSON of a lease ({error}); remove it when no job runs") from error


def _text(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=2) + "\n").encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- processes -------------------------------------------------------------------------------------------------------


def _machine() -> str:
    """What tells this machine, since it was started, and its space of process numbers from others; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process was started, in ticks since the machine was; "" when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
