"""Which channels a step removes, so that the network lands on its budget.

    removals = choose_removals(graph, classes, scores, step)            # scores None: the dry run's equal shares
    smaller = shrink_graph(graph, removals.dropped)                     # costs exactly removals.cost

Channels leave in *blocks*: in each group the weakest classes first, so many at a time and so many at most as its limits
say (`group_limits.py`, `channel_blocks.py`). What leaves first of all groups (`budget_search.py`):

- scope `layer`: the part of its group that is gone with it, so that all groups keep the same fraction;
- scope `sensitivity`: by the rise of the loss for what is saved in the measure that the budget bounds. The rise is that of
  the group alone, as the worker has measured it in this very step (`Curve`; the job of kind sensitivity, which only draws
  such curves for its user, is `spec/sensitivity.py`); the saving is counted again whenever other widths have moved;
- scope `learned`: by score, which is the gate that the worker has learned for each class in this very step;
- scope `global`: by score, each divided by the mean of its group, because raw sums grow with fan-in and with the number
  of tied layers (`taylor` is in units of the loss and `lamp` relative to its group already: they rank raw).

A budget takes blocks until the exact cost is within it, and then gives back what the budget allows: the result is met from
below, and no block of it can be given back. Where no multiple is stated, what is left of the budget is used up in blocks of 8 and
then of 4 channels. A `sparsity` takes the number of channels that is nearest to that part of each group (scope `layer`) or
of all groups (`global`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.network.cost import Cost, CostMeasure, cost
from app.network.graph import Graph
from app.pruning.budget_search import cheapest_within, first_within, return_dearest, return_in_order
from app.pruning.channel_blocks import (
    BlockOrder,
    ByGroup,
    GroupBlocks,
    blocks_of,
    order_by_score,
    order_by_share,
    rebuilt,
)
from app.pruning.channel_classes import Classes, channel_classes, shrink_graph
from app.pruning.channel_rules import FloatArray, IntArray
from app.pruning.group_limits import (
    BLOCKS,
    GroupLimits,
    group_limits,
    heaviest_layers,
    held_layers,
    hold_others,
    in_finer_blocks,
    prunable_groups,
)
from app.pruning.incremental_cost import IncrementalCost
from app.pruning.sparsity_allocation import sparsity_after
from app.spec.prune import Prune

COMPARABLE = ("taylor", "lamp")  # criteria whose scores can be compared between groups as they are
CLOSE_ENOUGH = 0.9  # of what is asked for
FINER_BLOCKS = (8, 4)
"""Channels in which the rest of a budget is used, largest first: ONNX Runtime's blocked kernels need multiples of 4."""


@dataclass(frozen=True)
class Curve:
    """What it costs to keep only a part of one group: points (part kept in (0, 1], rise of the loss), parts falling."""

    points: tuple[tuple[float, float], ...]

    def at(self, kept: FloatArray) -> FloatArray:
        """The rise at these parts, by lines between the points; never less than for a larger part."""
        parts, losses = zip((1.0, 0.0), *self.points, strict=True)
        rising = np.maximum.accumulate(np.array(losses, dtype=np.float64))
        return np.interp(-kept, -np.array(parts, dtype=np.float64), rising)


@dataclass(frozen=True)
class Removals:
    """The classes that leave, the cost of the network without them, and the least that could be left.

    `floor` is the cost with every group at its smallest width, `floor_dropped` the classes that leave then. `loss` is the
    rise of the loss that the curves foresee: the sum of each group's own; None without curves. `in_blocks` is the cost before
    the rest of a budget was used in finer blocks.
    """

    dropped: frozenset[int]
    cost: Cost
    floor: Cost
    floor_dropped: frozenset[int]
    in_blocks: Cost
    loss: float | None = None


class BudgetUnreachable(Exception):
    """No removal meets the budget.

    `measure` is what it bounds ("macs", "params", "bytes"; None where a sparsity was asked for), `allowed` the
    largest cost, `floor` the least that can be reached, `holds` one sentence for each layer that holds the network
    up, heaviest first.
    """

    def __init__(
        self,
        measure: CostMeasure | None,
        allowed: int | None,
        floor: int | None,
        dense: int | None,
        holds: Sequence[str],
    ) -> None:
        self.measure, self.allowed, self.floor, self.dense, self.holds = measure, allowed, floor, dense, tuple(holds)
        reasons = "; ".join(self.holds)
        if measure is None:
            message = f"no channel may be removed: {reasons}"
        else:
            assert floor is not None
            share = f" ({floor / dense:.3f} of the baseline)" if dense else ""
            message = f"at most {allowed} {measure} are allowed, but at least {floor}{share} remain: {reasons}"
        super().__init__(message)


