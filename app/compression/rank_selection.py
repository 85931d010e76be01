"""Which ranks the layers of a network get, so that it keeps an energy or meets a budget.

    choice = choose_ranks(graph, step, spectra)          # spectra None: the dry run's, a line for every layer
    smaller = factorize(graph, choice.ranks)             # costs exactly choice.cost

The *lost energy* of ranks is the part of a layer's squared weights that the product misses: of one rank the squared
singular values that are dropped; of two what truncating both sides of the higher-order SVD drops, which HOOI does not
exceed (De Lathauwer et al. 2000, SIAM J. Matrix Anal. Appl. 21). Chosen ranks are multiples of `round_to`, at least 8
and a tenth of the full rank.

- `rank`: that rank everywhere, as far as it makes a layer cheaper.
- `energy`: the cheapest ranks that keep it.
- `budget`: from full ranks on, again and again the cut with the smallest lost energy for what it saves, until the budget
  holds; then ranks grow again, step by step, the most energy for its cost first, as far as the budget allows: it is met
  from below, and no rank can be one step larger.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from app.compression.factorization import (
    Factorable,
    PartRole,
    Ranks,
    factorize,
    low_rank_layers,
    named_parts,
    part_names,
    stored_shapes,
)
from app.network.cost import FLOAT_BYTES, Cost, CostMeasure, cost, safetensors_bytes
from app.network.graph import Graph
from app.network.layers.shapes import Shape
from app.pruning.budget import BudgetUnreachable
from app.pruning.channel_rules import FloatArray, IntArray
from app.pruning.group_limits import HEAVIEST
from app.spec.low_rank import LowRank

Spectra = Mapping[str, FloatArray]
"""Layer -> the energy that is lost with rank 0, 1, ... full, or with each pair of ranks (inputs x outputs)."""

MOST_STEPS = 64  # ranks of one side that cuts are chosen from: 4,096 x 4,096 pairs would take gigabytes


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
        step: Names in it that the network does not have are ignored.
        spectra: Of every layer that can become a product. None: as if the squared singular values fell along a line.
        baseline: The cost to which fractions of a budget refer (default: that of `graph`).

    Raises:
        BudgetUnreachable: The budget is below the cost with the smallest ranks.
    """
    layers, kept = low_rank_layers(graph, only=step.layers, exclude=step.exclude)
    measure = "macs" if step.budget is None else step.budget.measure
    choices_of = {
        name: _Choices(layer, step.round_to, measure, (spectra or {}).get(name)) for name, layer in layers.items()
    }
    floors = {name: choices.floor for name, choices in choices_of.items()}
    if step.rank is not None:
        wanted = {name: choices.at_most(step.rank) for name, choices in choices_of.items()}
        floors, why = wanted, f"at rank {step.rank} it would cost no less"
    elif step.energy is not None:
        wanted = {name: choices.with_energy(step.energy) for name, choices in choices_of.items()}
        why = f"the ranks that keep {step.energy:g} of its energy cost no less"
    else:
        wanted = _within_budget(graph, step, choices_of, kept, baseline or cost(graph))
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


