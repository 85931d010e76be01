"""What a step of zeros will do, known before training: exact where no trained weight decides."""

from __future__ import annotations

import time
from typing import Any

import pytest

from app.planning.plan import Plan
from tests.support.jobs.specs import COLOUR, misplanned, plan

LAYERS = [
    {"type": "conv", "out_channels": 16, "kernel_size": 3, "padding": 1},
    {"type": "relu"},
    {"type": "conv", "out_channels": 24, "kernel_size": 3, "padding": 1, "groups": 4},
    {"type": "relu"},
    {"type": "conv", "out_channels": 24, "kernel_size": 3, "padding": 1, "groups": "depthwise"},
    {"type": "global_avg_pool"},
    {"type": "flatten"},
    {"type": "linear", "out_features": 20},
    {"type": "relu"},
    {"type": "linear", "out_features": 10},
]
SIZES = {"conv1": 16 * 3 * 9, "conv2": 24 * 4 * 9, "conv3": 24 * 9, "linear1": 480, "linear2": 200}


def planned(*steps: dict[str, Any]) -> Plan:
    return plan(COLOUR, model={"layers": LAYERS}, optimizations=[{"type": "prune", **step} for step in steps])


def rows(found: Plan, step: int = 0) -> dict[str, tuple[str, int | None, int | None, bool]]:
    return {
        row.layer: (row.action, row.before, row.after, row.exact)
        for row in found.layers
        if row.optimization == f"/optimizations/{step}"
    }


def reasons(found: Plan) -> dict[str, str]:
    return {row.layer: row.reason for row in found.layers}


def test_a_pattern_is_exact_in_each_layer_that_it_fits_and_the_others_are_listed_with_the_reason() -> None:
    found = planned({"pattern": "2:4"})
    assert rows(found) == {
        "conv1": ("keep", 432, 432, True),
        "conv2": ("mask", 864, 432, True),
        "conv3": ("keep", 216, 216, True),
        "linear1": ("mask", 480, 240, True),
        "linear2": ("mask", 200, 100, True),
    }
    assert reasons(found)["conv1"] == "2:4 on 3 input channels"
    assert reasons(found)["conv3"] == "2:4 on 1 input channel of each group"
    assert found.planned_cost.nonzero_params == found.planned_cost.params - 432 - 240 - 100


def test_patterns_of_their_own_count_and_excluded_layers_stay() -> None:
    found = planned({"pattern": "1:4", "overrides": {"conv1": {"pattern": "2:3"}}, "exclude": ["linear2"]})
    assert rows(found)["conv1"] == ("mask", 432, 288, True)
    assert rows(found)["conv2"] == ("mask", 864, 216, True)
    assert rows(found)["linear2"] == ("keep", 200, 200, True)


def test_zeros_from_before_make_a_pattern_an_estimate_and_never_come_back() -> None:
    found = planned({"sparsity": 0.8, "scope": "layer"}, {"pattern": "2:4"})
    assert rows(found, 1)["conv2"] == ("mask", 173, 173, False)


def test_a_pattern_twice_is_the_pattern_once() -> None:
    twice = planned({"pattern": "2:4"}, {"pattern": "2:4"})
    assert twice.planned_cost == planned({"pattern": "2:4"}).planned_cost


def test_blocks_of_one_size_are_exact_in_each_layer_and_ragged_ones_an_estimate() -> None:
    found = planned({"sparsity": 0.5, "block": [4, 5], "scope": "layer"})
    assert rows(found)["conv1"] == ("mask", 432, 216, True)  # 4 blocks of 4 x 3 x 9
    assert rows(found)["conv2"] == ("mask", 864, 432, False)  # groups of 6 outputs: 4 + 2
    assert rows(found)["linear1"] == ("mask", 480, 240, False)  # 24 inputs: 4 x 5 + 4
    assert rows(found)["linear2"] == ("mask", 200, 100, False)  # 10 outputs: 4 + 4 + 2
    uneven = planned({"sparsity": 0.4, "block": [8, 4], "scope": "layer"})
    assert rows(uneven)["conv1"] == ("mask", 432, 216, True)  # one of two: 173 of 432 are nearer to 216 than to 0
    assert "1 of 2 blocks" in reasons(uneven)["conv1"]


def test_a_global_ranking_of_blocks_and_lamp_are_estimates_that_add_up() -> None:
    for step in ({"sparsity": 0.75, "block": [4, 4]}, {"sparsity": 0.75, "criterion": "lamp"}):
        found = planned(step)
        assert not any(row.exact for row in found.layers if row.action == "mask")
        zeros = found.planned_cost.params - found.planned_cost.nonzero_params
        assert zeros == round(0.75 * sum(SIZES.values()))


