"""Tar headers → members → samples, grouped as `webdataset.WebDataset` groups them; the data between is not read.

    dogs/0001.jpg       key dogs/0001, extension jpg
    dogs/0001.seg.PNG   the same sample, extension seg.png: the key ends at the file name's first dot
    dogs/README         no extension: skipped, the sample goes on
    __meta__/x.json     metadata: skipped
    dogs/0002.jpg       another key: the next sample begins
    dogs/0001.cls       a key that was there before: a third sample

Python's tarfile ends quietly at a damaged header, and webdataset loses the rest of the shard with it. Here all that
is not a well-formed tar is an error that names the offset.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Final, NoReturn
from zlib import adler32

from dynams_stream import storage
from dynams_stream.errors import DuplicateMemberError, ShardFormatError
from dynams_stream.tar_headers import (
    BLOCK,
    EXTENSIONS,
    FILES,
    LONG_LINK,
    LONG_NAME,
    PAX_GLOBAL,
    PAX_SPARSE,
    SPARSE,
    WITHOUT_DATA,
    Common,
    number,
    pax_fields,
    read_common,
    signed_checksum,
    text,
)

_ZEROS: Final = bytes(BLOCK)
_LOCAL_PIECES: Final = (3 << 10, 64 << 10, 16 << 10)
_REMOTE_PIECES: Final = (64 << 10, 8 << 20, 2 << 20)
"""Least and most bytes of a read, and the gap (bytes) up to which reading on is cheaper than another request."""
_GROWTH: Final = 8
_TAIL_BYTES: Final = 64 << 10
_EXTENSION_HEADER_BYTES: Final = 16 << 20
"""Size of a GNU long name or PAX header at most: it is held in memory."""

_AGAIN: Final = "write the shard again"

_METADATA: Final = re.compile(r"__[^/]*__(?:$|/)")
_SAMPLE_FIELDS: Final = frozenset({"__key__", "__url__", "__local_path__"})
_LOADER_FIELDS: Final = frozenset({"__row__", "__weight__", "__pad__"})
_BAD = "__bad__"

_COMPRESSIONS: Final = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    (b"PK\x03\x04", "zip", "unzip"),
)

Member = tuple[str, int, int, int]
"""Name of a regular file, byte offset of its data, bytes of it, and where its headers begin: that is the first of the
PAX and long-name headers that say something of it alone, as with tarfile's `TarInfo.offset`."""
Sample = tuple[str, dict[str, tuple[int, int]]]
"""Key, and (offset, size) of the data by extension, in the order of the tar."""

_log = logging.getLogger(__name__)


def read_samples(reader: storage.Reader, url: str) -> Iterator[Sample]:
    """The samples of a shard, in order, as webdataset would yield them.

    Args:
        reader: the open shard; only headers are read where members are large.
        url: the shard's name in errors.

    Raises:
        ShardFormatError: compressed, truncated, not a tar, or with members that cannot be read by offset.
        DuplicateMemberError: two members of one sample share an extension.
    """
    return group_members(read_members(Walk(reader, url)), url)


