"""Channel classes: what is tied, what is pinned, and the smaller graph. No weights here."""

from __future__ import annotations

import pytest

from app.network.graph import Graph, build_graph
from app.network.layers.registry import CONTAINERS, LAYERS, read_layers
from app.network.presets.registry import PRESETS, preset_layers
from app.pruning.channel_classes import Classes, TooManyChannels, channel_classes, shrink_graph
from app.pruning.channel_rules import RULES
from tests.support.networks.dags import random_drop
from tests.support.networks.topologies import HEAD, PICTURE, Layers, conv, layer


def graph_of(layers: Layers, input_shape: tuple[int, ...] = PICTURE) -> Graph:
    return build_graph(read_layers(layers), input_shape)


def widths(graph: Graph, *names: str) -> list[int]:
    return [graph[name].shape[0] for name in names]


def ids(classes: Classes, name: str) -> list[int]:
    return classes.slots[name].runs(1).tolist()


def drop(classes: Classes, name: str, *channels: int) -> list[int]:
    """The classes of these channels of a node."""
    return sorted({ids(classes, name)[channel] for channel in channels})


def test_every_layer_type_has_a_rule() -> None:
    containers = {kind.model_fields["type"].default for kind in CONTAINERS}
    assert set(RULES) == set(LAYERS) - containers


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gets_smaller(name: str) -> None:
    preset = PRESETS[name]
    layers = preset_layers(name, preset.usual_shape, preset.usual_classes, 0.25)
    graph = build_graph(read_layers(layers), preset.usual_shape, classes=preset.usual_classes)
    classes = channel_classes(graph)
    smaller = shrink_graph(graph, random_drop(classes, 0.5, 0), classes)
    assert sum(node.macs for node in smaller.nodes) < 0.5 * sum(node.macs for node in graph.nodes)
    assert [node.name for node in smaller.nodes] == [node.name for node in graph.nodes]


def test_an_identity_shortcut_ties_the_whole_stage_and_a_projection_only_its_end() -> None:
    block = [conv(4), layer("batch_norm"), layer("relu"), conv(4)]
    graph = graph_of(
        [
            conv(4, name="stem"),
            layer("residual", name="same", layers=block),
            layer("residual", name="wide", layers=[conv(6), conv(6)]),
            *HEAD,
        ]
    )
    classes = channel_classes(graph)
    assert ids(classes, "stem") == ids(classes, "same_conv2")
    assert not set(ids(classes, "stem")) & set(ids(classes, "same_conv1"))
    assert ids(classes, "wide_conv2") == ids(classes, "wide_shortcut_conv1")
    assert not set(ids(classes, "wide_conv1")) & set(ids(classes, "wide_conv2"))
    smaller = shrink_graph(graph, drop(classes, "stem", 1, 2), classes)
    assert widths(smaller, "stem", "same_conv1", "same_conv2", "wide_conv1") == [2, 4, 2, 6]


def test_a_padded_shortcut_ties_the_middle_and_shrinks_front_and_back_by_what_leaves() -> None:
    graph = graph_of(
        [conv(4, name="stem"), layer("residual", name="r", shortcut="pad", layers=[conv(8, name="inner")]), *HEAD]
    )
    classes = channel_classes(graph)
    assert ids(classes, "r_inner")[2:6] == ids(classes, "stem")
    smaller = shrink_graph(graph, drop(classes, "r_inner", 0, 3, 6, 7), classes)
    assert smaller["r_shortcut_pad1"].layer.padding == (0, 0, 0, 0, 1, 0)  # type: ignore[attr-defined]
    assert widths(smaller, "stem", "r_inner") == [3, 4]


def test_a_projection_stays_one_when_both_sides_become_equally_wide() -> None:
    """Read anew as a residual block of equal widths its shortcut would be the identity."""
    layers = [conv(4, name="stem"), layer("residual", name="r", layers=[conv(6, name="inner")]), *HEAD]
    graph = graph_of(layers)
    classes = channel_classes(graph)
    smaller = shrink_graph(graph, drop(classes, "r_inner", 1, 4), classes)
    assert widths(smaller, "stem", "r_inner", "r_shortcut_conv1") == [4, 4, 4]
    written = smaller.to_layers()
    again = build_graph(read_layers(written), PICTURE)
    assert again == smaller
    assert again.to_layers() == written
    assert "r_shortcut_conv1" in again


def test_flatten_repeats_each_channel_for_every_position() -> None:
    graph = graph_of([conv(3, name="a"), layer("flatten", name="f"), layer("linear", out_features=2)], (1, 2, 2))
    classes = channel_classes(graph)
    assert ids(classes, "f") == [c for c in ids(classes, "a") for _ in range(4)]
    (second,) = drop(classes, "a", 1)
    assert classes.members(second) == [
        ("a", "weight", 0, 1),
        ("a", "bias", 0, 1),
        *(("linear1", "weight", 1, place) for place in (4, 5, 6, 7)),
    ]


def test_a_concat_of_a_layer_with_itself_has_its_classes_at_two_positions() -> None:
    graph = graph_of(
        [conv(2, name="a"), layer("concat", inputs=["a", "a"], name="twice"), conv(3, name="b"), *HEAD],
    )
    classes = channel_classes(graph)
    assert ids(classes, "twice") == ids(classes, "a") * 2
    assert shrink_graph(graph, drop(classes, "a", 0), classes)["b"].input_shapes[0][0] == 2


