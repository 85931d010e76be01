"""Which examples are held out: the same share of each class, drawn at random."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

HELD_OUT_SHARE = 0.1  # of an upload that has no test part


def stratified_mask(
    labels: npt.NDArray[np.int64], share: float, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """True for the examples to hold out, N: `share` of all, rounded, at least one; every class keeps one or more.

    Each class gives its share rounded down, and those with the largest remainder one more (ties: the smaller class
    number). `share` is 0..1; 0 holds out nothing.
    """
    mask = np.zeros(len(labels), dtype=np.bool_)
    if share <= 0 or len(labels) < 2:
        return mask
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * share
    quota = np.minimum(np.floor(exact).astype(np.int64), counts - 1)
    missing = max(1, math.floor(len(labels) * share + 0.5)) - int(quota.sum())
    for index in np.argsort(quota - exact, kind="stable"):
        if missing > 0 and quota[index] < counts[index] - 1:
            quota[index] += 1
            missing -= 1
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(counts)
    for _, count, end, held_out in zip(classes, counts, ends, quota, strict=True):
        rows = by_class[end - count : end]
        mask[generator.permutation(rows)[:held_out]] = True
    return mask
