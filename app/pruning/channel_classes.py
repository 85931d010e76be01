"""Which channels of a graph are tied together, and the smaller graph without some of them.

A *slot* is one channel position of one node's output. A *class* is a set of slots that are removed together; its
number is its smallest slot. A *group* is the set of classes that appear in the same places, equally often: what a
person calls "the width of stage 2". Which of them are removed makes no difference to the cost. A *pinned* class may not be
removed; the reason is kept.

    classes = channel_classes(graph)
    classes.members(c)                          # every tensor position that is removed with class c
    smaller = shrink_graph(graph, dropped)      # same names, new widths, validated again

Pure integers, no weights, no torch: the dry run needs it too. The rules per layer type are in `channel_rules.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.network.graph import Graph
from app.network.layers.layer import Layer
from app.network.layers.names import INPUT
from app.network.node import Limits
from app.pruning.channel_rules import RULES, IntArray, Kept, OwnedAxis, Slots, Ties, as_at_start

MOST_POSITIONS = 4_000_000  # in the outputs of all nodes: ResNet-152 has 500,000, and each takes about a microsecond


class TooManyChannels(Exception):
    """The network has more channels than pruning ranks; `limit` is the largest number."""

    limit = MOST_POSITIONS

    def __init__(self) -> None:
        super().__init__(
            f"a network whose channels are pruned has at most {MOST_POSITIONS} channels in the outputs of its layers"
        )


@dataclass(frozen=True, eq=False)
class Group:
    """Classes that appear in the same places, equally often in each: `classes` in ascending order.

    `axes` are the positions in `Classes.axes`, `nodes` the names of the nodes in whose outputs they appear, and
    `counts` how many channels of each of these one class has. `channels` is the least of them (g after a convolution
    with g groups, else 1).
    """

    index: int
    classes: IntArray
    axes: tuple[int, ...]
    nodes: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def channels(self) -> int:
        """How many channels one class has where it is narrowest."""
        return min(self.counts)


@dataclass(frozen=True, eq=False)
class Classes:
    """The channel classes of a graph.

    `slots[node]` has a class for each channel of the node's output ("input" for the images); `axes` are all tensor
    axes that follow channels; `pins` says why a class may not be removed.
    """

    slots: Mapping[str, Slots]
    axes: tuple[OwnedAxis, ...]
    groups: tuple[Group, ...]
    pins: Mapping[int, str]
    slot_count: int

    def members(self, channel_class: int) -> list[tuple[str, str, int, int]]:
        """(layer, tensor, axis, index) of everything that is removed with the class, in the order of the graph."""
        found = []
        for owned in self.axes:
            for place in np.flatnonzero(owned.slots.ids == channel_class).tolist():
                start = place * owned.slots.repeat
                found += [(owned.layer, owned.tensor, owned.axis, start + i) for i in range(owned.slots.repeat)]
        return found

    def all(self) -> IntArray:
        """Every class, ascending."""
        return np.unique(np.concatenate([group.classes for group in self.groups]))

    def kept(self, dropped: Collection[int]) -> Kept:
        """The slots without those of `dropped`, which are classes that are not pinned."""
        pinned = [c for c in dropped if c in self.pins]
        assert not pinned, f"class {pinned[0]} is pinned: {self.pins[pinned[0]]}"
        mask = np.ones(self.slot_count, dtype=np.bool_)
        mask[np.fromiter(dropped, dtype=np.int64, count=len(dropped))] = False
        return Kept(mask)

    def layers_of(self, group: Group) -> tuple[str, ...]:
        """The layers whose output channels are the group's, in the order of the graph."""
        producers = [self.axes[i].layer for i in group.axes if self.axes[i].role == "out"]
        return tuple(dict.fromkeys(producers))

    def key(self, group: Group) -> frozenset[tuple[str, str, int]]:
        """What names the group in another graph with the same layer names: where it appears, and how often."""
        axes = [(axis.layer, axis.tensor, axis.axis) for axis in (self.axes[i] for i in group.axes)]
        return frozenset([*axes, *((node, "", count) for node, count in zip(group.nodes, group.counts, strict=True))])


