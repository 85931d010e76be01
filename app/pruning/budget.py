"""Which channels leave, so that the network lands on its budget.

    removals = choose_removals(graph, classes, scores, step)            # scores None: the dry run's equal shares
    smaller = shrink_graph(graph, removals.dropped)                     # costs exactly removals.cost

Channels leave in *quanta*: in each group the weakest classes first, so many at a time that the width lands on a
multiple of `round_to` (the first quantum is the width modulo `round_to`); groups that are not wider than `round_to`
are left alone. Where it is not stated each group has its own: 16, halved until the group has three steps, because
kernels work on blocks of 8 or 16 channels and a width between two costs as much as the larger. A group keeps at least
`max(min_channels, ceil((1 - max_sparsity) * width))` channels, whatever its scores are. What is left is one order of quanta:

- scope `layer`: by the part of its group that is gone with it, so that all groups keep the same fraction;
- scope `sensitivity`: by the rise of the loss when the group alone is cut as far, as measured (`losses`);
- scope `global`: by score, each divided by the mean of its group, because raw sums grow with fan-in and with the number
  of tied layers (`taylor` is in units of the loss and `lamp` relative to its group already: they rank raw).

A budget takes quanta from this order until the exact cost is within it, and then gives back, strongest first, each
whose return the budget allows: the result is met from below, and no quantum of it can be given back. A `sparsity`
takes the number of channels that is nearest to that part of each group (scope `layer`) or of all groups (`global`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from app.network.cost import Cost, CostMeasure, cost
from app.network.graph import Graph
from app.pruning.channel_classes import Classes, Group, channel_classes, shrink_graph
from app.pruning.channel_rules import FloatArray, IntArray
from app.pruning.incremental_cost import ChannelBlock, IncrementalCost
from app.spec.prune import Prune, PruneOverride
from app.validation.faults import counted

COMPARABLE = ("taylor", "lamp")  # criteria whose scores can be compared between groups as they are


BLOCKS = (16, 8, 4, 2, 1)  # channels that widths may be multiples of, where nothing else is said
STEPS = 3  # that a group has at least between its width and nothing
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


@dataclass(frozen=True)
class _GroupLimits:
    """How far one group may be pruned, in classes: `width_at_start`, the fewest that stay, how many leave together.

    `sparsity` is its own, where an override states one; `held` says why nothing leaves, or is None.
    """

    group: Group
    width_at_start: int
    least: int
    together: int
    sparsity: float | None
    held: str | None


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
    rooms = _rooms(graph, classes, step, start or graph, block)
    if only is not None:
        rooms = [
            room if room.group.index == only else replace(room, held=room.held or _NOT_LOOKED_AT) for room in rooms
        ]
    dense = baseline or cost(start or graph)
    cost_model = IncrementalCost(graph, classes)
    forced, order = _order(rooms, scores, step, cost_model, fraction, losses)
    for channel_block in [*forced, *order]:
        cost_model.remove(channel_block)
    floor, everything = cost_model.cost(), _classes_of([*forced, *order])
    cost_model.settle()
    for channel_block in order:
        cost_model.give_back(channel_block)

    if step.budget is not None:
        assert step.budget.measure != "latency_ms", "a latency is measured, not counted"
        measure, allowed = step.budget.measure, allowed_cost(step, dense, fraction)
        least = int(getattr(floor, measure))
        if least > allowed:
            holds = _heaviest(shrink_graph(graph, everything, classes), graph, classes, rooms, measure)
            raise BudgetUnreachable(measure, allowed, least, int(getattr(dense, measure)), holds)
        removed = _within(cost_model, order, measure, allowed)
    else:
        assert step.sparsity is not None, "a prune step of channels has a budget or a sparsity"
        if not everything and (start is None or start == graph):  # later stages may find all of it done
            raise BudgetUnreachable(None, None, None, None, _held(classes, rooms))
        part = _on_the_way(step.sparsity, fraction)
        together = step.scope == "global" and scores is not None
        removed = _nearest_of_all(rooms, order, part) if together else _nearest_of_each(rooms, order, part)
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


def _share_reached(graph: Graph, classes: Classes, step: Prune, removals: Removals, dense: Cost) -> float:
    """How near the removal comes: of a budget the part that is used, of a sparsity the part of it that leaves."""
    if step.budget is not None:
        allowed = allowed_cost(step, dense, 1.0)
        unpruned = int(getattr(cost(graph), step.budget.measure))
        return int(getattr(removals.cost, step.budget.measure)) / max(1, min(allowed, unpruned))
    assert step.sparsity is not None
    asked = gone = 0.0
    for group in prunable_groups(graph, classes, step.model_copy(update={"round_to": 1})):
        asked += step.sparsity * len(group.classes) * group.channels
        gone += len(removals.dropped.intersection(group.classes.tolist())) * group.channels
    return min(gone, asked) / max(gone, asked, 1.0)


def prunable_groups(graph: Graph, classes: Classes, step: Prune, *, shared: bool = False) -> list[Group]:
    """The groups from which `step` may take channels; `shared`: but for those whose part an override states."""
    rooms = _rooms(graph, classes, step, graph)
    return [room.group for room in rooms if room.held is None and not (shared and room.sparsity is not None)]


def why_kept(graph: Graph, classes: Classes, step: Prune, block: int = BLOCKS[0]) -> dict[str, str]:
    """For each convolution and linear layer that `step` cannot make narrower, the reason as a phrase."""
    rooms = _rooms(graph, classes, step, graph, block)
    reasons: dict[str, str] = {}
    for layer, found in _rooms_of_layers(classes, rooms).items():
        held = [room.held for room in found if room.held is not None]
        if len(held) == len(found):
            reasons |= {place.name: _for_layer(place.name, held[0]) for place in graph.places(layer)}
    return reasons


def allowed_cost(step: Prune, dense: Cost, fraction: float) -> int:
    """The largest cost after the part `fraction` of the way: geometric between the baseline and the budget."""
    assert step.budget is not None
    whole = int(getattr(dense, step.budget.measure))
    target = step.budget.allowed(whole)
    return target if fraction >= 1 or target >= whole else int(whole * (target / whole) ** fraction)


def _on_the_way(sparsity: float, fraction: float) -> float:
    """The part that is gone after `fraction` of the way: each stage keeps the same part of what the one before left."""
    return sparsity if fraction >= 1 else 1 - (1 - sparsity) ** fraction  # 1 - (1 - 0.3) is not 0.3


# rooms: how far each group may go


def _rooms(graph: Graph, classes: Classes, step: Prune, start: Graph, block: int = BLOCKS[0]) -> list[_GroupLimits]:
    before = classes if start is graph else channel_classes(start)
    widths = {before.key(group): len(group.classes) for group in before.groups}
    excluded = {name: set(classes.slots[name].ids.tolist()) for name in step.exclude}
    overridden = {name: set(classes.slots[name].ids.tolist()) for name in step.overrides}
    rooms = []
    for group in classes.groups:
        one = int(group.classes[0])  # classes of a group are pinned, excluded and overridden together
        overrides = [step.overrides[name] for name, ids in overridden.items() if one in ids]
        width = widths.get(classes.key(group), len(group.classes))
        rounded = [o.round_to for o in overrides if o.round_to is not None]
        round_to = step.round_to or _block(width * group.channels, block)
        together = _in_classes(math.lcm(*rounded) if rounded else round_to, group)
        least = min(len(group.classes), _least(step, overrides, group, width))
        own = [o.sparsity for o in overrides if o.sparsity is not None]
        held = classes.pins.get(one) or _excluded(excluded, one) or _too_narrow(group, least, together)
        rooms.append(_GroupLimits(group, width, least, together, min(own) if own else None, held))
    return rooms


def _block(channels: int, largest: int) -> int:
    """The largest block that a group of so many channels leaves in."""
    return next((block for block in BLOCKS if block <= largest and STEPS * block <= channels), 1)


def _in_classes(round_to: int, group: Group) -> int:
    """How many classes leave together so that the width stays a multiple of `round_to` channels."""
    return round_to // math.gcd(round_to, group.channels)


def _least(step: Prune, overrides: Sequence[PruneOverride], group: Group, width: int) -> int:
    """The fewest classes that stay of a group that had `width` when pruning started; the strictest override counts."""
    min_channels = max([o.min_channels for o in overrides if o.min_channels is not None], default=step.min_channels)
    max_sparsity = min([o.max_sparsity for o in overrides if o.max_sparsity is not None], default=step.max_sparsity)
    share = math.ceil((1 - max_sparsity) * width - 1e-9)  # (1 - 0.7) * 10 is 3.0000000000000004
    return max(1, share, -(-min_channels // group.channels))


def _excluded(excluded: Mapping[str, set[int]], one: int) -> str | None:
    for name, ids in excluded.items():
        if one in ids:
            return _TIED.format(name)
    return None


_TIED = "tied to {}, which is excluded"
_NOT_LOOKED_AT = "another group is looked at"


def _for_layer(layer: str, held: str) -> str:
    """Why a group is held, said of one of its layers."""
    return "excluded" if held == _TIED.format(layer) else held


def _too_narrow(group: Group, least: int, together: int) -> str | None:
    width = len(group.classes)
    if together > 1 and width <= together:
        return f"{counted(width * group.channels, 'channel')}, and round_to is {together * group.channels}"
    if width - (width % together or together) < least:
        return f"{counted(width * group.channels, 'channel')}, and at least {least * group.channels} must stay"
    return None


def _held(classes: Classes, rooms: Sequence[_GroupLimits]) -> list[str]:
    """One phrase for each layer that keeps all its channels."""
    phrases = []
    for room in rooms:
        layers = classes.layers_of(room.group)
        if room.held is not None and layers:
            phrases.append(f"{layers[0]} ({_for_layer(layers[0], room.held)})")
    return phrases


def _rooms_of_layers(classes: Classes, rooms: Sequence[_GroupLimits]) -> dict[str, list[_GroupLimits]]:
    """For each layer with weights, the rooms of its output channels."""
    found: dict[str, list[_GroupLimits]] = {}
    for room in rooms:
        for layer in classes.layers_of(room.group):
            found.setdefault(layer, []).append(room)
    return found


def _heaviest(
    smallest: Graph, graph: Graph, classes: Classes, rooms: Sequence[_GroupLimits], measure: CostMeasure
) -> list[str]:
    """The three layers that cost most in the smallest network, with what keeps them as they are."""
    costs = {node.name: node.macs if measure == "macs" else node.params for node in smallest.nodes}
    whole = max(1, sum(costs.values()))
    rooms_of = _rooms_of_layers(classes, rooms)
    phrases = []
    for name in sorted(costs, key=lambda name: -costs[name])[:3]:
        home = graph[name].home
        if costs[name] and home in rooms_of:
            held = next((_for_layer(name, room.held) for room in rooms_of[home] if room.held is not None), None)
            stay = f"{smallest[name].shape[0]} of {graph[name].shape[0]} channels stay"
            phrases.append(f"{name} has {costs[name] / whole:.0%} of it ({held or stay})")
    return phrases


# the order in which quanta leave


def _order(
    rooms: Sequence[_GroupLimits],
    scores: Mapping[int, float] | None,
    step: Prune,
    cost_model: IncrementalCost,
    fraction: float,
    losses: Mapping[int, Curve] | None,
) -> tuple[list[ChannelBlock], list[ChannelBlock]]:
    """(quanta that an override demands, all others in the order in which they leave)."""
    forced: list[ChannelBlock] = []
    ranked: list[tuple[float, int, int, ChannelBlock]] = []
    for room in rooms:
        if room.held is not None:
            continue
        group = room.group
        values = np.array([scores[c] for c in group.classes.tolist()], dtype=np.float64) if scores is not None else None
        assert values is None or np.isfinite(values).all(), "NaN is neither weak nor strong"
        ascending = group.classes if values is None else group.classes[np.argsort(values, kind="stable")]
        parts = _parts(ascending, room)
        channel_blocks = cost_model.channel_blocks(group, parts)
        if room.sparsity is not None:
            forced += _nearest(channel_blocks, _wanted(room, _on_the_way(room.sparsity, fraction)))
            continue
        if values is None or step.scope != "global":
            gone = np.cumsum([len(part) for part in parts]) + room.width_at_start - len(group.classes)
            share = gone / room.width_at_start
            if step.scope == "sensitivity" and losses is not None:
                left = 1 - np.cumsum([len(part) for part in parts]) / len(group.classes)
                share = losses[group.index].at(left) + SHARE_OF_TIES * share
            ranks = share.tolist()
        else:
            ranks = _scores_of(parts, group, values, normalised=step.criterion not in COMPARABLE)
        ranked += [
            (rank, group.index, place, q) for place, (rank, q) in enumerate(zip(ranks, channel_blocks, strict=True))
        ]
    ranked.sort(key=lambda entry: entry[:3])
    return forced, [channel_block for *_, channel_block in ranked]


def _parts(ascending: IntArray, room: _GroupLimits) -> list[IntArray]:
    """The quanta of a group as its classes, weakest first."""
    width, together = len(ascending), room.together
    ends, end = [0], width % together or together
    while width - end >= room.least:
        ends.append(end)
        end += together
    return [ascending[a:b] for a, b in pairwise(ends)]


def _scores_of(parts: Sequence[IntArray], group: Group, values: FloatArray, *, normalised: bool) -> list[float]:
    """The mean score of each quantum; never below the one before, so that a group's quanta keep their order."""
    mean = float(values.mean())
    scale = 1 / mean if normalised and mean > 0 else 1.0
    ascending = np.sort(values) * scale
    ends = np.cumsum([0, *(len(part) for part in parts)])
    means = [ascending[a:b].mean() for a, b in pairwise(ends)]
    return np.maximum.accumulate(means).tolist() if means else []


