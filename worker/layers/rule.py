"""What the worker makes of one type of layer: a torch module, ONNX operators, a line of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from app.network.layers.layer import Layer
from app.network.node import Node
from worker.layers.onnx_operators import OnnxWriter
from worker.layers.source_text import Attribute, Expression

AnyOf = TypeVar("AnyOf", bound=Layer)


@dataclass(frozen=True)
class LayerRule(Generic[AnyOf]):
    """The rule of the layers of class `layer`. All functions take the layer and the node that has it."""

    layer: type[AnyOf]
    module: Callable[[AnyOf, Node], nn.Module]
    """The torch module, on torch's present default device, with torch's own start values."""
    onnx: Callable[[AnyOf, Node, OnnxWriter], None]
    """Write the operators that compute the node in eval mode, each with `OnnxWriter.between`, the last with `output`."""
    source: Callable[[AnyOf, Node, Sequence[str]], Expression]
    """The right-hand side of the node's line in `forward` of `model.py`, given the variables of its inputs."""
    attribute: Callable[[AnyOf, Node], Attribute] | None = None
    """The module that `__init__` of `model.py` makes for it; None for a layer without tensors."""
    fan_in: Callable[[AnyOf, Node], float] | None = None
    """How many products one element of its output sums; None: its tensors do not multiply, torch's start is right."""
