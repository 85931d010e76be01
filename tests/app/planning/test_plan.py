"""The dry run: the answer of `validate`, and the spec that comes back."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from app.network.cost import cost
from app.network.editor import GraphEditor
from app.network.graph import build_graph
from app.network.layers.activations import LeakyReLU
from app.network.layers.registry import read_layers
from app.network.node import Limits
from app.planning.plan import JobLimits, _changes, given_graph, make_plan, plan_answer
from app.settings import Settings
from app.spec.job import Optimizer, parse_job
from app.spec.model import LayersModel, PresetModel
from tests.support.jobs.sources import planned, source_of
from tests.support.jobs.specs import COLOUR, GREY, PICTURES, document, job, plan

STEPS: list[dict[str, Any]] = [
    {"type": "batch_norm"},
    {"type": "deeper"},
    {"type": "regularization", "l1": 1e-5},
    {"type": "prune", "budget": {"macs": 0.5}, "retrain": {"epochs": 2}, "schedule": {"name": "iterative", "steps": 2}},
    {"type": "prune", "sparsity": 0.5, "retrain": {"policy": "none"}},
]


def test_the_answer_has_the_fields_of_the_contract() -> None:
    answer = json.loads(json.dumps(plan_answer(plan(optimizations=STEPS))))
    assert answer["valid"] is True
    assert answer["plan_version"] == 1
    assert answer["layers"]
    for row in answer["layers"]:
        assert set(row) == {"name", "type", "output_shape", "params", "macs"}
    for name in ("given", "baseline", "planned", "floor"):
        assert set(answer[name]) == {"params", "nonzero_params", "macs", "bytes"}
    assert answer["estimate"]["seconds"] is None
    assert answer["estimate"]["reason"]
    assert answer["memory"]["total"] > 0
    for row in answer["plan"]:
        assert set(row) == {"layer", "action", "before", "after", "exact", "reason", "optimization"}
        assert row["action"] in {"narrow", "follow", "keep", "mask", "insert", "replace"}
    assert all(set(warning) <= {"pointer", "message", "limit", "value"} for warning in answer["warnings"])


def test_given_is_the_network_as_sent_and_baseline_the_one_that_is_trained() -> None:
    planned = plan(optimizations=STEPS)
    plain = plan()
    assert planned.given == plain.given
    assert planned.given_cost == plain.baseline_cost == plain.planned_cost == cost(plain.given)
    assert planned.baseline_cost == cost(planned.baseline)
    assert planned.baseline_cost.macs > planned.given_cost.macs
    assert len(planned.graphs) == len(STEPS) + 1
    assert planned.graphs[1] != planned.graphs[0]
    assert planned.graphs[2] != planned.graphs[1]
    assert planned.graphs[3] is planned.graphs[5] is planned.baseline
    layers = plan_answer(planned)["layers"]
    assert sum(row["macs"] for row in layers) == planned.baseline_cost.macs
    assert sum(row["params"] for row in layers) == planned.baseline_cost.params


def test_phases_are_answered_in_their_order() -> None:
    phases = [(phase.phase, phase.epochs) for phase in plan(optimizations=STEPS).phases]
    assert phases == [
        ("preparing", None),
        ("training", 10),
        ("evaluating", None),
        ("pruning", None),
        ("retraining", 2),
        ("pruning", None),
        ("retraining", 2),
        ("evaluating", None),
        ("pruning", None),
        ("evaluating", None),
        ("measuring", None),
        ("exporting", None),
    ]


def test_inserted_and_replaced_layers_have_rows() -> None:
    rows = [(row.layer, row.action, row.optimization) for row in plan(optimizations=STEPS[:2]).layers]
    assert ("conv1_bn", "insert", "/optimizations/0") in rows
    assert ("conv1", "replace", "/optimizations/0") in rows
    assert ("conv2_deep1", "insert", "/optimizations/1") in rows
    assert ("linear2", "keep", None) in rows


def test_the_spec_that_comes_back_states_shape_and_classes_and_gives_the_same_plan() -> None:
    planned = plan(optimizations=STEPS)
    assert isinstance(planned.spec.model, PresetModel)
    assert planned.spec.model.input_shape == (1, 28, 28)
    assert planned.spec.model.classes == 10
    again = make_plan(parse_job(plan_answer(planned)["spec"]), GREY)
    assert again == planned


def test_written_layers_keep_their_form_and_get_the_shape_of_the_data() -> None:
    layers = [{"type": "flatten"}, {"type": "linear", "out_features": 10}]
    planned = plan(COLOUR, model={"layers": layers})
    assert isinstance(planned.spec.model, LayersModel)
    assert planned.spec.model.input_shape == (3, 32, 32)
    assert planned.given["linear1"].params == 3072 * 10 + 10


def test_pictures_of_mixed_sizes_take_the_shape_of_the_job() -> None:
    assert plan(PICTURES, model={"preset": "resnet20", "input_shape": [3, 24, 24]}).given.input_shape == (3, 24, 24)


def test_the_graph_of_a_completed_spec_can_be_had_alone() -> None:
    planned = plan(COLOUR, model={"preset": "resnet20", "width": 0.5})
    assert given_graph(planned.spec, 10) == planned.given


def test_the_planned_network_can_be_sent_again_as_layers() -> None:
    planned = plan(COLOUR, model={"preset": "resnet20"}, optimizations=[{"type": "prune", "budget": {"macs": 0.5}}])
    again = plan(COLOUR, model={"input_shape": [3, 32, 32], "layers": planned.planned.to_layers()})
    assert again.given == planned.planned
    assert again.given_cost == planned.planned_cost


def test_limits_come_from_the_settings() -> None:
    limits = JobLimits.of(Settings(max_params=5, max_epochs=6, max_training_bytes=7))
    assert (limits.params, limits.epochs, limits.training_bytes) == (5, 6, 7)


def _milliseconds(work: Any, runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


@pytest.mark.parametrize(("preset", "limit_ms"), [("resnet20", 150), ("vgg16", 200)])
def test_a_plan_takes_milliseconds(preset: str, limit_ms: float) -> None:
    # quiet machine: 9 ms and 13 ms; the limits leave room for a busy one
    sent = document(model={"preset": preset}, optimizations=[{"type": "prune", "budget": {"macs": 0.5}}])
    assert _milliseconds(lambda: plan_answer(make_plan(parse_job(sent), COLOUR))) < limit_ms


def test_ten_thousand_layers_are_planned_in_seconds() -> None:
    layers = [{"type": "relu"}] * 9_998 + [{"type": "flatten"}, {"type": "linear", "out_features": 10}]
    spec = job(model={"layers": layers})
    assert _milliseconds(lambda: plan_answer(make_plan(spec, GREY)), runs=2) < 6000


def test_a_batch_size_that_is_not_stated_is_no_larger_than_the_training_part() -> None:
    small = plan(data={"dataset": "x", "limit": 100})
    assert small.spec.training.batch_size == 64
    assert make_plan(parse_job(small.spec.document()), GREY).spec == small.spec
    assert plan(data={"dataset": "x", "limit": 50}).spec.training.batch_size == 45
    assert plan(data={"dataset": "x", "limit": 100}, training={"batch_size": 80}).spec.training.batch_size == 80


def test_few_steps_get_small_batches_and_muon_and_many_the_usual_batch() -> None:
    few = plan(data={"dataset": "x", "limit": 5000}).spec.training
    assert (few.batch_size, few.optimizer) == (64, Optimizer(name="muon"))
    long = {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": 100}}
    assert plan(optimizations=[long]).spec.training.batch_size == 128, "a long retraining has steps enough"
    many = plan(training={"epochs": 100}).spec.training
    assert (many.batch_size, many.optimizer.name) == (128, "muon")
    for partly in ({"lr": 0.05}, {"weight_decay": 0.0}, {"momentum": 0.8}):
        optimizer = plan(training={"optimizer": partly}).spec.training.optimizer
        assert optimizer == Optimizer(name="muon", **partly)
    stated = plan(training={"optimizer": {"name": "sgd"}}).spec.training.optimizer
    assert (stated.name, stated.lr) == ("sgd", 0.1)


def test_a_network_that_comes_trained_keeps_sgd() -> None:
    made = planned(GREY, {"job-first-pruned": source_of()}, model={"job": "first"})
    assert made.spec.training.optimizer.name == "sgd"


def test_a_rewrite_that_changes_a_layers_type_is_told_as_such() -> None:
    before = build_graph(
        read_layers([{"type": "conv", "out_channels": 4, "kernel_size": 3}, {"type": "relu"}]), (3, 8, 8)
    )
    editor = GraphEditor(before)
    editor.replace_layer("relu1", LeakyReLU(negative_slope=0.2))
    (row,) = _changes(before, editor.graph(Limits()), "swap", "/optimizations/0")
    assert (row.layer, row.action, row.reason) == ("relu1", "replace", "relu replaced with leaky_relu by swap")


def test_the_memory_of_a_job_counts_a_teacher() -> None:
    zeros = {"type": "prune", "sparsity": 0.5, "retrain": {"epochs": 1}}
    taught, untaught = (
        plan(optimizations=[zeros | {"retrain": {"epochs": 1} | more}]).memory for more in ({}, {"distillation": None})
    )
    assert taught.parameters == 2 * untaught.parameters
    assert taught.activations > untaught.activations
    none = plan(optimizations=[zeros | {"retrain": {"policy": "none"}}]).memory
    assert none == untaught


def test_gates_take_as_much_memory_as_gradients_do() -> None:
    def choices(scope: str) -> int:
        step = {"type": "prune", "budget": {"macs": 0.5}, "scope": scope, "retrain": {"policy": "none"}}
        return plan(model={"preset": "deep_cnn"}, optimizations=[step]).memory.choices

    assert choices("learned") > choices("sensitivity")