def group_members(members: Iterable[Member], url: str, begun: array[int] | None = None) -> Iterator[Sample]:
    """The samples that a shard's members make.

    Args:
        members: all of them, in the order of the tar.
        url: the shard's name in errors.
        begun: of 64-bit integers; takes where the headers of each sample begin, also of those that `__bad__` drops.

    Raises:
        ShardFormatError, DuplicateMemberError: as `read_samples`.
    """
    current: str | None = None
    found: dict[str, tuple[int, int]] = {}
    row = 0
    for name, offset, size, header in members:
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        if not name.isascii():
            _requiretext(url, name)
        if key != current:
            if current is not None and _is_valid(found):
                yield current, found
                row += 1
            current, found = key, {}
            if begun is not None:
                begun.append(header)
        if extension in found or extension[:2] == "__":
            _require_new(url, row, key, extension, found)
        found[extension] = (offset, size)
    if current is not None and _is_valid(found):
        yield current, found


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member, or None when webdataset skips it; as its `base_plus_ext` has it.

    The key ends at the first dot of the file name. A hidden file (`a/.x`) belongs to the key that is its folder's name,
    slash included, unless that has a dot.
    """
    if name[:2] == "__" and (_METADATA.match(name) or ("/" not in name and name.endswith("__"))):
        return None
    key, found, extension = name.partition(".")
    if "/" not in extension:
        return (key, extension.lower()) if found and key else None
    # Dots in folders: webdataset's expression wants folders within the first line, then one character or more up to the
    # file name's first dot, none of them a dot.
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    line = name.find("\n")
    start = name.rfind("/", 0, dot - 1 if line < 0 else min(dot - 1, line)) + 1
    if dot < 0 or "." in name[start:dot]:
        return None
    return name[:dot], name[dot + 1 :].lower()


def _is_valid(found: dict[str, tuple[int, int]]) -> bool:
    """webdataset drops a sample whose field `__bad__` is set."""
    return _BAD not in found or found[_BAD][1] == 0


def _requiretext(url: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ShardFormatError(
            f"{url}: the member name {name!r} is not UTF-8; write the shard again with UTF-8 names", shard=url
        ) from error


def _require_new(url: str, row: int, key: str, extension: str, found: dict[str, tuple[int, int]]) -> None:
    place = f"{url}, row {row}, key {key!r}"
    if extension in found:
        reason = f"two members with the extension {extension!r}, which webdataset refuses, too"
    elif extension in _SAMPLE_FIELDS:
        reason = f"a member with the extension {extension!r}, which is a field that webdataset sets"
    elif extension in _LOADER_FIELDS:
        raise ShardFormatError(
            f"{place}: a member with the extension {extension!r}, which is a field that the loader sets; rename it and "
            f"{_AGAIN}",
            shard=url,
            row=row,
            key=key,
        )
    else:
        return
    raise DuplicateMemberError(f"{place}: {reason}; rename or remove one and {_AGAIN}", shard=url, row=row, key=key)


# ---- members ---------------------------------------------------------------------------------------------------------


def read_members(walk: Walk, stop: int | None = None) -> Iterator[Member]:
    """The regular files of a tar (USTAR, GNU and PAX), in order, from where the walk stands.

    Ends at the first block of zeros, as tarfile does.

    Args:
        walk: moves on when all is read, so that another call goes on from there.
        stop: read no header that begins here or beyond.

    Raises:
        ShardFormatError: names the offset and what to do.
    """
    common, last = Common(b"", "", 0), b""
    offset, end = walk.offset, walk.require_length()
    walk.stop = stop = end if stop is None else stop
    while offset < stop:
        header = walk.window[offset - walk.start : offset - walk.start + BLOCK]
        if len(header) < BLOCK:
            header = walk.read(offset, BLOCK)
        if header == _ZEROS:
            walk.offset = offset
            walk.finish(offset)
            return
        try:
            rest = header[100:124] + header[156:]
            if rest != last:  # of a shard's headers most differ in name, size, time and checksum alone
                common, last = read_common(rest), rest
            # Adler-32's low half is 1 + the sum of the bytes, modulo a number that 148 bytes cannot reach.
            total = (adler32(header[:148]) & 0xFFFF) - 1 + common.total + 8 * 32
            if number(header[148:156]) != total and number(header[148:156]) != signed_checksum(header):
                walk.refuse_header(offset, header)
            size = number(header[124:136])
            number(header[136:148])  # a time that is none ends the tar for tarfile
        except ValueError:
            walk.refuse_header(offset, header)
        kind, name, first = common.kind, text(header[:100]), offset
        data = offset + BLOCK
        if kind in WITHOUT_DATA or (kind == b"\0" and name.endswith("/")):
            offset = data
            walk.forget_extensions()
            continue
        if kind not in EXTENSIONS:
            name = common.prefix + name
            if walk.extensions or walk.global_path is not None:
                first = offset if walk.first_extension is None else walk.first_extension
                name, size = walk.extend(offset, name, size)
        offset = data + size + -size % BLOCK
        if size < 0 or offset > end:
            walk.refuse_length(data, name, size)
        if kind in FILES:
            yield name, data, size, first
        elif kind in EXTENSIONS:
            walk.add_extension(kind, data, size, name)
    walk.offset = offset
    if offset >= end:
        walk.require_no_extension(offset)


class Walk:
    """Where a walk over the headers stands: the bytes at hand, and the extension headers of the next member.

    Args:
        reader: the open shard; several walks may go over it at once.
        url: its name in errors.
        offset: the header to begin with.
    """

    def __init__(self, reader: storage.Reader, url: str, offset: int = 0):
        self.url = url
        self.offset = offset
        self.stop = reader.size
        """Bytes beyond are left to others."""
        self.window = b""
        self.start = 0
        self.extensions: list[str | dict[str, str]] = []
        """Long names, and PAX headers, of the member to come; in the order of the tar."""
        self.first_extension: int | None = None
        """Offset of the first of them that is about this member alone."""
        self.global_path: str | None = None
        self._size = reader.size
        self._pread = reader.pread
        self._pieces = _LOCAL_PIECES if isinstance(reader, storage.LocalReader) else _REMOTE_PIECES

    @property
    def reaches_on(self) -> bool:
        """Whether what comes next may read differently than in a walk that begins there."""
        return bool(self.extensions) or self.global_path is not None

    # ---- bytes -------------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, which may not lie before those of an earlier call."""
        begin, held = offset - self.start, len(self.window)
        if begin + size > held:
            # Where headers lie close together all is read, in growing pieces; else a little at each header.
            least, most, near = self._pieces
            piece = least if begin - held >= near else min(most, _GROWTH * max(least, held))
            piece = min(piece, self.stop - offset)
            if piece < size:
                piece = size
            if piece > self._size - offset:
                piece = self._size - offset
                if piece < size:
                    self.refuse(
                        offset,
                        f"a header of {size} bytes begins, the file ends after {piece}: it is truncated; "
                        f"download or write it again",
                    )
            self.window = self._pread(offset, piece)
            self.start, begin = offset, 0
        return self.window[begin : begin + size]

    # ---- extension headers -------------------------------------------------------------------------------------------

    def add_extension(self, kind: bytes, offset: int, size: int, name: str) -> None:
        """Keep what a long name or PAX header says of the next member, or of all that follow."""
        if kind == SPARSE:
            self._refuse_sparse(offset - BLOCK, name)
        if size > _EXTENSION_HEADER_BYTES:
            self.refuse(
                offset - BLOCK,
                f"an extension header of {size} bytes, {_EXTENSION_HEADER_BYTES} are allowed; write the shard again",
            )
        content = self.read(offset, size)
        if kind == LONG_NAME:
            self.extensions.append(text(content))
        elif kind == LONG_LINK:
            self.extensions.append({})
        else:
            try:
                fields = pax_fields(content)
            except ValueError as error:
                self.refuse(offset - BLOCK, f"a PAX header that cannot be read ({error}); {_AGAIN}")
            if kind == PAX_GLOBAL:
                self._add_global(offset - BLOCK, fields)
                fields = {}
            elif self.global_path is not None:
                fields = {"path": self.global_path, **fields}
            self.extensions.append(fields)
        if kind != PAX_GLOBAL and self.first_extension is None:
            self.first_extension = offset - BLOCK

    def _add_global(self, offset: int, fields: dict[str, str]) -> None:
        if "path" in fields:
            self.global_path = fields["path"]
        if "size" in fields or any(field.startswith(PAX_SPARSE) for field in fields):
            self.refuse(offset, f"a global PAX header that sets the size of all members; {_AGAIN}")

    def extend(self, offset: int, name: str, size: int) -> tuple[str, int]:
        """Name and size of the member at `offset` after its extension headers, of which the first has the last word."""
        if self.global_path is not None:
            name = self.global_path.rstrip("/")
        for extension in reversed(self.extensions):
            if isinstance(extension, str):
                name = extension
                continue
            if "path" in extension:
                name = extension["path"].rstrip("/")
            if any(field.startswith(PAX_SPARSE) for field in extension):
                self._refuse_sparse(offset, extension.get(f"{PAX_SPARSE}name", name))
            if "size" in extension:
                if not (extension["size"].isascii() and extension["size"].isdigit()):
                    self.refuse(offset, f"the member {name!r} has the PAX size {extension['size']!r}; {_AGAIN}")
                size = int(extension["size"])
        self.forget_extensions()
        return name, size

    def forget_extensions(self) -> None:
        """What they say is for the member before alone."""
        self.extensions.clear()
        self.first_extension = None

    # ---- ends --------------------------------------------------------------------------------------------------------

    def finish(self, offset: int) -> None:
        """The block of zeros that ends the archive."""
        self.require_no_extension(offset)
        tail = self.read(offset, min(_TAIL_BYTES, self._size - offset))
        if tail.strip(b"\0"):
            _log.warning(
                "%s: the tar ends at byte %d, what follows is ignored, as tar and webdataset do; "
                "archives are joined with `tar --concatenate`",
                self.url,
                offset,
            )

    def require_no_extension(self, offset: int) -> None:
        """Refuse an end right after a long name or PAX header."""
        if self.extensions:
            self.refuse(
                offset,
                "the tar ends where the member of an extension header should begin: it is truncated; "
                "download or write it again",
            )

    def require_length(self) -> int:
        """The file's length; refused when no header fits into it."""
        if self._size == 0:
            self.refuse(0, "the file is empty; download or write it again")
        if self._size < BLOCK:
            self.refuse_header(0, self._pread(0, self._size))
        return self._size

    def refuse_length(self, offset: int, name: str, size: int) -> NoReturn:
        """A member whose data, padded to whole blocks, does not fit into the file."""
        self.refuse(
            offset,
            f"the member {name!r} has {size} bytes and its padding, of which the file of {self._size} bytes "
            f"lacks some: it is truncated; download or write it again",
        )

    def refuse_header(self, offset: int, header: bytes) -> NoReturn:
        """A block that is no tar header."""
        if offset == 0:
            for magic, kind, program in _COMPRESSIONS:
                if header.startswith(magic):
                    self.refuse(
                        0, f"compressed with {kind}, so that members cannot be read by offset; run {program} on it"
                    )
            self.refuse(0, f"not a tar file, it begins with {header[:16]!r}; give tar shards in WebDataset layout")
        self.refuse(
            offset,
            f"a block that is no tar header (it begins with {header[:16]!r}): the file is damaged; "
            f"download or write it again",
        )

    def _refuse_sparse(self, offset: int, name: str) -> NoReturn:
        self.refuse(
            offset,
            f"the member {name!r} is a GNU sparse file, whose data is not one range of bytes; "
            f"write the shard again without --sparse",
        )

    def refuse(self, offset: int, reason: str) -> NoReturn:
        """Raise a ShardFormatError."""
        raise ShardFormatError(f"{self.url}, byte {offset}: {reason}", shard=self.url)
