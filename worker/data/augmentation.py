"""Random changes of whole batches of training images, on the device, before and after they become floats.

There is no loop over images. A crop or a flip is, for every axis of space, a table of source positions (one row an
image), by which the batch is gathered; cutout compares index grids.

Images have one, two or three axes of space, channels before or after them: N x C x *space or N x *space x C. Random
numbers come from a CPU generator, so that every device sees the same images.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SHIFT = 4  # of a crop, positions: the usual choice for 32 x 32
SMALLEST_SHARE = 7  # a crop moves by at most a seventh of an axis, so small images keep their content
CUTOUT_SHARE = 4  # a cutout's side is a quarter of the axis


@dataclass(frozen=True)
class Axes:
    """Where a batch has its axes of space: `first` counts from 0 (batch), `sizes` are their lengths."""

    first: int
    sizes: tuple[int, ...]


def source_positions(
    axes: Axes,
    images: int,
    wanted: Collection[str],
    generator: torch.Generator,
    turned: Tensor | None = None,
) -> list[tuple[int, Tensor]]:
    """(axis, positions N x S) for every axis that a crop or a flip changes; positions are int64, -1 is outside.

    A crop moves an image by up to 4 positions (a seventh of the axis where that is less). `random_crop` fills what comes
    in from outside by reflection, which is in place for pictures, signals and volumes alike; `random_crop_zeros` with
    zeros as they are stored (black), torchvision's default. `horizontal_flip` turns the last axis round in half of the
    images; `turned` (N, bool) says in which, else they are drawn.
    """
    crops = bool({"random_crop", "random_crop_zeros"}.intersection(wanted))
    changed: list[tuple[int, Tensor]] = []
    for number, size in enumerate(axes.sizes):
        positions = torch.arange(size).expand(images, size)
        shift = min(LARGEST_SHIFT, size // SMALLEST_SHARE) if crops else 0
        if shift:
            positions = positions + torch.randint(-shift, shift + 1, (images, 1), generator=generator)
            positions = _inside(positions, size, reflect="random_crop" in wanted)
        flips = (turned is not None or "horizontal_flip" in wanted) and number == len(axes.sizes) - 1
        if flips:
            flipped = torch.randint(0, 2, (images,), generator=generator).bool() if turned is None else turned
            positions = torch.where(flipped[:, None], positions.flip(1), positions)
        if shift or flips:
            changed.append((axes.first + number, positions))
    return changed


def _inside(positions: Tensor, size: int, *, reflect: bool) -> Tensor:
    """Positions that lie outside of 0 to size - 1 reflected into it, else -1."""
    if not reflect:
        return torch.where((positions < 0) | (positions >= size), -1, positions)
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def gather_axis(images: Tensor, axis: int, positions: Tensor) -> Tensor:
    """The batch whose slice i along `axis` is, in image n, the slice `positions[n, i]`; contiguous, any number type."""
    count, size = images.shape[0], images.shape[axis]
    outer = images.shape[1:axis].numel()
    inner = images.shape[axis + 1 :].numel()
    if inner >= size:  # long runs: copy them whole
        starts = torch.arange(count * outer, device=images.device).view(count, outer, 1) * size
        rows = (starts + positions.view(count, 1, size)).view(-1)
        return images.reshape(-1, inner).index_select(0, rows).view(images.shape)
    places = positions.view(count, 1, size, 1) * inner + torch.arange(inner, device=images.device)
    index = places.view(count, 1, size * inner).expand(count, outer, size * inner)
    return images.reshape(count, outer, size * inner).gather(2, index).view(images.shape)


def cut_out(images: Tensor, axes: Axes, generator: torch.Generator) -> None:
    """Set a box to 0, the mean, in every normalised float image, in place.

    Its sides are a quarter of the axes, its centre lies anywhere in the image, what stands out is lost. Improved
    Regularization of Convolutional Neural Networks with Cutout (DeVries, Taylor 2017) has sides of 16 and 8 for
    32 x 32; a quarter is the milder of the two, for short trainings.
    """
    count = images.shape[0]
    channels_after = images.shape[axes.first + len(axes.sizes) :].numel()
    inside = torch.ones(count, 1)
    for number, size in enumerate(axes.sizes):
        side = max(1, size // CUTOUT_SHARE)
        starts = torch.randint(0, size, (count, 1), generator=generator) - side // 2
        places = torch.arange(size)
        box = ((places >= starts) & (places < starts + side)).float()
        if number == len(axes.sizes) - 1:
            box = box.repeat_interleave(channels_after, dim=1)
        inside = (inside[:, :, None] * box[:, None, :]).flatten(1)
    # a product over flat runs: `masked_fill_` is not vectorised on a CPU and takes 16 times as long
    kept = (1 - inside).to(images.device, non_blocking=True)
    images.view(count, -1, inside.shape[1]).mul_(kept[:, None, :])


def shift_and_flip(images: Tensor, changes: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The batch after all `changes` that `source_positions` drew; what comes from outside is 0."""
    for axis, positions in changes:
        outside = positions < 0
        images = gather_axis(images, axis, positions.clamp(min=0).to(images.device, non_blocking=True))
        if outside.any():
            shape = [len(images) if place == 0 else 1 for place in range(images.ndim)]
            shape[axis] = images.shape[axis]
            images *= (~outside).to(images.device, images.dtype, non_blocking=True).view(shape)
    return images
