"""run_round: score, select, publish. The one function behind the training loop, the command line and scheduled jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from distributed import Client
from torch import nn

from dynams_stream.class_quotas import ClassQuotas
from dynams_stream.errors import UsageError
from dynams_stream.faithfulness import Faithfulness
from dynams_stream.scorer import ScorerSpec
from dynams_stream.selection import selected_count
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from pipeline.calibrate_job import calibrated
from pipeline.cluster import dask_client, is_running
from pipeline.compare_job import compare_with_model
from pipeline.lease import OnBusy, store_lease
from pipeline.ranks import has_several_ranks, on_rank_zero
from pipeline.score_job import Progress, score_round
from pipeline.select_job import MOST_DISAGREEMENT, SelectResult, require_options, select_round
from pipeline.weights import SavedWeights, save_for_workers

logger = logging.getLogger(__name__)

CHECK_SAMPLES = 2000
"""Samples that a proxy is compared with its model on: the overlap's standard error is 0.03 at γ = 0.1."""
CLUSTER_SAMPLES = 10_000_000
"""Of a dataset, from which on the cluster's workers cut a round's selection; of a smaller one threads are faster."""
LEAST_OVERLAP = 0.5
"""Below it a proxy warns: the one run on MNIST that began below it ended 0.7 points lower (`docs/method.md`)."""


def run_round(
    store: Store | str | os.PathLike[str],
    scorer: ScorerSpec,
    *,
    fraction: float | str,
    strategy: str = "distance",
    weights: nn.Module | str | os.PathLike[str] | None = None,
    epoch: int | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    max_errors: int | None = None,
    max_bad_shards: int = 0,
    progress: Progress | None = None,
    deadline: float = 6 * 3600,
    class_balance: bool = False,
    min_per_class: int = 0,
    exclude_noisy: bool = False,
    most_disagreement: float = MOST_DISAGREEMENT,
    sample_weight: str | None = None,
    calibration_samples: int = 0,
    check_samples: int = CHECK_SAMPLES,
    least_overlap: float = LEAST_OVERLAP,
    fallback: Literal["full"] | None = None,
    on_busy: OnBusy = "fail",
) -> Round:
    """Score the whole dataset with the current weights, select, and publish the round.

    Args:
        store: an indexed store.
        scorer: how to score.
        fraction: γ, the selected part of all samples.
        strategy: an expression over score columns; the smallest values are selected.
        weights: a `ParameterSharingProxy`, a plain module (for `width=1`) or a checkpoint's path. A module is saved
            into the store first. None uses the weights that the model's callable makes.
        epoch: recorded with the round.
        client: a Dask client; without one a local cluster sized to the machine is started.
        scheduler, workers, device: see `pipeline.cluster.dask_client`.
        max_errors: failed samples that are accepted; by default 1 % of the dataset, at least 10.
        max_bad_shards: shards that cannot be read and may be left out; the round is published as partial then.
        progress: called after every part.
        deadline: under `torch.distributed`, seconds the other ranks wait for rank 0.
        class_balance, min_per_class, exclude_noisy, most_disagreement, sample_weight: what becomes of classes and of
            suspected label errors, and what weighs each sample; see `pipeline.select_job.select_round`.
        calibration_samples: first re-estimate the batch normalisation statistics of what scores from so many samples
            of the whole dataset, in a copy of the weights. Worth it in the middle of a training run (2,000, say).
        check_samples: with a `ParameterSharingProxy` as weights, how many samples are scored by its model, too, to tell
            how well the proxy stands in for it: `faithfulness` in `round.json`, and in the log. 0 for none.
        least_overlap: of the two selections on those samples, below which the log warns.
        fallback: "full" then scores everything with the model and selects by that.
        on_busy: when another job works on the store, "fail" (a `StoreBusyError`) or "wait" for it to end.

    Under `torch.distributed` all ranks call it; rank 0 works, the others wait on the store, not in a collective.

    Raises:
        DynamsError: of the step that failed; what was scored is kept, and the same call goes on from there.
    """
    store = store if isinstance(store, Store) else Store(store)
    choices = {
        "class_balance": class_balance,
        "min_per_class": min_per_class,
        "exclude_noisy": exclude_noisy,
        "most_disagreement": most_disagreement,
        "sample_weight": sample_weight,
    }
    require_round(fraction, strategy, fallback, choices)  # before hours of scoring, not after

    def work() -> Round:
        saved = None
        if Strategy.parse(strategy).seed is None:  # a random order needs no scores
            saved = save_for_workers(store, scorer, weights, epoch, with_model=check_samples > 0)
        return make_round(
            store, scorer, saved, fraction=fraction, strategy=strategy, epoch=epoch, client=client,
            scheduler=scheduler, workers=workers, device=device, max_errors=max_errors,
            max_bad_shards=max_bad_shards, progress=progress,
            calibration_samples=calibration_samples, check_samples=check_samples, least_overlap=least_overlap,
            fallback=fallback, choices=choices, on_busy=on_busy,
        ).round  # fmt: skip

    return on_rank_zero(store, work, deadline) if has_several_ranks() else work()


