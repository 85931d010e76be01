"""How much where, and when: a sparsity on its way, the layers' shares of it, and how many blocks come nearest to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from app.network.layers.shapes import Shape
from app.pruning.channel_rules import FloatArray, IntArray

HALVINGS = 200  # of the factor: after them its neighbours are the next floating-point numbers


def sparsity_after(sparsity: float, fraction: float) -> float:
    """The sparsity after the part `fraction` of the way: each stage keeps the same part of what the one before left."""
    return sparsity if fraction >= 1 else float(1 - (1 - sparsity) ** fraction)  # 1 - (1 - 0.3) is not 0.3


def erk_kept(shapes: Mapping[str, Shape], alive: Mapping[str, int], kept: int) -> dict[str, int]:
    """How many weights each layer keeps, `kept` in all: Erdos-Renyi-kernel, Evci et al., arXiv 1911.11134.

    A layer's density is epsilon * (sum of its axes) / (product of its axes), so it keeps epsilon * (sum of its axes)
    weights, and small layers stay denser than large ones. Where that is more than the layer has, all of it stays and
    epsilon grows for the others, as in the authors' code; where it is less than one weight, one stays. Whole numbers
    by largest remainder, so that the sum is exact.

    Args:
        shapes: Layer -> its weight's axes, (outputs, inputs of an output, *kernel).
        alive: Layer -> how many of its weights may be kept (at least 1): all, or those that were not pruned before.
        kept: The sum; it is brought between the number of layers and the sum of `alive`.
    """
    names = list(shapes)
    most = np.array([alive[name] for name in names], dtype=np.float64)
    scale = np.array([float(sum(shapes[name])) for name in names])
    kept = min(max(kept, len(names)), sum(alive[name] for name in names))

    def shares(epsilon: float) -> FloatArray:
        return np.clip(epsilon * scale, 1.0, most)

    low, high = 0.0, float((most / scale).max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if math.fsum(shares(middle)) <= kept:
            low = middle
        else:
            high = middle
    wanted = shares(low)
    whole = np.floor(wanted)
    rest = kept - int(whole.sum())
    # the largest remainders first, then the layers that are not at their bound
    for position in np.argsort(-np.where(whole < most, wanted - whole, -1.0), kind="stable")[:rest]:
        whole[position] += 1
    return {name: int(count) for name, count in zip(names, whole, strict=True)}


def blocks_to_remove(weights: Sequence[int] | IntArray, zeros: int, wanted: int) -> int:
    """How many blocks are removed, from the first on, so that the number of zeros comes nearest to `wanted`.

    `weights` has for each block, weakest first, how many of its weights are not zero yet; `zeros` are there already.
    Of two numbers that are equally near the smaller is taken. Blocks are not skipped for the sake of the count: it is
    the weakest that are removed. So the number of zeros misses by at most half of the last block, unless blocks run out.
    """
    reached = zeros + np.concatenate([[0], np.cumsum(np.asarray(weights, dtype=np.int64))])
    return int(np.abs(reached - wanted).argmin())


def equal_blocks_to_remove(blocks: int, size: int, wanted: int) -> int:
    """What `blocks_to_remove` gives for so many blocks of `size` weights, none of them zero yet."""
    whole, rest = divmod(wanted, size)
    return min(blocks, whole + (2 * rest > size))
