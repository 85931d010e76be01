"""What every layer of the job language has: type, name and inputs, and the shape, tensors and cost that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from app.network.layers.names import LayerName, Reference
from app.network.layers.shapes import LayerFault, LayerTensor, Shape, written
from app.validation.strict import Strict

MOST_INPUTS = 256


class Layer(Strict):
    """One layer, as it stands in `model.layers`. Shapes are of one example: (channels, *spatial) or (features,)."""

    least_inputs: ClassVar[int] = 1
    most_inputs: ClassVar[int] = 1
    why_not_after_logits: ClassVar[str | None] = None
    """Why it must not be the last layer, or None."""
    saves_inputs: ClassVar[bool] = False
    """Keeps its inputs for the backward pass (what autograd does; `cost.training_memory` counts it)."""
    saves_output: ClassVar[bool] = False
    saved_bytes: ClassVar[int] = 0
    """Further bytes that it keeps, per element of its output: indices, masks."""
    is_view: ClassVar[bool] = False
    """Its output shares its input's memory."""

    type: str
    name: LayerName | None = Field(
        default=None, description="Name of the layer, key of its tensors; default: <type><n>."
    )
    inputs: Annotated[tuple[Reference, ...], Field(strict=False, max_length=MOST_INPUTS)] | None = Field(
        default=None, description='Names of the layers whose outputs it takes, or "input"; default: the layer before.'
    )

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """The shape of its output for inputs of these shapes; here: the same as the first input's.

        Raises:
            LayerFault: the layer does not fit its inputs.
        """
        return inputs[0]

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """Its tensors by name, in PyTorch's order; here: none."""
        return {}

    def macs(self, inputs: Sequence[Shape], output: Shape) -> int:
        """Multiply-accumulates for one example; only convolutions and linear layers have any."""
        return 0

    def is_monotone(self) -> bool:
        """Whether it works on single elements and never falls where its input rises: max pooling may come before it."""
        return False

    def widths(self, inputs: Sequence[Shape]) -> dict[str, int]:
        """Widths that follow from its inputs and may be stated (`in_channels`, `in_features`), by field; here: none."""
        return {}

    def document(self) -> dict[str, Any]:
        """The layer as it stands in a job: every field that has a value, type, name and inputs first."""
        fields = self.model_dump(mode="json", exclude_none=True)
        first = {key: fields.pop(key) for key in ("type", "name", "inputs") if key in fields}
        return first | fields


def check_stated(field: str, stated: int | None, right: int, meaning: str) -> None:
    """Compare a width that was stated with the one that follows from the input.

    Raises:
        LayerFault: they differ; value is what was stated, limit the right one.
    """
    if stated is not None and stated != right:
        raise LayerFault(field, f"states {stated}, but {meaning} is {right}", limit=right, value=stated)


def check_equal(shapes: Sequence[Shape], what: str) -> None:
    """Compare the shapes of inputs that must be equal.

    Raises:
        LayerFault: two differ; both are named.
    """
    for shape in shapes[1:]:
        if shape != shapes[0]:
            raise LayerFault(
                "inputs",
                f"{what} takes inputs of one shape, but gets {written(shapes[0])} and {written(shape)}",
                limit=list(shapes[0]),
                value=list(shape),
            )
