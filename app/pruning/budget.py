"""Which channels a step removes, so that the network lands on its budget.

    removals = choose_removals(graph, classes, scores, step)            # scores None: the dry run's equal shares
    smaller = shrink_graph(graph, removals.dropped)                     # costs exactly removals.cost

Channels leave in *blocks*: in each group the weakest classes first, so many at a time and so many at most as its limits
say (`group_limits.py`). All groups together have one order of blocks:

- scope `layer`: by the part of its group that is gone with it, so that all groups keep the same fraction;
- scope `sensitivity`: by the rise of the loss when the group alone is cut as far, as the worker has measured it in this
  very step (`Curve`; the job of kind sensitivity, which only draws such curves for its user, is `spec/sensitivity.py`);
- scope `learned`: by score, which is the gate that the worker has learned for each class in this very step;
- scope `global`: by score, each divided by the mean of its group, because raw sums grow with fan-in and with the number
  of tied layers (`taylor` is in units of the loss and `lamp` relative to its group already: they rank raw).

A budget takes blocks from this order until the exact cost is within it, and then gives back, strongest first, each
whose return the budget allows: the result is met from below, and no block of it can be given back. A `sparsity`
takes the number of channels that is nearest to that part of each group (scope `layer`) or of all groups (`global`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from app.network.cost import Cost, CostMeasure, cost
from app.network.graph import Graph
from app.pruning.channel_classes import Classes, Group, channel_classes, shrink_graph
from app.pruning.channel_rules import FloatArray, IntArray
from app.pruning.group_limits import (
    BLOCKS,
    GroupLimits,
    group_limits,
    heaviest_layers,
    held_layers,
    hold_others,
    prunable_groups,
)
from app.pruning.incremental_cost import ChannelBlock, IncrementalCost
from app.pruning.sparsity_allocation import sparsity_after
from app.spec.prune import Prune

COMPARABLE = ("taylor", "lamp")  # criteria whose scores can be compared between groups as they are
CLOSE_ENOUGH = 0.9  # of what is asked for
SHARE_OF_TIES = 1e-6  # of the part gone, where removals cost the same


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

    `floor` is the cost with every group at its smallest width, `floor_dropped` the classes that leave then.
    """

    dropped: frozenset[int]
    cost: Cost
    floor: Cost
    floor_dropped: frozenset[int]


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
) -> Removals:
    """The classes of `graph` that leave so that it meets the budget or sparsity of `step`.

    Args:
        graph: The network as it is now.
        classes: Of `graph`, with the ties of `start`.
        scores: Importance of every class that is not pinned: the lowest leave first. None: equal shares, whatever the
            scope.
        step: What is asked for; a prune step of structure channels.
        start: The graph before the first stage of this step (default: `graph`). Floors and `sparsity` refer to its
            widths.
        baseline: The cost to which fractions of a budget refer (default: that of `start`).
        fraction: How far to go, in (0, 1]: stages of equal length keep the same part of what the one before left.
        only: Index of the one group that may be touched (default: all).
        losses: Scope `sensitivity`: for each group that may leave, what its removal costs. None: equal shares.
        block: Where `round_to` is not stated: the largest block of channels, as `choose_block` finds it.

    Raises:
        BudgetUnreachable: The budget is below the floor, or nothing may be removed at all.
    """
    limits = group_limits(graph, classes, step, start or graph, block)
    if only is not None:
        limits = hold_others(limits, only)
    cost_model = IncrementalCost(graph, classes)
    forced, order = _blocks_in_order(limits, scores, step, cost_model, fraction, losses)
    for channel_block in [*forced, *order]:
        cost_model.remove(channel_block)
    floor, everything = cost_model.cost(), _classes_of([*forced, *order])
    cost_model.note_floor()
    for channel_block in order:
        cost_model.give_back(channel_block)

    if step.budget is not None:
        dense = baseline or cost(start or graph)
        measure, allowed = _counted_measure(step), allowed_cost(step, dense, fraction)
        if floor.of(measure) > allowed:
            smallest = shrink_graph(graph, everything, classes)
            holds = heaviest_layers(smallest, graph, classes, limits, measure)
            raise BudgetUnreachable(measure, allowed, floor.of(measure), dense.of(measure), holds)
        removed = _remove_within(cost_model, order, measure, allowed)
    else:
        if not everything and (start is None or start == graph):  # later stages may find all of it done
            raise BudgetUnreachable(None, None, None, None, held_layers(classes, limits))
        removed = _blocks_of_sparsity(limits, order, step, fraction, ranked=scores is not None)
        for channel_block in removed:
            cost_model.remove(channel_block)
    return Removals(_classes_of([*forced, *removed]), cost_model.cost(), floor, everything)


