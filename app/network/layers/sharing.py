"""Layers that use the parameters of an earlier layer: one set of weights at two or more places of a network.

    {"type": "conv", "name": "a", "out_channels": 8, "kernel_size": 3, "padding": "same"},
    {"type": "conv", "shares": "a"}

A layer with `shares` is the earlier layer once more, on another input: all its fields are those of that layer, whether
they are left out or stated. Its tensors are stored once, under the name of the earlier layer (`Node.home`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

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
from app.network.layers.shapes import LayerFault, Shape

if TYPE_CHECKING:
    from app.network.node import Node

_OF_A_PLACE = frozenset({"type", "name", "inputs", "shares"})
"""Fields that say where a layer stands, not what it is."""


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


def as_at(layer: Shareable, owner: Node) -> Shareable:
    """`layer` with the fields of the layer whose parameters it uses."""
    taken = {name: getattr(owner.layer, name) for name in _fields(layer)}
    return layer.model_copy(update=taken | {"shares": owner.home})


def disagreements(layer: Shareable, owner: Node, shape: Shape | None) -> Iterator[LayerFault]:
    """What keeps `layer`, whose input has this shape (None: not known), from using the parameters of `owner`."""
    if owner.type != layer.type:
        message = f"names an earlier {layer.type} layer, but '{layer.shares}' is of type {owner.type}"
        yield LayerFault("shares", message, limit=layer.type, value=owner.type)
        return
    both = f"'{owner.home}', whose parameters it shares,"
    for name in _fields(layer):
        stated, right = getattr(layer, name), getattr(owner.layer, name)
        if name in layer.model_fields_set and stated != right:
            message = f"is {_written(stated)} here, but {_written(right)} at {both[:-1]}: leave it out"
            yield LayerFault(name, message, limit=_plain(right), value=_plain(stated))
    known = owner.input_shapes[0]
    if shape is None:
        return
    what = "features" if len(known) == len(shape) == 1 else "channels"
    if shape[0] != known[0]:
        message = f"{both} takes {known[0]} {what}, but {shape[0]} arrive here"
        yield LayerFault("shares", message, limit=known[0], value=shape[0])
    elif len(shape) != len(known):
        message = f"{both} takes inputs with {len(known) - 1} spatial axes, but {len(shape) - 1} arrive here"
        yield LayerFault("shares", message, limit=len(known) - 1, value=len(shape) - 1)


def _fields(layer: Shareable) -> list[str]:
    """The fields that say what the layer is; the stated width of its input is checked where the input is known."""
    stated = {"in_channels", "in_features"}
    return [name for name in type(layer).model_fields if name not in _OF_A_PLACE | stated]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(_plain(value))
