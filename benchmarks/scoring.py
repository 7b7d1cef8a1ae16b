"""A scoring job against loops written by hand, on one core and on two: samples a second.

    python benchmarks/scoring.py [--runs 3] [--workloads resnet18 small]

* loop: one process that reads a shard in long pieces by the index, decodes with PIL, and scores batches of 64 with a
  fused network: distance, margin and loss. Nothing is written. On two cores there are two, each with half of the
  shards, and the time of the slower one counts.
* dynams: `dynams score` on a local cluster of one or two workers that runs already, scheduler and client on the same
  cores; all scores, written as tables. (A round of another store has been scored before, so that the network is built.)

Both have the same cores: one or two, by affinity. Shards are in the page cache. They take turns; the table has medians.
resnet18: torchvision's on 224 × 224 pixels, where the forward pass takes nearly all of the time. small: three
convolutions on 32 × 32, where decoding does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

BATCH = 64
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Workload:
    """What is scored: a network, its transform, and how many samples, of 13 KB JPEGs of 256 × 256 pixels."""

    model: str
    transform: str
    samples: int


WORKLOADS = {
    "resnet18": Workload("scoring_models:resnet18", "scoring_models:crop", 1600),
    "small": Workload("scoring_models:small", "scoring_models:thumbnail", 20_000),
}

# ---- the contenders, each in a process of its own: "ready", then a line on stdin starts the clock --------------------


def loop(folder: Path, workload: Workload, first: int, step: int) -> None:
    """Score every `step`-th shard from `first` on, as one would write it for once."""
    import io

    import torch
    from PIL import Image

    from dynams_stream.fusing import fuse_convolutions
    from dynams_stream.index import read_shard_index
    from dynams_stream.scorer import load_callable
    from dynams_stream.store import Store

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = load_callable(workload.model, "model")().eval()
    fuse_convolutions(network)
    head = network.fc if hasattr(network, "fc") else network[-1]
    weight, bias = head.weight.detach(), head.bias.detach()
    body = network
    if hasattr(network, "fc"):
        network.fc = torch.nn.Identity()
    else:
        body = network[:-1]
    norms = torch.cdist(weight.double(), weight.double()).float().fill_diagonal_(float("inf"))
    transform = load_callable(workload.transform, "transform")
    store = Store(folder / "store")
    dataset = store.dataset()

    def samples(shard: int) -> Any:
        part = dataset.parts[dataset.part_of_shard[shard]]
        index = read_shard_index(store.path(part.index_file), shard)
        with open(dataset.urls[shard], "rb", buffering=READ_BYTES) as file:
            for row in range(len(index)):
                members = {}
                for extension, offset, size in index.members(row):
                    if extension != "json":
                        file.seek(offset)
                        members[extension] = file.read(size)
                yield members

    def score(images: list[torch.Tensor], labels: list[int]) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(body(torch.stack(images)), weight, bias)
        label = torch.tensor(labels)
        best, predicted = logits.max(1)
        distance = ((best[:, None] - logits) / norms[predicted]).amin(1)
        own = logits.gather(1, label[:, None])
        margin = ((own - logits) / norms[label]).amin(1)
        return distance, margin, torch.nn.functional.cross_entropy(logits, label, reduction="none")

    with torch.inference_mode():
        score([torch.rand(3, 224, 224) if workload.samples < 5000 else torch.rand(3, 32, 32)] * BATCH, [0] * BATCH)
        begin()
        began, count = time.perf_counter(), 0
        images: list[torch.Tensor] = []
        labels: list[int] = []
        kept = []
        for shard in range(first, len(dataset.urls), step):
            for members in samples(shard):
                images.append(transform(Image.open(io.BytesIO(members["jpg"]))))
                labels.append(int(members["cls"]))
                if len(images) == BATCH:
                    kept.append(score(images, labels))
                    images, labels, count = [], [], count + BATCH
        if images:
            kept.append(score(images, labels))
            count += len(images)
    print(json.dumps({"seconds": time.perf_counter() - began, "samples": count}), flush=True)


def dynams(folder: Path, workload: Workload, workers: int) -> None:
    """A scoring job on a cluster that runs already."""
    from dynams_stream.scorer import ScorerSpec
    from dynams_stream.store import Store
    from pipeline.cluster import dask_client
    from pipeline.score_job import score_round

    spec = ScorerSpec(model=workload.model, transform=workload.transform, input="jpg", label="cls", batch_size=BATCH)
    checkpoint = str(folder / f"{workload.model.split(':')[1]}.pt")
    with dask_client(workers=workers) as client:
        client.wait_for_workers(workers)
        score_round(Store(folder / "warm"), spec, checkpoint=checkpoint, client=client)
        begin()
        began = time.perf_counter()
        result = score_round(Store(folder / "store"), spec, checkpoint=checkpoint, client=client)
        seconds = time.perf_counter() - began
    split = {name: round(value, 2) for name, value in result.seconds.items()}
    print(json.dumps({"seconds": seconds, "samples": result.samples, "split": split}), flush=True)


def begin() -> None:
    """Say that all is ready, and wait until the clock may run."""
    print("ready", flush=True)
    sys.stdin.readline()


# ---- all of them -----------------------------------------------------------------------------------------------------


def prepare(folder: Path, workload: Workload) -> None:
    """Shards, a store, a small store to warm up with, and a checkpoint."""
    import torch
    from streaming_data import DataSet, into_page_cache, make_set

    from dynams_stream.scorer import load_callable
    from dynams_stream.store import Store
    from pipeline.index_job import build_index

    data = DataSet(folder, 13, workload.samples)
    if not (folder / "store").exists():
        make_set(data)
        urls = [str(path) for path in data.shards]
        build_index(Store(folder / "store"), urls)
        build_index(Store(folder / "warm"), urls[:2])
        torch.manual_seed(0)
        torch.save(load_callable(workload.model, "model")().state_dict(), folder / f"{workload.model.split(':')[1]}.pt")
    into_page_cache(data)


def measure(name: str, folder: Path, contender: str, cores: int) -> dict[str, Any]:
    """Samples a second of one run."""
    for store in ("store", "warm"):
        shutil.rmtree(folder / store / "rounds", ignore_errors=True)
        shutil.rmtree(folder / store / "control" / "claims", ignore_errors=True)
    if contender == "loop":
        processes = [start(name, folder, ["loop", str(number), str(cores)], {number}) for number in range(cores)]
    else:
        processes = [start(name, folder, ["dynams", str(cores), "0"], set(range(cores)))]
    for process in processes:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"{contender} did not start; its messages are above")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return {
        "rate": sum(one["samples"] for one in found) / max(one["seconds"] for one in found),
        **({"split": found[0]["split"]} if "split" in found[0] else {}),
    }


def start(name: str, folder: Path, arguments: list[str], cores: set[int]) -> subprocess.Popen[str]:
    """A contender's process, which may use these cores of those that this one has."""
    mine = sorted(os.sched_getaffinity(0))
    command = [sys.executable, __file__, "--contend", name, str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {mine[core] for core in cores}),
    )  # fmt: skip


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser(description="Scoring jobs against loops by hand; see the docstring.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/scoring"))
    parser.add_argument("--contend", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        name, folder, contender, first, second = options.contend
        run = loop if contender == "loop" else lambda folder, workload, workers, _: dynams(folder, workload, workers)
        run(Path(folder), WORKLOADS[name], int(first), int(second))
        return
    print("| | cores | loop, samples/s | dynams | dynams of loop | dynams: read, decode, forward, write (thread s) |")
    print("|---|---|---|---|---|---|")
    for name in options.workloads:
        folder = options.folder.resolve() / name
        prepare(folder, WORKLOADS[name])
        for cores in (1, 2):
            rates: dict[str, list[float]] = {"loop": [], "dynams": []}
            for _ in range(options.runs):
                for contender in rates:
                    found = measure(name, folder, contender, cores)
                    rates[contender].append(found["rate"])
            by_hand, ours = (statistics.median(rates[contender]) for contender in ("loop", "dynams"))
            ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
            split = ", ".join(f"{seconds:g}" for seconds in found["split"].values())
            print(f"| {name} | {cores} | {by_hand:,.0f} | {ours:,.0f} | {ratio:.2f} | {split} |", flush=True)


if __name__ == "__main__":
    main()
