"""Layers as they are sent become a graph: names, references, containers, shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from app.errors import InvalidSpec
from app.network.graph import Graph, build_graph
from app.network.layers.convolutions import Conv, ConvTranspose
from app.network.layers.pooling import MaxPool
from app.network.layers.registry import read_layers
from app.network.layers.shapes import LayerFault
from tests.support.networks.layer_samples import LayerList, conv, layer

PICTURE = (3, 16, 16)
HEAD = [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=10)]


def graph_of(layers: LayerList, shape: tuple[int, ...] = PICTURE, **more: Any) -> Graph:
    return build_graph(read_layers(layers), shape, **more)


def wires(graph: Graph) -> list[tuple[str, tuple[str, ...]]]:
    return [(node.name, node.inputs) for node in graph.nodes]


def test_a_chain_is_named_per_type_and_each_layer_takes_the_one_before() -> None:
    graph = graph_of([conv(4), layer("relu"), conv(4, name="mid"), layer("relu"), conv(4), *HEAD], classes=10)
    assert wires(graph)[:5] == [
        ("conv1", ("input",)),
        ("relu1", ("conv1",)),
        ("mid", ("relu1",)),
        ("relu2", ("mid",)),
        ("conv2", ("relu2",)),
    ]
    assert graph.output == "linear1"
    assert graph["mid"].shape == (4, 16, 16)
    assert graph["mid"].pointer == "/model/layers/2"


def test_consumers_are_in_order_and_once() -> None:
    graph = graph_of(
        [conv(4), layer("relu"), layer("add", inputs=["relu1", "relu1"]), layer("concat", inputs=["conv1", "add1"])]
    )
    assert [node.name for node in graph.consumers("relu1")] == ["add1"]
    assert [node.name for node in graph.consumers("conv1")] == ["relu1", "concat1"]
    assert [node.name for node in graph.consumers("input")] == ["conv1"]
    assert graph.consumers("concat1") == ()
    assert "relu1" in graph
    assert "relu2" not in graph


def test_inside_containers_names_carry_the_containers_and_count_anew() -> None:
    block = [conv(4), layer("relu"), layer("residual", name="inner", layers=[conv(4, name="x")])]
    graph = graph_of([conv(4), layer("repeat", times=2, layers=block), layer("residual", layers=[conv(4), conv(4)])])
    assert [node.name for node in graph.nodes] == [
        "conv1",
        "repeat1_1_conv1",
        "repeat1_1_relu1",
        "repeat1_1_inner_x",
        "repeat1_1_inner_add1",
        "repeat1_2_conv1",
        "repeat1_2_relu1",
        "repeat1_2_inner_x",
        "repeat1_2_inner_add1",
        "residual1_conv1",
        "residual1_conv2",
        "residual1_add1",
    ]
    assert graph["repeat1_2_inner_x"].pointer == "/model/layers/1/layers/2/layers/0"
    assert graph["repeat1_2_inner_add1"].pointer == "/model/layers/1/layers/2"


def test_a_containers_name_stands_for_its_output_and_inner_layers_see_outer_names() -> None:
    graph = graph_of(
        [
            conv(4, name="stem"),
            layer("residual", name="block", layers=[conv(4), layer("concat", inputs=["conv1", "stem"]), conv(4)]),
            layer("add", inputs=["block", "stem"]),
            layer("add", inputs=["block_conv1", "add1"]),
        ]
    )
    assert graph["block_concat1"].inputs == ("block_conv1", "stem")
    assert graph["add1"].inputs == ("block_add1", "stem")
    assert graph["add2"].inputs == ("block_conv1", "add1")


def test_the_innermost_of_two_equal_names_counts() -> None:
    graph = graph_of([conv(4), layer("residual", layers=[conv(4), layer("add", inputs=["conv1", "input"])])], (4, 8, 8))
    assert graph["residual1_add1"].inputs == ("residual1_conv1", "input")
    assert wires(graph)[-1] == ("residual1_add2", ("residual1_add1", "conv1"))


@pytest.mark.parametrize("shape", [(4, 9), (4, 9, 8), (4, 9, 8, 7)])
def test_residual_auto_is_identity_where_shapes_are_equal_and_projection_where_they_are_not(
    shape: tuple[int, ...],
) -> None:
    same, other = layer("residual", layers=[conv(4)]), layer("residual", layers=[conv(6, stride=2)])
    graph = graph_of([same, other], shape)
    assert wires(graph) == [
        ("residual1_conv1", ("input",)),
        ("residual1_add1", ("residual1_conv1", "input")),
        ("residual2_conv1", ("residual1_add1",)),
        ("residual2_shortcut_conv1", ("residual1_add1",)),
        ("residual2_shortcut_batch_norm1", ("residual2_shortcut_conv1",)),
        ("residual2_add1", ("residual2_conv1", "residual2_shortcut_batch_norm1")),
    ]
    assert graph["residual2_shortcut_conv1"].layer == Conv(out_channels=6, kernel_size=1, stride=2, bias=False)


def test_residual_projection_is_made_also_where_shapes_are_equal() -> None:
    graph = graph_of([layer("residual", layers=[conv(3)], shortcut="projection")])
    assert graph["residual1_shortcut_conv1"].layer == Conv(out_channels=3, kernel_size=1, stride=1, bias=False)


def test_residual_pad_takes_every_second_position_and_adds_channels_of_zeros() -> None:
    graph = graph_of([layer("residual", layers=[conv(8, stride=[2, 1])], shortcut="pad")])
    assert graph["residual1_shortcut_max_pool1"].layer == MaxPool(kernel_size=1, stride=(2, 1))
    assert graph["residual1_shortcut_pad1"].layer.document() == {
        "type": "pad",
        "padding": [0, 0, 0, 0, 2, 3],
        "mode": "constant",
        "value": 0.0,
    }


def test_strides_of_projections_follow_the_ratio_of_the_sizes() -> None:
    graph = graph_of([layer("residual", layers=[conv(3, [5, 3], stride=[4, 2], padding=[2, 1])])], (3, 15, 15))
    assert graph["residual1_shortcut_conv1"].layer == Conv(out_channels=3, kernel_size=1, stride=(4, 2), bias=False)


def test_squeeze_and_excite_becomes_explicit_convolutions() -> None:
    graph = graph_of([conv(16), layer("squeeze_excite"), layer("squeeze_excite", channels=3, gate="hardsigmoid")])
    assert [(node.name.removeprefix("squeeze_excite1_"), node.shape[0]) for node in graph.nodes[1:7]] == [
        ("global_avg_pool1", 16),
        ("conv1", 4),
        ("relu1", 4),
        ("conv2", 16),
        ("sigmoid1", 16),
        ("multiply1", 16),
    ]
    assert graph["squeeze_excite1_multiply1"].inputs == ("conv1", "squeeze_excite1_sigmoid1")
    assert graph["squeeze_excite2_conv1"].shape == (3, 1, 1)
    assert graph["squeeze_excite2_hardsigmoid1"].inputs == ("squeeze_excite2_conv2",)


def test_depthwise_stays_a_word() -> None:
    graph = graph_of([conv(6, groups="depthwise"), conv(6, groups=6)])
    assert [document["groups"] for document in graph.to_layers()] == ["depthwise", 6]
    assert graph["conv1"].tensors["weight"].shape == (6, 1, 3, 3)


def test_the_written_out_layers_state_names_inputs_and_widths() -> None:
    graph = graph_of([conv(4), layer("relu"), *HEAD])
    assert graph.to_layers()[0] == {
        "type": "conv",
        "name": "conv1",
        "inputs": ["input"],
        "out_channels": 4,
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "groups": 1,
        "bias": True,
        "in_channels": 3,
    }
    assert graph.to_layers()[-1]["in_features"] == 4
    assert [document["type"] for document in graph.to_layers()] == [
        "conv",
        "relu",
        "global_avg_pool",
        "flatten",
        "linear",
    ]


def test_replacing_a_layer_computes_every_shape_again() -> None:
    graph = graph_of([conv(4), layer("relu"), conv(6), *HEAD])
    narrow = graph["conv1"].layer.model_copy(update={"out_channels": 2})
    smaller = graph.replace({"conv1": narrow})
    assert smaller["conv2"].tensors["weight"].shape == (6, 2, 3, 3)
    assert [node.name for node in smaller.nodes] == [node.name for node in graph.nodes]
    assert smaller != graph
    assert graph.replace({}) == graph
    with pytest.raises(KeyError):
        graph.replace({"conv9": narrow})


def test_a_thousand_repeats_of_ten_are_as_many_as_fit() -> None:
    block = layer("repeat", times=10, layers=[layer("relu")])
    graph = graph_of([layer("repeat", times=1000, layers=[block])])
    assert len(graph.nodes) == 10_000
    assert graph.output == "repeat1_1000_repeat1_10_relu1"


sizes = st.integers(1, 9)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_windows_of_any_geometry_are_torchs(data: st.DataObject) -> None:
    """Where the graph gives a size torch gives the same; where it refuses, torch refuses or would pool nothing."""
    size, kernel, stride, dilation = (data.draw(sizes, label=name) for name in ("size", "kernel", "stride", "dilation"))
    padding, ceil = data.draw(st.integers(0, 5), label="padding"), data.draw(st.booleans(), label="ceil")
    pool, pooled = MaxPool(kernel_size=kernel, stride=stride, padding=padding, ceil_mode=ceil), nn.MaxPool1d
    image = torch.zeros(1, 2, size, device="meta")
    try:
        expected: int | None = pooled(kernel, stride, padding, ceil_mode=ceil)(image).shape[-1]
    except RuntimeError:
        expected = None
    if expected is None or kernel > size + 2 * padding:
        with pytest.raises(LayerFault):
            pool.output_shape([(2, size)])
    else:
        assert pool.output_shape([(2, size)]) == (2, expected)
    convolution = Conv(out_channels=3, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
    module = nn.Conv1d(2, 3, kernel, stride, padding, dilation, device="meta")
    if dilation * (kernel - 1) + 1 > size + 2 * padding:
        with pytest.raises(LayerFault, match="window"):
            convolution.output_shape([(2, size)])
    else:
        assert convolution.output_shape([(2, size)]) == tuple(module(image).shape[1:])


@settings(max_examples=100, deadline=None)
@given(
    size=sizes,
    kernel=sizes,
    stride=sizes,
    padding=st.integers(0, 4),
    dilation=st.integers(1, 4),
    more=st.integers(0, 3),
)
def test_transposed_windows_of_any_geometry_are_torchs(
    size: int, kernel: int, stride: int, padding: int, dilation: int, more: int
) -> None:
    ours = ConvTranspose(
        out_channels=3, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, output_padding=more
    )
    module = nn.ConvTranspose1d(2, 3, kernel, stride, padding, more, dilation=dilation)
    with torch.no_grad():
        try:
            expected = tuple(module(torch.zeros(1, 2, size)).shape[1:])
        except RuntimeError:
            expected = ()
    if expected:
        assert ours.output_shape([(2, size)]) == expected
    else:
        with pytest.raises(LayerFault):
            ours.output_shape([(2, size)])


def test_a_graph_does_not_depend_on_where_it_stands() -> None:
    layers = read_layers([conv(4), *HEAD])
    here, there = build_graph(layers, PICTURE), build_graph(layers, PICTURE, pointer="/layers")
    assert here == there
    assert there["conv1"].pointer == "/layers/0"
    with pytest.raises(InvalidSpec) as refused:
        build_graph(layers, (3,), pointer="/layers")
    assert refused.value.faults[0].pointer == "/input_shape"
