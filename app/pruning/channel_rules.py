"""What each type of layer does to channels: one small rule per type, looked up in `RULES`.

A *slot* is one channel position of one node's output. A rule says
- which slots its output has: the input's, re-ordered, or fresh ones; which of them are removed together
  (*ties*); which may never be removed (*pins*);
- which axes of its tensors follow slots: an index of such an axis is removed exactly when its slot is;
- which fields of the layer change when slots are removed.

Ties are by position: a convolution with groups loses the same positions in every group, and a shuffle the same in
every block, so that all blocks stay equally wide. Nothing else is needed: no rules for pairs of layers, no offsets
for concat, no special case after flatten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from app.network.layers.convolutions import Conv, ConvTranspose
from app.network.layers.joins_and_views import ChannelShuffle, Pad, Slice
from app.network.layers.layer import Layer
from app.network.layers.normalization import GroupNorm
from app.network.node import Node

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Role = Literal["out", "in", "norm", "other"]
SomeLayer = TypeVar("SomeLayer", bound=Layer)


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots along a channel axis: each of `ids` stands for `repeat` positions in a row (after flatten)."""

    ids: IntArray
    repeat: int = 1

    @property
    def width(self) -> int:
        """Number of positions."""
        return len(self.ids) * self.repeat

    def runs(self, length: int) -> IntArray:
        """The slot of every run of `length` positions; `length` divides `repeat`."""
        return self.ids if length == self.repeat else np.repeat(self.ids, self.repeat // length)

    def renamed(self, names: IntArray) -> Slots:
        """The same positions with `names[slot]` instead of each slot."""
        return Slots(names[self.ids], self.repeat)


@dataclass(frozen=True, eq=False)
class OwnedAxis:
    """One axis of one stored tensor that follows slots.

    `role`: "out" and "in" are the two sides of weights that multiply (producer, consumer), "norm" the affine part of
    a normalisation, "other" everything else (bias, running statistics, prelu): sliced, but not scored.
    """

    layer: str
    tensor: str
    axis: int
    role: Role
    slots: Slots


class Ties:
    """Fresh slots, ties and pins that the rules collect while they run over a graph."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[tuple[IntArray, IntArray]] = []
        self.pins: list[tuple[IntArray, str]] = []

    def fresh(self, width: int) -> Slots:
        """Number `width` new slots."""
        self.count += width
        return Slots(np.arange(self.count - width, self.count, dtype=np.int64))

    def tie(self, left: Slots, right: Slots) -> None:
        """Tie position i of `left` to position i of `right`: they are removed together."""
        if left is not right:
            length = math.gcd(left.repeat, right.repeat)
            self.pairs.append((left.runs(length), right.runs(length)))

    def tie_rows(self, table: IntArray) -> None:
        """Tie the entries of each column of `table`."""
        for row in table[1:]:
            self.pairs.append((table[0], row))

    def pin(self, slots: Slots, reason: str) -> None:
        """Forbid the removal of these slots; `reason` is the first one that counts."""
        self.pins.append((slots.ids, reason))


@dataclass(frozen=True)
class Kept:
    """Which slots are kept, by slot."""

    mask: BoolArray

    def count(self, slots: Slots) -> int:
        """How many positions are kept."""
        return int(np.count_nonzero(self.mask[slots.ids])) * slots.repeat

    def count_between(self, slots: Slots, start: int, stop: int) -> int:
        """How many of the positions [start, stop) are kept."""
        length = math.gcd(slots.repeat, start, stop)
        return int(np.count_nonzero(self.mask[slots.runs(length)[start // length : stop // length]])) * length


SlotRule = Callable[[Node, Sequence[Slots], Ties], Slots]
AxesRule = Callable[[Node, Sequence[Slots], Slots], list[OwnedAxis]]
ResizeRule = Callable[[Node, Sequence[Slots], Slots, Kept], dict[str, Any]]


def _no_axes(node: Node, inputs: Sequence[Slots], output: Slots) -> list[OwnedAxis]:
    return []


def _no_change(node: Node, inputs: Sequence[Slots], output: Slots, kept: Kept) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class ChannelRule:
    """The rule of one type of layer: slots of its output, axes of its tensors, fields that change."""

    slots: SlotRule
    axes: AxesRule = _no_axes
    resize: ResizeRule = _no_change


def _layer(node: Node, kind: type[SomeLayer]) -> SomeLayer:
    """The layer of a node whose rule stands at this type in `RULES`."""
    assert isinstance(node.layer, kind)
    return node.layer


def _same(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    return inputs[0]


def _per_channel_axes(role: Role) -> AxesRule:
    """Every tensor of the layer has one entry per input channel; weight and bias have `role`."""

    def axes(node: Node, inputs: Sequence[Slots], output: Slots) -> list[OwnedAxis]:
        names = node.tensors
        return [OwnedAxis(node.name, t, 0, role if t in ("weight", "bias") else "other", inputs[0]) for t in names]

    return axes


def _mixing(reason: str) -> SlotRule:
    def slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
        ties.pin(inputs[0], reason)  # its statistics mix all channels: a smaller network would be another function
        return inputs[0]

    return slots


# convolution and linear


class Grouped(int):
    """The number of groups of a convolution that had more inputs in each when its pruning started: not depthwise."""


def as_at_start(node: Node, before: Node) -> Node:
    """`node` with the ties that it had as `before`, since when nothing but channels was removed.

    A convolution with groups is a depthwise one when each group has one input left, and its channels would be free of
    the ties between the groups: floors and shares would not be those of the start.
    """
    if node.type not in ("conv", "conv_transpose") or _groups(before)[1]:
        return node
    groups, depthwise = _groups(node)
    return replace(node, layer=node.layer.model_copy(update={"groups": Grouped(groups)})) if depthwise else node


def _groups(node: Node) -> tuple[int, bool]:
    """(number of groups, whether it is depthwise). A layer that says so by the word is depthwise with one channel too."""
    layer, channels = node.layer, node.input_shapes[0][0]
    assert isinstance(layer, Conv | ConvTranspose)
    groups = layer.group_count(channels)
    if isinstance(layer.groups, Grouped):
        return groups, False
    return groups, layer.groups == "depthwise" or groups == channels > 1


def _conv_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    groups, depthwise = _groups(node)
    if depthwise:
        return Slots(np.repeat(inputs[0].runs(1), node.shape[0] // groups))
    output = ties.fresh(node.shape[0])
    if groups > 1:
        ties.tie_rows(inputs[0].runs(1).reshape(groups, -1))
        ties.tie_rows(output.ids.reshape(groups, -1))
    return output


def _block(slots: Slots, groups: int) -> Slots:
    """The slots of the first of `groups` blocks, which stand for all of them."""
    return slots if groups == 1 else Slots(slots.runs(1)[: slots.width // groups])


def _bias(node: Node, output: Slots) -> list[OwnedAxis]:
    has_bias = "bias" in node.tensors
    return [OwnedAxis(node.name, "bias", 0, "other", output)] if has_bias else []


def _conv_axes(node: Node, inputs: Sequence[Slots], output: Slots) -> list[OwnedAxis]:
    groups, depthwise = _groups(node)
    weight = [OwnedAxis(node.name, "weight", 0, "out", output)]  # (out, in / groups, *kernel)
    if not depthwise:
        weight.append(OwnedAxis(node.name, "weight", 1, "in", _block(inputs[0], groups)))
    return weight + _bias(node, output)


def _conv_transpose_axes(node: Node, inputs: Sequence[Slots], output: Slots) -> list[OwnedAxis]:
    groups, depthwise = _groups(node)
    if depthwise:  # weight (in, out / groups, *kernel)
        weight = [OwnedAxis(node.name, "weight", 0, "out", inputs[0])]
    else:
        weight = [
            OwnedAxis(node.name, "weight", 0, "in", inputs[0]),
            OwnedAxis(node.name, "weight", 1, "out", _block(output, groups)),
        ]
    return weight + _bias(node, output)


def _conv_resize(node: Node, inputs: Sequence[Slots], output: Slots, kept: Kept) -> dict[str, Any]:
    _, depthwise = _groups(node)
    fields: dict[str, Any] = {"out_channels": kept.count(output)}
    return fields | ({"groups": "depthwise"} if depthwise else {})


def _linear_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    return ties.fresh(node.shape[0])


def _linear_axes(node: Node, inputs: Sequence[Slots], output: Slots) -> list[OwnedAxis]:
    weight = [OwnedAxis(node.name, "weight", 0, "out", output), OwnedAxis(node.name, "weight", 1, "in", inputs[0])]
    return weight + _bias(node, output)


def _linear_resize(node: Node, inputs: Sequence[Slots], output: Slots, kept: Kept) -> dict[str, Any]:
    return {"out_features": kept.count(output)}


# normalisation in groups


def _group_norm_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    groups = _layer(node, GroupNorm).num_groups
    length = math.gcd(inputs[0].repeat, inputs[0].width // groups)
    ties.tie_rows(inputs[0].runs(length).reshape(groups, -1).T)  # whole norm groups are removed
    return inputs[0]


def _group_norm_resize(node: Node, inputs: Sequence[Slots], output: Slots, kept: Kept) -> dict[str, Any]:
    return {"num_groups": kept.count(inputs[0]) // (inputs[0].width // _layer(node, GroupNorm).num_groups)}


# several inputs


def _elementwise_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    wide = [slots for slots in inputs if slots.width == node.shape[0]]
    for slots in inputs:
        if slots.width == node.shape[0]:
            ties.tie(wide[0], slots)
        else:
            ties.pin(slots, f"its one channel is spread over all channels by {node.name}")
    return wide[0]


def _concat_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    length = math.gcd(*(slots.repeat for slots in inputs))
    return Slots(np.concatenate([slots.runs(length) for slots in inputs]), length)


# layers that move channels


def _flatten_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    positions = math.prod(node.input_shapes[0][1:])  # feature = channel * positions + position
    return Slots(inputs[0].ids, inputs[0].repeat * positions)


def _shuffle_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    blocks = inputs[0].runs(1).reshape(_layer(node, ChannelShuffle).groups, -1)
    ties.tie_rows(blocks)
    return Slots(np.ascontiguousarray(blocks.T).ravel())


def _slice_bounds(node: Node) -> tuple[int, int]:
    start = _layer(node, Slice).start
    return start, start + node.shape[0]


def _slice_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    start, stop = _slice_bounds(node)
    length = math.gcd(inputs[0].repeat, start, stop)
    return Slots(inputs[0].runs(length)[start // length : stop // length], length)


def _slice_resize(node: Node, inputs: Sequence[Slots], output: Slots, kept: Kept) -> dict[str, Any]:
    start, stop = _slice_bounds(node)
    before = kept.count_between(inputs[0], 0, start)
    return {"start": before, "stop": before + kept.count_between(inputs[0], start, stop)}


def _channel_padding(node: Node) -> tuple[int, int]:
    """Channels that a `pad` layer adds before and after its input."""
    front, back = _layer(node, Pad).amounts(node.input_shapes[0])[0]
    return front, back


def _pad_slots(node: Node, inputs: Sequence[Slots], ties: Ties) -> Slots:
    front, back = _channel_padding(node)
    if front == back == 0:
        return inputs[0]
    channels = [ties.fresh(front).ids, inputs[0].runs(1), ties.fresh(back).ids]
    return Slots(np.concatenate(channels))


def _pad_resize(node: Node, inputs: Sequence[Slots], output: Slots, kept: Kept) -> dict[str, Any]:
    front, back = _channel_padding(node)
    if front == back == 0:
        return {}
    width = output.width
    pair = [kept.count_between(output, 0, front), kept.count_between(output, width - back, width)]
    padding = _layer(node, Pad).padding
    assert isinstance(padding, tuple), "one number for all sides pads no channels"
    return {"padding": (*padding[:-2], *pair)}  # the channel axis comes last in PyTorch's order


_SAME = ChannelRule(_same)
_ELEMENTWISE = ChannelRule(_elementwise_slots)

RULES: Mapping[str, ChannelRule] = {
    "conv": ChannelRule(_conv_slots, _conv_axes, _conv_resize),
    "conv_transpose": ChannelRule(_conv_slots, _conv_transpose_axes, _conv_resize),
    "linear": ChannelRule(_linear_slots, _linear_axes, _linear_resize),
    "batch_norm": ChannelRule(_same, _per_channel_axes("norm")),
    "prelu": ChannelRule(_same, _per_channel_axes("other")),
    "group_norm": ChannelRule(_group_norm_slots, _per_channel_axes("norm"), _group_norm_resize),
    "layer_norm": ChannelRule(_mixing("layer_norm over channels"), _per_channel_axes("norm")),
    "softmax": ChannelRule(_mixing("softmax over channels")),
    "relu": _SAME,
    "relu6": _SAME,
    "leaky_relu": _SAME,
    "silu": _SAME,
    "gelu": _SAME,
    "hardswish": _SAME,
    "hardsigmoid": _SAME,
    "sigmoid": _SAME,
    "tanh": _SAME,
    "max_pool": _SAME,
    "avg_pool": _SAME,
    "global_avg_pool": _SAME,
    "dropout": _SAME,
    "spatial_dropout": _SAME,
    "upsample": _SAME,
    "add": _ELEMENTWISE,
    "multiply": _ELEMENTWISE,
    "concat": ChannelRule(_concat_slots),
    "flatten": ChannelRule(_flatten_slots),
    "channel_shuffle": ChannelRule(_shuffle_slots),
    "slice": ChannelRule(_slice_slots, resize=_slice_resize),
    "pad": ChannelRule(_pad_slots, resize=_pad_resize),
}
