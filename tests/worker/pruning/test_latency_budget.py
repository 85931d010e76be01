"""Latency budgets: the search finds the largest network that is fast enough, and says what it cannot reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from app.errors import BudgetMissed
from app.network.cost import cost
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.pruning.budget import BudgetUnreachable, Curve, Removals, choose_removals
from app.pruning.channel_classes import channel_classes
from app.spec.budget import Budget
from app.spec.prune import Prune
from tests.support.networks.topologies import CLASSES, PICTURE, Layers, conv, layer, trained
from worker.latency import Measured, Stopwatch
from worker.network import Network
from worker.pruning.importance import channel_scores
from worker.pruning.latency_budget import alignments, check_time, layer_prices, removals_within_time
from worker.pruning.surgery import shrink


class Staircase(Stopwatch):
    """A machine whose time is a tenth of a microsecond for each MAC of widths rounded up to blocks of 8."""

    def __init__(
        self,
        dense: Network,
        *,
        overhead_ms: float = 0.0,
        error_ms: float = 0.0,
        slower: Mapping[str, float] | None = None,
    ) -> None:
        self.overhead_ms, self.error_ms, self.slower = overhead_ms, error_ms, slower or {}
        self.asked = 0
        self.dense_ms = self.time_ms(dense)

    def time(self, network: Network, *, patience: float = 1.0) -> Measured:
        self.asked += 1
        return Measured(self.overhead_ms + sum(self.layer_ms(network).values()), self.error_ms)

    def layer_ms(self, network: Network) -> dict[str, float]:
        times = {}
        for node in network.graph.nodes:
            if node.macs:
                tensor = node.tensors["weight"].shape
                blocks = 1.0
                for size in tensor[:2]:
                    blocks *= -(-size // 8) * 8 / size
                times[node.name] = 1e-4 * node.macs * blocks * self.slower.get(node.name, 1.0)
        return times


def wide() -> Network:
    layers = [conv(64), layer("relu"), conv(64), layer("relu"), conv(64), layer("global_avg_pool"), layer("flatten")]
    return trained(build_graph(read_layers([*layers, layer("linear", out_features=CLASSES)]), PICTURE))


def step_of(share: float, **fields: Any) -> Prune:
    return Prune.model_validate({"budget": {"latency_ms": share}, **fields})


def searched(
    network: Network,
    step: Prune,
    stopwatch: Stopwatch,
    fraction: float = 1.0,
    *,
    start: Graph | None = None,
    curves: Mapping[int, Curve] | None = None,
) -> Removals:
    classes = channel_classes(network.graph, start)
    scores = channel_scores(network, classes, "l2", seed=0)

    def choose(wanted: Prune, prices: Mapping[str, int] | None) -> Removals:
        return choose_removals(network.graph, classes, scores, wanted, start=start, losses=curves, prices=prices)

    return removals_within_time(
        network, classes, step, choose, stopwatch, start=start or network.graph, fraction=fraction
    )


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
        def layer_ms(self, network: Network) -> dict[str, float]:
            return {node.name: 1e-4 * node.macs for node in network.graph.nodes if node.macs}

    found = searched(network, step_of(0.5), Exact(network))
    assert 0 < found.cost.macs <= 0.5 * cost(network.graph).macs


def test_of_two_layers_that_lose_as_much_the_slower_one_is_cut() -> None:
    """Both have the same multiply-accumulates; what counts is the milliseconds that a cut saves."""
    layers = [conv(32, name="a"), conv(32, name="b"), conv(32, name="c"), layer("global_avg_pool"), layer("flatten")]
    network = trained(build_graph(read_layers([*layers, layer("linear", out_features=CLASSES)]), PICTURE))
    classes = channel_classes(network.graph)
    curves = {group.index: Curve(((0.5, 0.5), (0.1, 0.9))) for group in classes.groups}
    for slow, whole in {"b": "c", "c": "a"}.items():  # a narrows b too, b narrows c
        found = searched(network, step_of(0.6, round_to=8), Staircase(network, slower={slow: 20.0}), curves=curves)
        smaller = shrink(network, classes, found.dropped).graph
        assert smaller[whole].shape[0] == 32, slow
        assert cost(smaller).macs < cost(network.graph).macs


def test_rounds_behind_another_compression_go_from_where_the_step_begins() -> None:
    """From the dense network on, the first rounds would find their part of the time reached and cut nothing."""
    dense = wide()
    stopwatch = Staircase(dense)
    first = searched(dense, step_of(0.4, round_to=8), stopwatch)
    network = start = shrink(dense, channel_classes(dense.graph), first.dropped)
    begin = stopwatch.time_ms(start)
    for number in (1, 2):
        fraction = number / 2
        found = searched(network, step_of(0.15, round_to=8), stopwatch, fraction, start=start.graph)
        assert found.dropped
        network = shrink(network, channel_classes(network.graph, start.graph), found.dropped)
        allowed = begin * (0.15 * stopwatch.dense_ms / begin) ** fraction
        assert 0.6 * allowed < stopwatch.time_ms(network) <= allowed


def test_a_longer_measurement_that_finds_it_too_slow_sends_the_search_on() -> None:
    network = wide()

    class Flattering(Staircase):
        def time(self, network: Network, *, patience: float = 1.0) -> Measured:
            found = super().time(network)
            return (
                found
                if patience > 1 or found.ms > 0.9 * self.__dict__.get("dense_ms", 0)
                else Measured(0.8 * found.ms, 0)
            )

    stopwatch = Flattering(network)
    found = searched(network, step_of(0.5, round_to=8), stopwatch)
    assert stopwatch.time(shrink(network, channel_classes(network.graph), found.dropped), patience=2).ms <= (
        0.5 * stopwatch.dense_ms
    )
    assert found.cost.macs > 0.3 * cost(network.graph).macs


def test_a_time_is_missed_only_by_more_than_its_error() -> None:
    network = wide()
    exact, noisy = Staircase(network), Staircase(network, error_ms=1.0)
    assert check_time(network, Budget(latency_ms=1.0), exact).met
    just_below = (exact.dense_ms - 1.9) / exact.dense_ms
    assert not check_time(network, Budget(latency_ms=just_below), exact).met
    assert check_time(network, Budget(latency_ms=just_below), noisy).met
    missed = check_time(network, Budget(latency_ms=0.5), noisy)
    assert not missed.met
    assert "give or take 1" in missed.sentence()
    assert "the budget allows" in missed.sentence()


def test_prices_are_those_of_the_layers_and_the_mean_where_no_time_is_known() -> None:
    network = wide()
    prices = layer_prices(network, Staircase(network, slower={"conv2": 3.0}))
    assert prices["conv2"] == pytest.approx(3 * prices["conv3"], rel=0.02)

    class Blind(Staircase):
        def layer_ms(self, network: Network) -> dict[str, float]:
            return {}

        def time(self, network: Network, *, patience: float = 1.0) -> Measured:
            return Measured(1.0, 0.0)

    assert set(layer_prices(network, Blind(network)).values()) == {100}


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


def test_the_runtime_tells_the_time_of_every_layer() -> None:
    block = layer("residual", name="r", layers=[conv(32), layer("batch_norm"), layer("relu"), conv(32)])
    shapes: Layers = [conv(32), layer("batch_norm"), layer("relu"), block, layer("relu"), conv(32, groups="depthwise")]
    head = [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=CLASSES)]
    network = trained(build_graph(read_layers([*shapes, *head]), (3, 32, 32)))
    times = Stopwatch(network, seconds=0.1).layer_ms(network)
    assert set(times) == {node.name for node in network.graph.nodes if node.macs}
    assert all(ms > 0 for ms in times.values())
    assert times["r_conv1"] > times["conv1"]
