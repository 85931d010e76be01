"""How far a job is and how long it takes, with a clock that the test turns."""

from __future__ import annotations

import pytest

from worker.run.progress import PhaseEstimate, ProgressTracker, forward_seconds, training_seconds

PARTS = [
    PhaseEstimate("preparing", 0.0, 0.5),
    PhaseEstimate("training", 40.0, 0.0, epochs=4, steps=400),
    PhaseEstimate("pruning", 1.0, 0.5),
    PhaseEstimate("retraining", 10.0, 0.0, epochs=1, steps=100),
    PhaseEstimate("exporting", 0.0, 8.0),
]


class Clock:
    """A clock that stands still unless it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_the_fraction_counts_all_phases_and_never_falls() -> None:
    tracker = ProgressTracker(PARTS, clock=Clock())
    tracker.enter("training")
    half = tracker.progress(0.5, epoch=2, step=200)
    assert half.fraction == pytest.approx(20.5 / 60)
    assert (half.phase, half.epoch, half.epochs, half.step, half.steps) == ("training", 2, 4, 200, 500)
    assert tracker.progress(0.25).fraction == half.fraction
    tracker.enter("retraining")
    assert tracker.progress(0.1, step=10).step == 410
    tracker.enter("exporting")
    assert tracker.progress(1.0).fraction == 1.0


@pytest.mark.parametrize("slowness", [0.2, 1.0, 7.0])
def test_the_time_left_follows_how_fast_the_training_really_is(slowness: float) -> None:
    clock = Clock()
    tracker = ProgressTracker(PARTS, clock=clock)
    tracker.enter("preparing")
    assert tracker.progress(0.0).eta_s is None  # nothing measured yet: no invented number
    tracker.enter("training")
    clock.now += 10 * slowness  # a quarter of the training
    assert tracker.progress(0.25).eta_s == pytest.approx(30 * slowness + 1 * slowness + 0.5 + 10 * slowness + 8)
    clock.now += 30 * slowness
    tracker.progress(1.0)
    tracker.enter("pruning")
    assert tracker.progress(0.0).eta_s == pytest.approx(1 * slowness + 0.5 + 10 * slowness + 8)
    tracker.enter("exporting")
    assert tracker.progress(0.0).eta_s == pytest.approx(8)
    assert tracker.progress(1.0).eta_s == pytest.approx(0)


def test_what_an_earlier_attempt_did_is_not_taken_for_speed() -> None:
    clock = Clock()
    tracker = ProgressTracker(PARTS, clock=clock)
    tracker.enter("training")
    tracker.resume_at(0.5)
    clock.now += 10
    assert tracker.progress(0.75).eta_s == pytest.approx(10 + 1.5 + 10 + 8)
    assert tracker.progress(0.75).fraction == pytest.approx((0.5 + 30) / 60)


def test_estimates_grow_with_images_and_cost() -> None:
    assert training_seconds(2000, 10**6) == pytest.approx(2 * training_seconds(1000, 10**6))
    assert training_seconds(1000, 10**7) > 2 * forward_seconds(1000, 10**7)


def test_phases_of_a_kind_are_entered_by_name_and_others_do_not_exist() -> None:
    evaluations = [PhaseEstimate("evaluating", 1.0, name="before"), PhaseEstimate("evaluating", 3.0, name="after")]
    tracker = ProgressTracker([PARTS[0], *evaluations], clock=Clock())
    tracker.enter("after")
    assert tracker.progress(0.0).fraction == pytest.approx(1.5 / 4.5)
    with pytest.raises(KeyError):
        tracker.enter("evaluating")
    with pytest.raises(AssertionError, match="two phases of one name"):
        ProgressTracker([PARTS[0], PARTS[0]])
