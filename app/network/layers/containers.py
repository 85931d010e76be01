"""The layers that hold layers. Graphs have none of them: `app/network/builder.py` writes them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from app.network.layers.convolutions import Width
from app.network.layers.layer import Layer
from app.validation.strict import fault

if TYPE_CHECKING:  # the one circle: containers hold every layer, and are layers themselves
    from app.network.layers.registry import AnyLayer

MOST_LAYERS = 10_000


class Residual(Layer):
    """`residual`: the sum of what its layers make of the input, and of the input itself, brought to that shape.

    `shortcut` says how: "identity" passes the input on; "projection" is a 1x1 convolution (its stride the ratio of the
    sizes) and batch norm; "pad" is option A of He et al. (2015, arXiv 1512.03385, section 3.3): every stride-th
    position, and channels of zeros; "auto" is identity where the shapes are equal and projection where they are not.
    """

    type: Literal["residual"] = "residual"
    layers: Annotated[tuple[AnyLayer, ...], Field(strict=False, max_length=MOST_LAYERS)]
    shortcut: Literal["auto", "identity", "projection", "pad"] = "auto"


class SqueezeExcite(Layer):
    """`squeeze_excite`: channels weighed by a small network of their means (Hu et al. 2017, arXiv 1709.01507).

    The waist has `channels`, or `ratio` of the channels that arrive (a quarter), at least one.
    """

    type: Literal["squeeze_excite"] = "squeeze_excite"
    channels: Width | None = None
    ratio: Annotated[float, Field(gt=0, le=16)] | None = Field(
        default=None, description="Default: 0.25, unless channels is given."
    )
    gate: Literal["sigmoid", "hardsigmoid"] = "sigmoid"

    @model_validator(mode="after")
    def _one_width(self) -> SqueezeExcite:
        if self.channels is not None and self.ratio is not None:
            raise fault("state the waist once: channels or ratio, not both", field="ratio")
        return self

    def waist(self, channels: int) -> int:
        """The width of the waist for an input of so many channels."""
        if self.channels is not None:
            return self.channels
        return max(1, round(channels * (0.25 if self.ratio is None else self.ratio)))


class Repeat(Layer):
    """`repeat`: its layers `times` times in a row, each time with weights of their own."""

    type: Literal["repeat"] = "repeat"
    times: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    layers: Annotated[tuple[AnyLayer, ...], Field(strict=False, max_length=MOST_LAYERS)]
