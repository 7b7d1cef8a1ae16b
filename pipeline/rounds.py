"""run_round: score, select, publish. The one function behind the training loop, the command line and scheduled jobs."""

from __future__ import annotations

import os

from distributed import Client
from torch import nn

from dynams_stream.scorer import ScorerSpec
from dynams_stream.selection import selected_count
from dynams_stream.store import Round, Store
from dynams_stream.strategy import Strategy
from pipeline.ranks import has_several_ranks, on_rank_zero
from pipeline.score_job import Progress, score_round
from pipeline.select_job import select_round
from pipeline.weights import save_module


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
    progress: Progress | None = None,
    deadline: float = 6 * 3600,
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
        max_errors: failed samples that are too many; by default 1 % of the dataset, at least 10.
        progress: called after every part.
        deadline: under `torch.distributed`, seconds the other ranks wait for rank 0.

    Under `torch.distributed` all ranks call it; rank 0 works, the others wait on the store, not in a collective.

    Raises:
        DynamsError: of the step that failed; what was scored is kept, and the same call goes on from there.
    """
    store = store if isinstance(store, Store) else Store(store)

    ranking = Strategy.parse(strategy)  # wrong arguments are refused before hours of scoring, not after
    selected_count(fraction, 0)

    def work() -> Round:
        if ranking.seed is not None:  # a random order needs no scores
            return select_round(store, fraction=fraction, strategy=strategy, workers=workers, as_newest=True).round
        checkpoint = save_module(store, scorer, weights, epoch)
        scored = score_round(
            store, scorer, checkpoint=checkpoint, epoch=epoch, client=client, scheduler=scheduler,
            workers=workers, device=device, max_errors=max_errors, progress=progress,
        )  # fmt: skip
        return select_round(
            store, fraction=fraction, strategy=strategy, scores_of=scored.number, workers=workers, as_newest=True
        ).round

    return on_rank_zero(store, work, deadline) if has_several_ranks() else work()
