"""From decoded batches to score columns. A GPU has the next batch under way while the scores of one are read back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from dynams_stream import schema
from dynams_stream.errors import DynamsError, ScoringError
from dynams_stream.scorer import Scorer, device_failed, out_of_memory
from dynams_stream.scores import ScoreBatch
from pipeline.receipt import Clock
from pipeline.score_table import Batch

Columns = dict[str, np.ndarray]
"""Arrays by name of score column, and "predicted" and "runner_up"; one element a sample."""


def scored_batches(scorer: Scorer, batches: Iterable[Batch], clock: Clock) -> Iterator[tuple[Batch, Columns]]:
    """Each batch with its columns, in order.

    Inputs that the model fails on get no scores, and their samples the error: one image of an odd shape is no reason to
    stop. What says nothing of the inputs (too little memory, a GPU that fails) is raised.

    Raises:
        ScoringError: names the first sample of the inputs that there was too little memory for, or the GPU failed on.
    """
    behind = 1 if scorer.device.type == "cuda" else 0
    waiting: deque[tuple[Batch, list[ScoreBatch | None]]] = deque()
    for batch in batches:
        with clock.timed("forward"):
            waiting.append((batch, _started(scorer, batch)))
        if len(waiting) > behind:
            yield _finished(*waiting.popleft(), clock)
    while waiting:
        yield _finished(*waiting.popleft(), clock)


def _started(scorer: Scorer, batch: Batch) -> list[ScoreBatch | None]:
    """Scores by shape of input, None where the model failed; a GPU may still be at work on them."""
    found: list[ScoreBatch | None] = []
    for positions, inputs in batch.inputs:
        labels = torch.tensor([batch.labels[position] for position in positions], dtype=torch.int64)
        try:
            found.append(scorer.score(inputs, labels))
        except DynamsError:
            raise
        except Exception as error:  # models raise anything, assertions too; the samples' lines name it
            if out_of_memory(error) or device_failed(error):
                first = positions[0]
                raise ScoringError(
                    f"{scorer.device} could not score inputs of shape {tuple(inputs.shape)}, from shard "
                    f"{batch.shards[first]}, row {batch.rows[first]}, key {batch.keys[first]!r} on: {error}"
                ) from error
            reason = f"the model failed on {str(inputs.dtype).removeprefix('torch.')} of shape "
            reason += f"{tuple(inputs.shape[1:])}: {str(error).strip().partition(chr(10))[0]}"
            for position in positions:
                batch.errors[position] = reason
            found.append(None)
    return found


def _finished(batch: Batch, scores: list[ScoreBatch | None], clock: Clock) -> tuple[Batch, Columns]:
    """The columns, NaN where a sample failed."""
    count = len(batch.rows)
    columns: Columns = {name: np.full(count, np.nan, dtype=np.float32) for name in schema.SCORE_COLUMNS}
    columns["predicted"] = np.full(count, -1, dtype=np.int64)
    columns["runner_up"] = np.full(count, -1, dtype=np.int64)
    with clock.timed("forward"):
        for (positions, _), some in zip(batch.inputs, scores, strict=True):
            if some is None:
                continue
            there = some.cpu()
            for name in columns:
                columns[name][positions] = getattr(there, name).numpy()
    return batch, columns
