"""The options that describe a schedule of fractions, shared by `dynams plan` and `dynams rescore`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynams_stream.schedule import SCHEDULES

ScheduleOption = Annotated[str, typer.Option("--schedule", help=f"One of {', '.join(SCHEDULES)}.")]
FinalOption = Annotated[float | None, typer.Option("--final", help="Fraction of the last round; or give --budget.")]
BudgetOption = Annotated[float | None, typer.Option("--budget", help="Mean fraction over all epochs.")]
WarmupOption = Annotated[int, typer.Option("--warmup", min=0, help="First epochs, on everything.")]
WarmupFractionOption = Annotated[
    float,
    typer.Option("--warmup-fraction", min=0, max=1, help="Or on so many random samples, drawn anew."),
]
AnnealOption = Annotated[int, typer.Option("--anneal", min=0, help="Last epochs, on everything.")]
IntervalOption = Annotated[int, typer.Option("--interval", min=1, help="Epochs of a round.")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Stages of the step schedule (3 unless given).")
]
WARMUP, ANNEAL, INTERVAL = 2, 0, 1
"""Defaults of these commands. (The interval is that of `Schedule`, no advice: docs/method.md has what pays.)"""
