"""Every error this project raises on purpose.

    DynamsError
    ├── UsageError                 an argument, flag or configuration is wrong            (exit 2)
    ├── MissingExtraError          an optional dependency is not installed; names the extra
    ├── ShardError                 one shard cannot be used
    │   ├── ShardMissingError        there is no such file or object
    │   ├── ShardFormatError         compressed, truncated or not a tar at all
    │   ├── ShardChangedError        not the bytes that were indexed
    │   ├── ShardUnreadableError     it is there, but its bytes cannot be had: no permission, a broken disk or network
    │   ├── DuplicateMemberError     two members of one sample share an extension
    │   └── EnergonIndexError        the `.tar.idx` beside it is not its own, or cannot be read or written
    ├── BadShardsError             every bad shard of an indexing run, listed at once
    ├── SampleError                one sample cannot be read, decoded or scored
    ├── StoreError                 the store lacks something, or holds something unexpected
    │   ├── NotIndexedError          no dataset has been indexed into it
    │   ├── RoundNotFoundError       no such published round
    │   ├── RoundExistsError         another job published this round first              (exit 3)
    │   ├── StoreBusyError           another job works on it; names it                   (exit 3)
    │   ├── LeaseLostError           another job took over from this one                 (exit 3)
    │   ├── StoreFullError           no room to write a file: the disk is full, or a quota used up
    │   └── ScoresIncompleteError    score tables are missing for a selection
    ├── ModelError                 a model cannot be built, slimmed or scored with
    │   ├── HeadError                the last linear layer was not found, or does not fit
    │   ├── UnsupportedLayerError    a layer the proxy cannot slim; names it
    │   ├── ShardedModelError        its parameters are spread over ranks (FSDP)
    │   └── CheckpointError          the checkpoint does not fit the model or the scorer
    ├── ScoringError               a scoring job failed; names parts and samples
    ├── SelectionError             a strategy or fraction cannot be cut
    └── StateError                 a loader's state does not fit the data it is loaded for

Errors carry `shard` (URL), `row` and `key` where they concern one, and always tell what to do.
They can be rebuilt from their message alone, as torch's DataLoader does when one crosses from a worker.
"""

from __future__ import annotations

from typing import Any


class DynamsError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong, where, and what to do.
        shard: URL of the shard concerned.
        row: 0-based position of the sample in its shard.
        key: the sample's key.
    """

    def __init__(self, message: str = "", *, shard: str | None = None, row: int | None = None, key: str | None = None):
        super().__init__(message)
        self.shard = shard
        self.row = row
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep shard, row and key when the error crosses a process border."""
        return (type(self), (str(self),), {"shard": self.shard, "row": self.row, "key": self.key})


class UsageError(DynamsError, ValueError):
    """An argument, a flag or a configuration value is wrong."""


class MissingExtraError(DynamsError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


class ShardError(DynamsError):
    """One shard cannot be used."""


class ShardMissingError(ShardError, FileNotFoundError):
    """The shard's file or object is not there."""


class ShardFormatError(ShardError):
    """The shard is compressed, truncated or not a tar file."""


class ShardChangedError(ShardError):
    """The shard no longer holds the bytes that were indexed."""


class ShardUnreadableError(ShardError, OSError):
    """The shard's bytes cannot be had: no permission, a disk that fails, or an object store that does not answer."""


class DuplicateMemberError(ShardError, ValueError):
    """Two members of one sample share an extension (webdataset refuses such a sample too)."""


class EnergonIndexError(ShardError):
    """Megatron-Energon's index beside the shard is not the shard's, or cannot be read or written."""


class BadShardsError(DynamsError):
    """Some shards could not be indexed; the message lists every one of them."""


class SampleError(DynamsError):
    """One sample cannot be read, decoded or scored."""


class StoreError(DynamsError):
    """The store lacks something that is needed, or holds something unexpected."""


class NotIndexedError(StoreError):
    """No dataset has been indexed into the store."""


class RoundNotFoundError(StoreError):
    """No published round of that number exists."""


class RoundExistsError(StoreError):
    """Another job published this round first."""


class StoreBusyError(StoreError):
    """Another job works on the store."""


class LeaseLostError(StoreError):
    """Another job took the store over while this one gave no sign of itself."""


class StoreFullError(StoreError):
    """A file of the store could not be written: the disk is full, or a quota used up."""


class ScoresIncompleteError(StoreError):
    """Score tables are missing for the selection that was asked for."""


class ModelError(DynamsError):
    """A model cannot be built, slimmed or scored with."""


class HeadError(ModelError):
    """The last linear layer was not found, or its outputs are not the model's logits."""


class UnsupportedLayerError(ModelError):
    """The parameter sharing proxy cannot slim this layer."""


class ShardedModelError(ModelError):
    """The model's parameters are spread over ranks, as FSDP does; the proxy needs them whole."""


class CheckpointError(ModelError):
    """The checkpoint does not fit the model or the scorer."""


class ScoringError(DynamsError):
    """A scoring job failed; what it finished is kept and the next run continues from there."""


class SelectionError(DynamsError):
    """A selection cannot be cut as asked."""


class StateError(DynamsError):
    """A loader's state does not fit the data it is loaded for, or cannot be given."""