def require_round(
    fraction: float | str, strategy: str, fallback: str | None, choices: Mapping[str, Any] | None
) -> None:
    """Check what a round is asked for.

    Args:
        fraction, strategy, fallback: as for `run_round`.
        choices: class_balance, min_per_class, exclude_noisy, most_disagreement and sample_weight; those left out are
            at their defaults.

    Raises:
        UsageError: the fraction, the strategy, the quotas of classes or the fallback is not one.
        MissingExtraError: cleanlab is needed and missing.
    """
    asked = choices or {}
    quotas = ClassQuotas(asked.get("class_balance", False), asked.get("min_per_class", 0))
    require_options(Strategy.parse(strategy), quotas, asked.get("exclude_noisy", False), asked.get("sample_weight"))
    selected_count(fraction, 0)
    if fallback not in (None, "full"):
        raise UsageError(f'fallback is {fallback!r}; "full" scores with the model, None does nothing')


def make_round(
    store: Store,
    scorer: ScorerSpec,
    weights: SavedWeights | None,
    *,
    fraction: float | str,
    strategy: str,
    epoch: int | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    calibration_samples: int = 0,
    check_samples: int = CHECK_SAMPLES,
    least_overlap: float = LEAST_OVERLAP,
    fallback: str | None = None,
    choices: Mapping[str, Any] | None = None,
    as_newest: bool = True,
    max_errors: int | None = None,
    max_bad_shards: int = 0,
    on_busy: OnBusy = "fail",
    **job: Any,
) -> SelectResult:
    """`run_round` in this process, with saved weights (None for a random order, which has no scores).

    `choices` and `as_newest` are `select_round`'s, further arguments `score_round`'s.
    """
    job |= {
        "epoch": epoch, "scheduler": scheduler, "workers": workers, "device": device, "max_errors": max_errors,
        "max_bad_shards": max_bad_shards,
    }  # fmt: skip
    with store_lease(store, "round", on_busy=on_busy) as lease:
        select = partial(
            select_round, store, fraction=fraction, strategy=strategy, workers=workers, as_newest=as_newest,
            still_ours=lease.require, max_errors=max_errors, max_bad_shards=max_bad_shards, **(choices or {}),
        )  # fmt: skip
        is_large = store.dataset().samples >= CLUSTER_SAMPLES
        if weights is None or (weights.model is None and not calibration_samples):
            number = None
            if weights is not None:
                number = score_round(store, scorer, checkpoint=weights.scorer, client=client, **job).number
            running = scheduler if client is None and is_running(scheduler) else None
            return select(scores_of=number, **({"client": client, "scheduler": running} if is_large else {}))
        found = None
        with dask_client(client, scheduler=scheduler, workers=workers, device=device) as connected:
            full = replace(scorer, width=1.0)
            if calibration_samples:
                prepare = partial(calibrated, store, samples=calibration_samples, client=connected, device=device)
                model = None if weights.model is None else prepare(full, weights.model)
                weights = SavedWeights(prepare(scorer, weights.scorer), model)
            scored = score_round(store, scorer, checkpoint=weights.scorer, client=connected, **job)
            if weights.model is not None:
                found = compare_with_model(
                    store, scored, weights.model, strategy=Strategy.parse(strategy), fraction=fraction,
                    samples=check_samples, client=connected, device=device,
                )  # fmt: skip
                if has_drifted(found, least_overlap) and fallback == "full":
                    scored = score_round(store, full, checkpoint=weights.model, client=connected, **job)
            return select(scores_of=scored.number, faithfulness=found, client=connected if is_large else None)


def has_drifted(found: Faithfulness, least_overlap: float) -> bool:
    """Whether a proxy selects too little of what its model would; tells the log either way.

    Where nothing can be said (no sample that both could score, a selection of none) that is told, and is no drift.
    """
    if found.overlap is None:
        logger.warning(
            f"the proxy could not be compared with its model: {found.samples} samples have scores of both, "
            f"γ = {found.fraction:g}"
        )
        return False
    correlation = "undefined" if found.rank_correlation is None else f"{found.rank_correlation:.3f}"
    text = (
        f"the proxy selects {100 * found.overlap:.0f} % of what the model would (γ = {found.fraction:g}, rank "
        f"correlation of the distances {correlation}, {found.samples} samples)"
    )
    if found.overlap >= least_overlap:
        logger.info(text)
        return False
    logger.warning(
        f"{text}; that is below {100 * least_overlap:.0f} %. Train the proxy in more steps (every), widen it, or score "
        f'with the model: fallback="full"'
    )
    return True
