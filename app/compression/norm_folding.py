"""Which batch norms a delivered ONNX file does not have: those that can be folded into the layer before them."""

from __future__ import annotations

from app.network.blocks import WEIGHTED
from app.network.graph import Graph


def folded_norms(graph: Graph) -> dict[str, str]:
    """Each batch norm that alone reads a convolution or linear layer of unshared weights, with the name of that layer.

    Others stay: before a convolution (padding and activations are between) and after a concat.
    """
    folded: dict[str, str] = {}
    for node in graph.nodes:
        before = folded.get(node.inputs[0], node.inputs[0])
        if (
            node.type == "batch_norm"
            and before in graph
            and graph[before].type in WEIGHTED
            and len(graph.consumers(node.inputs[0])) == len(graph.places(graph[before].home)) == 1
        ):
            folded[node.name] = before
    return folded
