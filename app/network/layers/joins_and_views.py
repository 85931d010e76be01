"""The layers that join branches or arrange channels and positions: flattening, padding, slicing, shuffling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.network.layers.layer import MOST_INPUTS, Layer, check_equal
from app.network.layers.shapes import LARGEST_WIDTH, LayerFault, PadAmounts, Shape, spatial_axes, written

Channel = Annotated[int, Field(ge=0, le=LARGEST_WIDTH)]


class _Merge(Layer):
    """Takes two or more inputs."""

    least_inputs: ClassVar[int] = 2
    most_inputs: ClassVar[int] = MOST_INPUTS


class Add(_Merge):
    """`add`: the sum of inputs of one shape."""

    type: Literal["add"] = "add"

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """The shape of the inputs.

        Raises:
            LayerFault: two differ.
        """
        check_equal(inputs, "add")
        return inputs[0]


class Multiply(_Merge):
    """`multiply`: the product of inputs; axes of size 1 are stretched."""

    saves_inputs: ClassVar[bool] = True
    type: Literal["multiply"] = "multiply"

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """The largest size on each axis.

        Raises:
            LayerFault: two sizes of an axis differ and neither is 1, or the numbers of axes differ.
        """
        result = inputs[0]
        for shape in inputs[1:]:
            if len(shape) != len(result) or any(a != b and 1 not in (a, b) for a, b in zip(result, shape, strict=True)):
                both = f"{written(result)} and {written(shape)}"
                message = f"multiply takes inputs of one shape (axes of size 1 are stretched), but gets {both}"
                raise LayerFault("inputs", message, limit=list(result), value=list(shape))
            result = tuple(max(a, b) for a, b in zip(result, shape, strict=True))
        return result


class Concat(_Merge):
    """`concat`: inputs one after the other along the channels."""

    type: Literal["concat"] = "concat"

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(sum of the channels, *spatial).

        Raises:
            LayerFault: the spatial sizes differ.
        """
        for shape in inputs[1:]:
            if shape[1:] != inputs[0][1:]:
                message = f"concat takes inputs of one spatial size, but gets {written(inputs[0])} and {written(shape)}"
                raise LayerFault("inputs", message, limit=list(inputs[0]), value=list(shape))
        return (sum(shape[0] for shape in inputs), *inputs[0][1:])


class Flatten(Layer):
    """`flatten`: from the channel axis on, channels first (feature = channel * positions + position)."""

    is_view: ClassVar[bool] = True
    type: Literal["flatten"] = "flatten"

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(features,)."""
        return (math.prod(inputs[0]),)


class Slice(Layer):
    """`slice`: the channels [start, stop)."""

    is_view: ClassVar[bool] = True
    type: Literal["slice"] = "slice"
    start: Channel = 0
    stop: Channel

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(stop - start, *spatial).

        Raises:
            LayerFault: nothing is chosen, or more than there is.
        """
        channels = inputs[0][0]
        if self.stop > channels:
            raise LayerFault(
                "stop", f"ends at channel {self.stop}, but there are {channels}", limit=channels, value=self.stop
            )
        if self.start >= self.stop:
            message = f"chooses no channel: start {self.start} is not below stop {self.stop}"
            raise LayerFault("start", message, limit=self.stop - 1, value=self.start)
        return (self.stop - self.start, *inputs[0][1:])


class ChannelShuffle(Layer):
    """`channel_shuffle`: torch.nn.ChannelShuffle, channel a * (C / groups) + j goes to j * groups + a (ShuffleNet)."""

    type: Literal["channel_shuffle"] = "channel_shuffle"
    groups: Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """The input's shape.

        Raises:
            LayerFault: the groups do not divide the channels.
        """
        channels = inputs[0][0]
        if channels % self.groups:
            message = f"{self.groups} groups do not divide the {channels} channels"
            raise LayerFault("groups", message, limit=channels, value=self.groups)
        return inputs[0]


class Pad(Layer):
    """`pad`: torch.nn.functional.pad. One number pads every side of every spatial axis; a list is in PyTorch's order.

    PyTorch's order is (before, after) of the last axis, then of the one before it, and so on; with one pair more
    than there are spatial axes the last pair pads the channels.
    """

    type: Literal["pad"] = "pad"
    padding: PadAmounts
    mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    value: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0

    def amounts(self, shape: Shape) -> tuple[tuple[int, int], ...]:
        """(before, after) of each axis of `shape`, channels first.

        Raises:
            LayerFault: the list is odd or longer than the axes.
        """
        if isinstance(self.padding, int):
            axes = spatial_axes(shape, "padding by one number")
            return ((0, 0), *((self.padding, self.padding),) * axes)
        count = len(self.padding)
        if count % 2 or count > 2 * len(shape):
            most = 2 * len(shape)
            message = f"a list holds (before, after) of the last axes: up to {most} numbers for {written(shape)}"
            raise LayerFault("padding", f"{message}, not {count}", limit=most, value=count)
        pairs = [(self.padding[i], self.padding[i + 1]) for i in range(0, count, 2)]
        pairs += [(0, 0)] * (len(shape) - len(pairs))
        return tuple(reversed(pairs))

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Every axis longer by what is put before and after it.

        Raises:
            LayerFault: a list of the wrong length; another mode than constant on channels, or reaching beyond the
                input.
        """
        shape = inputs[0]
        amounts = self.amounts(shape)
        if self.mode != "constant":
            spatial_axes(shape, f'"{self.mode}" padding')
            if max(amounts[0]):
                raise LayerFault(
                    "padding",
                    f'channels can only be padded with mode "constant", not "{self.mode}"',
                    limit=0,
                    value=max(amounts[0]),
                )
            for size, pair in zip(shape[1:], amounts[1:], strict=True):
                room = {"reflect": size - 1, "circular": size}.get(self.mode, max(pair))
                if max(pair) > room:
                    message = f'"{self.mode}" padding of {max(pair)} needs more than the {size} positions of its input'
                    raise LayerFault("padding", message, limit=room, value=max(pair))
        return tuple(size + before + after for size, (before, after) in zip(shape, amounts, strict=True))
