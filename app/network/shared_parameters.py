"""A layer that uses the parameters of an earlier one, beside the node that stores them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from app.network.layers.shapes import LayerFault, Shape
from app.network.layers.sharing import Shareable
from app.network.node import Node

_OF_A_PLACE = frozenset({"type", "name", "inputs", "shares"})
"""Fields that say where a layer stands, not what it is."""
_OF_THE_INPUT = frozenset({"in_channels", "in_features"})
"""Stated widths of the input: checked where the input is known."""


def with_fields_of(owner: Node, layer: Shareable) -> Shareable:
    """`layer` with the fields of the layer whose parameters it uses."""
    fields = {name: getattr(owner.layer, name) for name in _defining_fields(layer)}
    return layer.model_copy(update=fields | {"shares": owner.home})


def disagreements(layer: Shareable, owner: Node, shape: Shape | None) -> Iterator[LayerFault]:
    """What keeps `layer`, whose input has this shape (None: not known), from using the parameters of `owner`."""
    if owner.type != layer.type:
        message = f"names an earlier {layer.type} layer, but '{layer.shares}' is of type {owner.type}"
        yield LayerFault("shares", message, limit=layer.type, value=owner.type)
        return
    for name in _defining_fields(layer):
        stated, right = getattr(layer, name), getattr(owner.layer, name)
        if name in layer.model_fields_set and stated != right:
            there = f"at '{owner.home}', whose parameters it shares"
            message = f"is {_written(stated)} here, but {_written(right)} {there}: leave it out"
            yield LayerFault(name, message, limit=_plain(right), value=_plain(stated))
    if shape is not None:
        yield from _input_disagreements(owner, shape)


def _input_disagreements(owner: Node, shape: Shape) -> Iterator[LayerFault]:
    known = owner.input_shapes[0]
    takes = f"'{owner.home}', whose parameters it shares, takes"
    if shape[0] != known[0]:
        what = "features" if len(known) == len(shape) == 1 else "channels"
        message = f"{takes} {known[0]} {what}, but {shape[0]} arrive here"
        yield LayerFault("shares", message, limit=known[0], value=shape[0])
    elif len(shape) != len(known):
        message = f"{takes} inputs with {len(known) - 1} spatial axes, but {len(shape) - 1} arrive here"
        yield LayerFault("shares", message, limit=len(known) - 1, value=len(shape) - 1)


def _defining_fields(layer: Shareable) -> list[str]:
    """The fields that say what the layer is."""
    return [name for name in type(layer).model_fields if name not in _OF_A_PLACE | _OF_THE_INPUT]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(_plain(value))
