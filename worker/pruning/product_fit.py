"""Both layers of a product at once: what a low-rank step puts in a layer's place, fitted to that layer's outputs.

Axes: O outputs, F features (the last is 1 where there is a bias), S rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from app.network.blocks import WEIGHTED
from app.network.graph import Graph
from app.network.layers.convolutions import Conv, ConvTranspose, Linear
from app.network.node import Node
from app.pruning.weight_matrix import weight_matrix
from worker.pruning.normal_equations import NormalEquations


def expanded_by(graph: Graph, node: Node, target: Graph) -> Node | None:
    """The 1 x 1 layer after `node` with which it replaces a layer of the `target`; None: there is none.

    Both are then found at once (`best_product`).
    """
    readers = graph.consumers(node.name)
    if node.name in target or len(readers) != 1 or readers[0].name not in target or readers[0].type not in WEIGHTED:
        return None
    outer = readers[0]
    alone = len(graph.places(node.home)) == 1 == len(graph.places(outer.home))
    plain = weight_matrix(outer).positions == 1 and weight_matrix(outer).groups == 1 == weight_matrix(node).groups
    if not alone or not plain or "bias" in node.uses or outer.shape[1:] != node.shape[1:]:
        return None
    if isinstance(outer.layer, Conv | ConvTranspose) and max(outer.layer.strides(outer.axes)) > 1:
        return None
    assert isinstance(outer.layer, Conv | ConvTranspose | Linear)
    return outer


class FactorPair(NamedTuple):
    """Two linear layers after each other, S x F and O x S; only the second may have a bias, as its last column."""

    inner: Tensor
    outer: Tensor

    def weights(self) -> Tensor:
        """The one layer that computes the same: O x F, and the bias."""
        rank = self.inner.shape[0]
        return torch.cat([self.outer[:, :rank] @ self.inner, self.outer[:, rank:]], dim=1)


def best_product(equations: NormalEquations, weights_OF: Tensor, rank: int) -> FactorPair:
    """Of all products of rank S the one whose outputs are nearest to those of W.

    Reduced-rank regression: the outputs, not the weights, are projected on their strongest directions (Zhang et al., arXiv
    1505.06798, section 3.1). Both factors are of one size: they train alike.
    """
    gram_FF, cross_FO = equations.gram[0], equations.cross[0]
    features = gram_FF.shape[0] - (1 if equations.bias else 0)
    plain_OF = weights_OF[:, :features]
    centred_FF = gram_FF[:features, :features]
    if equations.bias:
        sums_F = gram_FF[-1, :features]
        centred_FF = centred_FF - torch.outer(sums_F, sums_F) / equations.rows
    vectors_OO = torch.linalg.eigh(plain_OF @ centred_FF @ plain_OF.T).eigenvectors  # eigenvalues rise
    outer_OS = vectors_OO[:, -rank:].flip(1)
    inner_SF = outer_OS.T @ plain_OF
    sizes_S = torch.linalg.vector_norm(inner_SF, dim=1).sqrt()
    sizes_S = torch.where(sizes_S > 0, sizes_S, torch.ones_like(sizes_S))
    inner_SF, outer_OS = inner_SF / sizes_S[:, None], outer_OS * sizes_S
    if not equations.bias:
        return FactorPair(inner_SF, outer_OS)
    bias_O = (cross_FO[-1] - outer_OS @ (inner_SF @ gram_FF[-1, :features])) / equations.rows
    return FactorPair(inner_SF, torch.cat([outer_OS, bias_O[:, None]], dim=1))
