"""The optimizations: defaults that depend on other fields, and combinations that mean nothing."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from app.spec.budget import Budget
from app.spec.job import parse_job
from app.spec.low_rank import LowRank, Separable
from app.spec.optimizations import REWRITES
from app.spec.prune import CHANNEL_CRITERIA, CRITERIA, Criterion, Prune
from app.spec.retrain import Distillation
from tests.support.jobs.specs import document, job, refused


def prune(**fields: Any) -> Prune:
    (step,) = job(optimizations=[{"type": "prune", **fields}]).optimizations
    assert isinstance(step, Prune)
    return step


def test_structure_and_scope_follow_from_how_much_is_said() -> None:
    assert (prune(sparsity=0.8).structure, prune(sparsity=0.8).scope) == ("weights", "global")
    assert (prune(threshold=0.1).structure, prune(threshold=0.1).scope) == ("weights", "global")
    assert (prune(budget={"macs": 0.5}).structure, prune(budget={"macs": 0.5}).scope) == ("channels", "sensitivity")
    assert prune(sparsity=0.5, structure="channels").scope == "layer"
    assert prune(budget={"bytes": 0.5}, scope="learned").structure == "channels"
    assert prune(sparsity=0.5, scope="layer").scope == "layer"


def test_the_documented_defaults_of_pruning() -> None:
    step = prune(budget={"macs": 0.5})
    assert (step.criterion, step.round_to, step.min_channels, step.max_sparsity) == ("l2", None, 1, 0.9)
    assert (step.schedule.name, step.exclude, step.overrides) == ("one_shot", (), {})
    assert step.retrain is not None
    assert (step.retrain.policy, step.retrain.epochs) == ("auto", 3)
    distilled = prune(sparsity=0.5, retrain={"distillation": {}}).retrain
    assert distilled is not None
    assert distilled.distillation is not None
    assert (distilled.distillation.alpha, distilled.distillation.temperature) == (0.7, 4.0)


def test_the_dense_network_teaches_unless_something_else_is_said() -> None:
    own = Distillation(alpha=0.5, temperature=2.0)
    other = Distillation(alpha=0.9, temperature=4.0)
    for retrain, teacher in (
        ({}, own),
        ({"epochs": 4, "lr": 0.01}, own),
        ({"distillation": None}, None),
        ({"distillation": {"alpha": 0.9}}, other),
        ({"policy": "lr_rewind"}, None),
        ({"policy": "none"}, None),
    ):
        made = job(optimizations=[{"type": "prune", "sparsity": 0.5, "retrain": retrain}])
        (part,) = made.optimizations
        assert isinstance(part, Prune)
        assert part.retrain is not None
        assert part.retrain.distillation == teacher
        assert parse_job(made.document()) == made


def test_the_usual_criterion_of_single_weights_of_all_layers_is_lamp() -> None:
    for step, criterion in (
        ({"sparsity": 0.9}, "lamp"),
        ({"sparsity": 0.9, "scope": "layer"}, "l2"),
        ({"sparsity": 0.9, "criterion": "l1"}, "l1"),
        ({"threshold": 0.01}, "l2"),
        ({"pattern": "2:4"}, "l2"),
        ({"sparsity": 0.5, "block": [4, 4]}, "l2"),
        ({"budget": {"macs": 0.5}}, "l2"),
    ):
        (part,) = job(optimizations=[{"type": "prune", **step}]).optimizations
        assert isinstance(part, Prune)
        assert part.criterion == criterion


@pytest.mark.parametrize(
    ("step", "reconstructed"),
    [
        ({"type": "prune", "budget": {"macs": 0.5}}, True),
        ({"type": "prune", "sparsity": 0.9}, False),
        ({"type": "prune", "budget": {"macs": 0.5}, "retrain": {"policy": "none"}}, True),
        ({"type": "prune", "pattern": "2:4", "retrain": {"policy": "none"}}, True),
        ({"type": "prune", "sparsity": 0.9, "schedule": {"name": "cubic"}}, False),
        ({"type": "prune", "sparsity": 0.9, "retrain": {"policy": "weight_rewind"}}, False),
        ({"type": "prune", "sparsity": 0.9, "reconstruct": False}, False),
        ({"type": "low_rank", "rank": 4}, False),
        ({"type": "low_rank", "rank": 4, "retrain": {"policy": "none"}}, True),
        ({"type": "separable", "reconstruct": True}, True),
    ],
)
def test_a_removal_is_repaired_by_default_where_that_was_measured_to_win(
    step: dict[str, Any], reconstructed: bool
) -> None:
    (part,) = job(optimizations=[step]).optimizations
    assert isinstance(part, Prune | LowRank | Separable)
    assert part.reconstruct is reconstructed


def test_a_budget_is_a_fraction_or_a_count() -> None:
    assert Budget(macs=0.5).allowed(101) == 50
    assert Budget(params=1.0).allowed(101) == 101
    assert Budget(bytes=2).allowed(101) == 2
    assert Budget(bytes=2).measure == Budget(bytes=2).cost_measure == "bytes"
    assert (Budget(latency_ms=0.5).measure, Budget(latency_ms=0.5).cost_measure) == ("latency_ms", None)
    assert (Budget(params=0.3).amount, Budget(macs=7).amount) == (0.3, 7)
    assert prune(budget={"macs": 1}).budget == Budget(macs=1)


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({}, ""),
        ({"sparsity": 0.5, "budget": {"macs": 0.5}}, "/budget"),
        ({"sparsity": 0.5, "threshold": 0.1}, "/threshold"),
        ({"sparsity": 0}, "/sparsity"),
        ({"sparsity": 1}, "/sparsity"),
        ({"sparsity": 1.0000001}, "/sparsity"),
        ({"sparsity": -0.1}, "/sparsity"),
        ({"threshold": 0}, "/threshold"),
        ({"budget": {}}, "/budget"),
        ({"budget": {"macs": 0.5, "params": 0.5}}, "/budget"),
        ({"budget": {"macs": 0}}, "/budget/macs"),
        ({"budget": {"macs": 1.5}}, "/budget/macs"),
        ({"budget": {"macs": 1.0000001}}, "/budget/macs"),
        ({"budget": {"macs": 2**60}}, "/budget/macs"),
        ({"budget": {"latency_ms": -3}}, "/budget/latency_ms"),
        ({"budget": {"macs": 0.5, "latency_ms": 3}}, "/budget"),
        ({"budget": {"macs": 0.5}, "structure": "weights"}, "/budget"),
        ({"threshold": 0.1, "structure": "channels"}, "/threshold"),
        ({"sparsity": 0.5, "criterion": "taylor"}, "/criterion"),
        ({"threshold": 0.5, "criterion": "random"}, "/criterion"),
        ({"threshold": 0.5, "schedule": {"name": "cubic"}}, "/schedule/name"),
        ({"budget": {"macs": 0.5}, "schedule": {"name": "cubic"}}, "/schedule/name"),
        ({"sparsity": 0.5, "schedule": {"name": "one_shot", "steps": 3}}, "/schedule/steps"),
        ({"sparsity": 0.5, "schedule": {"name": "iterative", "steps": None}}, "/schedule/steps"),
        ({"sparsity": 0.5, "schedule": {"name": "iterative", "epochs": 3}}, "/schedule/epochs"),
        ({"sparsity": 0.5, "retrain": {"policy": "none", "epochs": 2}}, "/retrain/epochs"),
        ({"sparsity": 0.5, "retrain": {"policy": "none", "distillation": {}}}, "/retrain/distillation"),
        ({"sparsity": 0.5, "retrain": {"epochs": 0}}, "/retrain/epochs"),
        ({"sparsity": 0.5, "retrain": {"distillation": {"alpha": 0}}}, "/retrain/distillation/alpha"),
        ({"budget": {"macs": 0.5}, "retrain": {"policy": "weight_rewind"}}, "/retrain/policy"),
        ({"sparsity": 0.5, "overrides": {"conv1": {}}}, "/overrides/conv1"),
        ({"sparsity": 0.5, "overrides": {"conv1": {"sparsity": 0.5, "threshold": 1}}}, "/overrides/conv1/threshold"),
        ({"sparsity": 0.5, "max_sparsity": 1}, "/max_sparsity"),
        ({"sparsity": 0.5, "min_channels": 0}, "/min_channels"),
        ({"sparsity": 0.5, "round_to": 0}, "/round_to"),
        ({"sparsity": 0.5, "structure": "weights", "block": [4, 4]}, "/block"),
        ({"sparsity": 0.5, "block": [4, 0]}, "/block/1"),
        ({"threshold": 0.5, "structure": "blocks"}, "/threshold"),
        ({"budget": {"macs": 0.5}, "block": [4, 4]}, "/budget"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "/sparsity"),
        ({"pattern": "4:4"}, "/pattern"),
        ({"pattern": "0:4"}, "/pattern"),
        ({"pattern": "2/4"}, "/pattern"),
        ({"pattern": "1:65"}, "/pattern"),
        ({"pattern": "2:4", "structure": "channels", "budget": {"macs": 0.5}}, "/pattern"),
        ({"pattern": "2:4", "criterion": "lamp"}, "/criterion"),
        ({"pattern": "2:4", "schedule": {"name": "iterative"}}, "/schedule/name"),
        ({"sparsity": 0.5, "criterion": "erk", "scope": "global"}, "/scope"),
        ({"sparsity": 0.5, "criterion": "lamp", "scope": "layer"}, "/scope"),
        ({"budget": {"macs": 0.5}, "criterion": "erk"}, "/criterion"),
        ({"sparsity": 0.5, "reconstruct": True, "schedule": {"name": "cubic"}}, "/reconstruct"),
        ({"sparsity": 0.5, "reconstruct": True, "retrain": {"policy": "weight_rewind"}}, "/reconstruct"),
        ({"sparsity": 0.5, "reconstruct": 1}, "/reconstruct"),
        ({"sparsity": 0.5, "scope": "learned"}, "/scope"),
        ({"sparsity": 0.5, "structure": "channels", "scope": "learned"}, "/scope"),
        ({"budget": {"latency_ms": 0.5}, "scope": "learned"}, "/scope"),
    ],
)
def test_prune_steps_that_mean_nothing_are_refused_where_they_are_wrong(fields: dict[str, Any], pointer: str) -> None:
    faults = refused(document(optimizations=[{"type": "prune", **fields}]))
    assert [fault.pointer for fault in faults] == [f"/optimizations/0{pointer}"]


def test_an_iterative_schedule_without_a_number_has_three_rounds() -> None:
    assert prune(sparsity=0.5, schedule={"name": "iterative"}).schedule.steps == 3


def test_a_cubic_schedule_without_epochs_rises_over_seven_tenths_of_the_retraining() -> None:
    assert prune(sparsity=0.5, schedule={"name": "cubic"}, retrain={"epochs": 10}).schedule.epochs == 7


@pytest.mark.parametrize("kind", [part.kind() for part in REWRITES])
def test_a_narrowed_rewrite_names_at_least_one_layer(kind: str) -> None:
    (fault,) = refused(document(optimizations=[{"type": kind, "layers": []}]))
    assert fault.pointer == "/optimizations/0/layers"
    assert not refused(document(optimizations=[{"type": kind, "layers": ["conv1"]}]))


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"type": "dropout", "p": 0}, "/p"),
        ({"type": "dropout", "p": 1}, "/p"),
        ({"type": "spatial_dropout", "p": 1.5}, "/p"),
        ({"type": "deeper", "times": 0}, "/times"),
        ({"type": "regularization"}, ""),
        ({"type": "regularization", "l1": -1}, "/l1"),
        ({"type": "regularization", "l1": 1, "all": 1}, "/all"),
        ({"type": "batch_norm", "p": 0.5}, "/p"),
    ],
)
def test_other_optimizations_outside_their_intervals_are_refused(fields: dict[str, Any], pointer: str) -> None:
    assert [fault.pointer for fault in refused(document(optimizations=[fields]))] == [f"/optimizations/0{pointer}"]


def test_every_criterion_of_a_structure_is_a_criterion_and_a_table_has_those_of_channels() -> None:
    assert {criterion for criteria in CRITERIA.values() for criterion in criteria} == set(get_args(Criterion))
    for criterion in get_args(Criterion):
        sent = document(kind="sensitivity", sensitivity={"criterion": criterion})
        assert bool(refused(sent)) == (criterion not in CHANNEL_CRITERIA)