def channel_classes(graph: Graph, start: Graph | None = None) -> Classes:
    """The classes, groups and pins of a graph's channels.

    `start` is the graph before earlier stages of one pruning step, if there were any: what was tied there stays tied.

    Raises:
        TooManyChannels: The outputs of all layers have more than 4 million channels.
    """
    ties = Ties()
    raw: dict[str, Slots] = {INPUT: ties.fresh(graph.input_shape[0])}
    ties.pin(raw[INPUT], "network input")
    axes: list[OwnedAxis] = []
    positions = 0
    nodes = graph.nodes if start is None else [as_at_start(node, start[node.name]) for node in graph.nodes]
    for node in nodes:
        rule, inputs = RULES[node.layer.type], [raw[name] for name in node.inputs]
        raw[node.name] = rule.slots(node, inputs, ties)
        if node.shares is None:
            axes += rule.axes(node, inputs, raw[node.name])
        else:  # the axes of its tensors follow the slots of both places
            owner = graph[node.shares]
            ties.tie(raw[owner.inputs[0]], inputs[0])
            ties.tie(raw[owner.name], raw[node.name])
        positions += len(raw[node.name].ids)
        if positions > MOST_POSITIONS:
            raise TooManyChannels
    ties.pin(raw[graph.output], "network output")

    roots = _roots(ties.count, ties.pairs)
    pins: dict[int, str] = {}
    for ids, reason in ties.pins:
        for root in np.unique(roots[ids]).tolist():
            pins.setdefault(root, reason)
    renamed: dict[int, Slots] = {}  # by identity: most nodes hand their input's slots on

    def rename(slots: Slots) -> Slots:
        if id(slots) not in renamed:
            renamed[id(slots)] = slots.renamed(roots)
        return renamed[id(slots)]

    slots = {name: rename(found) for name, found in raw.items()}
    owned = tuple(OwnedAxis(a.layer, a.tensor, a.axis, a.role, rename(a.slots)) for a in axes)
    return Classes(slots, owned, _groups(np.unique(roots), slots, owned), pins, ties.count)


def shrink_graph(graph: Graph, dropped: Collection[int], classes: Classes | None = None) -> Graph:
    """The graph without the channels of the `dropped` classes: same layers and names, new widths, validated again.

    The order of the kept channels is kept. `classes` are those of `graph`, where they are at hand. A depthwise
    convolution says so by the word afterwards, so that it ties its channels even when it has only one.
    """
    if not len(dropped):
        return graph
    classes = classes or channel_classes(graph)
    kept = classes.kept(dropped)
    changed: dict[str, Layer] = {}
    for node in graph.nodes:
        inputs = [classes.slots[name] for name in node.inputs]
        fields = RULES[node.layer.type].resize(node, inputs, classes.slots[node.name], kept)
        if fields:
            changed[node.name] = node.layer.model_copy(update=fields)
    return graph.replace(changed, limits=Limits.none())


def _roots(count: int, pairs: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """For every slot, the smallest slot it is tied to."""
    parents = np.arange(count, dtype=np.int64)
    for left, right in pairs:
        while True:
            left, right = _find(parents, left), _find(parents, right)
            apart = left != right
            if not apart.any():
                break
            left, right = left[apart], right[apart]
            np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))
    return _find(parents, np.arange(count, dtype=np.int64))


def _find(parents: IntArray, slots: IntArray) -> IntArray:
    """The root of each of `slots`; paths are shortened on the way."""
    roots = parents[slots]
    while True:
        further = parents[roots]
        if np.array_equal(further, roots):
            parents[slots] = roots
            return roots
        roots = further


def _groups(found: IntArray, slots: Mapping[str, Slots], axes: Sequence[OwnedAxis]) -> tuple[Group, ...]:
    """The classes `found`, divided: those of one group appear in the same outputs and axes, equally often in each."""
    distinct = {id(s): s for s in [*slots.values(), *(axis.slots for axis in axes)]}
    counted = {key: np.unique(s.ids, return_counts=True) for key, s in distinct.items()}
    label = np.zeros(int(found[-1]) + 1, dtype=np.int64)
    labels = 1
    for ids, counts in counted.values():
        apart = label[ids] * (int(counts.max()) + 1) + counts  # those inside part from those outside, and by count
        old, new = np.unique(apart, return_inverse=True)
        label[ids] = labels + new
        labels += len(old)

    order = found[np.lexsort((found, label[found]))]
    parts = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    parts.sort(key=lambda part: int(part[0]))
    index_of = {int(label[part[0]]): index for index, part in enumerate(parts)}
    inside: dict[int, list[tuple[int, int]]] = {}
    """for each of `distinct`: (index of a group, how many positions one of its classes has)"""
    for key, (ids, counts) in counted.items():
        names, first = np.unique(label[ids], return_index=True)
        channels = (counts[first] * distinct[key].repeat).tolist()
        inside[key] = [(index_of[name], count) for name, count in zip(names.tolist(), channels, strict=True)]
    axes_of: list[list[int]] = [[] for _ in parts]
    nodes_of: list[list[tuple[str, int]]] = [[] for _ in parts]
    for place, axis in enumerate(axes):
        for index, _ in inside[id(axis.slots)]:
            axes_of[index].append(place)
    for name, output in slots.items():
        for index, count in inside[id(output)]:
            nodes_of[index].append((name, count))
    groups = []
    for index, part in enumerate(parts):
        nodes, counts_of = zip(*nodes_of[index], strict=True)
        groups.append(Group(index, part, tuple(axes_of[index]), nodes, counts_of))
    return tuple(groups)
