"""The options that say how to score, shared by `dynams score` and `dynams rescore`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from dynams_stream.errors import UsageError
from dynams_stream.scorer import ScorerSpec, require_device
from pipeline.lease import OnBusy
from pipeline.score_job import Progress, ScoreProgress
from tools.progress import progress_bar

ModelOption = Annotated[str, typer.Option("--model", help="module:callable that returns the full-width nn.Module.")]
ModelArgsOption = Annotated[str, typer.Option("--model-args", help="Its keyword arguments, as a JSON object.")]
HeadOption = Annotated[
    str | None, typer.Option("--head", help="Name of the last linear layer, where it is not found by itself.")
]
_MOST_SHOWN = 200
"""Characters of a wrong value that a message shows."""

WidthOption = Annotated[
    float, typer.Option("--width", help="Width of the slim proxy in the checkpoint; 1 scores with the model itself.")
]
InputOption = Annotated[
    str | None, typer.Option("--input", help="The image's extension, several as 'jpg;png'. Default: the first shard's.")
]
LabelOption = Annotated[
    str | None,
    typer.Option("--label", help="Extension of an integer label, or json:field. Default: cls where it is there."),
]
TransformOption = Annotated[
    str | None,
    typer.Option("--transform", help="module:callable from PIL.Image to tensor. Default: RGB float32 in [0, 1]."),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per forward pass.")]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="auto (bfloat16 on GPUs, float32 elsewhere), float32 or bfloat16.")
]
CompileOption = Annotated[bool, typer.Option("--compile", help="Run the network through torch.compile.")]
LeastSideOption = Annotated[
    int | None,
    typer.Option(
        "--least-side", min=1, help="Decode JPEGs at 1/2, 1/4, 1/8 of their size while both sides keep so many pixels."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", callback=require_device, help="cpu, cuda (every GPU, a worker for each), or one GPU as cuda:0."
    ),
]
OnBusyOption = Annotated[
    str,
    typer.Option("--on-busy", help="When another job works on the store: skip (exit 3, naming it), or wait for it."),
]


def busy_policy(text: str) -> OnBusy:
    """What `--on-busy` means.

    Raises:
        UsageError: it is neither skip nor wait.
    """
    if text not in ("skip", "wait"):
        raise UsageError(f"--on-busy is skip or wait; got {text!r}")
    return "wait" if text == "wait" else "fail"


def scorer_spec(
    model: str,
    model_args: str,
    head: str | None,
    width: float,
    input: str | None,
    label: str | None,
    transform: str | None,
    batch_size: int,
    precision: str = "auto",
    compile: bool = False,
    least_side: int | None = None,
) -> ScorerSpec:
    """The spec that the flags describe.

    Raises:
        UsageError: when --model-args is not a JSON object.
    """
    try:
        arguments = json.loads(model_args)
    except ValueError as error:
        raise UsageError(f"--model-args {_shown(model_args)} is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise UsageError(
            f"--model-args must be a JSON object such as '{{\"num_classes\": 10}}'; got {_shown(model_args)}"
        )
    return ScorerSpec(
        model=model, model_args=arguments, head=head, width=width, input=input, label=label, transform=transform,
        batch_size=batch_size, precision=precision, compile=compile,
        least_side=least_side,
    )  # fmt: skip


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…")


@contextmanager
def scoring_progress() -> Iterator[Progress]:
    """A bar over samples that says what bounds the job and how many samples failed."""
    with progress_bar("score", "samples") as report:

        def show(state: ScoreProgress) -> None:
            note = time_split(state.seconds) + (f", {state.failed:,} failed" if state.failed else "")
            report(state.done, state.samples, note=note, resumed=state.resumed)

        yield show


def time_split(seconds: object) -> str:
    """`read 10 %, decode 30 %, forward 58 %, write 2 %`."""
    items = dict(seconds)  # type: ignore[call-overload]
    total = sum(items.values())
    return ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in items.items()) if total else ""
