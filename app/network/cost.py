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

CHOICE_BATCH = 256
"""Images at a time for validation, statistics and criteria: fewer make batch norm's statistics worse."""
CHOICE_BYTES = 64 << 20
"""What these may always take, even where a training batch takes less."""
SMALLEST_BATCH = 2
"""Images that are computed together at least: batch norm has no variance of one."""

_OPTIMIZER_COPIES = {"sgd": 1, "muon": 1, "adam": 2, "adamw": 2}


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
    choices: int
    """The same of validation, batch norm's statistics and the criteria, which take other batches (`choice_batch`)."""

    @property
    def total(self) -> int:
        """The sum; activations and choices are not there at the same time, so the larger of the two counts."""
        return self.parameters + self.gradients + self.optimizer + max(self.activations, self.choices)

    def document(self) -> dict[str, JsonValue]:
        """The estimate as it stands in answers."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "choices": self.choices,
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


def forward_elements(graph: Graph) -> int:
    """Float32 numbers that one example's forward pass holds at once, at most, where no backward pass follows.

    An output is given up after the last layer that reads it; a view holds what it looks at.
    """
    root, sizes = {INPUT: INPUT}, {INPUT: math.prod(graph.input_shape)}
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        root[node.name] = root[node.inputs[0]] if node.layer.is_view else node.name
        sizes.setdefault(root[node.name], node.elements)
        last |= {root[name]: position for name in (*node.inputs, node.name)}
    given_up: dict[int, list[str]] = {}
    for name, position in last.items():
        given_up.setdefault(position, []).append(name)
    held = most = sizes[INPUT]
    for position, node in enumerate(graph.nodes):
        held += sizes[node.name] if root[node.name] == node.name else 0
        most = max(most, held)
        held -= sum(sizes[name] for name in given_up.get(position, ()))
    return most


def choice_batch(graph: Graph, batch_size: int, *, backward: bool = False) -> int:
    """How many images validation, statistics and criteria compute at a time, 2 to 256, beside a training's `batch_size`.

    256, or as many as fit into what a batch of the training keeps, or into 64 MiB if that is more. `backward`: for a
    criterion that needs gradients (taylor).
    """
    each = _bytes_of_example(graph, backward=backward)
    room = max(batch_size * _bytes_of_example(graph, backward=True), CHOICE_BYTES)
    return max(SMALLEST_BATCH, min(CHOICE_BATCH, room // each))


def training_memory(
    graph: Graph, *, batch_size: int, optimizer: str, gradients_of_choices: bool = False, taught: bool = False
) -> Memory:
    """An estimate of the memory that training takes, and what chooses by it.

    Args:
        graph: The network.
        batch_size: Images of a step.
        optimizer: "sgd" (with momentum), "muon", "adam" or "adamw".
        gradients_of_choices: Whether a choice needs gradients (criterion taylor, scope learned).
        taught: Whether a second network, as large as this, gives its answers in every step.

    Raises:
        KeyError: another optimizer.
    """
    params = sum(node.params for node in graph.nodes) * FLOAT_BYTES
    everything = sum(tensor.elements for tensor in graph.tensors().values()) * FLOAT_BYTES
    choices = max(
        choice_batch(graph, batch_size, backward=backward) * _bytes_of_example(graph, backward=backward)
        for backward in {False, gradients_of_choices}
    )
    activations = batch_size * _bytes_of_example(graph, backward=True)
    if taught:
        activations += batch_size * _bytes_of_example(graph, backward=False)
        everything *= 2
    return Memory(everything, params, params * _OPTIMIZER_COPIES[optimizer], activations, choices)


def _bytes_of_example(graph: Graph, *, backward: bool) -> int:
    if not backward:
        return forward_elements(graph) * FLOAT_BYTES
    # Backward holds the gradients of one node's output and inputs at a time.
    passing = max(node.elements + sum(math.prod(shape) for shape in node.input_shapes) for node in graph.nodes)
    return (activation_elements(graph) + passing) * FLOAT_BYTES
