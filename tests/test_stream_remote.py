"""SelectedDataset over object stores: same samples, few requests, bounded memory, trouble, the cache, workers."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import stream_stores
from object_server import ObjectServer, Request
from test_stream import expected_order, identity
from test_transport import FakeAzure, PlainServer, azure  # noqa: F401 (a fixture)
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker as torch_worker
from torchdata.stateful_dataloader import StatefulDataLoader

from dynams_stream import members, read_ahead, remote_shards, retries, storage, transport
from dynams_stream.errors import SampleError, ShardChangedError, ShardMissingError, ShardUnreadableError
from dynams_stream.read_ahead import ReadAhead
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.remote_shards import RemoteShards, Wanted
from dynams_stream.sample_cache import SampleCache
from dynams_stream.store import Store
from dynams_stream.stream import SelectedDataset
from pipeline.index_job import build_index

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 calls it
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),  # on machines of two cores
]

COUNTS = (13, 0, 21, 9, 17)
SCHEMES = ("s3", "http", "memory")
QUICK = RemoteOptions(in_flight=8, timeout=5, deadline=20)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A server of shards, and what makes S3 clients go there."""
    folder = tmp_path_factory.mktemp("remote")
    clear = fsspec.get_filesystem_class("s3").clear_instance_cache
    with PlainServer(folder) as server, pytest.MonkeyPatch.context() as patch:
        clear()
        for name, value in server.environment.items():
            patch.setenv(name, value)
        stream_stores.make_shards(folder / "shards", COUNTS)
        yield server
        clear()


@pytest.fixture
def server(started: ObjectServer) -> Iterator[ObjectServer]:
    """The server, well-behaved and with nothing asked yet: an earlier test's requests have come to their end."""
    for each in list(read_ahead._LIVE):
        each.close()
        each.join(time.monotonic() + 5)
    started.requests.clear()
    yield started
    started.faults = lambda request: None
    started.delay, started.etags = 0.0, True


@pytest.fixture(scope="module")
def stores(started: ObjectServer) -> dict[str, Store]:
    """Stores with one round of about half of the samples, by where their shards are; tests only read them."""
    found = {"local": indexed(started, "local", "shards")}
    system = fsspec.filesystem("memory")
    for path in sorted((started.folder / "shards").iterdir()):
        system.pipe_file(f"/remote/shards/{path.name}", path.read_bytes())
    for scheme in SCHEMES:
        found[scheme] = indexed(started, scheme, "shards")
    for store in found.values():
        stream_stores.publish(store, stream_stores.some_rows(store, 0.6))
    started.requests.clear()
    return found


def indexed(server: ObjectServer, scheme: str, folder: str, name: str | None = None) -> Store:
    """A store over the shards of a served folder, that go by a scheme's addresses."""
    roots = {
        "local": str(server.folder),
        "s3": "s3://bucket",
        "http": f"{server.endpoint}/bucket",
        "memory": "memory://remote",
    }
    store = Store(server.folder / f"store-{scheme}-{name or folder.replace('/', '-')}")
    names = sorted(path.name for path in (server.folder / folder).iterdir())
    build_index(store, [f"{roots[scheme]}/{folder}/{each}" for each in names])
    server.requests.clear()
    return store


@pytest.fixture
def own(server: ObjectServer, tmp_path: Path) -> Callable[[str], Store]:
    """Makes a store over shards of its own, which a test may change."""

    def make(scheme: str) -> Store:
        stream_stores.make_shards(server.folder / tmp_path.name, COUNTS)
        return indexed(server, scheme, tmp_path.name)

    return make


@pytest.fixture(scope="module")
def rows(stores: dict[str, Store]) -> list[list[int]]:
    return stream_stores.some_rows(stores["local"], 0.6)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again after hundredths of a second."""
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(retries, "_LONGEST_WAIT", 0.05)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes every read-ahead held, whenever that changed."""
    changes: list[int] = []

    class Watched(ReadAhead):
        _bytes = 0

        @property
        def _held(self) -> int:
            return self._bytes

        @_held.setter
        def _held(self, held: int) -> None:
            self._bytes = held
            changes.append(held)

    monkeypatch.setattr(remote_shards, "ReadAhead", Watched)
    return changes


def pairs(batch: list[Any]) -> list[tuple[int, int]]:
    """A collate function that keeps the samples apart."""
    return [tuple(sample) for sample in batch]


def load(dataset: SelectedDataset, workers: int, method: str | None = "fork", kind: Any = DataLoader) -> Any:
    """A loader of the dataset's (shard, row) pairs, in batches of three."""
    context = method if workers else None
    return kind(dataset, batch_size=3, num_workers=workers, collate_fn=pairs, multiprocessing_context=context)


def flat(batches: Any) -> list[tuple[int, int]]:
    return [sample for batch in batches for sample in batch]


def everything(counts: tuple[int, ...] = COUNTS) -> list[list[int]]:
    return [list(range(count)) for count in counts]


def shards_asked(server: ObjectServer) -> list[str]:
    return [request.path.rsplit("/", 1)[-1] for request in server.ranges()]


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_samples_equal_webdatasets_in_the_order_of_local_ones(
    stores: dict[str, Store], rows: list[list[int]], scheme: str
) -> None:
    theirs = stream_stores.webdataset_samples(stores["local"].dataset().urls)
    urls = stores[scheme].dataset().urls
    dataset = SelectedDataset(stores[scheme], seed=3, remote=QUICK)
    dataset.set_epoch(2)
    found = list(dataset)
    assert [identity(sample) for sample in found] == expected_order(rows, epoch=2, seed=3)
    for sample in found:
        shard, row = identity(sample)
        wanted = {**theirs[shard][row], "__url__": urls[shard], "__row__": row}
        del wanted["__local_path__"]
        assert sample == wanted


