"""A job that was cut anywhere goes on from its checkpoint and ends with the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.network.architecture import Preprocessing
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from tests.support.jobs.tiny import (
    SHAPE,
    SYNTHETIC,
    resume_folder,
    task_of,
    tiny_data,
    tiny_layers,
    tiny_spec,
    train_alone,
)
from worker.checkpoint import Arrays
from worker.export.files import export_network
from worker.journal import MemoryJournal, Progress, Wish
from worker.network import build_network
from worker.run import checkpoint_writer
from worker.run.job import Task
from worker.run.monitor import Interrupted
from worker.run.state import Reached

ASKS_OF_A_REMOVAL = 12
"""A removal asks after each cut of its curves and now and then in its repair; left in the repair, it begins anew."""
PRUNE_WEIGHTS = {
    "type": "prune",
    "sparsity": 0.7,
    "schedule": {"name": "cubic", "epochs": 1},
    "retrain": {"epochs": 2, "policy": "weight_rewind"},
}
PRUNE_CHANNELS = {
    "type": "prune",
    "budget": {"macs": 0.5},
    "round_to": 1,
    "criterion": "taylor",
    "schedule": {"name": "iterative", "steps": 2},
    "retrain": {"epochs": 1, "distillation": {}},
}
JOBS: dict[str, dict[str, Any]] = {
    # masks that grow, rewinding, average, dropout, augmentation, SGD with nesterov
    "weights": tiny_spec(
        {"type": "regularization", "l1": 1e-5, "weight_decay": 1e-3},
        PRUNE_WEIGHTS,
        dropout=0.3,
        training={"ema_decay": 0.9, "augmentation": ["random_crop", "cutout"], "gradient_clipping": 1.0},
    ),
    # every form of zeros: a pattern, then blocks in two rounds, then lamp along a cubic
    "zeros": tiny_spec(
        {"type": "prune", "pattern": "2:4", "retrain": {"epochs": 1}},
        {
            "type": "prune",
            "sparsity": 0.6,
            "block": [2, 2],
            "schedule": {"name": "iterative", "steps": 2},
            "retrain": {"epochs": 1, "policy": "weight_rewind"},
        },
        {
            "type": "prune",
            "sparsity": 0.8,
            "criterion": "lamp",
            "schedule": {"name": "cubic"},
            "retrain": {"epochs": 1, "policy": "fine_tune"},
        },
        training={"ema_decay": 0.9, "optimizer": {"name": "adam", "lr": 0.01}},
    ),
    # three rates are tried, judged by validation images; Muon, and each image flipped in every other epoch
    "race": tiny_spec(
        {"type": "prune", "budget": {"macs": 0.5}, "round_to": 1, "retrain": {"epochs": 8}},
        data={"synthetic": SYNTHETIC, "validation": 0.3},
        training={"optimizer": {"name": "muon"}, "augmentation": ["random_crop_zeros", "alternating_flip"]},
    ),
    # layers replaced by products, then those by narrower ones
    "products": tiny_spec(
        {"type": "low_rank", "energy": 0.7, "round_to": 1, "retrain": {"epochs": 1}},
        {"type": "prune", "budget": {"macs": 0.2}, "round_to": 1, "retrain": {"policy": "none"}},
        model={"input_shape": list(SHAPE), "layers": tiny_layers(channels=24)},
        training={"ema_decay": 0.9, "frozen": ["conv2"]},
    ),
    # surgery in two rounds, a teacher, early stopping, AdamW
    "channels": tiny_spec(
        PRUNE_CHANNELS,
        dropout=0.3,
        training={
            "optimizer": {"name": "adamw", "lr": 0.01},
            "early_stopping": {"patience": 5},
            "label_smoothing": 0.1,
        },
    ),
}


class PauseAt:
    """Wishes a pause the n-th time it is asked."""

    def __init__(self, ask: int) -> None:
        self._left = ask

    def __call__(self, progress: Progress | None) -> Wish | None:
        """The wish at this place."""
        self._left -= 1
        return "pause" if self._left == 0 else None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed data set."""
    return tiny_data(tmp_path_factory.mktemp("cache"))


