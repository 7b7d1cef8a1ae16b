"""Writes samples as one tar shard, whole or not at all, such that webdataset reads back what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import webdataset

from dynams_stream import storage, tar
from dynams_stream.errors import UsageError


def write_tar(url: str, samples: Iterable[Mapping[str, Any]]) -> tuple[int, str]:
    """Write samples with `__key__` and members (bytes by extension); other keys that begin with `_` are left out.

    Equal samples make equal bytes.

    Returns:
        Bytes of the file, and its SHA-256 in hex.

    Raises:
        UsageError: for a sample that would not be read back as it is.
    """
    with storage.atomic_writer(url) as file:
        hashing = _Hashing(file)
        # GNU tar has no limit on the length of names, and none on sizes
        with webdataset.TarWriter(
            hashing, user="dynams", group="dynams", mtime=0, encoder=False, format="GNU_FORMAT"
        ) as writer:
            for sample in _as_read_back(samples):
                writer.write(sample)
    return hashing.size, hashing.digest.hexdigest()


class _Hashing:
    """What TarWriter needs of a file; counts and hashes what goes through."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size, self.digest = 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self._file.write(data)


def _as_read_back(samples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The samples, each one checked: webdataset must find the same key and extensions in the tar.

    Raises:
        UsageError: names the sample.
    """
    previous = None
    for sample in samples:
        key = sample["__key__"]
        fields = [field for field in sample if not field.startswith("_")]
        wrong = [field for field in fields if tar.split_name(f"{key}.{field}") != (key, field)]
        if wrong or not fields:
            raise UsageError(
                f"a sample with the key {key!r} and the members {fields} would not be read back as it is: a key has no "
                f"dot in its last part and does not look like __this__, and extensions are in lower case"
            )
        if key == previous:
            raise UsageError(f"two samples in a row have the key {key!r}; they would be read back as one")
        previous = key
        yield sample