@pytest.mark.parametrize("scheme", SCHEMES)
def test_members_far_apart_are_read_one_by_one(
    stores: dict[str, Store], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_GAP_BYTES", 200)  # now a header of 512 bytes is far
    theirs = stream_stores.webdataset_samples(stores["local"].dataset().urls)
    found = list(SelectedDataset(stores[scheme], round=None, remote=RemoteOptions(gap=0)))
    assert [identity(sample) for sample in found] == expected_order(everything())
    for sample in found:
        shard, row = identity(sample)
        assert {name: sample[name] for name in theirs[shard][row] if not name.startswith("__")} == {
            name: data for name, data in theirs[shard][row].items() if not name.startswith("__")
        }


@pytest.mark.parametrize("options", [{"read_ahead": 1}, {"in_flight": 1}, {"longest": 1}, {"gap": 10**9}])
def test_the_options_change_costs_and_nothing_else(
    stores: dict[str, Store], rows: list[list[int]], options: dict[str, int]
) -> None:
    dataset = SelectedDataset(stores["s3"], remote=RemoteOptions(**options)).map(identity)  # type: ignore[arg-type]
    assert list(dataset) == expected_order(rows)


def test_ranks_tails_and_weights_are_as_of_local_shards(own: Callable[[str], Store], server: ObjectServer) -> None:
    store = own("s3")
    rows = stream_stores.some_rows(store, 0.5)
    stream_stores.publish(store, rows, [[shard + row / 64 for row in each] for shard, each in enumerate(rows)])
    local = indexed(server, "local", os.path.basename(os.path.dirname(store.dataset().urls[0])))
    stream_stores.publish(local, rows, [[shard + row / 64 for row in each] for shard, each in enumerate(rows)])
    for tail in ("drop", "pad", "wrap", "keep"):
        for rank in range(4):
            options: dict[str, Any] = {"tail": tail, "rank": rank, "world_size": 4}
            here, there = (list(SelectedDataset(each, **options)) for each in (local, store))
            for sample in [*here, *there]:
                del sample["__url__"]
                sample.pop("__local_path__", None)
            assert here == there


def test_a_state_resumes_after_any_sample(stores: dict[str, Store], rows: list[list[int]]) -> None:
    order = expected_order(rows)
    for taken in (0, 1, 7, len(order) - 1, len(order)):
        dataset = SelectedDataset(stores["s3"], remote=QUICK).map(identity)
        running = iter(dataset)
        before = [next(running) for _ in range(taken)]
        resumed = SelectedDataset(stores["s3"], remote=QUICK).map(identity)
        resumed.load_state_dict(dataset.state_dict())
        assert before + list(resumed) == order


def test_leaving_early_and_beginning_again(stores: dict[str, Store], rows: list[list[int]], held: list[int]) -> None:
    dataset = SelectedDataset(stores["s3"], remote=QUICK).map(identity)
    order = expected_order(rows)
    for number in (0, 1, 20):
        for sample in dataset:
            if sample == order[number]:
                break
    assert list(dataset) == order
    eventually(lambda: held[-1] == 0)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_iterations_may_go_on_at_a_time(stores: dict[str, Store], rows: list[list[int]], held: list[int]) -> None:
    dataset = SelectedDataset(stores["s3"], remote=RemoteOptions(read_ahead=10_000, in_flight=3)).map(identity)
    first, second = iter(dataset), iter(dataset)
    assert [sample for both in zip(first, second, strict=True) for sample in both] == [
        sample for sample in expected_order(rows) for _ in range(2)
    ]
    eventually(lambda: held[-1] == 0)


def test_an_iteration_goes_on_when_another_dataset_is_taken_up(
    own: Callable[[str], Store], server: ObjectServer
) -> None:
    """The reader of the older dataset is closed then, with ranges under way and in its queue."""
    store = own("s3")
    urls = store.dataset().urls
    server.delay = 0.05
    dataset = SelectedDataset(store, remote=RemoteOptions(in_flight=2, gap=0, longest=1)).map(identity)
    running = iter(dataset)
    first = next(running)
    build_index(store, urls[:3])
    dataset.set_epoch(1)
    server.delay = 0.0
    assert list(dataset) == expected_order(everything(COUNTS[:3]), epoch=1)
    assert [first, *running] == expected_order(everything())


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_what_is_told_is_what_the_server_saw(stores: dict[str, Store], server: ObjectServer, scheme: str) -> None:
    dataset = SelectedDataset(stores[scheme], remote=QUICK)
    samples = list(dataset)
    used = sum(len(value) for sample in samples for value in sample.values() if isinstance(value, bytes))
    stats = dataset.stats()
    asked = server.requests
    assert (stats.samples, stats.bytes_used) == (len(samples), used)
    assert (stats.requests, stats.retries, stats.slow_downs) == (len(asked), 0, 0)
    assert stats.bytes_read == sum(request.stop - request.first for request in server.ranges())  # type: ignore[operator]
    assert (stats.bytes_cached, stats.skipped) == (0, 0)
    assert stats.wait_seconds > 0
    assert all(request.if_match for request in asked)
    list(dataset)
    assert dataset.stats().requests == len(server.requests) == 2 * stats.requests


def test_neighbours_are_asked_for_together_over_a_gap(stores: dict[str, Store], server: ObjectServer) -> None:
    options = RemoteOptions(gap=10**6, longest=10**9)
    dataset = SelectedDataset(stores["s3"], shuffle=False, round=None, remote=options)
    assert len(list(dataset)) == sum(COUNTS)
    assert sorted(shards_asked(server)) == ["data-000.tar", "data-002.tar", "data-003.tar", "data-004.tar"]


def test_without_a_gap_nothing_is_read_that_is_not_wanted(
    stores: dict[str, Store], server: ObjectServer, rows: list[list[int]]
) -> None:
    dataset = SelectedDataset(stores["s3"], remote=RemoteOptions(gap=0))
    assert len(list(dataset)) == len(server.requests) == sum(map(len, rows))
    places = sorted((request.path, request.first, request.stop) for request in server.ranges())
    for (path, _, stop), (next_path, first, _) in pairwise(places):
        assert path != next_path or stop <= first  # type: ignore[operator]


def test_long_ranges_are_split_between_samples(stores: dict[str, Store], server: ObjectServer) -> None:
    options = RemoteOptions(gap=10**6, longest=8000)
    dataset = SelectedDataset(stores["s3"], shuffle=False, round=None, remote=options)
    assert len(list(dataset)) == sum(COUNTS)
    sizes = [request.stop - request.first for request in server.ranges()]  # type: ignore[operator]
    assert 15 < len(sizes) < sum(COUNTS)
    assert max(sizes) <= 8000 + 4 * (1500 + 1024)  # a sample that begins before the border is not cut
    assert dataset.stats().bytes_read == sum(sizes)


@pytest.mark.parametrize("in_flight", [1, 5])
def test_many_are_under_way_and_never_more_than_were_allowed(
    stores: dict[str, Store], server: ObjectServer, in_flight: int
) -> None:
    server.most_at_once, server.delay = 0, 0.02
    dataset = SelectedDataset(stores["http"], remote=RemoteOptions(in_flight=in_flight, gap=0))
    began = time.monotonic()
    count = len(list(dataset))
    assert server.most_at_once == in_flight
    if in_flight > 1:
        assert time.monotonic() - began < count * server.delay  # one after the other


def test_bytes_read_ahead_are_bounded(stores: dict[str, Store], server: ObjectServer, held: list[int]) -> None:
    options = RemoteOptions(gap=0, read_ahead=40_000, in_flight=16)
    dataset = SelectedDataset(stores["s3"], round=None, remote=options)
    seen = [identity(sample) for sample in dataset if not time.sleep(0.002)]  # type: ignore[func-returns-value]
    assert seen == expected_order(everything())
    assert 20_000 < max(held) <= 40_000
    eventually(lambda: held[-1] == 0)


def test_the_next_chunk_is_under_way_while_one_is_consumed(stores: dict[str, Store], server: ObjectServer) -> None:
    """A slow consumer waits for next to nothing."""
    server.delay = 0.05
    dataset = SelectedDataset(stores["s3"], round=None, remote=RemoteOptions(gap=0, read_ahead=60_000))
    running = iter(dataset)
    next(running)
    waited = dataset.stats().wait_seconds
    for _ in running:
        time.sleep(0.02)
    assert dataset.stats().wait_seconds - waited < 0.4


# ---- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_shard_that_was_replaced_is_noticed(own: Callable[[str], Store], server: ObjectServer, scheme: str) -> None:
    store = own(scheme)
    url = store.dataset().urls[2]
    path = server.folder / url.split("/")[-2] / url.split("/")[-1]
    path.write_bytes(path.read_bytes()[::-1])
    dataset = SelectedDataset(store, remote=QUICK)
    message = rf"^{re.escape(url)}: row \d+, key '.*': {re.escape(url)}: not the shard that was indexed"
    with pytest.raises(ShardChangedError, match=message) as caught:
        list(dataset)
    assert caught.value.shard == url
    assert caught.value.row is not None
    assert caught.value.key == f"xx/{caught.value.row:04d}" or caught.value.row == 3


def test_a_shard_that_is_replaced_meanwhile_is_noticed(own: Callable[[str], Store], server: ObjectServer) -> None:
    store = own("s3")
    dataset = SelectedDataset(store, shuffle=False, remote=RemoteOptions(gap=0, read_ahead=10_000, in_flight=1))
    running = iter(dataset)
    seen = [identity(next(running)) for _ in range(3)]
    for url in store.dataset().urls:
        path = server.folder / url.removeprefix("s3://bucket/")
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))  # the server's tags tell them apart by time
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        seen.extend(identity(sample) for sample in running)
    assert seen == expected_order(everything(), shuffle=False)[: len(seen)]


