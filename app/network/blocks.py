"""What belongs together in a graph: a convolution with its norm and activation, and the layers that end the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from app.network.graph import Graph
from app.network.layers.activations import Activation
from app.network.layers.names import INPUT
from app.network.node import Node

CONVOLUTIONS = frozenset({"conv", "conv_transpose"})
WEIGHTED = CONVOLUTIONS | {"linear"}
"""Layers that multiply their input with weights."""
NORMS = frozenset({"batch_norm", "group_norm", "layer_norm"})


@dataclass(frozen=True)
class Block:
    """A convolution with the normalisation and the activation that alone follow it; None where there is none."""

    conv: Node
    norm: Node | None
    activation: Node | None

    @property
    def end(self) -> Node:
        """The last node of the block."""
        return self.activation or self.norm or self.conv


def block_of(graph: Graph, conv: Node) -> Block:
    """The block that begins with `conv`: each further node is the only one that reads the one before."""
    norm = activation = None
    following = graph.consumers(conv.name)
    if len(following) == 1 and following[0].type in NORMS:
        norm = following[0]
        following = graph.consumers(norm.name)
    if len(following) == 1 and isinstance(following[0].layer, Activation):
        activation = following[0]
    return Block(conv, norm, activation)


def convolutions(graph: Graph) -> list[Node]:
    """Convolutions and transposed convolutions, in order."""
    return [node for node in graph.nodes if node.type in CONVOLUTIONS]


def last_layers(graph: Graph) -> frozenset[str]:
    """Names of the layers that multiply and are not followed by another one: usually the linear layer of the logits."""
    return frozenset(node.name for node in _output_side(graph) if node.type in WEIGHTED)


def head_layers(graph: Graph) -> frozenset[str]:
    """Names of the layers with tensors that give the class scores: the `last_layers`, and the norms after them.

    Of one that shares its parameters: the name under which they are stored.
    """
    return frozenset(node.home for node in _output_side(graph) if node.uses)


def _output_side(graph: Graph) -> Iterator[Node]:
    """The nodes from the output back to the first layers that multiply, those included."""
    seen, waiting = {INPUT}, [graph.output]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        yield graph[name]
        if graph[name].type not in WEIGHTED:
            waiting.extend(graph[name].inputs)
