"""Optimizations that change the network before it is trained: graph -> graph.

Every layer that is already there keeps its name; new ones are named after the layer they belong to (`conv1_bn`). A
rewrite that finds nothing to do returns the graph it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from app.errors import Fault, InvalidSpec
from app.network.blocks import CONVOLUTIONS, NORMS, Block, block_of, convolutions, last_layers
from app.network.editor import GraphEditor
from app.network.graph import DEFAULT_LIMITS, Graph
from app.network.layers.activations import Dropout, SpatialDropout
from app.network.layers.convolutions import Conv, ConvTranspose
from app.network.layers.layer import Layer
from app.network.layers.normalization import BatchNorm
from app.network.layers.sharing import unshared
from app.network.node import Limits, Node
from app.rewrites.shortcuts import add_shortcuts
from app.rewrites.small_kernels import stack
from app.spec.optimizations import (
    Deeper,
    InsertBatchNorm,
    InsertDropout,
    InsertShortcuts,
    InsertSpatialDropout,
    Rewrite,
    SmallKernels,
)
from app.validation.faults import MOST_FAULTS

LAST_LAYER = "gives the logits: nothing is inserted behind the last layer"
Named = Sequence[tuple[int, Node]] | None
"""The layers a rewrite is narrowed to, each with its position in `layers`; None: all."""


def rewrite(
    graph: Graph, optimization: Rewrite, *, pointer: str = "/optimizations/0", limits: Limits = DEFAULT_LIMITS
) -> Graph:
    """The graph after `optimization`; the same object if there is nothing to do.

    Raises InvalidSpec at `pointer` if a named layer does not exist or cannot be meant, or if the result goes beyond
    `limits`.
    """
    named = _named(graph, optimization.layers, pointer)
    editor = GraphEditor(graph)
    _RULES[type(optimization)](graph, editor, optimization, _Narrowed(named, pointer))
    if not editor.changed:
        return graph
    try:
        return editor.graph(limits)
    except InvalidSpec as exc:
        raise InvalidSpec(
            [Fault(pointer, f"after this rewrite: {f.message}", f.limit, f.value) for f in exc.faults]
        ) from exc


class _Narrowed:
    """The nodes that a rewrite works on: those named, which must all be fit for it, or all that are."""

    def __init__(self, named: Named, pointer: str) -> None:
        self._named = named
        self._pointer = pointer

    def choose(self, candidates: Iterable[Node], why_not: Callable[[Node], str | None]) -> list[Node]:
        """The nodes for which `why_not` has no reason.

        Raises InvalidSpec with the reason if a named one has.
        """
        if self._named is None:
            return [node for node in candidates if why_not(node) is None]
        reasons = [(position, node, why_not(node)) for position, node in self._named]
        faults = [
            Fault(f"{self._pointer}/layers/{position}", f"{node.name} {reason}")
            for position, node, reason in reasons
            if reason is not None
        ]
        if faults:
            raise InvalidSpec(faults[:MOST_FAULTS])
        return [node for _, node in self._named]


def _named(graph: Graph, names: Sequence[str] | None, pointer: str) -> Named:
    if names is None:
        return None
    unknown = [(position, name) for position, name in enumerate(names) if name not in graph]
    if unknown:
        message = "is not the name of a layer"
        faults = [Fault(f"{pointer}/layers/{position}", message, value=name) for position, name in unknown]
        raise InvalidSpec(faults[:MOST_FAULTS])
    first = {name: position for position, name in reversed([*enumerate(names)])}
    return [(position, graph[name]) for name, position in sorted(first.items(), key=lambda entry: entry[1])]


def _is_no_convolution(node: Node) -> str | None:
    return None if node.type in CONVOLUTIONS else f"is a {node.type} layer, not a convolution"


def _batch_norm(graph: Graph, editor: GraphEditor, optimization: InsertBatchNorm, narrowed: _Narrowed) -> None:
    """After each convolution, before its activation; the convolution's bias goes, since the normalisation has one.

    Left alone: the last layer, and convolutions that are followed by a normalisation. Convolutions that share their
    parameters get one each, and lose the bias where all have one.
    """
    last = last_layers(graph)

    def why_not(node: Node) -> str | None:
        if node.name in last:
            return LAST_LAYER
        if any(reader.type in NORMS for reader in graph.consumers(node.name)):
            return "is already followed by a normalisation"
        return _is_no_convolution(node)

    chosen = narrowed.choose(graph.nodes, why_not)
    normed = {conv.name for conv in chosen}
    for conv in chosen:
        if all(place.name in normed for place in graph.places(conv.home)):
            editor.update(conv.name, bias=False)
        editor.insert_after(conv.name, [(BatchNorm(), f"{conv.name}_bn")])


def _spatial_dropout(
    graph: Graph, editor: GraphEditor, optimization: InsertSpatialDropout, narrowed: _Narrowed
) -> None:
    """After the activation of each convolution; those without one of their own and the last layer are left alone."""
    last = last_layers(graph)

    def why_not(node: Node) -> str | None:
        reason = _is_no_convolution(node)
        if reason is not None:
            return reason
        if node.name in last:
            return LAST_LAYER
        activation = block_of(graph, node).activation
        if activation is None:
            return "has no activation of its own, behind which spatial dropout is inserted"
        return "already has dropout behind its activation" if _feeds_dropout(graph, activation) else None

    for conv in narrowed.choose(graph.nodes, why_not):
        activation = block_of(graph, conv).end
        editor.insert_after(activation.name, [(SpatialDropout(p=optimization.p), f"{conv.name}_dropout")])


def _feeds_dropout(graph: Graph, node: Node) -> bool:
    readers = graph.consumers(node.name)
    return bool(readers) and all(reader.type in ("dropout", "spatial_dropout") for reader in readers)


def _dropout(graph: Graph, editor: GraphEditor, optimization: InsertDropout, narrowed: _Narrowed) -> None:
    """Before each linear layer, on its own input only; left alone where that input is dropout already."""
    nodes = {node.name: node for node in graph.nodes}

    def why_not(node: Node) -> str | None:
        if node.type != "linear":
            return f"is a {node.type} layer, not linear"
        source = nodes.get(node.inputs[0])
        already = source is not None and source.type in ("dropout", "spatial_dropout")
        return "already reads the output of dropout" if already else None

    for linear in narrowed.choose(graph.nodes, why_not):
        source = linear.inputs[0]
        name = editor.add_before(linear.name, Dropout(p=optimization.p), f"{linear.name}_dropout", [source])
        editor.redirect(linear.name, source, name)


def _small_kernels(graph: Graph, editor: GraphEditor, optimization: SmallKernels, narrowed: _Narrowed) -> None:
    """Each convolution with a kernel of 4 or more becomes a stack with the same receptive field and output shape.

    The last of the stack keeps the convolution's name, its width and its stride. The others come before it, with
    copies of the normalisation and the activation that follow the convolution. Convolutions that share their parameters
    change together, and their stacks share theirs.
    """
    named = None if optimization.layers is None else set(optimization.layers)

    def why_not(node: Node) -> str | None:
        if node.type != "conv":
            return f"is a {node.type} layer, not a convolution"
        assert isinstance(node.layer, Conv)
        axes = len(node.input_shapes[0]) - 1
        if max(node.layer.kernel(axes)) < 4:
            return "has no kernel of 4 or more"
        others = [place.name for place in graph.places(node.home) if named is not None and place.name not in named]
        return f"has its parameters in common with {', '.join(others)}: name all of them" if others else None

    stacks: dict[str, list[str]] = {}  # owner -> the inner convolutions of its stack
    order = {node.name: position for position, node in enumerate(graph.nodes)}
    for node in sorted(narrowed.choose(graph.nodes, why_not), key=lambda node: order[node.name]):
        conv = node.layer
        assert isinstance(conv, Conv)
        *inner, last = stack(conv, node.input_shapes[0])
        block, source = block_of(graph, node), node.inputs[0]
        before = source
        for number, layer in enumerate(inner, 1):
            stem = f"{node.name}_k{number}"
            if node.shares is None:
                own: Layer = layer
            else:
                own = layer.model_copy(update={"shares": stacks[node.home][number - 1]})
            before = editor.add_before(node.name, own, stem, [before])
            stacks.setdefault(node.name, []).append(before)
            for part, name in _copies(block, stem, width=layer.out_channels):
                before = editor.add_before(node.name, part, name, [before])
        editor.update(node.name, kernel_size=last.kernel_size, padding=last.padding, in_channels=None)
        editor.redirect(node.name, source, before)


def _copies(block: Block, stem: str, *, width: int) -> list[tuple[Layer, str]]:
    """Copies of the normalisation and activation of `block` for `width` channels, with names and their own parameters."""
    copies: list[tuple[Layer, str]] = []
    if block.norm is not None and (block.norm.type != "group_norm" or width == block.norm.shape[0]):
        name = f"{stem}_bn" if block.norm.type == "batch_norm" else f"{stem}_norm"
        copies.append((unshared(block.norm.layer), name))
    if block.activation is not None:
        copies.append((unshared(block.activation.layer), f"{stem}_{block.activation.type}"))
    return copies


def _deeper(graph: Graph, editor: GraphEditor, optimization: Deeper, narrowed: _Narrowed) -> None:
    """`times` further blocks behind the last block of each stage.

    A block is a convolution with its normalisation and its own activation; a stage is a run of blocks, in written
    order, whose outputs have one shape. Each further block is a 3 x 3 convolution, stride 1, padding "same", as wide
    as what it reads and in as many groups as the block it follows, with copies of that block's normalisation and
    activation. The last layer is left alone.
    """
    last = last_layers(graph)

    def why_not(node: Node) -> str | None:
        reason = _is_no_convolution(node)
        if reason is not None:
            return reason
        if node.name in last:
            return LAST_LAYER
        return None if block_of(graph, node).activation is not None else "has no activation of its own"

    chosen = narrowed.choose(graph.nodes, why_not)
    if optimization.layers is None:
        following = [node.shape for node in chosen[1:]] + [None]
        chosen = [node for node, shape in zip(chosen, following, strict=False) if node.shape != shape]
    for node in chosen:
        block = block_of(graph, node)
        conv = node.layer
        assert isinstance(conv, Conv | ConvTranspose)
        chain: list[tuple[Layer, str]] = []
        for number in range(1, optimization.times + 1):
            stem = f"{node.name}_deep{number}"
            bias = block.norm is None
            layer = Conv(out_channels=node.shape[0], kernel_size=3, padding="same", groups=conv.groups, bias=bias)
            chain += [(layer, stem), *_copies(block, stem, width=node.shape[0])]
        editor.insert_after(block.end.name, chain)


def _residual(graph: Graph, editor: GraphEditor, optimization: InsertShortcuts, narrowed: _Narrowed) -> None:
    """Shortcuts around runs of convolutions: see `shortcuts.add_shortcuts`."""
    last = last_layers(graph)

    def why_not(node: Node) -> str | None:
        if node.name in last:
            return LAST_LAYER
        return _is_no_convolution(node)

    chosen = narrowed.choose(convolutions(graph), why_not)
    add_shortcuts(graph, editor, chosen)


_RULES: dict[type, Callable[[Graph, GraphEditor, Any, _Narrowed], None]] = {
    InsertBatchNorm: _batch_norm,
    InsertSpatialDropout: _spatial_dropout,
    InsertDropout: _dropout,
    SmallKernels: _small_kernels,
    Deeper: _deeper,
    InsertShortcuts: _residual,
}
