"""Learning-rate schedules: pure functions from progress (0 at the first step, 1 after the last) to the rate.

They depend on the share of the training done and on nothing else, so that a resumed training, another batch size or a
rewound retraining reads the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from app.spec.job import Training

LearningRate = Callable[[float], float]

START_FACTOR = 1 / 25  # of the highest rate at the first step of a warm-up: at a rate of 0 the step would be lost


def learning_rate(training: Training) -> LearningRate:
    """The rate over a training as the job asks for it: progress in [0, 1] -> rate in [0, lr].

    A linear warm-up from lr/25 to lr, then: `one_cycle` falls linearly to 0 (Smith & Topin, arXiv 1708.07120, with one
    ramp on either side and without its last, lower leg); `cosine` falls to 0 as half a cosine (Loshchilov & Hutter,
    arXiv 1608.03983, one period); `step` is multiplied by `gamma` after each milestone; `constant` stays.
    """
    schedule, peak = training.schedule, training.optimizer.lr
    epochs = max(1, training.epochs)  # with 0 epochs no rate is asked for
    warm = min(1.0, training.warmup_epochs / epochs)
    milestones = tuple(epoch / epochs for epoch in training.milestones)

    def rate(progress: float) -> float:
        if progress < warm:
            return peak * (START_FACTOR + (1 - START_FACTOR) * progress / warm)
        if schedule.name == "constant":
            return peak
        if schedule.name == "step":
            # milestones are whole epochs: a step's progress k/n meets them up to rounding
            return peak * schedule.gamma ** sum(progress >= milestone - 1e-9 for milestone in milestones)
        left = (1.0 - progress) / (1.0 - warm) if warm < 1 else 0.0
        left = min(1.0, max(0.0, left))
        return peak * (left if schedule.name == "one_cycle" else 0.5 * (1 - math.cos(math.pi * left)))

    return rate