def test_a_shard_without_a_version_is_checked_by_size_and_header(
    own: Callable[[str], Store], server: ObjectServer
) -> None:
    server.etags = False
    store = own("http")
    whole = list(SelectedDataset(store, remote=QUICK))
    assert [identity(sample) for sample in whole] == expected_order(everything())
    url = store.dataset().urls[2]
    path = server.folder / url.split("/")[-2] / url.split("/")[-1]
    path.write_bytes(path.read_bytes() + bytes(10240))
    with pytest.raises(ShardChangedError, match=r"not the shard that was indexed \(it was size="):
        list(SelectedDataset(store, remote=QUICK))


def test_checks_are_counted_too(own: Callable[[str], Store], server: ObjectServer) -> None:
    server.etags = False
    store = own("http")
    dataset = SelectedDataset(store, remote=QUICK)
    list(dataset)
    assert dataset.stats().requests == len(server.requests)
    checks = [request for request in server.requests if request.method == "HEAD"]
    assert len(checks) == 4  # one of each shard that has samples


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_missing_shard_is_named(
    own: Callable[[str], Store], stores: dict[str, Store], server: ObjectServer, scheme: str, tmp_path: Path
) -> None:
    if scheme == "memory":
        system = fsspec.filesystem("memory")
        for path in sorted((server.folder / "shards").iterdir()):
            system.pipe_file(f"/remote/{tmp_path.name}/{path.name}", path.read_bytes())
    store = own(scheme)
    url = store.dataset().urls[3]
    if scheme == "memory":
        system.rm_file(url.removeprefix("memory:/"))
    else:
        (server.folder / tmp_path.name / "data-003.tar").unlink()
    with pytest.raises(
        ShardMissingError, match=rf"^{re.escape(url)}: row \d+, key '.*': .*no such file or object"
    ) as it:
        list(SelectedDataset(store, remote=QUICK))
    assert it.value.shard == url