class _Choices:
    """The ranks that one layer may have: what they cost in one measure, and which energy they lose."""

    def __init__(self, layer: Factorable, round_to: int, measure: str, spectrum: FloatArray | None) -> None:
        self.layer, self.full = layer, layer.widths
        self._measure, self._spectrum = measure, spectrum
        self._grids = [layer.grid(mode, round_to) for mode in range(len(self.full))]
        self._places = [{rank: place for place, rank in enumerate(grid)} for grid in self._grids]
        self.floor = layer.floor(round_to, measure)

    def costs(self, ranks: Ranks) -> int:
        """Multiply-accumulates, or weights."""
        return self.layer.costs(ranks)[0 if self._measure == "macs" else 1]

    def lost(self, ranks: Ranks) -> float:
        """The energy that these ranks lose."""
        return float(self._lost(tuple(np.array(rank) for rank in ranks)))

    def _lost(self, ranks: tuple[IntArray, ...]) -> FloatArray:
        if self._spectrum is not None:
            return self._spectrum[ranks]
        kept = np.ones(())
        for rank, full in zip(ranks, self.full, strict=True):
            kept = kept * (1 - np.square(1 - rank / full))
        return 1 - kept

    def at_most(self, rank: int) -> Ranks:
        """This rank on every side, or the full one where it is smaller."""
        return self.layer.worthwhile_ranks(tuple(min(rank, full) for full in self.full), self._measure)

    def with_energy(self, energy: float) -> Ranks:
        """The cheapest ranks that keep this part of the energy."""
        ranks, costs, lost = self._points(self._grids)
        enough = np.flatnonzero(lost <= 1 - energy)
        return self._at(ranks, enough[np.lexsort((lost[enough], costs[enough]))[0]])

    def cuts(self) -> list[tuple[float, Ranks]]:
        """The cuts from full ranks to the floor: (energy lost for each unit that is saved, ranks), rising.

        Each is, of all cheaper ranks, the one that loses least for what it saves: the lower convex hull of lost energy
        over cost. Grids with many ranks are thinned.
        """
        ranks, costs, lost = self._points([_thinned(grid) for grid in self._grids])
        cheapest_first = np.lexsort((lost, costs))
        lowest = np.minimum.accumulate(lost[cheapest_first])
        better = np.concatenate([[True], lowest[1:] < lowest[:-1]])  # than everything that is cheaper
        full = len(costs) - 1
        way: list[tuple[float, int]] = [(-math.inf, full)]
        for place in cheapest_first[better][::-1].tolist():
            if place == full:
                continue
            while (slope := _slope(costs, lost, way[-1][1], place)) <= way[-1][0]:
                way.pop()
            way.append((slope, place))
        return [(slope, self._at(ranks, place)) for slope, place in way[1:]]

    def higher(self, ranks: Ranks) -> list[Ranks]:
        """The ranks one step above these, on each side alone."""
        found = []
        for mode, grid in enumerate(self._grids):
            place = self._places[mode][ranks[mode]]
            if place + 1 < len(grid):
                more = (*ranks[:mode], grid[place + 1], *ranks[mode + 1 :])
                found.append(self.layer.worthwhile_ranks(more, self._measure))
        return found

    def _points(self, grids: Sequence[Sequence[int]]) -> tuple[tuple[IntArray, ...], IntArray, FloatArray]:
        """(ranks, costs, lost energies) of the full ranks and of all on these grids that are cheaper."""
        meshes = np.meshgrid(*(np.array(grid, dtype=np.int64) for grid in grids), indexing="ij")
        ranks = tuple(mesh.ravel() for mesh in meshes)
        both, whole = self.layer.costs_of_all(ranks), self.layer.costs(self.full)
        by = 0 if self._measure == "macs" else 1
        sound = (both[by] < whole[by]) & (both[1 - by] <= whole[1 - by])
        sound[-1] = True  # full ranks
        ranks = tuple(rank[sound] for rank in ranks)
        lost = np.maximum(self._lost(ranks), 0.0)
        lost[-1] = 0.0
        return ranks, both[by][sound], lost

    def _at(self, ranks: tuple[IntArray, ...], place: int | np.int64) -> Ranks:
        return tuple(int(rank[place]) for rank in ranks)


def _slope(costs: IntArray, lost: FloatArray, dear: int, cheap: int) -> float:
    """Energy lost for each unit that is saved between two places; the second is cheaper."""
    return float((lost[cheap] - lost[dear]) / (costs[dear] - costs[cheap]))


