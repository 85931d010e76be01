"""One node of a graph, and how large graphs may be."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Self

from app.network.layers.layer import Layer
from app.network.layers.shapes import LARGEST_WIDTH, LayerTensor, Shape
from app.network.layers.sharing import Shareable


@dataclass(frozen=True)
class Limits:
    """How large a network may be. Limits of single fields, such as a kernel's size, are stated with the fields."""

    layers: int = 10_000
    """Layers after the containers are written out."""
    depth: int = 16
    """Containers inside containers."""
    channels: int = LARGEST_WIDTH
    """Channels of any layer's output."""
    params: int = 500_000_000
    """Trained numbers: ONNX files end at 2 GiB."""
    input_elements: int = 1 << 26
    """Numbers of one example."""
    activations: int = 1_000_000_000
    """Numbers that all layers together compute for one example."""

    @classmethod
    def none(cls) -> Self:
        """No limits: for what was within its limits when it was accepted, and cannot have grown since."""
        return cls(**{field.name: sys.maxsize for field in fields(cls)})


@dataclass(frozen=True)
class Node:
    """One layer of a graph, never a container. Its layer has no name, inputs or stated widths: they are the node's."""

    name: str
    layer: Layer
    inputs: tuple[str, ...]
    input_shapes: tuple[Shape, ...]
    shape: Shape
    pointer: str = field(default="", compare=False)
    """JSON pointer to the layer that was sent; a container's for what it adds itself."""

    @property
    def type(self) -> str:
        """The layer's type."""
        return self.layer.type

    @property
    def axes(self) -> int:
        """Spatial axes of its first input; 0 where that is flat."""
        return len(self.input_shapes[0]) - 1

    @property
    def in_channels(self) -> int:
        """Channels of its first input, features where that is flat."""
        return self.input_shapes[0][0]

    @property
    def shares(self) -> str | None:
        """The node whose parameters it uses; None: it has its own, or none at all."""
        return self.layer.shares if isinstance(self.layer, Shareable) else None

    @property
    def home(self) -> str:
        """The node under whose name the tensors that it uses are stored: itself, unless it shares."""
        return self.shares or self.name

    @cached_property
    def uses(self) -> dict[str, LayerTensor]:
        """The tensors it computes with, by name: weight, bias, running_mean, running_var."""
        return self.layer.tensors(self.input_shapes)

    @property
    def tensors(self) -> dict[str, LayerTensor]:
        """Those of `uses` that are stored under its name: all, or none where it shares another node's."""
        return {} if self.shares is not None else self.uses

    @property
    def params(self) -> int:
        """Number of trained numbers that are stored under its name."""
        return sum(tensor.elements for tensor in self.tensors.values() if tensor.trainable)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one example."""
        return self.layer.macs(self.input_shapes, self.shape)

    @property
    def elements(self) -> int:
        """Numbers of its output for one example."""
        return math.prod(self.shape)
