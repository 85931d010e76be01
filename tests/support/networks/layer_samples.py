"""For every layer type, small networks that use it, in one, two and three dimensions; a new type needs an entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LayerList = list[dict[str, Any]]

INPUT_SHAPE = (8, 9, 7, 6)
"""Of the inputs, cut to channels and the number of spatial axes: sizes that differ, so that mixed-up axes show."""


def input_shape(axes: int) -> tuple[int, ...]:
    """The input's shape of the samples with so many spatial axes."""
    return INPUT_SHAPE[: axes + 1]


def layer(kind: str, **fields: Any) -> dict[str, Any]:
    """One layer as JSON."""
    return {"type": kind, **fields}


def conv(out_channels: int, kernel_size: int | list[int] = 3, padding: Any = 1, **fields: Any) -> dict[str, Any]:
    """A convolution; without further fields it keeps the size."""
    return {"type": "conv", "out_channels": out_channels, "kernel_size": kernel_size, "padding": padding, **fields}


def _each(*values: int) -> Callable[[int], list[int]]:
    """The first numbers of a list that has one for each axis."""
    return lambda axes: list(values[:axes])


_KERNEL = _each(3, 2, 1)
_STRIDE = _each(2, 1, 3)
_PADDING = _each(1, 0, 1)


def _conv(axes: int) -> list[LayerList]:
    return [
        [conv(5, padding=0)],
        [
            conv(
                5,
                kernel_size=_KERNEL(axes),
                stride=_STRIDE(axes),
                padding=_each(1, 2, 0)(axes),
                dilation=_each(2, 1, 1)(axes),
            )
        ],
        [conv(5, kernel_size=_each(4, 3, 2)(axes), padding="same", dilation=_each(1, 2, 1)(axes), bias=False)],
        [conv(12, padding="valid", groups=4)],
        [conv(16, groups="depthwise", stride=2)],
        [conv(8, groups=8, bias=False, in_channels=8)],
    ]


def _conv_transpose(axes: int) -> list[LayerList]:
    return [
        [layer("conv_transpose", out_channels=5, kernel_size=3)],
        [
            layer(
                "conv_transpose",
                out_channels=6,
                kernel_size=_KERNEL(axes),
                stride=2,
                padding=_PADDING(axes)[:1] + [0] * (axes - 1),
                output_padding=1,
                groups=2,
            )
        ],
        [
            layer(
                "conv_transpose",
                out_channels=16,
                kernel_size=2,
                stride=_STRIDE(axes),
                groups="depthwise",
                bias=False,
                padding="valid",
            )
        ],
        [layer("conv_transpose", out_channels=4, kernel_size=2, dilation=_each(3, 1, 2)(axes), in_channels=8)],
    ]


def _pools(kind: str, axes: int) -> list[LayerList]:
    more = {"count_include_pad": False} if kind == "avg_pool" else {}
    return [
        [layer(kind, kernel_size=2)],
        [layer(kind, kernel_size=3, stride=2, padding=1, ceil_mode=True, **more)],
        [layer(kind, kernel_size=_KERNEL(axes), stride=_STRIDE(axes), padding=[1, 1, 0][:axes], ceil_mode=True)],
        [layer(kind, kernel_size=1, stride=_STRIDE(axes))],
    ]


def _same(kind: str, **fields: Any) -> Callable[[int], list[LayerList]]:
    """Samples of a layer that takes any shape: after a convolution, and on flat features."""
    return lambda axes: [
        [conv(6), layer(kind, **fields)],
        [layer("flatten"), layer("linear", out_features=6), layer(kind, **fields)],
    ]


def _pad(axes: int) -> list[LayerList]:
    flat = [layer("flatten"), layer("pad", padding=[1, 2])]
    spatial = [
        layer("pad", padding=[1, 2, 0, 3, 2, 1][: 2 * axes], mode=mode) for mode in ("reflect", "replicate", "circular")
    ]
    channels = layer("pad", padding=[0, 0] * axes + [3, 1])
    return [
        flat,
        [channels],
        [layer("pad", padding=2, value=-1.5)],
        [layer("pad", padding=[2, 1])],
        *([one] for one in spatial),
    ]


