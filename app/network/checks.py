"""What must be true of a network as a whole: one output, all of it used, class scores at the end, a size that fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from app.errors import Fault
from app.network.layers.convolutions import Conv, Linear
from app.network.layers.shapes import written
from app.network.node import Limits, Node

if TYPE_CHECKING:
    from app.network.graph import Graph


def unused(graph: Graph) -> Iterator[Fault]:
    """A fault for every layer whose output nobody takes, besides the last."""
    for node in graph.nodes[:-1]:
        if not graph.consumers(node.name):
            yield Fault(
                node.pointer,
                f"'{node.name}' is computed but never used: the output is that of the last layer, '{graph.output}'",
            )


def sizes(graph: Graph, limits: Limits, pointer: str) -> Iterator[Fault]:
    """A fault at the layer that takes the sum of layers, parameters or activations over its limit."""
    if len(graph.nodes) > limits.layers:
        message = f"{len(graph.nodes)} layers with all containers written out, the limit is {limits.layers}"
        yield Fault(pointer, message, limit=limits.layers, value=len(graph.nodes))
    for total, limit, what in (
        (sum(node.params for node in graph.nodes), limits.params, "parameters"),
        (sum(node.elements for node in graph.nodes), limits.activations, "activations for one example"),
    ):
        if total <= limit:
            continue
        seen = 0
        for node in graph.nodes:
            seen += node.params if what == "parameters" else node.elements
            if seen > limit:
                message = f"with '{node.name}' the network has more than {limit} {what} (in all {total})"
                yield Fault(node.pointer, message, limit=limit, value=total)
                break


def class_scores(graph: Graph, classes: int) -> Iterator[Fault]:
    """A fault when the output is not one number per class, or when what must not stands behind the class scores."""
    last = graph[graph.output]
    scores = last
    while scores.type == "flatten" and scores.shape[0] == scores.input_shapes[0][0] and scores.inputs[0] in graph:
        scores = graph[scores.inputs[0]]
    if scores.layer.behind_logits is not None:
        yield Fault(
            scores.pointer,
            f"{scores.type} after the logits ('{scores.name}' is the last layer): {scores.layer.behind_logits}",
        )
    elif len(last.shape) != 1:
        message = (
            f"the output is {written(last.shape)}, but must be {classes} class scores: "
            f"end with flatten and a linear layer of out_features {classes}, or with global_avg_pool and flatten"
        )
        yield Fault(last.pointer, message, limit=[classes], value=list(last.shape))
    elif last.shape[0] != classes:
        pointer = _width_pointer(graph, scores)
        message = f"the network gives {last.shape[0]} class scores, but the data has {classes} classes"
        yield Fault(pointer, message, limit=classes, value=last.shape[0])


def _width_pointer(graph: Graph, node: Node) -> str:
    """Where the width of a node's output was sent: a field of the layer that made it, else the node itself."""
    made = node
    while made.type in {"global_avg_pool", "relu", "max_pool", "avg_pool", "batch_norm"} and made.inputs[0] in graph:
        made = graph[made.inputs[0]]
    if made.shares is not None:
        made = graph[made.shares]
    if isinstance(made.layer, Linear):
        return f"{made.pointer}/out_features"
    if isinstance(made.layer, Conv):
        return f"{made.pointer}/out_channels"
    return node.pointer
