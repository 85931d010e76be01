"""Pieces of the generated source (`model.py`), laid out as ruff does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from app.network.layers.layer import Layer
from app.network.node import Node

LINE_LENGTH = 88  # ruff's and Black's default: the file stays as it is in most projects
INDENT = " " * 8  # of a statement in a method


class Attribute(NamedTuple):
    """What `__init__` assigns for a layer: `nn.<module>(<arguments>)`."""

    module: str
    arguments: Sequence[str]


class Expression(NamedTuple):
    """The right-hand side of a node's line in `forward`: `start` and `end` hold the brackets of the arguments."""

    start: str
    arguments: Sequence[str] = ()
    end: str = ""


def call(function: str, *arguments: str) -> Expression:
    """A call of a function."""
    return Expression(f"{function}(", arguments, ")")


def call_attribute(layer: Layer, node: Node, inputs: Sequence[str]) -> Expression:
    """A call of the module that stores the node's tensors: its own, or that of the node whose parameters it shares."""
    return call(f"self.{node.home}", inputs[0])


def join_lines(start: str, arguments: Sequence[str], end: str, indent: str) -> list[str]:
    """The lines of `start`, arguments, `end` (with the brackets): one if it fits, else one an argument, as in ruff."""
    line = f"{indent}{start}{', '.join(arguments)}{end}"
    if len(line) <= LINE_LENGTH or not arguments:
        return [line]
    return [indent + start, *(f"{indent}    {argument}," for argument in arguments), indent + end]


def tuple_text(values: Sequence[int]) -> str:
    """A tuple as Python writes it."""
    return f"({', '.join(map(str, values))}{',' if len(values) == 1 else ''})"


def sizes_text(values: Sequence[int]) -> str:
    """One number if all axes have the same, else a tuple."""
    return str(values[0]) if len(set(values)) == 1 else tuple_text(values)


def geometry_arguments(sizes: Mapping[str, Sequence[int]], defaults: Mapping[str, int]) -> list[str]:
    """Keyword arguments with one number per axis, without those that are the default on every axis."""
    return [f"{name}={sizes_text(sizes[name])}" for name in sizes if set(sizes[name]) != {defaults.get(name)}]
