"""Shortcuts around runs of convolutions (He et al. 2015, arXiv 1512.03385): the `residual` rewrite."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from app.network.blocks import Block, block_of
from app.network.editor import GraphEditor
from app.network.graph import Graph
from app.network.layers.convolutions import Conv
from app.network.layers.joins_and_views import Add
from app.network.layers.names import INPUT
from app.network.layers.normalization import BatchNorm
from app.network.layers.shapes import LARGEST_KERNEL, Shape
from app.network.node import Node

BLOCKS_PER_SHORTCUT = 2  # as in the paper's basic block


def add_shortcuts(graph: Graph, editor: GraphEditor, convs: Sequence[Node]) -> None:
    """Lays a shortcut around each piece of each run of `convs`.

    A block is a convolution with its normalisation and its own activation, outside of every branch that an `add`
    already joins. A run is a chain of blocks, each the only reader of the one before. It is cut into pieces of two
    blocks; a single one at its end goes to the piece before it. The sum stands before the last activation of the
    piece, as in the paper. The shortcut is the identity where shapes are equal, else a 1 x 1 convolution, its stride
    the ratio of the sizes, and batch norm; where the sizes do not follow from the strides (a convolution without
    padding), the piece is left as it is.
    """
    inside = _joined_branches(graph)
    for run in _runs(graph, [node for node in convs if node.name not in inside]):
        for piece in _pieces(run):
            _add_shortcut(editor, piece)


def _runs(graph: Graph, convs: Sequence[Node]) -> list[list[Block]]:
    blocks = {node.name: block for node in convs if (block := block_of(graph, node)).activation is not None}
    follower: dict[str, str] = {}
    for name, block in blocks.items():
        readers = graph.consumers(block.end.name)
        if len(readers) == 1 and readers[0].name in blocks:
            follower[name] = readers[0].name
    runs = []
    for name in blocks.keys() - follower.values():
        run = [blocks[name]]
        while run[-1].conv.name in follower:
            run.append(blocks[follower[run[-1].conv.name]])
        runs.append(run)
    order = {node.name: position for position, node in enumerate(graph.nodes)}
    return sorted(runs, key=lambda run: order[run[0].conv.name])


def _pieces(run: list[Block]) -> list[list[Block]]:
    pieces = [run[start : start + BLOCKS_PER_SHORTCUT] for start in range(0, len(run), BLOCKS_PER_SHORTCUT)]
    if len(pieces) > 1 and len(pieces[-1]) < BLOCKS_PER_SHORTCUT:
        remainder = pieces.pop()
        pieces[-1] = pieces[-1] + remainder
    return pieces


def _add_shortcut(editor: GraphEditor, piece: list[Block]) -> None:
    first, end = piece[0].conv, piece[-1]
    assert end.activation is not None
    before, after = first.input_shapes[0], end.activation.shape
    source = first.inputs[0]
    if before != after:
        stride = _stride(piece, before, after)
        if stride is None:
            return
        layer = Conv(out_channels=after[0], kernel_size=1, stride=stride, bias=False)
        projection = editor.add_before(first.name, layer, f"{first.name}_shortcut", [source])
        source = editor.add_before(first.name, BatchNorm(), f"{first.name}_shortcut_bn", [projection])
    sum_of = end.norm or end.conv
    name = editor.add_before(end.activation.name, Add(), f"{end.conv.name}_add", [sum_of.name, source])
    editor.redirect(end.activation.name, sum_of.name, name)


def _stride(piece: Sequence[Block], before: Shape, after: Shape) -> int | tuple[int, ...] | None:
    """The stride per axis with which a 1 x 1 convolution follows `piece`; None if there is none."""
    if len(before) != len(after) or not all(isinstance(block.conv.layer, Conv) for block in piece):
        return None
    axes = len(before) - 1
    steps = [block.conv.layer.strides(axes) for block in piece if isinstance(block.conv.layer, Conv)]
    strides = tuple(math.prod(along) for along in zip(*steps, strict=True))
    reached = tuple((size - 1) // stride + 1 for size, stride in zip(before[1:], strides, strict=True))
    if reached != after[1:] or max(strides) > LARGEST_KERNEL:
        return None
    return strides[0] if len(set(strides)) == 1 else strides


def _joined_branches(graph: Graph) -> Collection[str]:
    """Names of the nodes that lie on one branch of an `add` and not on all of them: they have a shortcut already."""
    bit = {INPUT: 1}
    ancestors = {INPUT: 1}
    for position, node in enumerate(graph.nodes, 1):
        bit[node.name] = 1 << position
        ancestors[node.name] = bit[node.name]
        for name in node.inputs:
            ancestors[node.name] |= ancestors[name]
    joined = 0
    for node in graph.nodes:
        if node.type == "add":
            shared, any_of = -1, 0
            for name in node.inputs:
                shared &= ancestors[name]
                any_of |= ancestors[name]
            joined |= any_of & ~shared
    return frozenset(name for name, mask in bit.items() if mask & joined)
