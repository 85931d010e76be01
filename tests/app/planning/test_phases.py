"""The phases of a job: their order, and what each belongs to."""

from __future__ import annotations

from typing import Any

import pytest

from app.planning.phases import PlannedPhase, phases_of
from app.planning.plan import plan_answer
from tests.support.jobs.specs import job, plan

ROUNDS = {"type": "prune", "sparsity": 0.5, "schedule": {"name": "iterative", "steps": 2}, "retrain": {"epochs": 3}}


def test_each_removal_has_its_round_and_every_optimization_its_evaluation() -> None:
    spec = job(training={"epochs": 4}, optimizations=[{"type": "batch_norm"}, ROUNDS, {"type": "quantize"}])
    assert phases_of(spec) == (
        PlannedPhase("preparing"),
        PlannedPhase("training", 4),
        PlannedPhase("evaluating"),
        PlannedPhase("pruning", None, 1, 1),
        PlannedPhase("retraining", 3, 1, 1),
        PlannedPhase("pruning", None, 1, 2),
        PlannedPhase("retraining", 3, 1, 2),
        PlannedPhase("evaluating", None, 1),
        PlannedPhase("evaluating", None, 2, subject="int8"),
        PlannedPhase("measuring"),
        PlannedPhase("exporting"),
    )


def test_without_retraining_a_removal_is_evaluated_at_once() -> None:
    spec = job(optimizations=[{"type": "low_rank", "rank": 4, "retrain": {"policy": "none"}}])
    names = [(phase.phase, phase.position) for phase in phases_of(spec)]
    assert names[3:5] == [("pruning", 0), ("evaluating", 0)]


def test_a_table_of_sensitivities_belongs_to_its_options() -> None:
    (table,) = (phase for phase in phases_of(job(kind="sensitivity")) if phase.subject == "sensitivity")
    assert (table.phase, table.position, table.optimization) == ("evaluating", None, "/sensitivity")


@pytest.mark.parametrize(
    ("parts", "row"),
    [
        ({"kind": "sensitivity"}, {"phase": "evaluating", "optimization": "/sensitivity"}),
        ({"optimizations": [ROUNDS]}, {"phase": "retraining", "epochs": 3, "optimization": "/optimizations/0"}),
        ({}, {"phase": "preparing"}),
    ],
)
def test_the_answer_of_a_plan_leaves_out_what_a_phase_has_not(parts: dict[str, Any], row: dict[str, Any]) -> None:
    assert row in plan_answer(plan(**parts))["phases"]
