"""Batch norm folded into the layer before it: one operator less, the same function in eval mode.

Axes: O out, I in, G groups, k kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from app.compression.norm_folding import folded_norms
from app.network.graph import Graph
from app.network.layers.convolutions import ConvTranspose
from app.network.layers.normalization import BatchNorm
from app.network.node import Node

Tensors = Mapping[str, NDArray[np.float32]]


def fold_batch_norms(graph: Graph, tensors: Tensors) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
    """The graph and its tensors (float32, by key) without the batch norms that alone read a conv or linear layer.

    With running statistics, y = (x - mean) * a + beta, a = gamma / sqrt(var + eps): the layer's weights are multiplied
    by `a` on their output axis and its bias becomes (b - mean) * a + beta, computed in float64 (the result differs from
    two steps by float32's rounding, 5e-7 measured). Others stay: before a convolution (padding and activations are
    between), after a concat, and after a layer whose parameters are used at another place too. The folded layer keeps
    its name. Neither argument is changed.
    """
    folded = dict(tensors)
    taken_by = folded_norms(graph)
    nodes: dict[str, Node] = {}
    for node in graph.nodes:
        if node.name in taken_by:
            assert isinstance(node.layer, BatchNorm)
            before = nodes[taken_by[node.name]]
            nodes[before.name] = replace(before, layer=before.layer.model_copy(update={"bias": True}))
            _fold(before, node.name, node.layer.eps, folded)
        else:
            nodes[node.name] = replace(node, inputs=tuple(taken_by.get(name, name) for name in node.inputs))
    return Graph(graph.input_shape, tuple(nodes.values())), folded


def _fold(layer: Node, norm: str, eps: float, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Put the batch norm `norm` into the tensors of the layer before it."""
    statistics = [tensors.pop(f"{norm}.{name}") for name in ("weight", "bias", "running_mean", "running_var")]
    gamma_O, beta_O, mean_O, var_O = (values.astype(np.float64) for values in statistics)
    factor_O = gamma_O / np.sqrt(var_O + eps)
    weight = tensors[f"{layer.name}.weight"].astype(np.float64)
    bias_O = tensors.get(f"{layer.name}.bias", np.zeros_like(mean_O)).astype(np.float64)
    if isinstance(layer.layer, ConvTranspose):  # weight is I, O / G, k...: its output axis is one group's
        groups = layer.layer.group_count(layer.input_shapes[0][0])
        weight_GIOk = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        scaled = (weight_GIOk * factor_O.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    else:
        scaled = weight * factor_O.reshape(-1, *[1] * (weight.ndim - 1))
    tensors[f"{layer.name}.weight"] = scaled.astype(np.float32)
    tensors[f"{layer.name}.bias"] = ((bias_O - mean_O) * factor_O + beta_O).astype(np.float32)
