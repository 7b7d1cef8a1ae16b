"""Work that one rank does while the others wait: on the store, so that no collective times out."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable

import torch.distributed

from dynams_stream import schema, storage
from dynams_stream.errors import ScoringError
from dynams_stream.store import Round, Store


def has_several_ranks() -> bool:
    """Whether this process is one rank of an initialised `torch.distributed` group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def on_rank_zero(store: Store, work: Callable[[], Round], deadline: float) -> Round:
    """Rank 0 calls `work` and leaves the outcome in the store; the others poll for it until the deadline (seconds).

    Raises:
        ScoringError: on the other ranks, when rank 0 failed or did not answer in time.
    """
    token: list[str] = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(token, src=0)
    outcome = store.path(f"{schema.CALLS_FOLDER}/{token[0]}.json")
    if torch.distributed.get_rank() == 0:
        try:
            made = work()
        except BaseException as error:
            storage.write_bytes(outcome, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
            raise
        storage.write_bytes(outcome, json.dumps({"round": made.number}).encode())
        return made
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        if storage.exists(outcome):
            answer = json.loads(storage.read_bytes(outcome))
            if "error" in answer:
                raise ScoringError(f"rank 0 could not make the round: {answer['error']}")
            return store.round(answer["round"])
        time.sleep(0.2)
    raise ScoringError(f"rank 0 made no round within {deadline:.0f} s; look at its log")
