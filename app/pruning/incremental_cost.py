"""The exact cost of a graph while channels are removed from it, from the numbers of kept channels alone.

Elements and multiply-accumulates are products of at most two widths, and both widths of a layer may move with one
class: savings can never be added up in advance. So the widths are kept as integers, and what a change touches is counted
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.network.cost import FLOAT_BYTES, Cost, CostMeasure, safetensors_bytes
from app.network.graph import Graph
from app.network.layers.shapes import Shape
from app.pruning.channel_classes import Classes, Group
from app.pruning.channel_rules import IntArray, Slots


@dataclass(frozen=True)
class ChannelBlock:
    """Classes of one group that are removed together, and how much narrower each width is without them.

    `channels` are their channels where the group is narrowest, `widths` pairs of (number of a width, channels off it).
    """

    group: int
    classes: tuple[int, ...]
    channels: int
    widths: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CostProduct:
    """A product of the widths of these numbers, and how often it counts in each cost."""

    widths: tuple[int, ...]
    macs: int
    params: int
    stored: int


@dataclass
class _Term:
    """A product of widths, and how often it counts in each cost."""

    widths: tuple[int, ...]
    macs: int = 0
    params: int = 0
    stored: int = 0
    value: int = 0


class IncrementalCost:
    """Widths of a graph, and `macs`, `params` and `stored` (elements in the file) that follow from them."""

    def __init__(self, graph: Graph, classes: Classes) -> None:
        self.macs = self.params = self.stored = 0
        self._widths: list[int] = []
        self._ids: list[IntArray] = []
        self._repeats: list[int] = []
        self._terms: list[_Term] = []
        self._shapes: dict[str, list[tuple[int | None, int]]] = {}
        """key -> for each axis (its width, or None where it is fixed; its size)"""
        self._width_of_axis = self._number_widths(classes)
        self._read(graph, classes)
        self._terms_of_width: list[list[_Term]] = [[] for _ in self._widths]
        for term in self._terms:
            for width in set(term.widths):
                self._terms_of_width[width].append(term)
        self._touched: dict[tuple[int, ...], list[_Term]] = {}
        sizes = {key: tuple(size for _, size in axes) for key, axes in self._shapes.items()}
        self._largest_header = safetensors_bytes(sizes) - FLOAT_BYTES * self.stored
        self._smallest_header = 0

    def channel_blocks(self, group: Group, parts: Sequence[IntArray]) -> list[ChannelBlock]:
        """The parts of a group's classes, in order, with the channels that each has in every width."""
        touched: list[tuple[int, IntArray]] = []
        for width in sorted({self._width_of_axis[axis] for axis in group.axes}):
            ids, counts = np.unique(self._ids[width], return_counts=True)
            per_class = counts * self._repeats[width]
            touched.append(
                (width, np.concatenate([[0], np.cumsum(per_class[np.searchsorted(ids, np.concatenate(parts))])]))
            )
        ends = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        return [
            ChannelBlock(
                group.index,
                tuple(part.tolist()),
                len(part) * group.channels,
                tuple((width, int(total[end] - total[start])) for width, total in touched),
            )
            for part, start, end in zip(parts, ends, ends[1:], strict=False)
        ]

    def remove(self, channel_block: ChannelBlock) -> None:
        """Remove the block's channels from the network."""
        self._move(channel_block, -1)

    def give_back(self, channel_block: ChannelBlock) -> None:
        """Put the block's channels back into the network."""
        self._move(channel_block, 1)

    def fits(self, measure: CostMeasure, allowed: int) -> bool:
        """Whether the cost is at most `allowed`."""
        if measure != "bytes":
            return (self.macs if measure == "macs" else self.params) <= allowed
        # The header changes by a few bytes only: it is built when they decide.
        if FLOAT_BYTES * self.stored + self._largest_header <= allowed:
            return True
        return FLOAT_BYTES * self.stored + self._smallest_header <= allowed and self.bytes() <= allowed

    def bytes(self) -> int:
        """Size of the safetensors file."""
        return safetensors_bytes(self.shapes())

    def note_floor(self) -> None:
        """Note that the network does not become smaller than it is now, which makes `fits` faster."""
        self._smallest_header = self.bytes() - FLOAT_BYTES * self.stored

    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor, by key."""
        widths = self._widths
        return {
            key: tuple(size if width is None else widths[width] for width, size in axes)
            for key, axes in self._shapes.items()
        }

    def cost(self) -> Cost:
        """All costs as they are now."""
        return Cost(params=self.params, nonzero_params=self.params, macs=self.macs, bytes=self.bytes())

    def products(self) -> list[CostProduct]:
        """The products of widths of which each cost is the sum, as often as they say: for gates between 0 and 1."""
        return [CostProduct(term.widths, term.macs, term.params, term.stored) for term in self._terms]

    def slots_of_widths(self) -> list[Slots]:
        """By the number of a width: the classes along it, those that left included."""
        return [Slots(ids, repeat) for ids, repeat in zip(self._ids, self._repeats, strict=True)]

    def _number_widths(self, classes: Classes) -> list[int]:
        """For each axis of the classes the number of its width: axes along the same slots share one."""
        numbers: dict[tuple[bytes, int], int] = {}
        known: dict[int, int] = {}
        of_axis = []
        for axis in classes.axes:
            slots: Slots = axis.slots
            if id(slots) not in known:
                key = (slots.ids.tobytes(), slots.repeat)
                if key not in numbers:
                    numbers[key] = len(self._widths)
                    self._widths.append(slots.width)
                    self._ids.append(slots.ids)
                    self._repeats.append(slots.repeat)
                known[id(slots)] = numbers[key]
            of_axis.append(known[id(slots)])
        return of_axis

    def _read(self, graph: Graph, classes: Classes) -> None:
        owned = {(a.layer, a.tensor, a.axis): w for a, w in zip(classes.axes, self._width_of_axis, strict=True)}
        terms: dict[tuple[int, ...], _Term] = {}
        for node in graph.nodes:
            for name, tensor in node.uses.items():
                axes = [(owned.get((node.home, name, axis)), size) for axis, size in enumerate(tensor.shape)]
                widths = tuple(sorted(width for width, _ in axes if width is not None))
                term = terms.setdefault(widths, _Term(widths))
                fixed = 1
                for width, size in axes:
                    fixed *= size if width is None else 1
                if node.shares is None:
                    self._shapes[f"{node.name}.{name}"] = axes
                    term.stored += fixed
                    term.params += fixed if tensor.trainable else 0
                if name == "weight" and node.macs:
                    positions, rest = divmod(node.macs, tensor.elements)
                    assert rest == 0, f"{node.name}: every weight is used at a whole number of positions"
                    term.macs += fixed * positions
        self._terms = list(terms.values())
        for term in self._terms:
            self._count(term)

    def _count(self, term: _Term) -> None:
        value = 1
        for width in term.widths:
            value *= self._widths[width]
        change = value - term.value
        term.value = value
        self.macs += change * term.macs
        self.params += change * term.params
        self.stored += change * term.stored

    def _move(self, channel_block: ChannelBlock, sign: int) -> None:
        for width, change in channel_block.widths:
            self._widths[width] += sign * change
        key = tuple(width for width, _ in channel_block.widths)
        if key not in self._touched:
            found = {id(term): term for width in key for term in self._terms_of_width[width]}
            self._touched[key] = list(found.values())
        for term in self._touched[key]:
            self._count(term)