def _thinned(grid: Sequence[int]) -> Sequence[int]:
    """The grid with at most `MOST_STEPS` ranks, the smallest and the largest among them."""
    apart = -(-len(grid) // MOST_STEPS)
    return grid if apart == 1 else [*grid[:-1:apart], grid[-1]]


def _within_budget(
    graph: Graph, step: LowRank, choices_of: Mapping[str, _Choices], kept: Mapping[str, str], baseline: Cost
) -> dict[str, Ranks]:
    assert step.budget is not None
    assert step.budget.measure != "latency_ms", "a latency is measured, not counted"
    search = _RankSearch(graph, choices_of, step.budget.measure, step.budget.allowed(baseline.of(step.budget.measure)))
    floors = {name: choices.floor for name, choices in choices_of.items()}
    if not search.fits(floors, search.total_with(floors)):
        raise search.unreachable(floors, kept, baseline)
    search.cut_ranks()
    search.give_back_ranks()
    return search.ranks


class _RankSearch:
    """The search for ranks within a budget. `total` are all MACs, or all weights that are stored."""

    def __init__(self, graph: Graph, choices_of: Mapping[str, _Choices], measure: CostMeasure, allowed: int) -> None:
        self._graph, self._choices_of, self._measure, self._allowed = graph, choices_of, measure, allowed
        self._dense = {name: choices.costs(choices.full) for name, choices in choices_of.items()}
        self._whole = _whole_cost(graph, measure)
        self.ranks = {name: choices.full for name, choices in choices_of.items()}
        self.total = self._whole

    @property
    def _unit(self) -> int:
        """How much of the measure one multiply-accumulate or weight is."""
        return FLOAT_BYTES if self._measure == "bytes" else 1

    def _spare(self) -> int:
        """How much more the budget allows."""
        if self._measure != "bytes":
            return self._allowed - self.total
        return self._allowed - safetensors_bytes(self._shapes(self.ranks))

    def total_with(self, ranks: Mapping[str, Ranks]) -> int:
        """`total` of a network with these ranks."""
        return self._whole - sum(self._dense[name] - self._choices_of[name].costs(own) for name, own in ranks.items())

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
        ranks = {name: tuple(max(1, width - 1) for width in choices.full) for name, choices in self._choices_of.items()}
        shapes = self._shapes(ranks)
        return safetensors_bytes(shapes) - FLOAT_BYTES * sum(math.prod(shape) for shape in shapes.values())

    @cached_property
    def _names(self) -> dict[str, dict[PartRole, str]]:
        return part_names(self._graph)

    def _shapes(self, ranks: Mapping[str, Ranks]) -> dict[str, Shape]:
        """The shapes of the tensors of a network with these ranks, by key."""
        shapes = {key: tensor.shape for key, tensor in self._graph.tensors().items()}
        for name, own in ranks.items():
            layer = self._choices_of[name].layer
            if own != layer.widths:
                for key in layer.node.tensors:
                    del shapes[f"{name}.{key}"]
                shapes |= stored_shapes(layer, named_parts(layer.parts(own), self._names[name]))
        return shapes

    def cut_ranks(self) -> None:
        """Cut ranks, each time what loses least for what it saves, until the budget holds or nothing can be cut."""
        cuts = [
            (slope, name, number, ranks)
            for name, choices in self._choices_of.items()
            for number, (slope, ranks) in enumerate(choices.cuts())
        ]
        cuts.sort()

        def after(count: int) -> dict[str, Ranks]:
            return self.ranks | {name: ranks for _, name, _, ranks in cuts[:count]}

        needed = bisect_left(
            range(len(cuts)), True, key=lambda count: self.fits(after(count), self.total_with(after(count)))
        )
        for _, name, _, ranks in cuts[:needed]:
            self._set_ranks(name, ranks)
        for name, choices in self._choices_of.items():  # the ranks that thinned grids do not have
            if self.fits(self.ranks, self.total):
                return
            self._set_ranks(name, choices.floor)

    def give_back_ranks(self) -> None:
        """Raise ranks again, step by step, as far as the budget allows: what regains most for its cost first.

        What is refused once never fits later, when more ranks have been raised.
        """
        waiting: list[tuple[float, str, Ranks, Ranks]] = []
        for name in self._choices_of:
            self._push_higher(waiting, name)
        spare = self._spare()
        while waiting:
            _, name, more, given = heapq.heappop(waiting)
            if given != self.ranks[name]:
                continue  # from before another step of this layer
            choices = self._choices_of[name]
            grown = choices.costs(more) - choices.costs(given)
            fewer_layers = len(choices.layer.parts(more)) < len(choices.layer.parts(given))
            if grown * self._unit > spare and not fewer_layers:
                continue  # a file's header only grows with its tensors
            if self.fits(self.ranks | {name: more}, self.total + grown):
                self._set_ranks(name, more)
                self._push_higher(waiting, name)
                spare = self._spare()

    def unreachable(self, floors: Mapping[str, Ranks], kept: Mapping[str, str], baseline: Cost) -> BudgetUnreachable:
        """The error, with the layers that cost most at the smallest ranks."""
        smallest = factorize(self._graph, floors)
        least, dense = cost(smallest).of(self._measure), baseline.of(self._measure)
        costs = {node.name: node.macs if self._measure == "macs" else node.params for node in self._graph.nodes}
        for name, choices in self._choices_of.items():
            costs[name] = choices.costs(floors[name])
        whole = max(1, sum(costs.values()))
        holds = []
        for name in sorted(costs, key=lambda name: -costs[name])[:HEAVIEST]:
            if costs[name] and (name in kept or name in floors):
                why = kept.get(name) or f"at its smallest ranks, {' and '.join(map(str, floors[name]))}"
                holds.append(f"{name} has {costs[name] / whole:.0%} of it ({why})")
        return BudgetUnreachable(self._measure, self._allowed, least, dense, holds)

    def _push_higher(self, waiting: list[tuple[float, str, Ranks, Ranks]], name: str) -> None:
        now = self.ranks[name]
        for more in self._choices_of[name].higher(now):
            if more != now:
                heapq.heappush(waiting, (-self._worth(name, more), name, more, now))

    def _worth(self, name: str, other: Ranks) -> float:
        """The energy between the present ranks and these, for each unit of the cost between them."""
        choices, now = self._choices_of[name], self.ranks[name]
        apart, lost = choices.costs(now) - choices.costs(other), choices.lost(other) - choices.lost(now)
        return lost / apart if apart else math.copysign(math.inf, -lost)

    def _set_ranks(self, name: str, ranks: Ranks) -> None:
        choices = self._choices_of[name]
        self.total += choices.costs(ranks) - choices.costs(self.ranks[name])
        self.ranks[name] = ranks


def _whole_cost(graph: Graph, measure: CostMeasure) -> int:
    if measure == "macs":
        return sum(node.macs for node in graph.nodes)
    if measure == "params":
        return sum(node.params for node in graph.nodes)
    return sum(tensor.elements for tensor in graph.tensors().values())
