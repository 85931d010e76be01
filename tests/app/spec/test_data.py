"""What data may be asked for, and how examples fit the shape of a network's input."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.spec.data import DataFacts, DataSpec, Synthetic, synthetic_facts
from tests.support.jobs.specs import COLOUR, GREY, PICTURES


def facts(*shape: int) -> DataFacts:
    return replace(GREY, example_shape=shape)


@pytest.mark.parametrize(
    ("sent", "input_shape", "layout"),
    [
        ((3, 32, 32), (3, 32, 32), "channels_first"),
        ((32, 32, 3), (3, 32, 32), "channels_last"),
        ((3, 3, 3), (3, 3, 3), "channels_last"),
        ((28, 28), (1, 28, 28), "no_channels"),
        ((28, 28, 1), (1, 28, 28), "channels_last"),
        ((8000,), (1, 8000), "no_channels"),
        ((2, 8000), (2, 8000), "channels_first"),
        ((8, 16, 16, 3), (3, 8, 16, 16), "channels_last"),
        ((28, 28), (3, 28, 28), None),
        ((28, 28), (1, 32, 32), None),
        ((32, 32, 3), (1, 32, 32), None),
    ],
)
def test_the_shape_of_the_input_decides_the_axes(
    sent: tuple[int, ...], input_shape: tuple[int, ...], layout: str | None
) -> None:
    assert facts(*sent).layout(input_shape) == layout


def test_pictures_of_mixed_sizes_become_grey_or_colour_of_any_size() -> None:
    assert PICTURES.layout((3, 20, 30)) == PICTURES.layout((1, 8, 8)) == "pictures"
    assert PICTURES.layout((2, 20, 30)) is None
    assert PICTURES.layout((3, 20)) is None
    assert PICTURES.default_input_shape() is None


@pytest.mark.parametrize(
    ("sent", "usual"),
    [
        ((28, 28), (1, 28, 28)),
        ((32, 32, 3), (3, 32, 32)),
        ((3, 32, 32), (3, 32, 32)),
        ((8000,), (1, 8000)),
        ((16, 16, 16), None),
        ((8, 16, 16, 3), (3, 8, 16, 16)),
        ((1, 8, 16, 16), (1, 8, 16, 16)),
        ((2, 2, 2, 2, 2), None),
    ],
)
def test_the_usual_shape_is_known_where_the_axes_say_it(sent: tuple[int, ...], usual: tuple[int, ...] | None) -> None:
    shape = facts(*sent).default_input_shape()
    assert shape == usual
    assert shape is None or facts(*sent).layout(shape) is not None


def test_limit_comes_before_validation() -> None:
    assert COLOUR.training_images(DataSpec(dataset="x")) == (45_000, 5_000)
    assert COLOUR.training_images(DataSpec(dataset="x", limit=100, validation=0.25)) == (75, 25)
    assert COLOUR.training_images(DataSpec(dataset="x", limit=10**6, validation=0.0)) == (50_000, 0)


def test_synthetic_data_takes_the_shape_of_the_job() -> None:
    made = synthetic_facts(Synthetic(classes=4, train=30, test=20), (2, 9))
    assert (made.classes, len(made.class_names), made.train, made.test) == (4, 4, 30, 20)
    assert made.layout((2, 9)) == "channels_first"