def choose_removals(
    graph: Graph,
    classes: Classes,
    scores: Mapping[int, float] | None,
    step: Prune,
    *,
    start: Graph | None = None,
    baseline: Cost | None = None,
    fraction: float = 1.0,
    only: int | None = None,
    losses: Mapping[int, Curve] | None = None,
    block: int = BLOCKS[0],
    prices: Mapping[str, int] | None = None,
    costs: IncrementalCost | None = None,
    explain: bool = True,
) -> Removals:
    """The classes of `graph` that leave so that it meets the budget or sparsity of `step`.

    Args:
        graph: The network as it is now.
        classes: Of `graph`, with the ties of `start`.
        scores: Importance of every class that is not pinned: the lowest leave first. None: equal shares, whatever the
            scope.
        step: What is asked for; a prune step of structure channels.
        start: The graph before the first stage of this step (default: `graph`). Floors and `sparsity` refer to its
            widths, the way of a budget begins at its cost.
        baseline: The cost to which fractions of a budget refer (default: that of `start`).
        fraction: How far to go, in (0, 1]: stages of equal length keep the same part of what the one before left.
        only: Index of the one group that may be touched (default: all).
        losses: Scope `sensitivity`: for each group that may leave, what its removal costs. None: equal shares.
        block: Where `round_to` is not stated: the largest block of channels, as `choose_block` finds it.
        prices: What one multiply-accumulate of a layer counts in an absolute budget of them (default: 1).
        costs: Of `graph` at these prices, where they are at hand.
        explain: Whether an unreachable budget says what holds the network up, which takes as long as the choice.

    Raises:
        BudgetUnreachable: The budget is below the floor, or nothing may be removed at all.
    """
    limits = group_limits(graph, classes, step, start or graph, block)
    if only is not None:
        limits = hold_others(limits, only)
    costs = costs or IncrementalCost(graph, classes, prices)
    prunable = [blocks_of(each, scores) for each in limits if each.held is None]
    free = [blocks for blocks in prunable if blocks.limits.sparsity is None]
    gone = [0] * len(classes.groups)
    for blocks in prunable:
        own = blocks.limits.sparsity
        if own is not None:
            gone[blocks.index] = blocks.nearest(_wanted(blocks.limits, sparsity_after(own, fraction)))
    most = list(gone)
    for blocks in free:
        most[blocks.index] = int(blocks.ends[-1])
    floor, everything = costs.cost_at(most), _classes_of(prunable, most)

    if step.budget is not None:
        dense = baseline or cost(start or graph)
        measure, begin = _counted_measure(step), costs.cost_at([0] * len(gone)) if start is None else cost(start)
        allowed, least = allowed_cost(step, dense, fraction, begin), costs.amount_at(most, measure)
        if fraction < 1:  # an override's own part is rounded in each stage: only the last has to meet the budget
            allowed = max(allowed, least)
        if least > allowed:
            smallest = shrink_graph(graph, everything, classes) if explain else None
            holds = heaviest_layers(smallest, graph, classes, limits, measure) if smallest else []
            raise BudgetUnreachable(measure, allowed, least, dense.of(measure), holds)
        by_loss = scores is not None and step.scope == "sensitivity" and losses is not None
        ranking = _Ranking(step, scores is not None, losses if by_loss else None)
        landed, left = _gone_within(costs, free, ranking, measure, allowed, gone)
    else:
        if not everything and (start is None or start == graph):  # later stages may find all of it done
            raise BudgetUnreachable(None, None, None, None, held_layers(classes, limits))
        landed = left = _gone_by_sparsity(free, step, fraction, gone, ranked=scores is not None)
    loss = None if losses is None else _foreseen_loss(free, losses, left)
    return Removals(_classes_of(prunable, left), costs.cost_at(left), floor, everything, costs.cost_at(landed), loss)


