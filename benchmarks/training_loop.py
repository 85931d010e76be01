"""Our training loop against a bare PyTorch loop that makes the same choices.

    .venv/bin/python benchmarks/training_loop.py [--short] [--network simple_cnn] [--threads N] [--augment] [--write]

Both train the same network from the same weights on the same images: channels last, max-pooling before the activation,
batches cut and augmented as a whole, SGD with Nesterov momentum, a rate that changes at each step. Ours is a whole job
with its events, progress, metrics, checkpoints and wishes; the bare loop is the one below, on `torch.nn` and
`torch.optim` alone. Epochs take turns, so that a busy machine slows both. Prints images/s of each and their ratio
(ours / bare, median over the rounds). `--write` stores the figures as benchmarks/results/<date>-training-loop.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from app.datasets.ingest.synthetic import ensure_synthetic
from app.spec.data import Synthetic
from worker.export.pytorch_source import model_source
from worker.journal import MemoryJournal, Progress
from worker.run import preparation, stages
from worker.run.job import Job, Task
from worker.run.monitor import JobMonitor
from worker.training.loop import EpochResult, Fit

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"simple_cnn": (1, 28, 28), "deep_cnn": (3, 32, 32), "resnet20": (3, 32, 32)}
BATCH = 128
CLASSES = 10
SHIFT = 4


def bare_network(name: str, job: Job) -> nn.Module:
    """The job's network in plain torch.nn, pooling first where the job's pools first."""
    channels, *sizes = SHAPES[name]
    if name == "resnet20":  # no pooling before an activation: the source that a job delivers is already bare
        scope: dict[str, Any] = {"__name__": "bare"}
        exec(model_source(job.plan.baseline, job.dataset.class_names, job.preprocessing), scope)
        network: nn.Module = scope["build"]()
        return network
    layers: list[nn.Module] = []
    widths, hidden = ((32, 64), 128) if name == "simple_cnn" else ((32, 64, 128, 256), 1024)
    for width in widths:
        layers.append(nn.Conv2d(channels, width, 3, padding="same"))
        layers += [nn.BatchNorm2d(width)] if name == "deep_cnn" else []
        layers += [nn.MaxPool2d(2), nn.ReLU()]
        channels = width
    features = channels * (sizes[0] // 2 ** len(widths)) * (sizes[1] // 2 ** len(widths))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


class BareLoop:
    """The loop that one writes by hand for this data and this machine."""

    def __init__(self, job: Job, name: str, *, augment: bool) -> None:
        part = job.splits.train
        self.network = bare_network(name, job).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        values = [tensor for tensor in job.reached.network.state_dict().values() if tensor.is_floating_point()]
        with torch.no_grad():
            own = [tensor for tensor in self.network.state_dict().values() if tensor.is_floating_point()]
            for tensor, value in zip(own, values, strict=True):
                tensor.copy_(value)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.images_NHWC = torch.from_numpy(part.images).permute(0, 2, 3, 1).contiguous()
        self.labels_N = torch.from_numpy(part.labels)
        self.scale = job.preprocessing.scale
        self.mean = torch.tensor(job.preprocessing.mean)
        self.std = torch.tensor(job.preprocessing.std)
        self.augment = augment
        self.steps = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of batches: images N x C x H x W in channels last, labels N."""
        count, height, width, _ = self.images_NHWC.shape
        rows, columns = torch.arange(height), torch.arange(width)
        for chosen in torch.split(torch.randperm(count), BATCH):
            if self.augment:
                images = len(chosen)
                down = (rows + torch.randint(-SHIFT, SHIFT + 1, (images, 1))).abs()
                across = (columns + torch.randint(-SHIFT, SHIFT + 1, (images, 1))).abs()
                down = torch.where(down >= height, 2 * (height - 1) - down, down)
                across = torch.where(across >= width, 2 * (width - 1) - across, across)
                across = torch.where(torch.randint(0, 2, (images, 1)).bool(), across.flip(1), across)
                cut = self.images_NHWC[chosen[:, None, None], down[:, :, None], across[:, None, :]]
            else:
                cut = self.images_NHWC[chosen]
            yield cut.float().mul_(self.scale).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2), self.labels_N[chosen]

    def epoch(self) -> float:
        """Train one epoch; its images per second."""
        self.network.train()
        began = time.perf_counter()
        for images, labels_N in self.batches():
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 / (1 + self.steps)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(F.cross_entropy(self.network(images), labels_N))
            self.optimizer.step()
            self.steps += 1
        return len(self.labels_N) / (time.perf_counter() - began)


