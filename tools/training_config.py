"""The configuration of a reference training run (`dynams train --config …`), validated by pydantic."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic

from dynams_stream.errors import UsageError
from dynams_stream.schedule import Schedule, make_schedule
from pipeline.rounds import require_round

Method = Literal["full", "short", "random", "fresh-random", "static", "infobatch", "dynams"]
METHODS: tuple[Method, ...] = get_args(Method)
"""What can be compared:

full          every sample, each epoch
short         every sample, for as many steps as the schedule takes
random        a fixed random order; each epoch trains on its first ⌈γN⌉ samples
fresh-random  another random subset of ⌈γN⌉ samples in each epoch
static        the margins of the first round; each epoch trains on the ⌈γN⌉ smallest of them
infobatch     what InfoBatch keeps: all samples of a loss above the mean, and some of the others, weighted up
dynams        the ⌈γN⌉ smallest margins of the current model, scored anew in each round by the proxy
"""


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Strict):
    """Where the images come from; shards are written once, below `out`.

    `wrong_labels` of the training images get another class, drawn at random. `imbalance` makes a long tail: classes
    fall geometrically from all of their training images to one `imbalance`-th. Both are drawn with `seed`.
    `train_transform`, where there is one, takes the place of `transform` in training: it may augment. Scoring and
    testing never do.
    """

    dataset: str
    root: str = "data"
    samples_per_shard: int = pydantic.Field(3000, ge=1)
    wrong_labels: float = pydantic.Field(0.0, ge=0, lt=1)
    imbalance: float = pydantic.Field(1.0, ge=1)
    seed: int = pydantic.Field(0, ge=0)
    transform: str
    train_transform: str | None = None
    input: str = "png"
    label: str = "cls"


class ModelConfig(_Strict):
    """The network and its proxy: p, how often it takes part in a step, and λ."""

    factory: str
    args: dict[str, Any] = {}
    head: str | None = None
    channels_last: bool = False
    width: float = pydantic.Field(0.5, gt=0, le=1)
    every: int = pydantic.Field(1, ge=1)
    proxy_weight: float = pydantic.Field(1.0, ge=0)


class TrainingConfig(_Strict):
    """Epochs, batches and the optimizer: SGD with Nesterov momentum, one cycle of the learning rate; where it runs."""

    epochs: int = pydantic.Field(ge=1)
    batch_size: int = pydantic.Field(64, ge=1)
    learning_rate: float = pydantic.Field(0.1, gt=0)
    momentum: float = pydantic.Field(0.9, ge=0, lt=1)
    weight_decay: float = pydantic.Field(5e-4, ge=0)
    label_smoothing: float = pydantic.Field(0.0, ge=0, lt=1)
    device: Literal["cpu", "cuda"] = "cpu"
    bf16: bool = False
    loader_workers: int = pydantic.Field(1, ge=0)


class SelectionConfig(_Strict):
    """The schedule of fractions, the score that is selected on, and whether the proxy or the model computes it."""

    schedule: Literal["power", "linear", "cosine", "exponential", "constant", "step"] = "power"
    final: float | None = pydantic.Field(None, gt=0, le=1)
    budget: float | None = pydantic.Field(None, gt=0, le=1)
    warmup: int = pydantic.Field(2, ge=0)
    warmup_fraction: float = pydantic.Field(1.0, gt=0, le=1)
    anneal: int = pydantic.Field(0, ge=0)
    interval: int = pydantic.Field(5, ge=1)
    steps: int | None = pydantic.Field(None, ge=1)
    strategy: str = "distance"
    class_balance: bool = False
    min_per_class: int = pydantic.Field(0, ge=0)
    exclude_noisy: bool = False
    sample_weight: str | None = None
    scorer: Literal["proxy", "model"] = "model"
    fallback: Literal["full"] | None = None
    calibration_samples: int = pydantic.Field(2000, ge=0)

    def choices(self) -> dict[str, Any]:
        """What a round is asked about classes, wrong labels and weights, by the names that `run_round` gives them."""
        return {
            "class_balance": self.class_balance,
            "min_per_class": self.min_per_class,
            "exclude_noisy": self.exclude_noisy,
            "sample_weight": self.sample_weight,
        }


class RunConfig(_Strict):
    """One comparison: methods × seeds on one dataset, model and schedule."""

    out: Path
    methods: tuple[Method, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig
    selection: SelectionConfig

    def schedule(self) -> Schedule:
        """The schedule of fractions."""
        chosen = self.selection
        return make_schedule(
            chosen.schedule,
            steps=chosen.steps,
            epochs=self.training.epochs,
            warmup=chosen.warmup,
            warmup_fraction=chosen.warmup_fraction,
            anneal=chosen.anneal,
            interval=chosen.interval,
            final=chosen.final,
            budget=chosen.budget,
        )


def read_config(path: Path) -> RunConfig:
    """Read and validate a TOML file.

    Raises:
        UsageError: names the file, the key and what it should be.
    """
    try:
        config = RunConfig(**tomllib.loads(path.read_text()))
        chosen = config.selection
        require_round(config.schedule().last_fraction, chosen.strategy, chosen.fallback, chosen.choices())
    except FileNotFoundError as error:
        raise UsageError(f"--config {path}: no such file") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: {error}") from error
    except pydantic.ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UsageError(f"--config {path}:\n" + "\n".join(lines)) from error
    return config
