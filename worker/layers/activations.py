"""Activations and dropout, in torch, ONNX and source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import nn

from app.network.layers.activations import (
    GELU,
    Activation,
    Dropout,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    PReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    SpatialDropout,
    Tanh,
)
from app.network.layers.layer import Layer
from app.network.node import Node
from worker.layers.onnx_operators import OnnxWriter, Write, no_operator, one_operator
from worker.layers.rule import LayerRule
from worker.layers.source_text import Attribute, Expression, call, call_attribute

_SPATIAL_DROPOUT: tuple[Any, ...] = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

AnyActivation = TypeVar("AnyActivation", bound=Activation)


def _rule(
    layer: type[AnyActivation], module: Callable[[], nn.Module], onnx: Write, function: str, *arguments: str
) -> LayerRule[AnyActivation]:
    """The rule of an activation without fields and tensors: a call of `function` with these further arguments."""

    def source(layer: AnyActivation, node: Node, inputs: Sequence[str]) -> Expression:
        return call(function, inputs[0], *arguments)

    return LayerRule(layer, module=lambda layer, node: module(), onnx=onnx, source=source)


def _relu6_onnx(layer: Layer, node: Node, writer: OnnxWriter) -> None:
    low, high = (writer.constant(node, name, np.asarray(end, np.float32)) for name, end in (("low", 0), ("high", 6)))
    writer.output(node, "Clip", [*writer.inputs(node), low, high])


def _silu_onnx(layer: Layer, node: Node, writer: OnnxWriter) -> None:
    (value,) = writer.inputs(node)
    writer.output(node, "Mul", [value, writer.between(node, "Sigmoid", [value])])


def _leaky_relu_module(layer: LeakyReLU, node: Node) -> nn.Module:
    return nn.LeakyReLU(layer.negative_slope)


def _leaky_relu_onnx(layer: LeakyReLU, node: Node, writer: OnnxWriter) -> None:
    writer.output(node, "LeakyRelu", writer.inputs(node), alpha=layer.negative_slope)


def _leaky_relu_source(layer: LeakyReLU, node: Node, inputs: Sequence[str]) -> Expression:
    return call("F.leaky_relu", inputs[0], repr(layer.negative_slope))


def _softmax_module() -> nn.Module:
    return nn.Softmax(dim=1)


def _prelu_module(layer: PReLU, node: Node) -> nn.Module:
    return nn.PReLU(node.in_channels)


def _prelu_onnx(layer: PReLU, node: Node, writer: OnnxWriter) -> None:
    writer.output(node, "PRelu", [*writer.inputs(node), writer.per_channel(node, "weight")])


def _prelu_attribute(layer: PReLU, node: Node) -> Attribute:
    return Attribute("PReLU", [str(node.in_channels)])


def _dropout_module(layer: Dropout, node: Node) -> nn.Module:
    return nn.Dropout(layer.p)


def _dropout_source(layer: Dropout, node: Node, inputs: Sequence[str]) -> Expression:
    return call("F.dropout", inputs[0], repr(layer.p), "self.training")


def _spatial_dropout_module(layer: SpatialDropout, node: Node) -> nn.Module:
    module: nn.Module = _SPATIAL_DROPOUT[node.axes - 1](layer.p)
    return module


def _spatial_dropout_source(layer: SpatialDropout, node: Node, inputs: Sequence[str]) -> Expression:
    return call(f"F.dropout{node.axes}d", inputs[0], repr(layer.p), "self.training")


ACTIVATION_RULES = (
    _rule(ReLU, nn.ReLU, one_operator("Relu"), "F.relu"),
    _rule(ReLU6, nn.ReLU6, _relu6_onnx, "F.relu6"),
    LayerRule(LeakyReLU, module=_leaky_relu_module, onnx=_leaky_relu_onnx, source=_leaky_relu_source),
    _rule(SiLU, nn.SiLU, _silu_onnx, "F.silu"),
    _rule(GELU, nn.GELU, one_operator("Gelu"), "F.gelu"),
    _rule(Hardswish, nn.Hardswish, one_operator("HardSwish"), "F.hardswish"),
    _rule(Hardsigmoid, nn.Hardsigmoid, one_operator("HardSigmoid", alpha=1 / 6, beta=0.5), "F.hardsigmoid"),
    _rule(Sigmoid, nn.Sigmoid, one_operator("Sigmoid"), "torch.sigmoid"),
    _rule(Tanh, nn.Tanh, one_operator("Tanh"), "torch.tanh"),
    _rule(Softmax, _softmax_module, one_operator("Softmax", axis=1), "F.softmax", "dim=1"),
    LayerRule(PReLU, module=_prelu_module, onnx=_prelu_onnx, source=call_attribute, attribute=_prelu_attribute),
    LayerRule(Dropout, module=_dropout_module, onnx=no_operator, source=_dropout_source),
    LayerRule(SpatialDropout, module=_spatial_dropout_module, onnx=no_operator, source=_spatial_dropout_source),
)
