"""A teacher from another job: it sees the student's images through its own preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.network.architecture import Preprocessing
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from tests.support.jobs.tiny import task_of, tiny_data, tiny_layers, tiny_spec
from worker.data.dataset import BatchLoader, Split
from worker.export.files import export_network
from worker.journal import MemoryJournal
from worker.network import Network, build_network
from worker.run.job import Job
from worker.run.preparation import prepare
from worker.run.stages import run_stages
from worker.training.distillation import Teacher

NAMES = ("class 0", "class 1", "class 2")
OWN = Preprocessing(1 / 255, (0.7, 0.1, 0.3), (0.1, 0.4, 0.9))
GIVEN = Preprocessing(1 / 255, (0.2, 0.5, 0.6), (0.3, 0.2, 0.25))
HALF = {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": 1, "distillation": {"teacher": "teacher"}}}


def network_for(*shape: int, seed: int = 5) -> Network:
    """A network with drawn weights for inputs of this shape."""
    layers: list[dict[str, Any]] = [{"type": "conv", "out_channels": 4, "kernel_size": 3, "padding": 1}]
    layers += [{"type": "relu"}, {"type": "global_avg_pool"}, {"type": "flatten"}]
    return build_network(build_graph(read_layers([*layers, {"type": "linear", "out_features": 3}]), shape), seed=seed)


@pytest.mark.parametrize("shape", [(3, 20), (3, 8, 8), (3, 4, 5, 6)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_teacher_sees_the_augmented_batch_as_its_own_preprocessing_would_have_made_it(
    shape: tuple[int, ...], channels_last: bool
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, *shape), dtype=np.uint8)
    part = Split(images, np.zeros(12, np.int64))

    def batch(preprocessing: Preprocessing) -> Tensor:
        shifted = ["random_crop", "horizontal_flip"]
        batches = BatchLoader(part, preprocessing, batch_size=12, augmentation=shifted, channels_last=channels_last)
        return next(iter(batches.epoch(0)))[0]

    network = network_for(*shape)
    teacher = Teacher(network, own=OWN, given=GIVEN).eval()
    with torch.no_grad():
        found, wanted = teacher(batch(GIVEN)), network.eval()(batch(OWN))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, network(batch(GIVEN)), atol=0.1)


def test_with_one_preprocessing_a_teacher_gets_the_very_batch() -> None:
    network = network_for(3, 8, 8)
    images = torch.randn(4, 3, 8, 8)
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    Teacher(network, own=OWN, given=Preprocessing(1.0, OWN.mean, OWN.std))(images)
    assert seen[0] is images


# --- in a job --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the teacher: drawn weights, and images it has seen otherwise."""
    folder = tmp_path_factory.mktemp("sources")
    network = build_network(build_graph(read_layers(tiny_layers(channels=4)), (1, 8, 8)), seed=7)
    place = folder / "job-teacher-baseline"
    seen = Preprocessing(1 / 255, (0.9,), (0.5,))
    export_network(network, place, stem="baseline", class_names=NAMES, preprocessing=seen, formats=())
    (place / "baseline.safetensors").rename(place / "weights.safetensors")
    (place / "baseline.architecture.json").rename(place / "architecture.json")
    return folder


def ran(spec: dict[str, Any], data: Path, folder: Path, sources: Path) -> tuple[Job, MemoryJournal]:
    """A job at the end of its stages."""
    journal = MemoryJournal()
    job = prepare(task_of(spec, data, folder, sources=sources), journal)
    try:
        run_stages(job)
    finally:
        job.close()
    return job, journal


def test_a_taught_training_moves_towards_the_teacher(data: Path, sources: Path, tmp_path: Path) -> None:
    lesson = {"type": "distill", "teacher": "teacher", "alpha": 1.0, "temperature": 2.0}
    training = {"epochs": 12, "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "constant"}}
    job, journal = ran(tiny_spec(lesson, training=training), data, tmp_path, sources)
    losses = [value for _, value in journal.metrics["train.distillation"]]
    assert losses[-1] < 0.4 * losses[0]
    teacher = job.teacher(lesson_of(job))
    with torch.no_grad():
        images, _ = next(job.removal_context.plain())
        taught = job.reached.network.eval()(images).argmax(1)
        assert float((taught == teacher(images).argmax(1)).float().mean()) > 0.8
    assert any(
        note.startswith("job teacher (baseline) was the teacher: its accuracy") for note in job.reached.record.notes
    )


def lesson_of(job: Job) -> Any:
    """How the first training of a job is taught."""
    assert job.distillation_of_training is not None
    return job.distillation_of_training


def test_only_the_training_is_taught_by_distill_and_retraining_by_its_own_teacher(
    data: Path, sources: Path, tmp_path: Path
) -> None:
    def taught(*optimizations: dict[str, Any]) -> list[bool]:
        """Whether training, and retraining, knew a teacher."""
        _, journal = ran(tiny_spec(*optimizations), data, tmp_path, sources)
        steps = [step for step, _ in journal.metrics.get("train.distillation", [])]
        return [any(step <= 8 for step in steps), any(step > 8 for step in steps)]

    plain = HALF | {"retrain": {"epochs": 1, "distillation": None}}
    assert taught({"type": "distill", "teacher": "teacher"}, plain) == [True, False]
    assert taught(HALF) == [False, True]
    assert taught(HALF | {"retrain": {"epochs": 1}}) == [False, True], "by the dense network"
    assert taught(HALF | {"retrain": {"epochs": 1, "distillation": {}}}) == [False, True]


def test_retraining_is_taught_by_the_job_that_is_named_and_not_by_its_own_network(
    data: Path, sources: Path, tmp_path: Path
) -> None:
    other, _ = ran(tiny_spec(HALF), data, tmp_path, sources)
    own, _ = ran(tiny_spec(HALF | {"retrain": {"epochs": 1, "distillation": {}}}), data, tmp_path, sources)
    one, two = other.reached, own.reached
    assert torch.equal(one.kept["baseline"]["conv1.weight"], two.kept["baseline"]["conv1.weight"])
    assert not torch.equal(one.network.get_parameter("conv1.weight"), two.network.get_parameter("conv1.weight"))