def at_first(*faults: str | float) -> Callable[[Request], str | float | None]:
    """Each second range goes wrong when it is first asked for, in one way after the other, then it is answered well."""
    asked: Counter[tuple[str, int | None]] = Counter()

    def fault(request: Request) -> str | float | None:
        place = (request.path, request.first)
        asked[place] += 1
        if place not in list(asked)[::2] or asked[place] > len(faults):
            return None
        return faults[asked[place] - 1]

    return fault


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("fault", ["503", "500", "429", "short", "clipped", "reset", 0.1])
def test_what_passes_is_tried_again_and_every_sample_arrives_once_and_in_order(
    stores: dict[str, Store],
    rows: list[list[int]],
    server: ObjectServer,
    impatient: None,
    scheme: str,
    fault: str | float,
) -> None:
    server.faults = at_first(fault, fault)
    theirs = stream_stores.webdataset_samples(stores["local"].dataset().urls)
    dataset = SelectedDataset(stores[scheme], remote=RemoteOptions(in_flight=4, gap=0, timeout=5))
    found = list(dataset)
    assert [identity(sample) for sample in found] == expected_order(rows)
    for sample in found:
        shard, row = identity(sample)
        assert all(sample[name] == data for name, data in theirs[shard][row].items() if not name.startswith("__"))
    stats = dataset.stats()
    assert stats.requests == len(server.requests)
    assert stats.retries == stats.requests - len(found)
    assert (stats.retries == 0) == (fault == 0.1)
    assert (stats.slow_downs > 0) == (fault in ("503", "429"))


def test_a_burst_of_everything(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, impatient: None
) -> None:
    server.faults = at_first("503", "short", 0.05, "reset", "500", "clipped")
    dataset = SelectedDataset(stores["s3"], remote=RemoteOptions(in_flight=16, gap=0)).map(identity)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert list(dataset) == expected_order(rows, epoch=epoch)


def test_a_store_that_is_away_for_a_while(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, impatient: None
) -> None:
    until = time.monotonic() + 0.5
    server.faults = lambda request: "503" if time.monotonic() < until else None
    dataset = SelectedDataset(stores["http"], remote=QUICK).map(identity)
    assert list(dataset) == expected_order(rows)
    assert time.monotonic() > until


@pytest.mark.parametrize("fault", ["503", "hang"])
def test_a_store_that_stays_away_is_an_error_in_time(
    stores: dict[str, Store], server: ObjectServer, impatient: None, fault: str
) -> None:
    server.faults = lambda request: fault
    dataset = SelectedDataset(stores["s3"], remote=RemoteOptions(in_flight=4, timeout=0.3, deadline=1))
    began = time.monotonic()
    with pytest.raises(
        ShardUnreadableError, match=r"row \d+, key .* could not be had in 1 s: \d+ requests failed"
    ) as it:
        next(iter(dataset))
    assert it.value.shard == store_url(stores["s3"], it.value.shard)
    assert time.monotonic() - began < 1 + 0.3 + 1


def store_url(store: Store, url: str | None) -> str:
    assert url in store.dataset().urls
    return url


def test_leaving_early_ends_the_tries_of_a_store_that_is_away(
    stores: dict[str, Store], server: ObjectServer, impatient: None
) -> None:
    server.faults = lambda request: "500" if request.number else None
    remote = RemoteOptions(gap=0, in_flight=1, deadline=20)
    running = iter(SelectedDataset(stores["s3"], remote=remote).map(identity))
    next(running)
    running.close()  # type: ignore[attr-defined]
    (ahead,) = (each for each in read_ahead._LIVE if each._running)
    eventually(lambda: ahead._idle == ahead._running)
    asked = len(server.requests)
    time.sleep(0.2)
    assert len(server.requests) == asked


@pytest.mark.parametrize("fault", ["403", "404"])
def test_samples_of_a_shard_that_cannot_be_had_are_replaced(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, impatient: None, fault: str
) -> None:
    lost = "data-002.tar"
    server.faults = lambda request: fault if request.path.endswith(lost) else None
    count = len(rows[2])
    options = RemoteOptions(in_flight=4, deadline=0.2)
    dataset = SelectedDataset(stores["s3"], remote=options, on_error="skip", max_errors=200).map(identity)
    order, found = expected_order(rows), list(dataset)
    assert len(found) == len(order)
    assert [sample for sample in found if sample[0] == 2] == []
    assert [mine for mine, other in zip(found, order, strict=True) if other[0] != 2] == [
        other for other in order if other[0] != 2
    ]
    assert dataset.stats().skipped >= count
    with pytest.raises(SampleError, match="max_errors=3"):
        list(SelectedDataset(stores["s3"], remote=options, on_error="skip", max_errors=3))


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[SampleCache]:
    cache = SampleCache(tmp_path / "cache", 64 << 20)
    yield cache
    cache.close()


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_second_epoch_asks_for_nothing(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, cache: SampleCache, scheme: str
) -> None:
    dataset = SelectedDataset(stores[scheme], remote=QUICK, cache=cache)
    first = list(dataset)
    asked, read = len(server.requests), dataset.stats().bytes_read
    assert dataset.stats().bytes_cached == 0
    dataset.set_epoch(1)
    second = list(dataset)
    assert [identity(sample) for sample in second] == expected_order(rows, epoch=1)
    assert sorted(map(repr, second)) == sorted(map(repr, first))
    assert (len(server.requests), dataset.stats().bytes_read) == (asked, read)
    assert dataset.stats().bytes_cached >= dataset.stats().bytes_used // 2
    another = SelectedDataset(stores[scheme], remote=QUICK, cache=SampleCache(cache.folder, 64 << 20))
    assert list(another) == first
    assert len(server.requests) == asked


