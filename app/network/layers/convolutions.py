"""The layers that multiply: convolutions in one to three dimensions, transposed convolutions, linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.network.layers.layer import check_stated
from app.network.layers.shapes import (
    LARGEST_WIDTH,
    ConvMargin,
    Groups,
    Kernel,
    LayerFault,
    LayerTensor,
    Margin,
    PlainMargin,
    Shape,
    Step,
    per_axis,
    spatial_axes,
    windows,
    written,
)
from app.network.layers.sharing import UNLESS_SHARED, Shareable, required_unless_shared

Width = Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]
StatedWidth = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Convolution(Shareable):
    """What convolutions and transposed convolutions share: geometry, groups, widths."""

    saves_inputs: ClassVar[bool] = True

    out_channels: Annotated[Width, UNLESS_SHARED] = required_unless_shared()
    kernel_size: Annotated[Kernel, UNLESS_SHARED] = required_unless_shared()
    stride: Step = 1
    padding: ConvMargin = 0
    dilation: Step = 1
    groups: Groups = Field(
        default=1, description='Number of groups, or "depthwise": as many as there are input channels.'
    )
    bias: bool = True
    in_channels: StatedWidth | None = Field(default=None, description="Checked against the input when stated.")

    def group_count(self, in_channels: int) -> int:
        """The number of groups, also where `groups` is "depthwise"."""
        return in_channels if self.groups == "depthwise" else int(self.groups)

    def kernel(self, axes: int) -> tuple[int, ...]:
        """The kernel's size on each spatial axis."""
        return per_axis("kernel_size", self.kernel_size, axes)

    def strides(self, axes: int) -> tuple[int, ...]:
        """The stride on each spatial axis."""
        return per_axis("stride", self.stride, axes)

    def dilations(self, axes: int) -> tuple[int, ...]:
        """The distance of the kernel's taps on each spatial axis."""
        return per_axis("dilation", self.dilation, axes)

    def reaches(self, axes: int) -> tuple[int, ...]:
        """How many positions the dilated kernel spans on each spatial axis."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilations(axes), self.kernel(axes), strict=True))

    def widths(self, inputs: Sequence[Shape]) -> dict[str, int]:
        """`in_channels`."""
        return {"in_channels": inputs[0][0]}

    def check_channels(self, in_channels: int) -> None:
        """Check the stated input width, and that the groups divide both widths.

        Raises:
            LayerFault: a stated width is wrong, or the groups do not divide.
        """
        check_stated("in_channels", self.in_channels, in_channels, "the number of channels that arrive")
        groups = self.group_count(in_channels)
        if self.groups == "depthwise" and self.out_channels % groups:
            raise LayerFault(
                "out_channels",
                f"a depthwise convolution gives a multiple of its {groups} input channels, not {self.out_channels}",
                limit=groups,
                value=self.out_channels,
            )
        for width, side in ((in_channels, "input"), (self.out_channels, "output")):
            if width % groups:
                raise LayerFault(
                    "groups", f"{groups} groups do not divide the {width} {side} channels", limit=width, value=groups
                )


class Conv(_Convolution):
    """`conv`: torch.nn.Conv1d, Conv2d or Conv3d, by the number of spatial axes."""

    type: Literal["conv"] = "conv"

    def paddings(self, axes: int) -> tuple[tuple[int, int], ...]:
        """Zeros before and after the input on each spatial axis; "same" puts the odd one after it, as PyTorch does."""
        if self.padding == "valid":
            return ((0, 0),) * axes
        if self.padding == "same":
            return tuple(((reach - 1) // 2, reach // 2) for reach in self.reaches(axes))
        assert not isinstance(self.padding, str)
        return tuple((p, p) for p in per_axis("padding", self.padding, axes))

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(out_channels, floor((size + padding - reach) / stride) + 1 on each axis).

        Raises:
            LayerFault: flat input, groups that do not divide, a stated width that is wrong, "same" with a stride, a
                window larger than its padded input.
        """
        shape = inputs[0]
        axes = spatial_axes(shape, "a convolution")
        self.check_channels(shape[0])
        strides, reaches = self.strides(axes), self.reaches(axes)
        if self.padding == "same" and max(strides) > 1:
            message = (
                f'"same" keeps the size, so the stride must be 1, not {max(strides)}: state the padding as a number'
            )
            raise LayerFault("padding", message, value="same")
        padded = [size + before + after for size, (before, after) in zip(shape[1:], self.paddings(axes), strict=True)]
        windows("kernel_size", shape[1:], reaches, padded)
        return (self.out_channels, *((p - r) // s + 1 for p, r, s in zip(padded, reaches, strides, strict=True)))

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """weight (out, in / groups, *kernel) and bias (out)."""
        in_channels, axes = inputs[0][0], len(inputs[0]) - 1
        weight = (self.out_channels, in_channels // self.group_count(in_channels), *self.kernel(axes))
        return {"weight": LayerTensor(weight)} | ({"bias": LayerTensor((self.out_channels,))} if self.bias else {})

    def macs(self, inputs: Sequence[Shape], output: Shape) -> int:
        """Elements of the output times the weights that each one needs."""
        in_channels, axes = inputs[0][0], len(inputs[0]) - 1
        return math.prod(output) * (in_channels // self.group_count(in_channels)) * math.prod(self.kernel(axes))


class ConvTranspose(_Convolution):
    """`conv_transpose`: torch.nn.ConvTranspose1d, 2d or 3d. Its weight is (in, out / groups, *kernel)."""

    type: Literal["conv_transpose"] = "conv_transpose"
    padding: PlainMargin = 0
    output_padding: Margin = 0

    def paddings(self, axes: int) -> tuple[int, ...]:
        """What is cut off on both sides of each spatial axis."""
        if self.padding == "valid":
            return (0,) * axes
        assert not isinstance(self.padding, str)
        return per_axis("padding", self.padding, axes)

    def output_paddings(self, axes: int) -> tuple[int, ...]:
        """What is added after each spatial axis."""
        return per_axis("output_padding", self.output_padding, axes)

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(out_channels, (size - 1) * stride - 2 * padding + reach + output_padding on each axis).

        Raises:
            LayerFault: flat input, groups that do not divide, a stated width that is wrong, output_padding that is
                not smaller than stride or dilation, a size below 1.
        """
        shape = inputs[0]
        axes = spatial_axes(shape, "a transposed convolution")
        self.check_channels(shape[0])
        strides, reaches, more = self.strides(axes), self.reaches(axes), self.output_paddings(axes)
        for extra, stride, dilation in zip(more, strides, self.dilations(axes), strict=True):
            if extra >= max(stride, dilation):
                limit = max(stride, dilation) - 1
                message = f"output_padding must be smaller than stride or dilation: at most {limit}, not {extra}"
                raise LayerFault("output_padding", message, limit=limit, value=extra)
        sizes = [
            (size - 1) * stride - 2 * cut + reach + extra
            for size, stride, cut, reach, extra in zip(
                shape[1:], strides, self.paddings(axes), reaches, more, strict=True
            )
        ]
        if min(sizes) < 1:
            raise LayerFault(
                "padding",
                f"nothing is left: the output would be {written((self.out_channels, *sizes))}",
                limit=1,
                value=min(sizes),
            )
        return (self.out_channels, *sizes)

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """weight (in, out / groups, *kernel) and bias (out)."""
        in_channels, axes = inputs[0][0], len(inputs[0]) - 1
        weight = (in_channels, self.out_channels // self.group_count(in_channels), *self.kernel(axes))
        return {"weight": LayerTensor(weight)} | ({"bias": LayerTensor((self.out_channels,))} if self.bias else {})

    def macs(self, inputs: Sequence[Shape], output: Shape) -> int:
        """Elements of the input times the weights that each one meets."""
        in_channels, axes = inputs[0][0], len(inputs[0]) - 1
        return (
            math.prod(inputs[0]) * (self.out_channels // self.group_count(in_channels)) * math.prod(self.kernel(axes))
        )


class Linear(Shareable):
    """`linear`: torch.nn.Linear on a flat input."""

    saves_inputs: ClassVar[bool] = True

    type: Literal["linear"] = "linear"
    out_features: Annotated[Width, UNLESS_SHARED] = required_unless_shared()
    bias: bool = True
    in_features: StatedWidth | None = Field(default=None, description="Checked against the input when stated.")

    def widths(self, inputs: Sequence[Shape]) -> dict[str, int]:
        """`in_features`."""
        return {"in_features": inputs[0][0]}

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(out_features,).

        Raises:
            LayerFault: the input is not flat, or a stated width is wrong.
        """
        shape = inputs[0]
        if len(shape) > 1:
            message = f"a linear layer takes a flat input, but gets {written(shape)}: put a flatten layer before it"
            raise LayerFault(None, message, limit=1, value=len(shape))
        check_stated("in_features", self.in_features, shape[0], "the number of features that arrive")
        return (self.out_features,)

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """weight (out, in) and bias (out)."""
        weight = {"weight": LayerTensor((self.out_features, inputs[0][0]))}
        return weight | ({"bias": LayerTensor((self.out_features,))} if self.bias else {})

    def macs(self, inputs: Sequence[Shape], output: Shape) -> int:
        """One per weight."""
        return self.out_features * inputs[0][0]
