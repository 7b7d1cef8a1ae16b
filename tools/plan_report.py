"""What `dynams plan` prints: a schedule by round, its cost against full data, and whether the proxy pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dynams_stream.costs import RunCost, StepCosts, break_even_fraction, epoch_costs, full_cost, selected_cost
from dynams_stream.power_law import PowerLaw
from dynams_stream.schedule import Schedule
from dynams_stream.selection import selected_count

Scoring = Literal["proxy", "model"]
Rows = list[dict[str, Any]]


def schedule_rows(schedule: Schedule, samples: int) -> Rows:
    """A line for each run of epochs that train on the same samples: first and last epoch, fraction, samples."""
    rows: Rows = []
    for epoch in range(schedule.epochs):
        fraction, begins = schedule.fraction(epoch), schedule.starts_round(epoch)
        of_round = schedule.round(epoch) is not None and not schedule.draws(epoch)
        same = rows and not begins and rows[-1]["fraction"] == fraction
        if same and (rows[-1]["round"] is not None) == of_round:
            rows[-1]["last"] = epoch
            continue
        number = 1 + sum(row["round"] is not None for row in rows) if begins else None
        rows.append(
            {"round": number, "first": epoch, "last": epoch, "fraction": fraction,
             "samples": selected_count(fraction, samples)}
        )  # fmt: skip
    return rows


def compared(schedule: Schedule, samples: int, costs: StepCosts, *, width: float, every: int) -> Rows:
    """Full data, DynaMS with the proxy and DynaMS scored by the model, with each part's cost and the total's share."""
    full = full_cost(schedule.epochs, samples, costs)
    rows = [_row("full data", full, full)]
    if width != 1:
        name = f"DynaMS, proxy {width:g}" + (f", {_each(every)}" if every > 1 else "")
        cost = selected_cost(schedule, samples, costs, scorer="proxy", every=every)
        rows.append(_row(name, cost, full) | _break_even(costs, schedule, "proxy", every))
    cost = selected_cost(schedule, samples, costs, scorer="model")
    rows.append(_row("DynaMS, scored by the model", cost, full) | _break_even(costs, schedule, "model", 1))
    return rows


def _row(name: str, cost: RunCost, full: RunCost) -> dict[str, Any]:
    return {
        "name": name,
        "trained": cost.trained,
        "scored": cost.scored,
        "training": cost.training,
        "proxy_training": cost.proxy_training,
        "scoring": cost.scoring,
        "reading": cost.reading,
        "total": cost.total,
        "of_full": cost.total / full.total,
    }


def _break_even(costs: StepCosts, schedule: Schedule, scorer: Scoring, every: int) -> dict[str, Any]:
    return {"break_even_fraction": break_even_fraction(costs, schedule.interval, scorer=scorer, every=every)}


def costs_by_epoch(
    schedule: Schedule, samples: int, costs: StepCosts, *, width: float, every: int
) -> dict[str, list[float]]:
    """What each epoch costs, of the same three."""
    found = {"full data": [samples * costs.training] * schedule.epochs}
    if width != 1:
        along = epoch_costs(schedule, samples, costs, scorer="proxy", every=every)
        found[f"DynaMS, proxy {width:g}"] = [cost.total for cost in along]
    itself = epoch_costs(schedule, samples, costs, scorer="model")
    return {**found, "DynaMS, scored by the model": [cost.total for cost in itself]}


def proxy_settings(schedule: Schedule, samples: int, costs: Mapping[float, StepCosts], every: Sequence[int]) -> Rows:
    """The total cost of each proxy width and step, as a share of full data's, the cheapest first."""
    rows = [
        {
            "width": width,
            "every": each,
            "of_full": selected_cost(schedule, samples, one, scorer="proxy", every=each).total
            / full_cost(schedule.epochs, samples, one).total,
        }
        for width, one in costs.items()
        for each in every
    ]
    return sorted(rows, key=lambda row: row["of_full"])