def test_a_depthwise_multiplier_leaves_with_its_input_and_stays_depthwise_with_one_channel_left() -> None:
    for groups in (4, "depthwise"):
        graph = graph_of([conv(4, name="a"), conv(8, groups=groups, name="d"), conv(8, name="b"), *HEAD])
        classes = channel_classes(graph)
        assert ids(classes, "d") == [c for c in ids(classes, "a") for _ in range(2)]
        smaller = shrink_graph(graph, drop(classes, "a", 0, 1, 3), classes)
        assert widths(smaller, "a", "d") == [1, 2]
        again = channel_classes(smaller)
        assert ids(again, "d") == ids(again, "a") * 2


def test_a_grouped_convolution_loses_the_same_positions_in_every_group() -> None:
    for kind, more in (("conv", {"padding": "same"}), ("conv_transpose", {"padding": 1})):
        grouped = layer(kind, name="g", out_channels=4, kernel_size=3, groups=2, **more)
        graph = graph_of([conv(6, name="a"), grouped, conv(2), *HEAD])
        classes = channel_classes(graph)
        into, out = ids(classes, "a"), ids(classes, "g")
        assert into[:3] == into[3:]
        assert out[:2] == out[2:]
        smaller = shrink_graph(graph, [into[0], out[1]], classes)
        assert widths(smaller, "a", "g") == [4, 2]


def test_a_shuffle_moves_slots_and_keeps_its_blocks_equally_wide() -> None:
    graph = graph_of([conv(6, name="a"), layer("channel_shuffle", groups=2, name="s"), conv(2), *HEAD])
    classes = channel_classes(graph)
    before = ids(classes, "a")
    assert before[:3] == before[3:]
    assert ids(classes, "s") == [before[j * 3 + i] for i in range(3) for j in range(2)]


def test_squeeze_and_excite_has_a_waist_of_its_own_and_is_tied_to_what_it_weighs() -> None:
    graph = graph_of([conv(8, name="a"), layer("squeeze_excite", name="se"), conv(2), *HEAD])
    classes = channel_classes(graph)
    assert ids(classes, "se_conv2") == ids(classes, "a")
    smaller = shrink_graph(graph, [*drop(classes, "a", 0), *drop(classes, "se_conv1", 0)], classes)
    assert widths(smaller, "a", "se_conv1", "se_conv2") == [7, 1, 7]


def test_a_map_of_one_channel_is_pinned_and_ties_nothing() -> None:
    graph = graph_of(
        [
            conv(4, name="a"),
            conv(1, inputs=["a"], name="map"),
            layer("multiply", inputs=["a", "map"], name="m"),
            conv(2),
            *HEAD,
        ]
    )
    classes = channel_classes(graph)
    assert classes.pins[ids(classes, "map")[0]] == "its one channel is spread over all channels by m"
    assert widths(shrink_graph(graph, drop(classes, "a", 1, 2, 3), classes), "a", "map", "m") == [1, 1, 1]


def test_group_norm_loses_whole_groups() -> None:
    graph = graph_of([conv(6, name="a"), layer("group_norm", num_groups=3, name="n"), conv(2), *HEAD])
    classes = channel_classes(graph)
    assert ids(classes, "a") == [c for c in ids(classes, "a")[::2] for _ in range(2)]
    smaller = shrink_graph(graph, drop(classes, "a", 0), classes)
    assert smaller["n"].layer.num_groups == 2  # type: ignore[attr-defined]
    assert widths(smaller, "a") == [4]


def test_a_slice_keeps_what_is_left_of_its_channels() -> None:
    graph = graph_of(
        [
            conv(6, name="a"),
            layer("slice", start=2, stop=5, inputs=["a"], name="part"),
            conv(3, name="b"),
            layer("concat", inputs=["b", "a"]),
            *HEAD,
        ]
    )
    classes = channel_classes(graph)
    smaller = shrink_graph(graph, drop(classes, "a", 0, 3, 5), classes)
    assert (smaller["part"].layer.start, smaller["part"].layer.stop) == (1, 3)  # type: ignore[attr-defined]
    assert [len(group.classes) for group in classes.groups if "a" in classes.layers_of(group)] == [3, 3]


def test_what_mixes_all_channels_pins_them_with_the_reason() -> None:
    graph = graph_of([conv(4, name="a"), layer("layer_norm"), conv(4, name="b"), layer("softmax"), conv(2), *HEAD])
    classes = channel_classes(graph)
    assert {classes.pins[c] for c in ids(classes, "a")} == {"layer_norm over channels"}
    assert {classes.pins[c] for c in ids(classes, "b")} == {"softmax over channels"}
    assert {classes.pins[c] for c in ids(classes, graph.output)} == {"network output"}
    assert {classes.pins[c] for c in ids(classes, "input")} == {"network input"}
    with pytest.raises(AssertionError, match="layer_norm over channels"):
        shrink_graph(graph, drop(classes, "a", 0), classes)


def test_a_graph_with_too_many_channels_is_refused_before_it_is_ranked() -> None:
    layers = [conv(65_536, 1), *(layer("relu") for _ in range(70)), layer("linear", out_features=2)]
    graph = build_graph(read_layers([*layers[:-1], layer("flatten"), layers[-1]]), (1, 1))
    with pytest.raises(TooManyChannels, match="4000000 channels"):
        channel_classes(graph)
