"""The blocks in which channels leave: what each group has of them, and one order of all.

Blocks of a group leave weakest first. A width is always a multiple of the block, so blocks of a half or a quarter have a
boundary wherever the whole ones have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.pruning.channel_rules import FloatArray, IntArray
from app.pruning.group_limits import GroupLimits

ByGroup = Mapping[int, FloatArray]


@dataclass(frozen=True, eq=False)
class GroupBlocks:
    """The blocks of one group: its classes with the weakest first, and how many are gone after 0, 1, 2, ... blocks.

    `values` are the scores of `ascending`; None where there are none.
    """

    limits: GroupLimits
    ascending: IntArray
    values: FloatArray | None
    ends: IntArray

    @property
    def index(self) -> int:
        """The group's index."""
        return self.limits.group.index

    def share_gone(self, gone: IntArray | int) -> FloatArray:
        """The part of the group as it was at the start that is gone with so many more classes."""
        start = self.limits.width_at_start
        return np.asarray((gone + start - len(self.ascending)) / start, dtype=np.float64)

    def nearest(self, wanted: int) -> int:
        """How many classes leave so that their channels come nearest to `wanted`; rather fewer than more."""
        apart = np.abs(self.ends * self.limits.group.channels - wanted)
        return int(self.ends[int(np.argmin(apart))])


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """Blocks in the order in which they leave: their groups, and how many classes of the group are gone before and after."""

    groups: IntArray
    starts: IntArray
    ends: IntArray

    def gone_after(self, count: int, gone: Sequence[int]) -> IntArray:
        """How many classes of each group are gone after the first `count` blocks, where `gone` were before."""
        after = np.array(gone, dtype=np.int64)
        after[self.groups[:count]] = self.ends[:count]  # of one group's blocks the last counts
        return after


def blocks_of(limits: GroupLimits, scores: Mapping[int, float] | None) -> GroupBlocks:
    """The blocks of a group that may be pruned; without scores its classes are in their own order."""
    classes = limits.group.classes
    values = None
    if scores is not None:
        values = np.array([scores[c] for c in classes.tolist()], dtype=np.float64)
        assert np.isfinite(values).all(), "scores are finite: NaN has no place in an order"
        order = np.argsort(values, kind="stable")
        classes, values = classes[order], values[order]
    return GroupBlocks(limits, classes, values, _ends(len(classes), limits))


def rebuilt(blocks: GroupBlocks, limits: GroupLimits) -> GroupBlocks:
    """The same group in other blocks."""
    return GroupBlocks(limits, blocks.ascending, blocks.values, _ends(len(blocks.ascending), limits))


def order_by_share(groups: Iterable[GroupBlocks]) -> BlockOrder:
    """All blocks by the part of its group that is gone with each."""
    return _order((blocks, blocks.share_gone(blocks.ends[1:])) for blocks in groups)


def order_by_score(groups: Iterable[GroupBlocks], *, normalised: bool) -> BlockOrder:
    """All blocks by the mean of their scores, divided by that of the group where `normalised`.

    A block never stands before a weaker one of its group.
    """
    return _order((blocks, _mean_scores(blocks, normalised=normalised)) for blocks in groups)


def _mean_scores(blocks: GroupBlocks, *, normalised: bool) -> FloatArray:
    assert blocks.values is not None
    mean = float(blocks.values.mean())
    scaled = blocks.values * (1 / mean if normalised and mean > 0 else 1.0)
    means = [scaled[a:b].mean() for a, b in zip(blocks.ends.tolist(), blocks.ends[1:].tolist(), strict=False)]
    return np.maximum.accumulate(np.array(means, dtype=np.float64))


def _ends(width: int, limits: GroupLimits) -> IntArray:
    together = limits.together
    first = width % together or together
    return np.array([0, *range(first, width - limits.least + 1, together)], dtype=np.int64)


def _order(ranked: Iterable[tuple[GroupBlocks, FloatArray]]) -> BlockOrder:
    """Blocks by rank; equal ones by group, and inside a group in its own order."""
    found = [(blocks, ranks) for blocks, ranks in ranked if len(ranks)]
    if not found:
        nothing = np.zeros(0, dtype=np.int64)
        return BlockOrder(nothing, nothing, nothing)
    ranks = np.concatenate([ranks for _, ranks in found])
    groups = np.concatenate([np.full(len(ranks), blocks.index) for blocks, ranks in found])
    starts = np.concatenate([blocks.ends[:-1] for blocks, _ in found])
    ends = np.concatenate([blocks.ends[1:] for blocks, _ in found])
    order = np.lexsort((ends, groups, ranks))
    return BlockOrder(groups[order], starts[order], ends[order])
