"""The tables of `quality.py`, from the lines of its results: nothing here is written by hand."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from records import conditions, markdown, mean_and_spread

Row = dict[str, Any]
Place = tuple[Any, ...]  # data, model, limit, epochs, retrain epochs, structure, amount

CLEARLY = 1.0  # points above the peers at the smallest budgets
SMALL_BUDGET = 0.25  # of the MACs: from here on the lead is more than its standard error
SMALLEST = {"weights": 0.95, "channels": 0.12}
SCHEDULE = "our schedule"
OURS = "espalier default"
CONTROL = "control"
USUAL, PEERS_TRAINING = "default", "SGD, one cycle"
STRUCTURES = {"dense": 0, "weights": 1, "channels": 2}


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
        usual = [row for row in of_setting if _training(row) == USUAL]
        parts += [dense_networks(of_setting), against_peers(usual), against_peers_own(of_setting)]
        parts += [of_variants(usual), tried(usual), failures(of_setting)]
    return "\n\n".join(part for part in parts if part)


def dense_networks(results: Sequence[Row]) -> str:
    """The dense network of a plain job against those that peers train, and the control."""
    trained = [row for row in results if row["structure"] == "dense"]
    body = []
    for (data, model), rows in _by(trained, lambda row: (row["data"], row["model"])):
        by_training = {
            name: _accuracies(row for row in rows if row["method"] == f"training {name}")
            for name in dict.fromkeys(_training(row) for row in rows)
        }
        ours = by_training.pop(USUAL, {})
        if not ours:
            continue
        control = _accuracies(row for row in rows if row["method"] == CONTROL and _training(row) == USUAL)
        others = {name: values for name, values in by_training.items() if values}
        best = max(others.items(), key=lambda item: statistics.mean(item[1].values()), default=None)
        line = [data, model, mean_and_spread(list(ours.values()))]
        line += [mean_and_spread(list(control.values())) if control else "-", *_peer(best), _difference(ours, best)]
        line += ["-" if best is None else _at_least(ours, best[1]), str(len(ours))]
        body.append(line)
    head = ["data", "network", "ours", "control", "best of the peers' trainings", "which", "ours - it", "goal", "seeds"]
    title = "Dense networks. The control is ours, trained for as many epochs more as a retraining has.\n\n"
    return title + markdown(head, body) if body else ""


def against_peers(results: Sequence[Row]) -> str:
    """Ours against the best of all the peers' cells, from the same dense networks."""
    title = "From the same dense networks: the best of all the peers' scopes and schedules.\n\n"
    return _compared(results, results, title)


def against_peers_own(results: Sequence[Row]) -> str:
    """The same with peers that start from the dense networks of their own training."""
    ours = [row for row in results if _training(row) == USUAL]
    peers = [row for row in results if _training(row) == PEERS_TRAINING]
    title = f"Peers from dense networks of their own training ({PEERS_TRAINING}).\n\n"
    return _compared(ours, peers, title)


def _compared(our_rows: Sequence[Row], peer_rows: Sequence[Row], title: str) -> str:
    body = []
    others = dict(_by([row for row in peer_rows if row["structure"] != "dense"], _place))
    for place, rows in _by([row for row in our_rows if row["method"] == OURS], _place):
        ours, peers = _accuracies(rows), others.get(place, [])
        best = _best(peers)
        if best is None:
            continue
        dense = [100 * value for value in {row["seed"]: row["dense"] for row in rows}.values()]
        line = [*_named(place), mean_and_spread(dense), mean_and_spread(list(ours.values())), _macs(rows, OURS)]
        line += [*_peer(best), _difference(ours, best), _goal(place, ours, best[1]), str(len(ours))]
        body.append(line)
    head = [
        "data",
        "network",
        "pruned to",
        "dense",
        "ours",
        "its MACs",
        "best peer",
        "which",
        "ours - it",
        "goal",
        "seeds",
    ]
    return title + markdown(head, body) if body else ""


def tried(results: Sequence[Row]) -> str:
    """How many cells of each side stand behind the tables: the best of many is optimistic."""
    ours = {row["method"] for row in results if row["method"].startswith("espalier ")}
    peers = {(row["method"], row["retrain"]) for row in results if _is_peer(row)}
    return (
        f"Of ours one variant stands in the tables ({len(ours)} were run); of the peers the best of {len(peers)} cells."
    )


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
    return sorted(groups.items(), key=lambda item: _order(item[0]))


def _order(place: Place) -> tuple[Any, ...]:
    """Data and model by name; zeros before channels, the most that is left first."""
    if len(place) == 2:
        return place
    data, model, structure, amount = place
    return data, model, STRUCTURES[structure], amount if structure == "weights" else -amount


def _named(place: Place) -> list[str]:
    data, model, structure, amount = place
    what = f"{amount:.0%} zeros" if structure == "weights" else f"{amount:g} of the MACs"
    return [data, model, what]


def _accuracies(rows: Iterable[Row]) -> dict[int, float]:
    """Seed -> accuracy in %; a later line of the same seed counts."""
    return {row["seed"]: 100 * row["accuracy"] for row in rows if "accuracy" in row}


def _is_peer(row: Row) -> bool:
    return row["structure"] != "dense" and not row["method"].startswith("espalier ")


def _best(rows: Iterable[Row]) -> tuple[str, dict[int, float]] | None:
    """The peer's cell with the highest mean accuracy: its name, its accuracies by seed."""
    groups: dict[str, dict[int, float]] = {}
    for row in rows:
        if _is_peer(row):
            groups.setdefault(f"{row['method']}, {row['retrain']}", {}).update(_accuracies([row]))
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


def _goal(place: Place, ours: dict[int, float], best: dict[int, float]) -> str:
    """Whether the goal of the place is met: a lead of a point at the smallest, more than chance at a quarter of the MACs."""
    _, _, structure, amount = place
    if amount == SMALLEST[structure]:
        return _at_least(ours, best, CLEARLY)
    if structure == "channels" and amount <= SMALL_BUDGET:
        return _at_least(ours, best, _standard_error(ours, best))
    return _at_least(ours, best)


def _at_least(ours: dict[int, float], best: dict[int, float], lead: float = 0.0) -> str:
    found = _mean_difference(ours, best)
    if found is None:
        return "-"
    return "met" if found >= lead else f"{lead - found:.2f} short"


def _standard_error(values: dict[int, float], other: dict[int, float]) -> float:
    differences = [values[seed] - other[seed] for seed in sorted(values.keys() & other.keys())]
    return statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0


def _training(row: Row) -> str:
    return str(row.get("training", USUAL))
