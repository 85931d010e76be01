"""Layers that use the parameters of an earlier layer: one set of weights at two or more places of a network.

    {"type": "conv", "name": "a", "out_channels": 8, "kernel_size": 3, "padding": "same"},
    {"type": "conv", "shares": "a"}

A layer with `shares` is the earlier layer once more, on another input: all its fields are those of that layer, whether
they are left out or stated. Its tensors are stored once, under the name of the earlier layer (`Node.home`).
"""

from __future__ import annotations

from typing import Any

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema
from pydantic_core.core_schema import ValidationInfo, ValidatorFunctionWrapHandler

from app.network.layers.layer import Layer
from app.network.layers.names import Reference


class _LeftOut(int):
    """The value of a required field that was left out because the layer shares another's parameters."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.int_schema()


LEFT_OUT: Any = _LeftOut(0)


def _required_unless_shared(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    if not isinstance(value, _LeftOut):
        return handler(value)
    if info.data.get("shares", LEFT_OUT) is None:
        raise PydanticKnownError("missing")
    return value


UNLESS_SHARED = WrapValidator(_required_unless_shared)
"""Marks a field that is required, but may be left out beside `shares`."""


def required_unless_shared() -> Any:
    """The default of a field that is marked `UNLESS_SHARED`."""
    return Field(default=LEFT_OUT, validate_default=True)


class Shareable(Layer):
    """A layer that may use the parameters of an earlier layer of its type."""

    shares: Reference | None = Field(
        default=None,
        description=(
            "Name of an earlier layer of the same type, whose parameters this one uses: it is that layer at a second "
            "place. All other fields are that layer's and may be left out."
        ),
    )

    @model_serializer(mode="wrap")
    def _as_sent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Its fields; of one that shares only those that were stated: a default may not be what the other layer has."""
        fields: dict[str, Any] = handler(self)
        if self.shares is None:
            return fields
        return {name: value for name, value in fields.items() if name == "type" or name in self.model_fields_set}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Says that a field without a default is required unless `shares` is there."""
        described = handler(schema)
        resolved = handler.resolve_ref_schema(described)
        needed = [name for name, field in cls.model_fields.items() if field.default is LEFT_OUT]
        for name in needed:
            resolved.get("properties", {}).get(name, {}).pop("default", None)
        if needed:
            resolved["anyOf"] = [{"required": needed}, {"required": ["shares"]}]
        return described


def unshared(layer: Layer) -> Layer:
    """`layer` with parameters of its own."""
    return layer.model_copy(update={"shares": None}) if isinstance(layer, Shareable) else layer