def test_a_new_round_asks_only_for_what_is_new(
    own: Callable[[str], Store], server: ObjectServer, cache: SampleCache
) -> None:
    store = own("s3")
    old = [list(range(0, count, 2)) for count in COUNTS]
    new = [sorted({*each[:-1], count - 2}) for each, count in zip(old, COUNTS, strict=True) if count] and [
        sorted({*range(0, count, 2), *range(1, count, 6)}) for count in COUNTS
    ]
    stream_stores.publish(store, old)
    dataset = SelectedDataset(store, remote=RemoteOptions(gap=0), cache=cache).map(identity)
    assert list(dataset) == expected_order(old)
    server.requests.clear()
    stream_stores.publish(store, new)
    dataset.set_epoch(1)
    assert list(dataset) == expected_order(new, epoch=1)
    added = sum(map(len, new)) - sum(map(len, old))
    assert 0 < len(server.requests) == added


def test_a_shard_that_was_indexed_again_is_fetched_again(
    own: Callable[[str], Store], server: ObjectServer, cache: SampleCache, tmp_path: Path
) -> None:
    store = own("s3")
    before = list(SelectedDataset(store, shuffle=False, cache=cache))
    stream_stores.make_shards(server.folder / tmp_path.name, COUNTS, seed=1)
    build_index(store, store.dataset().urls)
    after = list(SelectedDataset(store, shuffle=False, cache=cache))
    theirs = stream_stores.webdataset_samples(
        [str(server.folder / tmp_path.name / f"data-00{n}.tar") for n in range(5)]
    )
    assert [identity(sample) for sample in after] == expected_order(everything(), shuffle=False)
    for sample in after:
        shard, row = identity(sample)
        assert all(sample[name] == data for name, data in theirs[shard][row].items() if not name.startswith("__"))
    assert [sample["cls"] for sample in after] == [sample["cls"] for sample in before]
    assert after != before


def test_samples_of_a_shard_without_a_version_are_not_kept(
    own: Callable[[str], Store], server: ObjectServer, cache: SampleCache, tmp_path: Path
) -> None:
    """It may be written anew, and indexed again, without another fingerprint."""
    server.etags = False
    store = own("http")
    before = list(SelectedDataset(store, shuffle=False, remote=QUICK, cache=cache))
    old = store.dataset()
    row, shard = int(old.counts[2]) - 1, server.folder / tmp_path.name / "data-002.tar"
    data = bytearray(shard.read_bytes())
    place = data.rindex(before[-1 - COUNTS[4] - COUNTS[3]]["cls"])
    data[place : place + 4] = b"7777"
    shard.write_bytes(data)
    build_index(store, old.urls)
    assert store.dataset().fingerprints == old.fingerprints
    dataset = SelectedDataset(store, shuffle=False, remote=QUICK, cache=cache)
    assert {identity(sample): sample for sample in dataset}[2, row]["cls"] == b"7777"
    assert dataset.stats().bytes_cached == 0


def test_a_cache_that_is_too_small_costs_requests_and_nothing_else(
    stores: dict[str, Store], server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SampleCache(tmp_path / "small", 1 << 20)
    monkeypatch.setattr(small, "limit_bytes", 100_000)
    monkeypatch.setattr(small._writing, "_most_pages", 25)
    dataset = SelectedDataset(stores["s3"], round=None, remote=RemoteOptions(gap=0), cache=small).map(identity)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert list(dataset) == expected_order(everything(), epoch=epoch)
    assert sum(COUNTS) < len(server.requests) < 2 * sum(COUNTS)
    assert dataset.stats().bytes_cached > 0


def test_a_cache_that_cannot_be_used_costs_requests_and_nothing_else(
    stores: dict[str, Store],
    rows: list[list[int]],
    server: ObjectServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "samples.sqlite").write_bytes(b"no database" * 1000)
    dataset = SelectedDataset(stores["s3"], remote=QUICK, cache=SampleCache(tmp_path, 1 << 20)).map(identity)
    for _ in range(2):
        assert list(dataset) == expected_order(rows)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: the cache cannot be used (file is not a database); going on without it"
    ]
    assert dataset.stats().requests == len(server.requests)


def test_local_shards_are_not_cached(stores: dict[str, Store], cache: SampleCache, rows: list[list[int]]) -> None:
    assert list(SelectedDataset(stores["local"], cache=cache).map(identity)) == expected_order(rows)
    assert os.listdir(cache.folder) == []


# ---- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_with_a_cache_share_what_they_fetch(
    stores: dict[str, Store],
    rows: list[list[int]],
    server: ObjectServer,
    cache: SampleCache,
    tmp_path: Path,
    method: str,
) -> None:
    options: dict[str, Any] = {"batch_size": 3, "remote": RemoteOptions(gap=6000, in_flight=4), "lanes": 1}
    alone = SelectedDataset(stores["s3"], cache=SampleCache(tmp_path / "alone", 64 << 20), **options).map(identity)
    assert flat(load(alone, 0)) == expected_order(rows, lanes=1)
    wanted = len(server.requests)
    server.requests.clear()
    dataset = SelectedDataset(stores["s3"], cache=cache, **options).map(identity)
    assert flat(load(dataset, 3, method)) == expected_order(rows, lanes=1)
    assert len(server.requests) <= wanted + 3
    assert dataset.stats().requests == len(server.requests)
    assert dataset.stats().bytes_cached > 0
    asked = len(server.requests)
    dataset.set_epoch(1)
    assert flat(load(dataset, 2, "fork")) == expected_order(rows, lanes=1, epoch=1)
    assert len(server.requests) == asked


