"""Convolutions with what belongs to them: the blocks of a graph, and its layers with weights."""

from __future__ import annotations

from dataclasses import dataclass

from app.network.graph import Graph, Node
from app.network.layers.names import INPUT
from app.network.layers.registry import Activation

CONVOLUTIONS = frozenset({"conv", "conv_transpose"})


WEIGHTED = CONVOLUTIONS | {"linear"}


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
    """Names of the layers with weights behind which there is no other one: usually the linear layer of the logits."""
    found, seen, waiting = set(), {INPUT}, [graph.output]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if graph[name].type in WEIGHTED:
            found.add(name)
        else:
            waiting.extend(graph[name].inputs)
    return frozenset(found)
