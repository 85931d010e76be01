"""What a network costs: parameters, multiply-accumulates, bytes on disk, memory in training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from app.errors import JsonValue
from app.network.graph import Graph
from app.network.layers.names import INPUT
from app.network.layers.shapes import Shape

CostMeasure = Literal["macs", "params", "bytes"]
FLOAT_BYTES = 4
SAFETENSORS_METADATA = {"espalier": '{"format_version":1}'}
"""The metadata of every file of weights. One key only: with more, safetensors writes them in an order that changes."""

_OPTIMIZER_COPIES = {"sgd": 1, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class Cost:
    """What one network costs."""

    params: int
    """Elements of all trained tensors."""
    nonzero_params: int
    """Those that are not zero."""
    macs: int
    """Multiply-accumulates of convolutions and linear layers for one example."""
    bytes: int
    """Size of its safetensors file, float32, running statistics included."""

    def of(self, measure: CostMeasure) -> int:
        """The cost in one measure."""
        found: int = getattr(self, measure)
        return found

    def document(self) -> dict[str, JsonValue]:
        """The cost as it stands in answers."""
        return {"params": self.params, "nonzero_params": self.nonzero_params, "macs": self.macs, "bytes": self.bytes}


@dataclass(frozen=True)
class LayerRow:
    """What one node of a graph is and costs."""

    name: str
    type: str
    output_shape: Shape
    params: int
    macs: int


@dataclass(frozen=True)
class Memory:
    """An estimate of what training needs, in bytes: float32 everywhere, workspaces of the runtime not counted."""

    parameters: int
    """Trained tensors and running statistics."""
    gradients: int
    optimizer: int
    """Momentum, or Adam's two moments."""
    activations: int
    """What one batch keeps for the backward pass, and the gradients of the largest activation."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def document(self) -> dict[str, JsonValue]:
        """The estimate as it stands in answers."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "total": self.total,
        }


def cost(graph: Graph) -> Cost:
    """What the graph costs when none of its parameters is zero."""
    params = sum(node.params for node in graph.nodes)
    size = safetensors_bytes({key: tensor.shape for key, tensor in graph.tensors().items()})
    return Cost(params, params, sum(node.macs for node in graph.nodes), size)


def layer_rows(graph: Graph) -> list[LayerRow]:
    """One row per node, in order."""
    return [LayerRow(node.name, node.type, node.shape, node.params, node.macs) for node in graph.nodes]


def safetensors_bytes(tensors: Mapping[str, Shape]) -> int:
    """The exact size of the safetensors file (version 0.8) of float32 tensors of these shapes with our metadata.

    The file is the header's length in 8 bytes, the header (padded with spaces to a multiple of 8) and the data.
    """
    data = FLOAT_BYTES * sum(math.prod(shape) for shape in tensors.values())
    return file_bytes(safetensors_header_bytes(tensors), data)


def file_bytes(header: int, data: int) -> int:
    """The size of a safetensors file whose header without padding, and whose data, have so many bytes."""
    return 8 + -(-header // 8) * 8 + data


def safetensors_header_bytes(tensors: Mapping[str, Shape]) -> int:
    """The length of the header without padding: JSON without spaces, tensors of one type in the order of their names."""
    header: dict[str, object] = {"__metadata__": SAFETENSORS_METADATA}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + math.prod(tensors[name]) * FLOAT_BYTES
        header[name] = {"dtype": "F32", "shape": list(tensors[name]), "data_offsets": [start, end]}
    return len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def activation_elements(graph: Graph) -> int:
    """Float32 numbers that one example's forward pass keeps for the backward pass; 8-byte indices count twice.

    Counts as autograd keeps: convolutions, linear and normalisation layers, pools and most activations their input;
    relu, sigmoid, tanh and softmax their output; max pooling also its indices, dropout its mask. A tensor that two
    layers keep counts once.
    """
    kept: dict[str, int] = {}
    besides = 0
    root = {INPUT: INPUT}
    sizes = {INPUT: math.prod(graph.input_shape)}
    for node in graph.nodes:
        layer = node.layer
        root[node.name] = root[node.inputs[0]] if layer.is_view else node.name
        sizes[node.name] = node.elements
        sources = node.inputs if layer.saves_inputs else ()
        for name in (*sources, node.name) if layer.saves_output else sources:
            kept[root[name]] = sizes[root[name]]
        besides += node.elements * layer.saved_bytes // FLOAT_BYTES
    return sum(kept.values()) + besides


def training_memory(graph: Graph, *, batch_size: int, optimizer: str) -> Memory:
    """An estimate of the memory that training takes; `optimizer` is "sgd" (with momentum), "adam" or "adamw".

    Raises:
        KeyError: another optimizer.
    """
    params = sum(node.params for node in graph.nodes) * FLOAT_BYTES
    everything = sum(tensor.elements for tensor in graph.tensors().values()) * FLOAT_BYTES
    # Backward holds the gradients of one node's output and inputs at a time.
    passing = max(node.elements + sum(math.prod(shape) for shape in node.input_shapes) for node in graph.nodes)
    activations = (activation_elements(graph) + passing) * batch_size * FLOAT_BYTES
    return Memory(everything, params, params * _OPTIMIZER_COPIES[optimizer], activations)
