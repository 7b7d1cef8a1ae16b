"""The state that a run is resumed from: given, checked and loaded, and made movable from a `StatefulDataLoader`'s.

    version, algorithm                  of this format, and of the order
    epoch, round, samples, steps        where the epoch stands: global position, and batches of each rank
    batch, seed, lanes, window, shuffle what makes the order
    selection, dataset                  digests

It is the same on all ranks, a few hundred bytes of JSON, and knows nothing of ranks, workers or prefetching.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import get_worker_info

from dynams_stream.errors import RoundNotFoundError, StateError, UsageError
from dynams_stream.order import ALGORITHM_VERSION, rank_length, worker_length
from dynams_stream.progress import EVERYTHING, Place

if TYPE_CHECKING:
    from dynams_stream.iteration import Pass
    from dynams_stream.source import Source

State = dict[str, Any]

STATE_VERSION: Final = 2


# ---- giving ----------------------------------------------------------------------------------------------------------


def state_of(source: Source, steps: int | None, refusal: str | None) -> State:
    """Where the epoch of a source stands.

    Args:
        source: the dataset's.
        steps: batches that this rank has consumed; None when the source has to know.
        refusal: why no state can be given of the pipeline, if so.

    Raises:
        StateError: when it cannot be known, or given.
        UsageError: for steps without a batch size.
    """
    begun, run, worker = source.control.begun(), source.newest, get_worker_info()
    running = run is not None and (worker is not None or (begun is not None and not begun.in_workers))
    refusal = (run.refusal if run is not None and running else None) or refusal
    if refusal:
        raise StateError(refusal)
    if worker is not None:
        return _worker_state(source, run)
    place = source.control.place
    if begun is not None:
        place = begun.place
    source.mark_use(place)
    if steps is not None:
        if source.control.has_dropped():
            raise StateError(
                "a stage of the pipeline drops samples (select, or a map that gives None), so batches do not tell how "
                "many samples were consumed: have them skipped in `prepare` with on_error='skip', or left out of the "
                "selection, or use torchdata's StatefulDataLoader"
            )
        return _state_after(source, place, steps)
    if begun is None:
        return _state(source, place, place.start, place.steps)
    if begun.in_workers or run is None:
        raise StateError(
            "the loader's workers read ahead, so how much was consumed is not known here: call state_dict(steps), "
            "steps being the batches this rank has consumed in the epoch, or use torchdata's StatefulDataLoader"
        )
    total, most, ranks = source.left(run.place)
    position = finished_or(run.place.start + run.yielded * ranks, run.yielded, most, total)
    batch = source.options.batch_size
    return _state(source, run.place, position, run.place.steps + (-(-run.yielded // batch) if batch else 0))


def _state(source: Source, place: Place, position: int, steps: int) -> State:
    content = source.content(place)
    batch = source.options.batch_size
    return {
        "version": STATE_VERSION,
        "algorithm": ALGORITHM_VERSION,
        "epoch": place.epoch,
        "round": None if place.round == EVERYTHING else place.round,
        "samples": position,
        "steps": steps,
        "batch": None if batch is None else batch * source.split()[1],
        "seed": source.options.seed,
        "lanes": source.order_lanes(place),
        "window": source.order_window(place),
        "shuffle": source.options.shuffle,
        "selection": content.selection.digest,
        "dataset": content.dataset.digest,
    }


def _state_after(source: Source, place: Place, steps: int) -> State:
    batch = source.options.batch_size
    if batch is None:
        raise UsageError("steps are counted in batches: give SelectedDataset the loader's batch_size")
    if steps < place.steps:
        raise StateError(
            f"steps={steps} counts fewer batches than the {place.steps} that were consumed before this epoch was "
            f"resumed; steps counts the batches of the whole epoch"
        )
    taken = (steps - place.steps) * batch
    total, most, ranks = source.left(place)
    return _state(source, place, finished_or(place.start + taken * ranks, taken, most, total), steps)


def _worker_state(source: Source, run: Pass | None) -> State:
    if run is None:
        raise StateError("no iteration has begun in this worker; ask for its state after that")
    place = run.place
    own = {
        "worker": run.worker,
        "workers": run.workers,
        "rank": run.rank,
        "ranks": run.ranks,
        "batch_size": run.options.batch_size,
        "tail": run.options.tail,
        "total": run.total,
        "yielded": run.yielded,
    }
    return _state(source, place, place.start, place.steps) | own


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_state(source: Source, state: Mapping[str, Any]) -> None:
    """Let the next iteration of a source go on from `state`; in a worker, from the worker's own.

    Raises:
        StateError: when the state does not fit; says where.
    """
    check_state(state, {"algorithm": ALGORITHM_VERSION, "seed": source.options.seed})
    check_state(state, {"shuffle": source.options.shuffle})
    _check_numbers(state)
    place = Place(
        epoch=state["epoch"],
        round=state["round"] or EVERYTHING,
        version=_version_of(source, state),
        lanes=state["lanes"],
        window=state["window"],
        loaded=1,
        start=state["samples"],
        steps=state["steps"],
    )
    content = source.content(place)
    check_state(state, {"dataset": content.dataset.digest, "selection": content.selection.digest})
    if place.start > content.selection.total:
        raise StateError(
            f"the state says that {place.start} of {content.selection.total} selected samples were consumed; it is "
            f"damaged: take another one, or start the epoch anew with set_epoch"
        )
    worker = get_worker_info()
    if worker is not None:
        rank, ranks = source.split()
        mine = {"worker": worker.id, "workers": worker.num_workers, "rank": rank, "ranks": ranks}
        check_state(state, {**mine, "batch_size": source.options.batch_size})
        source.resumed = (place._replace(check=content.check), state["yielded"])
        return
    if "worker" in state:
        raise StateError("this is one worker's state; make a movable one with SelectedDataset.global_state")
    current = source.control.place
    waiting = current.chosen and source.control.begun() is None and current.epoch != place.epoch
    if waiting and current.epoch > place.epoch and place.start >= content.selection.total:
        return  # that epoch is over; a StatefulDataLoader without workers loads late, after the next set_epoch
    if waiting:
        source.warn_of_other_epoch(current, place)
    source.tell(place)


def _version_of(source: Source, state: Mapping[str, Any]) -> int:
    """The dataset version that a state names by its digest."""
    store = source.store
    if state["round"] is not None:
        try:
            return int(store.round(state["round"]).manifest["dataset"]["version"])
        except RoundNotFoundError as error:
            raise StateError(f"the state is of round {state['round']}, which is not there: {error}") from error
    for version in reversed(store.dataset_versions()):
        if store.dataset(version).digest == state["dataset"]:
            return version
    raise StateError(
        f"the state is of a dataset (digest {str(state['dataset'])[:12]}) that {store.url} does not hold; "
        f"open the store that the state was made with, or start the epoch anew with set_epoch"
    )


def check_state(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a state that this dataset cannot go on from.

    Args:
        state: what `state_dict` gave.
        mine: for fields that have to be equal, this dataset's values.

    Raises:
        StateError: names the field and both values.
    """
    if not isinstance(state, Mapping) or "samples" not in state:
        hint = ": it is a StatefulDataLoader's; load it there, or SelectedDataset.global_state(state) here"
        is_loaders = isinstance(state, Mapping) and ("_snapshot" in state or "dataset_state" in state)
        raise StateError(f"this is no state of a SelectedDataset{hint if is_loaders else f'; got {state!r:.80}'}")
    if state.get("version") != STATE_VERSION:
        raise StateError(
            f"the state has format version {state.get('version')!r}, this program reads {STATE_VERSION}; "
            f"use the version of dynams-stream that wrote it"
        )
    for field, value in mine.items():
        if state.get(field) != value:
            raise StateError(
                f"the state was made with {field} = {state.get(field)!r}, this dataset has {value!r}; {_ADVICE[field]}"
            )


