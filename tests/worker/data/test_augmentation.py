"""Augmentation of whole batches against a loop over images that does the same by hand; any rank, both layouts."""

from __future__ import annotations

import pytest
import torch

from worker.data.augmentation import Axes, cut_out, gather_axis, shift_and_flip, source_positions

SHAPES = [(40,), (28, 28), (9, 20), (8, 16, 14)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(sizes: tuple[int, ...], *, channels_last: bool, channels: int = 3) -> tuple[torch.Tensor, Axes]:
    shape = (6, *sizes, channels) if channels_last else (6, channels, *sizes)
    images = torch.randint(0, 256, shape, generator=generator(), dtype=torch.uint8)
    return images, Axes(1 if channels_last else 2, sizes)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("wanted", [("random_crop",), ("horizontal_flip",), ("random_crop", "horizontal_flip")])
def test_a_batch_is_shifted_and_flipped_image_by_image(
    sizes: tuple[int, ...], channels_last: bool, wanted: tuple[str, ...]
) -> None:
    images, axes = batch(sizes, channels_last=channels_last)
    changes = source_positions(axes, len(images), wanted, generator(1))
    expected = images.clone()
    for axis, positions in changes:
        expected = torch.stack(
            [image.index_select(axis - 1, row) for image, row in zip(expected, positions, strict=True)]
        )
    found = shift_and_flip(images, changes)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def test_a_crop_moves_every_axis_by_up_to_four_and_reflects_what_is_outside() -> None:
    changes = dict(source_positions(Axes(2, (28, 32)), 500, ("random_crop",), generator()))
    assert set(changes) == {2, 3}
    middle = changes[2][:, 14] - 14
    assert set(middle.tolist()) == set(range(-4, 5))
    assert not torch.equal(changes[2][:, 14] - 14, changes[3][:, 14] - 14), "the axes move independently"
    down = changes[2][middle == -4][0]
    assert down[:6].tolist() == [4, 3, 2, 1, 0, 1]
    up = changes[2][middle == 4][0]
    assert up[-6:].tolist() == [26, 27, 26, 25, 24, 23]


def test_a_crop_with_zeros_fills_what_is_outside_with_zeros() -> None:
    images, axes = batch((28, 32), channels_last=False)
    images = images.clamp(min=1)
    changes = source_positions(axes, len(images), ("random_crop_zeros",), generator(2))
    found = shift_and_flip(images, changes)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for number, image in enumerate(found):
        down, right = (int(dict(changes)[axis][number, 14]) - 14 + 4 for axis in (2, 3))
        assert torch.equal(image, padded[number, :, down : down + 28, right : right + 32])
    assert (found == 0).any()


@pytest.mark.parametrize(("size", "most"), [(6, 0), (8, 1), (14, 2), (28, 4), (224, 4)])
def test_small_images_move_less(size: int, most: int) -> None:
    changes = source_positions(Axes(2, (size,)), 300, ("random_crop",), generator())
    moved = max((int((positions[:, size // 2] - size // 2).abs().max()) for _, positions in changes), default=0)
    assert moved == most


def test_half_of_the_images_are_flipped_along_the_last_axis_and_nothing_else_changes() -> None:
    [(axis, positions)] = source_positions(Axes(1, (5, 7)), 400, ("horizontal_flip",), generator())
    assert axis == 2
    flipped = positions[:, 0] == 6
    assert 150 < flipped.sum() < 250
    assert (positions[~flipped] == torch.arange(7)).all()
    assert (positions[flipped] == torch.arange(7).flip(0)).all()


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_gathering_along_any_axis_gives_what_indexing_gives(axis: int, dtype: torch.dtype) -> None:
    images = torch.randint(0, 200, (4, 3, 5, 6), generator=generator()).to(dtype)
    positions = torch.randint(0, images.shape[axis], (4, images.shape[axis]), generator=generator())
    expected = torch.stack([image.index_select(axis - 1, row) for image, row in zip(images, positions, strict=True)])
    assert torch.equal(gather_axis(images, axis, positions), expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", SHAPES)
def test_a_cutout_sets_one_box_to_zero_in_all_channels(sizes: tuple[int, ...], channels_last: bool) -> None:
    images, axes = batch(sizes, channels_last=channels_last)
    ready = images.float() + 1
    before = ready.clone()
    cut_out(ready, axes, generator(3))
    channels_first = ready.movedim(-1, 1) if channels_last else ready
    for image, original in zip(channels_first, before.movedim(-1, 1) if channels_last else before, strict=True):
        gone = (image == 0).all(dim=0)
        assert torch.equal(gone, (image == 0).any(dim=0)), "the same place in every channel"
        assert torch.equal(image[:, ~gone], original[:, ~gone]), "the rest is untouched"
        places = gone.nonzero()
        assert len(places) > 0
        box = places.max(dim=0).values - places.min(dim=0).values + 1
        assert int(box.prod()) == len(places), "it is a box"
        assert all(side <= size // 4 for side, size in zip(box.tolist(), sizes, strict=True))


def test_the_same_generator_state_gives_the_same_changes() -> None:
    axes = Axes(1, (28, 28))
    wanted = {"random_crop", "horizontal_flip"}
    first = source_positions(axes, 16, wanted, generator(7))
    again = source_positions(axes, 16, wanted, generator(7))
    other = source_positions(axes, 16, wanted, generator(8))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
