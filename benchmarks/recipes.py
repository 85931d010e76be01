"""Which recipe trains best in how many steps: the grid by which the defaults of a training were chosen.

    .venv/bin/python benchmarks/recipes.py [--parts optimizers] [--sets clothes-5000] [--epochs 3 5 12] [--resume]
    .venv/bin/python benchmarks/recipes.py --table [--write]                 # the tables of what is there; store it

Every cell is the training of a job. Part `optimizers`: {SGD, Muon} x rate x batch. The other parts change one thing of
a plain job: the shape of the rate, augmentation, label smoothing, the average of the weights, how weights start. The
accuracy is that on images that the job does not train on, and never on the test images of the other benchmarks: 5,000
further clothes, signals, or the emoji of a vendor of its own. Lines are written as they come.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_sets
import records
import torch

from worker.evaluation import evaluate
from worker.journal import MemoryJournal
from worker.run import preparation, stages
from worker.run.job import Task

CACHE = records.ROOT / "var" / "benchmarks" / "cache"

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One data set and the network that is trained on it; `chosen_by` is the part whose accuracy counts."""

    data: str
    model: str
    limit: int | None = None
    validation: float = 0.0
    width: float = 1.0

    @property
    def chosen_by(self) -> str:
        """The validation part, or the test part of a data set that has it for this purpose."""
        return "validation" if self.validation else "test"


SUBJECTS = {
    "clothes-5000": Subject("fashion-mnist", "deep_cnn", 10_000, 0.5),
    "clothes-2000": Subject("fashion-mnist", "deep_cnn", 7_000, 5 / 7),
    "clothes-20000": Subject("fashion-mnist", "deep_cnn", 25_000, 0.2),
    "emoji": Subject("emoji-choice", "deep_cnn"),
    "emoji-resnet20": Subject("emoji-choice", "resnet20"),
    "signals": Subject("mnist1d", "audio_cnn", None, 0.2),
    "synthetic": Subject("synthetic", "simple_cnn", None, 0.2),
}
OPTIMIZERS = {"sgd": (0.2, 0.1, 0.05, 0.025), "muon": (0.4, 0.2, 0.1, 0.05)}
BATCHES = (16, 32, 64, 128)
ONE_CHANGE: dict[str, dict[str, dict[str, Any]]] = {
    "rate": {
        "warm-up of a tenth": {"warmup": 0.1},
        "no warm-up": {"warmup": 0.0},
        "cosine, warm-up of a tenth": {"schedule": "cosine", "warmup": 0.1},
        "cosine": {"schedule": "cosine", "warmup": 0.3},
    },
    "images": {
        "not flipped": {"augmentation": ["random_crop"]},
        "zeros": {"augmentation": ["random_crop_zeros", "horizontal_flip"]},
        "alternating": {"augmentation": ["random_crop", "alternating_flip"]},
        "cutout": {"augmentation": ["random_crop", "horizontal_flip", "cutout"]},
    },
    "loss": {
        "label smoothing 0.1": {"label_smoothing": 0.1},
        "label smoothing 0.2": {"label_smoothing": 0.2},
        "average 0.9": {"ema_decay": 0.9},
        "average 0.99": {"ema_decay": 0.99},
    },
    "decay": {
        "none": {"optimizer": "muon", "weight_decay": 0.0},
        "1e-3": {"optimizer": "muon", "weight_decay": 1e-3},
        "2e-3": {"optimizer": "muon", "weight_decay": 2e-3},
    },
}
PARTS = ("optimizers", *ONE_CHANGE)


def recipes(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what differs from a plain job) of every recipe of a part; a plain job is the first."""
    yield "default", {}
    if part != "optimizers":
        yield from ONE_CHANGE[part].items()
        return
    for name, rates in OPTIMIZERS.items():
        for batch in BATCHES:
            for rate in rates:
                yield f"{name} {rate}, batches of {batch}", {"optimizer": name, "lr": rate, "batch_size": batch}


def training(subject: Subject, epochs: int, seed: int, change: dict[str, Any]) -> dict[str, Any]:
    """The job's `training`."""
    pictures = len(data_sets.SHAPES[subject.data]) == 3
    made: dict[str, Any] = {"epochs": epochs, "seed": seed}
    made["augmentation"] = change.get("augmentation", ["random_crop", "horizontal_flip"]) if pictures else []
    optimizer = {"name": change["optimizer"]} if "optimizer" in change else {}
    optimizer |= {name: change[name] for name in ("lr", "weight_decay") if name in change}
    made |= {"optimizer": optimizer} if optimizer else {}
    if "schedule" in change or "warmup" in change:
        schedule = {"name": change.get("schedule", "one_cycle")}
        made["schedule"] = schedule | ({"warmup": change["warmup"] * epochs} if "warmup" in change else {})
    return made | {name: change[name] for name in ("batch_size", "label_smoothing", "ema_decay") if name in change}