def end(reached: Reached) -> tuple[Arrays, dict[str, Any]]:
    """Every tensor and every number that a finished job has, but for its seconds."""
    arrays, state = reached.capture()
    state["ledger"]["seconds"] = 0.0
    for record in state["ledger"]["steps"]:
        record["seconds"] = 0.0
    return arrays, state


def cut_and_resumed(
    spec: dict[str, Any], data: Path, folder: Path, ask: int, asks: int, sources: Path | None = None
) -> Reached:
    """The job paused when it asks for the `ask`-th time, gone on with as another process would."""
    journal = MemoryJournal(wishes=PauseAt(ask))
    with pytest.raises(Interrupted, match="pause"):
        train_alone(task_of(spec, data, folder, sources=sources), journal)
    torch.manual_seed(4711)
    np.random.seed(4711)
    resume = resume_folder(journal.checkpoints[-1], folder / "resume")
    second = MemoryJournal()
    reached = train_alone(task_of(spec, data, folder, attempt=2, resume=resume, sources=sources), second)
    assert not second.of_type("checkpoint.corrupt")
    assert ask + second.asked <= asks + 2 + ASKS_OF_A_REMOVAL, "it did work twice"
    return reached


def assert_same(left: tuple[Arrays, dict[str, Any]], right: tuple[Arrays, dict[str, Any]]) -> None:
    """Both ends have the same bits."""
    assert left[0].keys() == right[0].keys()
    for name, array in left[0].items():
        assert array.tobytes() == right[0][name].tobytes(), name
    assert left[1] == right[1]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_cut_at_any_place_ends_with_the_same_bits(name: str, data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal()
    whole = end(train_alone(task_of(JOBS[name], data, tmp_path / "whole"), journal))
    asks = journal.asked
    places = sorted({1, 3, 6, asks // 2, asks * 2 // 3, asks - 12, asks - 4, asks - 1})
    for ask in places:  # in training, between phases, in each retraining, behind the last
        assert_same(whole, end(cut_and_resumed(JOBS[name], data, tmp_path / str(ask), ask, asks)))


@pytest.mark.parametrize("epochs", [2, 0])
def test_a_job_that_started_from_another_and_is_taught_ends_with_the_same_bits(
    epochs: int, data: Path, tmp_path: Path
) -> None:
    sources = two_sources(tmp_path / "sources")
    lesson = {"type": "distill", "teacher": "teacher"}
    retaught = PRUNE_WEIGHTS | {"retrain": {"epochs": 2, "distillation": {"teacher": "teacher"}}}
    spec = tiny_spec(
        *([lesson] if epochs else []),
        {"type": "regularization", "weight_decay": 1e-3, "l2": 1e-4},
        PRUNE_CHANNELS,
        retaught,
        model={"job": "first"},
        dropout=0.3,
        training={
            "epochs": epochs,
            "frozen": ["batch_norm1", "conv2"],
            "lr_factors": {"conv1": 0.3, "linear*": 2},
            "optimizer": {"name": "adam", "lr": 0.01},
            "ema_decay": 0.9,
        },
    )
    journal = MemoryJournal()
    whole = end(train_alone(task_of(spec, data, tmp_path / "whole", sources=sources), journal))
    asks = journal.asked
    for ask in sorted({1, 2, asks // 3, asks // 2, asks * 2 // 3, asks - 1}):
        cut = cut_and_resumed(spec, data, tmp_path / str(ask), ask, asks, sources)
        assert_same(whole, end(cut))


def two_sources(folder: Path) -> Path:
    """The networks of a job to start from and of one to learn from, which saw their images in different ways."""
    for number, key in enumerate(("job-first-pruned", "job-teacher-baseline")):
        graph = build_graph(read_layers(tiny_layers(dropout=0.3)), (1, 8, 8))
        names = [f"class {label}" for label in range(3)]
        seen = Preprocessing(1 / 255, (0.3 + number / 10,), (0.2,))
        network = build_network(graph, seed=number)
        export_network(network, folder / key, stem="pruned", class_names=names, preprocessing=seen, formats=())
        (folder / key / "pruned.safetensors").rename(folder / key / "weights.safetensors")
    return folder


def test_a_job_may_be_cut_again_and_again(data: Path, tmp_path: Path) -> None:
    spec = JOBS["weights"]
    whole = end(train_alone(task_of(spec, data, tmp_path), MemoryJournal()))
    resume: Path | None = None
    for attempt in range(1, 30):
        journal = MemoryJournal(wishes=PauseAt(4))
        task = task_of(spec, data, tmp_path / "attempts", attempt=attempt, resume=resume)
        try:
            reached = train_alone(task, journal)
        except Interrupted:
            resume = resume_folder(journal.checkpoints[-1], tmp_path / f"resume{attempt}")
        else:
            break
    assert attempt > 3
    assert_same(whole, end(reached))


def during_curves(journal: MemoryJournal, cuts: int, wish: Wish) -> Callable[[Progress | None], Wish | None]:
    """Wishes this when so many cuts of the first removal have been measured."""
    counted = 0

    def wished(progress: Progress | None) -> Wish | None:
        nonlocal counted
        counted += progress is not None and progress.phase == "pruning"
        return wish if counted > cuts else None  # the first look is before the removal

    return wished


def test_a_process_killed_inside_a_removal_goes_on_behind_the_last_cut_of_its_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "REST_FACTOR", 0)  # these cuts take less time than a checkpoint
    spec = JOBS["channels"]
    journal = MemoryJournal()
    whole = end(train_alone(task_of(spec, data, tmp_path, checkpoint_interval_s=0.0), journal))
    inside = [saved for saved in journal.checkpoints if saved.phase == "pruning"]
    known = [len(json.loads(saved.state.read_text())["ledger"]["curves"]) for saved in inside]
    assert max(known) >= 4
    assert 0 in known, "a removal that is over leaves none"
    for saved, cuts in list(zip(inside, known, strict=True))[::3]:
        second = MemoryJournal()
        resume = resume_folder(saved, tmp_path / f"from {saved.step}")
        assert_same(whole, end(train_alone(task_of(spec, data, tmp_path, resume=resume), second)))
        started = [event.data["phase"] for event in second.of_type("phase.started")]
        assert started[1] == ("pruning" if cuts else "retraining")
        fractions = [progress.fraction for progress in second.progresses]
        assert fractions == sorted(fractions)


@pytest.mark.parametrize("wish", ["cancel", "pause"])
def test_a_removal_is_left_after_the_next_cut(wish: Wish, data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal()
    journal.wishes = during_curves(journal, 2, wish)
    with pytest.raises(Interrupted, match=wish):
        train_alone(task_of(JOBS["channels"], data, tmp_path), journal)
    assert not journal.of_type("prune.applied")
    if wish == "pause":
        document = json.loads(journal.checkpoints[-1].state.read_text())
        assert len(document["ledger"]["curves"]) == 2


def test_a_job_stopped_inside_its_first_removal_delivers_the_dense_network(data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal()
    journal.wishes = during_curves(journal, 2, "stop")
    reached = train_alone(task_of(JOBS["channels"], data, tmp_path), journal)
    assert reached.record.steps == []
    assert reached.network.graph["conv1"].shape[0] == 8
    for name, tensor in reached.kept["baseline"].items():
        assert torch.equal(reached.network.state_dict()[name], tensor)


def test_checkpoints_inside_an_epoch_do_not_change_the_bits(data: Path, tmp_path: Path) -> None:
    spec = JOBS["channels"]
    journal = MemoryJournal()
    plain = end(train_alone(task_of(spec, data, tmp_path), MemoryJournal()))
    often = end(train_alone(task_of(spec, data, tmp_path, checkpoint_interval_s=0.0), journal))
    assert_same(plain, often)
    steps = [saved.step for saved in journal.checkpoints]
    assert steps == sorted(set(steps))  # a step is never announced twice
    assert len(steps) > 8


def test_the_same_job_has_the_same_bits_whatever_ran_before_and_another_seed_has_others(
    data: Path, tmp_path: Path
) -> None:
    one = end(train_alone(task_of(JOBS["weights"], data, tmp_path), MemoryJournal()))
    spec = JOBS["weights"] | {"training": JOBS["weights"]["training"] | {"seed": 1}}
    other = end(train_alone(task_of(spec, data, tmp_path), MemoryJournal()))
    assert any(one[0][name].tobytes() != other[0][name].tobytes() for name in one[0])
    again = end(train_alone(task_of(JOBS["weights"], data, tmp_path), MemoryJournal()))
    assert_same(one, again)


@pytest.mark.parametrize("damage", ["flip", "cut", "another job", "another format", "missing tensor", "no json"])
def test_a_checkpoint_that_is_not_whole_is_refused_and_the_job_starts_again(
    damage: str, data: Path, tmp_path: Path
) -> None:
    spec = tiny_spec()
    whole = end(train_alone(task_of(spec, data, tmp_path), MemoryJournal()))
    journal = MemoryJournal(wishes=PauseAt(6))
    with pytest.raises(Interrupted):
        train_alone(task_of(spec, data, tmp_path), journal)
    resume = resume_folder(journal.checkpoints[-1], tmp_path / "resume")
    _damage(resume, damage)
    journal = MemoryJournal()
    again = end(train_alone(task_of(spec, data, tmp_path, resume=resume), journal))
    assert [event.level for event in journal.of_type("checkpoint.corrupt")] == ["warn"]
    assert_same(whole, again)


def _damage(folder: Path, how: str) -> None:
    tensors, state = folder / "checkpoint.safetensors", folder / "checkpoint.json"
    document = json.loads(state.read_text())
    content = tensors.read_bytes()
    if how == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "cut":
        tensors.write_bytes(content[: len(content) // 2])
    elif how == "another job":
        state.write_text(json.dumps(document | {"spec_sha256": "0" * 64}))
    elif how == "another format":
        state.write_text(json.dumps(document | {"format_version": 2}))
    elif how == "missing tensor":
        layers = [layer for layer in document["layers"] if layer["name"] != "relu2"]
        layers[-3]["inputs"] = ["batch_norm2"]
        state.write_text(json.dumps(document | {"layers": layers[:1] + layers[3:], "input_shape": [2, 8, 8]}))
    else:
        state.unlink()


def test_a_checkpoint_of_other_threads_is_used_and_a_warning_says_that_bits_will_differ(
    data: Path, tmp_path: Path
) -> None:
    journal = MemoryJournal(wishes=PauseAt(6))
    with pytest.raises(Interrupted):
        train_alone(task_of(tiny_spec(), data, tmp_path), journal)
    resume = resume_folder(journal.checkpoints[-1], tmp_path / "resume")
    document = json.loads((resume / "checkpoint.json").read_text())
    document["environment"]["threads"] = 64
    (resume / "checkpoint.json").write_text(json.dumps(document))
    journal = MemoryJournal()
    train_alone(task_of(tiny_spec(), data, tmp_path, resume=resume), journal)
    assert "threads 64 -> 1" in journal.of_type("warning")[0].message
    assert journal.of_type("phase.started")[1].data["resumed"] is True


def test_a_job_goes_on_where_it_was_and_trains_no_step_twice(data: Path, tmp_path: Path) -> None:
    journal = MemoryJournal(wishes=PauseAt(7))
    with pytest.raises(Interrupted):
        train_alone(task_of(tiny_spec(), data, tmp_path), journal)
    saved = journal.checkpoints[-1]
    assert (saved.step, saved.epoch, saved.phase) == (5, 1, "training")
    second = MemoryJournal()
    task: Task = task_of(tiny_spec(), data, tmp_path, resume=resume_folder(saved, tmp_path / "resume"))
    train_alone(task, second)
    assert [event.data["epoch"] for event in second.of_type("epoch.finished")] == [2]
    fractions = [progress.fraction for progress in second.progresses]
    assert fractions == sorted(fractions)
    assert fractions[0] >= max(progress.fraction for progress in journal.progresses)