def _check_numbers(state: Mapping[str, Any]) -> None:
    """Refuse a state that was damaged on its way."""
    least = {"epoch": 0, "round": 1, "samples": 0, "steps": 0, "lanes": 1, "window": 1}
    for field, smallest in least.items():
        value = state.get(field)
        if field == "round" and field in state and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**63:
            raise StateError(
                f"the state has {field} = {value!r}, which no state has; it is damaged: take another one, or start the "
                f"epoch anew with set_epoch"
            )


_ADVICE: Final = {
    "algorithm": "finish the epoch with the version that wrote it, or start the epoch anew with set_epoch",
    "seed": "make the dataset with the state's seed, or start the epoch anew with set_epoch",
    "shuffle": "make the dataset with the state's shuffle, or start the epoch anew with set_epoch",
    "selection": "open the store that the state was made with, or start the epoch anew with set_epoch",
    "dataset": "open the store that the state was made with, or start the epoch anew with set_epoch",
    "worker": "make a movable state with SelectedDataset.global_state(loader_state)",
    "workers": "use as many workers, or make a movable state with SelectedDataset.global_state(loader_state)",
    "rank": "load each rank's own state, or make a movable one with SelectedDataset.global_state(loader_state)",
    "ranks": "use as many ranks, or make a movable state with SelectedDataset.global_state(loader_state)",
    "batch_size": "use that batch size, or make a movable state with SelectedDataset.global_state(loader_state)",
}


