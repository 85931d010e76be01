"""Shapes, tensors and the arithmetic of windows (convolution, pooling), as PyTorch computes them, in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from app.errors import JsonValue
from app.validation.strict import fault

Shape = tuple[int, ...]
"""Of one example, without the batch axis: (channels, *spatial), or (features,) after flatten."""

LARGEST_KERNEL = 1_024
LARGEST_WIDTH = 65_536
MOST_SPATIAL_AXES = 3


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """One tensor of a layer: its shape, and whether it is trained (running statistics are not)."""

    shape: Shape
    trainable: bool = True

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class LayerFault(Exception):
    """A layer does not fit its inputs: which field (None: the layer as a whole), why, the limit and the value sent."""

    def __init__(self, field: str | None, message: str, *, limit: JsonValue = None, value: JsonValue = None) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
        self.limit = limit
        self.value = value


def written(shape: Shape) -> str:
    """A shape as people write it: `64 x 8 x 8`."""
    return " x ".join(str(size) for size in shape)


@dataclass(frozen=True, slots=True)
class PerAxis:
    """Marks a field that is one whole number, or a list of `shortest` to `longest` (0: no list), or one of `words`."""

    minimum: int
    maximum: int
    words: tuple[str, ...] = ()
    shortest: int = 1
    longest: int = MOST_SPATIAL_AXES

    def _whole(self, value: object) -> int:
        if type(value) is not int:
            what = (
                ["a whole number"] + (["a list of them"] if self.longest else []) + [f'"{word}"' for word in self.words]
            )
            raise fault("must be " + " or ".join(what))
        if value < self.minimum:
            raise fault(f"must be at least {self.minimum}", limit=self.minimum, value=value)
        if value > self.maximum:
            raise fault(f"must be at most {self.maximum}", limit=self.maximum, value=value)
        return value

    def _read(self, value: object) -> int | str | tuple[int, ...]:
        if isinstance(value, str) and value in self.words:
            return value
        if self.longest and isinstance(value, list | tuple):
            if not self.shortest <= len(value) <= self.longest:
                message = f"a list here has {self.shortest} to {self.longest} numbers, not {len(value)}"
                raise fault(message, limit=self.longest, value=len(value))
            return tuple(self._whole(entry) for entry in value)
        return self._whole(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """One function checks all forms, so that a fault points at the field and not at a branch of a union."""
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The forms, for the description of the job language."""
        number = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        forms: list[dict[str, Any]] = [number]
        if self.longest:
            forms.append({"type": "array", "items": number, "minItems": self.shortest, "maxItems": self.longest})
        if self.words:
            forms.append({"enum": list(self.words)})
        return {"anyOf": forms} if len(forms) > 1 else forms[0]


Sizes = int | tuple[int, ...]
Kernel = Annotated[Sizes, PerAxis(1, LARGEST_KERNEL)]
Step = Annotated[Sizes, PerAxis(1, LARGEST_KERNEL)]
Margin = Annotated[Sizes, PerAxis(0, LARGEST_KERNEL)]
ConvMargin = Annotated[Sizes | Literal["same", "valid"], PerAxis(0, LARGEST_KERNEL, ("same", "valid"))]
PlainMargin = Annotated[Sizes | Literal["valid"], PerAxis(0, LARGEST_KERNEL, ("valid",))]
PadAmounts = Annotated[Sizes, PerAxis(0, LARGEST_WIDTH, shortest=2, longest=2 * (MOST_SPATIAL_AXES + 1))]
Groups = Annotated[int | Literal["depthwise"], PerAxis(1, LARGEST_WIDTH, ("depthwise",), longest=0)]


def spatial_axes(shape: Shape, what: str) -> int:
    """How many spatial axes `shape` has.

    Raises:
        LayerFault: it has none (it was flattened); `what` is the layer's kind in the sentence.
    """
    axes = len(shape) - 1
    if axes == 0:
        raise LayerFault(
            None, f"{what} needs spatial axes, but its input is flat ({written(shape)} features): put it before flatten"
        )
    return axes


def per_axis(name: str, value: Sizes, axes: int) -> tuple[int, ...]:
    """`value` as one number for each of `axes` spatial axes.

    Raises:
        LayerFault: it is a list of another length; `name` is the field.
    """
    if isinstance(value, int):
        return (value,) * axes
    if len(value) != axes:
        raise LayerFault(name, f"a list needs one number per spatial axis: {axes}", limit=axes, value=len(value))
    return value


def windows(name: str, sizes: Sequence[int], reaches: Sequence[int], padded: Sequence[int]) -> None:
    """Check that windows that reach over `reaches` positions fit into inputs of `padded` positions on each axis.

    Raises:
        LayerFault: one does not; both sizes are named. `name` is the field, `sizes` the input without padding.
    """
    for size, reach, room in zip(sizes, reaches, padded, strict=True):
        if reach > room:
            beside = "" if room == size else f" with padding ({size} without)"
            raise LayerFault(
                name,
                f"the window reaches over {reach} positions, but the input has {room}{beside}",
                limit=room,
                value=reach,
            )
