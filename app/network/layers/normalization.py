"""The layers that normalise: batch, group and layer norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from app.network.layers.layer import Layer
from app.network.layers.shapes import LARGEST_WIDTH, LayerFault, LayerTensor, Shape
from app.network.layers.sharing import UNLESS_SHARED, Shareable, required_unless_shared
from app.validation.strict import fault

Epsilon = Annotated[float, Field(gt=0, le=1)]

_MIXES_EXAMPLES = "it would move the class scores of one example by those of others"


class BatchNorm(Layer):
    """`batch_norm`: torch.nn.BatchNorm1d, 2d or 3d, with weight and bias and running statistics."""

    saves_inputs: ClassVar[bool] = True
    why_not_after_logits: ClassVar[str | None] = _MIXES_EXAMPLES

    type: Literal["batch_norm"] = "batch_norm"
    eps: Epsilon = 1e-5
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _has_its_own(cls, sent: Any) -> Any:
        if isinstance(sent, dict) and "shares" in sent:
            raise fault(
                "batch norm cannot share: its running statistics are those of one place in the network", field="shares"
            )
        return sent

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """weight and bias, and the running mean and variance, all (channels)."""
        channels = inputs[0][:1]
        return {
            "weight": LayerTensor(channels),
            "bias": LayerTensor(channels),
            "running_mean": LayerTensor(channels, trainable=False),
            "running_var": LayerTensor(channels, trainable=False),
        }


class GroupNorm(Shareable):
    """`group_norm`: torch.nn.GroupNorm."""

    saves_inputs: ClassVar[bool] = True
    why_not_after_logits: ClassVar[str | None] = "it would take the scale out of the class scores"

    type: Literal["group_norm"] = "group_norm"
    num_groups: Annotated[int, Field(ge=1, le=LARGEST_WIDTH), UNLESS_SHARED] = required_unless_shared()
    eps: Epsilon = 1e-5

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """The input's shape.

        Raises:
            LayerFault: the groups do not divide the channels, or hold one number each (PyTorch refuses a batch of 1).
        """
        channels, elements = inputs[0][0], math.prod(inputs[0])
        if channels % self.num_groups:
            message = f"{self.num_groups} groups do not divide the {channels} channels"
            raise LayerFault("num_groups", message, limit=channels, value=self.num_groups)
        if elements == self.num_groups:
            each = "its one group holds" if elements == 1 else f"each of the {elements} groups holds"
            message = f"{each} one number, which normalising would make 0: use fewer groups, or leave the layer out"
            raise LayerFault("num_groups", message, limit=elements // 2, value=self.num_groups)
        return inputs[0]

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """weight and bias (channels)."""
        return {"weight": LayerTensor(inputs[0][:1]), "bias": LayerTensor(inputs[0][:1])}


class LayerNorm(Shareable):
    """`layer_norm`: over the channel axis at each position, weight and bias one per channel."""

    saves_inputs: ClassVar[bool] = True
    why_not_after_logits: ClassVar[str | None] = "it would take the scale out of the class scores"

    type: Literal["layer_norm"] = "layer_norm"
    eps: Epsilon = 1e-5

    def tensors(self, inputs: Sequence[Shape]) -> dict[str, LayerTensor]:
        """weight and bias (channels)."""
        return {"weight": LayerTensor(inputs[0][:1]), "bias": LayerTensor(inputs[0][:1])}
