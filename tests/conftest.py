"""Fixtures that several test files share: a small real dataset and a real Dask cluster, each made once a session."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from distributed import Client

from dynams_stream import storage
from dynams_stream.store import Store
from pipeline.cluster import dask_client
from pipeline.index_job import build_index
from pipeline.shards import open_source, write_shards

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder with MNIST; in continuous integration it must be there."""
    if not (SHARED_DATA / "MNIST").is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{SHARED_DATA} holds no MNIST")
        pytest.skip(f"{SHARED_DATA} holds no MNIST")
    return SHARED_DATA


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """scikit-learn's 1,437 training digits in 15 shards."""
    folder = tmp_path_factory.mktemp("digits")
    return write_shards(open_source("digits", "", "train"), folder, prefix="train", samples_per_shard=100)


@pytest.fixture
def digit_store(digit_shards: list[str], tmp_path: Path) -> Store:
    """A fresh store with the digits indexed."""
    store = Store(tmp_path / "store")
    build_index(store, digit_shards)
    return store


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a real local cluster with two worker processes."""
    os.environ["DYNAMS_TEST_MARKER"] = str(tmp_path_factory.mktemp("marker") / "mended")
    with dask_client(workers=2) as connected:
        yield connected
        gc.collect()  # who collects a DataLoader waits for its workers: the client's thread would not hear `close` then


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened by `storage.open_random`, as score tables are."""
    opened: Counter[str] = Counter()
    original = storage.open_random

    def counted(url: str) -> Any:
        opened[url] += 1
        return original(url)

    monkeypatch.setattr(storage, "open_random", counted)
    return opened


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """`s3://…` of a bucket on a real S3 server in this process, to which the environment leads for a module's tests."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with suppress(FileExistsError):  # moto keeps its buckets when a server stops
            fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()
