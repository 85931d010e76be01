"""Networks by name: what the contract says of them, published sizes, and any input shape."""

from __future__ import annotations

import math
import time
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InvalidSpec
from app.network.cost import cost
from app.network.presets.blocks import scaled
from app.network.presets.published import PUBLISHED, UNPUBLISHED, Published
from app.network.presets.registry import PRESETS, preset_layers
from app.spec.data import DataFacts
from tests.support.jobs.specs import graph_of, plan, preset_graph

UNITS = {"k": 1_000, "M": 1_000_000, "G": 1_000_000_000}


def as_printed(count: int, printed: str) -> str:
    """`count` rounded to the digits of `printed`, written the same way."""
    if printed[-1] in UNITS:
        number, unit = printed.split(" ")
        _, _, decimals = number.partition(".")
        return f"{Decimal(count) / UNITS[unit]:.{len(decimals)}f} {unit}"
    mantissa, power, _ = printed.partition("e")
    if power:
        _, _, decimals = mantissa.partition(".")
        rounded, exponent = f"{Decimal(count):.{len(decimals)}e}".split("e")
        return f"{rounded}e{int(exponent)}"
    return f"{count:,}"


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


@pytest.mark.parametrize("figure", PUBLISHED, ids=lambda figure: f"{figure.preset}-{figure.input_shape[1]}")
def test_parameters_and_macs_are_the_published_ones_to_the_last_printed_digit(figure: Published) -> None:
    ours = cost(preset_graph(figure.preset, figure.input_shape, figure.classes))
    if figure.params is not None:
        assert as_printed(ours.params + figure.more_params, figure.params) == figure.params
    if figure.macs is not None:
        assert as_printed(ours.macs + figure.more_macs, figure.macs) == figure.macs
    assert figure.source
    assert figure.note or not (figure.more_params or figure.more_macs)


def test_every_preset_has_a_published_figure_or_a_reason_why_not() -> None:
    assert {figure.preset for figure in PUBLISHED} | set(UNPUBLISHED) == set(PRESETS)
    assert not {figure.preset for figure in PUBLISHED} & set(UNPUBLISHED)


def test_figures_are_rounded_to_the_digits_of_what_is_printed() -> None:
    cases = [(1_234_567, "1,234,567"), (1_250_000, "1.2 M"), (1_251_000, "1.3 M"), (996, "1.0 k"), (99_950, "1.00e5")]
    for count, printed in cases:
        assert as_printed(count, printed) == printed
    assert as_printed(11_689_511, "11,689,512") != "11,689,512"
    assert as_printed(4_250_001, "4.2 M") != "4.2 M"
    assert as_printed(313_600_000, "3.13e8") != "3.13e8"


def test_what_a_source_counts_differently_is_in_the_graph() -> None:
    """The differences to published figures are counts of something, not numbers that make the sums fit."""
    for figure in PUBLISHED:
        graph = preset_graph(figure.preset, figure.input_shape, figure.classes)
        normed = [node for node in graph.nodes if node.type == "batch_norm"]
        channels = sum(node.shape[0] for node in normed)
        elements = sum(math.prod(node.shape) for node in normed)
        assert figure.more_params in (0, channels, -channels), figure
        assert figure.more_macs in (0, 2 * elements), figure


def test_lenet5_has_as_many_parameters_as_with_all_maps_of_the_second_stage_connected() -> None:
    assert cost(preset_graph("lenet5")).params == 61_706


def test_the_unet_encoder_has_the_convolutions_of_figure_1() -> None:
    widths = [1, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024]
    weights = sum(9 * before * after for before, after in pairwise(widths))
    graph = preset_graph("unet_encoder", (1, 64, 64), classes=2)
    norms, classifier = 2 * sum(widths[1:]), 2 * 1024 + 2
    assert cost(graph).params == weights + norms + classifier
    assert [node.shape[0] for node in graph.nodes if node.type == "conv"] == widths[1:]
    assert graph["global_avg_pool1"].input_shapes[0] == (1024, 4, 4)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.usual_shape == (3, 224, 224)])
