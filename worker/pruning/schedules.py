"""When how much is removed, and at which learning rate the network recovers.

    for stage in prune_stages(step, training):              # one_shot and cubic: one; iterative: `steps` of them
        sparsity = stage.sparsity(step.sparsity)            # channels: choose_removals(..., fraction=stage.fraction)
        rates = retrain_rates(step, training)               # each: progress of the retraining (0 to 1) -> learning rate
        updates = stage.mask_updates(step.sparsity, steps)  # cubic: {step of the retraining: sparsity from it on}

`retrain.epochs` are the epochs after each removal: an iterative job with 3 steps of 4 epochs retrains for 12 (as
Renda et al. count).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from app.pruning.sparsity_allocation import sparsity_after
from app.spec.job import Training, race_epochs, retraining
from app.spec.optimizations import Compression
from app.spec.prune import Prune
from worker.training.learning_rate import LearningRate, learning_rate

FINE_TUNE_SHARE = 0.01  # of the highest rate of training: where the original schedules end
SMALLEST_RATE_SHARE = 0.3  # of the highest rate, where schedules do not fall: a low rate recovers 3 to 5 points less
# Of a cubic: choosing masks costs more than a step, and 20 to 50 of them draw the curve well enough.
MOST_MASK_UPDATES = 50
# Of the retraining over which the sparsity rises; the rest trains at a fixed mask with a falling rate.
CUBIC_SHARE = 0.7
RACE_TOPS = (1.0, 0.5, 0.25)  # of the training's highest rate: where the rates of policy auto start


@dataclass(frozen=True)
class PruningRound:
    """One removal and the retraining after it: the `number`-th of `count`, `fraction` in (0, 1] of the way.

    `ramp` is None, or the share of the retraining (0 to 1] over which a cubic schedule raises the sparsity.
    """

    number: int
    count: int
    fraction: float
    epochs: int
    ramp: float | None = None

    def sparsity(self, target: float | None) -> float | None:
        """The sparsity (0 to 1) after this removal: density falls by the same factor in each stage.

        None (a threshold) stays None. A cubic stage starts with nothing removed: 0.
        """
        if target is None:
            return None
        return 0.0 if self.ramp is not None else sparsity_after(target, self.fraction)

    def mask_updates(self, target: float | None, steps: int, *, initial: float = 0.0) -> dict[int, float]:
        """Step of the retraining (0 to `steps` - 1) -> sparsity from before it on; empty unless cubic.

        At most 50 updates, rising, the last with exactly `target`. Zhu & Gupta, arXiv 1710.01878, equation 1.
        """
        if self.ramp is None or target is None:
            return {}
        last = min(steps - 1, max(1, round(self.ramp * steps)))
        every = max(1, -(-last // MOST_MASK_UPDATES))
        moments = [*range(every, last, every), last] if last > 0 else [0]
        first = min(initial, target)  # a curve that falls would ask for fewer zeros later: masks never open
        return {moment: cubic_sparsity(moment, start=0, end=last, initial=first, final=target) for moment in moments}


def prune_stages(step: Compression, training: Training) -> tuple[PruningRound, ...]:
    """The removals of `step` in order. The last one reaches the target; a cubic without retraining removes at once."""
    epochs = retraining(step, training).epochs or 0
    if not isinstance(step, Prune):
        return (PruningRound(1, 1, 1.0, epochs),)
    schedule = step.schedule
    if schedule.name == "iterative":
        count = schedule.steps or 1
        return tuple(PruningRound(number, count, number / count, epochs) for number in range(1, count + 1))
    if schedule.name == "cubic" and epochs:
        ramp = CUBIC_SHARE if schedule.epochs is None else min(1.0, schedule.epochs / epochs)
        return (PruningRound(1, 1, 1.0, epochs, ramp),)
    return (PruningRound(1, 1, 1.0, epochs),)


def cubic_sparsity(moment: float, *, start: float, end: float, initial: float, final: float) -> float:
    """The sparsity at `moment`: `initial` until `start`, `final` from `end` on, between them fast first and slow last.

    s = final + (initial - final) * (1 - (t - t0) / (t1 - t0))^3: Zhu & Gupta, arXiv 1710.01878, equation 1.
    """
    if moment >= end:
        return final
    left = 1 - max(0.0, moment - start) / (end - start)
    return final + (initial - final) * left**3


@dataclass(frozen=True)
class NamedRate:
    """A learning rate over a retraining, progress in [0, 1] -> rate, and what it is called in events and reports."""

    name: str
    rate: LearningRate


def retrain_rates(step: Compression, training: Training) -> tuple[NamedRate, ...]:
    """The rates that a retraining may follow; more than one are compared in a race, and the first wins a tie.

    With policy `auto`: lines from the training's highest rate, or parts of it, to 0. Which start is best depends on
    the data and on how much was removed, and no constant is best everywhere (Le & Hua, arXiv 2105.03193; Zimmer et al.,
    arXiv 2111.00843).
    """
    retrain = retraining(step, training)
    if retrain.policy != "auto":
        return (NamedRate(retrain.policy, retrain_schedule(step, training)),)
    highest = training.optimizer.lr if retrain.lr is None else retrain.lr
    tops = [share * highest for share in (RACE_TOPS if race_epochs(step, training) else RACE_TOPS[:1])]
    return tuple(NamedRate(f"from {top:.3g} to 0", partial(_line, top)) for top in tops)


def _line(top: float, progress: float) -> float:
    return top * (1 - progress)


def retrain_schedule(step: Compression, training: Training) -> LearningRate:
    """The learning rate of a policy that has one: progress in [0, 1] -> rate.

    `lr_rewind` and `weight_rewind` run the last epochs of the original schedule again (Renda et al., arXiv
    2003.02389): with t epochs of retraining after T of training, the part from 1 - t/T on. Step and constant
    schedules end at or stay on one rate, which is either too low to recover or too high to converge: they are replaced
    by a line from lr * max(t/T, 0.3) to 0 (Zimmer et al., arXiv 2111.00843, without its correction by the weights'
    norm). `fine_tune` is constant at a hundredth of the highest rate; `none` is 0. `retrain.lr` replaces the highest
    rate and keeps the form.

    After a training of 0 epochs (the network was trained before) the retraining is the whole schedule, warm-up included, as
    if the training had been as long as it.
    """
    retrain = retraining(step, training)
    epochs = retrain.epochs or 0
    if retrain.policy == "none" or epochs == 0:
        return lambda progress: 0.0
    if retrain.policy == "fine_tune":
        constant = retrain.lr if retrain.lr is not None else training.optimizer.lr * FINE_TUNE_SHARE
        return lambda progress: constant
    if training.epochs == 0:
        training = training.model_copy(update={"epochs": epochs})
    share = min(1.0, epochs / training.epochs)
    if training.schedule.name in ("step", "constant"):
        highest = retrain.lr if retrain.lr is not None else training.optimizer.lr * max(share, SMALLEST_RATE_SHARE)
        return lambda progress: highest * (1 - progress)
    original = learning_rate(training)
    start = 1 - share
    summit = original(max(start, min(1.0, training.warmup_epochs / training.epochs)))
    scale = 1.0 if retrain.lr is None or summit == 0 else retrain.lr / summit
    return lambda progress: scale * original(start + share * progress)


def rewind_epoch(step: Compression, training: Training) -> int | None:
    """The epoch of the training whose weights `weight_rewind` goes back to (0: the initial ones); None for others."""
    retrain = retraining(step, training)
    if retrain.policy != "weight_rewind":
        return None
    return max(0, training.epochs - (retrain.epochs or 0))
