"""Activations and dropout: layers whose output has the shape of their input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.network.layers.layer import Layer
from app.network.layers.shapes import LayerTensor, Shape, spatial_axes
from app.network.layers.sharing import Shareable

Probability = Annotated[float, Field(ge=0, lt=1)]


class Activation(Layer):
    """A function of each element (softmax: of the channels at each position)."""

    monotone: ClassVar[bool] = False
    gain: ClassVar[float]
    """What the deviation of the weights before it is multiplied by, so that deep networks train from the start: sqrt(2)
    for rectifiers, which halve the mean square (He et al. 2015, arXiv 1502.01852)."""
    why_not_after_logits: ClassVar[str | None] = (
        "class scores are unbounded numbers: the loss and the export apply softmax themselves"
    )

    def is_monotone(self) -> bool:
        """Whether it never falls where its input rises."""
        return self.monotone


class ReLU(Activation):
    """`relu`: max(0, x)."""

    gain: ClassVar[float] = math.sqrt(2)
    monotone: ClassVar[bool] = True
    saves_output: ClassVar[bool] = True
    type: Literal["relu"] = "relu"


class ReLU6(Activation):
    """`relu6`: min(6, max(0, x))."""

    gain: ClassVar[float] = math.sqrt(2)
    monotone: ClassVar[bool] = True
    saves_inputs: ClassVar[bool] = True
    type: Literal["relu6"] = "relu6"


class LeakyReLU(Activation):
    """`leaky_relu`: x where positive, else negative_slope * x. Monotone where the slope is not negative."""

    gain: ClassVar[float] = math.sqrt(2)
    saves_inputs: ClassVar[bool] = True
    type: Literal["leaky_relu"] = "leaky_relu"
    negative_slope: Annotated[float, Field(ge=-10, le=10)] = 0.01

    def is_monotone(self) -> bool:
        """Whether the slope is not negative."""
        return self.negative_slope >= 0


class SiLU(Activation):
    """`silu`: x * sigmoid(x)."""

    gain: ClassVar[float] = math.sqrt(2)
    saves_inputs: ClassVar[bool] = True
    type: Literal["silu"] = "silu"


class GELU(Activation):
    """`gelu`: x times the normal distribution function of x, exact (no tanh approximation)."""

    gain: ClassVar[float] = math.sqrt(2)
    saves_inputs: ClassVar[bool] = True
    type: Literal["gelu"] = "gelu"


class Hardswish(Activation):
    """`hardswish`: x * relu6(x + 3) / 6."""

    gain: ClassVar[float] = math.sqrt(2)
    saves_inputs: ClassVar[bool] = True
    type: Literal["hardswish"] = "hardswish"


class Hardsigmoid(Activation):
    """`hardsigmoid`: relu6(x + 3) / 6."""

    gain: ClassVar[float] = 1.0
    monotone: ClassVar[bool] = True
    saves_inputs: ClassVar[bool] = True
    type: Literal["hardsigmoid"] = "hardsigmoid"


class Sigmoid(Activation):
    """`sigmoid`: 1 / (1 + exp(-x))."""

    gain: ClassVar[float] = 1.0
    monotone: ClassVar[bool] = True
    saves_output: ClassVar[bool] = True
    type: Literal["sigmoid"] = "sigmoid"


class Tanh(Activation):
    """`tanh`."""

    gain: ClassVar[float] = 5 / 3
    monotone: ClassVar[bool] = True
    saves_output: ClassVar[bool] = True
    type: Literal["tanh"] = "tanh"


class Softmax(Activation):
    """`softmax` over the channels, at each position."""

    gain: ClassVar[float] = 1.0
    saves_output: ClassVar[bool] = True
    type: Literal["softmax"] = "softmax"


class PReLU(Activation, Shareable):
    """`prelu`: x where positive, else weight * x, one trained weight per channel."""

    gain: ClassVar[float] = math.sqrt(2)
    saves_inputs: ClassVar[bool] = True
    type: Literal["prelu"] = "prelu"

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """weight (channels)."""
        return {"weight": LayerTensor(inputs[0][:1])}


class Dropout(Layer):
    """`dropout`: torch.nn.Dropout, single elements."""

    saved_bytes: ClassVar[int] = 4
    why_not_after_logits: ClassVar[str | None] = (
        "in training it would set class scores to zero: put it before the last linear layer"
    )

    type: Literal["dropout"] = "dropout"
    p: Probability = 0.5


class SpatialDropout(Layer):
    """`spatial_dropout`: torch.nn.Dropout1d, 2d or 3d, whole channels."""

    why_not_after_logits: ClassVar[str | None] = (
        "in training it would set class scores to zero: put it before the last linear layer"
    )

    type: Literal["spatial_dropout"] = "spatial_dropout"
    p: Probability = 0.5

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """The input's shape.

        Raises:
            LayerFault: it is flat.
        """
        spatial_axes(inputs[0], "spatial dropout")
        return inputs[0]
