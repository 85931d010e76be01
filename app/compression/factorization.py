"""Layers as products of smaller ones: which can be, of which ranks, into which layers, at which cost.

W is a layer's weight as outputs O x inputs I x positions K of the kernel; a transposed convolution's is turned first.

    linear, 1 x 1 convolution    W = A B: I -> r -> O                                      one rank
    larger kernels (Tucker-2)    1 x 1 (I -> r), kernel (r -> s), 1 x 1 (s -> O)           two ranks (Kim et al., arXiv 1511.06530)
    separable                    depthwise kernel (I -> I), 1 x 1 (I -> O)                 none     (Chollet, arXiv 1610.02357)

A rank that is not cut needs no layer: with r = I the first 1 x 1 is part of the kernel, with s = O the last one. Padding
is exact, because no layer before the kernel has a bias and so zeros stay zeros; stride and dilation stand on the kernel
(of 1 x 1 convolutions on the first layer), the bias on the last layer. The last one keeps the layer's name, the others are
named after it: `conv1_reduce`, `conv1_core`, `conv1_depthwise`. Layers that share their weights change together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from app.network.blocks import WEIGHTED
from app.network.editor import GraphEditor
from app.network.graph import Graph
from app.network.layers.convolutions import Conv, ConvTranspose, Linear
from app.network.layers.layer import Layer
from app.network.layers.names import LONGEST_NAME
from app.network.layers.shapes import Shape
from app.network.layers.sharing import unshared
from app.network.node import Limits, Node
from app.pruning.channel_rules import IntArray

PartRole = Literal["reduce", "core", "depthwise", "expand"]
Ranks = tuple[int, ...]
"""One rank (linear, 1 x 1), or those of inputs and outputs; equal to `Factorable.widths`: the layer as it is."""

LEAST_WIDTH = 16  # of inputs and outputs: below it a product costs more accuracy than multiply-accumulates
LEAST_RANK = 8
LEAST_SHARE = 0.1  # of the full rank: the floor of ranks that are chosen
_EXCLUDED = "excluded"
NOT_NAMED = "not among the layers that are named"
_NAMES = ("reduce", "core", "depthwise")  # that layers get beside the one that keeps its own


@dataclass(frozen=True)
class ProductPart:
    """One layer of a product; `role` "expand" or the last of all keeps the name of the layer that it replaces."""

    role: PartRole
    layer: Conv | ConvTranspose | Linear

    @property
    def width(self) -> int:
        """Channels or features that it gives."""
        return self.layer.out_features if isinstance(self.layer, Linear) else self.layer.out_channels


ProductLayers = tuple[tuple[str, ProductPart], ...]
"""The layers that replace one, with their names; the last one has the name of the layer."""


@dataclass(frozen=True)
class Factorable:
    """A layer that can become a product of smaller ones, with every place at which it stands."""

    node: Node
    places: tuple[Node, ...]

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is one matrix: linear, or 1 x 1."""
        return isinstance(self.node.layer, Linear) or (isinstance(self.node.layer, Conv) and self.positions == 1)

    @cached_property
    def channels(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        return self.node.input_shapes[0][0], self.node.shape[0]

    @cached_property
    def positions(self) -> int:
        """Taps of the kernel."""
        layer = self.node.layer
        return 1 if isinstance(layer, Linear) else math.prod(_convolution(layer).kernel(len(self.node.shape) - 1))

    @cached_property
    def widths(self) -> Ranks:
        """Full ranks: min(I, O) of one matrix, else (I, O)."""
        return (min(self.channels),) if self.is_plain else self.channels

    @cached_property
    def _maps(self) -> tuple[int, int, int]:
        """Positions of the maps of all places: those that are read, those that the kernel multiplies at, those given."""
        read = sum(math.prod(place.input_shapes[0][1:]) for place in self.places)
        given = sum(math.prod(place.shape[1:]) for place in self.places)
        return read, read if isinstance(self.node.layer, ConvTranspose) else given, given

    def costs(self, ranks: Ranks) -> tuple[int, int]:
        """(multiply-accumulates of all places, weights) with these ranks, whatever they cost; biases are not counted."""
        macs, weights = self._costs(*ranks)
        return macs, weights

    def costs_of_all(self, ranks: tuple[IntArray, ...]) -> tuple[IntArray, IntArray]:
        """`costs` of many ranks at once: arrays of one shape, one for each rank."""
        macs, weights = self._costs(*ranks)
        return macs, weights

    def _costs(self, *ranks: Any) -> tuple[Any, Any]:
        inputs, outputs = self.channels
        read, multiplied, given = self._maps
        if self.is_plain:
            (rank,) = ranks
            whole = rank == self.widths[0]
            weights = whole * (inputs * outputs) + (1 - whole) * rank * (inputs + outputs)
            return given * weights, weights
        rank_in, rank_out = ranks
        reduce = (rank_in < inputs) * inputs * rank_in
        core = rank_in * rank_out * self.positions
        expand = (rank_out < outputs) * rank_out * outputs
        return read * reduce + multiplied * core + given * expand, reduce + core + expand

    def worthwhile_ranks(self, ranks: Ranks, measure: str) -> Ranks:
        """These ranks, with those left whole whose cut saves nothing: the cheapest layers that contain the product.

        `measure` is "macs", or "params" and "bytes"; the other one does not rise over the layer as it is.
        """
        by = 0 if measure == "macs" else 1
        whole = self.costs(self.widths)
        found: list[tuple[int, Ranks]] = [(whole[by], self.widths)]
        for option in _options(ranks, self.widths):
            now = self.costs(option)
            if now[by] < whole[by] and now[1 - by] <= whole[1 - by]:
                found.append((now[by], option))
        return min(found, key=lambda entry: (entry[0], -sum(entry[1])))[1]

    def grid(self, mode: int, round_to: int) -> list[int]:
        """The ranks that may be chosen on one side, rising, the full one last; multiples of `round_to` below it."""
        full = self.widths[mode]
        least = max(LEAST_RANK, math.ceil(LEAST_SHARE * full))
        return [*range(-(-least // round_to) * round_to, full, round_to), full]

    def floor(self, round_to: int, measure: str) -> Ranks:
        """The cheapest ranks that may be chosen; `widths` where none of them saves anything."""
        return self.worthwhile_ranks(tuple(self.grid(mode, round_to)[0] for mode in range(len(self.widths))), measure)

    def parts(self, ranks: Ranks) -> tuple[ProductPart, ...]:
        """The layers of the product, in order, without names; the layer itself with full ranks."""
        layer = unshared(self.node.layer)
        assert isinstance(layer, Conv | ConvTranspose | Linear)
        if ranks == self.widths:
            return (ProductPart("expand", layer),)
        if isinstance(layer, Linear):
            first = ProductPart("reduce", Linear(out_features=ranks[0], bias=False))
            return first, ProductPart("expand", Linear(out_features=layer.out_features, bias=layer.bias))
        conv = _convolution(layer)
        if self.is_plain:
            narrow = conv.model_copy(update={"out_channels": ranks[0], "bias": False, "in_channels": None, "groups": 1})
            return ProductPart("reduce", narrow), ProductPart("expand", _pointwise(conv.out_channels, bias=conv.bias))
        (inputs, outputs), (rank_in, rank_out) = self.channels, ranks
        last = rank_out == outputs
        core = conv.model_copy(
            update={"out_channels": rank_out, "bias": conv.bias and last, "in_channels": None, "groups": 1}
        )
        found = [ProductPart("reduce", _pointwise(rank_in, bias=False))] if rank_in < inputs else []
        found.append(ProductPart("core", core))
        return (*found, *([] if last else [ProductPart("expand", _pointwise(outputs, bias=conv.bias))]))


def low_rank_layers(
    graph: Graph, *, only: Collection[str] | None = None, exclude: Collection[str] = ()
) -> tuple[dict[str, Factorable], dict[str, str]]:
    """(the layers that can become products, by name; for every other convolution and linear layer the reason)."""
    return _divide_layers(graph, _why_no_product, only, exclude)


def separable_layers(
    graph: Graph, *, only: Collection[str] | None = None, exclude: Collection[str] = ()
) -> tuple[dict[str, Factorable], dict[str, str]]:
    """As `low_rank_layers`, of the convolutions that can become a depthwise and a 1 x 1 convolution."""
    return _divide_layers(graph, _why_not_separable, only, exclude)


def factorize(graph: Graph, ranks: Mapping[str, Ranks]) -> Graph:
    """The graph in which these layers are products of these ranks; the same graph where all ranks are full.

    Raises KeyError for a layer that cannot be one.
    """
    found, _ = low_rank_layers(graph)
    parts = {name: found[name].parts(own) for name, own in ranks.items() if own != found[name].widths}
    return _replaced(graph, parts)


def separate(graph: Graph, names: Iterable[str]) -> Graph:
    """The graph in which these convolutions are a depthwise and a 1 x 1 convolution.

    Raises KeyError for a layer that cannot be.
    """
    found, _ = separable_layers(graph)
    return _replaced(graph, {name: separable_parts(found[name]) for name in names})


def stored_shapes(layer: Factorable, product: ProductLayers) -> dict[str, Shape]:
    """The shapes of the product's tensors, by key."""
    width, axes = layer.channels[0], len(layer.node.shape) - 1
    shapes: dict[str, Shape] = {}
    for name, part in product:
        given = (width, *[1] * axes)
        shapes |= {f"{name}.{key}": tensor.shape for key, tensor in part.layer.tensors([given]).items()}
        width = part.width
    return shapes


def separable_parts(layer: Factorable) -> tuple[ProductPart, ...]:
    """A depthwise convolution with the kernel, and a 1 x 1 convolution with the bias."""
    conv = _convolution(unshared(layer.node.layer))
    depthwise = conv.model_copy(
        update={"out_channels": layer.channels[0], "groups": "depthwise", "bias": False, "in_channels": None}
    )
    return ProductPart("depthwise", depthwise), ProductPart("expand", _pointwise(conv.out_channels, bias=conv.bias))


def part_names(graph: Graph) -> dict[str, dict[PartRole, str]]:
    """For each convolution and linear layer the names of the layers that could replace it, by role.

    Unique and free, and the same whichever layers are replaced; "expand" is the layer's own name.
    """
    taken = {node.name for node in graph.nodes}
    names: dict[str, dict[PartRole, str]] = {}
    for node in graph.nodes:
        if node.type not in WEIGHTED:
            continue
        names[node.name] = {"expand": node.name}
        for role in _NAMES:
            stem = f"{node.name[: LONGEST_NAME - 24]}_{role}"
            name, number = stem, 1
            while name in taken:
                number += 1
                name = f"{stem}{number}"
            taken.add(name)
            names[node.name][role] = name  # type: ignore[index]
    return names


def named_parts(parts: tuple[ProductPart, ...], names: Mapping[PartRole, str]) -> ProductLayers:
    """The parts with their names: the last one has the layer's own, whatever its role."""
    return tuple((names["expand" if part is parts[-1] else part.role], part) for part in parts)


def _replaced(graph: Graph, products: Mapping[str, tuple[ProductPart, ...]]) -> Graph:
    """The graph with each of these layers, at all its places, replaced by the parts."""
    if not products:
        return graph
    names, editor = part_names(graph), GraphEditor(graph)
    for name, parts in products.items():
        own = [named for named, _ in named_parts(parts, names[name])]
        for place in graph.places(name):
            before = place.inputs[0]
            for home, (part_name, part) in zip(own, named_parts(parts, names[place.name]), strict=True):
                layer: Layer = part.layer
                if place.name != name:
                    layer = layer.model_copy(update={"shares": home})
                if part is parts[-1]:
                    editor.replace_layer(place.name, layer)
                    editor.redirect(place.name, place.inputs[0], before)
                else:
                    before = editor.add_before(place.name, layer, part_name, [before])
    return editor.graph(Limits.none())


# --- which layers -----------------------------------------------------------------------------------------------------


def _divide_layers(
    graph: Graph, why_not: Callable[[Factorable], str | None], only: Collection[str] | None, exclude: Collection[str]
) -> tuple[dict[str, Factorable], dict[str, str]]:
    found, reasons = {}, {}
    for node in graph.nodes:
        if node.type not in WEIGHTED:
            continue
        if node.shares is not None:
            reasons[node.name] = f"uses the weights of {node.shares}"
            continue
        layer = Factorable(node, graph.places(node.name))
        reason = (
            _EXCLUDED if node.name in exclude else NOT_NAMED if only is not None and node.name not in only else None
        )
        reason = reason or why_not(layer)
        if reason is None:
            found[node.name] = layer
        else:
            reasons[node.name] = reason
    return found, reasons


def _why_no_product(layer: Factorable) -> str | None:
    reason = _why_grouped(layer)
    if reason is not None:
        return reason
    for width, side in zip(layer.channels, ("input", "output"), strict=True):
        if width < LEAST_WIDTH:
            return f"{width} {side} {_unit(layer, width)}, fewer than {LEAST_WIDTH}"
    if layer.floor(1, "macs") == layer.widths and layer.floor(1, "params") == layer.widths:
        return "no product of smaller layers costs less"
    return None


def _why_not_separable(layer: Factorable) -> str | None:
    node = layer.node
    if node.type != "conv":
        return f"is a {node.type} layer: plain convolutions become separable"
    reason = _why_grouped(layer)
    if reason is not None:
        return reason
    if layer.positions == 1:
        return "its kernel is 1: there is nothing to separate"
    inputs, outputs = layer.channels
    if inputs < LEAST_WIDTH:
        return f"{inputs} input {_unit(layer, inputs)}, fewer than {LEAST_WIDTH}: each has one kernel afterwards"
    if layer.positions + outputs >= layer.positions * outputs:
        return "a separable convolution costs no less"
    return None


def _why_grouped(layer: Factorable) -> str | None:
    node = layer.node
    if isinstance(node.layer, Linear):
        return None
    groups = _convolution(node.layer).group_count(layer.channels[0])
    if groups == 1:
        return None
    return "is depthwise" if groups == layer.channels[0] else f"has {groups} groups"


def _unit(layer: Factorable, count: int) -> str:
    what = "feature" if layer.node.type == "linear" else "channel"
    return what if count == 1 else f"{what}s"


# --- layers -----------------------------------------------------------------------------------------------------------


def _options(ranks: Ranks, widths: Ranks) -> Iterable[Ranks]:
    """These ranks, and those with one of two left whole."""
    yield ranks
    if len(ranks) == 2:
        yield widths[0], ranks[1]
        yield ranks[0], widths[1]


def _pointwise(channels: int, *, bias: bool) -> Conv:
    return Conv(out_channels=channels, kernel_size=1, bias=bias)


def _convolution(layer: Any) -> Conv | ConvTranspose:
    assert isinstance(layer, Conv | ConvTranspose)
    return layer
