"""What a plan says about 8 bits: which layers stay in float32, and when there is nothing to quantize."""

from __future__ import annotations

from typing import Any

import pytest

from app.compression.int8 import float_layers, integer_layers
from app.compression.norm_folding import folded_norms
from app.network.presets.registry import PRESETS
from app.planning.plan import Plan
from tests.support.jobs.specs import COLOUR, job, misplanned, plan, preset_graph, refused
from tests.support.networks.topologies import HEAD, conv, layer

INT8 = {"type": "quantize"}


def planned(*layers: dict[str, Any], **fields: Any) -> Plan:
    head = [*HEAD[:-1], layer("linear", out_features=10)]
    return plan(COLOUR, model={"layers": [*layers, *head]}, optimizations=[{**INT8, **fields}])


def said(found: Plan) -> dict[str, str]:
    return {row.layer: row.reason for row in found.layers if row.reason.startswith("stays in float32")}


def test_a_plan_names_each_layer_that_stays_in_float32_with_the_reason() -> None:
    layers = [conv(8), layer("batch_norm"), layer("relu"), layer("prelu"), layer("batch_norm"), conv(8)]
    found = planned(*layers, exclude=["conv2"])
    assert {name: reason.removeprefix("stays in float32: ") for name, reason in said(found).items()} == {
        "prelu1": "ONNX Runtime has no 8-bit kernel for it",
        "batch_norm2": "ONNX Runtime has no 8-bit kernel for it, and it cannot be folded into the layer before it",
        "conv2": "excluded",
    }
    assert {(row.action, row.exact, row.optimization) for row in found.layers if row.layer == "conv2"} == {
        ("keep", True, "/optimizations/0")
    }


def test_a_plan_warns_that_the_full_range_is_not_right_everywhere() -> None:
    assert planned(conv(8)).spec.optimizations[0].scheme == "int8_static"
    assert not planned(conv(8)).warnings
    (warning,) = planned(conv(8), scheme="int8_vnni").warnings
    assert (warning.pointer, warning.value) == ("/optimizations/0/scheme", "int8_vnni")
    assert "right only on processors with VNNI or AMX, and on ARM" in warning.message


def test_the_planned_cost_and_the_network_stay_and_the_phases_have_one_more() -> None:
    found = planned(conv(8))
    assert found.planned_cost == found.baseline_cost
    assert found.planned == found.baseline
    assert [phase.document() for phase in found.phases][-3:] == [
        {"phase": "evaluating", "optimization": "/optimizations/0"},
        {"phase": "measuring"},
        {"phase": "exporting"},
    ]


@pytest.mark.parametrize(
    ("fields", "pointer", "words"),
    [
        ({"exclude": ["conv9"]}, "/optimizations/0/exclude/0", "did you mean conv1?"),
        ({"exclude": ["conv1", "relu1"]}, "/optimizations/0/exclude/1", "only convolutions and linear layers are quantized"),
        ({"exclude": ["conv1", "linear1"]}, "/optimizations/0/exclude", "no layer can be computed in 8 bits: conv1 (excluded)"),
    ],
)  # fmt: skip
def test_a_wish_that_cannot_be_met_is_refused(fields: dict[str, Any], pointer: str, words: str) -> None:
    layers = [conv(8), layer("relu"), *HEAD[:-1], layer("linear", out_features=10)]
    faults = misplanned(COLOUR, model={"layers": layers}, optimizations=[{**INT8, **fields}])
    assert [(fault.pointer, words in fault.message) for fault in faults] == [(pointer, True)]


def test_a_network_of_layers_without_8_bit_kernels_is_refused_with_their_names() -> None:
    layers = [layer("conv_transpose", out_channels=10, kernel_size=3), *HEAD[:-1]]
    (fault,) = misplanned(COLOUR, model={"layers": layers}, optimizations=[INT8])
    assert fault.pointer == "/optimizations/0"
    assert "conv_transpose1 (ONNX Runtime has no 8-bit kernel for it)" in fault.message


@pytest.mark.parametrize(
    ("optimizations", "position", "words"),
    [
        ([INT8, {"type": "prune", "sparsity": 0.5}], 1, "put quantize last"),
        ([INT8, {"type": "batch_norm"}], 1, "put quantize last"),
        ([INT8, INT8], 1, "stands at /optimizations/0 too"),
    ],
)
def test_it_comes_last_and_once(optimizations: list[dict[str, Any]], position: int, words: str) -> None:
    faults = misplanned(optimizations=optimizations)
    assert faults
    assert {fault.pointer for fault in faults} == {f"/optimizations/{position}"}
    assert words in faults[0].message


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"scheme": "int4"}, "/optimizations/0/scheme"),
        ({"max_accuracy_drop": -0.1}, "/optimizations/0/max_accuracy_drop"),
        ({"max_accuracy_drop": 2}, "/optimizations/0/max_accuracy_drop"),
        ({"calibration_images": 0}, "/optimizations/0/calibration_images"),
        ({"bits": 4}, "/optimizations/0/bits"),
    ],
)
def test_malformed_wishes_are_refused_at_their_field(fields: dict[str, Any], pointer: str) -> None:
    document = job().document() | {"optimizations": [{**INT8, **fields}]}
    assert [fault.pointer for fault in refused(document)] == [pointer]


def test_it_may_be_asked_for_whatever_formats_the_float32_network_has() -> None:
    assert plan(exports=["safetensors"], optimizations=[INT8]).planned_cost.macs > 0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_layers_to_quantize_and_its_batch_norms_are_folded_or_named(name: str) -> None:
    graph = preset_graph(name, width=0.25 if name not in ("resnet50",) else 1.0)
    assert integer_layers(graph)
    folded = folded_norms(graph)
    left = float_layers(graph)
    for node in graph.nodes:
        if node.type == "batch_norm":
            assert (node.name in folded) != (node.name in left)


def test_layers_that_share_weights_are_quantized_or_left_together() -> None:
    layers = [conv(3, name="one"), layer("relu"), layer("conv", shares="one"), conv(4, name="other")]
    graph = planned(*layers).baseline
    assert [node.name for node in integer_layers(graph)] == ["one", "conv1", "other", "linear1"]
    assert [node.name for node in integer_layers(graph, ["one"])] == ["other", "linear1"]
    assert float_layers(graph, ["one"]) == {"one": "excluded", "conv1": "excluded"}
