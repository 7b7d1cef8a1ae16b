"""Indexing a dataset: expansion of names, resuming, bad shards, publishing; MNIST and the digits in full."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import uuid
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from builders import Entry, indexed_samples, plain_entries, tar_bytes, webdataset_samples
from dynams_stream import schema, storage
from dynams_stream.dataset import Dataset
from dynams_stream.errors import BadShardsError, DynamsError, StoreError, UsageError
from dynams_stream.index import assign_parts, read_part_index
from dynams_stream.store import Store
from pipeline import index_job, shard_scan
from pipeline.index_job import build_index, expand_shards
from pipeline.shards import open_source, write_shards

ROOT = Path(__file__).resolve().parents[1]


def make_shards(folder: Path, count: int, samples: int = 5) -> list[str]:
    """Shards with different numbers of samples; the third one is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    urls = []
    for shard in range(count):
        path = folder / f"train-{shard:06d}.tar"
        path.write_bytes(tar_bytes(plain_entries(0 if shard == 2 else samples + shard)))
        urls.append(str(path))
    return urls


def all_samples(store: Store, dataset: Dataset) -> list[dict[str, object]]:
    """Every sample of a dataset, read by its index, in (shard, row) order."""
    found = {}
    for part in dataset.parts:
        found.update(read_part_index(store.path(part.index_file)))
    assert list(found) == list(range(len(dataset.urls)))
    return [sample for shard, index in found.items() for sample in indexed_samples(dataset.urls[shard], index)]


def contents(store: Store) -> dict[str, bytes]:
    """Every file of a store by its relative path."""
    root = Path(store.url)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---- names -----------------------------------------------------------------------------------------------------------


def test_braces_keep_their_order_and_globs_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make_shards(tmp_path / "data", 12, samples=1)
    (tmp_path / "data" / "notes.txt").write_text("")
    (tmp_path / "data" / "sub.tar").mkdir()
    monkeypatch.chdir(tmp_path)
    assert expand_shards(["data/train-{000003..000001}.tar"]) == [urls[3], urls[2], urls[1]]
    assert expand_shards(["data/train-{000002,000000}.tar"]) == [urls[2], urls[0]]
    assert expand_shards(["data/*.tar"]) == urls
    assert expand_shards(["data/train-00000[0-1].tar", "**/train-00001?.tar"]) == [*urls[:2], *urls[10:]]
    assert expand_shards([urls[5], "./data/../data/train-000004.tar"]) == [urls[5], urls[4]]
    assert expand_shards(["data/train-{000010..000011}.ta*"]) == urls[10:]
    assert expand_shards(["s3://bucket/a-{0..2}.tar"]) == [f"s3://bucket/a-{n}.tar" for n in range(3)]
    assert expand_shards([f"file://{urls[0]}"]) == urls[:1]


def test_lists_name_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make_shards(tmp_path / "data", 4, samples=1)
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("# mine\n\ndata/train-000003.tar\n  data/train-{000000..000001}.tar \n")
    assert expand_shards(["@list.txt", "data/*2.tar"]) == [urls[3], urls[0], urls[1], urls[2]]


def test_a_file_named_like_a_pattern_is_meant_literally(tmp_path: Path) -> None:
    for name in ("a{1,2}.tar", "b[0].tar", "c*.tar"):
        (tmp_path / name).write_bytes(b"")
        assert expand_shards([str(tmp_path / name)]) == [str(tmp_path / name)]


