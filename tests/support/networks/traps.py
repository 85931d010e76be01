"""Networks on which rules for channels are easily wrong, in the job language: one for each trap."""

from __future__ import annotations

from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from tests.support.networks.topologies import CLASSES, HEAD, Layers, conv, layer

SMALL = (2, 4, 6)  # unequal on the axes: mixed-up axes must show
HALF = layer("max_pool", kernel_size=2)
LOGITS = layer("linear", out_features=CLASSES)


def up(channels: int, **more: object) -> dict[str, object]:
    """A transposed convolution that keeps the size."""
    return layer("conv_transpose", out_channels=channels, kernel_size=3, padding=1, **more)


def flat(name: str, *inputs: str) -> dict[str, object]:
    """A flatten layer of this name."""
    return layer("flatten", name=name, **({"inputs": list(inputs)} if inputs else {}))


def concat(*names: str, **more: object) -> dict[str, object]:
    return layer("concat", inputs=list(names), **more)


def padded(front: int, back: int, axes: int = 2, **more: object) -> dict[str, object]:
    """Channels of one value before and after the others."""
    return layer("pad", padding=[0, 0] * axes + [front, back], **more)


TRAPS: dict[str, tuple[tuple[int, ...], Layers]] = {
    "a layer beside itself, then groups": (
        SMALL,
        [conv(4, name="a"), layer("sigmoid", name="s"), concat("s", "s"), conv(8, groups=4), layer("tanh"), *HEAD],
    ),
    "a layer around another, then two groups": (
        SMALL,
        [conv(4, name="a"), conv(2, name="b"), concat("a", "b", "a"), layer("batch_norm"), conv(6, groups=2), *HEAD],
    ),
    "a layer beside itself, then depthwise": (
        SMALL,
        [conv(4, name="a"), concat("a", "a"), conv(16, groups=8, bias=False), layer("batch_norm"), conv(4), *HEAD],
    ),
    "unequal parts, shuffled": (
        SMALL,
        [
            *[conv(5, name="a"), conv(3, name="b"), concat("a", "b"), layer("channel_shuffle", groups=2)],
            *[layer("batch_norm"), layer("sigmoid"), conv(4), *HEAD],
        ],
    ),
    "shuffled by two and by three": (
        SMALL,
        [
            *[conv(12), layer("channel_shuffle", groups=2), layer("prelu"), layer("channel_shuffle", groups=3)],
            *[layer("batch_norm"), conv(4, groups=2), *HEAD],
        ],
    ),
    "a depthwise multiplier, shuffled": (
        SMALL,
        [
            *[conv(4), layer("relu"), conv(12, groups="depthwise"), layer("channel_shuffle", groups=3)],
            *[layer("prelu"), conv(4, groups=2), layer("sigmoid"), *HEAD],
        ],
    ),
    "groups after a slice": (
        SMALL,
        [conv(8, name="a"), layer("slice", start=1, stop=7), conv(6, groups=3, name="b"), concat("b", "a"), *HEAD],
    ),
    "a slice across the border of a concat": (
        SMALL,
        [
            *[conv(4, name="a"), conv(4, inputs=["input"], name="b"), concat("a", "b", name="both")],
            *[layer("slice", start=2, stop=7, name="middle"), conv(3), layer("sigmoid", name="c")],
            *[layer("slice", start=3, stop=8, inputs=["both"]), conv(3, name="d"), concat("c", "d"), *HEAD],
        ],
    ),
    "slices of slices that overlap": (
        SMALL,
        [
            *[conv(10, name="a"), layer("slice", start=1, stop=8, name="b"), layer("slice", start=2, stop=6, name="c")],
            *[layer("slice", start=4, stop=10, inputs=["a"], name="d"), concat("b", "c", "d"), layer("batch_norm")],
            *[layer("tanh"), *HEAD],
        ],
    ),
    "halves of one layer, added": (
        SMALL,
        [
            *[conv(8, name="a"), layer("slice", stop=4, name="left"), layer("slice", start=4, stop=8, inputs=["a"])],
            *[layer("sigmoid", name="right"), layer("add", inputs=["left", "right"]), layer("batch_norm"), *HEAD],
        ],
    ),
    "flat features of two sizes, one after the other": (
        SMALL,
        [
            *[conv(3, name="a"), flat("wide"), conv(4, inputs=["a"]), HALF, flat("narrow")],
            *[concat("wide", "narrow", "wide"), layer("batch_norm"), layer("relu"), LOGITS],
        ],
    ),
    "flat features beside those of a linear layer": (
        SMALL,
        [
            *[conv(4, name="a"), layer("relu"), flat("wide"), layer("linear", out_features=5, name="hidden")],
            *[concat("hidden", "wide"), layer("prelu"), layer("linear", out_features=4), layer("sigmoid"), LOGITS],
        ],
    ),
    "features cut out inside a channel": (
        (2, 2, 3),
        [
            *[conv(9, name="a"), flat("f"), layer("slice", start=4, stop=45, name="cut"), layer("batch_norm")],
            *[layer("sigmoid", name="b"), layer("slice", start=9, stop=33, inputs=["f"], name="c")],
            *[concat("b", "c"), LOGITS],
        ],
    ),
    "flat features, shuffled": (
        (2, 2, 2),
        [conv(6), layer("flatten"), layer("channel_shuffle", groups=3), layer("batch_norm"), layer("sigmoid"), LOGITS],
    ),
    "flat features, padded, in norm groups": (
        (2, 1, 2),
        [
            *[conv(6), layer("flatten"), layer("pad", padding=[2, 2], value=0.5), layer("group_norm", num_groups=4)],
            *[layer("sigmoid"), LOGITS],
        ],
    ),
    "norm groups over flat features, three channels in two": (
        (2, 2, 2),
        [conv(6), layer("flatten"), layer("group_norm", num_groups=4), layer("tanh"), LOGITS],
    ),
    "a product of flat vectors": (
        (2, 2, 3),
        [
            *[conv(4), flat("f"), layer("linear", out_features=24), layer("sigmoid", name="gate")],
            *[layer("multiply", inputs=["f", "gate"]), layer("linear", out_features=4), layer("relu"), LOGITS],
        ],
    ),
    "flat features weighed by one number": (
        (2, 2, 3),
        [
            *[conv(4), flat("f"), layer("linear", out_features=1), layer("sigmoid", name="gate")],
            *[layer("multiply", inputs=["gate", "f", "gate"]), layer("linear", out_features=4), LOGITS],
        ],
    ),
    "a sum of maps that were flattened at other sizes": (
        SMALL,
        [
            *[conv(6, name="a"), HALF, flat("left"), layer("batch_norm", name="n")],
            *[conv(9, [1, 3], stride=[1, 3], padding=0, inputs=["a"]), layer("avg_pool", kernel_size=[2, 1])],
            *[flat("right"), layer("add", inputs=["n", "right"]), layer("sigmoid"), LOGITS],
        ],
    ),
    "a norm group across the border of a concat": (
        SMALL,
        [
            *[conv(4, name="a"), conv(8, inputs=["input"], name="b"), concat("a", "b")],
            *[layer("group_norm", num_groups=4), layer("sigmoid"), conv(4), *HEAD],
        ],
    ),
    "norm groups after a shuffle": (
        SMALL,
        [conv(12), layer("channel_shuffle", groups=2), layer("group_norm", num_groups=3), layer("relu"), *HEAD],
    ),
    "norm groups over channels of a constant": (
        SMALL,
        [conv(6), padded(2, 1, value=0.5), layer("group_norm", num_groups=3), layer("sigmoid"), conv(4), *HEAD],
    ),
    "channels put before and after, then added": (
        SMALL,
        [
            *[conv(3, name="a"), padded(2, 1, name="p", value=-0.5), conv(6, inputs=["a"], name="b")],
            *[layer("batch_norm", name="n"), layer("add", inputs=["p", "n"]), layer("sigmoid"), conv(4), *HEAD],
        ],
    ),
    "padded twice, shuffled, in groups": (
        SMALL,
        [
            *[conv(4), padded(1, 0), padded(0, 3, value=1.5), layer("channel_shuffle", groups=4), layer("batch_norm")],
            *[conv(4, groups=2), layer("tanh"), *HEAD],
        ],
    ),
    "a slice of what was padded": (
        SMALL,
        [conv(5), padded(2, 2, value=0.5), layer("slice", start=1, stop=6), layer("batch_norm"), conv(3), *HEAD],
    ),
    "signals made longer": (
        (3, 6),
        [
            *[conv(4), layer("batch_norm"), layer("upsample", scale_factor=2, mode="linear"), layer("sigmoid")],
            *[up(8, groups="depthwise"), layer("prelu"), layer("upsample", scale_factor=3), conv(4, groups=2), HALF],
            *[layer("flatten"), LOGITS],
        ],
    ),
    "transposed convolutions in groups between shuffles": (
        SMALL,
        [
            *[conv(12), layer("channel_shuffle", groups=3), up(6, groups=2), layer("channel_shuffle", groups=2)],
            *[layer("batch_norm"), up(12, groups=6, bias=False), layer("prelu"), up(4), *HEAD],
        ],
    ),
    "slopes after a shuffle": (
        SMALL,
        [conv(8), layer("channel_shuffle", groups=4), layer("prelu"), conv(3, bias=False), *HEAD],
    ),
    "a norm after a concat after a shuffle": (
        SMALL,
        [
            *[conv(6, name="a"), layer("channel_shuffle", groups=2, name="s"), conv(3, name="b")],
            *[concat("b", "s", "a"), layer("batch_norm"), layer("sigmoid"), conv(4), *HEAD],
        ],
    ),
    "squeeze and excite around a depthwise convolution": (
        SMALL,
        [
            conv(4, name="stem"),
            layer(
                "residual",
                layers=[
                    *[conv(8, 1), layer("batch_norm"), layer("silu"), conv(8, groups="depthwise"), layer("batch_norm")],
                    *[layer("squeeze_excite", channels=3), conv(4, 1), layer("batch_norm")],
                ],
            ),
            *HEAD,
        ],
    ),
    "three factors, one of them a map and one a mean": (
        SMALL,
        [
            *[conv(5, name="a"), layer("global_avg_pool"), layer("hardsigmoid", name="mean")],
            *[conv(1, inputs=["input"], name="map"), layer("multiply", inputs=["map", "mean", "a"]), conv(4), *HEAD],
        ],
    ),
    "attention over channels": (
        SMALL,
        [
            *[conv(4, name="a"), layer("softmax", name="weights"), conv(4, inputs=["input"], name="b")],
            *[layer("multiply", inputs=["weights", "b"]), conv(6), layer("layer_norm"), conv(5), *HEAD],
        ],
    ),
    "a sum of a layer with itself": (
        SMALL,
        [conv(4, name="a"), layer("add", inputs=["a", "a"], name="b"), layer("multiply", inputs=["b", "a"]), *HEAD],
    ),
    "two paths into the class scores": (
        SMALL,
        [
            *[conv(4, name="a"), layer("flatten"), layer("linear", out_features=CLASSES, name="one")],
            *[conv(5, inputs=["a"]), layer("batch_norm"), layer("global_avg_pool"), layer("flatten")],
            *[layer("linear", out_features=CLASSES, name="two"), layer("add", inputs=["one", "two"])],
        ],
    ),
    "class scores that are means of maps": (
        SMALL,
        [conv(5), layer("relu"), conv(CLASSES, 1), layer("global_avg_pool"), layer("flatten")],
    ),
    "class scores that are positions of one map": (
        (2, 1, CLASSES),
        [conv(5), layer("sigmoid"), conv(1, 1), layer("flatten")],
    ),
    "image channels, each for itself": (
        (4, 4, 4),
        [conv(8, groups="depthwise", name="a"), conv(6, inputs=["input"]), concat("a", "conv1", "input"), *HEAD],
    ),
    "one convolution over both halves": (
        SMALL,
        [
            *[conv(8, name="a"), layer("slice", stop=4, name="left"), conv(6, name="c")],
            *[layer("slice", start=4, stop=8, inputs=["a"]), layer("sigmoid"), layer("conv", shares="c", name="d")],
            *[concat("d", "c"), layer("channel_shuffle", groups=3), layer("batch_norm"), *HEAD],
        ],
    ),
    "one depthwise convolution after a layer and after the shuffle of another": (
        SMALL,
        [
            *[
                conv(6),
                layer("relu"),
                conv(6, groups="depthwise", name="d"),
                conv(6),
                layer("channel_shuffle", groups=2),
            ],
            *[layer("prelu"), layer("conv", shares="d"), layer("batch_norm"), *HEAD],
        ],
    ),
    "padded shortcuts in a row": (
        SMALL,
        [
            *[conv(3), layer("batch_norm")],
            layer("residual", shortcut="pad", layers=[conv(6, stride=2, padding=1), layer("batch_norm")]),
            layer("sigmoid"),
            layer("residual", shortcut="pad", layers=[conv(9), layer("batch_norm"), layer("prelu")]),
            *HEAD,
        ],
    ),
    "groups of a growing concat": (
        SMALL,
        [
            *[conv(4, name="a"), conv(4, groups=2, name="b"), concat("a", "b", name="c"), conv(4, groups=4, name="d")],
            *[concat("c", "d", "a"), layer("batch_norm"), layer("sigmoid"), conv(4, groups=2), *HEAD],
        ],
    ),
}


def trap(name: str) -> Graph:
    """The graph of one of `TRAPS`."""
    input_shape, layers = TRAPS[name]
    return build_graph(read_layers(layers), input_shape, classes=CLASSES)
