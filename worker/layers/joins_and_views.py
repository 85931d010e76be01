"""The layers that join branches or arrange channels and positions, in torch, ONNX and source.

Axes: N batch, C channels, x spatial.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from app.network.layers.joins_and_views import Add, ChannelShuffle, Concat, Flatten, Multiply, Pad, Slice
from app.network.node import Node
from worker.layers.onnx_operators import OnnxWriter, one_operator, pairwise_operator
from worker.layers.rule import LayerRule
from worker.layers.source_text import INDENT, LINE_LENGTH, Expression, call, join_lines, tuple_text

_ONNX_PADDING = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}

# --- joins ---


class Sum(nn.Module):
    """The sum of its inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs of one shape -> the same shape."""
        total = inputs[0] + inputs[1]
        for value in inputs[2:]:
            total = total + value
        return total


class Product(nn.Module):
    """The product of its inputs; axes of size 1 are stretched."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs that broadcast -> their common shape."""
        product = inputs[0] * inputs[1]
        for value in inputs[2:]:
            product = product * value
        return product


class Join(nn.Module):
    """Its inputs one after the other along the channels."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """N x Ci x ... -> N x (sum of Ci) x ..."""
        return torch.cat(inputs, dim=1)


def _add_module(layer: Add, node: Node) -> nn.Module:
    return Sum()


def _add_source(layer: Add, node: Node, inputs: Sequence[str]) -> Expression:
    return _joined_source(inputs, "+")


def _multiply_module(layer: Multiply, node: Node) -> nn.Module:
    return Product()


def _multiply_source(layer: Multiply, node: Node, inputs: Sequence[str]) -> Expression:
    return _joined_source(inputs, "*")


def _joined_source(inputs: Sequence[str], sign: str) -> Expression:
    """`a + b + c`; in parentheses with a line for each where they do not fit on one."""
    line = f" {sign} ".join(inputs)
    if len(line) <= LINE_LENGTH - 20:
        return Expression(line)
    first, *rest = inputs
    lines = [f"{INDENT}    {first}", *(f"{INDENT}    {sign} {name}" for name in rest)]
    return Expression("(\n" + "\n".join(lines) + f"\n{INDENT})")


def _concat_module(layer: Concat, node: Node) -> nn.Module:
    return Join()


def _concat_source(layer: Concat, node: Node, inputs: Sequence[str]) -> Expression:
    """`torch.cat([a, b], dim=1)`; the list has a line for each input where they do not fit on one."""
    listed = join_lines("[", inputs, "]", INDENT + "    ")
    return call("torch.cat", "\n".join(listed).strip(), "dim=1")


# --- flattening and slicing ---


class Channels(nn.Module):
    """The channels [start, stop)."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> N x (stop - start) x ..."""
        return value_NCx[:, self.start : self.stop]


def _flatten_module(layer: Flatten, node: Node) -> nn.Module:
    return nn.Flatten()


def _flatten_source(layer: Flatten, node: Node, inputs: Sequence[str]) -> Expression:
    return call("torch.flatten", inputs[0], "1")


def _slice_module(layer: Slice, node: Node) -> nn.Module:
    return Channels(layer.start, layer.stop)


def _slice_onnx(layer: Slice, node: Node, writer: OnnxWriter) -> None:
    numbers = (("start", layer.start), ("stop", layer.stop), ("axis", 1))
    limits = [writer.sizes(node, name, [value]) for name, value in numbers]
    writer.output(node, "Slice", [*writer.inputs(node), *limits])


def _slice_source(layer: Slice, node: Node, inputs: Sequence[str]) -> Expression:
    return Expression(f"{inputs[0]}[:, {layer.start}:{layer.stop}]")


# --- shuffling ---