# how many of them leave


def _within(
    cost_model: IncrementalCost, order: Sequence[ChannelBlock], measure: CostMeasure, allowed: int
) -> list[ChannelBlock]:
    """The quanta that leave for a cost of at most `allowed`, which can be reached; `cost_model` is left without them.

    The cost falls with every quantum, so the first prefix that fits is the one a bisection would find. Then each
    quantum may return, strongest first, while all stronger ones of its group have: what is refused once never fits
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


def _wanted(room: _GroupLimits, part: float) -> int:
    """How many channels leave now so that `part` of those at the start is gone (half to even)."""
    width = room.width_at_start
    return (round(part * width) - (width - len(room.group.classes))) * room.group.channels


def _nearest(channel_blocks: Sequence[ChannelBlock], wanted: int) -> list[ChannelBlock]:
    """The first of the quanta, so many that the channels they take are nearest to `wanted`; rather fewer than more."""
    best, gone, count = abs(wanted), 0, 0
    for place, channel_block in enumerate(channel_blocks, start=1):
        gone += channel_block.channels
        if abs(gone - wanted) < best:
            best, count = abs(gone - wanted), place
    return list(channel_blocks[:count])


def _nearest_of_each(rooms: Sequence[_GroupLimits], order: Sequence[ChannelBlock], part: float) -> list[ChannelBlock]:
    by_group: dict[int, list[ChannelBlock]] = {}
    for channel_block in order:
        by_group.setdefault(channel_block.group, []).append(channel_block)
    return [
        q for group, channel_blocks in by_group.items() for q in _nearest(channel_blocks, _wanted(rooms[group], part))
    ]


def _nearest_of_all(rooms: Sequence[_GroupLimits], order: Sequence[ChannelBlock], part: float) -> list[ChannelBlock]:
    free = [room for room in rooms if room.held is None and room.sparsity is None]
    at_start = sum(room.width_at_start * room.group.channels for room in free)
    now = sum(len(room.group.classes) * room.group.channels for room in free)
    return _nearest(order, round(part * at_start) - (at_start - now))


def _classes_of(channel_blocks: Sequence[ChannelBlock]) -> frozenset[int]:
    return frozenset(c for channel_block in channel_blocks for c in channel_block.classes)
