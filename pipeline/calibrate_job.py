"""Weights with batch normalisation statistics of their own: a copy of a checkpoint, made by one task before scoring.

checkpoint ──some rows of the dataset, as scoring decodes them──► recomputed statistics ──► control/weights/<name>
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from distributed import Client
from torch import Tensor

from dynams_stream import schema, storage
from dynams_stream.calibration import has_running_statistics, recompute_statistics
from dynams_stream.checkpoint import checkpoint_digest, read_checkpoint, weights_bytes
from dynams_stream.errors import DynamsError, ScoringError
from dynams_stream.scorer import ScorerSpec, build_network
from dynams_stream.store import Store
from pipeline.compare_job import PartRows, row_batches, sample_rows
from pipeline.in_flight import result_of
from pipeline.part_reader import Decoder
from pipeline.receipt import Clock
from pipeline.score_job import first_extensions
from pipeline.score_part import worker_scorer
from pipeline.worker_hardware import worker_device

_SEED = 1
"""Other rows than those that the proxy and its model are compared on."""


def calibrated(store: Store, scorer: ScorerSpec, checkpoint: str, *, samples: int, client: Client, device: str) -> str:
    """The path of the checkpoint's copy with statistics of `samples` rows; made once, found again afterwards.

    Args:
        store: where the rows' shards are indexed and the copy goes.
        scorer: how the checkpoint is loaded and samples are decoded.
        checkpoint: the weights.
        samples: how many rows; always the same ones of the same dataset.
        client: where it is made: one task.
        device: "cpu" or "cuda".

    Returns:
        The checkpoint itself where the network has no batch normalisation.

    Raises:
        ScoringError: the network could not be run.
    """
    dataset = store.dataset()
    spec = scorer.resolved(first_extensions(store, dataset), device)
    digest = checkpoint_digest(checkpoint)
    made_from = {"checkpoint": digest, "scorer": spec.identity(), "dataset": dataset.digest, "samples": samples}
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    url = store.path(f"{schema.WEIGHTS_FOLDER}/calibrated-{name}.safetensors")
    if storage.exists(url):
        return url
    rows = sample_rows(dataset, samples, seed=_SEED)
    task = client.submit(calibrate, store, rows, spec, checkpoint, digest, device, url, pure=False)
    try:
        return url if result_of(client, task) else checkpoint
    except DynamsError:
        raise
    except Exception as error:  # whatever ends a worker
        raise ScoringError(
            f"{checkpoint}: its statistics could not be computed: {type(error).__name__}: {error}; leave them as they "
            f"are with calibration_samples=0"
        ) from error


def calibrate(
    store: Store, rows: list[PartRows], spec: ScorerSpec, checkpoint: str, sha256: str, device: str, url: str
) -> bool:
    """Write the copy, and tell whether there was anything to compute. Runs on a worker."""
    scorer = worker_scorer(spec, checkpoint, sha256, device)  # decodes
    network = build_network(spec, checkpoint, sha256).to(worker_device(device))
    if not has_running_statistics(network):
        return False
    decode = Decoder(scorer, Clock())
    inputs = (
        tensor
        for pieces in row_batches(store, rows, spec.batch_size)
        for _, stacked in decode(pieces).inputs
        for tensor in stacked.unbind()
    )
    recompute_statistics(network, _batches(inputs, spec.batch_size, worker_device(device)))
    metadata = read_checkpoint(checkpoint, sha256)[1]
    storage.write_bytes(url, weights_bytes(network, metadata))
    return True


def _batches(inputs: Iterator[Tensor], size: int, device: str) -> Iterator[Tensor]:
    """Batches of equal shapes; one that stays alone is left out."""
    waiting: dict[torch.Size, list[Tensor]] = {}
    for tensor in inputs:
        same = waiting.setdefault(tensor.shape, [])
        same.append(tensor)
        if len(same) == size:
            yield torch.stack(waiting.pop(tensor.shape)).to(device)
    for same in waiting.values():
        if len(same) > 1:
            yield torch.stack(same).to(device)
