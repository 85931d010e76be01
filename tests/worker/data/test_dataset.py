"""From packed folders to batches: views, splits, exact statistics, and batches that are the same after a restart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.datasets.ingest.limits import UploadLimits
from app.datasets.ingest.pack import pack_upload
from app.errors import DataInvalid
from app.network.architecture import Preprocessing
from app.spec.data import DataSpec
from tests.support.services.uploads import class_folders, images, labels, npz, picture, zipped
from worker.data.dataset import (
    BatchLoader,
    Dataset,
    Split,
    derive_seed,
    equal_batches,
    free_bytes,
    measure_preprocessing,
    split_dataset,
)

ALL = ("random_crop", "horizontal_flip", "cutout")
DATA = DataSpec(dataset="x")


def packed(tmp_path: Path, upload: Path) -> Path:
    out = tmp_path / "packed"
    out.mkdir()
    pack_upload(upload, "auto", out, UploadLimits())
    return out


def arrays(tmp_path: Path, shape: tuple[int, ...], *, dtype: str = "uint8", count: int = 40, classes: int = 4) -> Path:
    sent = {
        "x_train": images(count, shape, dtype=dtype),
        "y_train": labels(count, classes),
        "x_test": images(8, shape, seed=1, dtype=dtype),
        "y_test": labels(8, classes),
    }
    return packed(tmp_path, npz(tmp_path / "u", **sent))


@pytest.mark.parametrize(
    ("stored", "input_shape", "turned"),
    [
        ((3, 6, 8), (3, 6, 8), lambda x: x),
        ((6, 8, 3), (3, 6, 8), lambda x: x.transpose(0, 3, 1, 2)),
        ((3, 3, 3), (3, 3, 3), lambda x: x.transpose(0, 3, 1, 2)),
        ((6, 8), (1, 6, 8), lambda x: x[:, None]),
        ((30,), (1, 30), lambda x: x[:, None]),
        ((30, 2), (2, 30), lambda x: x.transpose(0, 2, 1)),
        ((2, 4, 6, 6), (2, 4, 6, 6), lambda x: x),
        ((4, 6, 6), (1, 4, 6, 6), lambda x: x[:, None]),
    ],
)
def test_the_input_shape_decides_which_axis_holds_the_channels(
    tmp_path: Path, stored: tuple[int, ...], input_shape: tuple[int, ...], turned: Any
) -> None:
    dataset = Dataset.open(arrays(tmp_path, stored), input_shape)
    np.testing.assert_array_equal(dataset.train.images, turned(images(40, stored)))
    np.testing.assert_array_equal(dataset.test.images, turned(images(8, stored, seed=1)))
    assert not dataset.test.images.flags.writeable, "a view of the mapped file"
    assert dataset.class_names == ("0", "1", "2", "3")


def test_examples_that_do_not_fit_are_refused_with_both_shapes(tmp_path: Path) -> None:
    folder = arrays(tmp_path, (6, 8))
    with pytest.raises(DataInvalid, match=r"have the shape \[6, 8\], the job's input_shape is \[3, 6, 8\]"):
        Dataset.open(folder, (3, 6, 8))
    with pytest.raises(DataInvalid, match="holds no packed data set"):
        Dataset.open(tmp_path, (1, 6, 8))


def test_pictures_are_resized_and_the_report_says_so(tmp_path: Path) -> None:
    members = {f"{kind}/{n}.png": picture((8 + n, 9), seed=n) for kind in "ab" for n in range(10)}
    folder = packed(tmp_path, zipped(tmp_path / "u", members))
    dataset = Dataset.open(folder, (1, 6, 7))
    assert dataset.train.images.shape == (18, 1, 6, 7)
    assert "pictures were resized to 6 x 7 grey (bilinear, sides stretched to fit)" in dataset.notes


def test_pictures_of_one_size_are_resized_only_for_another_one(tmp_path: Path) -> None:
    same_size = packed(tmp_path, zipped(tmp_path / "u", class_folders(10)))
    assert Dataset.open(same_size, (3, 8, 8)).train.images.shape == (18, 3, 8, 8)
    assert not list(same_size.glob("*3x8x8*")), "pictures of the right size need no copy"
    assert Dataset.open(same_size, (3, 4, 4)).test.images.shape == (2, 3, 4, 4)


def test_validation_is_a_stratified_share_and_the_parts_do_not_overlap(tmp_path: Path) -> None:
    dataset = Dataset.open(arrays(tmp_path, (5,), count=100), (1, 5))
    parts = split_dataset(dataset, DataSpec(dataset="x", validation=0.2), 0)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (80, 20, 8)
    assert np.bincount(parts.validation.labels).tolist() == [5, 5, 5, 5]
    rows = [row.tobytes() for part in (parts.train, parts.validation) for row in part.images]
    assert sorted(rows) == sorted(row.tobytes() for row in dataset.train.images)
    for part in (parts.train, parts.validation):
        assert part.rows is not None
        np.testing.assert_array_equal(part.labels, labels(100, 4)[part.rows])
        np.testing.assert_array_equal(part.images, dataset.train.images[part.rows])


def test_without_validation_all_is_for_training(tmp_path: Path) -> None:
    dataset = Dataset.open(arrays(tmp_path, (5,)), (1, 5))
    parts = split_dataset(dataset, DataSpec(dataset="x", validation=0.0), 0)
    assert (len(parts.train), len(parts.validation)) == (40, 0)
    assert (
        list(BatchLoader(parts.validation, Preprocessing(1, (0.0,), (1.0,)), batch_size=4, shuffle=False).epoch(0))
        == []
    )


def test_the_limit_takes_the_first_of_a_seeded_permutation(tmp_path: Path) -> None:
    dataset = Dataset.open(arrays(tmp_path, (5,), count=100), (1, 5))

    def rows(limit: int, seed: int) -> set[int]:
        parts = split_dataset(dataset, DataSpec(dataset="x", limit=limit), seed)
        assert parts.train.rows is not None
        assert parts.validation.rows is not None
        assert len(parts.test) == 8, "the test part is never cut"
        return {*parts.train.rows.tolist(), *parts.validation.rows.tolist()}

    assert len(rows(30, 0)) == 30
    assert rows(30, 0) < rows(60, 0), "a larger limit adds examples"
    assert rows(30, 0) == rows(30, 0) != rows(30, 1)
    assert len(rows(1000, 0)) == 100


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_preprocessing_is_that_of_the_training_part_exactly(tmp_path: Path, dtype: str) -> None:
    dataset = Dataset.open(arrays(tmp_path, (6, 8, 3), dtype=dtype), (3, 6, 8))
    part = split_dataset(dataset, DATA, 0).train
    found = measure_preprocessing(part, dataset.scale)
    exact = part.images.astype(np.longdouble) * dataset.scale
    np.testing.assert_allclose(found.mean, exact.mean(axis=(0, 2, 3)).astype(float), rtol=1e-13)
    np.testing.assert_allclose(found.std, exact.std(axis=(0, 2, 3)).astype(float), rtol=1e-12)
    assert found.scale == dataset.scale
    whole = measure_preprocessing(dataset.train, dataset.scale)
    assert whole != found, "what is held out has no part in it"


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_statistics_are_those_of_all_blocks_together(dtype: str) -> None:
    source = images(90 if dtype == "uint8" else 30, (2, 200, 200), dtype=dtype)
    source[-1] = 0  # the last block differs from the first
    part = Split(source, labels(len(source)))
    assert len(list(part.blocks())) > 1
    found = measure_preprocessing(part, 1.0)
    np.testing.assert_allclose(found.mean, source.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.std, source.std(axis=(0, 2, 3), dtype=np.float64), rtol=1e-12)


def test_a_constant_channel_has_deviation_one_and_an_empty_part_is_refused() -> None:
    still = np.stack([np.full((10, 4), 7, np.uint8), images(10, (4,))], axis=1)
    found = measure_preprocessing(Split(still, labels(10)), 1.0)
    assert (found.mean[0], found.std[0]) == (7.0, 1.0)
    with pytest.raises(DataInvalid, match="training part is empty"):
        measure_preprocessing(Split(still[:0], labels(0)), 1.0)


SHAPES = [(1, 40), (2, 30), (1, 12, 12), (3, 12, 14), (2, 4, 8, 8)]


def batches(shape: tuple[int, ...], *, count: int = 37, dtype: str = "uint8", **options: Any) -> BatchLoader:
    part = Split(images(count, shape, dtype=dtype), labels(count, 3))
    preprocessing = measure_preprocessing(part, 1 / 255 if dtype == "uint8" else 1.0)
    return BatchLoader(part, preprocessing, **{"batch_size": 8, **options})


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_batches_are_the_preprocessed_images_in_order_bit_for_bit(
    shape: tuple[int, ...], dtype: str, resident: bool, channels_last: bool
) -> None:
    source = images(37, shape, dtype=dtype)
    preprocessing = measure_preprocessing(Split(source, labels(37)), 1 / 255 if dtype == "uint8" else 1.0)
    made = list(batches(shape, dtype=dtype, shuffle=False, resident=resident, channels_last=channels_last).epoch(0))
    assert [len(y) for _, y in made] == [8, 8, 8, 8, 5]
    found = torch.cat([x for x, _ in made])
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), preprocessing.apply(source))
    np.testing.assert_array_equal(torch.cat([y for _, y in made]).numpy(), labels(37, 3))
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(found.dim())
    if channels_last and layout is not None:
        assert made[0][0].is_contiguous(memory_format=layout)
    else:
        assert made[0][0].is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_epoch_has_every_image_once_in_an_order_of_its_own(shape: tuple[int, ...], channels_last: bool) -> None:
    made = batches(shape, count=40, channels_last=channels_last)
    plain = {x.tobytes(): y for x, y in zip(
        torch.cat([x for x, _ in batches(shape, count=40, shuffle=False).epoch(0)]).numpy(), labels(40, 3), strict=True
    )}  # fmt: skip
    orders = []
    for number in (0, 1):
        epoch = list(made.epoch(number))
        seen = [row.contiguous().numpy().tobytes() for x, _ in epoch for row in x]
        assert sorted(seen) == sorted(plain)
        assert [plain[row] for row in seen] == torch.cat([y for _, y in epoch]).tolist()
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_entered_in_the_middle_is_the_rest_of_the_whole_one_bit_for_bit(
    shape: tuple[int, ...], resident: bool
) -> None:
    whole = list(batches(shape, augmentation=ALL, seed=5, resident=resident).epoch(3))
    torch.manual_seed(123)  # nothing depends on the global generator
    rest = list(batches(shape, augmentation=ALL, seed=5, resident=resident).epoch(3, start=2))
    assert len(rest) == len(whole) - 2
    for (x, y), (x_again, y_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_and_residence_change_nothing_but_the_layout(shape: tuple[int, ...]) -> None:
    reference = list(batches(shape, augmentation=ALL, resident=True).epoch(1))
    for options in ({"resident": False}, {"channels_last": True}):
        for (x, _), (other, _) in zip(reference, batches(shape, augmentation=ALL, **options).epoch(1), strict=True):
            assert torch.equal(x, other)


def test_making_batches_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    list(batches((3, 8, 8), augmentation=ALL).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_seed_epoch_and_batch_change_the_augmentation() -> None:
    def first(seed: int, epoch: int, batch: int) -> torch.Tensor:
        source = np.broadcast_to(images(1, (1, 28, 28)), (24, 1, 28, 28))
        made = BatchLoader(
            Split(source, labels(24)),
            Preprocessing(1.0, (0.0,), (1.0,)),
            batch_size=8,
            augmentation=("random_crop",),
            seed=seed,
        )
        return list(made.epoch(epoch))[batch][0]

    same = first(0, 0, 0)
    assert torch.equal(same, first(0, 0, 0))
    for other in (first(1, 0, 0), first(0, 1, 0), first(0, 0, 1)):
        assert not torch.equal(same, other)


@pytest.mark.parametrize(
    ("count", "options", "sizes"),
    [
        (37, {}, [7, 7, 8, 7, 8]),
        (33, {}, [6, 7, 6, 7, 7]),
        (33, {"shuffle": False}, [8, 8, 8, 8, 1]),
        (40, {}, [8] * 5),
        (5, {}, [5]),
        (1, {}, [1]),
        (3, {"batch_size": 1}, [1, 1, 1]),
        (7, {"batch_size": 2}, [2, 2, 2]),
    ],
)
def test_batches_are_equal_while_training_and_full_in_evaluations(
    count: int, options: dict[str, Any], sizes: list[int]
) -> None:
    made = batches((1, 6), count=count, **options)
    assert [len(y) for _, y in made.epoch(0)] == sizes
    assert len(made) == len(sizes)


def test_an_alternating_flip_shows_every_image_both_ways_in_two_epochs() -> None:
    made = batches((1, 6), count=37, augmentation=("alternating_flip",))

    def seen(epoch: int) -> dict[tuple[int, ...], tuple[float, ...]]:
        return {
            tuple(sorted(image.flatten().tolist())): tuple(image.flatten().tolist())
            for shown, _ in made.epoch(epoch)
            for image in shown
        }

    first, second, third = seen(0), seen(1), seen(2)
    assert first == third
    assert all(second[content] == row[::-1] for content, row in first.items())
    originals = {tuple(image.flatten().tolist()) for shown, _ in batches((1, 6), count=37).epoch(0) for image in shown}
    unturned = sum(row in originals for row in first.values())
    assert 5 < unturned < 32, "about half are turned in the first epoch"


@given(examples=st.integers(1, 20_000), batch_size=st.integers(1, 512))
def test_no_rest_of_an_epoch_is_a_batch_of_its_own(examples: int, batch_size: int) -> None:
    bounds = equal_batches(examples, batch_size)
    sizes = [end - start for start, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size
    assert min(sizes) >= min(2, batch_size, examples), "batch norm cannot train on one example"
    left_out = examples - sum(sizes)
    assert left_out == (1 if batch_size == 2 and examples % 2 and examples > 1 else 0)
    assert [start for start, _ in bounds[1:]] == [end for _, end in bounds[:-1]]
    assert len(sizes) == max(1, -(-examples // batch_size) - left_out)


def test_a_part_reads_its_rows_in_any_order() -> None:
    source = images(30, (2, 5))
    part = Split(source, labels(30)).take(np.array([3, 9, 4, 20])).take(np.array([3, 1, 0]))
    np.testing.assert_array_equal(part.images, source[[20, 9, 3]])
    np.testing.assert_array_equal(part.read(np.array([2, 0, 1])), source[[3, 20, 9]])
    np.testing.assert_array_equal(np.concatenate(list(part.blocks())), part.images)
    assert part.size_bytes == 30
    assert len(dataclasses.replace(part, rows=None, labels=labels(30)).images) == 30


def test_derived_seeds_are_fixed_for_good_and_unrelated() -> None:
    assert derive_seed(0, "order", 0) == 7082549803942908686
    drawn = {derive_seed(seed, what, n) for seed in range(5) for what in ("order", "augmentation") for n in range(50)}
    assert len(drawn) == 500
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_free_memory_is_a_part_of_this_machines() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 1 << 50
