"""What 8-bit integers can do for a network: which layers ONNX Runtime computes with them, and why the others stay.

The table is the result of trials: a test quantizes every layer of the job language and checks what the runtime does with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from app.compression.norm_folding import folded_norms
from app.network.blocks import WEIGHTED
from app.network.graph import Graph
from app.network.layers.pooling import Upsample
from app.network.node import Node

INTEGER = frozenset({"conv", "linear"})
"""Layers whose multiply-accumulates are done with integers of 8 bits; they decide whether there is a gain at all."""
_EXCLUDED = "excluded"
_NO_KERNEL = "ONNX Runtime has no 8-bit kernel for it"
FLOAT_REASONS: Mapping[str, str | None] = {
    "conv_transpose": _NO_KERNEL,
    "batch_norm": f"{_NO_KERNEL}, and it cannot be folded into the layer before it",
    "group_norm": _NO_KERNEL,
    "layer_norm": _NO_KERNEL,
    "prelu": _NO_KERNEL,
    "gelu": _NO_KERNEL,
    "hardswish": _NO_KERNEL,
    "hardsigmoid": _NO_KERNEL,
    "tanh": _NO_KERNEL,
    "upsample": _NO_KERNEL,
    "pad": _NO_KERNEL,
    # Computed with integers.
    **dict.fromkeys(INTEGER),
    # Computed with 8 bits where the layers around them are.
    **dict.fromkeys(("relu", "relu6", "leaky_relu", "sigmoid", "silu", "softmax", "channel_shuffle", "slice")),
    **dict.fromkeys(("max_pool", "avg_pool", "global_avg_pool", "flatten", "add", "multiply", "concat")),
    # Not in the file.
    **dict.fromkeys(("dropout", "spatial_dropout")),
}
"""Of every type of layer why it stays in float32, or None where it does not or where that costs nothing."""


def integer_layers(graph: Graph, exclude: Collection[str] = ()) -> tuple[Node, ...]:
    """The convolutions and linear layers that are quantized, but for those excluded; with all that share their weights."""
    return tuple(node for node in graph.nodes if node.type in INTEGER and node.home not in exclude)


def float_layers(graph: Graph, exclude: Collection[str] = ()) -> dict[str, str]:
    """The layers that stay in float32, each with the reason; those that cost nothing in any format are not named."""
    folded = folded_norms(graph)
    left = {}
    for node in graph.nodes:
        if node.type in WEIGHTED and node.home in exclude:
            left[node.name] = _EXCLUDED
        elif (reason := FLOAT_REASONS[node.type]) is not None and node.name not in folded and not _copies(node):
            left[node.name] = reason
    return left


def _copies(node: Node) -> bool:
    """Whether the layer only copies values: the runtime does that with 8 bits too."""
    return isinstance(node.layer, Upsample) and node.layer.mode == "nearest"
