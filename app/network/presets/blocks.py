"""Pieces of networks in the job language: scaled widths, stems, pools, classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.network.presets.preset import Layers

_ALIGNMENT = 8  # kernels work on blocks of 8 channels; narrower layers are rounded to the nearest integer
_LEAST_FOR_STEM = 64  # below, five halvings leave less than 2 x 2 positions

SMALL_NOTE = "below 64 on a side the first two of five halvings are left out"


def scaled(channels: int, width: float) -> int:
    """`channels * width`, at least 1: from 16 up the nearest multiple of 8 that loses at most a tenth.

    Below 16 the nearest integer; at width 1 what the paper has. The rule of MobileNet (`make_divisible`): fast kernels
    want aligned widths.
    """
    exact = channels * width
    if width == 1 or exact < 2 * _ALIGNMENT:
        return max(1, round(exact))
    aligned = int(exact + _ALIGNMENT / 2) // _ALIGNMENT * _ALIGNMENT
    return aligned if aligned >= 0.9 * exact else aligned + _ALIGNMENT


def is_small(input_shape: tuple[int, ...]) -> bool:
    """Whether a network that halves its input five times would leave too few positions of `(C, *spatial)`."""
    return min(input_shape[1:]) < _LEAST_FOR_STEM


def conv(channels: int, kernel_size: int = 3, **fields: Any) -> dict[str, Any]:
    """A convolution."""
    return {"type": "conv", "out_channels": channels, "kernel_size": kernel_size, **fields}


def normed(channels: int, kernel_size: int = 3, *, activation: str | None = "relu", **fields: Any) -> Layers:
    """A convolution without bias that keeps the size at stride 1 (odd kernels), batch norm, and an activation."""
    first = conv(channels, kernel_size, bias=False, **fields)
    if kernel_size > 1:
        first["padding"] = kernel_size // 2
    layers: Layers = [first, {"type": "batch_norm"}]
    return layers if activation is None else [*layers, {"type": activation}]


def pool(size: list[int], factor: Sequence[int], kind: str = "max_pool") -> Layers:
    """Pooling by `factor`, but not of the axes of `size` that it would empty; `size` becomes the pooled size."""
    kernel = [by if axis >= by else 1 for axis, by in zip(size, factor, strict=True)]
    if max(kernel) == 1:
        return []
    size[:] = [axis // by for axis, by in zip(size, kernel, strict=True)]
    return [{"type": kind, "kernel_size": kernel[0] if len(set(kernel)) == 1 else kernel}]


def halve(size: list[int], kind: str = "max_pool") -> Layers:
    """`pool` by 2 on every axis."""
    return pool(size, [2] * len(size), kind)


def overlapping_pool() -> Layers:
    """Max-pooling of 3 with stride 2 (Krizhevsky et al. 2012, section 3.4), padded: half the size, rounded up."""
    return [{"type": "max_pool", "kernel_size": 3, "stride": 2, "padding": 1}]


def linear(features: int) -> dict[str, Any]:
    """A linear layer."""
    return {"type": "linear", "out_features": features}


def averaged(classes: int, *, dropout: float = 0.0) -> Layers:
    """The classifier of most networks: the mean over all positions, dropout where there is any, a linear layer."""
    drop: Layers = [{"type": "dropout", "p": dropout}] if dropout else []
    return [{"type": "global_avg_pool"}, {"type": "flatten"}, *drop, linear(classes)]


def last_named(layers: Layers, name: str) -> Layers:
    """`layers` with a name for the last of them, by which others can take its output."""
    return [*layers[:-1], {**layers[-1], "name": name}]


def fed_by(layers: Layers, name: str) -> Layers:
    """`layers` of which the first takes the output of the layer `name`."""
    return [{**layers[0], "inputs": [name]}, *layers[1:]]
