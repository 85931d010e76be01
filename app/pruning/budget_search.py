"""Which blocks leave so that a network is within a budget, and which may return.

    gone = first_within(costs, order, measure, allowed, gone)      # along one order of blocks
    gone = cheapest_within(costs, groups, losses, ...)             # first what loses least for what it saves

`gone` says how many classes of each group leave. Both may go further than they must, by less than a block;
`return_in_order` and `return_dearest` give back what the budget allows, so that no block of it can be given back.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np

from app.network.cost import CostMeasure
from app.pruning.channel_blocks import BlockOrder, ByGroup, GroupBlocks
from app.pruning.channel_rules import IntArray
from app.pruning.incremental_cost import CostWalk, IncrementalCost


def first_within(
    costs: IncrementalCost, order: BlockOrder, measure: CostMeasure, allowed: int, gone: Sequence[int]
) -> IntArray:
    """What is gone after the fewest blocks of `order` with which the cost is at most `allowed`.

    With all of them it is. The cost falls with every block.
    """
    count = bisect_left(
        range(len(order.groups)),
        True,
        key=lambda count: costs.amount_at(order.gone_after(count, gone), measure) <= allowed,
    )
    return order.gone_after(count, gone)


def cheapest_within(
    costs: IncrementalCost,
    groups: Sequence[GroupBlocks],
    losses: ByGroup,
    measure: CostMeasure,
    allowed: int,
    gone: Sequence[int],
) -> IntArray:
    """What is gone when blocks leave, each time what loses least for what it saves now, until the cost is at most `allowed`.

    A block's price is the slope of the lower convex hull of loss over saving where it lies: a cut behind which the loss
    rises no more is reached through blocks that are dear alone. Savings shrink as other groups do, so a price that was
    worked out earlier is never too high, and only the lowest has to be worked out again (lazy greedy, Minoux 1978). Where
    both widths of a layer follow one group, the hull is that over its classes: near the one over savings, which moves.
    Blocks of equal price leave where the smallest part of a group is gone, then by group.

    Args:
        losses: For each group the foreseen rise of the loss after 0, 1, 2, ... of its blocks, not falling.
        gone: What has left already, of other groups than these.
    """
    walk = CostWalk(costs, measure, gone)
    descents = {blocks.index: _Descent(blocks, losses[blocks.index].tolist()) for blocks in groups}
    waiting = [descent.entry(walk) for descent in descents.values() if not descent.done]
    heapq.heapify(waiting)
    while waiting and not walk.fits(allowed):
        _, _, index = waiting[0]
        descent = descents[index]
        fresh = descent.entry(walk)
        if fresh > waiting[0]:
            heapq.heapreplace(waiting, fresh)
            continue
        walk.move(index, descent.step())
        if descent.done:
            heapq.heappop(waiting)
        else:
            heapq.heapreplace(waiting, descent.entry(walk))
    return np.array(walk.gone, dtype=np.int64)


class _Descent:
    """One group on its way down: at `place` blocks."""

    def __init__(self, blocks: GroupBlocks, losses: list[float]) -> None:
        self._blocks, self._losses = blocks, losses
        self._ends: list[int] = blocks.ends.tolist()
        self._shares: list[float] = blocks.share_gone(blocks.ends).tolist()
        self._corners = _lower_hull(self._ends, losses)[::-1]
        self._place = 0

    @property
    def done(self) -> bool:
        """Whether its last block has left."""
        return self._place + 1 == len(self._ends)

    def step(self) -> int:
        """Let the next block leave; how many classes it has."""
        self._place += 1
        return self._ends[self._place] - self._ends[self._place - 1]

    def entry(self, walk: CostWalk) -> tuple[float, float, int]:
        """(loss for each unit saved, part that is gone then, group) of the next block."""
        place, index = self._place, self._blocks.index
        slope, bend = walk.saving_terms(index)
        price = math.inf
        while self._corners and self._corners[-1] <= place + 1:
            self._corners.pop()
        for further in (place + 1, *self._corners):
            count = self._ends[further] - self._ends[place]
            saved = count * (slope - count * bend)
            lost = self._losses[further] - self._losses[place]
            price = min(price, lost / saved if saved else math.inf)
        return price, self._shares[place + 1], index


def _lower_hull(ends: Sequence[int], losses: Sequence[float]) -> list[int]:
    """The places where the lower convex hull of the loss over the number of classes bends, ascending."""
    hull: list[int] = []
    for place, (end, loss) in enumerate(zip(ends, losses, strict=True)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (losses[b] - losses[a]) * (end - ends[a]) < (loss - losses[a]) * (ends[b] - ends[a]):
                break
            hull.pop()
        hull.append(place)
    return hull


def return_in_order(
    costs: IncrementalCost, order: BlockOrder, measure: CostMeasure, allowed: int, gone: IntArray
) -> IntArray:
    """Give blocks back, the last of `order` first, while all later ones of the group have been given back.

    What is refused once never fits later, when more has returned.
    """
    walk = CostWalk(costs, measure, gone)
    stays: set[int] = set()
    left = order.ends <= gone[order.groups]
    for group, start, end in zip(
        order.groups[left][::-1].tolist(),
        order.starts[left][::-1].tolist(),
        order.ends[left][::-1].tolist(),
        strict=True,
    ):
        if group in stays or walk.gone[group] != end:
            continue
        if walk.may_return(group, end - start, allowed):
            walk.move(group, start - end)
        else:
            stays.add(group)
    return np.array(walk.gone, dtype=np.int64)


def return_dearest(
    costs: IncrementalCost,
    groups: Iterable[GroupBlocks],
    losses: ByGroup,
    measure: CostMeasure,
    allowed: int,
    gone: IntArray,
) -> IntArray:
    """Give blocks back, each time the one that regains most loss for what it costs now, as far as the budget allows.

    What is refused once never fits later; and as other groups grow, a block costs more, so that a gain that was worked out
    earlier is never too low.
    """
    walk = CostWalk(costs, measure, gone)
    by_index = {blocks.index: (blocks.ends.tolist(), losses[blocks.index].tolist(), blocks) for blocks in groups}

    def entry(index: int) -> tuple[float, float, int, int] | None:
        ends, lost, blocks = by_index[index]
        place = bisect_left(ends, walk.gone[index])
        if place == 0:
            return None
        cost = -walk.saving(index, ends[place - 1] - ends[place])
        gain = (lost[place] - lost[place - 1]) / cost if cost else math.inf
        return -gain, -float(blocks.share_gone(ends[place])), index, place

    waiting = [found for index in by_index if (found := entry(index)) is not None]
    heapq.heapify(waiting)
    while waiting:
        first = waiting[0]
        index, place = first[2:]
        ends = by_index[index][0]
        count = ends[place] - ends[place - 1]
        if not walk.may_return(index, count, allowed):
            heapq.heappop(waiting)
            continue
        fresh = entry(index)
        assert fresh is not None
        if fresh > first:
            heapq.heapreplace(waiting, fresh)
            continue
        walk.move(index, -count)
        following = entry(index)
        if following is None:
            heapq.heappop(waiting)
        else:
            heapq.heapreplace(waiting, following)
    return np.array(walk.gone, dtype=np.int64)
