"""How soon a plain job is as accurate as the loop of a tutorial is at its end.

    .venv/bin/python benchmarks/time_to_accuracy.py [--data clothes-choice emoji-choice] [--epochs 10] [--write]

The tutorial's loop: a `Dataset` whose transforms run image by image in PIL (a crop of 4 pixels with zeros, a flip, to a
tensor, normalised), a `DataLoader` in shuffled batches of 64, Adam at 1e-3 or SGD at 0.01 with momentum 0.9, at a
constant rate; the better of the two counts. Ours is a job with every default on the same network and images, trained
for 1, 2, 3 ... epochs, each from the start, until its test accuracy is the tutorial's. Both train in one process, one
after the other; evaluation is not counted on either side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_sets
import numpy as np
import peers
import records
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from worker.journal import MemoryJournal
from worker.network import snapshot
from worker.run import preparation, stages
from worker.run.job import Job, Task

CACHE = records.ROOT / "var" / "benchmarks" / "cache"
BATCH = 64
SHIFT = 4
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam 1e-3": lambda network: torch.optim.Adam(network.parameters(), lr=1e-3),
    "SGD 0.01": lambda network: torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9),
}

Row = dict[str, Any]


class TutorialImages(Dataset[tuple[Tensor, int]]):
    """The training part, one image at a time, as tutorials have it."""

    def __init__(self, job: Job) -> None:
        self.images, self.labels = job.splits.train.images, job.splits.train.labels
        shape = (-1, *[1] * (self.images.ndim - 2))
        self.mean = torch.tensor(job.preprocessing.mean).view(shape)
        self.std = torch.tensor(job.preprocessing.std).view(shape)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """Image `C x H x W`, cropped, flipped and normalised, and label."""
        pixels = self.images[number].transpose(1, 2, 0)
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        canvas = Image.new(picture.mode, (picture.width + 2 * SHIFT, picture.height + 2 * SHIFT))
        canvas.paste(picture, (SHIFT, SHIFT))
        left, top = (int(torch.randint(0, 2 * SHIFT + 1, ())) for _ in range(2))
        picture = canvas.crop((left, top, left + picture.width, top + picture.height))
        if torch.rand(()) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = np.asarray(picture, dtype=np.float32).reshape(pixels.shape).transpose(2, 0, 1) / 255
        return (torch.from_numpy(values) - self.mean) / self.std, int(self.labels[number])


def prepare(data: str, model: str, epochs: int, seed: int, threads: int, scratch: str) -> Job:
    """A job of every default, before its first stage."""
    spec = {
        "spec_version": 1,
        "data": {"dataset": data},
        "model": {"preset": model, "input_shape": list(data_sets.SHAPES[data])},
        "training": {"epochs": epochs, "augmentation": ["random_crop", "horizontal_flip"], "seed": seed},
    }
    task = Task("time", 1, spec, data_sets.packed(data, CACHE), Path(scratch), threads=threads, device="cpu")
    return preparation.prepare(task, MemoryJournal(keep=False))


def tutorial(data: str, model: str, epochs: int, seed: int, threads: int, optimizer: str) -> tuple[float, float]:
    """(test accuracy, seconds of training) of the tutorial's loop."""
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(data, model, epochs, seed, threads, scratch)
        network = peers.plain_network(job, snapshot(job.reached.network))
        torch.manual_seed(seed)
        loader, steps = DataLoader(TutorialImages(job), BATCH, shuffle=True), OPTIMIZERS[optimizer](network)
        began = time.perf_counter()
        network.train()
        for _ in range(epochs):
            for images, labels_N in loader:
                steps.zero_grad()
                F.cross_entropy(network(images), labels_N).backward()  # type: ignore[no-untyped-call]
                steps.step()
        seconds = time.perf_counter() - began
        found = peers.accuracy(network, job), seconds
        job.close()
    return found


def ours(data: str, model: str, epochs: int, seed: int, threads: int) -> tuple[float, float]:
    """(test accuracy, seconds of training) of a job of every default, validation at each epoch included."""
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(data, model, epochs, seed, threads, scratch)
        began = time.perf_counter()
        stages.ACTIONS["training"](job, job.stages[0])
        seconds = time.perf_counter() - began
        found = job.score(job.reached.network).accuracy, seconds
        job.close()
    return found


def measure(data: str, model: str, epochs: int, seed: int, threads: int) -> Row:
    """Both, and the part of the tutorial's time that ours needs; None where it is not reached in as many epochs."""
    runs = {name: tutorial(data, model, epochs, seed, threads, name) for name in OPTIMIZERS}
    best = max(runs, key=lambda name: runs[name][0])
    goal, seconds = runs[best]
    row: Row = {"data": data, "model": model, "seed": seed, "tutorial": best, "accuracy": goal, "seconds": seconds}
    row |= {"ours": [], "ratio": None}
    for count in range(1, epochs + 1):
        accuracy, spent = ours(data, model, count, seed, threads)
        row["ours"].append([count, accuracy, spent])
        if accuracy >= goal:
            return row | {"ratio": spent / seconds}
    return row


def table(result: Row) -> str:
    """One row a data set, network and seed."""
    body = []
    for row in result["rows"]:
        count, accuracy, spent = row["ours"][-1]
        ratio = "not reached" if row["ratio"] is None else f"{row['ratio']:.2f}"
        line = [row["data"], row["model"], str(row["seed"]), row["tutorial"], f"{100 * row['accuracy']:.1f}"]
        body.append([*line, f"{row['seconds']:.0f}", str(count), f"{100 * accuracy:.1f}", f"{spent:.0f}", ratio])
    head = [
        "data",
        "network",
        "seed",
        "tutorial",
        "its accuracy",
        "s",
        "our epochs",
        "our accuracy",
        "s",
        "ours / its time",
    ]
    title = f"{records.conditions(result)} Threads: {result['threads']}. Tutorial: {result['epochs']} epochs."
    return f"{title}\n\n{records.markdown(head, body)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", default=["clothes-choice", "emoji-choice"], choices=data_sets.SHAPES)
    parser.add_argument("--models", nargs="+", default=["deep_cnn"])
    parser.add_argument("--epochs", type=int, default=10, help="of the tutorial")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="store the figures in benchmarks/results")
    options = parser.parse_args()
    rows = [
        measure(data, model, options.epochs, seed, options.threads)
        for data in options.data
        for model in options.models
        for seed in range(options.seeds)
    ]
    result = records.about() | {"threads": options.threads, "epochs": options.epochs, "rows": rows}
    print(table(result))
    if options.write:
        print(f"\n{records.write('time-to-accuracy', json.loads(json.dumps(result))).name}")


if __name__ == "__main__":
    main()
