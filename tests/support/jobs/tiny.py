"""Tiny jobs for the worker: 3 classes of 1 x 8 x 8 images, seconds from the first step to the last."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from app.datasets.ingest.synthetic import ensure_synthetic
from app.spec.data import Synthetic
from worker.checkpoint import STEM
from worker.journal import MemoryJournal, SavedCheckpoint
from worker.run.job import Job, Task
from worker.run.preparation import prepare
from worker.run.stages import run_stages
from worker.run.state import Reached

SYNTHETIC = {"classes": 3, "train": 120, "test": 30, "seed": 0}
SHAPE = (1, 8, 8)


def tiny_layers(*, channels: int = 8, dropout: float = 0.0) -> list[dict[str, Any]]:
    """Two convolutions with batch norm, and one linear layer."""
    layers: list[dict[str, Any]] = []
    for _ in range(2):
        conv = {"type": "conv", "out_channels": channels, "kernel_size": 3, "padding": 1}
        layers += [conv, {"type": "batch_norm"}, {"type": "relu"}]
    layers += [{"type": "max_pool", "kernel_size": 4}, {"type": "flatten"}]
    layers += [{"type": "dropout", "p": dropout}] if dropout else []
    return [*layers, {"type": "linear", "out_features": 3}]


def tiny_spec(*optimizations: dict[str, Any], dropout: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A job of 2 epochs of 4 steps; `training` and other fields replace what stands here."""
    training = {"epochs": 2, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.05}}
    document: dict[str, Any] = {
        "spec_version": 1,
        "data": {"synthetic": SYNTHETIC},
        "model": {"input_shape": list(SHAPE), "layers": tiny_layers(dropout=dropout)},
        "optimizations": list(optimizations),
        "exports": ["safetensors"],
    }
    return document | fields | {"training": training | fields.get("training", {})}


def tiny_data(cache: Path, synthetic: dict[str, Any] | None = None, shape: tuple[int, ...] = SHAPE) -> Path:
    """The packed data set of tiny jobs, made once in `cache`."""
    return ensure_synthetic(Synthetic.model_validate(synthetic or SYNTHETIC), shape, cache)


def task_of(spec: dict[str, Any], data: Path, scratch: Path, **fields: Any) -> Task:
    """A task with its own scratch folder under `scratch`, with one thread."""
    scratch.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=scratch))
    return Task(
        **({"job_id": "job", "attempt": 1, "threads": 1, "latency_s": 0.1} | fields), spec=spec, data=data, scratch=own
    )


def prepared(spec: dict[str, Any], folder: Path, journal: MemoryJournal) -> Job:
    """The job before its first stage; to be closed."""
    return prepare(task_of(spec, tiny_data(folder / "cache"), folder / "scratch"), journal)


def train_alone(task: Task, journal: MemoryJournal) -> Reached:
    """What a job reached at the end of its stages, without its delivery. Raises what the stages raise."""
    job = prepare(task, journal)
    try:
        run_stages(job)
        return job.reached
    finally:
        job.close()


def resume_folder(saved: SavedCheckpoint, folder: Path) -> Path:
    """The folder that a resumed task is given: the two files under their fixed names."""
    folder.mkdir(parents=True)
    shutil.copy(saved.tensors, folder / f"{STEM}.safetensors")
    shutil.copy(saved.state, folder / f"{STEM}.json")
    return folder