def test_remote_globs_give_whole_urls() -> None:
    place = f"memory://expand-{uuid.uuid4().hex}"
    for name in ("b.tar", "a.tar", "c.txt"):
        fsspec.filesystem("memory").pipe_file(f"{place}/{name}", b"")
    found = expand_shards([f"{place}/*.tar"])
    assert [url.rsplit("/", 1)[-1] for url in found] == ["a.tar", "b.tar"]
    assert all(url.startswith("memory://") and storage.exists(url) for url in found)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "no shards were named"),
        (["*.nothing"], r"nothing matches '\*\.nothing'"),
        (["."], r"'\.' is a folder; name its shards: '.*/\*\.tar'"),
        (["s3://bucket/prefix/"], r"is a folder; name its shards: 's3://bucket/prefix/\*\.tar'"),
        (["a.tar", "./a.tar"], r"1 shards are named more than once, .*/a\.tar"),
        (["a-{0..2.tar"], "has unbalanced braces"),
        (["@gone.txt"], r"the list of shards .*gone\.txt cannot be read"),
        (["@empty.txt"], r"empty\.txt is empty"),
        (["@nested.txt"], "names another list, @empty.txt"),
        (["@binary.txt"], "is not text"),
        ([""], "got an empty path"),
        (["pipe:cat x.tar"], "would run a shell command"),
    ],
)
def test_wrong_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patterns: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n# nothing\n")
    Path("nested.txt").write_text("@empty.txt\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=message):
        expand_shards(patterns)


# ---- indexing --------------------------------------------------------------------------------------------------------


def test_every_sample_is_found_again_by_its_index(tmp_path: Path) -> None:
    urls = make_shards(tmp_path / "shards", 20)
    store = Store(tmp_path / "store")
    seen: list[tuple[int, int]] = []
    report = build_index(store, urls, progress=lambda done, total: seen.append((done, total)))
    expected = [sample for url in urls for sample in webdataset_samples(url)]
    dataset = store.dataset()
    assert all_samples(store, dataset) == expected
    assert (report.published, report.shards, report.samples, report.reused_shards) == (True, 20, len(expected), 0)
    assert report.repeated_keys == 0
    assert report.dataset.digest == dataset.digest
    assert (dataset.version, dataset.urls) == (1, tuple(urls))
    assert dataset.counts.tolist() == [len(webdataset_samples(url)) for url in urls]
    assert dataset.sizes.tolist() == [os.path.getsize(url) for url in urls]
    assert dataset.part_of_shard.tolist() == assign_parts(dataset.counts).tolist()
    assert len(dataset.parts) > 5
    assert seen == [(done, 20) for done in range(21)]
    assert pq.read_table(store.path(schema.dataset_path(1))).schema.equals(schema.DATASET_SCHEMA)
    assert storage.list_names(store.path(schema.INDEXING_FOLDER)) == []


def test_indexing_again_writes_nothing(tmp_path: Path) -> None:
    urls = make_shards(tmp_path / "shards", 4)
    repeated = tmp_path / "shards" / "again.tar"
    repeated.write_bytes(tar_bytes([Entry("a.jpg"), Entry("b.jpg"), Entry("a.cls"), Entry("b.cls")]))
    store = Store(tmp_path / "store")
    first = build_index(store, [*urls, str(repeated)])
    before = {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*")}
    again = build_index(store, [*urls, str(repeated)])
    assert {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*")} == before
    assert (first.published, again.published) == (True, False)
    assert (again.reused_shards, again.samples, again.dataset.version) == (5, first.samples, 1)
    assert first.repeated_keys == again.repeated_keys == 2


def test_another_list_is_another_version_that_reuses_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = make_shards(tmp_path / "shards", 8)
    store, fresh = Store(tmp_path / "store"), Store(tmp_path / "fresh")
    build_index(store, urls[:6])
    Path(urls[4]).write_bytes(tar_bytes(plain_entries(3)))
    read: list[str] = []
    index_shard = shard_scan.index_shard
    monkeypatch.setattr(shard_scan, "index_shard", lambda url: read.append(url) or index_shard(url))
    order = [urls[7], *urls[:5], urls[6]]
    report = build_index(store, order)
    assert read == [urls[7], urls[4], urls[6]]
    assert (report.published, report.reused_shards, report.dataset.version) == (True, 4, 2)
    build_index(fresh, order)
    assert all_samples(store, store.dataset()) == all_samples(fresh, fresh.dataset())
    new = store.dataset()
    assert contents(fresh)[schema.dataset_path(1)] == contents(store)[schema.dataset_path(2)]
    assert new.digest == fresh.dataset().digest
    assert len(store.dataset(1).urls) == 6


def test_a_lost_index_file_is_made_again_without_a_new_version(tmp_path: Path) -> None:
    urls = make_shards(tmp_path / "shards", 6)
    store = Store(tmp_path / "store")
    build_index(store, urls)
    before = contents(store)
    lost = store.dataset().parts[1]
    Path(store.path(lost.index_file)).unlink()
    report = build_index(store, urls)
    assert (report.published, report.reused_shards) == (False, 6 - lost.shards)
    assert contents(store) == before


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_give_the_same_store(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make_shards(tmp_path / "shards", 30)
    Path(urls[7]).write_bytes(b"no tar")
    one, several = Store(tmp_path / "one"), Store(tmp_path / "several")
    good = [url for url in urls if url != urls[7]]
    build_index(one, good, workers=1)
    monkeypatch.setattr(shard_scan, "ALONE_SECONDS", 0.0)
    with pytest.raises(BadShardsError, match=r"1 of 30 shards .*\n.*train-000007\.tar, byte 0: not a tar file"):
        build_index(several, urls, workers=workers)
    report = build_index(several, good, workers=workers)
    assert report.reused_shards == 29
    assert contents(one) == contents(several)
    again = Store(tmp_path / "again")
    build_index(again, good, workers=workers)
    assert contents(again) == contents(one)


def test_a_process_that_dies_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make_shards(tmp_path / "shards", 30)
    monkeypatch.setattr(shard_scan, "ALONE_SECONDS", 0.0)
    start = shard_scan._Process.__init__

    def start_and_kill(self: shard_scan._Process) -> None:
        start(self)
        self._process.kill()

    monkeypatch.setattr(shard_scan._Process, "__init__", start_and_kill)
    with pytest.raises(DynamsError, match=r"an indexing process ended early \(exit status -9\)"):
        build_index(Store(tmp_path / "store"), urls, workers=2)
    monkeypatch.undo()
    assert build_index(Store(tmp_path / "store"), urls).reused_shards == 1


def test_a_script_without_a_main_guard_indexes_once(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", 30)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            from dynams_stream.store import Store
            from pipeline import shard_scan
            from pipeline.index_job import build_index, expand_shards
            shard_scan.ALONE_SECONDS = 0
            print(build_index(Store("store"), expand_shards(["shards/*.tar"]), workers=2).samples)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(Store(tmp_path / "store").dataset().samples)]


def test_remote_shards_into_a_remote_store(tmp_path: Path) -> None:
    place = f"memory://job-{uuid.uuid4().hex}"
    urls = make_shards(tmp_path / "shards", 6)
    remote = [f"{place}/{Path(url).name}" for url in urls]
    for url, copy in zip(urls, remote, strict=True):
        fsspec.filesystem("memory").pipe_file(copy, Path(url).read_bytes())
    store = Store(f"{place}/store")
    report = build_index(store, remote)
    assert [{**sample, "__url__": ""} for sample in all_samples(store, report.dataset)] == [
        {**sample, "__url__": ""} for url in urls for sample in webdataset_samples(url)
    ]
    assert not build_index(store, remote).published
    with pytest.raises(BadShardsError, match=r"1 of 7 shards .*\n.*/gone\.tar: no such file or object"):
        build_index(store, [*remote, f"{place}/gone.tar"])


def test_a_dataset_without_samples_is_published(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([]))
    (tmp_path / "b.tar").write_bytes(tar_bytes([Entry("README")]))
    store = Store(tmp_path / "store")
    report = build_index(store, [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")])
    assert (report.samples, len(report.dataset.parts)) == (0, 1)
    assert all_samples(store, store.dataset()) == []


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(UsageError, match="got 0 shards"):
        build_index(store, [])
    with pytest.raises(UsageError, match="got 2 shards, 1 of them different"):
        build_index(store, [str(tmp_path / "a.tar"), f"{tmp_path}/./a.tar"])
    with pytest.raises(UsageError, match="workers must be at least 1, got 0"):
        build_index(store, make_shards(tmp_path / "shards", 1), workers=0)
    assert contents(store) == {}


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_all_bad_shards_are_listed_at_once_and_the_others_kept(tmp_path: Path) -> None:
    urls = make_shards(tmp_path / "shards", 12)
    good = {url: Path(url).read_bytes() for url in urls}
    Path(urls[1]).unlink()
    Path(urls[3]).write_bytes(b"")
    Path(urls[5]).write_bytes(good[urls[5]][:2000])
    Path(urls[7]).write_bytes(tar_bytes([Entry("a.jpg"), Entry("a.JPG")]))
    Path(urls[9]).unlink()
    Path(urls[9]).mkdir()
    store = Store(tmp_path / "store")
    with pytest.raises(BadShardsError) as caught:
        build_index(store, urls)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("5 of 12 shards cannot be used; nothing was published")
    reasons = ["no such file", "the file is empty", "truncated", "row 0, key 'a': two members", "a folder, not a file"]
    assert len(lines) == 6
    for line, shard, reason in zip(lines[1:], (1, 3, 5, 7, 9), reasons, strict=True):
        assert line.startswith(f"  {urls[shard]}")
        assert reason in line
    assert store.dataset_versions() == []
    Path(urls[9]).rmdir()
    for url in urls:
        if Path(url).exists() and Path(url).read_bytes() == good[url]:
            continue
        Path(url).write_bytes(good[url])
    report = build_index(store, urls)
    assert (report.published, report.reused_shards) == (True, 7)
    assert all_samples(store, store.dataset()) == [sample for url in urls for sample in webdataset_samples(url)]


def test_a_long_list_of_bad_shards_is_cut(tmp_path: Path) -> None:
    with pytest.raises(BadShardsError) as caught:
        build_index(Store(tmp_path / "store"), [str(tmp_path / f"{n:03d}.tar") for n in range(120)])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("120 of 120 shards")
    assert len(lines) == 52
    assert "049.tar" in lines[50]
    assert lines[51] == "  … and 70 more"


def test_a_shard_that_changes_meanwhile_is_a_bad_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make_shards(tmp_path / "shards", 3)
    index_shard = shard_scan.index_shard

    def change_first(url: str) -> object:
        if url == urls[1]:
            Path(url).write_bytes(tar_bytes(plain_entries(9)))
        return index_shard(url)

    monkeypatch.setattr(shard_scan, "index_shard", change_first)
    with pytest.raises(BadShardsError, match=r"train-000001\.tar: changed while it was being indexed"):
        build_index(Store(tmp_path / "store"), urls)


def test_another_job_that_publishes_first_is_an_error(tmp_path: Path) -> None:
    urls = make_shards(tmp_path / "shards", 4)
    store = Store(tmp_path / "store")

    def publish_another(done: int, total: int) -> None:
        if done == 2 and not store.dataset_versions():
            build_index(store, urls[:1])

    with pytest.raises(StoreError, match="another job published a dataset version meanwhile; run again"):
        build_index(store, urls, progress=publish_another)
    assert store.dataset_versions() == [1]
    assert len(store.dataset().urls) == 1
    assert build_index(store, urls).dataset.version == 2


def test_work_that_another_job_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make_shards(tmp_path / "shards", 4)
    store = Store(tmp_path / "store")
    monkeypatch.setattr(index_job, "COMMIT_SECONDS", 0.0)

    def publish_another(done: int, total: int) -> None:
        if (done, total) == (4, 4) and not store.dataset_versions():
            build_index(store, urls[:1])

    with pytest.raises(StoreError, match="another job published a dataset version meanwhile; run again"):
        build_index(store, urls, progress=publish_another)
    assert storage.list_names(store.path(schema.INDEXING_FOLDER)) == []


def test_unfinished_work_that_cannot_be_read_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    urls = make_shards(tmp_path / "shards", 4)
    store = Store(tmp_path / "store")
    monkeypatch.setattr(index_job, "COMMIT_SECONDS", 0.0)
    with pytest.raises(BadShardsError):
        build_index(store, [*urls, str(tmp_path / "gone.tar")])
    names = storage.list_names(store.path(schema.INDEXING_FOLDER))
    assert len(names) == 4
    Path(store.path(f"{schema.INDEXING_FOLDER}/{names[0]}")).write_bytes(b"broken")
    assert build_index(store, urls).reused_shards == 3
    assert "its shards are indexed again" in caplog.text
    assert all_samples(store, store.dataset()) == [sample for url in urls for sample in webdataset_samples(url)]


KILLED = """
import os, signal, sys
from pathlib import Path
from dynams_stream import storage
from dynams_stream.store import Store
from pipeline import index_job, shard_scan
index_job.COMMIT_SECONDS = shard_scan.ALONE_SECONDS = 0
calls, workers = int(sys.argv[1]), int(sys.argv[2])
def count(event, arguments):
    global calls
    if event in ("open", "os.rename", "os.link", "os.remove") and sys.argv[3] in str(arguments[0]):
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
urls = sorted(str(path) for path in Path(sys.argv[4]).glob("*.tar"))
report = index_job.build_index(Store(sys.argv[3]), urls, workers=workers)
print(report.reused_shards, calls)
"""
"""Indexes, and kills itself at the n-th operation on the store's files."""


def run_killed(calls: int, workers: int, store: Path, shards: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(calls), str(workers), str(store), str(shards)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_with_the_same_store(tmp_path: Path) -> None:
    """SIGKILL at operations spread over the whole run, then once more: always the same bytes."""
    urls = make_shards(tmp_path / "shards", 8)
    build_index(Store(tmp_path / "undisturbed"), urls)
    expected = contents(Store(tmp_path / "undisturbed"))
    whole = run_killed(10**6, 1, tmp_path / "whole", tmp_path / "shards")
    assert whole.returncode == 0, whole.stderr
    assert contents(Store(tmp_path / "whole")) == expected
    operations = 10**6 - int(whole.stdout.split()[1])
    reused = []
    for calls in np.linspace(1, operations, 14, dtype=int).tolist():
        store = Store(tmp_path / f"killed-{calls}")
        killed = run_killed(calls, 1, tmp_path / f"killed-{calls}", tmp_path / "shards")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        versions = store.dataset_versions()
        report = build_index(store, urls)
        assert report.published is (versions == [])
        reused.append(report.reused_shards)
        found = contents(store)
        leftovers = {name for name in found if name.endswith(".tmp")}
        assert not leftovers or versions, "only a run that finds all published leaves a dead one's files"
        assert {name: data for name, data in found.items() if name not in leftovers} == expected
    assert reused == sorted(reused)
    assert reused[0] == 0
    assert reused[-1] == 8
    assert len(set(reused)) > 4


def test_indexing_processes_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    urls = make_shards(tmp_path / "shards", 40)
    killed = run_killed(12, 2, tmp_path / "store", tmp_path / "shards")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # It came back, so nobody holds its pipes any more: the processes it had started are gone, too.
    report = build_index(Store(tmp_path / "store"), urls)
    assert report.published
    assert report.reused_shards > 0


# ---- real data -------------------------------------------------------------------------------------------------------


def test_the_digits_in_full(tmp_path: Path) -> None:
    digits = load_digits()
    seen: list[tuple[bytes, int]] = []
    for split, count in (("train", 1437), ("test", 360)):
        urls = write_shards(open_source("digits", "", split), tmp_path / split, prefix=split, samples_per_shard=100)
        store = Store(tmp_path / f"store-{split}")
        report = build_index(store, urls)
        assert report.samples == count
        found = all_samples(store, report.dataset)
        assert found == [sample for url in urls for sample in webdataset_samples(url)]
        assert [sample["__key__"] for sample in found] == [f"{row:06d}" for row in range(count)]
        for sample in found:
            image = Image.open(BytesIO(sample["png"]))
            assert (image.mode, image.size) == ("L", (8, 8))
            seen.append((np.asarray(image).tobytes(), int(sample["cls"])))  # type: ignore[call-overload]
    expected = [
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    assert sorted(seen) == sorted(expected)


@pytest.mark.slow
def test_mnist_in_full(tmp_path: Path, mnist_root: Path) -> None:
    urls = write_shards(open_source("mnist", mnist_root, "train"), tmp_path / "mnist", samples_per_shard=4000)
    store = Store(tmp_path / "store")
    report = build_index(store, urls)
    assert (report.shards, report.samples, report.repeated_keys) == (15, 60_000, 0)
    assert report.dataset.counts.tolist() == [4000] * 15
    truth = torchvision.datasets.MNIST(mnist_root, train=True, download=False)
    indexes = {}
    for part in report.dataset.parts:
        indexes.update(read_part_index(store.path(part.index_file)))
    for position in random.Random(0).sample(range(60_000), 400):
        shard, row = divmod(position, 4000)
        members = {extension: place for extension, *place in indexes[shard].members(row)}
        reader = storage.open_reader(urls[shard])
        image, label = truth[position]
        assert indexes[shard].keys[row].as_py() == f"{position:06d}"
        assert int(reader.pread(*members["cls"])) == label
        assert Image.open(BytesIO(reader.pread(*members["png"]))).tobytes() == image.tobytes()
    labels = []
    for shard, index in indexes.items():
        reader = storage.open_reader(urls[shard])
        labels += [int(reader.pread(*index.members(row)[0][1:])) for row in range(len(index))]
    assert labels == truth.targets.tolist()
    assert indexed_samples(urls[7], indexes[7]) == webdataset_samples(urls[7])
