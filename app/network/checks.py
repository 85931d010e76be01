"""What must be true of a network as a whole: one output, all of it used, class scores at the end, a size that fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from app.errors import Fault
from app.network.layers.convolutions import Conv, Linear
from app.network.layers.shapes import written
from app.network.node import Limits, Node

_KEEPS_WIDTH = frozenset({"global_avg_pool", "relu", "max_pool", "avg_pool", "batch_norm"})


def unused_layer_faults(nodes: Sequence[Node], consumers: Mapping[str, Sequence[Node]]) -> Iterator[Fault]:
    """A fault for every layer, besides the last, whose output nobody takes. `consumers`: by name, who takes it."""
    for node in nodes[:-1]:
        if not consumers[node.name]:
            yield Fault(
                node.pointer,
                f"'{node.name}' is computed but never used: the output is that of the last layer, '{nodes[-1].name}'",
            )


def size_faults(nodes: Sequence[Node], limits: Limits, pointer: str) -> Iterator[Fault]:
    """A fault for too many layers, and one at the layer with which parameters or activations exceed their limit."""
    if len(nodes) > limits.layers:
        message = f"{len(nodes)} layers with all containers written out, the limit is {limits.layers}"
        yield Fault(pointer, message, limit=limits.layers, value=len(nodes))
    yield from _sum_faults(nodes, [node.params for node in nodes], limits.params, "parameters")
    elements = [node.elements for node in nodes]
    yield from _sum_faults(nodes, elements, limits.activations, "activations for one example")


def _sum_faults(nodes: Sequence[Node], counts: Sequence[int], limit: int, what: str) -> Iterator[Fault]:
    """A fault at the node with which the sum of `counts` exceeds the limit, if any."""
    total = sum(counts)
    if total <= limit:
        return
    seen = 0
    for node, count in zip(nodes, counts, strict=True):
        seen += count
        if seen > limit:
            message = f"with '{node.name}' the network has more than {limit} {what} (in all {total})"
            yield Fault(node.pointer, message, limit=limit, value=total)
            return


def class_score_faults(nodes: Sequence[Node], classes: int) -> Iterator[Fault]:
    """A fault when the output is not one number per class, or when a layer follows the class scores that must not."""
    by_name = {node.name: node for node in nodes}
    last = scores = nodes[-1]
    while scores.type == "flatten" and scores.shape[0] == scores.input_shapes[0][0] and scores.inputs[0] in by_name:
        scores = by_name[scores.inputs[0]]
    if scores.layer.why_not_after_logits is not None:
        yield Fault(
            scores.pointer,
            f"{scores.type} after the logits ('{scores.name}' is the last layer): {scores.layer.why_not_after_logits}",
        )
    elif len(last.shape) != 1:
        message = (
            f"the output is {written(last.shape)}, but must be {classes} class scores: "
            f"end with flatten and a linear layer of out_features {classes}, or with global_avg_pool and flatten"
        )
        yield Fault(last.pointer, message, limit=[classes], value=list(last.shape))
    elif last.shape[0] != classes:
        pointer = _width_pointer(scores, by_name)
        message = f"the network gives {last.shape[0]} class scores, but the data has {classes} classes"
        yield Fault(pointer, message, limit=classes, value=last.shape[0])


def _width_pointer(node: Node, by_name: Mapping[str, Node]) -> str:
    """Where the width of a node's output was sent: a field of the layer that made it, else the node itself."""
    made = node
    while made.type in _KEEPS_WIDTH and made.inputs[0] in by_name:
        made = by_name[made.inputs[0]]
    if made.shares is not None:
        made = by_name[made.shares]
    if isinstance(made.layer, Linear):
        return f"{made.pointer}/out_features"
    if isinstance(made.layer, Conv):
        return f"{made.pointer}/out_channels"
    return node.pointer
