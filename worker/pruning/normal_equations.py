"""The normal equations of one layer: which weights give wanted outputs on given inputs, in the least squares.

    equations = NormalEquations.of(node, device)
    equations.add_layer(node, inputs_NCx, positions_NM, outputs_NCx)   # batch after batch, float64
    weights_GOF = equations.solve(start_GOF, ridge=1e-2, mask_GOF=None)

Every layer that multiplies is one linear function applied at every position of its output: a convolution reads the
window of each position, a transposed one the inputs that reach it, a linear layer everything.

Axes: N batch, C channels, x spatial, M positions that are looked at in each image, G groups, T rows (images and positions),
O outputs of one group, F features of one group: inputs x positions of the kernel, and a last one that is 1 where there is a bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.network.layers.convolutions import Conv, ConvTranspose, Linear
from app.network.node import Node
from app.pruning.weight_matrix import weight_matrix

_CHUNK_BYTES = 32 << 20
"""Of rows in float64: the windows of a batch are gathered and added in pieces of this size."""
MOST_FEATURES = 2304
"""3 x 3 kernels on 256 channels: a Gram matrix of 42 MB, and as much again for each of the two copies that a solution takes."""


def feature_count(node: Node) -> int:
    """How many features one output of the layer has, without the bias."""
    matrix = weight_matrix(node)
    return matrix.inputs * matrix.positions


def weights_of(node: Node, module: nn.Module) -> Tensor:
    """The layer's weights and, where it has one, its bias as the last feature: G x O x F in float64."""
    matrix = weight_matrix(node)
    weight_GOF = _as_rows(node, _parameter(module, "weight").detach().double())
    bias = module.bias
    if bias is None:
        return weight_GOF
    assert isinstance(bias, Tensor)
    bias_GO1 = bias.detach().double().reshape(matrix.groups, matrix.outputs, 1)
    return torch.cat([weight_GOF, bias_GO1], dim=2)


def mask_of(node: Node, module: nn.Module, mask: Tensor) -> Tensor:
    """The mask of the layer's weight as `weights_of` lays it out, bool; a bias is never masked."""
    mask_GOF = _as_rows(node, mask) != 0
    if module.bias is None:
        return mask_GOF
    return torch.cat([mask_GOF, mask_GOF.new_ones((*mask_GOF.shape[:2], 1))], dim=2)


@torch.no_grad()
def assign_weights(node: Node, module: nn.Module, weights_GOF: Tensor) -> None:
    """Give the layer these weights (and bias) in place: type, layout and device stay."""
    matrix = weight_matrix(node)
    if module.bias is not None:
        assert isinstance(module.bias, Tensor)
        module.bias.copy_(weights_GOF[:, :, -1].reshape(-1))
        weights_GOF = weights_GOF[:, :, :-1]
    weight = _parameter(module, "weight")
    if matrix.inputs_first:
        stored = weights_GOF.reshape(matrix.groups, matrix.outputs, matrix.inputs, matrix.positions)
        weights_GOF = stored.transpose(1, 2)
    weight.copy_(weights_GOF.reshape(weight.shape))


def _parameter(module: nn.Module, name: str) -> Tensor:
    found = getattr(module, name)
    assert isinstance(found, Tensor)
    return found


def _as_rows(node: Node, weight: Tensor) -> Tensor:
    """G x O x F of a tensor of the weight's shape."""
    matrix = weight_matrix(node)
    if not matrix.inputs_first:
        return weight.reshape(matrix.groups, matrix.outputs, -1)
    stored = weight.reshape(matrix.groups, matrix.inputs, matrix.outputs, matrix.positions)
    return stored.transpose(1, 2).reshape(matrix.groups, matrix.outputs, -1)


# --- rows -------------------------------------------------------------------------------------------------------------


def choose_positions(node: Node, images: int, most: int, generator: torch.Generator) -> Tensor:
    """For each of N images at most `most` positions of the layer's output, N x M: all of them, or drawn with repetition."""
    count = math.prod(node.shape[1:])
    if count <= most:
        return torch.arange(count).expand(images, count)
    return torch.randint(count, (images, most), generator=generator)


def rows_within(features: int, groups: int, *, most: int, products: float) -> int:
    """How many rows a layer's equations are made of: at most `most`.

    As many as this number of multiplications leaves room for in the Gram matrix, but two for each feature at least.
    """
    return min(most, max(int(products / (groups * features**2)), 2 * features))


