"""What pruning will do, known before training: widths, zeros, floors, and what holds a network up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from app.network.cost import cost
from app.planning.plan import Plan
from app.pruning.budget import choose_block, choose_removals, choose_removals_in_blocks
from app.pruning.channel_classes import channel_classes, shrink_graph
from app.spec.prune import Prune
from tests.support.jobs.specs import COLOUR, GREY, misplanned, plan, preset_graph


def pruned(preset: str = "simple_cnn", **fields: Any) -> Plan:
    facts = GREY if preset == "simple_cnn" else COLOUR
    return plan(facts, model={"preset": preset}, optimizations=[{"type": "prune", **fields}])


def rows(planned: Plan) -> dict[str, tuple[str, int | None, int | None, bool]]:
    return {row.layer: (row.action, row.before, row.after, row.exact) for row in planned.layers}


def test_channels_land_on_the_budget_and_rows_say_how() -> None:
    planned = pruned(budget={"macs": 0.5}, scope="layer")
    assert rows(planned) == {
        "conv1": ("narrow", 32, 24, True),
        "conv2": ("narrow", 64, 40, True),
        "linear1": ("follow", 3136, 1960, True),
        "linear2": ("keep", 10, 10, True),
    }
    assert planned.planned_cost == cost(planned.planned)
    assert planned.planned_cost.macs <= planned.baseline_cost.macs // 2
    assert planned.floor is not None
    assert planned.floor.macs < planned.planned_cost.macs


@pytest.mark.parametrize("preset", ["simple_cnn", "deep_cnn", "resnet20", "vgg11"])
@pytest.mark.parametrize("amount", [{"budget": {"macs": 0.4}}, {"budget": {"params": 0.3}}, {"sparsity": 0.5}])
def test_the_plan_of_scope_layer_is_what_any_scores_give(preset: str, amount: dict[str, Any]) -> None:
    planned = pruned(preset, structure="channels", **amount)
    step = planned.spec.optimizations[0]
    assert isinstance(step, Prune)
    classes = channel_classes(planned.baseline)
    draw = random.Random(3)
    scores = {int(c): draw.random() for c in classes.all()}
    block, _ = choose_block(planned.baseline, classes, step)
    removals = choose_removals(planned.baseline, classes, scores, step, block=block)
    assert removals.cost == planned.planned_cost
    shrunk = shrink_graph(planned.baseline, removals.dropped, classes)
    assert [node.shape for node in shrunk.nodes] == [node.shape for node in planned.planned.nodes]


def chain(*widths: int) -> dict[str, Any]:
    layers: list[dict[str, Any]] = [
        {"type": "conv", "out_channels": width, "kernel_size": 3, "padding": 1} for width in widths
    ]
    ends = [{"type": "global_avg_pool"}, {"type": "flatten"}, {"type": "linear", "out_features": 10}]
    return {"layers": [*layers, *ends], "input_shape": [3, 32, 32]}


@pytest.mark.parametrize(
    ("model", "budget", "steps"),
    [
        ({"preset": "deep_cnn"}, {"macs": 0.3}, 3),
        ({"preset": "resnet20"}, {"macs": 0.3}, 3),
        (chain(64, 12, 64), {"macs": 0.5}, 4),  # blocks are halved in some of the rounds
        (chain(16, 8), {"params": 0.3}, 3),
    ],
)
def test_rounds_are_gone_through_as_the_worker_does(
    model: dict[str, Any], budget: dict[str, float], steps: int
) -> None:
    asked = {"type": "prune", "budget": budget, "scope": "layer", "schedule": {"name": "iterative", "steps": steps}}
    planned = plan(COLOUR, model=model, optimizations=[asked])
    step = planned.spec.optimizations[0]
    assert isinstance(step, Prune)
    start = graph = planned.baseline
    draw = random.Random(5)
    for number in range(1, steps + 1):
        classes = channel_classes(graph)
        scores = {int(c): draw.random() for c in classes.all()}
        removals = choose_removals_in_blocks(
            graph, classes, scores, step, start=start, baseline=cost(start), fraction=number / steps
        )
        graph = shrink_graph(graph, removals.dropped, classes)
    assert [node.shape for node in graph.nodes] == [node.shape for node in planned.planned.nodes]
    assert all(row.exact for row in planned.layers)


def test_rankings_over_all_groups_and_many_rounds_are_estimates() -> None:
    assert not rows(pruned(budget={"macs": 0.5}))["conv1"][3]
    assert not rows(pruned(budget={"macs": 0.5}, scope="global"))["conv1"][3]
    learned, shares = (pruned(budget={"macs": 0.5}, scope=scope) for scope in ("learned", "sensitivity"))
    assert not rows(learned)["conv1"][3]
    assert learned.planned_cost == shares.planned_cost
    many = pruned(budget={"macs": 0.5}, scope="layer", schedule={"name": "iterative", "steps": 500})
    assert not rows(many)["conv1"][3]
    assert many.planned_cost.macs <= many.baseline_cost.macs // 2


def test_a_second_step_goes_on_where_the_first_ended_and_fractions_mean_the_baseline() -> None:
    first, second = {"type": "prune", "budget": {"macs": 0.7}}, {"type": "prune", "budget": {"macs": 0.4}}
    planned = plan(COLOUR, model={"preset": "deep_cnn"}, optimizations=[first, second])
    whole = planned.baseline_cost.macs
    assert 0.3 * whole < planned.planned_cost.macs <= 0.4 * whole
    assert {row.optimization for row in planned.layers} == {"/optimizations/0", "/optimizations/1"}


def test_zeros_of_each_layer_are_exact_and_of_all_layers_in_sum() -> None:
    each = pruned(sparsity=0.8, scope="layer")
    assert rows(each)["conv2"] == ("mask", 18_432, 18_432 - round(0.8 * 18_432), True)
    together = pruned(sparsity=0.8)
    weights = 288 + 18_432 + 401_408 + 1_280
    assert together.planned_cost.nonzero_params == together.planned_cost.params - round(0.8 * weights)
    assert together.planned_cost.macs == together.baseline_cost.macs
    assert not rows(together)["conv2"][3]


def test_excluded_and_overridden_layers_count_on_their_own() -> None:
    planned = pruned(
        sparsity=0.8,
        scope="layer",
        exclude=["conv1"],
        overrides={"linear2": {"sparsity": 0.5}, "conv2": {"threshold": 0.1}},
    )
    assert rows(planned) == {
        "conv1": ("keep", 288, 288, True),
        "conv2": ("mask", 18_432, None, False),
        "linear1": ("mask", 401_408, 401_408 - round(0.8 * 401_408), True),
        "linear2": ("mask", 1_280, 640, True),
    }


def test_zeros_stay_when_pruned_twice() -> None:
    steps = [{"type": "prune", "sparsity": s, "scope": "layer"} for s in (0.8, 0.5)]
    planned = plan(optimizations=steps)
    assert planned.planned_cost.nonzero_params == pruned(sparsity=0.8, scope="layer").planned_cost.nonzero_params


def test_a_threshold_depends_on_the_trained_weights() -> None:
    planned = pruned(threshold=0.1)
    assert {row.after for row in planned.layers} == {None}
    assert planned.planned_cost == planned.baseline_cost


@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
def test_a_budget_out_of_reach_names_the_lowest_that_is_not(measure: str) -> None:
    (fault,) = misplanned(optimizations=[{"type": "prune", "budget": {measure: 0.001}}])
    assert fault.pointer == f"/optimizations/0/budget/{measure}"
    assert fault.value == 0.001
    assert f"the lowest reachable is {fault.limit}" in fault.message
    assert not misplanned(optimizations=[{"type": "prune", "budget": {measure: fault.limit}}])

    (absolute,) = misplanned(optimizations=[{"type": "prune", "budget": {measure: 1000}}])
    assert isinstance(absolute.limit, int)
    assert not misplanned(optimizations=[{"type": "prune", "budget": {measure: absolute.limit}}])
    assert misplanned(optimizations=[{"type": "prune", "budget": {measure: absolute.limit - 1}}])


ZEROS = {"sparsity": 0.5}
HALF = {"budget": {"macs": 0.5}}
NAMED: list[tuple[dict[str, Any], str, str]] = [
    ({"sparsity": 0.5, "exclude": ["conv1", "conv3"]}, "/exclude/1", "did you mean conv"),
    ({"sparsity": 0.5, "exclude": ["zebra"]}, "/exclude/0", "layers are: conv1, conv2, linear1, linear2"),
    ({"sparsity": 0.5, "exclude": ["relu1"]}, "/exclude/0", "is a relu layer"),
    ({"sparsity": 0.5, "exclude": ["conv1", "conv2", "linear1", "linear2"]}, "/exclude", "every layer"),
    ({"budget": {"macs": 0.9}, "exclude": ["conv1", "conv2", "linear1"]}, "/budget/macs", "excluded"),
    ({"sparsity": 0.5, "structure": "channels", "exclude": ["conv1", "conv2", "linear1"]}, "", "excluded"),
    ({"sparsity": 0.5, "overrides": {"a/b": {"sparsity": 0.1}}}, "/overrides/a~1b", "is not the name of a layer"),
    ({"sparsity": 0.5, "overrides": {"conv1": {"round_to": 4}}}, "/overrides/conv1/round_to", "structure weights"),
    ({**HALF, "overrides": {"conv1": {"threshold": 4}}}, "/overrides/conv1/threshold", "structure channels"),
    ({**HALF, "overrides": {"linear2": {"sparsity": 0.5}}}, "/overrides/linear2", "gives the logits"),
    ({**ZEROS, "exclude": ["conv1"], "overrides": {"conv1": {"sparsity": 0.1}}}, "/overrides/conv1", "excluded"),
    ({"sparsity": 0.95, "structure": "channels"}, "/sparsity", "max_sparsity 0.9"),
    ({**HALF, "overrides": {"conv1": {"sparsity": 0.95}}}, "/overrides/conv1/sparsity", "max_sparsity 0.9"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "pointer", "words"), NAMED)
def test_names_and_amounts_that_cannot_be_meant_are_refused(fields: dict[str, Any], pointer: str, words: str) -> None:
    (fault,) = misplanned(optimizations=[{"type": "prune", **fields}])
    assert fault.pointer == f"/optimizations/0{pointer}"
    assert words in fault.message


def test_excluding_every_convolution_leaves_the_reason_in_the_rows() -> None:
    planned = pruned(budget={"params": 0.9}, exclude=["conv1"])
    assert next(row.reason for row in planned.layers if row.layer == "conv1") == "excluded"


def test_names_of_a_rewritten_network_may_be_excluded() -> None:
    steps = [{"type": "deeper"}, {"type": "prune", "budget": {"macs": 0.6}, "exclude": ["conv1_deep1"]}]
    planned = plan(optimizations=steps)
    assert planned.planned["conv1_deep1"].shape == preset_graph("simple_cnn")["conv1"].shape


def test_choosing_among_too_many_channels_is_refused() -> None:
    block = [{"type": "conv", "out_channels": 512, "kernel_size": 1}, {"type": "relu"}]
    layers = [{"type": "repeat", "times": 400, "layers": block}, {"type": "global_avg_pool"}, {"type": "flatten"}]
    layers += [{"type": "linear", "out_features": 10}]
    step = {"type": "prune", "budget": {"macs": 0.9}}
    spec = {"model": {"layers": layers}, "training": {"batch_size": 2}, "optimizations": [step, step, step, step]}
    (fault,) = misplanned(**spec)
    assert fault.pointer == "/optimizations/3"
    assert fault.limit == 1_500_000


def test_a_latency_is_planned_as_macs_and_the_plan_says_so() -> None:
    found = plan(optimizations=[{"type": "prune", "budget": {"latency_ms": 0.5}}])
    assert 0 < found.planned_cost.macs <= 0.5 * found.baseline_cost.macs
    assert any("measured on the worker" in warning.message for warning in found.warnings)
    assert not any(row.exact for row in found.layers if row.action == "narrow")
    (step,) = found.spec.optimizations
    assert isinstance(step, Prune)
    assert step.round_to is None


def test_milliseconds_cannot_be_planned_and_leave_the_network_as_it_is() -> None:
    found = plan(optimizations=[{"type": "prune", "budget": {"latency_ms": 0.5, "absolute": True}}])
    assert found.planned_cost == found.baseline_cost
    said = [warning.message for warning in found.warnings]
    assert any("the plan shows the network before it" in sentence for sentence in said)
    assert not any("removes nothing" in sentence for sentence in said)


def test_a_latency_below_what_widths_can_bring_is_planned_as_the_smallest_network_with_a_warning() -> None:
    found = plan(optimizations=[{"type": "prune", "budget": {"latency_ms": 1e-6}}])
    assert found.planned_cost == found.floor
    assert any("the budget may be missed" in warning.message for warning in found.warnings)


def test_a_latency_without_a_channel_to_remove_is_refused() -> None:
    step = {"type": "prune", "budget": {"latency_ms": 0.5}, "exclude": ["conv1", "conv2", "linear1"]}
    (fault,) = misplanned(optimizations=[step])
    assert fault.pointer.startswith("/optimizations/0")
    assert "no channel may be removed" in fault.message


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("scope", ["layer", "sensitivity", "global"])
def test_a_stage_that_rounds_an_overrides_part_does_not_fail_a_budget_that_the_last_one_meets(
    steps: int, scope: str
) -> None:
    layers = [
        {"type": "conv", "out_channels": 16, "kernel_size": 3, "name": "a"},
        {"type": "conv", "out_channels": 16, "kernel_size": 3, "name": "b"},
        {"type": "global_avg_pool"},
        {"type": "flatten"},
        {"type": "linear", "out_features": 10},
    ]
    step = {
        "type": "prune",
        "structure": "channels",
        "budget": {"macs": 0.51},
        "exclude": ["b"],
        "round_to": 4,
        "scope": scope,
        "overrides": {"a": {"sparsity": 0.5}},
        "schedule": {"name": "iterative", "steps": steps},
    }
    made = plan(COLOUR, model={"layers": layers, "input_shape": [3, 32, 32]}, optimizations=[step])
    assert made.planned_cost.macs <= 0.51 * made.baseline_cost.macs
