"""The tables of `quality.py`, from the lines of its results: nothing here is written by hand."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from records import conditions, markdown, mean_and_spread

Row = dict[str, Any]
Place = tuple[Any, ...]  # data, model, limit, epochs, retrain epochs, structure, amount

MARGIN = 0.5  # points above a constant rate, from a quarter of the MACs down
SLACK = 1.0  # points below the peers' best schedule that are allowed
SMALL_BUDGET = 0.25
SCHEDULE = "our schedule"
OURS = "espalier default"


def document(rows: Sequence[Row]) -> str:
    """All tables as Markdown."""
    headers = [row for row in rows if "machine" in row]
    results = [row for row in rows if "method" in row]
    if not results:
        return "No results yet."
    settings = sorted({_setting(row) for row in results}, key=str)
    threads = sorted({header["threads"] for header in headers})
    revisions = dict.fromkeys(header["revision"] for header in headers if header.get("revision"))
    measured = f" Revision {', '.join(revisions)}." if revisions else ""
    parts = [f"{conditions(headers[-1])} Threads: {', '.join(map(str, threads))}.{measured}"]
    for epochs, retrain_epochs, limit in settings:
        of_setting = [row for row in results if _setting(row) == (epochs, retrain_epochs, limit)]
        images = "all" if limit is None else f"{limit:,}"
        parts.append(
            f"Dense networks trained for {epochs} epochs on {images} training images, retrained for {retrain_epochs}. "
            "Accuracy in %, mean ± standard deviation over the seeds; differences in points."
        )
        parts += [against_peers(of_setting), of_variants(of_setting), failures(of_setting)]
    return "\n\n".join(part for part in parts if part)


def against_peers(results: Sequence[Row]) -> str:
    """Ours against the better of the peers, at a constant rate and along our schedule."""
    body = []
    for place, rows in _by(results, _place):
        ours = _accuracies(row for row in rows if row["method"] == OURS)
        if not ours:
            continue
        dense = [100 * value for value in {row["seed"]: row["dense"] for row in rows}.values()]
        constant = _best(rows, lambda row: row["retrain"].startswith("constant"))
        schedule = _best(rows, lambda row: row["retrain"] == SCHEDULE)
        line = [*_named(place), mean_and_spread(dense), mean_and_spread(list(ours.values())), _macs(rows, OURS)]
        line += _peer(constant) + _peer(schedule)
        line += [_difference(ours, constant), _difference(ours, schedule), _goal(place, ours, constant, schedule)]
        body.append([*line, str(len(ours))])
    head = ["data", "network", "pruned to", "dense", "ours", "its MACs", "peer, constant rate", "which"]
    head += ["peer, our schedule", "which", "ours - constant", "ours - schedule", "goal", "seeds"]
    return markdown(head, body) if body else ""


def of_variants(results: Sequence[Row]) -> str:
    """Our variants against our default, over the seeds that both have."""
    ours = [row for row in results if row["method"].startswith("espalier ")]
    names = list(dict.fromkeys(row["method"] for row in ours if row["method"] != OURS))
    body = []
    for place, rows in _by(ours, _place):
        usual = _accuracies(row for row in rows if row["method"] == OURS)
        cells = []
        for name in names:
            other = _accuracies(row for row in rows if row["method"] == name)
            cells.append(_paired(other, usual))
        if usual and any(cell != "-" for cell in cells):
            body.append([*_named(place), mean_and_spread(list(usual.values())), *cells])
    head = ["data", "network", "pruned to", "default", *(name.removeprefix("espalier ") for name in names)]
    return "Our variants: points above our default.\n\n" + markdown(head, body) if body else ""


def failures(results: Sequence[Row]) -> str:
    """What a library could not do."""
    found: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for row in results:
        if "error" in row:
            found[row["model"], row["method"], row["error"].partition("\n")[0]].add(row["seed"])
    lines = [
        f"- {model}: {method} fails ({error}; {len(seeds)} seeds)" for (model, method, error), seeds in found.items()
    ]
    return "\n".join(lines)


def _setting(row: Row) -> tuple[int, int, int | None]:
    return row["epochs"], row["retrain_epochs"], row["limit"]


def _place(row: Row) -> Place:
    return row["data"], row["model"], row["structure"], row["amount"]


def _by(rows: Iterable[Row], key: Callable[[Row], Place]) -> list[tuple[Place, list[Row]]]:
    groups: dict[Place, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    order = {"weights": 0, "channels": 1}
    return sorted(
        groups.items(),
        key=lambda item: (*item[0][:2], order[item[0][2]], item[0][3] if item[0][2] == "weights" else -item[0][3]),
    )


def _named(place: Place) -> list[str]:
    data, model, structure, amount = place
    what = f"{amount:.0%} zeros" if structure == "weights" else f"{amount:g} of the MACs"
    return [data, model, what]


def _accuracies(rows: Iterable[Row]) -> dict[int, float]:
    """Seed -> accuracy in %; a later line of the same seed counts."""
    return {row["seed"]: 100 * row["accuracy"] for row in rows if "accuracy" in row}


def _best(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> tuple[str, dict[int, float]] | None:
    """The peer with the highest mean accuracy: its name, its accuracies by seed."""
    groups: dict[str, dict[int, float]] = {}
    for row in rows:
        if not row["method"].startswith("espalier ") and wanted(row):
            rate = "" if row["retrain"] == SCHEDULE else f", {row['retrain']}"
            groups.setdefault(row["method"] + rate, {}).update(_accuracies([row]))
    full = {name: values for name, values in groups.items() if values}
    return max(full.items(), key=lambda item: statistics.mean(item[1].values()), default=None)


def _peer(best: tuple[str, dict[int, float]] | None) -> list[str]:
    return ["-", "-"] if best is None else [mean_and_spread(list(best[1].values())), best[0]]


def _macs(rows: Sequence[Row], method: str) -> str:
    kept = [row["macs"] for row in rows if row["method"] == method and "macs" in row]
    return f"{statistics.mean(kept):.3f}"


def _mean_difference(ours: dict[int, float], other: dict[int, float]) -> float | None:
    both = sorted(ours.keys() & other.keys())
    return statistics.mean(ours[seed] - other[seed] for seed in both) if both else None


def _difference(ours: dict[int, float], best: tuple[str, dict[int, float]] | None) -> str:
    return "-" if best is None else _paired(ours, best[1])


def _paired(values: dict[int, float], other: dict[int, float]) -> str:
    both = sorted(values.keys() & other.keys())
    if not both:
        return "-"
    differences = [values[seed] - other[seed] for seed in both]
    spread = f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.2f}{spread}"


def _goal(
    place: Place,
    ours: dict[int, float],
    constant: tuple[str, dict[int, float]] | None,
    schedule: tuple[str, dict[int, float]] | None,
) -> str:
    """Whether the goals hold here: above a constant rate, not far below the best schedule."""
    *_, structure, amount = place
    needed = MARGIN if structure == "channels" and amount <= SMALL_BUDGET else 0.0
    missed = []
    for best, least, name in ((constant, needed, "constant"), (schedule, -SLACK, "schedule")):
        found = None if best is None else _mean_difference(ours, best[1])
        if found is not None and found < least:
            missed.append(f"{name}: {least - found:.2f} short")
    return "; ".join(missed) if missed else "met"
