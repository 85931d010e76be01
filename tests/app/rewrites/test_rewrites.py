"""Rewrites: what each inserts or replaces, what it leaves alone, and that every network stays a network."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from app.errors import InvalidSpec
from app.network.cost import cost
from app.network.graph import Graph
from app.network.node import Limits
from app.rewrites.rewrites import rewrite
from app.spec.optimizations import (
    Deeper,
    InsertBatchNorm,
    InsertDropout,
    InsertShortcuts,
    InsertSpatialDropout,
    Rewrite,
    SmallKernels,
)
from tests.support.jobs.specs import graph_of, preset_graph
from tests.support.networks.dags import random_graph
from tests.support.networks.topologies import TOPOLOGIES

ALL: list[Rewrite] = [part.model_validate(example) for part in get_args(Rewrite) for example in part.examples]
HEAD: list[dict[str, Any]] = [{"type": "flatten"}, {"type": "linear", "out_features": 3}]


def conv(channels: int, kernel: Any = 3, **fields: Any) -> dict[str, Any]:
    return {"type": "conv", "out_channels": channels, "kernel_size": kernel, "padding": "same", **fields}


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def inputs(graph: Graph, name: str) -> tuple[str, ...]:
    return graph[name].inputs


@pytest.mark.parametrize("optimization", ALL, ids=lambda o: o.type)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_rewrite_of_every_topology_is_a_network_with_the_old_names(topology: str, optimization: Rewrite) -> None:
    shape, layers = TOPOLOGIES[topology]
    graph = graph_of(layers, shape)
    after = rewrite(graph, optimization)
    assert after[after.output].shape == graph[graph.output].shape
    assert after.output == graph.output
    kept = [name for name in names(after) if name in graph]
    assert kept == names(graph)
    assert all(after[name].type == graph[name].type for name in kept)
    assert all(after[name].shape == graph[name].shape for name in kept)
    again = graph_of(after.to_layers(), shape)
    assert again == after


@pytest.mark.parametrize("seed", range(40))
def test_every_rewrite_of_a_random_network_is_a_network(seed: int) -> None:
    graph = random_graph(seed)
    for optimization in ALL:
        after = rewrite(graph, optimization)
        assert after[after.output].shape == graph[graph.output].shape
        assert [name for name in names(after) if name in graph] == names(graph)
        if after is not graph:
            assert after != graph


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rewrites_can_follow_one_another(topology: str) -> None:
    shape, layers = TOPOLOGIES[topology]
    graph = graph_of(layers, shape)
    for optimization in ALL:
        graph = rewrite(graph, optimization)
    assert len(set(names(graph))) == len(graph.nodes)


def test_batch_norm_stands_between_convolution_and_activation_and_takes_the_bias() -> None:
    graph = rewrite(preset_graph("simple_cnn"), InsertBatchNorm())
    assert names(graph)[:4] == ["conv1", "conv1_bn", "relu1", "max_pool1"]
    assert inputs(graph, "relu1") == ("conv1_bn",)
    assert graph["conv1"].layer.bias is False  # type: ignore[attr-defined]
    assert graph["linear1"].layer.bias is True  # type: ignore[attr-defined]


def test_batch_norm_leaves_normalised_convolutions_and_the_last_layer_alone() -> None:
    for name in ("deep_cnn", "resnet20", "vgg11", "audio_cnn", "video_cnn"):
        graph = preset_graph(name)
        assert rewrite(graph, InsertBatchNorm()) is graph
    convolutional = graph_of(
        [conv(4), {"type": "relu"}, conv(3, 1), {"type": "global_avg_pool"}, {"type": "flatten"}], (1, 6, 6)
    )
    after = rewrite(convolutional, InsertBatchNorm())
    assert [name for name in names(after) if name not in convolutional] == ["conv1_bn"]


def test_batch_norm_is_read_by_all_that_read_the_convolution() -> None:
    layers = [conv(4, name="a"), {"type": "relu", "name": "b"}, {"type": "add", "inputs": ["a", "b"]}, *HEAD]
    after = rewrite(graph_of(layers, (1, 4, 4)), InsertBatchNorm())
    assert inputs(after, "b") == ("a_bn",)
    assert inputs(after, "add1") == ("a_bn", "b")


def test_spatial_dropout_stands_after_the_activation() -> None:
    graph = rewrite(preset_graph("deep_cnn"), InsertSpatialDropout(p=0.1))
    assert inputs(graph, "conv1_dropout") == ("relu1",)
    assert inputs(graph, "max_pool1") == ("conv1_dropout",)
    assert graph["conv1_dropout"].layer.p == 0.1  # type: ignore[attr-defined]
    assert rewrite(graph, InsertSpatialDropout(p=0.1)) is graph


def test_dropout_stands_before_linear_layers_and_never_after_the_last() -> None:
    graph = rewrite(preset_graph("simple_cnn"), InsertDropout(p=0.3))
    assert inputs(graph, "linear1") == ("linear1_dropout",)
    assert inputs(graph, "linear2_dropout") == ("relu3",)
    assert graph.output == "linear2"
    assert rewrite(graph, InsertDropout(p=0.3)) is graph


def test_dropout_touches_only_the_linear_layers_own_input() -> None:
    layers: list[dict[str, Any]] = [
        {"type": "flatten", "name": "flat"},
        {"type": "linear", "out_features": 4, "name": "a", "inputs": ["flat"]},
        {"type": "linear", "out_features": 4, "name": "b", "inputs": ["flat"]},
        {"type": "add", "inputs": ["a", "b"], "name": "sum"},
    ]
    after = rewrite(graph_of(layers, (1, 2, 2)), InsertDropout(layers=("a",)))
    assert inputs(after, "a") == ("a_dropout",)
    assert inputs(after, "b") == ("flat",)


def test_small_kernels_keep_the_name_width_and_stride_at_the_last_of_the_stack() -> None:
    layers = [
        {**conv(8, 7), "padding": 3, "stride": 2, "name": "stem", "in_channels": 3},
        {"type": "batch_norm"},
        {"type": "relu"},
        *HEAD,
    ]
    after = rewrite(graph_of(layers, (3, 16, 16)), SmallKernels())
    assert names(after)[:7] == [
        "stem_k1",
        "stem_k1_bn",
        "stem_k1_relu",
        "stem_k2",
        "stem_k2_bn",
        "stem_k2_relu",
        "stem",
    ]
    assert [after[name].shape for name in ("stem_k1", "stem_k2", "stem")] == [(8, 16, 16), (8, 16, 16), (8, 8, 8)]
    assert inputs(after, "stem") == ("stem_k2_relu",)


def test_small_kernels_in_three_dimensions_and_depthwise() -> None:
    layers = [conv(4, 1), conv(8, [5, 1, 3], groups="depthwise", name="d"), {"type": "silu"}, *HEAD]
    after = rewrite(graph_of(layers, (1, 6, 6, 6)), SmallKernels())
    assert [after[name].shape[0] for name in ("d_k1", "d")] == [4, 8]
    assert after["d_k1"].layer.kernel_size == (3, 1, 3)  # type: ignore[attr-defined]
    assert after["d"].layer.kernel_size == (3, 1, 1)  # type: ignore[attr-defined]


def test_deeper_adds_blocks_after_the_last_of_each_stage() -> None:
    after = rewrite(preset_graph("vgg16", (3, 32, 32)), Deeper(times=2))
    added = [node.name for node in after.nodes if node.name not in preset_graph("vgg16", (3, 32, 32))]
    assert [name for name in added if name.endswith(("deep1", "deep2"))] == [
        f"conv{number}_deep{copy}" for number in (2, 4, 7, 10, 13) for copy in (1, 2)
    ]
    assert inputs(after, "max_pool1") == ("conv2_deep2_relu",)
    assert after["conv2_deep1"].layer.bias is False  # type: ignore[attr-defined]
    assert inputs(after, "conv2_deep1_relu") == ("conv2_deep1_bn",)


def test_deeper_has_biases_where_there_is_no_batch_norm() -> None:
    after = rewrite(preset_graph("simple_cnn"), Deeper())
    assert after["conv1_deep1"].layer.bias is True  # type: ignore[attr-defined]
    assert inputs(after, "max_pool1") == ("conv1_deep1_relu",)


def test_residual_lays_shortcuts_with_and_without_projection() -> None:
    layers = [
        conv(4),
        {"type": "relu"},
        conv(4),
        {"type": "relu"},
        conv(4),
        {"type": "relu"},
        conv(4),
        {"type": "relu"},
        *HEAD,
    ]
    after = rewrite(graph_of(layers, (1, 8, 8)), InsertShortcuts())
    assert inputs(after, "conv2_add") == ("conv2", "conv1_shortcut_bn")
    assert inputs(after, "relu2") == ("conv2_add",)
    assert inputs(after, "conv4_add") == ("conv4", "relu2")
    assert "conv3_shortcut" not in after


def test_residual_takes_a_third_block_along_rather_than_leave_it_alone() -> None:
    layers = [conv(1), {"type": "relu"}] * 3 + HEAD
    after = rewrite(graph_of(layers, (1, 8, 8)), InsertShortcuts())
    assert [name for name in names(after) if "add" in name] == ["conv3_add"]
    assert inputs(after, "conv3_add") == ("conv3", "input")


def test_residual_follows_strides_and_gives_up_where_sizes_do_not_follow() -> None:
    strided = [{**conv(4), "padding": 1, "stride": 2}, {"type": "relu"}, conv(4), {"type": "relu"}, *HEAD]
    after = rewrite(graph_of(strided, (1, 9, 8)), InsertShortcuts())
    assert after["conv1_shortcut"].shape == (4, 5, 4)
    unpadded = graph_of([{**conv(4), "padding": 0}, {"type": "relu"}, *HEAD], (1, 9, 8))
    assert rewrite(unpadded, InsertShortcuts()) is unpadded


def test_residual_leaves_branches_that_have_a_shortcut_alone() -> None:
    graph = preset_graph("resnet20")
    after = rewrite(graph, InsertShortcuts())
    assert [name for name in names(after) if name not in graph] == ["conv1_shortcut", "conv1_shortcut_bn", "conv1_add"]


def test_layers_narrow_a_rewrite() -> None:
    graph = preset_graph("simple_cnn")
    for optimization in (
        InsertBatchNorm(layers=("conv2",)),
        Deeper(layers=("conv2",)),
        InsertShortcuts(layers=("conv2",)),
    ):
        added = [name for name in names(rewrite(graph, optimization)) if name not in graph]
        assert added
        assert all(name.startswith("conv2") for name in added)


@pytest.mark.parametrize(
    ("optimization", "reason"),
    [
        (InsertBatchNorm(layers=("conv1", "conv9")), "is not the name of a layer"),
        (InsertBatchNorm(layers=("conv1", "linear1")), "not a convolution"),
        (InsertBatchNorm(layers=("conv1", "linear2")), "gives the logits"),
        (InsertDropout(layers=("linear1", "conv1")), "not linear"),
        (SmallKernels(layers=("conv1", "conv2")), "no kernel of 4 or more"),
        (InsertSpatialDropout(layers=("conv1", "relu1")), "not a convolution"),
        (Deeper(layers=("conv1", "linear2")), "not a convolution"),
        (InsertShortcuts(layers=("conv1", "relu1")), "not a convolution"),
    ],
)
def test_a_named_layer_that_cannot_be_meant_is_a_fault_with_the_reason(optimization: Rewrite, reason: str) -> None:
    graph = (
        preset_graph("simple_cnn")
        if optimization.type != "small_kernels"
        else graph_of([conv(4, 5), conv(4), *HEAD], (1, 8, 8))
    )
    with pytest.raises(InvalidSpec) as caught:
        rewrite(graph, optimization, pointer="/optimizations/3")
    (fault,) = caught.value.faults
    assert fault.pointer == "/optimizations/3/layers/1"
    assert reason in fault.message


def test_new_names_make_way_for_old_ones() -> None:
    layers = [conv(4, name="a"), {"type": "relu", "name": "a_bn"}, *HEAD]
    after = rewrite(graph_of(layers, (1, 4, 4)), InsertBatchNorm())
    assert names(after)[:3] == ["a", "a_bn2", "a_bn"]


def test_names_stay_within_their_length() -> None:
    layers = [conv(4, name="a" * 200), {"type": "relu"}, *HEAD]
    after = rewrite(graph_of(layers, (1, 4, 4)), Deeper(times=3))
    assert max(len(name) for name in names(after)) <= 200
    assert len(set(names(after))) == len(after.nodes)


def test_a_rewrite_beyond_the_limits_is_a_fault_of_the_rewrite() -> None:
    graph = preset_graph("vgg16", (3, 32, 32))
    with pytest.raises(InvalidSpec) as caught:
        rewrite(graph, Deeper(times=32), limits=Limits(params=cost(graph).params))
    assert {fault.pointer for fault in caught.value.faults} == {"/optimizations/0"}


def test_of_many_unknown_layers_a_hundred_are_answered() -> None:
    with pytest.raises(InvalidSpec) as caught:
        rewrite(
            preset_graph("simple_cnn"), InsertBatchNorm(layers=tuple(f"unknown{number}" for number in range(9_000)))
        )
    assert len(caught.value.faults) == 100