def test_networks_for_imagenet_leave_out_two_halvings_where_the_input_is_small(name: str) -> None:
    def last_map(size: int) -> tuple[int, ...]:
        graph = preset_graph(name, (3, size, size), width=0.25)
        pool = next(node for node in graph.nodes if node.type == "global_avg_pool")
        return pool.input_shapes[0][1:]

    if name == "unet_encoder":  # four halvings and no stem
        assert (last_map(32), last_map(224)) == ((2, 2), (14, 14))
    elif name == "squeezenet":  # four halvings, of which the first is not padded
        assert (last_map(32), last_map(63), last_map(224)) == ((8, 8), (15, 15), (13, 13))
    else:
        assert (last_map(32), last_map(63)) == ((4, 4), (8, 8))
        assert (last_map(64), last_map(224)) == ((2, 2), (7, 7))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("narrow", [False, True])
def test_half_of_the_macs_can_be_removed_with_default_settings(name: str, narrow: bool) -> None:
    preset = PRESETS[name]
    shape, classes = preset.usual_shape, preset.usual_classes
    facts = DataFacts("usual", shape, classes, tuple(map(str, range(classes))), 10_000, 1_000, "float32")
    model = {"preset": name, "input_shape": list(shape), "width": 0.25 if narrow else 1.0}
    planned = plan(facts, model=model, optimizations=[{"type": "prune", "budget": {"macs": 0.5}}])
    assert 0.4 <= planned.planned_cost.macs / planned.baseline_cost.macs <= 0.5


def test_a_plan_for_resnet50_at_224_takes_less_than_a_second() -> None:
    preset = PRESETS["resnet50"]
    facts = DataFacts("usual", (3, 224, 224), 1000, tuple(map(str, range(1000))), 10_000, 1_000, "float32")
    model = {"preset": "resnet50", "input_shape": list(preset.usual_shape)}
    started = time.process_time()
    planned = plan(facts, model=model, optimizations=[{"type": "prune", "budget": {"macs": 0.5}}])
    assert time.process_time() - started < 1
    assert planned.planned_cost.params < planned.baseline_cost.params


def test_resnets_have_as_many_weighted_layers_as_their_name_says() -> None:
    for name in ("resnet20", "resnet32", "resnet56", "resnet110"):
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


def test_pools_do_not_shrink_an_axis_that_they_would_empty() -> None:
    graph = preset_graph("deep_cnn", (1, 3, 40))
    assert [node.shape[1:] for node in graph.nodes if node.type == "max_pool"] == [(1, 20), (1, 10), (1, 5), (1, 2)]
    assert not [node for node in preset_graph("deep_cnn", (1, 1, 1)).nodes if node.type == "max_pool"]


def test_lenet_pads_small_digits_only() -> None:
    assert preset_graph("lenet5", (1, 28, 28))["conv1"].shape == preset_graph("lenet5", (1, 32, 32))["conv1"].shape


def test_widths_are_scaled_to_multiples_of_eight_and_never_to_zero() -> None:
    assert [scaled(64, width) for width in (1.0, 0.5, 0.25, 0.1, 0.01, 2.0)] == [64, 32, 16, 6, 1, 128]
    assert [scaled(channels, 0.75) for channels in (32, 128)] == [24, 96]
    for channels in range(1, 600, 7):
        for width in (0.3, 0.7, 1.0, 1.4):
            assert scaled(channels, width) >= 0.9 * channels * width - 0.5


def test_width_scales_every_hidden_layer_and_not_the_classes() -> None:
    graph = preset_graph("simple_cnn", width=0.5)
    assert [node.shape[0] for node in graph.nodes if node.type in ("conv", "linear")] == [16, 32, 64, 10]