def test_workers_that_share_leave_no_sample_of_an_incomplete_last_batch_out(
    stores: dict[str, Store], server: ObjectServer, cache: SampleCache
) -> None:
    """60 samples make 8 batches of 7 and one of 4, which is the third worker's."""
    dataset = SelectedDataset(stores["s3"], batch_size=7, round=None, remote=QUICK, cache=cache).map(identity)
    loader = DataLoader(dataset, batch_size=7, num_workers=3, collate_fn=pairs)
    assert flat(loader) == expected_order(everything())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forking_after_the_main_process_has_read(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, scheme: str
) -> None:
    dataset = SelectedDataset(stores[scheme], batch_size=3, remote=QUICK).map(identity)
    assert list(dataset) == expected_order(rows)
    running = iter(dataset)
    before = [next(running) for _ in range(5)]
    assert flat(load(dataset, 2)) == expected_order(rows)
    assert before + list(running) == expected_order(rows)
    if scheme != "memory":
        assert dataset.stats().requests == len(server.requests)


def test_forked_workers_notice_a_shard_that_was_replaced(own: Callable[[str], Store], server: ObjectServer) -> None:
    store = own("http")
    dataset = SelectedDataset(store, batch_size=3, remote=QUICK).map(identity)
    assert len(list(dataset)) == sum(COUNTS)
    url = store.dataset().urls[2]
    path = server.folder / url.split("/")[-2] / url.split("/")[-1]
    path.write_bytes(path.read_bytes()[::-1])
    running = iter(load(dataset, 2))
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        list(running)
    running._shutdown_workers()  # left to the garbage collection, which finds it in a cycle, it takes torch 5 seconds


def test_workers_retry_on_their_own(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, cache: SampleCache, impatient: None
) -> None:
    server.faults = at_first("503", "short", "clipped")
    dataset = SelectedDataset(stores["http"], batch_size=3, remote=QUICK, cache=cache).map(identity)
    assert flat(load(dataset, 3)) == expected_order(rows)
    assert dataset.stats().retries > 0


def test_leaving_early_with_persistent_workers(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, cache: SampleCache
) -> None:
    dataset = SelectedDataset(stores["s3"], batch_size=3, remote=QUICK, cache=cache).map(identity)
    loader = DataLoader(dataset, batch_size=3, num_workers=3, collate_fn=pairs, persistent_workers=True)
    began = time.monotonic()
    for _ in range(3):
        next(iter(loader))
    assert flat(loader) == expected_order(rows)
    assert time.monotonic() - began < remote_shards._PATIENCE


