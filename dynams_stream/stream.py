"""SelectedDataset: a WebDataset pipeline that reads only the selected samples, and knows where it stands."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from torch.utils.data import get_worker_info
from webdataset import autodecode, filters
from webdataset.compat import FluidInterface
from webdataset.pipeline import DataPipeline

from dynams_stream import states
from dynams_stream.errors import DynamsError, StateError, UsageError
from dynams_stream.iteration import Pass
from dynams_stream.order import TAILS
from dynams_stream.pickle_guard import GuardedDecoder, guarded_patterns
from dynams_stream.progress import EVERYTHING, Place
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.sample_cache import SampleCache
from dynams_stream.source import Options, Source
from dynams_stream.stages import Batches, holds_back, stage_name
from dynams_stream.states import State
from dynams_stream.stats import Stats
from dynams_stream.store import Store, round_number


class _Unset:
    """Marks an argument that was not given."""

    def __repr__(self) -> str:
        return "the constructor's"


_UNSET: Final = _Unset()


class SelectedDataset(DataPipeline, FluidInterface):  # type: ignore[misc]
    """Streams the selected samples of a store, each exactly once per epoch over all ranks and workers.

    A `webdataset` pipeline: its fluid methods (`decode`, `to_tuple`, `map`, …) and stages work on it, and so do torch's
    DataLoader, torchdata's StatefulDataLoader and `wds.WebLoader`. Its source yields dicts equal to those of
    `webdataset.WebDataset`, `{"__key__", "__url__", extension: bytes, …}`, plus `__row__`, and `__weight__` when the
    selection has weights.

    Args:
        store: a `Store`, or its path or URL.
        batch_size: samples of one batch of one rank, as the loader is told. With it, step b holds the same samples
            whatever the number of ranks and workers; needed for `state_dict(steps)`.
        shuffle: False streams in (shard, row) order.
        seed: any non-negative integer; with the epoch it fixes the order.
        round: a round's number, "latest" (everything while there is none), or None for everything.
        lanes: from how many places of the dataset a batch is mixed; None for a number that depends on the number of
            selected samples alone. Ranks that divide it read disjoint shards.
        window: how many neighbours of a place are shuffled together; None for a number that depends on the number of
            selected samples alone. Smaller ones save requests to object stores.
        tail: what becomes of the last N mod ranks samples: "drop", "pad" (the first ones come again to fill up, marked
            `__pad__`), "wrap" (the same, unmarked) or "keep" (every sample once; ranks may differ by one).
        prepare: called with each sample dict inside the source, so that `on_error` covers it.
        on_error: "raise", or "skip": a sample that cannot be read or prepared is logged, and another selected sample
            takes its place (`order.substitute`), so that no rank's epoch gets shorter.
        max_errors: how many samples all workers of a rank may skip in one iteration.
        remote: what reading from object stores may cost: requests, bytes, memory and patience.
        cache: keeps samples of object stores on a disk of this machine, across epochs and rounds; with one, the workers
            of a rank share what they fetch.
        rank, world_size: this process's part; by default `torch.distributed`'s, else 0 of 1. When they are given, each
            process finds "latest" for itself: name the round to make sure that all read the same.

    Under `torch.distributed` all ranks have to make it, as they have to call `set_epoch`: they agree on the round. Give
    `rank=0, world_size=1` to a dataset of one rank alone (a validation by rank 0).

    Raises:
        UsageError: for an argument out of range.
        NotIndexedError, RoundNotFoundError: when the store lacks what is to be streamed.
        StateError: when the ranks ask for different things.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        round: int | str | None = "latest",
        lanes: int | None = None,
        window: int | None = None,
        tail: str = "drop",
        prepare: Callable[[dict[str, Any]], Any] | None = None,
        on_error: str = "raise",
        max_errors: int = 0,
        remote: RemoteOptions | None = None,
        cache: SampleCache | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        super().__init__()
        _require_integer("batch_size", batch_size, 1, none="no batches")
        _require_integer("seed", seed, 0)
        _require_integer("lanes", lanes, 1, none="the default")
        _require_integer("window", window, 1, none="the default")
        _require_integer("max_errors", max_errors, 0)
        _require_choice("tail", tail, TAILS)
        _require_choice("on_error", on_error, ("raise", "skip"))
        options = Options(
            batch_size=batch_size,
            shuffle=bool(shuffle),
            seed=seed,
            lanes=lanes,
            window=window,
            tail=tail,
            prepare=prepare,
            on_error=on_error,
            max_errors=max_errors,
            remote=remote or RemoteOptions(),
            cache=cache,
        )
        self._round = _which(round)
        store = store if isinstance(store, Store) else Store(store)
        self.append(Source(store, options, _split(rank, world_size)))
        self._publish(0, self._round, chosen=False)

    def __repr__(self) -> str:
        place = self._source.control.place
        what = "everything" if place.round == EVERYTHING else f"round {place.round}"
        return f"SelectedDataset({self._source.store.url!r}, epoch {place.epoch}, {what})"

    @property
    def _source(self) -> Source:
        source: Source = self.pipeline[0]
        return source

    # ---- epochs ------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int, round: int | str | _Unset | None = _UNSET) -> None:
        """Choose the epoch, and with it the order and the round that the next iterations stream.

        Reaches persistent workers and all copies that fluid calls have made, at their next iteration. After
        `load_state_dict` it keeps the loaded position and round when `epoch` is the state's, and drops them otherwise.

        Args:
            epoch: 0, 1, …
            round: a number, "latest" or None (everything); by default the constructor's. "latest" is looked up now;
                under `torch.distributed` rank 0 looks and tells the others, so all ranks have to call this.

        Raises:
            UsageError: for a negative epoch, or when it is called in a worker.
            StateError: when a loaded state of this epoch is of another round than the one asked for.
        """
        _require_integer("epoch", epoch, 0)
        if get_worker_info() is not None:
            raise UsageError(
                "set_epoch was called in a DataLoader worker; call it in the main process, which tells all"
            )
        which = self._round if isinstance(round, _Unset) else _which(round)
        place = self._source.control.place
        if place.epoch == epoch and self._source.control.holds_position():
            named = EVERYTHING if which is None else which
            if named not in ("latest", place.round):
                raise StateError(
                    f"the state that was loaded for epoch {epoch} is of {_round_name(place.round)}, set_epoch asks for "
                    f"{_round_name(named)}; ask for the state's, or make the dataset anew to start the epoch over"
                )
            self._agree(epoch, which, place)
            return
        self._publish(epoch, which, chosen=True)

    def _publish(self, epoch: int, which: int | str | None, *, chosen: bool) -> None:
        number, version = self._agree(epoch, which, None)
        options = self._source.options
        self._source.tell(
            Place(
                epoch=epoch,
                round=number,
                version=version,
                lanes=options.lanes or 0,
                window=options.window or 0,
                chosen=int(chosen),
            )
        )

    def _agree(self, epoch: int, which: int | str | None, loaded: Place | None) -> tuple[int, int]:
        """The round and dataset version that all ranks read: what `which` means now, or what a loaded state says."""
        options = self._source.options
        same = ("seed", "shuffle", "lanes", "window", "tail", "batch_size")
        asked = {"epoch": epoch, "round": which, "position": 0 if loaded is None else loaded.start}
        asked |= {name: getattr(options, name) for name in same}
        return self._source.resolve(which if loaded is None else loaded.round or None, asked)

    def stats(self) -> Stats:
        """What has been read since the dataset was made, by this rank's main process and its workers together."""
        return self._source.counters.total()

    def __len__(self) -> int:
        """How many samples this rank yields in the current epoch, from its start."""
        return self._source.length()

    def __iter__(self) -> Iterator[Any]:
        """Begin an iteration of this process's share; from here on, set_epoch concerns later ones only.

        Raises:
            SampleError: when a sample, or a later stage with it, fails; names shard, row and key.
            ShardMissingError, ShardChangedError: when a shard is gone, or not what was indexed.
        """
        if self.repetitions != 1:  # webdataset's with_epoch and repeat
            return super().__iter__()  # type: ignore[no-any-return]
        try:
            begun = self._source.begin(self._refusal())
        except DynamsError as error:
            if get_worker_info() is None:
                raise
            return _raising(error)
        if len(self.pipeline) == 1:
            return iter(begun)
        stream: Iterator[Any] = iter(begun)
        for stage in self.pipeline[1:]:
            stream = self.invoke(stage, stream)
        batches = math.prod(stage.size for stage in self.pipeline[1:] if isinstance(stage, Batches))
        return _watched(stream, begun, batches)

    # ---- stages ------------------------------------------------------------------------------------------------------

    def decode(self, *args: Any, allow_pickle: bool = False, **options: Any) -> SelectedDataset:
        """webdataset's `decode`, which unpickles nothing unless `allow_pickle=True`.

        Raises (when iterating):
            SampleError: when a member would be unpickled (pkl, pickle, pyd, pth).
        """
        if allow_pickle:
            return super().decode(*args, **options)  # type: ignore[no-any-return]
        handler = options.pop("handler", filters.reraise_exception)
        handlers = [autodecode.ImageHandler(each) if isinstance(each, str) else each for each in args]
        return self.map(GuardedDecoder(handlers, **options), handler=handler)  # type: ignore[no-any-return]

    def xdecode(self, *args: Any, allow_pickle: bool = False, **options: Any) -> SelectedDataset:
        """webdataset's `xdecode`, whose default patterns unpickle nothing unless `allow_pickle=True`."""
        if not allow_pickle:
            options.setdefault("defaults", guarded_patterns(filters.default_decoders))
        return super().xdecode(*args, **options)  # type: ignore[no-any-return]

    def batched(
        self,
        batchsize: int,
        collation_fn: Callable[[list[Any]], Any] | None = filters.default_collation_fn,
        partial: bool = True,
    ) -> SelectedDataset:
        """Batches of `batchsize` samples; unlike webdataset's stage it holds no sample of the next batch."""
        return self.compose(Batches(batchsize, collation_fn, partial))  # type: ignore[no-any-return]

    def listed(self, batchsize: int, partial: bool = True) -> SelectedDataset:
        """Lists of `batchsize` samples, not collated."""
        return self.batched(batchsize, None, partial)

    # ---- states ------------------------------------------------------------------------------------------------------

    def state_dict(self, steps: int | None = None) -> State:
        """Where the epoch stands, as a small dict that JSON can hold; the same on every rank.

        (With tail="keep", whose ranks may differ by a step, rank 0's is the one to keep.)

        Args:
            steps: how many batches this rank has consumed in the epoch, those before a resume included. Needed when a
                DataLoader's workers read ahead. Without workers it counts itself.

        In a worker (asked by a `StatefulDataLoader`) it is the worker's own state; `global_state` makes a movable one.

        Raises:
            StateError: when it cannot be known, a stage of the pipeline holds samples back, or one drops samples and
                `steps` are all that is known.
        """
        if steps is not None:
            _require_integer("steps", steps, 0)
        return states.state_of(self._source, steps, self._refusal())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, on any number of ranks and workers, with any batch size.

        It holds for the next iteration, and pins the round that the state names until then. A following `set_epoch` of
        the state's epoch changes nothing; one of another epoch drops it.

        Raises:
            StateError: when the state is of another selection, dataset, seed or order; says which.
        """
        states.load_state(self._source, state)

    @staticmethod
    def global_state(loader_state: Mapping[str, Any]) -> State:
        """A state for any number of ranks and workers from the `state_dict()` of one rank's `StatefulDataLoader`.

        Raises:
            StateError: when it is no such state, or its batches are not the dataset's `batch_size`.
        """
        return states.global_state(loader_state)

    def _refusal(self) -> str | None:
        """Why no state of this pipeline can be given: the first stage that holds samples back."""
        if self.repetitions != 1:
            return "with_epoch and repeat hide where the epoch stands: no state can be given; use set_epoch instead"
        for stage in self.pipeline[1:]:
            if holds_back(stage):
                return (
                    f"the stage {stage_name(stage)} may hold samples back, so no state can be given; do its work in "
                    f".map or `prepare`, or leave it out (the order is shuffled already, and .batched(n) is fine)"
                )
        return None


def _raising(error: Exception) -> Iterator[Any]:
    """Raises at the first sample: an error in `iter` would end a persistent worker before it could say why."""
    raise error
    yield


def _watched(stream: Iterator[Any], begun: Pass, batch: int) -> Iterator[Any]:
    """What the stages give, one for each `batch` samples: notes when some were dropped, and names those that fail."""
    given = begun.yielded
    try:
        for each in stream:
            given += batch
            if begun.yielded > given:
                begun.note_dropped()
            yield each
    except DynamsError:
        raise
    except Exception as error:
        raise begun.blame(error) from error
    if begun.yielded >= given + batch:  # fewer may be the rest that makes no whole batch
        begun.note_dropped()


# ---- arguments -------------------------------------------------------------------------------------------------------


def _require_integer(name: str, value: Any, least: int, none: str = "") -> None:
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value >= 2**63:
        allowed = f"an integer from {least} on" + (f", or None for {none}" if none else "")
        raise UsageError(f"{name} has to be {allowed}; got {value!r}")


def _require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} has to be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _which(value: int | str | None) -> int | str | None:
    return value if value is None or value == "latest" else round_number(value)


def _round_name(which: int | str) -> str:
    return "everything (no round)" if which == EVERYTHING else f"round {which}"


def _split(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise UsageError(f"rank and world_size go together; got rank={rank!r}, world_size={world_size!r}")
    _require_integer("world_size", world_size, 1)
    _require_integer("rank", rank, 0)
    if rank >= world_size:
        raise UsageError(f"rank has to be below world_size={world_size}; got {rank}")
    return rank, world_size
