"""How far a job is, over all of its phases, and how long the rest takes.

All phases are estimated before the first step, each with the seconds that it would take on a nominal
machine. The fraction done depends on the position alone, so it never falls, also across attempts. The time left is the
estimate, corrected by how fast the training really is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.planning.phases import PhaseName
from worker.journal import Progress

NOMINAL_FLOP_PER_S = 6e10  # of a convolution on two cores
NOMINAL_IMAGE_S = 1.5e-5  # to cut, augment and normalise one image
FORWARD_FLOP_PER_MAC = 2
TRAINING_FLOP_PER_MAC = 6  # forward 2, backward 4


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase: epochs, optimizer steps, and its seconds on a nominal machine, of computing and of anything else.

    `name` tells phases of a kind apart, such as the evaluations after each step; empty: the phase says it all.
    """

    phase: PhaseName
    computing_s: float
    other_s: float = 0.0
    epochs: int = 0
    steps: int = 0
    name: str = ""

    @property
    def key(self) -> str:
        """The name under which the phase is entered."""
        return self.name or self.phase

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.computing_s + self.other_s


def training_seconds(images: int, macs: int) -> float:
    """Seconds in which a nominal machine trains a network of so many MACs on so many images."""
    return images * (NOMINAL_IMAGE_S + TRAINING_FLOP_PER_MAC * macs / NOMINAL_FLOP_PER_S)


def forward_seconds(images: int, macs: int) -> float:
    """Seconds in which a nominal machine computes the logits of so many images."""
    return images * (NOMINAL_IMAGE_S + FORWARD_FLOP_PER_MAC * macs / NOMINAL_FLOP_PER_S)


class ProgressTracker:
    """The phases of a job in order, and where it is among them."""

    def __init__(self, parts: Sequence[PhaseEstimate], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts = tuple(parts)
        self._places = {part.key: place for place, part in enumerate(self._parts)}
        assert len(self._places) == len(self._parts), "two phases of one name"
        self._clock = clock
        self._at = 0
        self._share = 0.0
        self._fraction = 0.0
        self._entered = (clock(), 0.0)
        self._spent_s = 0.0
        self._estimated_s = 0.0

    @property
    def part(self) -> PhaseEstimate:
        """The phase that the job is in."""
        return self._parts[self._at]

    def enter(self, name: str) -> None:
        """Begin the phase of this name. Raises KeyError: the job has no such phase."""
        place = self._places[name]
        self._add_measured()
        self._at, self._share = place, 0.0
        self._entered = (self._clock(), 0.0)

    def resume_at(self, share: float) -> None:
        """Go on at this share (0 to 1) of the present phase: an earlier attempt did what lies before it."""
        self._share = share
        self._entered = (self._clock(), share)

    def progress(self, share: float, *, epoch: int = 0, step: int = 0, images_per_s: float | None = None) -> Progress:
        """The progress at `share` (0 to 1) of the present phase, `step` steps into it."""
        self._share = max(self._share, min(1.0, share))
        whole = sum(part.seconds for part in self._parts)
        done = sum(part.seconds for part in self._parts[: self._at]) + self._share * self.part.seconds
        self._fraction = max(self._fraction, done / whole if whole else 0.0)
        return Progress(
            phase=self.part.phase,
            epoch=epoch,
            epochs=self.part.epochs,
            step=self.steps_before + step,
            steps=sum(part.steps for part in self._parts),
            fraction=self._fraction,
            images_per_s=images_per_s,
            eta_s=self._seconds_left(),
        )

    @property
    def steps_before(self) -> int:
        """Optimizer steps of all phases before the present one."""
        return sum(part.steps for part in self._parts[: self._at])

    def _seconds_left(self) -> float | None:
        spent_s, estimated_s = self._measured()
        if estimated_s <= 0:
            return None
        slowness = spent_s / estimated_s
        left = (1 - self._share) * (self.part.computing_s * slowness + self.part.other_s)
        return left + sum(part.computing_s * slowness + part.other_s for part in self._parts[self._at + 1 :])

    def _measured(self) -> tuple[float, float]:
        """(seconds spent in trainings, seconds estimated for the same), the present one included."""
        if not self.part.steps:
            return self._spent_s, self._estimated_s
        began, share = self._entered
        return (
            self._spent_s + self._clock() - began,
            self._estimated_s + (self._share - share) * self.part.computing_s,
        )

    def _add_measured(self) -> None:
        self._spent_s, self._estimated_s = self._measured()
