"""The layers that change the spatial size without weights: pooling and upsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.network.layers.layer import Layer
from app.network.layers.shapes import (
    Kernel,
    LayerFault,
    Margin,
    PerAxis,
    Shape,
    Sizes,
    Step,
    per_axis,
    spatial_axes,
    windows,
)

Factor = Annotated[Sizes, PerAxis(1, 64)]


class _Pool(Layer):
    """What max and average pooling share: geometry."""

    saves_inputs: ClassVar[bool] = True

    kernel_size: Kernel
    stride: Step | None = Field(default=None, description="Default: kernel_size.")
    padding: Margin = 0
    ceil_mode: bool = False

    def kernel(self, axes: int) -> tuple[int, ...]:
        """The window's size on each spatial axis."""
        return per_axis("kernel_size", self.kernel_size, axes)

    def strides(self, axes: int) -> tuple[int, ...]:
        """The stride on each spatial axis."""
        return self.kernel(axes) if self.stride is None else per_axis("stride", self.stride, axes)

    def paddings(self, axes: int) -> tuple[int, ...]:
        """The padding on both sides of each spatial axis."""
        return per_axis("padding", self.padding, axes)

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(channels, floor or ceil((size + 2 * padding - kernel) / stride) + 1 on each axis).

        With ceil_mode the last window still starts inside the input or its padding before it, as in PyTorch.

        Raises:
            LayerFault: flat input, a window larger than its padded input, padding above half of the window.
        """
        shape = inputs[0]
        axes = spatial_axes(shape, "pooling")
        kernel, strides, paddings = self.kernel(axes), self.strides(axes), self.paddings(axes)
        for size, padding in zip(kernel, paddings, strict=True):
            if padding > size // 2:
                message = (
                    f"padding {padding} is more than half of the window of {size}: some windows would hold nothing"
                )
                raise LayerFault("padding", message, limit=size // 2, value=padding)
        padded = [size + 2 * padding for size, padding in zip(shape[1:], paddings, strict=True)]
        windows("kernel_size", shape[1:], kernel, padded)
        sizes = []
        for size, room, window, stride, padding in zip(shape[1:], padded, kernel, strides, paddings, strict=True):
            steps = (room - window + (stride - 1 if self.ceil_mode else 0)) // stride
            if self.ceil_mode and steps * stride >= size + padding:
                steps -= 1
            sizes.append(steps + 1)
        return (shape[0], *sizes)


class MaxPool(_Pool):
    """`max_pool`: torch.nn.MaxPool1d, 2d or 3d."""

    saved_bytes: ClassVar[int] = 8

    type: Literal["max_pool"] = "max_pool"


class AvgPool(_Pool):
    """`avg_pool`: torch.nn.AvgPool1d, 2d or 3d."""

    type: Literal["avg_pool"] = "avg_pool"
    count_include_pad: bool = True


class GlobalAvgPool(Layer):
    """`global_avg_pool`: the mean over all positions; keeps the spatial axes with size 1."""

    type: Literal["global_avg_pool"] = "global_avg_pool"

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(channels, 1 on each axis).

        Raises:
            LayerFault: flat input.
        """
        axes = spatial_axes(inputs[0], "global average pooling")
        return (inputs[0][0], *(1,) * axes)


class Upsample(Layer):
    """`upsample`: torch.nn.Upsample by whole factors; (bi-, tri-)linear without aligned corners."""

    type: Literal["upsample"] = "upsample"
    scale_factor: Factor
    mode: Literal["nearest", "linear", "bilinear", "trilinear"] = "nearest"

    def factors(self, axes: int) -> tuple[int, ...]:
        """The factor on each spatial axis."""
        return per_axis("scale_factor", self.scale_factor, axes)

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """(channels, size * factor on each axis).

        Raises:
            LayerFault: flat input, or a mode for another number of axes.
        """
        shape = inputs[0]
        axes = spatial_axes(shape, "upsampling")
        needed = {"linear": 1, "bilinear": 2, "trilinear": 3}.get(self.mode, axes)
        if needed != axes:
            right = ("linear", "bilinear", "trilinear")[axes - 1]
            message = (
                f'mode "{self.mode}" is for {needed} spatial axes, the input has {axes}: use "{right}" or "nearest"'
            )
            raise LayerFault("mode", message, limit=right, value=self.mode)
        return (shape[0], *(size * factor for size, factor in zip(shape[1:], self.factors(axes), strict=True)))