def choose_block(graph: Graph, classes: Classes, step: Prune, *, baseline: Cost | None = None) -> tuple[int, Removals]:
    """(the largest block of channels, what leaves with equal shares).

    Where `round_to` is not stated it is the first of 16, 8, 4, 2, 1 with which the removal comes within a tenth of what
    is asked for, else the one that comes nearest: a network of few or narrow layers may have no budget between blocks.

    Raises:
        BudgetUnreachable: As `choose_removals` does; with blocks of 1 where `round_to` is not stated.
    """
    found: list[tuple[float, int, Removals]] = []
    for block in BLOCKS if step.round_to is None else BLOCKS[:1]:
        try:
            removals = choose_removals(graph, classes, None, step, baseline=baseline, block=block)
        except BudgetUnreachable:
            if not found and (step.round_to is not None or block == BLOCKS[-1]):
                raise
            continue
        found.append((_share_reached(graph, classes, step, removals, baseline or cost(graph)), block, removals))
        if found[-1][0] >= CLOSE_ENOUGH:
            break
    _, block, removals = max(found, key=lambda entry: entry[0])  # the first of equals
    return block, removals


def choose_removals_in_blocks(
    graph: Graph,
    classes: Classes,
    scores: Mapping[int, float],
    step: Prune,
    *,
    start: Graph,
    baseline: Cost,
    fraction: float,
    losses: Mapping[int, Curve] | None = None,
) -> Removals:
    """What `choose_removals` gives with the block that suits the step: in a stage of it, with the scores of the worker.

    First the block that `choose_block` finds for `start`. Shares that are not equal may miss the budget in blocks with
    which equal ones come near it: then blocks are halved until nine tenths of it are used, and of all removals the one
    counts that leaves most multiply-accumulates.

    Raises:
        BudgetUnreachable: As `choose_removals` and `choose_block` do.
    """

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
        )

    block, _ = choose_block(start, channel_classes(start), step, baseline=baseline)
    removals = choose(block)
    if step.budget is None or step.round_to is not None:
        return removals
    while block > 1 and _share_of_budget(removals, graph, step, baseline, fraction) < CLOSE_ENOUGH:
        block //= 2
        removals = max(removals, choose(block), key=lambda found: found.cost.macs)
    return removals


def allowed_cost(step: Prune, dense: Cost, fraction: float) -> int:
    """The largest cost after the part `fraction` of the way: geometric between the baseline and the budget."""
    assert step.budget is not None
    whole = dense.of(_counted_measure(step))
    target = step.budget.allowed(whole)
    return target if fraction >= 1 or target >= whole else int(whole * (target / whole) ** fraction)


def _counted_measure(step: Prune) -> CostMeasure:
    """The cost that the budget of `step` bounds."""
    assert step.budget is not None
    assert step.budget.measure != "latency_ms", "a latency is measured, not counted"
    return step.budget.measure


def _share_reached(graph: Graph, classes: Classes, step: Prune, removals: Removals, dense: Cost) -> float:
    """How near the removal comes: of a budget the part that is used, of a sparsity the part of it that leaves."""
    if step.budget is not None:
        return _share_of_budget(removals, graph, step, dense, 1.0)
    assert step.sparsity is not None
    asked = gone = 0.0
    for group in prunable_groups(graph, classes, step.model_copy(update={"round_to": 1})):
        asked += step.sparsity * len(group.classes) * group.channels
        gone += len(removals.dropped.intersection(group.classes.tolist())) * group.channels
    return min(gone, asked) / max(gone, asked, 1.0)


def _share_of_budget(removals: Removals, graph: Graph, step: Prune, dense: Cost, fraction: float) -> float:
    """The part that is used of what the budget allows, or of the network where the budget allows more than that."""
    measure = _counted_measure(step)
    most = min(allowed_cost(step, dense, fraction), cost(graph).of(measure))
    return removals.cost.of(measure) / max(1, most)


# the order in which blocks leave


def _blocks_in_order(
    limits: Sequence[GroupLimits],
    scores: Mapping[int, float] | None,
    step: Prune,
    cost_model: IncrementalCost,
    fraction: float,
    losses: Mapping[int, Curve] | None,
) -> tuple[list[ChannelBlock], list[ChannelBlock]]:
    """(blocks that an override demands, all others in the order in which they leave)."""
    forced: list[ChannelBlock] = []
    ranked: list[tuple[float, int, int, ChannelBlock]] = []
    for each in limits:
        if each.held is not None:
            continue
        group = each.group
        values = _values_of(group, scores)
        ascending = group.classes if values is None else group.classes[np.argsort(values, kind="stable")]
        parts = _parts(ascending, each)
        channel_blocks = cost_model.channel_blocks(group, parts)
        if each.sparsity is not None:
            forced += _nearest(channel_blocks, _wanted(each, sparsity_after(each.sparsity, fraction)))
            continue
        if values is None or step.scope not in ("global", "learned"):
            curve = losses[group.index] if step.scope == "sensitivity" and losses is not None else None
            ranks = _ranks_by_share(parts, each, curve)
        else:
            raw = step.scope == "learned" or step.criterion in COMPARABLE
            ranks = _ranks_by_score(parts, values, normalised=not raw)
        ranked += [
            (rank, group.index, place, found)
            for place, (rank, found) in enumerate(zip(ranks, channel_blocks, strict=True))
        ]
    ranked.sort(key=lambda entry: entry[:3])
    return forced, [channel_block for *_, channel_block in ranked]


