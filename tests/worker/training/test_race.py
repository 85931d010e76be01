"""The race of a retraining: what it is run on, and who wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.errors import Diverged
from app.spec.data import DataSpec
from app.spec.job import Training
from tests.support.jobs.blobs import small_cnn
from tests.support.jobs.tiny import SHAPE, prepared, task_of, tiny_data, tiny_spec, train_alone
from tests.support.services.uploads import images, labels
from worker.data.dataset import Dataset, Split, Splits, split_dataset
from worker.data.race_images import race_images
from worker.journal import MemoryJournal
from worker.network import build_network
from worker.precision import choose_precision
from worker.pruning import schedules
from worker.run.job import Stage
from worker.run.state import Reached
from worker.training.race import losses_of, winner

RETRAIN = {"type": "prune", "budget": {"macs": 0.5}, "round_to": 1, "retrain": {"epochs": 9}}


def losses(mean: float, *, noise: float = 1.0, seed: int = 0) -> torch.Tensor:
    return mean + noise * torch.randn(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_clearly_better_try_wins() -> None:
    assert winner([losses(1.0), losses(0.5, seed=1), losses(1.4, seed=2)]) == 1
    assert winner([losses(1.0), losses(0.8, seed=1), losses(0.3, seed=2)]) == 2


def test_the_first_wins_where_the_difference_may_be_chance() -> None:
    first = losses(1.0)
    noise = losses(0.0, seed=1)
    noise -= noise.mean()
    assert winner([first, first - 0.01 + noise]) == 0, "a gain of 0.01 with an error of 0.05"
    assert winner([first, first - 0.01]) == 1, "image by image it is better each time"
    assert winner([first, first]) == 0


def test_the_first_wins_where_there_is_no_image_to_judge_by() -> None:
    nothing = losses_of(build_network(small_cnn(), seed=0), [], choose_precision(Training(), "cpu", spatial_axes=2))
    assert len(nothing) == 0
    assert winner([nothing, nothing, nothing]) == 0


def test_a_loss_that_is_no_number_never_wins() -> None:
    broken = losses(0.1)
    broken[7] = torch.inf
    assert winner([losses(1.0), broken]) == 0
    assert winner([broken, losses(9.0)]) == 1


@pytest.mark.parametrize(("validation", "borrowed"), [(0.0, True), (0.2, False), (0.9, False)])
def test_tries_never_see_the_images_that_judge_them(tmp_path: Path, validation: float, borrowed: bool) -> None:
    dataset = Dataset.open(tiny_data(tmp_path, {"classes": 3, "train": 600, "test": 30, "seed": 0}), SHAPE)
    splits = split_dataset(dataset, DataSpec(dataset="x", validation=validation), 0)
    parts = race_images(splits, 0)
    assert parts.borrowed == borrowed
    assert parts.whole == len(splits.train)
    assert len(parts.held_out) == (120 if borrowed else len(splits.validation))
    tried = {image.tobytes() for image in parts.images(1.0).images}
    assert not tried & {image.tobytes() for image in parts.held_out.images}
    assert not tried & {image.tobytes() for image in splits.test.images}
    assert len(parts.images(0.25)) == round(0.25 * len(splits.train))
    assert np.array_equal(parts.images(0.25).labels, race_images(splits, 0).images(0.25).labels)


@pytest.mark.parametrize("epochs", [8, 9, 15, 16, 31, 32, 40, 64, 88, 100])
def test_a_race_and_the_rest_take_the_epochs_that_were_asked_for(tmp_path: Path, epochs: int) -> None:
    job = prepared(tiny_spec(RETRAIN | {"retrain": {"epochs": epochs}}), tmp_path, MemoryJournal())
    retrainings = [stage for stage in job.stages if stage.phase == "retraining"]
    assert [stage.attempt for stage in retrainings] == [0, 1, 2, None]
    assert all(0 < stage.share <= 1 for stage in retrainings)
    assert sum(stage.epochs * stage.share for stage in retrainings) == pytest.approx(epochs)
    job.close()


@pytest.mark.parametrize(("train", "validation"), [(1, 0), (2, 0), (3, 0), (7, 0), (1, 200), (2, 200)])
def test_few_images_are_divided_as_well_as_can_be(train: int, validation: int) -> None:
    splits = Splits(*(Split(images(count, (1, 6)), labels(count)) for count in (train, validation, 3)))
    parts = race_images(splits, 0)
    assert 1 <= len(parts.images(0.1)) <= len(parts.images(1.0)) <= train
    assert parts.borrowed == (validation == 0 and train > 1)


def test_tries_differ_by_their_rate_alone(tmp_path: Path) -> None:
    job = prepared(tiny_spec(RETRAIN), tmp_path, MemoryJournal())
    tries = [number for number, stage in enumerate(job.stages) if stage.attempt is not None]
    first, *others = ([shown for shown, _ in job.training_batches(number).epoch(0)] for number in tries)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    job.close()


@pytest.mark.parametrize(
    "retrain",
    [
        {"epochs": 7},
        {"epochs": 9, "lr": 0.01},
        {"epochs": 9, "policy": "lr_rewind"},
        {"epochs": 9, "policy": "fine_tune"},
    ],
    ids=["too short", "rate stated", "lr_rewind", "fine_tune"],
)
def test_there_is_no_race_where_there_is_nothing_to_choose(tmp_path: Path, retrain: dict[str, object]) -> None:
    job = prepared(tiny_spec(RETRAIN | {"retrain": retrain}), tmp_path, MemoryJournal())
    (stage,) = (stage for stage in job.stages if stage.phase == "retraining")
    assert (stage.attempt, stage.epochs, stage.share) == (None, retrain["epochs"], 1.0)
    job.close()


def test_a_sparsity_that_rises_while_training_has_no_race(tmp_path: Path) -> None:
    step = {"type": "prune", "sparsity": 0.8, "schedule": {"name": "cubic"}, "retrain": {"epochs": 9}}
    job = prepared(tiny_spec(step), tmp_path, MemoryJournal())
    assert [stage for stage in job.stages if stage.phase == "retraining"] == [
        Stage("retraining", 0, job.stages[-2].removal, epochs=9)
    ]
    job.close()


RACE = tiny_spec(RETRAIN, training={"epochs": 2, "batch_size": 16})


def run(tmp_path: Path, journal: MemoryJournal, spec: dict[str, Any] = RACE) -> Reached:
    task = task_of(spec, tiny_data(tmp_path / "cache"), tmp_path / "scratch")
    return train_alone(task, journal)


def test_the_race_is_in_the_record_and_leaves_nothing_behind(tmp_path: Path) -> None:
    journal = MemoryJournal()
    reached = run(tmp_path, journal)
    race = reached.record.steps[0].rounds[0]["race"]
    assert set(race["losses"]) == {"from 0.05 to 0", "from 0.025 to 0", "from 0.0125 to 0"}
    assert race["chosen"] in race["losses"]
    assert (race["judged_by"], race["images"]) == ("training images held out for it", 21)
    assert not [what for what in reached.kept if what.startswith("race")]
    (chosen,) = journal.of_type("retraining.rate_chosen")
    assert race["chosen"] in chosen.message


def test_a_rate_that_diverges_loses_the_race_and_not_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "RACE_TOPS", (1e30, 1.0))
    journal = MemoryJournal()
    reached = run(tmp_path, journal)
    assert reached.record.steps[0].rounds[0]["race"]["chosen"] == "from 0.05 to 0"
    assert any("out of the race" in event.message for event in journal.of_type("warning"))


@pytest.mark.parametrize(("tops", "chosen"), [((1e30, 40.0), "from 2 to 0"), ((1e30, 1e29), "from 5e+27 to 0")])
def test_a_rate_that_diverges_is_never_chosen_while_another_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tops: tuple[float, ...], chosen: str
) -> None:
    monkeypatch.setattr(schedules, "RACE_TOPS", tops)
    journal = MemoryJournal()
    if tops[1] == 40.0:
        race = run(tmp_path, journal).record.steps[0].rounds[0]["race"]
        assert set(race["losses"]) == {chosen}
    else:
        with pytest.raises(Diverged):  # at the lowest rate: there is none with which it could train
            run(tmp_path, journal)
    told, *_ = journal.of_type("retraining.rate_chosen")
    assert chosen in told.message


def test_a_stop_in_the_race_delivers_the_best_try(tmp_path: Path) -> None:
    journal = MemoryJournal()
    journal.wishes = lambda progress: (
        "stop" if sum("trying" in event.message for event in journal.of_type("phase.started")) == 3 else None
    )
    reached = run(tmp_path, journal)
    assert set(reached.record.steps[0].rounds[0]["race"]["losses"]) == {"from 0.05 to 0", "from 0.025 to 0"}
    assert not [what for what in reached.kept if what.startswith("race")]