def _pieces(rows: int, positions_NM: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some images at a time and their positions, or some positions of one image: about `rows` together, at least one."""
    images, count = positions_NM.shape
    together, width = max(1, rows // max(1, count)), max(1, min(count, rows))
    for start in range(0, images, together):
        part = slice(start, start + together)
        for first in range(0, count, width):
            yield part, positions_NM[part, first : first + width]


def input_rows(node: Node, inputs_NCx: Tensor, positions_NM: Tensor) -> Tensor:
    """What the layer reads at these positions of its output, G x T x F without the bias, in the type of the inputs."""
    matrix = weight_matrix(node)
    images, channels = inputs_NCx.shape[:2]
    if isinstance(node.layer, Linear):
        return inputs_NCx.reshape(1, images, channels)
    source_NMP = _sources(node, positions_NM)
    size = math.prod(node.input_shapes[0][1:])
    flat_SC = inputs_NCx.flatten(2).transpose(1, 2).reshape(-1, channels)
    outside = (source_NMP < 0).to(flat_SC.device).reshape(-1, 1)
    starts_N11 = (torch.arange(images) * size)[:, None, None]
    taken_XC = flat_SC.index_select(0, (source_NMP.clamp(min=0) + starts_N11).reshape(-1).to(flat_SC.device))
    taken_XC = taken_XC.masked_fill(outside, 0.0)
    windows = taken_XC.reshape(positions_NM.numel(), matrix.positions, matrix.groups, matrix.inputs)
    return windows.permute(2, 0, 3, 1).reshape(matrix.groups, positions_NM.numel(), -1)


def output_rows(outputs_NCx: Tensor, positions_NM: Tensor, channels: Tensor | None, groups: int) -> Tensor:
    """Some channels of an output (None: all) at these positions, G x T x O."""
    images, width = outputs_NCx.shape[:2]
    flat_NxC = outputs_NCx.reshape(images, width, -1).transpose(1, 2)
    device = outputs_NCx.device
    rows_NMC = flat_NxC[torch.arange(images, device=device)[:, None], positions_NM.to(device)]
    if channels is not None:
        rows_NMC = rows_NMC.index_select(2, channels.to(device))
    return rows_NMC.reshape(positions_NM.numel(), groups, -1).transpose(0, 1)


def _sources(node: Node, positions_NM: Tensor) -> Tensor:
    """For each position of the output and of the kernel: the position of the input that they multiply; -1 outside of it."""
    sizes, given = node.input_shapes[0][1:], node.shape[1:]
    tables = _axis_tables(node)
    left = positions_NM
    coordinates: list[Tensor] = []
    for size in reversed(given):
        coordinates.insert(0, left % size)
        left = left // size
    flat = torch.zeros((*positions_NM.shape, 1), dtype=torch.int64)
    outside = torch.zeros_like(flat, dtype=torch.bool)
    for size, table, coordinate in zip(sizes, tables, coordinates, strict=True):
        found = table[coordinate]  # N x M x taps of this axis
        flat = (flat[..., None] * size + found[..., None, :]).flatten(2)
        outside = (outside[..., None] | (found < 0)[..., None, :]).flatten(2)
    return flat.masked_fill(outside, -1)


def _axis_tables(node: Node) -> list[Tensor]:
    """For each axis: position of the input by position of the output and of the kernel, -1 outside of the input."""
    layer, axes = node.layer, node.axes
    assert isinstance(layer, Conv | ConvTranspose)
    tables = []
    for axis, (size, given) in enumerate(zip(node.input_shapes[0][1:], node.shape[1:], strict=True)):
        stride, dilation, kernel = layer.strides(axes)[axis], layer.dilations(axes)[axis], layer.kernel(axes)[axis]
        output, tap = torch.arange(given)[:, None], torch.arange(kernel)[None, :]
        if isinstance(layer, Conv):
            source = output * stride + tap * dilation - layer.paddings(axes)[axis][0]
        else:
            reached = output + layer.paddings(axes)[axis] - tap * dilation
            source = torch.where(reached % stride == 0, torch.div(reached, stride, rounding_mode="floor"), -1)
        tables.append(torch.where((source >= 0) & (source < size), source, -1))
    return tables


# --- equations --------------------------------------------------------------------------------------------------------


class NoSolution(ArithmeticError):
    """The equations have no finite solution: an input or an output is not finite."""


@dataclass
class NormalEquations:
    """Sums over rows, float64: `gram` (G x F x F) of inputs, `cross` (G x F x O) of inputs and targets, `squares` of targets."""

    gram: Tensor
    cross: Tensor
    bias: bool
    squares: float = 0.0
    rows: int = 0

    @classmethod
    def of(
        cls, node: Node, *, bias: bool, outputs: int | None = None, device: torch.device | str = "cpu"
    ) -> NormalEquations:
        """Without any row. `outputs` of each group: the layer's own by default."""
        matrix = weight_matrix(node)
        features = feature_count(node) + (1 if bias else 0)
        width = matrix.outputs if outputs is None else outputs
        kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
        gram = torch.zeros(matrix.groups, features, features, **kind)
        return cls(gram, torch.zeros(matrix.groups, features, width, **kind), bias)

    def add_layer(
        self,
        node: Node,
        inputs_NCx: Tensor,
        positions_NM: Tensor,
        outputs_NCx: Tensor | None,
        channels: Tensor | None = None,
    ) -> None:
        """Add what the layer reads and shall give at these positions, `channels` (None: all) of `outputs_NCx`; None: no targets.

        Rows are gathered a few MB at a time.
        """
        groups, features, _ = self.gram.shape
        for images, positions in _pieces(_CHUNK_BYTES // (8 * groups * features), positions_NM):
            rows_GTF = input_rows(node, inputs_NCx[images], positions)
            if outputs_NCx is None:
                targets_GTO = rows_GTF[:, :, :0]
            else:
                targets_GTO = output_rows(outputs_NCx[images], positions, channels, groups)
            self.add(rows_GTF, targets_GTO)

    def add(self, inputs_GTF: Tensor, targets_GTO: Tensor) -> None:
        """Add rows: what the layer reads, without the 1 of the bias, and what it shall give."""
        inputs, targets = inputs_GTF.double(), targets_GTO.double()
        if self.bias:
            inputs = torch.cat([inputs, inputs.new_ones((*inputs.shape[:2], 1))], dim=2)
        turned = inputs.transpose(1, 2)
        self.gram += turned @ inputs
        self.cross += turned @ targets
        self.squares += float(targets.square().sum())
        self.rows += inputs.shape[1]

    def error(self, weights_GOF: Tensor) -> float:
        """|X W - Y|^2 / |Y|^2 over the rows; 0 where both are 0."""
        given = torch.einsum("gof,gfh,goh->", weights_GOF, self.gram, weights_GOF)
        missed = self.squares - 2 * float(torch.einsum("gof,gfo->", weights_GOF, self.cross)) + float(given)
        return max(0.0, missed) / self.squares if self.squares else float(missed > 0)

    def solve(self, start_GOF: Tensor, *, ridge: float, mask_GOF: Tensor | None = None) -> Tensor:
        """The W, G x O x F, that minimises |X W - Y|^2 + r |W - start|^2; r is `ridge` times the mean square of a feature.

        A bias is not pulled. With a mask (bool), only where it is True, by output: elsewhere the result is `start`,
        which is taken to be zero there.

        Raises:
            NoSolution: it is not finite.
        """
        pull_GF = self._pull(ridge)
        right_GFO = self.cross + pull_GF[:, :, None] * start_GOF.transpose(1, 2)
        matrix_GFF = self.gram.clone()
        matrix_GFF.diagonal(dim1=1, dim2=2).add_(pull_GF)
        if mask_GOF is None:
            solved = _solve(matrix_GFF, right_GFO).transpose(1, 2)
        else:
            solved = start_GOF.clone()
            for group, mask_OF in enumerate(mask_GOF):
                _solve_supports(solved[group], matrix_GFF[group], right_GFO[group], mask_OF)
        if not bool(torch.isfinite(solved).all()):
            raise NoSolution
        return solved

    def _pull(self, ridge: float) -> Tensor:
        """The ridge of every feature of every group."""
        squares_GF = self.gram.diagonal(dim1=1, dim2=2)
        own_GF = squares_GF[:, :-1] if self.bias else squares_GF
        pull_G = ridge * own_GF.mean(dim=1)
        pull_G = torch.where(pull_G > 0, pull_G, torch.ones_like(pull_G))  # of a group without any input
        pull_GF = pull_G[:, None].expand_as(squares_GF).clone()
        if self.bias:
            pull_GF[:, -1] = 0.0
        return pull_GF


def fit_cost(node: Node, rows: int, outputs: int, ridges: int, mask_GOF: Tensor | None = None) -> float:
    """Multiplications that a fit of `outputs` per group takes: sums over `rows`, an error before and after, solutions."""
    groups, features = weight_matrix(node).groups, feature_count(node)
    product = features**2 * outputs
    sums = groups * (rows * features * (features + outputs) + (2 + ridges) * product)
    return sums + ridges * (groups * (features**3 / 3 + product) if mask_GOF is None else support_cost(mask_GOF))


def support_cost(mask_GOF: Tensor) -> float:
    """Multiplications that a solution under this mask takes: a third of the cube of every distinct support."""
    sizes = [float(support.sum()) for mask_OF in mask_GOF for support in _supports(mask_OF)[0]]
    return sum(size**3 for size in sizes) / 3


def _supports(mask_OF: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """(the distinct rows of a mask, for each output which of them is its own)."""
    distinct, inverse = torch.unique(mask_OF, dim=0, return_inverse=True)
    return list(distinct), inverse


def _solve_supports(solved_OF: Tensor, matrix_FF: Tensor, right_FO: Tensor, mask_OF: Tensor) -> None:
    """Fill in, for the outputs of each distinct support, the solution over its features."""
    supports, inverse = _supports(mask_OF)
    for number, support in enumerate(supports):
        features = torch.nonzero(support).flatten()
        outputs = torch.nonzero(inverse == number).flatten()
        if len(features):
            found = _solve(matrix_FF[features][:, features], right_FO[features][:, outputs])
            solved_OF[outputs[:, None], features[None, :]] = found.T


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of symmetric positive definite equations."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise NoSolution
    return torch.cholesky_solve(right, factor)
