"""The layers on a residual's shortcut: they bring its input to the shape of its branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.network.layers.convolutions import Conv, Linear
from app.network.layers.joins_and_views import Pad
from app.network.layers.layer import Layer
from app.network.layers.normalization import BatchNorm
from app.network.layers.pooling import MaxPool
from app.network.layers.shapes import LayerFault, Shape, written

Stride = int | tuple[int, ...]


def shortcut_layers(kind: str, into: Shape, out: Shape) -> list[Layer]:
    """The layers that bring a residual's input of shape `into` to the shape `out` of its branch; none is the identity.

    Raises:
        LayerFault: this kind of shortcut cannot.
    """
    if into == out and kind != "projection":
        return []
    both = f"the branch gives {written(out)}, the input is {written(into)}"
    numbers: dict[str, Any] = {"limit": list(into), "value": list(out)}
    if kind == "identity":
        raise LayerFault("shortcut", f'{both}: "identity" needs equal shapes, use "projection" or "pad"', **numbers)
    if len(into) != len(out):
        raise LayerFault("shortcut", f"{both}: no shortcut changes the number of axes", **numbers)
    strides = [_stride(before, after) for before, after in zip(into[1:], out[1:], strict=True)]
    if None in strides:
        raise LayerFault("shortcut", f"{both}: no stride of a 1x1 window leads from one size to the other", **numbers)
    steps = tuple(stride for stride in strides if stride is not None)
    if kind != "pad":
        return _projection(out[0], steps)
    if out[0] < into[0]:
        raise LayerFault("shortcut", f'{both}: "pad" can only add channels, use "projection"', **numbers)
    return _zero_padding(out[0] - into[0], steps)


def _stride(before: int, after: int) -> int | None:
    """The smallest stride with which a window of one position makes `after` positions of `before`, or None."""
    stride = (before - 1) // after + 1
    return stride if after <= before and (before - 1) // stride + 1 == after else None


def _as_sent(strides: Sequence[int]) -> Stride:
    """One number where all axes have the same stride, else the list."""
    return strides[0] if len(set(strides)) == 1 else tuple(strides)


def _projection(channels: int, strides: Sequence[int]) -> list[Layer]:
    """A 1x1 convolution, or a linear layer on flat inputs, and batch norm."""
    if not strides:
        return [Linear(out_features=channels, bias=False), BatchNorm()]
    return [Conv(out_channels=channels, kernel_size=1, stride=_as_sent(strides), bias=False), BatchNorm()]


def _zero_padding(more: int, strides: Sequence[int]) -> list[Layer]:
    """Every stride-th position, and `more` channels of zeros, half of them before the others."""
    layers: list[Layer] = []
    if any(stride > 1 for stride in strides):
        layers.append(MaxPool(kernel_size=1, stride=_as_sent(strides)))
    if more > 0:
        layers.append(Pad(padding=(0, 0) * len(strides) + (more // 2, more - more // 2)))
    return layers