def train(subject: Subject, asked: dict[str, Any], threads: int) -> Row:
    """Accuracy and seconds of one training."""
    source: dict[str, Any] = {"dataset": subject.data}
    if subject.data == "synthetic":
        source = {"synthetic": data_sets.SYNTHETIC}
    source |= {"validation": subject.validation} | ({"limit": subject.limit} if subject.limit else {})
    shape = list(data_sets.SHAPES[subject.data])
    spec = {
        "spec_version": 1,
        "data": source,
        "model": {"preset": subject.model, "input_shape": shape},
        "training": asked,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = data_sets.packed(subject.data, CACHE)
        task = Task("recipes", 1, spec, folder, Path(scratch), threads=threads, device="auto")
        job = preparation.prepare(task, MemoryJournal(keep=False))
        began = time.perf_counter()
        stages.run_stages(job)
        seconds = time.perf_counter() - began
        job.close()
    if job.validation is None:
        assert job.reached.record.baseline is not None
        accuracy = job.reached.record.baseline.accuracy
    else:
        accuracy = evaluate(job.reached.network, job.validation.epoch(0), job.precision).accuracy
    return {"accuracy": accuracy, "steps": job.reached.passed, "seconds": round(seconds, 1)}


def run(options: argparse.Namespace, path: Path) -> None:
    """Train what the file has no line of yet."""
    done = {_identity(row) for row in records.rows(path)} if path.exists() else set()
    records.append(path, records.about() | {"threads": options.threads})
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.sets:
            for epochs in options.epochs:
                for part in options.parts:
                    for recipe, change in recipes(part):
                        row = {"set": name, "epochs": epochs, "seed": seed, "part": part, "recipe": recipe}
                        if _identity(row) in done or (
                            options.only and not any(word in recipe for word in options.only)
                        ):
                            continue
                        subject = SUBJECTS[name]
                        found = train(subject, training(subject, epochs, seed, change), options.threads)
                        records.append(path, row | found)
                        done.add(_identity(row))
                        print(f"{name} {epochs} epochs, seed {seed}: {recipe}: {found['accuracy']:.4f}", flush=True)


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("set", "epochs", "seed", "part", "recipe"))


def table(rows: Sequence[Row]) -> str:
    """A table a part: the mean accuracy of each recipe in each set and number of epochs, and over all of them."""
    headers, results = [row for row in rows if "machine" in row], [row for row in rows if "recipe" in row]
    if not results:
        return "No results yet."
    tried = len({(row["part"], row["recipe"]) for row in results})
    parts = [
        f"{records.conditions(headers[-1])} Accuracy in % on images for choosing, mean over the seeds; {tried} recipes "
        f"in {len(results)} trainings."
    ]
    for part in dict.fromkeys(row["part"] for row in results):
        parts.append(_of_part(part, [row for row in results if row["part"] == part]))
    return "\n\n".join(parts)


def _of_part(part: str, rows: Sequence[Row]) -> str:
    found: dict[str, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["recipe"]][row["set"], row["epochs"]].append(100 * row["accuracy"])
    columns = sorted({(row["set"], row["epochs"]) for row in rows})
    body = []
    for recipe, cells in found.items():
        means = [statistics.mean(cells[column]) if cells[column] else None for column in columns]
        whole = f"{statistics.mean([mean for mean in means if mean is not None]):.2f}" if None not in means else "-"
        body.append([recipe, *("-" if mean is None else f"{mean:.2f}" for mean in means), whole])
    best = [max(found, key=lambda recipe: statistics.mean(found[recipe][column] or [0])) for column in columns]
    body.append(["**best**", *best, ""])
    seeds = len({row["seed"] for row in rows})
    head = [part, *(f"{name}, {epochs} epochs" for name, epochs in columns), "mean"]
    return f"Seeds: {seeds}.\n\n{records.markdown(head, body)}"


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--sets", nargs="+", default=["signals", "emoji", "clothes-5000"], choices=SUBJECTS)
    parser.add_argument("--epochs", nargs="+", type=int, default=[3, 5, 10, 12])
    parser.add_argument("--only", nargs="+", help="recipes whose name has one of these words")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    records.add_gathering_options(parser)
    parser.add_argument("--short", action="store_true", help="a few trainings on drawn images: does it still run?")
    options = parser.parse_args()
    if options.short:
        options.sets, options.epochs, options.seeds, options.parts = ["synthetic"], [1], 1, ["rate", "loss"]
    records.gather("recipes", options, run, table)


if __name__ == "__main__":
    main()