class Alone:
    """This process as one of several workers, the others of which have been killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, workers: int, dataset: SelectedDataset):
        told = torch_worker.WorkerInfo(id=number, num_workers=workers, seed=0, dataset=dataset)
        monkeypatch.setattr(torch_worker, "_worker_info", told)


def shared_samples(store: Store, cache: SampleCache, **options: Any) -> SelectedDataset:
    """A dataset whose workers need parts of the same ranges: whole shards, in their order."""
    remote = RemoteOptions(gap=10**6, longest=10**9)
    return SelectedDataset(store, batch_size=2, shuffle=False, round=None, remote=remote, cache=cache, **options)


def own_share(number: int, workers: int) -> list[tuple[int, int]]:
    order = expected_order(everything(), shuffle=False)
    return [sample for i, sample in enumerate(order) if i // 2 % workers == number]


def test_a_worker_whose_fellows_were_killed_fetches_for_itself(
    stores: dict[str, Store], server: ObjectServer, cache: SampleCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_shards, "_PATIENCE", 0.05)
    dataset = shared_samples(stores["s3"], cache).map(identity)
    Alone(monkeypatch, 1, 2, dataset)
    assert list(dataset) == own_share(1, 2)


def test_a_worker_whose_fellows_were_killed_loses_its_patience_once(
    stores: dict[str, Store], server: ObjectServer, cache: SampleCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_shards, "_PATIENCE", 0.3)
    dataset = shared_samples(stores["s3"], cache).map(identity)
    Alone(monkeypatch, 1, 2, dataset)
    began = time.monotonic()
    assert list(dataset) == own_share(1, 2)
    assert time.monotonic() - began < 2.5  # 28 samples, of 4 ranges


@pytest.mark.parametrize("trouble", ["full", "damaged"])
def test_workers_wait_for_nothing_that_a_cache_does_not_keep(
    stores: dict[str, Store], server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(remote_shards, "_PATIENCE", 0.3)
    cache = SampleCache(tmp_path, 1 << 20)
    if trouble == "full":
        (name,) = cache.ids("another", "dataset", [0])
        cache.put([(name, bytes(900_000))])
        cache.close()
    else:
        (tmp_path / "samples.sqlite").write_bytes(b"no database" * 1000)
    dataset = shared_samples(stores["s3"], cache).map(identity)
    began = time.monotonic()
    assert flat(DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=pairs)) == expected_order(
        everything(), shuffle=False
    )
    assert time.monotonic() - began < 2.5


def test_resumed_workers_share_as_before(
    stores: dict[str, Store], server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_shards, "_PATIENCE", 0.3)
    order = expected_order(everything(), shuffle=False)
    first = shared_samples(stores["http"], SampleCache(tmp_path / "before", 1 << 20)).map(identity)
    loader = StatefulDataLoader(first, batch_size=2, num_workers=2, collate_fn=pairs)
    running = iter(loader)
    before = flat([next(running)])
    state = loader.state_dict()
    del running
    second = shared_samples(stores["http"], SampleCache(tmp_path / "after", 1 << 20)).map(identity)
    resumed = StatefulDataLoader(second, batch_size=2, num_workers=2, collate_fn=pairs)
    resumed.load_state_dict(state)
    began = time.monotonic()
    assert before + flat(resumed) == order
    assert time.monotonic() - began < 2.5


def span_table(random: np.random.Generator, workers: int) -> Wanted:
    """Spans of shard 2 in a random order of need, four to a batch."""
    sizes = random.integers(1, 3, 60) * 512
    offsets = np.cumsum(sizes) - sizes
    kept = random.permutation(np.flatnonzero(random.random(60) < 0.8))
    shards = np.full(len(kept), 2, dtype=np.int64)
    return Wanted(shards, offsets[kept], sizes[kept], np.arange(len(kept)) // 4 % workers)


def test_each_span_is_fetched_by_some_worker_whenever_each_of_them_plans(
    stores: dict[str, Store], server: ObjectServer, tmp_path: Path
) -> None:
    """One worker plans first and fetches all it owns; another one plans after that. Nobody may wait in vain."""
    store, random = stores["s3"], np.random.default_rng(0)
    dataset = store.dataset()
    in_vain = 0
    for trial in range(30):
        wanted = span_table(random, workers=2)
        cache = SampleCache(tmp_path / str(trial), 1 << 20)
        options = RemoteOptions(gap=512, longest=3000, in_flight=4)
        first, second = (RemoteShards(store, dataset, options, cache, lambda **_: None) for _ in range(2))
        early = first.plan(wanted, 0)
        for (shard, offset), holder in list(early.ranges.items()):
            first.pread(shard, offset, holder.spans[offset], early)
        late = second.plan(wanted, 1)
        names = {offset: first._names(2, [offset])[0] for _, offset in {*early.shared, *late.shared}}
        here = cache.present(list(names.values()))
        promised = {offset for holder in late.ranges.values() for offset in holder.others}
        in_vain += sum(names[offset] not in here for _, offset in late.shared)
        in_vain += sum(names[offset] not in here and offset not in promised for _, offset in early.shared)
        second.close()
        first.close()
        cache.close()
    assert in_vain == 0


@pytest.mark.parametrize("why", ["full", "no version"])
def test_a_worker_fetches_nothing_for_others_that_would_not_be_kept(
    stores: dict[str, Store], server: ObjectServer, cache: SampleCache, why: str
) -> None:
    wanted = span_table(np.random.default_rng(1), workers=3)
    if why == "full":
        cache._full_until = time.monotonic() + 60
    store = stores["memory" if why == "no version" else "s3"]
    shards = RemoteShards(store, store.dataset(), RemoteOptions(gap=512, longest=3000), cache, lambda **_: None)
    plan = shards.plan(wanted, 1)
    own = wanted.offsets[wanted.workers == 1].tolist()
    assert plan.shared == {}
    assert sorted(offset for each in plan.fetched for offset in each.spans) == sorted(own)
    assert [each.others for each in plan.fetched] == [{}] * len(plan.fetched)
    shards.close()


# ---- moved copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_moved_copies_are_checked_by_size_and_header(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, tmp_path: Path, scheme: str
) -> None:
    copies = server.folder / f"{tmp_path.name}-copies"
    copies.mkdir()
    for path in (server.folder / "shards").iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    root = "s3://bucket" if scheme == "s3" else f"{server.endpoint}/bucket"
    moved = Store(stores["local"].url, shards_at=f"{root}/{copies.name}")
    dataset = SelectedDataset(moved, remote=RemoteOptions(gap=0))
    found, here = list(dataset), list(SelectedDataset(stores["local"]))
    for sample in here:
        del sample["__local_path__"]
    assert found == here  # the shards keep the names that they were indexed under
    stats = dataset.stats()
    assert stats.requests == len(server.requests)
    assert {request.path.split("/")[2] for request in server.requests} == {copies.name}
    after_check = [each for each in server.ranges() if each.stop != 512 or each.first]
    assert all(request.if_match for request in after_check)  # the version that was checked is the one that is read
    longer = copies / "data-002.tar"
    longer.write_bytes(longer.read_bytes() + bytes(512))
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        list(SelectedDataset(moved))
    data = bytearray((server.folder / "shards" / "data-002.tar").read_bytes())
    data[300] ^= 1
    longer.write_bytes(data)
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        list(SelectedDataset(moved))
    longer.unlink()
    with pytest.raises(ShardMissingError, match="no such file or object"):
        list(SelectedDataset(moved))


def test_a_moved_copy_that_is_replaced_between_check_and_reading_is_noticed(
    stores: dict[str, Store], server: ObjectServer, tmp_path: Path
) -> None:
    copies = server.folder / f"{tmp_path.name}-copies"
    copies.mkdir()
    for path in (server.folder / "shards").iterdir():
        (copies / path.name).write_bytes(path.read_bytes())

    def replaced(request: Request) -> None:
        if request.method == "GET" and (request.first, request.stop) == (0, 512):  # the check of a header
            os.utime(server.folder / request.path.removeprefix("/bucket/"), ns=(request.number, request.number))

    server.faults = replaced
    moved = Store(stores["local"].url, shards_at=f"s3://bucket/{copies.name}")
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        list(SelectedDataset(moved, remote=QUICK))


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_moved_copy_that_may_not_be_read_is_an_error_at_once(
    stores: dict[str, Store], server: ObjectServer, scheme: str
) -> None:
    server.faults = lambda request: "403"
    root = "s3://bucket" if scheme == "s3" else f"{server.endpoint}/bucket"
    moved = Store(stores["local"].url, shards_at=f"{root}/shards")
    began = time.monotonic()
    with pytest.raises(ShardUnreadableError, match=r"cannot be read .*; check its address and the credentials"):
        list(SelectedDataset(moved, remote=QUICK))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_check_that_fails_is_tried_again(
    stores: dict[str, Store], rows: list[list[int]], server: ObjectServer, impatient: None, scheme: str
) -> None:
    server.faults = lambda request: "503" if request.number < 2 else None
    root = "s3://bucket" if scheme == "s3" else f"{server.endpoint}/bucket"
    moved = Store(stores["local"].url, shards_at=f"{root}/shards")
    assert list(SelectedDataset(moved, remote=RemoteOptions(in_flight=1)).map(identity)) == expected_order(rows)


class Changing:
    """A version for each answer, as of an object that is replaced again and again."""

    def __init__(self, server: ObjectServer):
        self._content, self.number = server.content, 0

    def __call__(self, path: str) -> tuple[memoryview, str] | None:
        found = self._content(path)
        self.number += 1
        return None if found is None else (found[0], f'W/"{self.number}"')


def test_answers_of_several_versions_are_not_mixed(
    stores: dict[str, Store], server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ranges of a shard are asked for before any answer has told its version."""
    monkeypatch.setattr(server, "content", Changing(server))
    server.delay = 0.3
    moved = Store(stores["local"].url, shards_at=f"{server.endpoint}/bucket/shards")
    with pytest.raises(
        ShardChangedError, match=r'not the shard that was indexed \(it was W/"\d+", now it is W/"\d+"\)'
    ):
        list(SelectedDataset(moved, remote=RemoteOptions(gap=0, in_flight=64)))


