"""A network as data: named nodes in an order in which they can be computed, every shape known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from app.errors import Fault, InvalidSpec
from app.network import checks
from app.network.builder import GraphBuilder
from app.network.layers.layer import Layer
from app.network.layers.names import INPUT
from app.network.layers.shapes import MOST_SPATIAL_AXES, LayerTensor, Shape, written
from app.network.node import Limits, Node
from app.validation.faults import MOST_FAULTS

DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Graph:
    """A network without containers. Two graphs are equal when their nodes are, wherever these were written down.

    "input" is the name of the graph's input; the last node is its output.
    """

    input_shape: Shape
    nodes: tuple[Node, ...]

    @property
    def output(self) -> str:
        """The name of the node whose output is the network's."""
        return self.nodes[-1].name

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers_by_name(self) -> Mapping[str, tuple[Node, ...]]:
        """For every node, and for "input": the nodes that take its output, in order."""
        found: dict[str, list[Node]] = {name: [] for name in (INPUT, *self._by_name)}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def _places(self) -> dict[str, tuple[Node, ...]]:
        found: dict[str, list[Node]] = {name: [] for name in self._by_name}
        for node in self.nodes:
            found[node.home].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        """Itself: nothing in it changes. Copies of a network share it."""
        return self

    def __getitem__(self, name: str) -> Node:
        """The node of this name.

        Raises:
            KeyError: there is none.
        """
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a node of this name."""
        return name in self._by_name

    def consumers(self, name: str) -> tuple[Node, ...]:
        """The nodes that take the output of node `name` (or "input"), in order; a node that takes it twice is listed once.

        Raises:
            KeyError: there is no such node.
        """
        return self.consumers_by_name[name]

    def places(self, name: str) -> tuple[Node, ...]:
        """The nodes that use the tensors stored under the name of a node: itself and those that share them, in order.

        Empty for a node that shares. Raises KeyError: there is no such node.
        """
        return self._places[name]

    def tensors(self) -> dict[str, LayerTensor]:
        """Every tensor by its key `<node>.<tensor>`, in the order of the nodes."""
        return {f"{node.name}.{key}": tensor for node in self.nodes for key, tensor in node.tensors.items()}

    def layers(self) -> tuple[Layer, ...]:
        """The nodes as layers with name, inputs and widths stated; `build_graph` makes an equal graph of them."""
        return tuple(_stated(node) for node in self.nodes)

    def to_layers(self) -> list[dict[str, Any]]:
        """`layers` as JSON objects: what `architecture.json` holds and `model.layers` of another job takes."""
        return [layer.document() for layer in self.layers()]

    def replace(self, layers: Mapping[str, Layer], *, limits: Limits = DEFAULT_LIMITS) -> Graph:
        """The same graph with other layers at the nodes named; every shape is computed again. Names and inputs stay.

        Raises:
            InvalidSpec: the new layers do not fit.
            KeyError: there is no node of such a name.
        """
        for name in layers:
            self[name]
        changed = [
            layers[node.name].model_copy(update={"name": node.name, "inputs": node.inputs})
            if node.name in layers
            else node.layer.model_copy(update={"name": node.name, "inputs": node.inputs})
            for node in self.nodes
        ]
        return build_graph(changed, self.input_shape, limits=limits)


def _stated(node: Node) -> Layer:
    stated: dict[str, Any] = {"name": node.name, "inputs": node.inputs}
    return node.layer.model_copy(update=stated | node.layer.widths(node.input_shapes))


def build_graph(
    layers: Sequence[Layer],
    input_shape: Shape,
    *,
    classes: int | None = None,
    pointer: str = "/model/layers",
    limits: Limits = DEFAULT_LIMITS,
) -> Graph:
    """The graph of these layers: containers written out, every layer named and every shape known.

    Args:
        layers: As they stand in a job.
        input_shape: Of one example: channels and one to three spatial axes.
        classes: How many class scores it must give; None: any output is right.
        pointer: Where the layers stand in what was sent; faults point below it.
        limits: How large it may be.

    Raises:
        InvalidSpec: with one fault for each mistake found (at most 100), each with a pointer into what was sent.
    """
    faults = _input_faults(input_shape, pointer.rpartition("/")[0] + "/input_shape", limits)
    if faults:
        raise InvalidSpec(faults)
    builder = GraphBuilder(input_shape, limits)
    builder.write_network(layers, pointer)
    if builder.faults:
        raise InvalidSpec(builder.faults)
    graph = Graph(tuple(input_shape), tuple(builder.nodes))
    faults = [
        *checks.unused_layer_faults(graph.nodes, graph.consumers_by_name),
        *checks.size_faults(graph.nodes, limits, pointer),
    ]
    if classes is not None:
        faults += checks.class_score_faults(graph.nodes, classes)
    if faults:
        raise InvalidSpec(list({fault.pointer: fault for fault in reversed(faults)}.values())[::-1][:MOST_FAULTS])
    return graph


def _input_faults(shape: Shape, pointer: str, limits: Limits) -> list[Fault]:
    axes = len(shape) - 1
    if not 1 <= axes <= MOST_SPATIAL_AXES:
        message = (
            f"an input has channels and 1 to {MOST_SPATIAL_AXES} spatial axes: 2 to {MOST_SPATIAL_AXES + 1} numbers"
        )
        return [Fault(pointer, message, limit=MOST_SPATIAL_AXES + 1, value=len(shape))]
    for position, size in enumerate(shape):
        if size < 1:
            return [Fault(f"{pointer}/{position}", "must be at least 1", limit=1, value=size)]
    if shape[0] > limits.channels:
        return [
            Fault(f"{pointer}/0", f"must be at most {limits.channels} channels", limit=limits.channels, value=shape[0])
        ]
    elements = 1
    for size in shape:
        elements *= size
    if elements > limits.input_elements:
        message = f"an example of {written(shape)} is {elements} numbers, the limit is {limits.input_elements}"
        return [Fault(pointer, message, limit=limits.input_elements, value=elements)]
    return []
