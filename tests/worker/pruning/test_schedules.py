"""When how much is removed, and the learning rates of retraining."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from app.spec.job import Training
from app.spec.prune import Prune
from worker.pruning.schedules import (
    MOST_MASK_UPDATES,
    PruningRound,
    cubic_sparsity,
    prune_stages,
    retrain_schedule,
    rewind_epoch,
)
from worker.training.learning_rate import learning_rate


def prune(**fields: Any) -> Prune:
    return Prune.model_validate({"type": "prune", "sparsity": 0.8} | fields)


def training(**fields: Any) -> Training:
    return Training.model_validate({"epochs": 20, "optimizer": {"lr": 0.1}} | fields)


def test_one_shot_is_one_stage_with_all_epochs() -> None:
    (stage,) = prune_stages(prune(retrain={"epochs": 4}), training())
    assert stage == PruningRound(1, 1, 1.0, 4)
    assert stage.sparsity(0.8) == 0.8
    assert stage.mask_updates(0.8, 100) == {}


def test_without_a_word_retraining_takes_a_third_of_the_training() -> None:
    assert [stage.epochs for stage in prune_stages(prune(), training())] == [6]
    assert [stage.epochs for stage in prune_stages(prune(retrain={"policy": "none"}), training())] == [0]


@pytest.mark.parametrize("name", ["one_cycle", "cosine", "step", "constant"])
def test_after_a_training_of_no_epochs_retraining_is_a_whole_schedule_of_its_own_length(name: str) -> None:
    none = training(epochs=0, schedule={"name": name})
    rate = retrain_schedule(prune(retrain={"epochs": 4}), none)
    as_long = training(epochs=4, schedule={"name": name})
    whole = learning_rate(as_long) if name in ("one_cycle", "cosine") else lambda progress: 0.1 * (1 - progress)
    moments = [step / 40 for step in range(41)]
    assert [rate(moment) for moment in moments] == pytest.approx([whole(moment) for moment in moments])
    assert max(rate(moment) for moment in moments) == pytest.approx(0.1)
    assert prune_stages(prune(), none)[0].epochs == 3


def test_a_warm_up_that_was_stated_is_in_epochs_of_the_retraining_where_there_is_no_training() -> None:
    none = training(epochs=0, schedule={"name": "cosine", "warmup": 1})
    rate = retrain_schedule(prune(retrain={"epochs": 4, "lr": 0.02}), none)
    assert rate(0.0) == pytest.approx(0.02 / 25)
    assert rate(0.25) == pytest.approx(0.02)
    longer = retrain_schedule(prune(retrain={"epochs": 1}), training(epochs=0, schedule={"warmup": 5}))
    assert longer(0.999) == pytest.approx(0.1, rel=0.01)


def test_iterative_stages_keep_the_same_part_of_the_rest_each_time_and_end_on_the_target() -> None:
    stages = prune_stages(prune(schedule={"name": "iterative", "steps": 4}, retrain={"epochs": 3}), training())
    assert [stage.epochs for stage in stages] == [3, 3, 3, 3]
    densities = [1.0, *(1 - (stage.sparsity(0.8) or 0) for stage in stages)]
    assert [after / before for before, after in pairwise(densities)] == pytest.approx([0.2**0.25] * 4)
    assert stages[-1].sparsity(0.8) == 0.8
    assert stages[0].sparsity(None) is None  # a threshold


def test_cubic_rises_within_its_epochs_and_ends_exactly_on_the_target() -> None:
    (stage,) = prune_stages(prune(schedule={"name": "cubic", "epochs": 3}, retrain={"epochs": 4}), training())
    assert stage.ramp == 0.75
    assert stage.sparsity(0.8) == 0.0
    updates = stage.mask_updates(0.8, 400)
    moments, sparsities = list(updates), list(updates.values())
    assert moments == sorted(moments)
    assert sparsities == sorted(sparsities)
    assert moments[-1] == 300
    assert sparsities[-1] == 0.8
    assert 20 <= len(updates) <= MOST_MASK_UPDATES
    assert updates[150] == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 51, 10_000])
def test_cubic_reaches_the_target_within_the_steps_there_are(steps: int) -> None:
    (stage,) = prune_stages(prune(schedule={"name": "cubic"}, retrain={"epochs": 2}), training())
    updates = stage.mask_updates(0.8, steps)
    assert max(updates) < steps
    assert updates[max(updates)] == 0.8
    assert len(updates) <= MOST_MASK_UPDATES


def test_cubic_without_retraining_removes_at_once() -> None:
    (stage,) = prune_stages(prune(schedule={"name": "cubic"}, retrain={"policy": "none"}), training())
    assert stage == PruningRound(1, 1, 1.0, 0)
    assert stage.sparsity(0.8) == 0.8


def test_the_cubic_curve_is_monotone_from_initial_at_the_start_to_final_at_the_end() -> None:
    curve = [cubic_sparsity(t, start=10, end=60, initial=0.2, final=0.9) for t in range(80)]
    assert curve == sorted(curve)
    assert curve[:11] == pytest.approx([0.2] * 11)
    assert curve[60:] == [0.9] * 20
    assert curve[35] == pytest.approx(0.9 - 0.7 * 0.125)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_lr_rewind_runs_the_last_epochs_of_the_original_schedule_again(schedule: str) -> None:
    how = training(schedule={"name": schedule})
    original = learning_rate(how)
    rate = retrain_schedule(prune(retrain={"epochs": 5}), how)
    for part in (0.0, 0.3, 0.99, 1.0):
        assert rate(part) == pytest.approx(original(0.75 + 0.25 * part))
    whole = retrain_schedule(prune(retrain={"epochs": 40}), how)
    assert whole(0.5) == pytest.approx(original(0.5))


@pytest.mark.parametrize(("epochs", "highest"), [(2, 0.03), (10, 0.05), (40, 0.1)])  # lr * max(t / T, 0.3), at most lr
@pytest.mark.parametrize("schedule", ["step", "constant"])
def test_schedules_that_do_not_fall_are_replaced_by_a_line_to_zero(schedule: str, epochs: int, highest: float) -> None:
    rate = retrain_schedule(prune(retrain={"epochs": epochs}), training(schedule={"name": schedule}))
    assert rate(0.0) == pytest.approx(highest)
    assert rate(0.5) == pytest.approx(highest / 2)
    assert rate(1.0) == 0.0


def test_fine_tune_is_constant_at_a_hundredth_and_none_is_zero() -> None:
    rate = retrain_schedule(prune(retrain={"epochs": 5, "policy": "fine_tune"}), training())
    assert (rate(0.0), rate(1.0)) == pytest.approx((0.001, 0.001))
    assert retrain_schedule(prune(retrain={"policy": "none"}), training())(0.5) == 0.0


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "step", "constant"])
@pytest.mark.parametrize("policy", ["lr_rewind", "fine_tune"])
def test_lr_replaces_the_highest_rate(schedule: str, policy: str) -> None:
    for epochs in (3, 19):  # of 20: without the warm-up, and with it
        retrain = {"epochs": epochs, "policy": policy, "lr": 0.02}
        rate = retrain_schedule(prune(retrain=retrain), training(schedule={"name": schedule, "warmup": 4}))
        assert max(rate(part / 1000) for part in range(1001)) == pytest.approx(0.02, rel=1e-2)


def test_weight_rewind_needs_the_weights_of_the_epoch_it_goes_back_to() -> None:
    back = prune(structure="weights", retrain={"epochs": 5, "policy": "weight_rewind"})
    assert rewind_epoch(back, training()) == 15
    assert rewind_epoch(prune(retrain={"epochs": 5}), training()) is None
    longer = prune(structure="weights", retrain={"epochs": 50, "policy": "weight_rewind"})
    assert rewind_epoch(longer, training()) == 0
