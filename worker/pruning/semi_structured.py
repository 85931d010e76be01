"""Zeros in a form: at most N of M weights in a row along the inputs, or whole blocks of outputs and inputs.

    keep = pattern_keep(scores, matrix, 2, 4, dead)                    # one layer
    keep = blocks_keep({name: BlockScores.of(...), ...}, sparsity)     # one ranking over all of these layers

WeightScores, `dead` and `keep` are flat, in the weight's row-major order; `dead` are the weights that an earlier
step has pruned: they stay pruned, and count first. The weakest are removed; of equal scores the first ones.

No runtime that we export to computes either form faster. 2:4 is what NVIDIA's sparse tensor cores compute (Mishra et al.,
arXiv 2104.08378), for matrices in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from app.pruning.channel_rules import BoolArray, IntArray
from app.pruning.sparsity_allocation import blocks_to_remove
from app.pruning.weight_matrix import WeightMatrix
from app.spec.prune import Criterion

WeightScores = npt.NDArray[np.floating[Any]]
"""One number a weight, at least 0: float64, or the weight's own type."""


def pattern_keep(scores: WeightScores, matrix: WeightMatrix, kept: int, of: int, dead: BoolArray | None) -> BoolArray:
    """Which weights stay so that of `of` in a row along the inputs `kept` do, fewer where more are dead.

    Args:
        scores: One a weight, at least 0.
        matrix: Its `inputs` are a multiple of `of`: a row never crosses from one group of a convolution into the next.
        kept: N, at least 1.
        of: M.
        dead: What was pruned before.
    """
    if dead is not None:
        scores = np.where(dead, -1.0, scores)
    rows_GOIP = matrix.rows(scores)
    rows = np.moveaxis(rows_GOIP, 2, 3).reshape(-1, of)  # contiguous: M weights beside each other
    order = np.argsort(rows, axis=1, kind="stable")
    keep = np.zeros(rows.shape, dtype=np.bool_)
    np.put_along_axis(keep, order[:, of - kept :], True, axis=1)
    groups, outputs, inputs, positions = rows_GOIP.shape
    keep_GOIP = np.moveaxis(keep.reshape(groups, outputs, positions, inputs), 3, 2)
    flat: BoolArray = np.ascontiguousarray(matrix.flat(keep_GOIP))
    return flat if dead is None else flat & ~dead


@dataclass(frozen=True)
class BlockScores:
    """The blocks of one layer: the block of each weight (flat), and for each block its score and living weights."""

    block_of: IntArray
    scores: WeightScores
    alive: IntArray
    dead: BoolArray | None

    @classmethod
    def of(
        cls,
        values: WeightScores,
        matrix: WeightMatrix,
        shape: tuple[int, int],
        criterion: Criterion,
        dead: BoolArray | None,
    ) -> Self:
        """The blocks of `shape` (outputs x inputs, all positions of the kernel together; ragged at the edges).

        The score is the mean square of a block's weights (`l2`), or the mean of their absolute values (`l1`): means, so
        that neither ragged blocks nor layers with large kernels are favoured. `random`: the first number of each block.

        Args:
            values: Absolute weights, or random numbers, one a weight.
            matrix: Each of its groups has blocks of its own.
            shape: Outputs and inputs of a block.
            criterion: l1, l2 or random.
            dead: What was pruned before; a block of dead weights only has score -1.
        """
        block_of = _block_of(matrix, shape)
        sizes = np.bincount(block_of)
        alive = sizes if dead is None else np.bincount(block_of[~dead], minlength=len(sizes))
        if criterion == "random":
            scores = np.asarray(values, dtype=np.float64)[np.unique(block_of, return_index=True)[1]]
        else:
            exact = np.asarray(values, dtype=np.float64)
            if dead is not None:
                exact = np.where(dead, 0.0, exact)
            scores = np.bincount(block_of, weights=exact**2 if criterion == "l2" else exact) / sizes
        return cls(block_of, np.where(alive > 0, scores, -1.0), alive.astype(np.int64), dead)


def _block_of(matrix: WeightMatrix, shape: tuple[int, int]) -> IntArray:
    """The number of the block of each weight, flat: group after group, in each of them row by row."""
    height, width = shape
    high, wide = matrix.blocks(height, width)
    block_GOIP = (
        np.arange(matrix.groups)[:, None, None, None] * (high * wide)
        + (np.arange(matrix.outputs) // height)[None, :, None, None] * wide
        + (np.arange(matrix.inputs) // width)[None, None, :, None]
        + np.zeros(matrix.positions, dtype=np.int64)
    )
    return np.ascontiguousarray(matrix.flat(block_GOIP))


def blocks_keep(layers: Mapping[str, BlockScores], sparsity: float) -> dict[str, BoolArray]:
    """Which weights stay when the weakest blocks of all `layers` are removed, with as many as come nearest to `sparsity`.

    Nearest to `round(sparsity * n)` zeros of the n weights, dead ones counted: `blocks_to_remove`. `sparsity` is from 0
    to 1. The last of the strongest blocks of each layer always stays.
    """
    scores = np.concatenate([layer.scores for layer in layers.values()])
    alive = np.concatenate([layer.alive for layer in layers.values()])
    start = 0
    for layer in layers.values():
        start += len(layer.scores)
        scores[start - 1 - int(layer.scores[::-1].argmax())] = math.inf
    size = sum(len(layer.block_of) for layer in layers.values())
    order = np.argsort(scores, kind="stable")[: len(scores) - len(layers)]
    count = blocks_to_remove(alive[order], size - int(alive.sum()), round(sparsity * size))
    stays = np.ones(len(scores), dtype=np.bool_)
    stays[order[:count]] = False
    keep: dict[str, BoolArray] = {}
    start = 0
    for name, layer in layers.items():
        kept = stays[start : start + len(layer.scores)][layer.block_of]
        keep[name] = kept if layer.dead is None else kept & ~layer.dead
        start += len(layer.scores)
    return keep
