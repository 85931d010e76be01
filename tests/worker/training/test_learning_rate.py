"""Learning rates: pure functions of progress."""

from __future__ import annotations

import pytest

from app.spec.job import Training
from worker.training.learning_rate import START_FACTOR, learning_rate

POINTS = [0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0]


def rates(name: str, *, epochs: int = 10, lr: float = 0.1, **schedule: object) -> list[float]:
    """The rates of a schedule at POINTS."""
    document = {"epochs": epochs, "optimizer": {"name": "sgd", "lr": lr}, "schedule": {"name": name} | schedule}
    rate = learning_rate(Training.model_validate(document))
    return [rate(point) for point in POINTS]


def test_one_cycle_rises_for_three_tenths_and_falls_to_zero_in_a_line() -> None:
    assert rates("one_cycle") == pytest.approx(
        [0.004, 0.036, 0.084, 0.1, 0.0714286, 0.0571429, 0.0357143, 0.0142857, 0.0], abs=1e-6
    )


def test_cosine_falls_to_zero_and_is_half_of_its_peak_in_the_middle() -> None:
    found = rates("cosine")
    assert found[0] == pytest.approx(0.1)
    assert found[4] == pytest.approx(0.05)
    assert found[-1] == pytest.approx(0.0)
    assert found == sorted(found, reverse=True)


def test_step_falls_behind_each_milestone_half_and_three_quarters_by_default() -> None:
    assert rates("step") == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 3)
    assert rates("step", milestones=(3, 9), gamma=0.5) == pytest.approx([0.1] * 3 + [0.05] * 4 + [0.025] * 2)


def test_a_milestone_is_met_by_the_first_step_of_its_epoch_despite_rounding() -> None:
    training = Training.model_validate(
        {"epochs": 7, "optimizer": {"name": "sgd", "lr": 1.0}, "schedule": {"name": "step", "milestones": (3,)}}
    )
    rate = learning_rate(training)
    steps = 7 * 469
    assert rate(3 * 469 / steps) == pytest.approx(0.1)
    assert rate((3 * 469 - 1) / steps) == pytest.approx(1.0)


def test_constant_stays_and_a_warm_up_starts_above_zero() -> None:
    assert rates("constant") == [0.1] * 9
    warm = rates("constant", warmup=5.0)
    assert warm[0] == pytest.approx(0.1 * START_FACTOR)
    assert warm[4:] == pytest.approx([0.1] * 5)


def test_a_warm_up_as_long_as_the_training_reaches_the_peak_at_its_end() -> None:
    found = rates("one_cycle", warmup=10.0)
    assert found == [*sorted(found[:-1]), 0.0]
    assert found[-2] == pytest.approx(0.1 * (START_FACTOR + (1 - START_FACTOR) * 0.9))


@pytest.mark.parametrize("name", ["one_cycle", "cosine", "step", "constant"])
def test_rates_stay_between_zero_and_the_peak(name: str) -> None:
    training = Training.model_validate({"epochs": 3, "optimizer": {"lr": 0.3}, "schedule": {"name": name}})
    rate = learning_rate(training)
    assert all(0.0 <= rate(step / 1000) <= 0.3 + 1e-12 for step in range(1001))