def choose_block(graph: Graph, classes: Classes, step: Prune, *, baseline: Cost | None = None) -> tuple[int, Removals]:
    """(the largest block of channels, what leaves with equal shares).

    Where `round_to` is not stated it is the first of 16, 8, 4, 2, 1 with which the removal comes within a tenth of what
    is asked for, before finer blocks use the rest; else the one that comes nearest: a network of few or narrow layers may
    have no budget between blocks.

    Raises:
        BudgetUnreachable: As `choose_removals` does; with blocks of 1 where `round_to` is not stated.
    """
    found: list[tuple[float, int, Removals]] = []
    costs = IncrementalCost(graph, classes)
    whole = costs.cost_at([0] * len(classes.groups))
    blocks = BLOCKS if step.round_to is None else BLOCKS[:1]

    def reached(removals: Removals, spent: Cost) -> float:
        """How near it comes: of a budget the part that is used, of a sparsity the part of it that leaves."""
        if step.budget is None:
            return _part_of_sparsity(graph, classes, step, removals)
        measure = _counted_measure(step)
        return spent.of(measure) / max(1, min(allowed_cost(step, baseline or whole, 1.0), whole.of(measure)))

    for block in blocks:
        try:
            removals = choose_removals(graph, classes, None, step, baseline=baseline or whole, block=block, costs=costs)
        except BudgetUnreachable:
            if not found and block == blocks[-1]:
                raise
            continue
        if reached(removals, removals.in_blocks) >= CLOSE_ENOUGH:
            return block, removals
        found.append((reached(removals, removals.cost), block, removals))
    _, block, removals = max(found, key=lambda entry: entry[0])  # the first of equals
    return block, removals


def choose_removals_in_blocks(
    graph: Graph,
    classes: Classes,
    scores: Mapping[int, float] | None,
    step: Prune,
    *,
    start: Graph,
    baseline: Cost,
    fraction: float,
    losses: Mapping[int, Curve] | None = None,
) -> Removals:
    """What `choose_removals` gives with the block that suits the step, in a stage of it; `scores` None: equal shares.

    First the block that `choose_block` finds for `start`. Shares that are not equal may miss the budget in blocks with
    which equal ones come near it: then blocks are halved until nine tenths of it are used. Of all removals the one counts
    for which the curves foresee the least loss; without curves the one that uses most of the budget.

    Raises:
        BudgetUnreachable: As `choose_removals` and `choose_block` do.
    """
    costs = IncrementalCost(graph, classes)
    now = costs.cost_at([0] * len(classes.groups))

    def choose(block: int) -> Removals:
        return choose_removals(
            graph,
            classes,
            scores,
            step,
            start=start,
            baseline=baseline,
            fraction=fraction,
            losses=losses,
            block=block,
            costs=costs,
        )

    block, _ = choose_block(start, channel_classes(start), step, baseline=baseline)
    removals = choose(block)
    if step.budget is None or step.round_to is not None:
        return removals
    measure = _counted_measure(step)
    usable = min(allowed_cost(step, baseline, fraction, cost(start)), now.of(measure))

    def worth(found: Removals) -> float:
        return found.cost.of(measure) if found.loss is None else -found.loss

    while block > 1 and removals.cost.of(measure) < CLOSE_ENOUGH * usable:
        block //= 2
        removals = max(removals, choose(block), key=worth)
    return removals


def allowed_cost(step: Prune, dense: Cost, fraction: float, begin: Cost | None = None) -> int:
    """The largest cost after the part `fraction` of the way: geometric between where the step begins and the budget.

    `begin` is the cost of the network before its first stage, which earlier steps may have made smaller than the baseline
    `dense`.
    """
    assert step.budget is not None
    measure = _counted_measure(step)
    target = step.budget.allowed(dense.of(measure))
    whole = dense.of(measure) if begin is None else min(dense.of(measure), begin.of(measure))
    return target if fraction >= 1 or target >= whole else int(whole * (target / whole) ** fraction)


def _counted_measure(step: Prune) -> CostMeasure:
    """The cost that the budget of `step` bounds."""
    assert step.budget is not None
    assert step.budget.measure != "latency_ms", "a latency is measured, not counted"
    return step.budget.measure


def _part_of_sparsity(graph: Graph, classes: Classes, step: Prune, removals: Removals) -> float:
    assert step.sparsity is not None
    asked = gone = 0.0
    for group in prunable_groups(graph, classes, step.model_copy(update={"round_to": 1})):
        asked += step.sparsity * len(group.classes) * group.channels
        gone += len(removals.dropped.intersection(group.classes.tolist())) * group.channels
    return min(gone, asked) / max(gone, asked, 1.0)


