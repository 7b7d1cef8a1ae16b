"""`dynams shard`: write shards from a torchvision dataset or an image folder, with the store's index alongside."""

from __future__ import annotations

from typing import Annotated

import typer

from dynams_stream.store import Store
from pipeline.index_job import build_index
from pipeline.shards import SOURCES, open_source, write_shards
from tools.command import ConfigOption, DebugOption, JsonOption, run, show
from tools.progress import progress_bar

app = typer.Typer(add_completion=False)


@app.command()
def shard(
    dataset: Annotated[str, typer.Option("--dataset", help=f"One of {', '.join(SOURCES)}.")],
    out: Annotated[
        str, typer.Option("--out", help="Folder for the shards, and for the store unless --store is given.")
    ],
    root: Annotated[
        str, typer.Option("--root", help="Where the dataset's files lie (nothing is downloaded); the image folder.")
    ] = "data",
    split: Annotated[str, typer.Option("--split", help="train or test.")] = "train",
    samples_per_shard: Annotated[int, typer.Option("--samples-per-shard", min=1, help="Samples of a shard.")] = 3000,
    shuffle_seed: Annotated[
        int | None, typer.Option("--shuffle-seed", help="Shuffle the samples with this seed before they are written.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Store to index the shards into. Default: --out.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a dataset as WebDataset tar shards and index them.

    Example: dynams shard --dataset mnist --root ../shared/data --out data/mnist --samples-per-shard 3000
    """
    source = open_source(dataset, root, split)
    with progress_bar("shard", "samples") as report:
        urls = write_shards(
            source, out, prefix=split, samples_per_shard=samples_per_shard, shuffle_seed=shuffle_seed,
            overwrite=overwrite, progress=report,
        )  # fmt: skip
    with progress_bar("index", "shards") as report:
        indexed = build_index(Store(store or out), urls, progress=report)
    result = {
        "shards": len(urls),
        "samples": indexed.samples,
        "first": urls[0],
        "last": urls[-1],
        "store": store or out,
        "dataset": indexed.dataset.version,
    }
    words = (
        f"{indexed.samples:,} samples in {len(urls):,} shards, {urls[0]} … {urls[-1].rsplit('/', 1)[-1]}\n"
        f"indexed into {store or out} as dataset version {indexed.dataset.version}"
    )
    show(result, words, json)


if __name__ == "__main__":
    run(app, name="dynams shard")
