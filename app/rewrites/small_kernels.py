"""A convolution with a large kernel as a stack of small ones with the same receptive field and output size."""

from __future__ import annotations

from typing import Literal

from app.network.layers.convolutions import Conv
from app.network.layers.shapes import Shape, per_axis

Word = Literal["same", "valid"]


def factors(kernel: int) -> list[int]:
    """Kernel sizes of convolutions that together reach over `kernel` positions: threes, and one two if it is even.

    The sizes k_i satisfy sum (k_i - 1) = kernel - 1.
    """
    return [3] * ((kernel - 1) // 2) + [2] * ((kernel - 1) % 2)


def stack(conv: Conv, input_shape: Shape) -> list[Conv]:
    """`conv`, for inputs `(C, *spatial)`, as convolutions of at most 3 per axis (one entry when its kernel is small).

    The stride sits on the last one and the dilation on all: with the stride on an earlier one the receptive field
    would be another. The paddings sum to the given one. Each inner one is as wide as the result and in as many
    groups; of a depthwise convolution each inner one is depthwise and as wide as the input. It is another function
    than before: weights are not carried over.
    """
    axes = len(input_shape) - 1
    dilations = conv.dilations(axes)
    sizes = _spread([factors(kernel) for kernel in conv.kernel(axes)])
    paddings = _paddings(conv, sizes, axes)
    depthwise = conv.group_count(input_shape[0]) == input_shape[0] > 1
    inner_width = input_shape[0] if depthwise else conv.out_channels
    layers = []
    for number, (size, padding) in enumerate(zip(sizes, paddings, strict=True)):
        last = number == len(sizes) - 1
        layers.append(
            Conv(
                out_channels=conv.out_channels if last else inner_width,
                kernel_size=_short(size),
                stride=conv.stride if last else 1,
                padding=padding if not isinstance(padding, tuple) else _short(padding),
                dilation=_short(dilations),
                groups=conv.groups,
                bias=conv.bias,
            )
        )
    return layers


def _spread(per_axis: list[list[int]]) -> list[tuple[int, ...]]:
    """The kernel of each convolution of the stack; axes with fewer factors have 1 in the later ones."""
    depth = max(1, *(len(sizes) for sizes in per_axis))
    return [tuple(sizes[number] if number < len(sizes) else 1 for sizes in per_axis) for number in range(depth)]


def _paddings(conv: Conv, sizes: list[tuple[int, ...]], axes: int) -> list[tuple[int, ...] | Word]:
    """The padding of each convolution of the stack, the sum of which is that of `conv`.

    From the first to the last each takes what keeps its map as large as it was, d * (k - 1) / 2; what is left then goes
    to the first: so every window fits, and no inner map ends before something that the large kernel would have seen.
    """
    if isinstance(conv.padding, str):
        return [conv.padding] * len(sizes)
    left = list(per_axis("padding", conv.padding, axes))
    paddings = []
    for size in sizes:
        natural = [d * (k - 1) // 2 for d, k in zip(conv.dilations(axes), size, strict=True)]
        paddings.append([min(rest, share) for rest, share in zip(left, natural, strict=True)])
        left = [rest - part for rest, part in zip(left, paddings[-1], strict=True)]
    paddings[0] = [part + rest for part, rest in zip(paddings[0], left, strict=True)]
    return [tuple(part) for part in paddings]


def _short(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else values
