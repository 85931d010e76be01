"""What 2:4 zeros, low rank and 8 bits cost in accuracy, as whole jobs with every default.

    .venv/bin/python benchmarks/compressions.py [--data emoji-vendors] [--seeds 3] [--resume]
    .venv/bin/python benchmarks/compressions.py --table [--write]

Each cell is a job that trains, compresses, retrains where its default says so, exports and verifies; its report says how
good the dense and the final network are. The goal: within a point of the dense network, or the report says why not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data_sets
import quality
import records
import torch

from worker.journal import MemoryJournal
from worker.pipeline import Delivered
from worker.pipeline import run as run_job
from worker.run.job import Task

STEPS: dict[str, dict[str, Any]] = {
    "2:4 zeros": {"type": "prune", "pattern": "2:4"},
    "low rank, half the MACs": {"type": "low_rank", "budget": {"macs": 0.5}},
    "8 bits": {"type": "quantize"},
}
GOAL = 1.0  # points below the dense network

Row = dict[str, Any]


def carry_out(setting: quality.Setting, step: dict[str, Any], threads: int) -> Row:
    """Accuracies of the dense and the compressed network, by the job's report."""
    retrain = {} if step["type"] == "quantize" else {"retrain": {"epochs": setting.retrain_epochs}}
    with tempfile.TemporaryDirectory() as scratch:
        spec = setting.spec([step | retrain])
        task = Task(
            "compressions", 1, spec, data_sets.packed(setting.data, quality.CACHE), Path(scratch), threads=threads
        )
        began = time.perf_counter()
        outcome = run_job(task, MemoryJournal(keep=False))
    assert isinstance(outcome, Delivered), outcome
    report = outcome.report
    found = report["int8"] if step["type"] == "quantize" else report["final"]
    notes = [note for note in report["notes"] if "accuracy" in note or "within" in note]
    accuracies = {"dense": report["baseline"]["accuracy"], "accuracy": found["accuracy"]}
    return accuracies | {"notes": notes, "seconds": round(time.perf_counter() - began, 1)}


def run(options: argparse.Namespace, path: Path) -> None:
    """Carry out the jobs that the file has no line of yet."""
    done = {_identity(row) for row in records.rows(path)} if path.exists() else set()
    records.append(path, records.about() | {"threads": options.threads})
    for seed in range(options.seeds):
        for data in options.data:
            limit = quality.LIMITS.get(data)
            for model in options.models or quality.MODELS[data]:
                setting = quality.Setting(data, model, limit, options.epochs, options.retrain_epochs, seed)
                for name, step in STEPS.items():
                    row = setting.key() | {"compression": name}
                    if _identity(row) in done:
                        continue
                    found = carry_out(setting, step, options.threads)
                    records.append(path, row | found)
                    print(
                        f"seed {seed} {data} {model} {name}: {found['dense']:.4f} -> {found['accuracy']:.4f}",
                        flush=True,
                    )


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(
        row.get(name) for name in ("data", "model", "limit", "epochs", "retrain_epochs", "seed", "compression")
    )


def table(rows: Sequence[Row]) -> str:
    """A row a data set and network: the dense network, and the difference of each compression."""
    headers, results = [row for row in rows if "machine" in row], [row for row in rows if "compression" in row]
    if not results:
        return "No results yet."
    cells: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    dense: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in results:
        place = row["data"], row["model"]
        cells[place][row["compression"]].append(100 * (row["accuracy"] - row["dense"]))
        dense[place][row["seed"]] = 100 * row["dense"]
    body = []
    for place, found in sorted(cells.items()):
        missed = [name for name, values in found.items() if statistics.mean(values) < -GOAL]
        line = [*place, records.mean_and_spread(list(dense[place].values()))]
        line += [_points(found.get(name, [])) for name in STEPS]
        body.append([*line, ", ".join(missed) or "met", str(len(dense[place]))])
    head = ["data", "network", "dense", *STEPS, "goal", "seeds"]
    return f"{records.conditions(headers[-1])} Points above the dense network.\n\n{records.markdown(head, body)}"


def _points(values: Sequence[float]) -> str:
    return "-" if not values else f"+{records.mean_and_spread(values)}".replace("+-", "-")


def main() -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = ["fashion-mnist", "emoji-vendors", "mnist1d", "letters"]
    parser.add_argument("--data", nargs="+", default=usual, choices=data_sets.SHAPES)
    parser.add_argument("--models", nargs="+", help="default: those that go with the data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--retrain-epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    records.add_gathering_options(parser)
    parser.add_argument("--short", action="store_true", help="jobs on images drawn from a seed: does it still run?")
    options = parser.parse_args()
    if options.short:
        options.data, options.seeds, options.epochs, options.retrain_epochs = ["synthetic"], 1, 2, 1
    records.gather("compressions", options, run, table)


if __name__ == "__main__":
    main()
