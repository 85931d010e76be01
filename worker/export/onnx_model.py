"""A graph and its weights as one ONNX file: milliseconds, nothing in it but the network; layers by `worker/layers`.

`torch.onnx` would trace the module instead: 3 to 4 s for the first network, absolute paths of this machine in every
node to strip, decompositions to pay for at run time. What is written here is verified in onnxruntime before delivery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from app.network.graph import Graph
from app.network.layers.names import INPUT
from app.network.node import Node
from worker.export.folding import fold_batch_norms
from worker.layers.registry import rule_of

OPSET = 20  # the first with Gelu
IR_VERSION = 10
INPUT_NAME, OUTPUT_NAME, BATCH_AXIS = "images", "logits", "batch"

Array = NDArray[Any]


def onnx_bytes(graph: Graph, tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The ONNX file of a network in eval mode, batch norm folded where it can be; same input, same bytes.

    Input `images`, float32 [batch, C, ...]; output `logits`, float32 [batch, K]; initializers are called as in the
    safetensors file, one for all layers that share it. The largest network that the job language allows (500 M
    parameters) stays below protobuf's 2 GiB.
    """
    graph, tensors = fold_batch_norms(graph, tensors)
    writer = GraphWriter(graph, tensors)
    for node in graph.nodes:
        rule_of(node).onnx(node.layer, node, writer)
    model = writer.model()
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class GraphWriter:
    """Collects the operators and initializers of one graph: the `OnnxWriter` of the layers' rules."""

    def __init__(self, graph: Graph, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self._graph = graph
        self._tensors = tensors
        self._operators: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._values = {INPUT: INPUT_NAME}

    def inputs(self, node: Node) -> list[str]:
        """The values that a node reads."""
        return [self._values[name] for name in node.inputs]

    def weights(self, node: Node) -> list[str]:
        """The initializers of all tensors that a node uses, in their order; one for all nodes that share a tensor."""
        return [self._weight(f"{node.home}.{name}", self._tensors[f"{node.home}.{name}"]) for name in node.uses]

    def per_channel(self, node: Node, tensor: str) -> str:
        """The initializer of one tensor (channels), shaped so that it spreads over the node's spatial axes."""
        full = f"{node.home}.{tensor}"
        return self._weight(full, self._tensors[full].reshape(-1, *[1] * node.axes))

    def constant(self, node: Node, name: str, array: Array) -> str:
        """An initializer `<node>.<name>` with this content."""
        return self._initialize(f"{node.name}.{name}", array)

    def sizes(self, node: Node, name: str, sizes: Sequence[int]) -> str:
        """An initializer `<node>.<name>` with whole numbers."""
        return self.constant(node, name, np.asarray(sizes, np.int64))

    def between(self, node: Node, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add an operator whose value is not yet the node's output; its value."""
        return self._add(node, kind, inputs, f"{node.name}.part{len(self._operators)}", attributes)

    def output(self, node: Node, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Add the operator that gives the node's output."""
        last = node.name == self._graph.output
        value = self._add(node, kind, inputs, OUTPUT_NAME if last else f"{node.name}.output", attributes)
        self._values[node.name] = value

    def forward_input(self, node: Node) -> None:
        """Make the node's input its output: it does nothing outside training."""
        if node.name == self._graph.output:
            self.output(node, "Identity", self.inputs(node))
        else:
            self._values[node.name] = self.inputs(node)[0]

    def model(self) -> onnx.ModelProto:
        """The file: one graph, a dynamic batch axis, no metadata."""
        graph = helper.make_graph(
            self._operators,
            "network",
            [self._stated(INPUT_NAME, self._graph.input_shape)],
            [self._stated(OUTPUT_NAME, self._graph[self._graph.output].shape)],
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph, producer_name="espalier", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
        )

    def _weight(self, full: str, array: Array) -> str:
        """The initializer of a tensor, made by the first node that uses it."""
        return full if full in self._initializers else self._initialize(full, array)

    def _initialize(self, full: str, array: Array) -> str:
        self._initializers[full] = numpy_helper.from_array(np.ascontiguousarray(array), full)
        return full

    def _add(self, node: Node, kind: str, inputs: Sequence[str], value: str, attributes: Mapping[str, Any]) -> str:
        name = node.name if value in (OUTPUT_NAME, f"{node.name}.output") else value
        self._operators.append(helper.make_node(kind, list(inputs), [value], name=name, **attributes))
        return value

    @staticmethod
    def _stated(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [BATCH_AXIS, *shape])