def _residual(axes: int) -> list[LayerList]:
    narrow, wide = [conv(8), layer("relu"), conv(8)], [conv(12, stride=2), layer("batch_norm"), layer("relu"), conv(12)]
    flat = [layer("linear", out_features=6)]
    return [
        [layer("residual", layers=narrow), layer("residual", layers=wide)],
        [
            layer("residual", layers=narrow, shortcut="projection"),
            layer("residual", layers=narrow, shortcut="identity"),
        ],
        [
            layer("residual", layers=wide, shortcut="pad"),
            layer("residual", layers=narrow, shortcut="pad", inputs=["input"]),
        ][:1],
        [layer("residual", layers=[conv(8, stride=_STRIDE(axes))], shortcut="pad")],
        [layer("flatten"), layer("residual", layers=flat), layer("residual", layers=flat)],
    ]


def _squeeze_excite(axes: int) -> list[LayerList]:
    return [
        [layer("squeeze_excite")],
        [conv(6), layer("squeeze_excite", channels=3, gate="hardsigmoid")],
        [layer("squeeze_excite", ratio=0.01)],
    ]


def _repeat(axes: int) -> list[LayerList]:
    block = [conv(6), layer("residual", layers=[layer("batch_norm"), layer("relu"), conv(6)])]
    return [[layer("repeat", times=2, layers=[layer("repeat", times=2, layers=block)])]]


def _merge(kind: str) -> Callable[[int], list[LayerList]]:
    def samples(axes: int) -> list[LayerList]:
        branches = [conv(6, name="a"), conv(6, name="b", inputs=["input"]), conv(6, name="c", inputs=["input"])]
        return [[*branches, layer(kind, inputs=["a", "b", "c"])], [conv(6), layer(kind, inputs=["conv1", "conv1"])]]

    return samples


def _multiply(axes: int) -> list[LayerList]:
    one_map = [conv(1, name="map"), layer("sigmoid"), layer("multiply", inputs=["sigmoid1", "input"])]
    means = [layer("global_avg_pool"), layer("multiply", inputs=["input", "global_avg_pool1"])]
    return [*_merge("multiply")(axes), one_map, means]


def _concat(axes: int) -> list[LayerList]:
    return [*_merge("concat")(axes), [conv(3), layer("concat", inputs=["input", "conv1"])]]


def _upsample(axes: int) -> list[LayerList]:
    smooth = ("linear", "bilinear", "trilinear")[axes - 1]
    return [[layer("upsample", scale_factor=_each(2, 3, 1)(axes))], [layer("upsample", scale_factor=2, mode=smooth)]]


SAMPLES: dict[str, Callable[[int], list[LayerList]]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": lambda axes: [
        [layer("flatten"), layer("linear", out_features=5)],
        [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=5, bias=False, in_features=8)],
    ],
    "batch_norm": _same("batch_norm", eps=1e-3, momentum=0.3),
    "group_norm": _same("group_norm", num_groups=3),
    "layer_norm": _same("layer_norm", eps=1e-3),
    "relu": _same("relu"),
    "relu6": _same("relu6"),
    "leaky_relu": _same("leaky_relu", negative_slope=0.2),
    "silu": _same("silu"),
    "gelu": _same("gelu"),
    "hardswish": _same("hardswish"),
    "hardsigmoid": _same("hardsigmoid"),
    "sigmoid": _same("sigmoid"),
    "tanh": _same("tanh"),
    "softmax": _same("softmax"),
    "prelu": _same("prelu"),
    "max_pool": lambda axes: [*_pools("max_pool", axes), [conv(6), layer("relu"), layer("max_pool", kernel_size=2)]],
    "avg_pool": lambda axes: _pools("avg_pool", axes),
    "global_avg_pool": lambda axes: [[layer("global_avg_pool")]],
    "upsample": _upsample,
    "dropout": _same("dropout", p=0.25),
    "spatial_dropout": lambda axes: [[layer("spatial_dropout", p=0.25)]],
    "flatten": lambda axes: [[layer("flatten")], [layer("flatten"), layer("flatten")]],
    "slice": lambda axes: [[layer("slice", start=2, stop=5)], [layer("flatten"), layer("slice", stop=3)]],
    "channel_shuffle": _same("channel_shuffle", groups=2),
    "pad": _pad,
    "add": _merge("add"),
    "multiply": _multiply,
    "concat": _concat,
    "residual": _residual,
    "squeeze_excite": _squeeze_excite,
    "repeat": _repeat,
}
