"""Latency budgets: the search finds the largest network that is fast enough, and says what it cannot reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.errors import BudgetMissed
from app.network.cost import cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.pruning.budget import BudgetUnreachable, Removals, choose_removals
from app.pruning.channel_classes import channel_classes
from app.spec.prune import Budget, Prune
from tests.support.networks.topologies import CLASSES, PICTURE, conv, layer, trained
from worker.latency import Stopwatch
from worker.network import Network
from worker.pruning.importance import channel_scores
from worker.pruning.latency_budget import CONFIRMATIONS, alignments, confirm_time, removals_within_time
from worker.pruning.surgery import shrink


class Staircase(Stopwatch):
    """A machine whose time is a tenth of a microsecond for each MAC of widths rounded up to blocks of 8."""

    def __init__(self, dense: Network, *, overhead_ms: float = 0.0) -> None:
        self.overhead_ms = overhead_ms
        self.asked = 0
        self.dense_ms = self.time_ms(dense)

    def time_ms(self, network: Network, *, patience: float = 1.0) -> float:
        self.asked += 1
        time = self.overhead_ms
        for node in network.graph.nodes:
            if node.macs:
                tensor = node.tensors["weight"].shape
                blocks = 1.0
                for size in tensor[:2]:
                    blocks *= -(-size // 8) * 8 / size
                time += 1e-4 * node.macs * blocks
        return time


def wide() -> Network:
    layers = [conv(64), layer("relu"), conv(64), layer("relu"), conv(64), layer("global_avg_pool"), layer("flatten")]
    return trained(build_graph(read_layers([*layers, layer("linear", out_features=CLASSES)]), PICTURE))


def step_of(share: float, **fields: Any) -> Prune:
    return Prune.model_validate({"budget": {"latency_ms": share}, **fields})


def searched(network: Network, step: Prune, stopwatch: Stopwatch, fraction: float = 1.0) -> Removals:
    classes = channel_classes(network.graph)
    scores = channel_scores(network, classes, "l2", seed=0)

    def choose(wanted: Prune) -> Removals:
        return choose_removals(network.graph, classes, scores, wanted)

    return removals_within_time(network, classes, step, choose, stopwatch, fraction=fraction)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_network_is_in_time_and_a_slightly_larger_one_would_not_be(share: float) -> None:
    network = wide()
    stopwatch = Staircase(network)
    step = step_of(share, round_to=8)
    found = searched(network, step, stopwatch)
    classes = channel_classes(network.graph)
    time = stopwatch.time_ms(shrink(network, classes, found.dropped))
    assert time <= share * stopwatch.dense_ms
    larger = choose_removals(
        network.graph,
        classes,
        channel_scores(network, classes, "l2", seed=0),
        step.model_copy(update={"budget": Budget(macs=int(1.12 * found.cost.macs))}),
    )
    assert stopwatch.time_ms(shrink(network, classes, larger.dropped)) > 0.97 * share * stopwatch.dense_ms


def test_a_network_that_is_fast_enough_loses_nothing() -> None:
    network = wide()
    assert searched(network, step_of(1.0), Staircase(network)).dropped == frozenset()
    slow = Staircase(network)
    slow.dense_ms *= 10
    assert searched(network, step_of(0.9), slow).dropped == frozenset()


def test_rounds_keep_the_same_part_of_the_time_each() -> None:
    network = wide()
    stopwatch = Staircase(network)
    half = searched(network, step_of(0.25), stopwatch, fraction=0.5)
    time = stopwatch.time_ms(shrink(network, channel_classes(network.graph), half.dropped))
    assert 0.35 < time / stopwatch.dense_ms <= 0.5


def test_a_time_that_no_removal_reaches_is_missed_with_the_least_one() -> None:
    network = wide()
    with pytest.raises(BudgetMissed, match=r"smallest network that may be left takes 41\.\d+ ms"):
        searched(network, step_of(0.05, round_to=8), Staircase(network, overhead_ms=30))


def test_a_network_without_a_channel_to_remove_is_unreachable() -> None:
    layers = [conv(3, name="only"), layer("global_avg_pool"), layer("flatten")]
    network = trained(build_graph(read_layers(layers), PICTURE))
    with pytest.raises((BudgetMissed, BudgetUnreachable)):
        searched(network, step_of(0.5), Staircase(network))


def test_milliseconds_are_absolute_above_one_or_where_it_is_said() -> None:
    assert Budget(latency_ms=0.5).allowed_ms(10) == 5
    assert Budget(latency_ms=1.0).allowed_ms(10) == 10
    assert Budget(latency_ms=0.5, absolute=True).allowed_ms(10) == 0.5
    assert Budget(latency_ms=2.5).allowed_ms(10) == 2.5


def test_widths_follow_the_block_of_the_processor_unless_they_are_stated() -> None:
    block = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8
    assert alignments(step_of(0.5))[0] == block
    assert alignments(step_of(0.5))[-1] == 1
    assert alignments(step_of(0.5, round_to=4)) == (4,)


def test_a_network_too_narrow_for_the_block_is_cut_finer() -> None:
    layers = [conv(8), layer("relu"), conv(8), layer("global_avg_pool"), layer("flatten")]
    head = layer("linear", out_features=CLASSES)
    network = trained(build_graph(read_layers([*layers, head]), PICTURE))

    class Exact(Staircase):
        def time_ms(self, network: Network, *, patience: float = 1.0) -> float:
            return 1e-4 * cost(network.graph).macs

    found = searched(network, step_of(0.5), Exact(network))
    assert 0 < found.cost.macs <= 0.5 * cost(network.graph).macs


def test_a_time_counts_if_one_of_three_measurements_confirms_it() -> None:
    network = wide()
    stopwatch = Staircase(network)
    before = stopwatch.asked
    assert confirm_time(network, Budget(latency_ms=1.0), stopwatch) == stopwatch.dense_ms
    assert stopwatch.asked == before + 1
    with pytest.raises(BudgetMissed, match="the budget allows"):
        confirm_time(network, Budget(latency_ms=0.5), stopwatch)
    assert stopwatch.asked == before + 1 + CONFIRMATIONS


def test_a_real_stopwatch_finds_the_smaller_network_faster() -> None:
    big = build_graph(
        read_layers([conv(64), layer("relu"), conv(64), layer("global_avg_pool"), layer("flatten")]), (3, 32, 32)
    )
    network = trained(big)
    classes = channel_classes(big)
    half = choose_removals(big, classes, None, Prune(budget=Budget(macs=0.3)))
    stopwatch = Stopwatch(network, seconds=0.2)
    assert cost(shrink(network, classes, half.dropped).graph).macs < 0.3 * cost(big).macs
    assert stopwatch.time_ms(shrink(network, classes, half.dropped)) < stopwatch.time_ms(network)