def _values_of(group: Group, scores: Mapping[int, float] | None) -> FloatArray | None:
    """The scores of the group's classes, in their order; None where there are none."""
    if scores is None:
        return None
    values = np.array([scores[c] for c in group.classes.tolist()], dtype=np.float64)
    assert np.isfinite(values).all(), "scores are finite: NaN has no place in an order"
    return values


def _parts(ascending: IntArray, limits: GroupLimits) -> list[IntArray]:
    """The blocks of a group as its classes, weakest first."""
    width, together = len(ascending), limits.together
    ends, end = [0], width % together or together
    while width - end >= limits.least:
        ends.append(end)
        end += together
    return [ascending[a:b] for a, b in pairwise(ends)]


def _ranks_by_share(parts: Sequence[IntArray], limits: GroupLimits, curve: Curve | None) -> list[float]:
    """The part of the group that is gone with each block; on a curve the rise of the loss, the part only in ties."""
    now, gone = len(limits.group.classes), np.cumsum([len(part) for part in parts])
    share = (gone + limits.width_at_start - now) / limits.width_at_start
    if curve is not None:
        share = curve.at(1 - gone / now) + SHARE_OF_TIES * share
    ranks: list[float] = share.tolist()
    return ranks


def _ranks_by_score(parts: Sequence[IntArray], values: FloatArray, *, normalised: bool) -> list[float]:
    """The mean score of each block; never below the one before, so that a group's blocks keep their order."""
    mean = float(values.mean())
    scale = 1 / mean if normalised and mean > 0 else 1.0
    ascending = np.sort(values) * scale
    ends = np.cumsum([0, *(len(part) for part in parts)])
    means = [ascending[a:b].mean() for a, b in pairwise(ends)]
    return np.maximum.accumulate(means).tolist() if means else []


# how many of them leave


def _remove_within(
    cost_model: IncrementalCost, order: Sequence[ChannelBlock], measure: CostMeasure, allowed: int
) -> list[ChannelBlock]:
    """Remove blocks from `cost_model` until its cost is at most `allowed`, which can be reached; the blocks.

    The cost falls with every block, so the first prefix that fits is the one a bisection would find. Then each
    block may return, strongest first, while all stronger ones of its group have: what is refused once never fits
    later, when more has returned.
    """
    removed: list[ChannelBlock] = []
    for channel_block in order:
        if cost_model.fits(measure, allowed):
            break
        cost_model.remove(channel_block)
        removed.append(channel_block)
    stays: set[int] = set()
    kept: list[ChannelBlock] = []
    for channel_block in reversed(removed):
        if channel_block.group not in stays:
            cost_model.give_back(channel_block)
            if cost_model.fits(measure, allowed):
                continue
            cost_model.remove(channel_block)
            stays.add(channel_block.group)
        kept.append(channel_block)
    kept.reverse()
    return kept


def _blocks_of_sparsity(
    limits: Sequence[GroupLimits], order: Sequence[ChannelBlock], step: Prune, fraction: float, *, ranked: bool
) -> list[ChannelBlock]:
    """The blocks with which the part of the channels that is gone comes nearest to the sparsity of `step`."""
    assert step.sparsity is not None, "a prune step of channels has a budget or a sparsity"
    part = sparsity_after(step.sparsity, fraction)
    if step.scope == "global" and ranked:
        return _nearest_of_all(limits, order, part)
    return _nearest_of_each(limits, order, part)


def _nearest_of_each(limits: Sequence[GroupLimits], order: Sequence[ChannelBlock], part: float) -> list[ChannelBlock]:
    by_group: dict[int, list[ChannelBlock]] = {}
    for channel_block in order:
        by_group.setdefault(channel_block.group, []).append(channel_block)
    nearest = (_nearest(blocks, _wanted(limits[group], part)) for group, blocks in by_group.items())
    return [channel_block for blocks in nearest for channel_block in blocks]


def _nearest_of_all(limits: Sequence[GroupLimits], order: Sequence[ChannelBlock], part: float) -> list[ChannelBlock]:
    free = [each for each in limits if each.held is None and each.sparsity is None]
    at_start = sum(each.channels_at_start for each in free)
    now = sum(each.channels for each in free)
    return _nearest(order, round(part * at_start) - (at_start - now))


def _nearest(channel_blocks: Sequence[ChannelBlock], wanted: int) -> list[ChannelBlock]:
    """The first of the blocks, so many that the channels they take are nearest to `wanted`; rather fewer than more."""
    best, gone, count = abs(wanted), 0, 0
    for place, channel_block in enumerate(channel_blocks, start=1):
        gone += channel_block.channels
        if abs(gone - wanted) < best:
            best, count = abs(gone - wanted), place
    return list(channel_blocks[:count])


def _wanted(limits: GroupLimits, part: float) -> int:
    """How many channels leave now so that `part` of those at the start is gone (half to even)."""
    width = limits.width_at_start
    return (round(part * width) - (width - len(limits.group.classes))) * limits.group.channels


def _classes_of(channel_blocks: Sequence[ChannelBlock]) -> frozenset[int]:
    return frozenset(c for channel_block in channel_blocks for c in channel_block.classes)
