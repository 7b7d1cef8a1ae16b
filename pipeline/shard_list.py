"""From what a user writes to the shards it means: braces, globs and lists."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from braceexpand import braceexpand

from dynams_stream import schema, storage
from dynams_stream.errors import UsageError
from dynams_stream.store import Store

_MAGIC = frozenset("*?[")


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """The shards that `patterns` name, as absolute paths and URLs.

    A pattern is a path or URL; with braces (`train-{000000..000099}.tar`, in that order), with `*`, `?`, `[…]` and `**`
    (sorted), or `@list.txt`: a file with one pattern a line, blank lines and those that begin with `#` left out. A
    file that is really named like a pattern is meant literally.

    Raises:
        UsageError: for a pattern without a match, a folder, a shard that is named twice, or no pattern at all.
    """
    shards = [shard for pattern in patterns for shard in _expand(pattern)]
    if not shards:
        raise UsageError("no shards were named; give paths, URLs, 'train-{000000..000099}.tar', globs or @list.txt")
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise UsageError(f"{len(twice)} shards are named more than once, {twice[0]} for one; name each shard once")
    return shards


def remember_shards(store: Store, patterns: Sequence[str]) -> None:
    """Keep how the shards were named, for `remembered_shards`."""
    absolute = [
        "@" + storage.absolute(each[1:]) if each.startswith("@") else storage.absolute(each) for each in patterns
    ]
    url, text = store.path(schema.SHARDS_FILE), (json.dumps(absolute, indent=2) + "\n").encode()
    if not storage.exists(url) or storage.read_bytes(url) != text:
        storage.write_bytes(url, text)


def remembered_shards(store: Store) -> list[str]:
    """The patterns that the shards were named by when they were indexed last.

    Raises:
        UsageError: they are not known.
    """
    try:
        patterns = json.loads(storage.read_bytes(store.path(schema.SHARDS_FILE)))
    except FileNotFoundError:
        patterns = []
    except ValueError as error:
        raise UsageError(
            f"{store.path(schema.SHARDS_FILE)} cannot be read ({error}); name the shards once, with --refresh"
        ) from error
    if not isinstance(patterns, list) or not patterns:
        raise UsageError(f"{store.url} does not know how its shards were named; name them once, with --refresh")
    return [str(pattern) for pattern in patterns]


def _expand(pattern: str) -> Iterator[str]:
    if pattern.startswith("@"):
        for line in _lines(pattern[1:]):
            yield from _expand(line)
        return
    if os.path.isfile(pattern):
        yield storage.absolute(pattern)
        return
    for name in _braces(pattern):
        if _MAGIC & set(name):
            yield from _matches(name)
        else:
            yield _plain(name)


def _lines(name: str) -> list[str]:
    url = storage.absolute(name)
    try:
        lines = storage.read_bytes(url).decode().splitlines()
    except OSError as error:
        raise UsageError(f"the list of shards {url} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the list of shards {url} is not text; @ takes a file with one shard a line") from error
    patterns = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    nested = [line for line in patterns if line.startswith("@")]
    if nested:
        raise UsageError(f"the list of shards {url} names another list, {nested[0]}; name that one yourself")
    if not patterns:
        raise UsageError(f"the list of shards {url} is empty")
    return patterns


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise UsageError(f"{pattern!r} has unbalanced braces; write {{000000..000099}} or {{a,b}}") from error


def _matches(pattern: str) -> list[str]:
    url = storage.absolute(pattern)
    if storage.is_local(url):
        found = [path for path in glob.glob(url, recursive=True) if os.path.isfile(path)]
    else:
        system = storage.file_system(url)
        entries = system.glob(url, detail=True)
        found = [system.unstrip_protocol(path) for path, about in entries.items() if about["type"] == "file"]
    if not found:
        raise UsageError(f"nothing matches {pattern!r}; looked at {url}")
    return sorted(found)


def _plain(name: str) -> str:
    url = storage.absolute(name)
    if name.endswith("/") or (storage.is_local(url) and os.path.isdir(url)):
        raise UsageError(f"{name!r} is a folder; name its shards: '{url}/*.tar'")
    return url
