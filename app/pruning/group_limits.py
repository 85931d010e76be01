"""How far each group of channels may be pruned: the fewest classes that stay, and how many are removed at once.

Widths stay multiples of `round_to` channels: the first block that is removed is the width modulo `round_to`. A group
that is not wider than `round_to` is not touched. Where `round_to` is not stated each group has its own: 16, halved until the group
has three steps, because kernels work on blocks of 8 or 16 channels and a width between two costs as much as the larger.
A group keeps at least `max(min_channels, ceil((1 - max_sparsity) * width))` channels, whatever its scores are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.network.cost import CostMeasure
from app.network.graph import Graph
from app.pruning.channel_classes import Classes, Group, channel_classes
from app.spec.prune import Prune, PruneOverride
from app.validation.faults import counted

BLOCKS = (16, 8, 4, 2, 1)  # channels that widths may be multiples of, where nothing else is said
STEPS = 3  # that a group has at least between its width and nothing
HEAVIEST = 3  # layers that an unreachable budget names

_TIED = "tied to {}, which is excluded"
_NOT_MEASURED = "another group is measured"


@dataclass(frozen=True)
class GroupLimits:
    """How far one group may be pruned, in classes: `width_at_start`, the fewest that stay, how many are removed together.

    `sparsity` is its own, where an override states one; `held` says why nothing is removed, or is None; `stated` says
    that the multiple which its width is to be was asked for.
    """

    group: Group
    width_at_start: int
    least: int
    together: int
    sparsity: float | None
    held: str | None
    stated: bool = False

    @property
    def channels_at_start(self) -> int:
        """Channels that the group had before the first stage of the step."""
        return self.width_at_start * self.group.channels

    @property
    def channels(self) -> int:
        """Channels that the group has now."""
        return len(self.group.classes) * self.group.channels

    def weakest(self, scores: Mapping[int, float], part: float) -> list[int]:
        """The classes that leave so that the part of the group that is gone is nearest to `part`; rather fewer than more.

        What `choose_removals` takes of this group for a `sparsity` of scope `layer`.

        Args:
            scores: By class: the lowest leave first.
            part: Of its width at the start, in [0, 1].
        """
        ascending = sorted(self.group.classes.tolist(), key=lambda c: scores[c])
        width = len(ascending)
        wanted = round(part * self.width_at_start) - (self.width_at_start - width)
        first = width % self.together or self.together
        ends = (0, *range(first, width - self.least + 1, self.together))
        return ascending[: min(ends, key=lambda end: abs(end - wanted))]


def group_limits(
    graph: Graph, classes: Classes, step: Prune, start: Graph, block: int = BLOCKS[0]
) -> list[GroupLimits]:
    """The limits of every group, by its index.

    Args:
        graph: The network as it is now.
        classes: Of `graph`.
        step: A prune step of structure channels.
        start: The graph before the first stage of the step: floors refer to its widths.
        block: The largest block of channels, where `round_to` is not stated.
    """
    widths = {} if start is graph else _widths_by_key(channel_classes(start))
    excluded = {name: set(classes.slots[name].ids.tolist()) for name in step.exclude}
    overridden = {name: set(classes.slots[name].ids.tolist()) for name in step.overrides}
    found = []
    for group in classes.groups:
        one = int(group.classes[0])  # classes of a group are pinned, excluded and overridden together
        overrides = [step.overrides[name] for name, ids in overridden.items() if one in ids]
        width = widths.get(classes.key(group), len(group.classes)) if widths else len(group.classes)
        rounded = [o.round_to for o in overrides if o.round_to is not None]
        round_to = step.round_to or _largest_block(width * group.channels, block)
        together = _in_classes(math.lcm(*rounded) if rounded else round_to, group)
        least = min(len(group.classes), _least(step, overrides, group, width))
        own = [o.sparsity for o in overrides if o.sparsity is not None]
        held = classes.pins.get(one) or _why_excluded(excluded, one) or _why_too_narrow(group, least, together)
        stated = bool(rounded or step.round_to)
        found.append(GroupLimits(group, width, least, together, min(own) if own else None, held, stated))
    return found


def in_finer_blocks(limits: GroupLimits, block: int) -> GroupLimits:
    """The limits with blocks of at most `block` channels, where nothing is stated."""
    if limits.stated:
        return limits
    together = _in_classes(_largest_block(limits.channels_at_start, block), limits.group)
    return limits if together >= limits.together else replace(limits, together=together)


def hold_others(limits: Sequence[GroupLimits], only: int) -> list[GroupLimits]:
    """The limits with which only the group of index `only` may be pruned."""
    return [each if each.group.index == only else replace(each, held=each.held or _NOT_MEASURED) for each in limits]


def prunable_groups(graph: Graph, classes: Classes, step: Prune, *, shared: bool = False) -> list[Group]:
    """The groups from which `step` may take channels; `shared`: but for those whose part an override states."""
    return [each.group for each in free_limits(graph, classes, step, shared=shared)]


def free_limits(graph: Graph, classes: Classes, step: Prune, *, shared: bool = False) -> list[GroupLimits]:
    """The limits of `prunable_groups`, before the first stage of the step."""
    limits = group_limits(graph, classes, step, graph)
    return [each for each in limits if each.held is None and not (shared and each.sparsity is not None)]


def why_kept(graph: Graph, classes: Classes, step: Prune, block: int = BLOCKS[0]) -> dict[str, str]:
    """For each convolution and linear layer that `step` cannot make narrower, the reason as a phrase."""
    limits = group_limits(graph, classes, step, graph, block)
    reasons: dict[str, str] = {}
    for layer, found in _limits_of_layers(classes, limits).items():
        held = [each.held for each in found if each.held is not None]
        if len(held) == len(found):
            reasons |= {place.name: _for_layer(place.name, held[0]) for place in graph.places(layer)}
    return reasons


def held_layers(classes: Classes, limits: Sequence[GroupLimits]) -> list[str]:
    """One phrase for each group whose layers keep all their channels, named by the first of them."""
    phrases = []
    for each in limits:
        layers = classes.layers_of(each.group)
        if each.held is not None and layers:
            phrases.append(f"{layers[0]} ({_for_layer(layers[0], each.held)})")
    return phrases


def heaviest_layers(
    smallest: Graph, graph: Graph, classes: Classes, limits: Sequence[GroupLimits], measure: CostMeasure
) -> list[str]:
    """One phrase for each of the three layers that cost most in the smallest network, with what keeps them as they are."""
    costs = {node.name: node.macs if measure == "macs" else node.params for node in smallest.nodes}
    whole = max(1, sum(costs.values()))
    limits_of = _limits_of_layers(classes, limits)
    phrases = []
    for name in sorted(costs, key=lambda name: -costs[name])[:HEAVIEST]:
        home = graph[name].home
        if costs[name] and home in limits_of:
            held = next((_for_layer(name, each.held) for each in limits_of[home] if each.held is not None), None)
            stay = f"{smallest[name].shape[0]} of {graph[name].shape[0]} channels stay"
            phrases.append(f"{name} has {costs[name] / whole:.0%} of it ({held or stay})")
    return phrases


def _widths_by_key(classes: Classes) -> dict[frozenset[tuple[str, str, int]], int]:
    return {classes.key(group): len(group.classes) for group in classes.groups}


def _largest_block(channels: int, largest: int) -> int:
    """The largest block that fits a group of so many channels."""
    return next((block for block in BLOCKS if block <= largest and STEPS * block <= channels), 1)


def _in_classes(round_to: int, group: Group) -> int:
    """How many classes are removed together so that the width stays a multiple of `round_to` channels."""
    return round_to // math.gcd(round_to, group.channels)


def _least(step: Prune, overrides: Sequence[PruneOverride], group: Group, width: int) -> int:
    """The fewest classes that stay of a group that had `width` when pruning started; the strictest override counts."""
    min_channels = max([o.min_channels for o in overrides if o.min_channels is not None], default=step.min_channels)
    max_sparsity = min([o.max_sparsity for o in overrides if o.max_sparsity is not None], default=step.max_sparsity)
    share = math.ceil((1 - max_sparsity) * width - 1e-9)  # (1 - 0.7) * 10 is 3.0000000000000004
    return max(1, share, -(-min_channels // group.channels))


def _why_excluded(excluded: Mapping[str, set[int]], one: int) -> str | None:
    return next((_TIED.format(name) for name, ids in excluded.items() if one in ids), None)


def _why_too_narrow(group: Group, least: int, together: int) -> str | None:
    width = len(group.classes)
    if together > 1 and width <= together:
        return f"{counted(width * group.channels, 'channel')}, and round_to is {together * group.channels}"
    if width - (width % together or together) < least:
        return f"{counted(width * group.channels, 'channel')}, and at least {least * group.channels} must stay"
    return None


def _for_layer(layer: str, held: str) -> str:
    """Why a group is held, said of one of its layers."""
    return "excluded" if held == _TIED.format(layer) else held


def _limits_of_layers(classes: Classes, limits: Sequence[GroupLimits]) -> dict[str, list[GroupLimits]]:
    """For each layer with weights, the limits of the groups of its output channels."""
    found: dict[str, list[GroupLimits]] = {}
    for each in limits:
        for layer in classes.layers_of(each.group):
            found.setdefault(layer, []).append(each)
    return found
