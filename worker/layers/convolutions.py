"""The layers that multiply, in torch, ONNX and source: convolutions, transposed convolutions, linear layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from app.network.layers.convolutions import Conv, ConvTranspose, Linear
from app.network.node import Node
from worker.layers.onnx_operators import OnnxWriter
from worker.layers.rule import LayerRule
from worker.layers.source_text import Attribute, call_attribute, geometry_arguments

_CONV: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}

# --- convolutions ---


def _conv_module(layer: Conv, node: Node) -> nn.Module:
    same = layer.padding == "same"
    padding = "same" if same else tuple(before for before, _ in layer.paddings(node.axes))
    module: nn.Module = _CONV[node.axes - 1](padding=padding, **_torch_arguments(layer, node))
    return module


def _conv_onnx(layer: Conv, node: Node, writer: OnnxWriter) -> None:
    paddings = layer.paddings(node.axes)
    pads = [before for before, _ in paddings] + [after for _, after in paddings]
    inputs = [*writer.inputs(node), *writer.weights(node)]
    writer.output(node, "Conv", inputs, pads=pads, **_onnx_attributes(layer, node))


def _conv_attribute(layer: Conv, node: Node) -> Attribute:
    if layer.padding == "same":
        arguments = [*_width_arguments(layer, node, {}), 'padding="same"']
    else:
        paddings = {"padding": [before for before, _ in layer.paddings(node.axes)]}
        arguments = _width_arguments(layer, node, paddings)
    return Attribute(f"Conv{node.axes}d", arguments + _group_arguments(layer, node))


def _conv_fan_in(layer: Conv, node: Node) -> float:
    """Products with padding are zero and not counted.

    On small maps that matters: a 3 x 3 window on 2 x 2 positions meets 4 of its 9.
    """
    axes, weight = node.axes, node.tensors["weight"].shape
    geometry = (layer.strides(axes), layer.dilations(axes), layer.paddings(axes))
    met = 1.0
    for size, given, kernel, stride, dilation, (before, _) in zip(
        node.input_shapes[0][1:], node.shape[1:], weight[2:], *geometry, strict=True
    ):
        meetings = 0
        for tap in range(kernel):
            offset = tap * dilation - before  # output o meets position o * stride + offset
            first = max(0, -(offset // stride))
            last = min(given - 1, (size - 1 - offset) // stride)
            meetings += max(0, last - first + 1)
        met *= meetings / given
    return weight[1] * met


# --- transposed convolutions ---


def _conv_transpose_module(layer: ConvTranspose, node: Node) -> nn.Module:
    axes = node.axes
    module: nn.Module = _CONV_TRANSPOSE[axes - 1](
        padding=layer.paddings(axes), output_padding=layer.output_paddings(axes), **_torch_arguments(layer, node)
    )
    return module


def _conv_transpose_onnx(layer: ConvTranspose, node: Node, writer: OnnxWriter) -> None:
    inputs = [*writer.inputs(node), *writer.weights(node)]
    paddings, more = layer.paddings(node.axes), layer.output_paddings(node.axes)
    attributes = _onnx_attributes(layer, node)
    writer.output(node, "ConvTranspose", inputs, pads=paddings * 2, output_padding=more, **attributes)


def _conv_transpose_attribute(layer: ConvTranspose, node: Node) -> Attribute:
    paddings = {"padding": layer.paddings(node.axes), "output_padding": layer.output_paddings(node.axes)}
    arguments = _width_arguments(layer, node, paddings) + _group_arguments(layer, node)
    return Attribute(f"ConvTranspose{node.axes}d", arguments)


def _conv_transpose_fan_in(layer: ConvTranspose, node: Node) -> float:
    """On average over the positions of the output."""
    taps = math.prod(node.tensors["weight"].shape[2:]) / math.prod(layer.strides(node.axes))
    return max(1.0, node.in_channels / layer.group_count(node.in_channels) * taps)


# --- both ---


def _torch_arguments(layer: Conv | ConvTranspose, node: Node) -> dict[str, Any]:
    return {
        "in_channels": node.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel(node.axes),
        "stride": layer.strides(node.axes),
        "dilation": layer.dilations(node.axes),
        "groups": layer.group_count(node.in_channels),
        "bias": layer.bias,
    }


def _onnx_attributes(layer: Conv | ConvTranspose, node: Node) -> dict[str, Any]:
    return {
        "kernel_shape": layer.kernel(node.axes),
        "strides": layer.strides(node.axes),
        "dilations": layer.dilations(node.axes),
        "group": layer.group_count(node.in_channels),
    }


def _width_arguments(layer: Conv | ConvTranspose, node: Node, paddings: Mapping[str, Sequence[int]]) -> list[str]:
    """Both widths, then what is not torch's default of kernel, stride, `paddings` and dilation."""
    sizes: dict[str, Sequence[int]] = {"kernel_size": layer.kernel(node.axes), "stride": layer.strides(node.axes)}
    sizes |= {**paddings, "dilation": layer.dilations(node.axes)}
    return [str(node.in_channels), str(layer.out_channels), *geometry_arguments(sizes, _DEFAULTS)]


def _group_arguments(layer: Conv | ConvTranspose, node: Node) -> list[str]:
    groups = layer.group_count(node.in_channels)
    return [*([f"groups={groups}"] if groups != 1 else []), *([] if layer.bias else ["bias=False"])]


# --- linear layers ---


def _linear_module(layer: Linear, node: Node) -> nn.Module:
    return nn.Linear(node.in_channels, layer.out_features, bias=layer.bias)


def _linear_onnx(layer: Linear, node: Node, writer: OnnxWriter) -> None:
    writer.output(node, "Gemm", [*writer.inputs(node), *writer.weights(node)], transB=1)


def _linear_attribute(layer: Linear, node: Node) -> Attribute:
    arguments = [str(node.in_channels), str(layer.out_features)]
    return Attribute("Linear", arguments + ([] if layer.bias else ["bias=False"]))


def _linear_fan_in(layer: Linear, node: Node) -> float:
    return node.in_channels


CONVOLUTION_RULES = (
    LayerRule(
        Conv,
        module=_conv_module,
        onnx=_conv_onnx,
        source=call_attribute,
        attribute=_conv_attribute,
        fan_in=_conv_fan_in,
    ),
    LayerRule(
        ConvTranspose,
        module=_conv_transpose_module,
        onnx=_conv_transpose_onnx,
        source=call_attribute,
        attribute=_conv_transpose_attribute,
        fan_in=_conv_transpose_fan_in,
    ),
    LayerRule(
        Linear,
        module=_linear_module,
        onnx=_linear_onnx,
        source=call_attribute,
        attribute=_linear_attribute,
        fan_in=_linear_fan_in,
    ),
)
