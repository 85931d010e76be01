"""Which channels are removed until the network answers in time, as measured on this machine in onnxruntime.

Latency is a staircase over widths (kernels work on blocks of 8 or 16 channels), which no count predicts: so each
candidate network is built and timed, in turns with the dense one. Candidates are those of a budget of MACs, of which
the search finds the largest that is fast enough; widths are multiples of the processor's block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from app.errors import BudgetMissed
from app.network.cost import cost
from app.pruning.budget import BudgetUnreachable, Removals
from app.pruning.channel_classes import Classes
from app.pruning.group_limits import BLOCKS
from app.spec.prune import Budget, Prune
from worker.latency import Stopwatch
from worker.network import Network
from worker.pruning.surgery import shrink

MARGIN = 0.97  # of the time allowed is aimed at: two measurements of one network differ by a few percent
SEARCH_ROUNDS = 8  # each halves the distance between too slow and fast enough
CONFIRMATIONS = 3  # measurements before a network counts as too slow

Choose = Callable[[Prune], Removals]


def alignments(step: Prune) -> tuple[int, ...]:
    """What widths may be multiples of, best first: what is stated, else the processor's block of channels and less.

    The block is 16 with AVX-512, else 8; less is for networks that are too narrow for it.
    """
    if step.round_to is not None:
        return (step.round_to,)
    block = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8
    return tuple(smaller for smaller in BLOCKS if smaller <= block)


def removals_within_time(
    network: Network, classes: Classes, step: Prune, choose: Choose, stopwatch: Stopwatch, *, fraction: float
) -> Removals:
    """The removals after which one image takes no longer than the budget of `step` allows.

    Args:
        network: As it is now.
        classes: Of its graph.
        step: Has a budget of latency; of the `alignments` the first with which the time can be reached counts.
        choose: A step with a budget of MACs -> the removals that meet it.
        stopwatch: Of the dense network.
        fraction: Part of the way in (0, 1]: a stage keeps the same part of the time as each other.

    Raises:
        BudgetMissed: The smallest network that the floors allow takes longer.
        BudgetUnreachable: Nothing may be removed.
    """
    *better, last = alignments(step)
    for alignment in better:
        aligned = step.model_copy(update={"round_to": alignment})
        try:
            return _search_removals(network, classes, aligned, choose, stopwatch, fraction)
        except (BudgetMissed, BudgetUnreachable):
            continue
    return _search_removals(network, classes, step.model_copy(update={"round_to": last}), choose, stopwatch, fraction)


def _search_removals(
    network: Network, classes: Classes, step: Prune, choose: Choose, stopwatch: Stopwatch, fraction: float
) -> Removals:
    assert step.budget is not None
    target_ms = step.budget.allowed_ms(stopwatch.dense_ms)
    allowed_ms = stopwatch.dense_ms * min(1.0, target_ms / stopwatch.dense_ms) ** fraction
    now = cost(network.graph).macs

    def within(macs: int) -> Removals:
        return choose(step.model_copy(update={"budget": Budget(macs=max(2, macs))}))

    def time_ms(removals: Removals) -> float:
        return stopwatch.time_ms(shrink(network, classes, removals.dropped) if removals.dropped else network)

    best = within(now)
    if target_ms >= stopwatch.dense_ms or time_ms(best) <= MARGIN * allowed_ms:
        return best
    best = within(best.floor.macs)
    least_ms = time_ms(best)
    if least_ms > allowed_ms:
        raise BudgetMissed(_too_slow(least_ms, allowed_ms, stopwatch.dense_ms, "the smallest network that may be left"))
    slow = now
    for _ in range(SEARCH_ROUNDS):
        middle = (best.cost.macs + slow) // 2
        candidate = within(middle)
        if candidate.cost.macs > best.cost.macs and time_ms(candidate) <= MARGIN * allowed_ms:
            best = candidate
        else:  # too slow, or no network lies between
            slow = middle
    return best


def confirm_time(network: Network, budget: Budget, stopwatch: Stopwatch) -> float:
    """Measure the time of one image again, in milliseconds: it is within the budget if one of three measurements is.

    Raises:
        BudgetMissed: None of them is.
    """
    allowed_ms = budget.allowed_ms(stopwatch.dense_ms)
    if allowed_ms >= stopwatch.dense_ms:  # the dense network itself may be delivered, and no two of its times are equal
        allowed_ms = max(allowed_ms, stopwatch.dense_ms / MARGIN)
    measured: list[float] = []
    for patience in range(1, CONFIRMATIONS + 1):
        measured.append(stopwatch.time_ms(network, patience=patience))
        if measured[-1] <= allowed_ms:
            return measured[-1]
    raise BudgetMissed(_too_slow(min(measured), allowed_ms, stopwatch.dense_ms, "the pruned network"))


def _too_slow(found_ms: float, allowed_ms: float, dense_ms: float, what: str) -> str:
    return (
        f"{what} takes {found_ms:.4g} ms here for one image ({found_ms / dense_ms:.3f} of the dense network's "
        f"{dense_ms:.4g} ms); the budget allows {allowed_ms:.4g} ms"
    )
