"""A scoring job: one Dask task per part that is still missing, and the checks that nothing was lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from distributed import Client

from dynams_stream.checkpoint import checkpoint_digest, checkpoint_epoch
from dynams_stream.dataset import Dataset
from dynams_stream.errors import DynamsError, ScoringError
from dynams_stream.index import read_shard_index
from dynams_stream.scorer import ScorerSpec
from dynams_stream.store import Store
from pipeline.cluster import dask_client
from pipeline.cores import available_cores
from pipeline.lease import Lease, OnBusy, store_lease
from pipeline.part_runs import PartRuns
from pipeline.pending import are_published, finished_parts, require_content, scored_round
from pipeline.receipt import (
    BadShard,
    Receipt,
    allowed_failures,
    bad_shards,
    failed_samples,
    first_errors,
    total_seconds,
)
from pipeline.score_part import PartTask

Progress = Callable[["ScoreProgress"], None]


@dataclass(frozen=True)
class ScoreProgress:
    """How far a scoring job is.

    Attributes:
        samples: samples of the dataset.
        done: samples scored so far, those of an earlier run included.
        failed: how many of them have no score.
        resumed: samples that an earlier run had scored.
        seconds: read, decode, forward, write so far, thread seconds of this run.
    """

    samples: int
    done: int
    failed: int
    resumed: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class ScorePlan:
    """What a scoring job would do.

    Attributes:
        dataset: what is scored.
        spec: the scorer with input and label settled.
        checkpoint_sha256: digest of the weights.
        identity: what decides the tables' content.
        number: the round whose tables are continued; None when a new one will be opened.
        receipts: of the parts that are done.
    """

    dataset: Dataset
    spec: ScorerSpec
    checkpoint_sha256: str
    identity: Mapping[str, Any]
    number: int | None
    receipts: Mapping[int, Receipt]

    @property
    def pending(self) -> tuple[int, ...]:
        """Numbers of the parts that are still to be scored."""
        return tuple(part.number for part in self.dataset.parts if part.number not in self.receipts)

    @property
    def pending_samples(self) -> int:
        """Samples in those parts."""
        return sum(self.dataset.parts[number].samples for number in self.pending)

    @property
    def pending_bytes(self) -> int:
        """Bytes of the shards in those parts: about what will be read."""
        parts = [self.dataset.parts[number] for number in self.pending]
        return sum(int(self.dataset.sizes[part.first_shard : part.first_shard + part.shards].sum()) for part in parts)


@dataclass(frozen=True)
class ScoredRound:
    """Complete score tables.

    Attributes:
        number: the round they lie in; it is published once a selection is cut.
        spec: the scorer with input and label settled.
        samples, failed: lines, and how many of them have no score.
        parts, resumed_parts: how many tables, and how many an earlier run had written.
        seconds: read, decode, forward, write of this run, thread seconds.
        wall_seconds: how long this run took.
        errors: the first failed samples.
        bad_shards: those that could not be read; their samples are among the failed ones.
    """

    number: int
    spec: ScorerSpec
    samples: int
    failed: int
    parts: int
    resumed_parts: int
    seconds: Mapping[str, float]
    wall_seconds: float
    errors: tuple[str, ...]
    bad_shards: tuple[BadShard, ...] = ()


def score_round(
    store: Store,
    scorer: ScorerSpec,
    *,
    checkpoint: str,
    epoch: int | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    max_errors: int | None = None,
    max_bad_shards: int = 0,
    progress: Progress | None = None,
    on_busy: OnBusy = "fail",
) -> ScoredRound:
    """Write the score tables of one round: only those that are missing.

    The identity (dataset, scorer, checkpoint's SHA-256) decides: tables of the same identity are continued or found
    complete, another identity opens the next round. Shards that were left out are tried again until their round is
    published; one that was published with more of them than `max_bad_shards` gets a successor of the same identity.
    Arguments as for `run_round`.

    Raises:
        StoreBusyError: another job works on the store.
        ScoringError: when parts failed, or too many samples did; finished parts are kept.
        CheckpointError: the checkpoint was replaced while the job ran.
        LeaseLostError: this job was taken for dead meanwhile, and another has taken over.
    """
    began = time.perf_counter()
    with store_lease(store, "score", on_busy=on_busy) as lease, _still_holding(lease):
        plan = plan_round(store, scorer, checkpoint, device, max_bad_shards)
        dataset, spec = plan.dataset, plan.spec
        number = plan.number if plan.number is not None else store.claim_round(plan.identity)
        limit = allowed_failures(max_errors, dataset.samples)
        if failed_samples(plan.receipts.values()) > limit and not are_published(store, number):
            # What failed may have been mended (a transform, a file): those parts are scored again, the others kept.
            # Not in a published round, which never changes: there the failures are reported below.
            kept = {part: done for part, done in plan.receipts.items() if done.failed == done.unread}
            plan = replace(plan, receipts=kept)
        receipts, resumed = dict(plan.receipts), plan.receipts
        provenance = {
            "checkpoint": checkpoint,
            "epoch": epoch if epoch is not None else checkpoint_epoch(checkpoint),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        pending = _part_tasks(store, plan, number, checkpoint, provenance, device, limit)
        if pending:
            local_workers = workers if workers is not None or device != "cpu" else min(available_cores(), len(pending))
            with (
                dask_client(client, scheduler=scheduler, workers=local_workers, device=device) as connected,
                PartRuns(connected, pending, max_bad_shards=max_bad_shards) as runs,
            ):
                for receipt in runs:
                    lease.require()
                    receipts[receipt.part] = receipt
                    if progress is not None:
                        progress(_progress(dataset, receipts, resumed))
                    _check_failures(store, receipts, limit)
    _check_counts(dataset, receipts)
    _check_failures(store, receipts, limit)
    require_content(store, spec.label or "", receipts.values())
    fresh = [receipt for part, receipt in receipts.items() if part not in resumed]
    return ScoredRound(
        number=number,
        spec=spec,
        samples=dataset.samples,
        failed=sum(receipt.failed for receipt in receipts.values()),
        parts=len(dataset.parts),
        resumed_parts=len(resumed),
        seconds=total_seconds(fresh),
        wall_seconds=time.perf_counter() - began,
        errors=first_errors(receipts.values()),
        bad_shards=bad_shards(receipts.values()),
    )


@contextmanager
def _still_holding(lease: Lease) -> Iterator[None]:
    """End with LeaseLostError, whatever else went wrong, when another job has taken over: it replaces what is there."""
    try:
        yield
    except DynamsError:
        lease.require()
        raise
    lease.require()


def plan_round(
    store: Store, scorer: ScorerSpec, checkpoint: str, device: str = "cpu", max_bad_shards: int = 0
) -> ScorePlan:
    """What `score_round` would do; writes nothing."""
    dataset = store.dataset()
    spec = scorer.resolved(first_extensions(store, dataset), device)
    sha256 = checkpoint_digest(checkpoint)
    identity = round_identity(dataset, spec, sha256)
    number = scored_round(store, identity)
    done = {} if number is None else finished_parts(store, number)
    receipts = {part: found.receipt for part, found in done.items() if found.identity == identity}
    bad = len(bad_shards(receipts.values()))
    if number is not None and bad and not are_published(store, number):
        receipts = {part: receipt for part, receipt in receipts.items() if not receipt.bad_shards}
    elif bad > max_bad_shards:
        number, receipts = None, {}  # a published round never changes
    return ScorePlan(dataset, spec, sha256, identity, number, receipts)


def round_identity(dataset: Dataset, spec: ScorerSpec, checkpoint_sha256: str) -> dict[str, Any]:
    """What decides the content of score tables; equal identities give equal tables."""
    identity = {
        "dataset": {"version": dataset.version, "digest": dataset.digest},
        "scorer": spec.identity(),
        "checkpoint": checkpoint_sha256,
    }
    return json.loads(json.dumps(identity, sort_keys=True))  # type: ignore[no-any-return]


def first_extensions(store: Store, dataset: Dataset) -> tuple[str, ...]:
    """The extensions of the dataset's first sample; they settle the scorer's defaults."""
    for part in dataset.parts:
        for shard in range(part.first_shard, part.first_shard + part.shards):
            if dataset.counts[shard]:
                index = read_shard_index(store.path(part.index_file), shard)
                return tuple(ext for ext, _, _ in index.members(0))
    raise ScoringError(f"{store.url}: the dataset has no samples")


def _part_tasks(
    store: Store,
    plan: ScorePlan,
    number: int,
    checkpoint: str,
    provenance: Mapping[str, Any],
    device: str,
    limit: int | None = None,
) -> list[PartTask]:
    """The tasks of the parts that are missing; with more failed samples than `limit` the job fails."""
    identity = json.dumps(plan.identity, sort_keys=True)
    shards = [
        slice(part.first_shard, part.first_shard + part.shards)
        for part in map(plan.dataset.parts.__getitem__, plan.pending)
    ]
    return [
        PartTask(
            store=store,
            number=number,
            part=plan.dataset.parts[part],
            urls=plan.dataset.urls[own],
            fingerprints=plan.dataset.fingerprints[own],
            spec=plan.spec,
            checkpoint=checkpoint,
            checkpoint_sha256=plan.checkpoint_sha256,
            identity=identity,
            provenance=provenance,
            device=device,
            give_up_after=limit,
        )
        for part, own in zip(plan.pending, shards, strict=True)
    ]


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_failures(store: Store, receipts: Mapping[int, Receipt], limit: int) -> None:
    failed = failed_samples(receipts.values())
    samples = sum(receipt.samples for receipt in receipts.values())
    if failed > limit:
        shown = "\n  ".join(first_errors(receipts.values()))
        raise ScoringError(
            f"{store.url}: {failed} of {samples} samples failed, {limit} are allowed (--max-errors):\n  {shown}"
        )


def _check_counts(dataset: Dataset, receipts: Mapping[int, Receipt]) -> None:
    found = sum(receipt.samples for receipt in receipts.values())
    if found != dataset.samples or len(receipts) != len(dataset.parts):
        raise ScoringError(
            f"{found} lines in {len(receipts)} tables for {dataset.samples} samples in {len(dataset.parts)} parts; "
            f"run the same command again"
        )


def _progress(dataset: Dataset, receipts: Mapping[int, Receipt], resumed: Mapping[int, Receipt]) -> ScoreProgress:
    return ScoreProgress(
        samples=dataset.samples,
        done=sum(receipt.samples for receipt in receipts.values()),
        failed=sum(receipt.failed for receipt in receipts.values()),
        resumed=sum(receipt.samples for receipt in resumed.values()),
        seconds=total_seconds([receipt for part, receipt in receipts.items() if part not in resumed]),
    )
