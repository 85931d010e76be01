"""Which ranks the layers of a network get, so that it keeps an energy or meets a budget.

    choice = choose_ranks(graph, step, spectra)          # spectra None: the dry run's, a line for every layer
    smaller = factorize(graph, choice.ranks)             # costs exactly choice.cost

The *lost energy* of a rank is the part of a layer's squared singular values that it drops; of two ranks (inputs and
outputs) the sum, a bound on the part of the squared weights that the product misses (De Lathauwer et al. 2000, SIAM J.
Matrix Anal. Appl. 21, property 10). Chosen ranks are multiples of `round_to`, at least 8 and a tenth of the full rank.

- `rank`: that rank everywhere, as far as it makes a layer cheaper.
- `energy`: the smallest ranks that lose no more than 1 - energy, half of it on either side.
- `budget`: from full ranks on, again and again the cut with the smallest lost energy for what it saves, until the budget
  holds; then cuts go back, the most energy for their cost first, as far as the budget allows: it is met from below, and
  no rank can be one step larger.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from app.spec.budget import BudgetUnreachable
from app.spec.channel_rules import FloatArray
from app.spec.compressions import LowRank
from app.spec.cost import FLOAT_BYTES, Cost, cost, safetensors_bytes
from app.spec.factorization import (
    Factorable,
    Ranks,
    Role,
    factorize,
    low_rank_layers,
    named_parts,
    part_names,
    stored_shapes,
)
from app.spec.graph import Graph
from app.spec.shapes import Shape
from app.spec.tally import Measure

Spectra = Mapping[str, tuple[FloatArray, ...]]
"""Layer -> for each of its ranks the energy lost with rank 0, 1, ... full: 1 at first (or less), 0 at last, falling."""

HEAVIEST = 3  # layers that an unreachable budget names


@dataclass(frozen=True)
class RankChoice:
    """What low rank does to a network.

    `ranks` has the layers that become products; `kept` the reason for every other convolution and linear layer;
    `layers` are all that could become one, `floor` is the cost with each of them at its smallest ranks.
    """

    ranks: dict[str, Ranks]
    kept: dict[str, str]
    layers: dict[str, Factorable]
    cost: Cost
    floor: Cost


def choose_ranks(graph: Graph, step: LowRank, spectra: Spectra | None, *, baseline: Cost | None = None) -> RankChoice:
    """The ranks that `step` asks for.

    Args:
        graph: The network as it is now.
        step: Names in it that the network has not are ignored.
        spectra: Of every layer that can become a product. None: as if the squared singular values fell along a line.
        baseline: The cost to which fractions of a budget refer (default: that of `graph`).

    Raises:
        BudgetUnreachable: The budget is below the cost with the smallest ranks.
    """
    layers, kept = low_rank_layers(graph, only=step.layers, exclude=step.exclude)
    measure = "macs" if step.budget is None else step.budget.measure
    tools = {name: _Cuts(layer, step.round_to, measure, (spectra or {}).get(name)) for name, layer in layers.items()}
    floors = {name: cuts.floor for name, cuts in tools.items()}
    if step.rank is not None:
        wanted = {name: cuts.at_most(step.rank) for name, cuts in tools.items()}
        floors, why = wanted, f"at rank {step.rank} it would cost no less"
    elif step.energy is not None:
        wanted = {name: cuts.with_energy(step.energy) for name, cuts in tools.items()}
        why = f"the ranks that keep {step.energy:g} of its energy cost no less"
    else:
        wanted = _within_budget(graph, step, tools, kept, baseline or cost(graph))
        why = "the budget was met without it"
    ranks: dict[str, Ranks] = {}
    for name, layer in layers.items():
        if wanted[name] != layer.widths:
            ranks[name] = wanted[name]
        elif step.rank is None and floors[name] == layer.widths:
            kept[name] = f"no rank that is a multiple of round_to {step.round_to} makes it cheaper"
        else:
            kept[name] = why
    return RankChoice(ranks, kept, layers, cost(factorize(graph, ranks)), cost(factorize(graph, floors)))


class _Cuts:
    """The ranks of one layer that may be chosen, what they cost in one measure, and what they lose."""

    def __init__(self, layer: Factorable, round_to: int, measure: str, spectra: tuple[FloatArray, ...] | None) -> None:
        self.layer, self._measure = layer, measure
        self._lost = spectra or tuple(_line(width) for width in layer.widths)
        self.full = layer.widths
        self.grids = [layer.grid(mode, round_to) for mode in range(len(self.full))]
        self._places = [{rank: place for place, rank in enumerate(grid)} for grid in self.grids]
        self.floor = layer.floor(round_to, measure)

    def settled(self, ranks: Ranks) -> Ranks:
        """See `Factorable.settled`."""
        return self.layer.settled(ranks, self._measure)

    def costs(self, ranks: Ranks) -> int:
        """Multiply-accumulates, or weights."""
        return self.layer.costs(ranks)[0 if self._measure == "macs" else 1]

    def lost(self, ranks: Ranks) -> float:
        """The energy that these ranks lose."""
        return sum(float(lost[rank]) for lost, rank in zip(self._lost, ranks, strict=True))

    def at_most(self, rank: int) -> Ranks:
        """This rank on every side, or the full one where it is smaller."""
        return self.settled(tuple(min(rank, full) for full in self.full))

    def with_energy(self, energy: float) -> Ranks:
        """The smallest ranks that keep this part of the energy."""
        allowed = (1 - energy) / len(self.full)
        chosen = (
            next(rank for rank in grid if rank == grid[-1] or lost[rank] <= allowed)
            for grid, lost in zip(self.grids, self._lost, strict=True)
        )
        return self.settled(tuple(chosen))

    def lower(self, ranks: Ranks) -> list[Ranks]:
        """The next cheaper ranks: on each side alone; if neither alone saves anything, on both."""
        now, found = self.costs(ranks), []
        for mode, grid in enumerate(self.grids):

            def cut(place: int, mode: int = mode, grid: list[int] = grid) -> Ranks:
                return self.settled((*ranks[:mode], grid[place], *ranks[mode + 1 :]))

            end = self._places[mode][ranks[mode]]
            # the cost never falls where a rank rises, so those that are cheaper come first
            cheaper = bisect_left(range(end), True, key=lambda place: self.costs(cut(place)) >= now)
            if cheaper:
                found.append(cut(cheaper - 1))
        return found or ([self.floor] if self.costs(self.floor) < now else [])

    def higher(self, ranks: Ranks) -> list[Ranks]:
        """The ranks one step above these, on each side alone."""
        found = []
        for mode, grid in enumerate(self.grids):
            place = self._places[mode][ranks[mode]]
            if place + 1 < len(grid):
                found.append(self.settled((*ranks[:mode], grid[place + 1], *ranks[mode + 1 :])))
        return found


def _line(width: int) -> FloatArray:
    """The energy lost with rank 0 to `width`, where squared singular values fall along a line to 0."""
    return np.square(1 - np.arange(width + 1) / width)


def _within_budget(
    graph: Graph, step: LowRank, tools: Mapping[str, _Cuts], kept: Mapping[str, str], baseline: Cost
) -> dict[str, Ranks]:
    assert step.budget is not None
    assert step.budget.measure != "latency_ms", "a latency is measured, not counted"
    search = _Search(graph, tools, step.budget.measure, step.budget.allowed(getattr(baseline, step.budget.measure)))
    floors = {name: cuts.floor for name, cuts in tools.items()}
    if not search.fits(floors, search.total_with(floors)):
        raise search.unreachable(floors, kept, baseline)
    search.cut()
    search.give_back()
    return search.ranks


class _Search:
    """Ranks on their way to a budget. `total` are all MACs, or all weights that are stored."""

    def __init__(self, graph: Graph, tools: Mapping[str, _Cuts], measure: Measure, allowed: int) -> None:
        self._graph, self._tools, self._measure, self._allowed = graph, tools, measure, allowed
        self._dense = {name: cuts.costs(cuts.full) for name, cuts in tools.items()}
        self._whole = _total(graph, measure)
        self.ranks = {name: cuts.full for name, cuts in tools.items()}
        self.total = self._whole

    def total_with(self, ranks: Mapping[str, Ranks]) -> int:
        """`total` of a network with these ranks."""
        return self._whole - sum(self._dense[name] - self._tools[name].costs(own) for name, own in ranks.items())

    def fits(self, ranks: Mapping[str, Ranks], total: int) -> bool:
        """Whether a network with these ranks, whose MACs or stored weights are `total`, is within the budget."""
        if self._measure != "bytes":
            return total <= self._allowed
        # the file's header is written out only where it decides
        if FLOAT_BYTES * total + self._largest_header <= self._allowed:
            return True
        return FLOAT_BYTES * total <= self._allowed and safetensors_bytes(self._shapes(ranks)) <= self._allowed

    @cached_property
    def _largest_header(self) -> int:
        """Bytes of the header where every layer is as many layers, as wide, as its ranks allow."""
        ranks = {name: tuple(max(1, width - 1) for width in cuts.full) for name, cuts in self._tools.items()}
        shapes = self._shapes(ranks)
        return safetensors_bytes(shapes) - FLOAT_BYTES * sum(math.prod(shape) for shape in shapes.values())

    @cached_property
    def _names(self) -> dict[str, dict[Role, str]]:
        return part_names(self._graph)

    def _shapes(self, ranks: Mapping[str, Ranks]) -> dict[str, Shape]:
        """The shapes of the tensors of a network with these ranks, by key."""
        shapes = {key: tensor.shape for key, tensor in self._graph.tensors().items()}
        for name, own in ranks.items():
            layer = self._tools[name].layer
            if own != layer.widths:
                for key in layer.node.tensors:
                    del shapes[f"{name}.{key}"]
                shapes |= stored_shapes(layer, named_parts(layer.parts(own), self._names[name]))
        return shapes

    def cut(self) -> None:
        """Take the cut that loses least for what it saves, until the budget holds or nothing can be cut."""
        waiting: list[tuple[float, str, Ranks, Ranks]] = []
        for name in self._tools:
            self._offer(waiting, name)
        while waiting and not self.fits(self.ranks, self.total):
            _, name, cut, given = heapq.heappop(waiting)
            if given != self.ranks[name]:
                continue  # from before another cut of this layer
            self._move(name, cut)
            self._offer(waiting, name)

    def give_back(self) -> None:
        """Take back, step by step, what the budget allows: what regains most for its cost first.

        What is refused once never fits later, when more has been taken back.
        """
        waiting: list[tuple[float, str, Ranks, Ranks]] = []
        for name in self._tools:
            self._offer_more(waiting, name)
        while waiting:
            _, name, more, given = heapq.heappop(waiting)
            grown = self.total + self._tools[name].costs(more) - self._tools[name].costs(given)
            if given == self.ranks[name] and self.fits(self.ranks | {name: more}, grown):
                self._move(name, more)
                self._offer_more(waiting, name)

    def unreachable(self, floors: Mapping[str, Ranks], kept: Mapping[str, str], baseline: Cost) -> BudgetUnreachable:
        """The error, with the layers that cost most at the smallest ranks."""
        smallest = factorize(self._graph, floors)
        least, dense = getattr(cost(smallest), self._measure), getattr(baseline, self._measure)
        costs = {node.name: node.macs if self._measure == "macs" else node.params for node in self._graph.nodes}
        for name, cuts in self._tools.items():
            costs[name] = cuts.costs(floors[name])
        whole = max(1, sum(costs.values()))
        holds = []
        for name in sorted(costs, key=lambda name: -costs[name])[:HEAVIEST]:
            if costs[name] and (name in kept or name in floors):
                why = kept.get(name) or f"at its smallest ranks, {' and '.join(map(str, floors[name]))}"
                holds.append(f"{name} has {costs[name] / whole:.0%} of it ({why})")
        return BudgetUnreachable(self._measure, self._allowed, least, dense, holds)

    def _offer(self, waiting: list[tuple[float, str, Ranks, Ranks]], name: str) -> None:
        now = self.ranks[name]
        for cut in self._tools[name].lower(now):
            heapq.heappush(waiting, (self._worth(name, cut), name, cut, now))

    def _offer_more(self, waiting: list[tuple[float, str, Ranks, Ranks]], name: str) -> None:
        now = self.ranks[name]
        for more in self._tools[name].higher(now):
            if more != now:
                heapq.heappush(waiting, (-self._worth(name, more), name, more, now))

    def _worth(self, name: str, other: Ranks) -> float:
        """The energy between the present ranks and these, for each unit of the cost between them."""
        cuts, now = self._tools[name], self.ranks[name]
        apart, lost = cuts.costs(now) - cuts.costs(other), cuts.lost(other) - cuts.lost(now)
        return lost / apart if apart else math.copysign(math.inf, -lost)

    def _move(self, name: str, ranks: Ranks) -> None:
        cuts = self._tools[name]
        self.total += cuts.costs(ranks) - cuts.costs(self.ranks[name])
        self.ranks[name] = ranks


def _total(graph: Graph, measure: Measure) -> int:
    if measure == "macs":
        return sum(node.macs for node in graph.nodes)
    if measure == "params":
        return sum(node.params for node in graph.nodes)
    return sum(tensor.elements for tensor in graph.tensors().values())