class TakingTurns(JobMonitor):
    """The job's own watch, which lets the bare loop train an epoch after each of ours."""

    bare: BareLoop
    ours: list[float]
    theirs: list[float]
    began: float

    def epoch_finished(self, fit: Fit, result: EpochResult) -> None:
        """Time both."""
        super().epoch_finished(fit, result)
        self.ours.append(len(self.bare.labels_N) / (time.perf_counter() - self.began))
        self.theirs.append(self.bare.epoch())
        self.began = time.perf_counter()


class Echo(MemoryJournal):
    """Keeps nothing on the disk, forgets no entry: as much work as the service's journal."""

    def progress(self, progress: Progress) -> None:
        """Make the line that would be sent."""
        json.dumps(progress.document())
        super().progress(progress)


def measure(name: str, *, images: int, rounds: int, threads: int, augment: bool) -> dict[str, Any]:
    """Images per second of both loops, each round, and the median of their ratios; the first round is a warm-up."""
    synthetic = {"classes": CLASSES, "train": images, "test": 100, "seed": 0}
    shape = SHAPES[name]
    document = {
        "spec_version": 1,
        "data": {"synthetic": synthetic, "validation": 0.0},
        "model": {"preset": name, "input_shape": list(shape)},
        "training": {
            "epochs": rounds + 1,
            "batch_size": BATCH,
            "optimizer": {"name": "sgd"},
            "augmentation": ["random_crop", "horizontal_flip"] if augment else [],
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        data = ensure_synthetic(Synthetic.model_validate(synthetic), shape, Path(folder) / "cache")
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        task = Task("benchmark", 1, document, data, scratch, threads=threads, device="cpu")
        job = preparation.prepare(task, Echo(keep=False))
        monitor = TakingTurns(job, began=job.began)
        monitor.ours, monitor.theirs = [], []
        job.monitor = monitor
        monitor.bare = BareLoop(job, name, augment=augment)
        monitor.bare.epoch()
        monitor.began = time.perf_counter()
        stages.run_stages(job)
        job.close()
    ours, theirs = monitor.ours[1:], monitor.theirs[1:]
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {
        "network": name,
        "augment": augment,
        "images": images,
        "rounds": rounds,
        "threads": threads,
        "ours_images_per_s": round(statistics.median(ours), 1),
        "bare_images_per_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--augment", action="store_true", help="random crop and flip in both loops")
    parser.add_argument("--short", action="store_true", help="fewer images and rounds")
    parser.add_argument("--write", action="store_true", help="store the figures in benchmarks/results")
    options = parser.parse_args()
    rounds, images = (3, 2560) if options.short else (7, 10240)
    found = []
    for name in options.network or list(SHAPES):
        size = images if name == "simple_cnn" else images // 4
        row = measure(name, images=size, rounds=rounds, threads=options.threads, augment=options.augment)
        found.append(row)
        print(
            f"{name:12} ours {row['ours_images_per_s']:8.1f}, bare {row['bare_images_per_s']:8.1f} images/s   "
            f"ratio {row['ratio']:.3f} (rounds {min(row['ratios']):.3f} to {max(row['ratios']):.3f})"
        )
    if options.write:
        folder = ROOT / "benchmarks" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-training-loop.json"
        machine = {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        path.write_text(json.dumps({"machine": machine, "versions": versions, "figures": found}, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