class Shuffle(nn.Module):
    """Channel a * (C / groups) + j goes to j * groups + a (torch.nn.ChannelShuffle, which refuses flat inputs)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> the same shape."""
        batch, channels, *sizes = value_NCx.shape
        blocks = value_NCx.reshape(batch, self.groups, channels // self.groups, *sizes)
        return blocks.transpose(1, 2).flatten(1, 2)


def _shuffle_module(layer: ChannelShuffle, node: Node) -> nn.Module:
    return Shuffle(layer.groups)


def _shuffle_onnx(layer: ChannelShuffle, node: Node, writer: OnnxWriter) -> None:
    channels, *spatial = node.shape
    blocks = writer.sizes(node, "blocks", [0, layer.groups, channels // layer.groups, *spatial])
    apart = writer.between(node, "Reshape", [*writer.inputs(node), blocks])
    turned = writer.between(node, "Transpose", [apart], perm=[0, 2, 1, *range(3, 3 + len(spatial))])
    writer.output(node, "Reshape", [turned, writer.sizes(node, "shape", [0, channels, *spatial])])


def _shuffle_source(layer: ChannelShuffle, node: Node, inputs: Sequence[str]) -> Expression:
    return Expression(f"{inputs[0]}.unflatten(1, ({layer.groups}, -1)).transpose(1, 2).flatten(1, 2)")


# --- padding ---


class Padding(nn.Module):
    """torch.nn.functional.pad with `amounts` in its order."""

    def __init__(self, amounts: tuple[int, ...], mode: str, value: float) -> None:
        super().__init__()
        self.amounts = amounts
        self.mode = mode
        self.value = value

    def forward(self, value_NCx: Tensor) -> Tensor:
        """Every axis longer by its amounts."""
        return nn.functional.pad(
            value_NCx, self.amounts, mode=self.mode, value=self.value if self.mode == "constant" else None
        )


def _torch_amounts(layer: Pad, node: Node) -> tuple[int, ...]:
    """The amounts in PyTorch's order: the last axis first. Only zeros and other constants can pad channels."""
    amounts = tuple(amount for pair in reversed(layer.amounts(node.input_shapes[0])) for amount in pair)
    return amounts if layer.mode == "constant" else amounts[: 2 * node.axes]


def _pad_module(layer: Pad, node: Node) -> nn.Module:
    return Padding(_torch_amounts(layer, node), layer.mode, layer.value)


def _pad_onnx(layer: Pad, node: Node, writer: OnnxWriter) -> None:
    amounts = layer.amounts(node.input_shapes[0])
    pads = writer.sizes(node, "pads", [0, *(before for before, _ in amounts), 0, *(after for _, after in amounts)])
    value = [writer.constant(node, "value", np.asarray(layer.value, np.float32))] if layer.mode == "constant" else []
    writer.output(node, "Pad", [*writer.inputs(node), pads, *value], mode=_ONNX_PADDING[layer.mode])


def _pad_source(layer: Pad, node: Node, inputs: Sequence[str]) -> Expression:
    amounts = tuple_text(_torch_amounts(layer, node))
    if layer.mode != "constant":
        return call("F.pad", inputs[0], amounts, f'mode="{layer.mode}"')
    return call("F.pad", inputs[0], amounts, *([f"value={layer.value!r}"] if layer.value else []))


JOIN_AND_VIEW_RULES = (
    LayerRule(Add, module=_add_module, onnx=pairwise_operator("Add"), source=_add_source),
    LayerRule(Multiply, module=_multiply_module, onnx=pairwise_operator("Mul"), source=_multiply_source),
    LayerRule(Concat, module=_concat_module, onnx=one_operator("Concat", axis=1), source=_concat_source),
    LayerRule(Flatten, module=_flatten_module, onnx=one_operator("Flatten", axis=1), source=_flatten_source),
    LayerRule(Slice, module=_slice_module, onnx=_slice_onnx, source=_slice_source),
    LayerRule(ChannelShuffle, module=_shuffle_module, onnx=_shuffle_onnx, source=_shuffle_source),
    LayerRule(Pad, module=_pad_module, onnx=_pad_onnx, source=_pad_source),
)
