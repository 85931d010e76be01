"""One tiny network for every way in which layers can be put together, in the job language."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from worker.network import Network, build_network

CLASSES = 3

Layers = list[dict[str, Any]]


def conv(channels: int, kernel: int | list[int] = 3, **more: Any) -> dict[str, Any]:
    """A convolution that keeps the size (stride 1, odd kernel), unless told otherwise."""
    return {"type": "conv", "out_channels": channels, "kernel_size": kernel, "padding": "same", **more}


def layer(kind: str, **more: Any) -> dict[str, Any]:
    """A layer of this type."""
    return {"type": kind, **more}


HEAD: Layers = [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=CLASSES)]
PICTURE = (3, 8, 8)

TOPOLOGIES: dict[str, tuple[tuple[int, ...], Layers]] = {
    "chain": (
        (1, 8, 8),
        [
            *[conv(4), layer("batch_norm"), layer("relu"), layer("max_pool", kernel_size=2)],
            *[conv(5, bias=False), layer("batch_norm", eps=1e-3), layer("relu"), layer("dropout", p=0.3)],
            *[layer("flatten"), layer("linear", out_features=6), layer("batch_norm"), layer("tanh")],
            *[layer("linear", out_features=CLASSES, bias=False)],
        ],
    ),
    "residual": (
        PICTURE,
        [
            *[conv(4), layer("residual", layers=[conv(4), layer("batch_norm"), layer("relu"), conv(4)]), layer("relu")],
            layer("residual", layers=[conv(6, 3, stride=2, padding=1), layer("batch_norm")]),
            layer("residual", shortcut="pad", layers=[conv(8, 3, stride=2, padding=1), layer("batch_norm")]),
            *HEAD,
        ],
    ),
    "pre-activation": (
        PICTURE,
        [conv(4), layer("residual", layers=[layer("batch_norm"), layer("relu"), conv(4)]), layer("batch_norm"), *HEAD],
    ),
    "dense": (
        PICTURE,
        [
            conv(4, name="stem"),
            conv(3, name="one"),
            layer("concat", inputs=["stem", "one"], name="two"),
            layer("batch_norm"),
            conv(3, name="three"),
            layer("concat", inputs=["two", "three", "stem"]),
            *HEAD,
        ],
    ),
    "depthwise": (
        PICTURE,
        [
            conv(6, 1),
            layer("batch_norm"),
            layer("relu6"),
            conv(12, 3, groups="depthwise"),
            layer("batch_norm"),
            layer("relu6"),
            layer("squeeze_excite"),
            layer("squeeze_excite", channels=3, gate="hardsigmoid"),
            conv(4, 1, bias=False),
            layer("batch_norm"),
            layer("hardswish"),
            *HEAD,
        ],
    ),
    "shuffle": (
        PICTURE,
        [
            conv(8, 1, name="stem"),
            layer("slice", stop=4, name="left", inputs=["stem"]),
            layer("slice", start=4, stop=8, name="right", inputs=["stem"]),
            conv(4, 3, groups=2, name="branch"),
            layer("concat", inputs=["left", "branch"]),
            layer("channel_shuffle", groups=2),
            *HEAD,
        ],
    ),
    "transposed": (
        (2, 6, 5),
        [
            conv(4, [3, 5], padding=[1, 2], stride=[2, 1]),
            layer("silu"),
            layer("conv_transpose", out_channels=6, kernel_size=3, stride=2, padding=1, output_padding=1, groups=2),
            layer("batch_norm"),
            layer("gelu"),
            layer("conv_transpose", out_channels=3, kernel_size=[2, 3], dilation=[1, 2], bias=False),
            layer("batch_norm"),
            layer("leaky_relu", negative_slope=0.2),
            *HEAD,
        ],
    ),
    "norms": (
        PICTURE,
        [
            *[conv(6), layer("group_norm", num_groups=3), layer("prelu"), conv(4, 2), layer("layer_norm", eps=1e-3)],
            *[layer("softmax"), layer("flatten"), layer("linear", out_features=6), layer("layer_norm"), layer("prelu")],
            *[layer("group_norm", num_groups=2), layer("linear", out_features=CLASSES)],
        ],
    ),
    "pools": (
        (2, 9, 8),
        [
            layer("avg_pool", kernel_size=3, stride=2, padding=1, ceil_mode=True),
            layer("upsample", scale_factor=2),
            layer("max_pool", kernel_size=[3, 2], stride=2, padding=1, ceil_mode=True),
            layer("upsample", scale_factor=[2, 3], mode="bilinear"),
            layer("avg_pool", kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
            layer("avg_pool", kernel_size=2, stride=1, padding=1),
            layer("max_pool", kernel_size=1, stride=2),
            *HEAD,
        ],
    ),
    "pads": (
        (2, 6, 5),
        [
            layer("pad", padding=1, value=0.5),
            layer("pad", padding=[1, 2, 0, 1], mode="reflect"),
            layer("pad", padding=[0, 1, 2, 0], mode="replicate"),
            layer("pad", padding=[1, 1], mode="constant"),
            layer("pad", padding=[2, 1, 1, 1], mode="circular"),
            layer("pad", padding=[0, 0, 0, 0, 1, 2]),
            conv(4, 3, padding="valid", dilation=2),
            layer("sigmoid"),
            *HEAD,
        ],
    ),
    "products": (
        PICTURE,
        [
            conv(4, name="a"),
            conv(4, inputs=["input"], name="b"),
            conv(1, inputs=["input"], name="map"),
            layer("multiply", inputs=["a", "b", "map"], name="product"),
            layer("add", inputs=["a", "product", "b", "b"]),
            layer("spatial_dropout", p=0.2),
            layer("hardsigmoid"),
            *HEAD,
        ],
    ),
    "sound": (
        (2, 16),
        [
            *[conv(4), layer("batch_norm"), layer("relu"), layer("spatial_dropout"), layer("max_pool", kernel_size=2)],
            *[
                layer("residual", layers=[conv(5), layer("batch_norm")]),
                layer("upsample", scale_factor=2, mode="linear"),
            ],
            *[layer("conv_transpose", out_channels=4, kernel_size=2, stride=2), layer("layer_norm")],
            *[layer("pad", padding=[2, 1], mode="circular"), layer("avg_pool", kernel_size=3, ceil_mode=True), *HEAD],
        ],
    ),
    "video": (
        (1, 4, 6, 6),
        [
            *[conv(3), layer("batch_norm"), layer("relu"), layer("max_pool", kernel_size=[1, 2, 2])],
            *[conv(4, [1, 3, 3], groups=1), layer("group_norm", num_groups=2), layer("spatial_dropout"), layer("relu")],
            *[layer("upsample", scale_factor=[1, 2, 2], mode="trilinear"), layer("pad", padding=1, mode="reflect")],
            *[layer("conv_transpose", out_channels=4, kernel_size=2, groups=2), layer("batch_norm"), *HEAD],
        ],
    ),
    "shared": (
        PICTURE,
        [
            *[conv(4, name="stem"), layer("prelu", name="bent")],
            *[conv(6, name="one", bias=False), layer("batch_norm"), layer("relu"), layer("max_pool", kernel_size=2)],
            *[conv(4, 1, name="back"), layer("prelu", shares="bent"), layer("conv", shares="one"), layer("batch_norm")],
            *[layer("conv", shares="back", name="end"), layer("group_norm", num_groups=2, name="normal")],
            *[conv(4, 3, name="wide", groups="depthwise"), layer("group_norm", shares="normal"), layer("sigmoid")],
            *[layer("upsample", scale_factor=2), layer("conv", shares="wide"), layer("tanh"), *HEAD],
        ],
    ),
    "shared in residuals": (
        PICTURE,
        [
            conv(6, name="stem"),
            layer("residual", layers=[conv(6, name="turn", groups=2), layer("batch_norm"), layer("relu")]),
            layer("repeat", times=2, layers=[layer("residual", layers=[layer("conv", shares="residual1_turn")])]),
            layer("relu"),
            layer("residual", layers=[layer("conv", shares="stem", inputs=["input"]), layer("batch_norm")]),
            layer("conv_transpose", out_channels=6, kernel_size=2, groups=2, name="up"),
            layer("silu"),
            layer("conv_transpose", shares="up", name="again"),
            *HEAD,
        ],
    ),
    "one head for two branches": (
        (2, 6, 6),
        [
            *[conv(4, name="left"), layer("relu"), layer("max_pool", kernel_size=3), layer("flatten", name="a")],
            *[layer("linear", out_features=5, name="hidden"), layer("layer_norm", name="normal"), layer("relu")],
            *[layer("linear", out_features=CLASSES, name="head")],
            *[conv(8, 2, padding=0, stride=2, inputs=["input"]), layer("batch_norm"), layer("avg_pool", kernel_size=2)],
            *[layer("pad", padding=[0, 1]), layer("flatten"), layer("linear", shares="hidden")],
            *[layer("layer_norm", shares="normal"), layer("tanh"), layer("linear", shares="head", name="other")],
            layer("add", inputs=["head", "other"]),
        ],
    ),
}


def topology(name: str) -> Graph:
    """The graph of one of `TOPOLOGIES`."""
    input_shape, layers = TOPOLOGIES[name]
    return build_graph(read_layers(layers), input_shape, classes=CLASSES)


def trained(graph: Graph, seed: int = 0) -> Network:
    """A network in eval mode whose every tensor, running statistics included, looks as after a training."""
    network = build_network(graph, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith(("bias", "running_mean")):
                tensor.uniform_(-0.5, 0.5, generator=generator)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def pictures(graph: Graph, count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Random inputs of a graph, float32 `N x C x ...`."""
    return np.random.default_rng(seed).standard_normal((count, *graph.input_shape), np.float32)
