"""What a layer's rule needs to write ONNX operators, without the onnx package: importing that takes 0.3 s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from app.network.layers.layer import Layer
from app.network.node import Node

Write = Callable[[Layer, Node, "OnnxWriter"], None]


class OnnxWriter(Protocol):
    """Collects the operators and initializers of one graph (`worker/export/onnx_model.py`)."""

    def inputs(self, node: Node) -> list[str]:
        """The values that a node reads."""
        ...

    def weights(self, node: Node) -> list[str]:
        """The initializers of all tensors that a node uses, in their order; one for all nodes that share a tensor."""
        ...

    def per_channel(self, node: Node, tensor: str) -> str:
        """The initializer of one tensor (channels), shaped so that it spreads over the node's spatial axes."""
        ...

    def constant(self, node: Node, name: str, array: NDArray[Any]) -> str:
        """An initializer `<node>.<name>` with this content."""
        ...

    def sizes(self, node: Node, name: str, sizes: Sequence[int]) -> str:
        """An initializer `<node>.<name>` with whole numbers."""
        ...

    def between(self, node: Node, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add an operator whose value is not yet the node's output; its value."""
        ...

    def output(self, node: Node, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Add the operator that gives the node's output."""
        ...

    def forward_input(self, node: Node) -> None:
        """Make the node's input its output: it does nothing outside training."""
        ...


def one_operator(kind: str, **attributes: Any) -> Write:
    """The function that writes a layer that is one operator without weights."""
    return lambda layer, node, writer: writer.output(node, kind, writer.inputs(node), **attributes)


def pairwise_operator(kind: str) -> Write:
    """The function that writes a layer that joins its inputs two at a time, from left to right as torch does."""

    def write(layer: Layer, node: Node, writer: OnnxWriter) -> None:
        first, *middle, last = writer.inputs(node)
        for value in middle:
            first = writer.between(node, kind, [first, value])
        writer.output(node, kind, [first, last])

    return write


def no_operator(layer: Layer, node: Node, writer: OnnxWriter) -> None:
    """Write nothing for a layer that does nothing outside training."""
    writer.forward_input(node)
