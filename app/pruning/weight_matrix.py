"""A layer's weight as a matrix of outputs and inputs, and which layers a pattern or blocks fit.

Convolutions and linear layers store (outputs, inputs / groups, *kernel), transposed convolutions (inputs, outputs /
groups, *kernel). Here each is G x O x I x P: groups, outputs of one group, inputs of one group, positions of the
kernel. An output reads the I inputs of its group and no others, so these are "the inputs" that a pattern runs along;
a depthwise convolution has I = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from app.network.layers.convolutions import Conv, ConvTranspose
from app.network.node import Node
from app.spec.prune import Prune, kept_of

Element = TypeVar("Element", bound=np.generic)


@dataclass(frozen=True)
class WeightMatrix:
    """The four axes of a weight: `groups` x `outputs` x `inputs` x `positions`, and how it is stored."""

    groups: int
    outputs: int
    inputs: int
    positions: int
    inputs_first: bool

    @property
    def elements(self) -> int:
        """How many weights there are."""
        return self.groups * self.outputs * self.inputs * self.positions

    def rows(self, flat: npt.NDArray[Element]) -> npt.NDArray[Element]:
        """A view G x O x I x P of values in row-major order of the weight."""
        if self.inputs_first:
            stored = flat.reshape(self.groups, self.inputs, self.outputs, self.positions)
            return stored.transpose(0, 2, 1, 3)
        return flat.reshape(self.groups, self.outputs, self.inputs, self.positions)

    def flat(self, rows: npt.NDArray[Element]) -> npt.NDArray[Element]:
        """Values G x O x I x P in row-major order of the weight: the inverse of `rows`."""
        return (rows.transpose(0, 2, 1, 3) if self.inputs_first else rows).reshape(-1)

    def blocks(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of blocks of `height` outputs x `width` inputs in each group; those at the edge are ragged."""
        return -(-self.outputs // height), -(-self.inputs // width)

    def equal_blocks(self, height: int, width: int) -> int | None:
        """How many weights a block has; None if they differ."""
        high, wide = min(height, self.outputs), min(width, self.inputs)
        if self.outputs % high or self.inputs % wide:
            return None
        return high * wide * self.positions


def weight_matrix(node: Node) -> WeightMatrix:
    """The matrix of a convolution's or linear layer's weight."""
    inputs, outputs = node.input_shapes[0][0], node.shape[0]
    if not isinstance(node.layer, Conv | ConvTranspose):
        return WeightMatrix(1, outputs, inputs, 1, False)
    groups = node.layer.group_count(inputs)
    positions = math.prod(node.layer.kernel(len(node.shape) - 1))
    return WeightMatrix(groups, outputs // groups, inputs // groups, positions, isinstance(node.layer, ConvTranspose))


def erk_axes(node: Node) -> tuple[int, ...]:
    """The axes that `sparsity_allocation.erk_kept` needs of a layer: (outputs, inputs of one output, *kernel)."""
    matrix = weight_matrix(node)
    return (matrix.groups * matrix.outputs, matrix.inputs, *node.tensors["weight"].shape[2:])


def pattern_of(step: Prune, layer: str) -> tuple[int, int]:
    """(N, M) of a layer in a step with structure n:m: its own, where an override has one."""
    override = step.overrides.get(layer)
    return step.kept_of if override is None or override.pattern is None else kept_of(override.pattern)


def why_dense(node: Node, step: Prune) -> str | None:
    """Why a step that sets weights to zero leaves the layer as it is; None if it does not.

    A pattern N:M needs a number of inputs that M divides; blocks need two blocks, for one always stays.
    """
    if node.name in step.exclude:
        return "excluded"
    matrix = weight_matrix(node)
    if step.structure == "n:m":
        kept, of = pattern_of(step, node.name)
        if matrix.inputs % of == 0:
            return None
        what = f"input {'feature' if node.type == 'linear' else 'channel'}{'' if matrix.inputs == 1 else 's'}"
        return f"{kept}:{of} on {matrix.inputs} {what}{' of each group' if matrix.groups > 1 else ''}"
    if step.structure == "blocks":
        height, width = step.block_shape
        high, wide = matrix.blocks(height, width)
        return f"one block of {height} x {width} holds all of it" if matrix.groups * high * wide == 1 else None
    return None
