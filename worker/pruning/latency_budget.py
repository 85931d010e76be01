"""Which channels are removed until the network answers in time, as measured on this machine in onnxruntime.

Latency is a staircase over widths (kernels work on blocks of 8 or 16 channels), which no count predicts: so each
candidate network is built and timed, in turns with the dense one. Candidates are those of a budget of MACs, each MAC at the
price of its layer: the time that the layer takes for one now. So what leaves first is what loses least for the milliseconds
that it saves (as HALP does, Shen et al., arXiv 2110.10811). Of the candidates the search finds the largest that is fast
enough; widths are multiples of the processor's block.

The time is known before the network is trained again, because weights do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from app.errors import BudgetMissed
from app.network.graph import Graph
from app.pruning.budget import BudgetUnreachable, Removals
from app.pruning.channel_classes import Classes, shrink_graph
from app.pruning.group_limits import BLOCKS
from app.spec.budget import Budget
from app.spec.prune import Prune
from worker.latency import Measured, Stopwatch
from worker.network import Network, build_network
from worker.pruning.surgery import shrink

MARGIN = 0.97  # of the time allowed is aimed at: two measurements of one network differ by a few percent
SEARCH_ROUNDS = 8  # each halves the distance between too slow and fast enough
SEARCHES = 3  # where a longer measurement finds the network too slow after all, the next one aims lower
CONFIRMATION = 3.0  # times the length of a measurement of the search
ERRORS = 2.0  # standard errors by which a time must be above the budget before it counts as missed
MEAN_PRICE = 100  # of one multiply-accumulate

Choose = Callable[[Prune, Mapping[str, int] | None], Removals]


@dataclass(frozen=True)
class TimeCheck:
    """The time of the pruned network beside the budget, in milliseconds."""

    measured: Measured
    allowed_ms: float
    dense_ms: float

    @property
    def met(self) -> bool:
        """Whether it is within the budget as far as measuring tells: by less than two standard errors above it."""
        return self.measured.ms - ERRORS * self.measured.error_ms <= self.allowed_ms

    def sentence(self) -> str:
        """The numbers as words."""
        return _too_slow(self.measured, self.allowed_ms, self.dense_ms, "the pruned network")


def alignments(step: Prune) -> tuple[int, ...]:
    """What widths may be multiples of, best first: what is stated, else the processor's block of channels and less.

    The block is 16 with AVX-512, else 8; less is for networks that are too narrow for it.
    """
    if step.round_to is not None:
        return (step.round_to,)
    block = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8
    return tuple(smaller for smaller in BLOCKS if smaller <= block)


def removals_within_time(
    network: Network,
    classes: Classes,
    step: Prune,
    choose: Choose,
    stopwatch: Stopwatch,
    *,
    start: Graph,
    fraction: float,
) -> Removals:
    """The removals after which one image takes no longer than the budget of `step` allows.

    Args:
        network: As it is now.
        classes: Of its graph.
        step: Has a budget of latency; of the `alignments` the first with which the time can be reached counts.
        choose: A step with a budget of MACs, and the price of one in each layer -> the removals that meet it.
        stopwatch: Of the dense network.
        start: The graph before the first stage of the step.
        fraction: Part of the way in (0, 1]: a stage keeps the same part of the time as each other.

    Raises:
        BudgetMissed: The smallest network that the floors allow takes longer.
        BudgetUnreachable: Nothing may be removed.
    """
    assert step.budget is not None
    allowed_ms = _allowed_ms(network, step.budget, stopwatch, start, fraction)
    prices = layer_prices(network, stopwatch) if step.scope == "sensitivity" else {}
    *better, last = alignments(step)
    for alignment in (*better, last):
        search = _Search(network, classes, step.model_copy(update={"round_to": alignment}), choose, stopwatch, prices)
        try:
            return search.removals(allowed_ms)
        except (BudgetMissed, BudgetUnreachable):
            if alignment == last:
                raise
    raise AssertionError("a step has at least one alignment")


def layer_prices(network: Network, stopwatch: Stopwatch) -> dict[str, int]:
    """For each layer with weights the time of one of its multiply-accumulates, as hundredths of the mean."""
    macs: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.macs:
            macs[node.home] = macs.get(node.home, 0) + node.macs
    times = {name: ms for name, ms in stopwatch.layer_ms(network).items() if ms > 0 and name in macs}
    counted = sum(macs[name] for name in times)
    mean = sum(times.values()) / max(1, counted)
    prices = dict.fromkeys(macs, MEAN_PRICE)
    return prices | {name: max(1, round(MEAN_PRICE * ms / (mean * macs[name]))) for name, ms in times.items()}


def _allowed_ms(network: Network, budget: Budget, stopwatch: Stopwatch, start: Graph, fraction: float) -> float:
    """The time allowed after the part `fraction` of the way, geometric between where the step begins and the budget."""
    target_ms = budget.allowed_ms(stopwatch.dense_ms)
    if fraction >= 1:
        return target_ms
    first = network if network.graph == start else build_network(start).eval()
    whole_ms = min(stopwatch.dense_ms, stopwatch.time_ms(first))
    left: float = min(1.0, target_ms / whole_ms) ** fraction
    return whole_ms * left


class _Search:
    """The search along the removals of one alignment."""

    def __init__(
        self,
        network: Network,
        classes: Classes,
        step: Prune,
        choose: Choose,
        stopwatch: Stopwatch,
        prices: Mapping[str, int],
    ) -> None:
        self._network, self._classes, self._step = network, classes, step
        self._choose, self._stopwatch, self._prices = choose, stopwatch, prices

    def removals(self, allowed_ms: float) -> Removals:
        """Those of the largest network that is fast enough; a longer measurement confirms it, or a lower aim is searched.

        Raises:
            BudgetMissed: The smallest network is too slow.
        """
        stopwatch = self._stopwatch
        best = self._within(self._priced(self._network.graph))
        if allowed_ms >= stopwatch.dense_ms or self._time_ms(best) <= MARGIN * allowed_ms:
            return best
        smallest = self._within(self._priced(self._without(best.floor_dropped)))
        least = stopwatch.time(self._shrunk(smallest))
        if least.ms > allowed_ms:
            message = _too_slow(least, allowed_ms, stopwatch.dense_ms, "the smallest network that may be left")
            raise BudgetMissed(message)
        aim_ms = MARGIN * allowed_ms
        for _ in range(SEARCHES):
            best = self._largest(smallest, aim_ms)
            if best.dropped == smallest.dropped:
                break
            found_ms = stopwatch.time(self._shrunk(best), patience=CONFIRMATION).ms
            if found_ms <= allowed_ms:
                break
            aim_ms *= MARGIN * allowed_ms / found_ms
        return best

    def _largest(self, best: Removals, aim_ms: float) -> Removals:
        """The removals of the largest network that takes at most `aim_ms`, from `best` on, which are fast enough."""
        fast, slow = self._priced(self._without(best.dropped)), self._priced(self._network.graph)
        for _ in range(SEARCH_ROUNDS):
            middle = (fast + slow) // 2
            candidate = self._within(middle)
            reached = self._priced(self._without(candidate.dropped))
            if reached > fast and self._time_ms(candidate) <= aim_ms:
                best, fast = candidate, reached
            else:  # too slow, or no network lies between
                slow = middle
        return best

    def _within(self, amount: int) -> Removals:
        counted = self._step.model_copy(update={"budget": Budget(macs=max(2, amount))})
        return self._choose(counted, self._prices or None)

    def _priced(self, graph: Graph) -> int:
        """The multiply-accumulates of a graph at their prices."""
        return sum(node.macs * self._prices.get(node.home, 1) for node in graph.nodes)

    def _without(self, dropped: frozenset[int]) -> Graph:
        return shrink_graph(self._network.graph, dropped, self._classes)

    def _shrunk(self, removals: Removals) -> Network:
        return shrink(self._network, self._classes, removals.dropped) if removals.dropped else self._network

    def _time_ms(self, removals: Removals) -> float:
        return self._stopwatch.time_ms(self._shrunk(removals))


def check_time(network: Network, budget: Budget, stopwatch: Stopwatch) -> TimeCheck:
    """Measure the time of one image again, longer than in the search, and put it beside the budget."""
    allowed_ms = budget.allowed_ms(stopwatch.dense_ms)
    if allowed_ms >= stopwatch.dense_ms:  # the dense network itself may be delivered, and no two of its times are equal
        allowed_ms = max(allowed_ms, stopwatch.dense_ms / MARGIN)
    return TimeCheck(stopwatch.time(network, patience=CONFIRMATION), allowed_ms, stopwatch.dense_ms)


def _too_slow(found: Measured, allowed_ms: float, dense_ms: float, what: str) -> str:
    return (
        f"{what} takes {found.ms:.4g} ms here for one image, give or take {found.error_ms:.2g} "
        f"({found.ms / dense_ms:.3f} of the dense network's {dense_ms:.4g} ms); the budget allows {allowed_ms:.4g} ms"
    )