def finished_or(position: int, taken: int, most: int, total: int) -> int:
    """`position`, or `total` once as many samples are `taken` as any rank gets at most: then the epoch is over."""
    return total if taken >= most else min(position, total)


def global_state(loader_state: Mapping[str, Any]) -> State:
    """A state for any number of ranks and workers from a `StatefulDataLoader`'s.

    Args:
        loader_state: what the loader's `state_dict()` gave in one rank.

    Raises:
        StateError: when it is not of a SelectedDataset, or its workers have not consumed a run of samples without gaps
            (their batches differ from the dataset's `batch_size`).
    """
    snapshot = loader_state.get("_snapshot")
    if snapshot is None:
        state = loader_state.get("dataset_state")
        if not isinstance(state, Mapping) or "samples" not in state:
            raise StateError(
                "this is no state of a StatefulDataLoader over a SelectedDataset; give what its state_dict() gave"
            )
        return dict(state)
    states = [worker["dataset_state"] for worker in snapshot["_worker_snapshots"].values()]
    if not states or any(not isinstance(state, Mapping) or "yielded" not in state for state in states):
        raise StateError(
            "the loader's state holds no state of a SelectedDataset in its workers; give what its state_dict() gave"
        )
    first = states[0]
    batch, total, start = first["batch_size"], first["total"], first["samples"]
    left, most = (rank_length(total - start, first["ranks"], rank, first["tail"]) for rank in (first["rank"], 0))
    taken = sum(state["yielded"] for state in states)
    for state in states:
        if state["yielded"] != worker_length(taken, state["worker"], state["workers"], batch):
            raise StateError(
                f"the workers have consumed {[s['yielded'] for s in states]} samples in batches of {batch or 1}, "
                f"which leaves gaps in the order; give SelectedDataset the loader's batch_size"
            )
    since = loader_state["_steps_since_snapshot"]
    if since and batch is None:
        raise StateError(
            "the loader's state counts batches of unknown size; give SelectedDataset the loader's batch_size"
        )
    taken = min(taken + since * (batch or 1), left)
    if loader_state.get("_iterator_finished"):
        taken = most
    state = {name: first[name] for name in _GLOBAL_FIELDS}
    state["samples"] = finished_or(start + taken * first["ranks"], taken, most, total)
    state["steps"] = first["steps"] + (-(-taken // batch) if batch else 0)
    return state


_GLOBAL_FIELDS: Final = (
    *("version", "algorithm", "epoch", "round", "samples", "steps", "batch", "seed", "lanes", "window", "shuffle"),
    *("selection", "dataset"),
)
