"""The phases of a job in their order: stated once, for the answer of a validation and for the worker that runs them.

    for phase in phases_of(spec):
        phase.phase, phase.position, phase.round, phase.epochs    # "retraining", 1, 2, 5

The order: prepare, train and evaluate; for each compression its rounds (prune, then retrain if it has epochs) and an
evaluation; the 8-bit file or, in a job of kind sensitivity, the table; measure; export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from app.spec.job import JobSpec, retraining
from app.spec.optimizations import Compression
from app.spec.quantize import Quantize

PhaseName = Literal["preparing", "training", "pruning", "retraining", "evaluating", "measuring", "exporting"]
Subject = Literal["network", "sensitivity", "int8"]


@dataclass(frozen=True)
class PlannedPhase:
    """One stretch of a job."""

    phase: PhaseName
    epochs: int | None = None
    """Epochs of a training, which may be 0; of a retraining at least 1. None: the phase is not counted in epochs."""
    position: int | None = None
    """Of the optimization, in `spec.optimizations`, that it belongs to; None: it belongs to the whole job."""
    round: int | None = None
    """Which removal of that optimization, from 1 to `step.rounds`; for pruning and retraining only."""
    subject: Subject = "network"
    """What it works on: the network; every group of channels cut alone (`sensitivity`); the 8-bit file (`int8`)."""

    @property
    def optimization(self) -> str | None:
        """JSON pointer of the part of the job that it belongs to; None: the whole job."""
        if self.subject == "sensitivity":
            return "/sensitivity"
        return None if self.position is None else f"/optimizations/{self.position}"


def phases_of(spec: JobSpec) -> tuple[PlannedPhase, ...]:
    """Every phase of the job, in order."""
    return tuple(_phases(spec))


def _phases(spec: JobSpec) -> Iterator[PlannedPhase]:
    yield PlannedPhase("preparing")
    yield PlannedPhase("training", spec.training.epochs)
    yield PlannedPhase("evaluating")
    for position, step in enumerate(spec.optimizations):
        if isinstance(step, Compression):
            yield from _phases_of_step(spec, step, position)
    for position, step in enumerate(spec.optimizations):
        if isinstance(step, Quantize):
            yield PlannedPhase("evaluating", position=position, subject="int8")
    if spec.sensitivity is not None:
        yield PlannedPhase("evaluating", subject="sensitivity")
    yield PlannedPhase("measuring")
    yield PlannedPhase("exporting")


def _phases_of_step(spec: JobSpec, step: Compression, position: int) -> Iterator[PlannedPhase]:
    epochs = retraining(step, spec.training).epochs or 0
    for number in range(1, step.rounds + 1):
        yield PlannedPhase("pruning", position=position, round=number)
        if epochs:
            yield PlannedPhase("retraining", epochs, position, number)
    yield PlannedPhase("evaluating", position=position)
