"""The data of a job: what may be asked for, and the facts about it that the job's meaning depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.validation.strict import LARGEST_INT, Count, Strict, Text, fault

Layout = Literal["channels_first", "channels_last", "no_channels", "pictures"]

# grey, colour, colour and opacity: how a channel axis is recognised without an `input_shape`
CHANNELS_OF_PICTURES = (1, 3, 4)


class Synthetic(Strict):
    """Images drawn from a seed: learnable, of the job's `input_shape`, nothing to download."""

    classes: Annotated[int, Field(ge=2, le=1000, description="Number of classes.")] = 10
    train: Annotated[int, Field(ge=1, le=1_000_000, description="Training images.")] = 2000
    test: Annotated[int, Field(ge=1, le=1_000_000, description="Test images.")] = 500
    seed: Annotated[int, Field(ge=0, le=LARGEST_INT, description="The same seed gives the same images.")] = 0


class DataSpec(Strict):
    """Where the images come from: a data set by name or id, or a synthetic one; and how they are divided."""

    dataset: Annotated[Text | None, Field(description="A built-in name or the id of an uploaded data set.")] = None
    synthetic: Synthetic | None = None
    validation: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Share of the training images held out, stratified, for choices; 0: no choices.",
        ),
    ] = 0.1
    limit: Annotated[Count | None, Field(description="Use the first n training images of a seeded permutation.")] = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.synthetic is None):
            raise fault("state exactly one of: dataset, synthetic")
        return self


@dataclass(frozen=True)
class DataFacts:
    """What is known about a data set without reading its images.

    `example_shape` has the axes as they were sent; None means pictures of mixed sizes. `pictures`: the examples came
    as picture files (height, width, channels), which may be resized to the job's `input_shape`, made grey or given
    three equal channels.
    """

    name: str
    example_shape: tuple[int, ...] | None
    classes: int
    class_names: tuple[str, ...]
    train: int
    test: int
    dtype: Literal["uint8", "float32"]
    pictures: bool = False

    def default_input_shape(self) -> tuple[int, ...] | None:
        """The `(C, *spatial)` that a job without `input_shape` gets; None where the axes do not say it and the job must.

        A channel axis is recognised by its size (1, 3 or 4), at the end before the front; without one, an example
        with one or two axes has one channel.
        """
        shape = self.example_shape
        if shape is None:
            return None
        if len(shape) in (3, 4):
            if shape[-1] in CHANNELS_OF_PICTURES:
                return (shape[-1], *shape[:-1])
            return shape if shape[0] in CHANNELS_OF_PICTURES else None
        return (1, *shape) if len(shape) in (1, 2) else None

    def layout(self, input_shape: tuple[int, ...]) -> Layout | None:
        """How examples become `input_shape` `(C, *spatial)`; None where they do not fit. Channels last wins a tie."""
        resized: Layout | None = "pictures" if len(input_shape) == 3 and input_shape[0] in (1, 3) else None
        if self.example_shape is None:
            return resized
        if self.example_shape == (*input_shape[1:], input_shape[0]):
            return "channels_last"
        if self.example_shape == input_shape:
            return "channels_first"
        if input_shape[0] == 1 and self.example_shape == input_shape[1:]:
            return "no_channels"
        return resized if self.pictures else None

    def training_images(self, data: DataSpec) -> tuple[int, int]:
        """(training, validation) images after `limit` and `validation`; a stratified split may differ by a few."""
        images = self.train if data.limit is None else min(self.train, data.limit)
        share = data.validation
        held_out = max(1, math.floor(images * share + 0.5)) if share > 0 and images > 1 else 0
        return images - held_out, held_out


def synthetic_facts(synthetic: Synthetic, input_shape: tuple[int, ...]) -> DataFacts:
    """The facts of a synthetic data set, which has the shape `(C, *spatial)` of the job."""
    return DataFacts(
        name="synthetic",
        example_shape=input_shape,
        classes=synthetic.classes,
        class_names=tuple(f"class {number}" for number in range(synthetic.classes)),
        train=synthetic.train,
        test=synthetic.test,
        dtype="uint8",
    )