@dataclass(frozen=True)
class _Ranking:
    """How blocks of all groups are compared; `curves` where the loss decides."""

    step: Prune
    scored: bool
    curves: Mapping[int, Curve] | None

    def order(self, groups: Sequence[GroupBlocks]) -> BlockOrder:
        """Blocks by score in the scopes `global` and `learned`, else by the part of their group."""
        if self.scored and self.step.scope == "learned":
            return order_by_score(groups, normalised=False)
        if self.scored and self.step.scope == "global":
            return order_by_score(groups, normalised=self.step.criterion not in COMPARABLE)
        return order_by_share(groups)

    def losses(self, groups: Sequence[GroupBlocks]) -> ByGroup:
        """For each group the foreseen rise of the loss after each of its blocks."""
        assert self.curves is not None
        return {
            blocks.index: self.curves[blocks.index].at(1 - blocks.ends / len(blocks.ascending)) for blocks in groups
        }


def _gone_within(
    costs: IncrementalCost,
    groups: Sequence[GroupBlocks],
    ranking: _Ranking,
    measure: CostMeasure,
    allowed: int,
    gone: Sequence[int],
) -> tuple[IntArray, IntArray]:
    """How many classes of each group leave, so that the cost is within `allowed`: in whole blocks, and in finer ones.

    None of them can be given back.
    """
    if ranking.curves is None:
        left = first_within(costs, ranking.order(groups), measure, allowed, gone)
    else:
        left = cheapest_within(costs, groups, ranking.losses(groups), measure, allowed, gone)
    found = []
    for finer in _finer(groups):
        if ranking.curves is None:
            left = return_in_order(costs, ranking.order(finer), measure, allowed, left)
        else:
            left = return_dearest(costs, finer, ranking.losses(finer), measure, allowed, left)
        found.append(left)
    return found[0], found[-1]


def _finer(groups: Sequence[GroupBlocks]) -> Iterator[Sequence[GroupBlocks]]:
    """The groups as they are, then in each finer block that one of them may have."""
    yield groups
    for block in FINER_BLOCKS:
        finer = [rebuilt(blocks, in_finer_blocks(blocks.limits, block)) for blocks in groups]
        if any(new.limits is not old.limits for new, old in zip(finer, groups, strict=True)):
            yield finer


def _gone_by_sparsity(
    groups: Sequence[GroupBlocks], step: Prune, fraction: float, gone: Sequence[int], *, ranked: bool
) -> IntArray:
    """How many classes leave so that the part of the channels that is gone comes nearest to the sparsity of `step`."""
    assert step.sparsity is not None, "a prune step of channels has a budget or a sparsity"
    part, left = sparsity_after(step.sparsity, fraction), np.array(gone, dtype=np.int64)
    if step.scope != "global" or not ranked:
        for blocks in groups:
            left[blocks.index] = blocks.nearest(_wanted(blocks.limits, part))
        return left
    order = order_by_score(groups, normalised=step.criterion not in COMPARABLE)
    channels = np.ones(len(gone), dtype=np.int64)
    for blocks in groups:
        channels[blocks.index] = blocks.limits.group.channels
    leaving = np.concatenate([[0], np.cumsum((order.ends - order.starts) * channels[order.groups])])
    at_start = sum(blocks.limits.channels_at_start for blocks in groups)
    wanted = round(part * at_start) - (at_start - sum(blocks.limits.channels for blocks in groups))
    return order.gone_after(int(np.argmin(np.abs(leaving - wanted))), gone)


def _wanted(limits: GroupLimits, part: float) -> int:
    """How many channels leave now so that `part` of those at the start is gone (half to even)."""
    width = limits.width_at_start
    return (round(part * width) - (width - len(limits.group.classes))) * limits.group.channels


def _foreseen_loss(groups: Sequence[GroupBlocks], curves: Mapping[int, Curve], gone: IntArray) -> float:
    kept = {blocks.index: 1 - gone[blocks.index] / len(blocks.ascending) for blocks in groups}
    return float(sum(curves[index].at(np.array(part)) for index, part in kept.items() if index in curves))


def _classes_of(groups: Sequence[GroupBlocks], gone: Sequence[int] | IntArray) -> frozenset[int]:
    """The classes that leave: the first of each group."""
    return frozenset(c for blocks in groups for c in blocks.ascending[: gone[blocks.index]].tolist())