def test_shares_by_erk_are_exact_and_add_up() -> None:
    found = planned({"sparsity": 0.75, "criterion": "erk"})
    kept = {layer: row[2] or 0 for layer, row in rows(found).items()}
    assert all(row[3] for row in rows(found).values())
    assert sum(kept.values()) == sum(SIZES.values()) - round(0.75 * sum(SIZES.values()))
    densities = {layer: kept[layer] / SIZES[layer] for layer in SIZES}
    assert densities["linear2"] > densities["linear1"]
    assert all(0 < density <= 1 for density in densities.values())


def test_shares_by_erk_leave_layers_with_an_amount_of_their_own_out() -> None:
    found = planned(
        {"sparsity": 0.75, "criterion": "erk", "exclude": ["conv1"], "overrides": {"conv2": {"sparsity": 0.5}}}
    )
    assert rows(found)["conv2"] == ("mask", 864, 432, True)
    rest = [rows(found)[name][2] or 0 for name in ("conv3", "linear1", "linear2")]
    assert sum(rest) == 896 - round(0.75 * 896)


def test_behind_widths_that_are_estimates_zeros_are_estimates_too() -> None:
    channels = {"budget": {"macs": 0.5}, "round_to": 4, "scope": "layer"}
    sure = planned(channels, {"pattern": "2:4"})
    assert rows(sure, 1)["linear2"][3]
    unsure = planned(channels | {"scope": "global"}, {"pattern": "2:4"})
    assert not rows(unsure, 1)["linear2"][3]
    wide = planned(channels | {"scope": "global"}, {"sparsity": 0.5, "criterion": "erk", "overrides": {}})
    assert not any(row[3] for row in rows(wide, 1).values())


def faults_of(**step: Any) -> list[tuple[str, str]]:
    found = misplanned(COLOUR, model={"layers": LAYERS}, optimizations=[{"type": "prune", **step}])
    return [(fault.pointer, fault.message) for fault in found]


@pytest.mark.parametrize(
    ("step", "pointer", "words"),
    [
        ({"pattern": "7:63"}, "/pattern", "no layer can be pruned: conv1 (7:63 on 3 input channels), conv2"),
        ({"sparsity": 0.5, "block": [999, 999], "exclude": ["conv2", "conv3"]}, "/block", "one block of 999 x 999"),
        ({"pattern": "2:4", "exclude": list(SIZES)}, "/exclude", "every layer with weights is excluded"),
        (
            {"pattern": "2:4", "overrides": {"conv1": {"pattern": "1:4"}}},
            "/overrides/conv1/pattern",
            "1:4 on 3 input channels",
        ),
        ({"pattern": "2:4", "overrides": {"conv2": {"sparsity": 0.5}}}, "/overrides/conv2/sparsity", "structure n:m"),
        ({"pattern": "2:4", "overrides": {"conv2": {"threshold": 1}}}, "/overrides/conv2/threshold", "structure n:m"),
        (
            {"sparsity": 0.5, "block": [2, 2], "overrides": {"conv2": {"threshold": 1}}},
            "/overrides/conv2/threshold",
            "structure blocks",
        ),
        ({"sparsity": 0.5, "overrides": {"conv2": {"pattern": "1:4"}}}, "/overrides/conv2/pattern", "weights"),
        ({"budget": {"macs": 0.5}, "overrides": {"conv2": {"pattern": "1:4"}}}, "/overrides/conv2/pattern", "channels"),
    ],
)
def test_what_fits_no_layer_or_means_nothing_is_refused(step: dict[str, Any], pointer: str, words: str) -> None:
    ((found, message),) = faults_of(**step)
    assert found == f"/optimizations/0{pointer}"
    assert words in message


def test_the_size_of_the_network_costs_the_dry_run_nothing() -> None:
    layers = [{"type": "flatten"}, {"type": "linear", "out_features": 20_000}, {"type": "linear", "out_features": 10}]
    step = {"type": "prune", "sparsity": 0.5, "block": [1, 1], "scope": "layer"}
    start = time.perf_counter()
    found = plan(COLOUR, model={"layers": layers}, training={"batch_size": 2}, optimizations=[step])
    assert rows(found)["linear1"] == ("mask", 61_440_000, 30_720_000, True)
    assert time.perf_counter() - start < 2


def test_a_step_that_sets_nothing_to_zero_is_warned_of() -> None:
    found = planned({"sparsity": 0.1, "block": [8, 8], "scope": "layer", "exclude": list(SIZES)[1:]})
    assert any("removes nothing" in warning.message for warning in found.warnings)
    assert not any("removes nothing" in warning.message for warning in planned({"pattern": "2:4"}).warnings)