def expected_errors(law: PowerLaw, fractions: Sequence[float], samples: int) -> Rows:
    """What a random subset of each fraction is expected to cost in test error, with a 90 % interval."""
    return [
        {"fraction": fraction, "samples": count, "error": law.error(count), "interval": law.interval(count)}
        for fraction, count in ((one, selected_count(one, samples)) for one in fractions)
    ]


# ---- in words --------------------------------------------------------------------------------------------------------


def schedule_text(schedule: Schedule, rows: Rows) -> str:
    """The schedule by round."""
    lines = [
        f"{type(schedule).__name__}: {schedule.epochs} epochs, {schedule.rounds} rounds, "
        f"mean fraction {schedule.mean_fraction():.3f}",
        f"{'round':>6} {'epochs':>9} {'fraction':>9} {'samples an epoch':>17}",
    ]
    for row in rows:
        epochs = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}–{row['last']}"
        number = "–" if row["round"] is None else row["round"]
        lines.append(f"{number:>6} {epochs:>9} {row['fraction']:>9.4g} {row['samples']:>17,}")
    return "\n".join(lines)


def cost_text(rows: Rows, unit: str) -> str:
    """The comparison in one unit."""
    parts = ["training", "proxy_training", "scoring", *(["reading"] if unit == "seconds" else []), "total"]
    titles = {"proxy_training": "proxy"}
    heading = f"{unit:<30} {'samples trained':>15} {'scored':>13} "
    lines = [heading + " ".join(f"{titles.get(part, part):>10}" for part in parts) + f" {'of full':>8}"]
    for row in rows:
        amounts = " ".join(f"{_amount(row[part], unit):>10}" for part in parts)
        lines.append(
            f"{row['name']:<30} {row['trained']:>15,} {row['scored']:>13,} {amounts} {100 * row['of_full']:>6.0f} %"
        )
    return "\n".join(lines)


def verdict_text(rows: Rows, settings: Rows, unit: str, interval: int) -> str:
    """Whether the proxy pays, in words."""
    by_model = rows[-1]
    lines = []
    if len(rows) == 3:
        by_proxy = rows[1]
        cheaper = by_proxy["of_full"] < by_model["of_full"]
        lines.append(
            f"By {unit}, the proxy {'pays' if cheaper else 'does not pay'}: {100 * by_proxy['of_full']:.0f} % of full "
            f"data with it, {100 * by_model['of_full']:.0f} % scored by the model itself (--width 1)."
        )
    for row in rows[1:]:
        limit = row["break_even_fraction"]
        what = f"pays below γ = {limit:.2f}" if 0 < limit < 1 else "never pays" if limit <= 0 else "always pays"
        lines.append(f"{row['name']}: a round of {interval} epoch{'s' if interval > 1 else ''} {what}.")
    if settings:
        best = settings[0]
        lines.append(
            f"The cheapest by FLOPs has width {best['width']:g}, trained {_each(best['every'])}: "
            f"{100 * best['of_full']:.0f} % of full data. What it selects is another question."
        )
    return "\n".join(lines)


def errors_text(law: PowerLaw, rows: Rows) -> str:
    """The power law and what it expects."""
    lines = [
        f"err(n) = {law.a:.4g} · n^(−{law.b:.3f}) + {law.c:.4g}, residual {100 * law.residual:.1f} % of an error",
        f"{'fraction':>9} {'samples':>13} {'test error of a random subset, 90 % interval':>46}",
    ]
    for row in rows:
        low, high = row["interval"]
        expected = f"{100 * row['error']:.2f} %  ({100 * low:.2f} … {100 * high:.2f})"
        lines.append(f"{row['fraction']:>9.4g} {row['samples']:>13,} {expected:>46}")
    return "\n".join(lines)


def _each(every: int) -> str:
    return "in every step" if every == 1 else f"in 1 of {every} steps"


def _amount(value: float, unit: str) -> str:
    if value == 0:
        return "–"
    if unit == "seconds":
        return f"{value:,.0f} s" if value < 36_000 else f"{value / 3600:,.0f} h"
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:,.3g} {prefix}"
    return f"{value:,.3g}"
