"""Memory that runs out: in a step halves are tried, in a choice fewer images at a time; what cannot be survived says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import OutOfMemory
from tests.support.jobs.tiny import resume_folder, task_of, tiny_data, tiny_spec, train_alone
from worker.journal import MemoryJournal
from worker.network import Network
from worker.pipeline import Delivered, run
from worker.run.monitor import Interrupted

NARROW = {"type": "prune", "budget": {"macs": 0.5}, "round_to": 1, "retrain": {"epochs": 1, "distillation": None}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def hungry(
    *,
    steps: int = 10_000,
    choices: int = 10_000,
    gradients: int = 10_000,
    error: type[Exception] = torch.OutOfMemoryError,
) -> Callable[[Network, Tensor], Tensor]:
    """A forward pass that runs out of memory above so many images: in a step, in a choice, in one with gradients."""
    forward = Network.forward
    said = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def limited(self: Network, images: Tensor) -> Tensor:
        most = steps if self.training else gradients if torch.is_grad_enabled() else choices
        if len(images) > most and not torch.is_inference_mode_enabled():  # scores take 16 MiB, whatever happens
            raise error(said if error is torch.OutOfMemoryError else "CUDNN_STATUS_ALLOC_FAILED")
        return forward(self, images)

    return limited


def codes_of(journal: MemoryJournal) -> list[str]:
    """The codes of a job's warnings."""
    return [event.data.get("code", "") for event in journal.of_type("warning")]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_when_memory_runs_out_batches_are_computed_in_halves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(Network, "forward", hungry(steps=16, error=error))
    journal = MemoryJournal()
    reached = train_alone(task_of(tiny_spec(), data, tmp_path), journal)
    assert (reached.micro_batches, reached.choice_parts) == (2, 1)
    assert codes_of(journal) == ["out_of_memory"]
    assert "batch norm normalises each by itself" in journal.of_type("warning")[0].message
    assert len(journal.metrics["val.accuracy"]) == 2


def test_when_halves_do_not_fit_either_the_job_fails_with_advice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "forward", hungry(steps=8))
    with pytest.raises(OutOfMemory, match="half a batch of 32 images") as caught:
        train_alone(task_of(tiny_spec(), data, tmp_path), MemoryJournal())
    assert "batch_size" in caught.value.advice


def test_a_batch_that_cannot_be_halved_is_not_and_the_advice_is_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "forward", hungry(steps=2))
    with pytest.raises(OutOfMemory, match="3 images does not fit, and they are too few to be halved") as caught:
        train_alone(task_of(tiny_spec(training={"batch_size": 3}), data, tmp_path), MemoryJournal())
    assert "batch_size" not in caught.value.advice


CHOICES: dict[str, dict[str, Any]] = {
    "validation and recalibration": NARROW,
    "loss curves": NARROW | {"scope": "sensitivity"},
    "activation": NARROW | {"criterion": "activation"},
    "taylor": NARROW | {"criterion": "taylor"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_memory_that_runs_out_in_a_choice_is_survived_with_fewer_images_at_a_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = tiny_spec(CHOICES[name], training={"batch_size": 8, "epochs": 1}, exports=["safetensors"])
    monkeypatch.setattr(Network, "forward", hungry(steps=8, choices=8, gradients=5))
    journal = MemoryJournal()
    reached = train_alone(task_of(spec, data, tmp_path), journal)
    assert reached.micro_batches == 1
    assert reached.choice_parts == (64 if name == "taylor" else 32)  # 256 images, or what there is, in fours or eights
    halvings = [event.message for event in journal.of_type("warning") if event.data.get("code") == "out_of_memory"]
    assert len(halvings) == reached.choice_parts.bit_length() - 1
    assert all("images at a time" in message for message in halvings)


def test_a_choice_with_fewer_images_at_a_time_is_the_same_choice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(NARROW | {"criterion": "taylor", "retrain": {"epochs": 0, "policy": "none"}})
    expected = train_alone(task_of(spec, data, tmp_path), MemoryJournal())
    monkeypatch.setattr(Network, "forward", hungry(choices=108, gradients=40))
    found = train_alone(task_of(spec, data, tmp_path), MemoryJournal())
    assert (expected.choice_parts, found.choice_parts) == (1, 8)
    assert found.network.graph == expected.network.graph
    for name, tensor in expected.network.state_dict().items():
        if "batches_tracked" not in name:
            torch.testing.assert_close(found.network.state_dict()[name], tensor, rtol=0.1, atol=0.05)


def test_when_two_images_do_not_fit_in_a_choice_the_job_says_that_it_was_no_training_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "forward", hungry(choices=1))
    with pytest.raises(OutOfMemory, match="2 images at a time either, outside of its training") as caught:
        train_alone(task_of(tiny_spec(), data, tmp_path), MemoryJournal())
    assert "batch_size" not in caught.value.advice


def test_a_job_that_goes_on_from_a_checkpoint_keeps_its_smaller_batches(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "forward", hungry(steps=16, choices=8))
    first = MemoryJournal(
        wishes=lambda progress: "pause" if progress is not None and progress.phase == "retraining" else None
    )
    with pytest.raises(Interrupted):
        train_alone(task_of(tiny_spec(NARROW), data, tmp_path), first)
    resume = resume_folder(first.checkpoints[-1], tmp_path / "resume")
    second = MemoryJournal()
    outcome = run(task_of(tiny_spec(NARROW), data, tmp_path, resume=resume), second)
    assert isinstance(outcome, Delivered)
    assert codes_of(second) == []
    notes = [note for note in outcome.report["notes"] if "memory ran out" in note]
    assert len(notes) == 2
    assert "batch norm normalises each by itself" in notes[0]
    assert "on 8 images at a time" in notes[1]