class Weak:
    """Weak tags: `W/"…"`."""

    def __init__(self, server: ObjectServer):
        self._content = server.content

    def __call__(self, path: str) -> tuple[memoryview, str] | None:
        found = self._content(path)
        return None if found is None else (found[0], f"W/{found[1]}")


@pytest.mark.parametrize("way", ["obstore", "fsspec"])
def test_a_replaced_shard_is_noticed_by_its_weak_tag(
    own: Callable[[str], Store], server: ObjectServer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(server, "content", Weak(server))
    if way == "fsspec":
        monkeypatch.setattr(transport, "_used_by", -1)
        monkeypatch.setattr(transport, "_warned", os.getpid())
    store = own("http")
    assert 'etag=W/"' in store.dataset().fingerprints[0]
    assert len(list(SelectedDataset(store, remote=QUICK))) == sum(COUNTS)
    url = store.dataset().urls[2]
    os.utime(server.folder / url.split("/")[-2] / url.split("/")[-1], ns=(1, 1))
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        list(SelectedDataset(store, remote=QUICK))


@pytest.mark.parametrize("fault", ["503", "hang"])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_check_that_keeps_failing_is_an_error_in_time(
    stores: dict[str, Store], server: ObjectServer, impatient: None, scheme: str, fault: str
) -> None:
    """One thread tries, for all that need the shard; it asks as often as the deadline lets it, and no client more."""
    server.faults = lambda request: fault
    root = "s3://bucket" if scheme == "s3" else f"{server.endpoint}/bucket"
    moved = Store(stores["local"].url, shards_at=f"{root}/shards")
    shards = RemoteShards(moved, moved.dataset(), RemoteOptions(timeout=0.3, deadline=0.6), None, lambda **_: None)
    errors: list[BaseException] = []

    def read(row: int) -> None:
        try:
            shards.pread(2, 512 * row, 512)
        except ShardUnreadableError as error:
            errors.append(error)

    began = time.monotonic()
    threads = [threading.Thread(target=read, args=(row,)) for row in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 0.6 + 0.3 + 1
    assert len(errors) == 6
    assert "its description could not be had in 0.6 s" in str(errors[0])


@pytest.mark.parametrize("way", ["forked", "a key with empty parts", "asked by obstore"])
def test_on_azure_a_replaced_shard_is_noticed(
    stores: dict[str, Store],
    azure: FakeAzure,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    folder = "shards//deep" if way == "a key with empty parts" else "shards"
    if way == "forked":
        monkeypatch.setattr(transport, "_used_by", -1)
        monkeypatch.setattr(transport, "_warned", os.getpid())
    for path in map(Path, stores["local"].dataset().urls):
        azure.pipe_file(f"az://container/{folder}/{path.name}", path.read_bytes())
    store = Store(tmp_path / "store")
    build_index(store, [f"az://container/{folder}/{Path(url).name}" for url in stores["local"].dataset().urls])
    shards = RemoteShards(store, store.dataset(), QUICK, None, lambda **_: None)
    if way == "asked by obstore":  # which names the version in each request
        tag = storage.etag_of(store.dataset().fingerprints[2])
        assert shards._etag(2, store.dataset().urls[2], threading.Event()) == tag != ""
        return
    assert list(SelectedDataset(store, remote=QUICK).map(identity)) == expected_order(everything())
    url = store.dataset().urls[2]
    data = bytearray(azure.cat_file(url))
    data[-2000] ^= 1
    azure.pipe_file(url, bytes(data))
    with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
        list(SelectedDataset(store, remote=QUICK))


# ---- a real S3 server ------------------------------------------------------------------------------------------------


def test_on_a_real_s3_server(
    stores: dict[str, Store], rows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    clear = fsspec.get_filesystem_class("s3").clear_instance_cache
    try:
        host, port = moto.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        clear()
        system = fsspec.filesystem("s3", use_listings_cache=False)
        system.mkdir("real-shards")
        for path in map(Path, stores["local"].dataset().urls):
            system.put_file(str(path), f"real-shards/{path.name}")
        store = Store("s3://real-shards/store")
        build_index(store, [f"s3://real-shards/{path.name}" for path in map(Path, stores["local"].dataset().urls)])
        stream_stores.publish(store, rows)
        dataset = SelectedDataset(store, remote=QUICK)
        found, here = list(dataset), list(SelectedDataset(stores["local"]))
        assert [identity(sample) for sample in found] == expected_order(rows)
        assert [sample["cls"] for sample in found] == [sample["cls"] for sample in here]
        assert (dataset.stats().retries, dataset.stats().slow_downs) == (0, 0)
        system.put_file(stores["local"].dataset().urls[0], "real-shards/data-002.tar")
        with pytest.raises(ShardChangedError, match="not the shard that was indexed"):
            list(dataset)
    finally:
        moto.stop()
        clear()
