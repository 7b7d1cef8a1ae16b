"""Reading a part's samples: shards behind a flaky server, and what ends the job with the sample's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from object_server import ObjectServer, Request
from PIL import Image

from dynams_stream import ScorerSpec, Store
from dynams_stream.errors import ScoringError, ShardUnreadableError
from dynams_stream.remote_options import RemoteOptions
from dynams_stream.scorer import Scorer
from pipeline import remote_reader
from pipeline.index_job import build_index
from pipeline.part_reader import Decoder, part_batches
from pipeline.receipt import Clock
from pipeline.score_table import Batch

SPEC = ScorerSpec(model="toy_models:linear", input="png", label="cls", transform="toy_models:gray", batch_size=37)


def first_part(store: Store, scorer: Scorer) -> list[Batch]:
    """Its batches, decoded."""
    dataset = store.dataset()
    part = dataset.parts[0]
    own = slice(part.first_shard, part.first_shard + part.shards)
    runs = part_batches(store, part, dataset.urls[own], dataset.fingerprints[own], SPEC.batch_size)
    return list(map(Decoder(scorer, Clock()), runs))


@pytest.fixture
def remote(digit_shards: list[str], tmp_path: Path) -> Iterator[tuple[ObjectServer, Store]]:
    """A server, and a store with one shard that lies there."""
    pytest.importorskip("aiohttp")
    with ObjectServer(Path(digit_shards[0]).parent) as server:
        store = Store(tmp_path / "remote")
        build_index(store, [f"{server.endpoint}/bucket/{Path(digit_shards[0]).name}"])
        yield server, store


def test_requests_that_fail_are_made_again(remote: tuple[ObjectServer, Store], digit_store: Store) -> None:
    server, store = remote
    asked: list[tuple[str, int | None]] = []

    def every_first_time(request: Request) -> str | None:
        what = request.method, request.first
        asked.append(what)
        return {0: "503", 1: "reset"}.get(asked.count(what) - 1)

    server.faults = every_first_time
    scorer = Scorer(SPEC, None)
    there, here = first_part(store, scorer), first_part(digit_store, scorer)
    assert {asked.count(what) for what in asked} >= {3}
    assert [batch.keys for batch in there] == [batch.keys for batch in here]
    for one, other in zip(there, here, strict=True):
        assert torch.equal(one.inputs[0][1], other.inputs[0][1])


def test_a_server_that_stays_away_is_an_error_at_the_deadline(
    remote: tuple[ObjectServer, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, store = remote
    monkeypatch.setattr(remote_reader, "RETRIES", remote_reader.retries(RemoteOptions(deadline=0.3)))
    server.faults = lambda request: "503" if request.first else None
    with pytest.raises(
        ShardUnreadableError, match=r"bytes \d+ to \d+ could not be had in 0\.3 s: .*503.*; see .* run the same"
    ) as told:
        first_part(store, Scorer(SPEC, None))
    assert told.value.shard == store.dataset().urls[0]


def test_too_little_memory_for_a_sample_ends_the_job_with_its_name(digit_store: Store) -> None:
    scorer = Scorer(SPEC, None)

    def hungry(image: Image.Image) -> torch.Tensor:
        raise MemoryError

    scorer.transform = hungry
    with pytest.raises(ScoringError, match=r"shard 0, row 0, key '\d+': too little memory to decode it \(MemoryError"):
        first_part(digit_store, scorer)
