"""The layers that normalise, in torch, ONNX and source. Axes: N batch, C channels, G groups, x spatial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from app.network.layers.normalization import BatchNorm, GroupNorm, LayerNorm
from app.network.node import Node
from worker.layers.onnx_operators import OnnxWriter
from worker.layers.rule import LayerRule
from worker.layers.source_text import Attribute, Expression, call_attribute

_BATCH_NORM: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels at each position."""

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> the same shape."""
        return super().forward(value_NCx.movedim(1, -1)).movedim(-1, 1)


def _eps_argument(eps: float) -> list[str]:
    return [f"eps={eps!r}"] if eps != 1e-5 else []


def _batch_norm_module(layer: BatchNorm, node: Node) -> nn.Module:
    kind = _BATCH_NORM[max(1, node.axes) - 1]
    module: nn.Module = kind(node.in_channels, eps=layer.eps, momentum=layer.momentum)
    return module


def _batch_norm_onnx(layer: BatchNorm, node: Node, writer: OnnxWriter) -> None:
    writer.output(node, "BatchNormalization", [*writer.inputs(node), *writer.weights(node)], epsilon=layer.eps)


def _batch_norm_attribute(layer: BatchNorm, node: Node) -> Attribute:
    arguments = [str(node.in_channels), *_eps_argument(layer.eps)]
    arguments += [f"momentum={layer.momentum!r}"] if layer.momentum != 0.1 else []
    return Attribute(f"BatchNorm{max(1, node.axes)}d", arguments)


def _group_norm_module(layer: GroupNorm, node: Node) -> nn.Module:
    return nn.GroupNorm(layer.num_groups, node.in_channels, eps=layer.eps)


def _group_norm_onnx(layer: GroupNorm, node: Node, writer: OnnxWriter) -> None:
    """Statistics over each group as an instance norm of N x G x rest, then weight and bias per channel."""
    groups = layer.num_groups
    apart = writer.between(node, "Reshape", [*writer.inputs(node), writer.sizes(node, "grouped", [0, groups, -1])])
    ones = writer.constant(node, "ones", np.ones(groups, np.float32))
    zeros = writer.constant(node, "zeros", np.zeros(groups, np.float32))
    normal = writer.between(node, "InstanceNormalization", [apart, ones, zeros], epsilon=layer.eps)
    whole = writer.between(node, "Reshape", [normal, writer.sizes(node, "shape", [0, *node.shape])])
    weight, bias = writer.per_channel(node, "weight"), writer.per_channel(node, "bias")
    writer.output(node, "Add", [writer.between(node, "Mul", [whole, weight]), bias])


def _group_norm_attribute(layer: GroupNorm, node: Node) -> Attribute:
    return Attribute("GroupNorm", [str(layer.num_groups), str(node.in_channels), *_eps_argument(layer.eps)])


def _layer_norm_module(layer: LayerNorm, node: Node) -> nn.Module:
    return ChannelNorm(node.in_channels, eps=layer.eps)


def _layer_norm_onnx(layer: LayerNorm, node: Node, writer: OnnxWriter) -> None:
    """Over the channels at each position; ONNX wants that axis last."""
    axes, (value,), weights = node.axes, writer.inputs(node), writer.weights(node)
    if not axes:
        writer.output(node, "LayerNormalization", [value, *weights], axis=-1, epsilon=layer.eps)
        return
    last = writer.between(node, "Transpose", [value], perm=[0, *range(2, axes + 2), 1])
    normal = writer.between(node, "LayerNormalization", [last, *weights], axis=-1, epsilon=layer.eps)
    writer.output(node, "Transpose", [normal], perm=[0, axes + 1, *range(1, axes + 1)])


def _layer_norm_source(layer: LayerNorm, node: Node, inputs: Sequence[str]) -> Expression:
    """Over the channels, which nn.LayerNorm wants last."""
    if not node.axes:
        return call_attribute(layer, node, inputs)
    return Expression(f"self.{node.home}(", [f"{inputs[0]}.movedim(1, -1)"], ").movedim(-1, 1)")


def _layer_norm_attribute(layer: LayerNorm, node: Node) -> Attribute:
    return Attribute("LayerNorm", [str(node.in_channels), *_eps_argument(layer.eps)])


NORM_RULES = (
    LayerRule(
        BatchNorm,
        module=_batch_norm_module,
        onnx=_batch_norm_onnx,
        source=call_attribute,
        attribute=_batch_norm_attribute,
    ),
    LayerRule(
        GroupNorm,
        module=_group_norm_module,
        onnx=_group_norm_onnx,
        source=call_attribute,
        attribute=_group_norm_attribute,
    ),
    LayerRule(
        LayerNorm,
        module=_layer_norm_module,
        onnx=_layer_norm_onnx,
        source=_layer_norm_source,
        attribute=_layer_norm_attribute,
    ),
)
