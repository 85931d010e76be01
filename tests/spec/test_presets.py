"""Networks by name: what the contract says of them, published sizes, and any input shape."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.specs import graph_of, preset_graph

from app.errors import InvalidSpec
from app.spec.cost import cost
from app.spec.presets import PRESETS, preset_layers, scaled


def test_simple_cnn_is_the_one_of_the_contract() -> None:
    graph = preset_graph("simple_cnn", (1, 28, 28))
    assert [(node.name, node.type, node.shape) for node in graph.nodes] == [
        ("conv1", "conv", (32, 28, 28)),
        ("relu1", "relu", (32, 28, 28)),
        ("max_pool1", "max_pool", (32, 14, 14)),
        ("conv2", "conv", (64, 14, 14)),
        ("relu2", "relu", (64, 14, 14)),
        ("max_pool2", "max_pool", (64, 7, 7)),
        ("flatten1", "flatten", (3136,)),
        ("linear1", "linear", (128,)),
        ("relu3", "relu", (128,)),
        ("linear2", "linear", (10,)),
    ]
    assert cost(graph).params == 320 + 18_496 + 401_536 + 1_290


def test_deep_cnn_is_the_one_of_the_contract() -> None:
    graph = preset_graph("deep_cnn", (3, 32, 32))
    block = ["conv", "batch_norm", "relu", "max_pool"]
    assert [node.type for node in graph.nodes] == [*block * 4, "flatten", "linear", "relu", "linear"]
    assert [node.shape[0] for node in graph.nodes if node.type == "conv"] == [32, 64, 128, 256]
    assert graph["flatten1"].shape == (1024,)
    assert graph["linear1"].shape == (1024,)
    assert cost(graph).macs == 16_099_328


@pytest.mark.parametrize(
    ("name", "shape", "params"),
    [
        ("lenet5", (1, 28, 28), 61_706),  # with all maps of the second stage connected
        ("resnet20", (3, 32, 32), 269_722),  # He et al.: 0.27 M, 0.46 M, 0.85 M
        ("resnet32", (3, 32, 32), 464_154),
        ("resnet56", (3, 32, 32), 853_018),
        ("vgg16", (3, 32, 32), 14_724_042),
        (
            "vgg11",
            (3, 224, 224),
            132_868_840 - 4097 * 990 - 2752,
        ),  # torchvision's vgg11_bn with 10 of 1000 classes, no conv biases
    ],
)
def test_parameters_are_the_published_ones(name: str, shape: tuple[int, ...], params: int) -> None:
    assert cost(preset_graph(name, shape)).params == params


def test_resnets_have_as_many_weighted_layers_as_their_name_says() -> None:
    for name in ("resnet20", "resnet32", "resnet56"):
        weighted = [node for node in preset_graph(name).nodes if node.type in ("conv", "linear")]
        assert len(weighted) == int(name.removeprefix("resnet"))


@settings(max_examples=120, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(PRESETS)))
def test_every_preset_takes_every_shape_from_its_smallest_on(data: st.DataObject, name: str) -> None:
    preset = PRESETS[name]
    axes = data.draw(st.sampled_from(preset.axes))
    spatial = tuple(data.draw(st.integers(preset.smallest, preset.smallest + 40)) for _ in range(axes))
    shape = (data.draw(st.integers(1, 5)), *spatial)
    classes = data.draw(st.integers(2, 13))
    width = data.draw(st.sampled_from((0.01, 0.25, 0.5, 1.0, 1.37)))
    graph = graph_of(preset_layers(name, shape, classes, width), shape, classes)
    assert graph[graph.output].shape == (classes,)


def test_every_preset_takes_its_smallest_input() -> None:
    for name, preset in PRESETS.items():
        for axes in preset.axes:
            graph = preset_graph(name, (1, *(preset.smallest,) * axes), width=0.1)
            assert len(graph[graph.output].shape) == 1, f"{name} gives no class scores"


@pytest.mark.parametrize(
    ("name", "shape", "limit", "value"),
    [
        ("resnet20", (3, 32), 2, 1),
        ("audio_cnn", (1, 28, 28), 1, 2),
        ("video_cnn", (3, 8, 8), 3, 2),
        ("lenet5", (1, 11, 28), 12, 11),
    ],
)
def test_a_shape_that_does_not_fit_is_a_fault_with_both_sizes(
    name: str, shape: tuple[int, ...], limit: int, value: int
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        preset_layers(name, shape, 10)
    (fault,) = caught.value.faults
    assert (fault.pointer, fault.limit, fault.value) == ("/model/input_shape", limit, value)
    assert name in fault.message


def test_pools_leave_alone_what_they_would_empty() -> None:
    graph = preset_graph("deep_cnn", (1, 3, 40))
    assert [node.shape[1:] for node in graph.nodes if node.type == "max_pool"] == [(1, 20), (1, 10), (1, 5), (1, 2)]
    assert not [node for node in preset_graph("deep_cnn", (1, 1, 1)).nodes if node.type == "max_pool"]


def test_lenet_pads_small_digits_only() -> None:
    assert preset_graph("lenet5", (1, 28, 28))["conv1"].shape == preset_graph("lenet5", (1, 32, 32))["conv1"].shape


def test_widths_are_scaled_to_multiples_of_eight_and_never_to_nothing() -> None:
    assert [scaled(64, width) for width in (1.0, 0.5, 0.25, 0.1, 0.01, 2.0)] == [64, 32, 16, 6, 1, 128]
    assert [scaled(channels, 0.75) for channels in (32, 128)] == [24, 96]
    for channels in range(1, 600, 7):
        for width in (0.3, 0.7, 1.0, 1.4):
            assert scaled(channels, width) >= 0.9 * channels * width - 0.5


def test_width_scales_every_hidden_layer_and_not_the_classes() -> None:
    graph = preset_graph("simple_cnn", width=0.5)
    assert [node.shape[0] for node in graph.nodes if node.type in ("conv", "linear")] == [16, 32, 64, 10]
