"""The member index: where every sample's members lie, one Parquet file per part.

One line per sample, sorted by (shard, row); each shard starts a row group, so that reading one shard reads the footer
and little more than its own lines. The footer also names the part's shards, since one without samples has no line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynams_stream import schema, storage, tar
from dynams_stream.errors import StoreError
from dynams_stream.own_mutex import OwnMutex

PARTS_AT_MOST = 2000
PARTS_AT_LEAST = 16
"""Small datasets are cut into about so many parts, to feed several workers."""
PART_SAMPLES = 100_000
"""Samples of a part, between the two."""
Member = tuple[str, int, int]
"""Extension, byte offset in the shard, bytes."""
_FOOTER_BYTES: Final = 1 << 20
"""Of footers that are kept, as they are written; in memory they are a dozen times larger."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Every sample of one shard, as flat arrays: members of row r are `starts[r]:starts[r + 1]`.

    Attributes:
        keys: key of each row.
        starts: int64, shape (rows + 1,), position of each row's first member.
        extensions: the distinct extensions, as webdataset yields them (lower case), in order of appearance.
        extension_codes: int32, per member, position in `extensions`.
        offsets: int64, per member, byte offset of its data (not of its header) in the shard.
        sizes: int64, per member, bytes of its data.
    """

    keys: pa.StringArray
    starts: npt.NDArray[np.int64]
    extensions: tuple[str, ...]
    extension_codes: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """How many samples the shard holds."""
        return len(self.starts) - 1

    def members(self, row: int) -> list[Member]:
        """(extension, offset, size) of each member of `row`, in the order of the tar file."""
        return self.members_of(row, row + 1)[0]

    def members_of(self, first: int, stop: int) -> list[list[Member]]:
        """`members` of each of several rows, `stop` not included."""
        edges = self.starts[first : stop + 1].tolist()
        inside = slice(edges[0], edges[-1])
        extensions = [self.extensions[code] for code in self.extension_codes[inside].tolist()]
        every = list(zip(extensions, self.offsets[inside].tolist(), self.sizes[inside].tolist(), strict=True))
        return [every[start - edges[0] : end - edges[0]] for start, end in itertools.pairwise(edges)]


@dataclass(frozen=True, eq=False)
class IndexedShard:
    """What indexing one shard gives.

    Attributes:
        index: its samples and their members.
        bytes: length of the tar.
        fingerprint: identifies the bytes that were indexed (see `storage`).
        repeated_keys: samples whose key another sample of the shard had before; they are kept apart.
        by_energon: whether Energon's index said where the samples begin (see `energon_index`).
    """

    index: ShardIndex
    bytes: int
    fingerprint: str
    repeated_keys: int
    by_energon: bool = False


def index_shard(
    url: str, read_samples: Callable[[storage.Reader, str], Iterator[tar.Sample]] = tar.read_samples
) -> IndexedShard:
    """Index one shard: read its tar headers, not its data.

    Args:
        url: the shard.
        read_samples: how its samples are found.

    Raises:
        ShardMissingError: when it is not there.
        ShardFormatError: when it is compressed, truncated or no tar.
        DuplicateMemberError: when two members of one sample share an extension.
    """
    reader = storage.open_reader(url)
    try:
        fingerprint = storage.fingerprint(reader)  # before the headers: who rewrites the shard meanwhile is found out
        index = _collect(read_samples(reader, url))
        return IndexedShard(index, reader.size, fingerprint, repeated_keys(index))
    finally:
        reader.close()


def repeated_keys(index: ShardIndex) -> int:
    """How many samples have a key that another sample of the shard had before."""
    return len(index) - int(pc.count_distinct(index.keys).as_py())


def _collect(samples: Iterable[tar.Sample]) -> ShardIndex:
    keys: list[str] = []
    extensions: dict[str, int] = {}
    starts, codes, offsets, sizes = array("q"), array("i"), array("q"), array("q")
    for key, members in samples:
        keys.append(key)
        starts.append(len(codes))
        for extension, (offset, size) in members.items():
            codes.append(extensions.setdefault(extension, len(extensions)))
            offsets.append(offset)
            sizes.append(size)
    starts.append(len(codes))
    return ShardIndex(
        keys=pa.array(keys, pa.string()),
        starts=np.array(starts, dtype=np.int64),
        extensions=tuple(extensions),
        extension_codes=np.array(codes, dtype=np.int32),
        offsets=np.array(offsets, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
    )


# ---- parts -----------------------------------------------------------------------------------------------------------


def assign_parts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The part of each shard: runs of consecutive shards with about max(⌈N/2000⌉, min(10⁵, ⌈N/16⌉)) samples.

    A part ends before the shard that would take it further from that length than it is without it. A shard without
    samples never begins a part, so that each part holds samples whenever the dataset does.

    Args:
        counts: int64, samples of each shard.

    Returns:
        int32, for each shard the number of its part, from 0 on.
    """
    total = int(counts.sum())
    length = max(-(-total // PARTS_AT_MOST), min(PART_SAMPLES, -(-total // PARTS_AT_LEAST)))
    parts = np.zeros(len(counts), dtype=np.int32)
    part = held = 0
    for shard, samples in enumerate(counts.tolist()):
        if held and samples and held + samples - length > length - held:
            part, held = part + 1, 0
        parts[shard] = part
        held += samples
    return parts


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_shard_index(url: str, shard: int) -> ShardIndex:
    """One shard's index, out of its part's file; reads the footer and the shard's own row groups.

    Raises:
        StoreError: when the file is missing, is not a member index, or does not hold the shard.
    """
    with _open_index(url) as (file, layout):
        layout.require(url, shard)
        return _shard_index(file.read_row_groups(list(layout.groups(shard)), use_threads=False))


def read_rows(url: str, wanted: Sequence[tuple[int, int, int]]) -> tuple[ShardIndex, list[int]]:
    """Some rows of several shards of a part; reads their row groups only, all at once.

    Args:
        url: the part's file.
        wanted: shard, first row and row after the last, which may lie beyond the shard's end.

    Returns:
        All these rows one after another as if they were one shard's, and where each of `wanted` starts among them, with
        their number at the end.

    Raises:
        StoreError: when the file is missing, is not a member index, or does not hold one of the shards.
    """
    with _open_index(url) as (file, layout):
        for shard, _, _ in wanted:
            layout.require(url, shard)
        places = [layout.groups_of(shard, first, stop) for shard, first, stop in wanted]
        groups = sorted({group for numbers in places for group in numbers})
        table = file.read_row_groups(groups, columns=["key", "members"], use_threads=False)
        lines = [layout.metadata.row_group(group).num_rows for group in groups]
    starts = dict(zip(groups, itertools.accumulate(lines, initial=0), strict=False))
    pieces, cuts = [], [0]
    for (shard, first, stop), numbers in zip(wanted, places, strict=True):
        length = max(0, min(stop, layout.rows[shard - layout.first]) - first)
        if length:
            pieces.append(table.slice(starts[numbers[0]] + first % layout.group_rows, length))
        cuts.append(cuts[-1] + length)
    return _shard_index(pa.concat_tables(pieces) if pieces else table.slice(0, 0)), cuts


def read_part_index(url: str) -> dict[int, ShardIndex]:
    """The index of every shard of a part, keyed by shard number, in order; those without samples included.

    Raises:
        StoreError: when the file is missing or is not a member index.
    """
    with _open_index(url) as (file, layout):
        table = file.read(use_threads=False)
    stops = np.cumsum(layout.rows, dtype=np.int64).tolist()
    return {
        shard: _shard_index(table.slice(stop - length, length))
        for shard, length, stop in zip(layout.shards, layout.rows, stops, strict=True)
    }


@dataclass(frozen=True)
class _Layout:
    """What a part file's footer says: its shards, and where the lines of each are.

    Attributes:
        metadata: the footer.
        first: number of the first shard.
        rows: lines of each shard.
        starts: number of each shard's first row group, and their number at the end.
        group_rows: lines of a row group, but for a shard's last.
    """

    metadata: pq.FileMetaData
    first: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    group_rows: int

    @property
    def shards(self) -> range:
        """The shards' numbers."""
        return range(self.first, self.first + len(self.rows))

    def groups(self, shard: int) -> range:
        """Numbers of a shard's row groups."""
        return range(self.starts[shard - self.first], self.starts[shard - self.first + 1])

    def groups_of(self, shard: int, first: int, stop: int) -> range:
        """Numbers of the row groups that hold rows `first` to `stop` - 1 of a shard."""
        stop = min(stop, self.rows[shard - self.first])
        return self.groups(shard)[first // self.group_rows : -(-stop // self.group_rows)]

    def require(self, url: str, shard: int) -> None:
        """Raise a StoreError unless the file has `shard`."""
        if shard not in self.shards:
            raise StoreError(
                f"{url}: holds shards {self.first} to {self.first + len(self.rows) - 1}, not {shard}; "
                f"index the dataset again"
            )


@contextmanager
def _open_index(url: str) -> Iterator[tuple[pq.ParquetFile, _Layout]]:
    version = storage.version(url)
    if not version:
        raise StoreError(f"{url}: this part of the member index is gone; restore it, or index the dataset again")
    with _FOOTERS_MUTEX.own():
        layout = _FOOTERS.get((url, version))
    try:
        metadata = None if layout is None else layout.metadata
        with (
            storage.open_random(url) as source,
            pq.ParquetFile(source, metadata=metadata, pre_buffer=not storage.is_local(url)) as file,
        ):
            if layout is None:
                layout = _layout(file.metadata, url)
            _keep_footer((url, version), layout)
            yield file, layout
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{url}: cannot be read ({error}); restore it, or remove it and index the dataset again"
        ) from error


_FOOTERS: Final[OrderedDict[tuple[str, str], _Layout]] = OrderedDict()  # a loader comes back for more of a part
_FOOTERS_MUTEX: Final = OwnMutex()


def _keep_footer(name: tuple[str, str], layout: _Layout) -> None:
    with _FOOTERS_MUTEX.own():
        _FOOTERS[name] = layout
        _FOOTERS.move_to_end(name)
        while len(_FOOTERS) > 1 and sum(each.metadata.serialized_size for each in _FOOTERS.values()) > _FOOTER_BYTES:
            _FOOTERS.popitem(last=False)


def _layout(metadata: pq.FileMetaData, url: str) -> _Layout:
    schema.require_format(metadata.metadata, url)
    if schema.SHARDS_KEY not in metadata.metadata or schema.GROUPS_KEY not in metadata.metadata:
        raise StoreError(f"{url}: its footer names no shards, so it is no member index; index the dataset again")
    first, _ = json.loads(metadata.metadata[schema.SHARDS_KEY])
    group_rows, rows = json.loads(metadata.metadata[schema.GROUPS_KEY])
    starts = itertools.accumulate((-(-count // group_rows) for count in rows), initial=0)
    return _Layout(metadata, first, tuple(rows), tuple(starts), group_rows)


def _shard_index(table: pa.Table) -> ShardIndex:
    lists = table["members"].combine_chunks()
    members = lists.flatten()
    extensions = members.field("ext").dictionary_encode()
    return ShardIndex(
        keys=table["key"].combine_chunks(),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lists.value_lengths().to_numpy(), dtype=np.int64)]),
        extensions=tuple(extensions.dictionary.to_pylist()),
        extension_codes=extensions.indices.to_numpy(),
        offsets=members.field("offset").to_numpy(),
        sizes=members.field("size").to_numpy(),
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_part_index(
    store: str, part: int, first: int, shards: Sequence[ShardIndex], named: Collection[str] = ()
) -> str:
    """Write a part's member index, unless the newest dataset version names the same one already.

    A file that only older versions name, or none, is written again: `dynams gc`, which may be about to remove it, finds
    it fresh then and leaves it.

    Args:
        store: folder or URL of the store.
        part: its number.
        first: number of its first shard.
        shards: its shards, in order.
        named: paths of the index files that the newest dataset version names, relative to the store.

    Returns:
        The file's path, relative to the store. It names the content, so that dataset versions can share files.
    """
    path = schema.index_path(part, part_digest(first, shards))
    url = storage.join(store, path)
    if path not in named or not storage.exists(url):
        with storage.atomic_writer(url) as file:
            write_index(file, first, shards)
    return path


def write_index(
    file: BinaryIO, first: int, shards: Sequence[ShardIndex], metadata: Mapping[bytes, bytes] | None = None
) -> None:
    """Write the member index of consecutive shards, the first one numbered `first`, to an open file."""
    footer = {
        **schema.INDEX_SCHEMA.metadata,
        schema.SHARDS_KEY: json.dumps([first, len(shards)]).encode(),
        schema.GROUPS_KEY: json.dumps([schema.INDEX_GROUP_ROWS, [len(index) for index in shards]]).encode(),
        **(metadata or {}),
    }
    with pq.ParquetWriter(
        file,
        schema.INDEX_SCHEMA,
        compression="zstd",
        use_dictionary=["members.list.element.ext"],
        column_encoding=schema.encodings(schema.INDEX_SCHEMA),
        write_page_checksum=True,
        write_statistics=["shard"],  # the footer, read for every shard, is a third shorter without the others
        store_schema=False,
    ) as writer:
        for shard, index in enumerate(shards, first):
            if len(index):
                writer.write_table(_table(shard, index), row_group_size=schema.INDEX_GROUP_ROWS)
        writer.add_key_value_metadata({key.decode(): value.decode() for key, value in footer.items()})


def _table(shard: int, index: ShardIndex) -> pa.Table:
    rows = len(index)
    extensions = pa.DictionaryArray.from_arrays(index.extension_codes, pa.array(index.extensions, pa.string()))
    members = pa.StructArray.from_arrays(
        [extensions.cast(pa.string()), pa.array(index.offsets), pa.array(index.sizes)],
        fields=list(schema.MEMBER_TYPE),
    )
    return pa.table(
        [
            pa.array(np.full(rows, shard, dtype=np.int32)),
            pa.array(np.arange(rows, dtype=np.int32)),
            index.keys,
            pa.ListArray.from_arrays(
                pa.array(index.starts.astype(np.int32)), members, type=schema.INDEX_SCHEMA.field("members").type
            ),
        ],
        schema=schema.INDEX_SCHEMA,
    )


def part_digest(first: int, shards: Sequence[ShardIndex]) -> str:
    """First 12 hex digits of the SHA-256 of all that the shards' indexes say, however it is encoded."""
    digest = hashlib.sha256(json.dumps([schema.FORMAT_VERSION, first, len(shards)]).encode())
    for index in shards:
        keys = "".join(index.keys.to_pylist()).encode()
        key_bytes = np.diff(np.frombuffer(index.keys.buffers()[1], np.int32)[index.keys.offset :][: len(index) + 1])
        digest.update(json.dumps([len(index), len(keys), list(index.extensions)]).encode())
        digest.update(keys)
        digest.update(key_bytes.astype("<i4").tobytes())
        for values, kind in (
            (index.starts, "<i8"), (index.extension_codes, "<i4"), (index.offsets, "<i8"), (index.sizes, "<i8")
        ):  # fmt: skip
            digest.update(values.astype(kind).tobytes())
    return digest.hexdigest()[:12]
