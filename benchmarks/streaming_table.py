"""The tables and plots of what `streaming.py` has measured, from its lines alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PEERS = ("webdataset", "mosaic", "litdata", "litdata-subset", "energon")
BARE = ("pread", "obstore", "memory")
HEADS = {
    "ours-first": "ours, a first epoch",
    "ours-saving": "ours, saving requests",
    "bare": "bare loop",
    "litdata-subset": "litdata subset",
    "energon": "Energon",
}
_CELL = ("kilobytes", "samples", "place", "way", "workers", "fraction")

Line = dict[str, Any]


def rows(lines: Sequence[Line]) -> list[Line]:
    """One row for each cell: medians by contender, and ratios of ours, taken within turns.

    Keys: those of the cell; `selected`; by contender its median rate; `bare` (the name of the loop that bounds ours),
    `of_bare`, `best_peer`, `of_best_peer`; `first_batch_ms`; of the store also `costs` by contender.
    """
    cells: dict[tuple[Any, ...], dict[str, list[Line]]] = {}
    checks: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in lines:
        if line["kind"] == "run":
            cells.setdefault(_cell(line), {}).setdefault(line["contender"], []).append(line)
        elif line["kind"] == "check":
            checks.setdefault(_cell(line), {})[line["contender"]] = line
    return [_row(cell, cells[cell], checks.get(cell, {})) for cell in sorted(cells, key=_place_in_table)]


def _place_in_table(cell: tuple[Any, ...]) -> tuple[Any, ...]:
    kilobytes, samples, place, way, workers, fraction = cell
    return place, workers, kilobytes, samples, way == "decode", -float(fraction)


def _cell(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in _CELL)


def _row(cell: tuple[Any, ...], runs: dict[str, list[Line]], checks: dict[str, Line]) -> Line:
    row: Line = dict(zip(_CELL, cell, strict=True))
    row["selected"] = -(-round(float(row["fraction"]) * 1000) * row["samples"] // 1000)
    medians = {name: statistics.median(line["rate"] for line in found) for name, found in runs.items()}
    row["rates"] = {name: round(median, 1) for name, median in medians.items()}
    row["runs"] = min(map(len, runs.values()))
    row["bare"] = next((name for name in BARE if name in medians), None)
    row["of_bare"] = _ratio(runs, "ours", row["bare"])
    row["best_peer"] = max((name for name in PEERS if name in medians), key=medians.__getitem__, default=None)
    row["of_best_peer"] = _ratio(runs, "ours", row["best_peer"])
    if "ours-first" in runs:
        row["first_batch_ms"] = statistics.median(line["first_batch_ms"] for line in runs["ours-first"])
    if "server" in runs:
        row["server_busy"] = statistics.median(line["server_busy"] for line in runs["server"])
    names = ("requests_per_sample", "over_read", "retries")
    row["costs"] = {
        contender: {name: line[name] for name in names} for contender, line in checks.items() if names[0] in line
    }
    return row


def _ratio(runs: dict[str, list[Line]], name: str, other: str | None) -> float | None:
    """The median over the turns of one contender's rate as a multiple of another's."""
    if other is None or name not in runs:
        return None
    others = {line["turn"]: line["rate"] for line in runs[other]}
    ratios = [line["rate"] / others[line["turn"]] for line in runs[name] if line["turn"] in others]
    return round(statistics.median(ratios), 3) if ratios else None


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(lines: Sequence[Line]) -> str:
    """All tables, with the machine and the versions."""
    found = rows(lines)
    parts = [_about(lines), _rates(found)]
    if any(row["place"] == "store" and row["way"] == "raw" and row["workers"] == 0 for row in found):
        parts.append(_store(found))
    return "\n\n".join(parts)


def _about(lines: Sequence[Line]) -> str:
    machines = [line for line in lines if line["kind"] == "machine"]
    used = machines[-1] if machines else {"processor": "?", "cores": 0, "memory_gb": 0, "python": "?"}
    versions = {line["contender"]: line["version"] for line in lines if line["kind"] == "run" and line["version"]}
    packages = [name for name in ("ours", *PEERS) if name in versions and name != "litdata-subset"]
    named = ", ".join(f"{name} {versions[name]}" for name in packages)
    return (
        f"Samples a second, medians; {used['processor']}, {used['cores']} cores, {used['memory_gb']} GB, "
        f"Python {used['python']}; {named}"
    )


def _rates(found: Sequence[Line]) -> str:
    names = ["ours", "ours-first", "bare", *PEERS]
    names = [name for name in names if name == "bare" or any(name in row["rates"] for row in found)]
    heads = [HEADS.get(name, name) for name in names]
    head = ["shards", "sample", "way", "workers", "γ", "selected", *heads, "of the bare loop", "of the best peer"]
    body = []
    for row in found:
        rates = {**row["rates"], "bare": row["rates"].get(row["bare"])}
        of_peer = f"{_number(row['of_best_peer'])} ({row['best_peer']})" if row["best_peer"] else ""
        cell = [row["place"], f"{row['kilobytes']} KB", row["way"], row["workers"], row["fraction"]]
        values = [_number(rates.get(name)) for name in names]
        body.append([*cell, f"{row['selected']:,}", *values, _number(row["of_bare"]), of_peer])
    return _table(head, body)


def _store(found: Sequence[Line]) -> str:
    head = ["sample", "γ"]
    for name in ("ours", "ours-saving"):
        head += [HEADS.get(name, name), "requests a sample", "over-read"]
    head += ["bare obstore", "server answers", "server busy", "first batch, ms"]
    body = []
    for row in found:
        if row["place"] != "store" or row["way"] != "raw" or row["workers"]:
            continue
        line = [f"{row['kilobytes']} KB", row["fraction"]]
        for name in ("ours", "ours-saving"):
            costs = row["costs"].get(name, {})
            over = costs.get("over_read")
            line += [_number(row["rates"].get(name)), _number(costs.get("requests_per_sample"))]
            line.append("" if over is None else f"{over:.0%}")
        line += [_number(row["rates"].get(name)) for name in ("obstore", "server")]
        busy = row.get("server_busy")
        line += ["" if busy is None else f"{busy:.0%}", _number(row.get("first_batch_ms"))]
        body.append(line)
    return _table(head, body)


def _table(head: Sequence[Any], body: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- plots -----------------------------------------------------------------------------------------------------------


def plots(lines: Sequence[Line], stem: Path) -> list[Path]:
    """One picture for each place and number of workers, next to the results."""
    import plots as drawing

    found = rows(lines)
    groups = dict.fromkeys((row["place"], row["workers"]) for row in found)
    return [
        drawing.draw_rates(
            [row for row in found if (row["place"], row["workers"]) == (place, workers)],
            stem.with_name(f"{stem.name}-{place}-{workers}-workers.png"),
            f"{'local shards, page cache' if place == 'local' else 'object store, 20 ms a request'}, {workers} workers",
        )
        for place, workers in groups
    ]
