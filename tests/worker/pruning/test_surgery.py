"""The smaller network computes what the masked one does: float64, random running statistics, every topology.

Default statistics (mean 0, variance 1) hide what a batch norm makes of a channel that was zeroed and not removed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.network.cost import cost
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.presets.registry import PRESETS
from app.pruning.budget import choose_removals
from app.pruning.channel_classes import Classes, channel_classes
from app.spec.prune import Prune
from tests.support.networks.dags import one_class, random_drop, random_graph
from tests.support.networks.known import network_named
from tests.support.networks.topologies import HEAD, PICTURE, TOPOLOGIES, conv, layer, topology, trained
from worker.network import Network
from worker.pruning.importance import channel_scores
from worker.pruning.surgery import masked_reference, shrink, shrink_tensors

EXACT = 1e-10
SINGLE = 1e-5


def inputs(graph: Graph, dtype: torch.dtype, count: int = 4) -> Tensor:
    return torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


@torch.no_grad()
def difference(one: Network, other: Network) -> float:
    """The largest difference of their logits on random inputs, in eval mode."""
    images = inputs(one.graph, next(one.parameters()).dtype)
    return float((one.eval()(images) - other.eval()(images)).abs().max())


def drops(classes: Classes, seed: int) -> dict[str, list[int]]:
    return {
        "one class": one_class(classes, seed),
        "a fifth": random_drop(classes, 0.2, seed),
        "most": random_drop(classes, 0.7, seed),
        "all but one of each group": random_drop(classes, 1.0, seed),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_smaller_network_equals_the_masked_one(name: str) -> None:
    graph = topology(name)
    classes = channel_classes(graph)
    for seed in range(3):
        exact = trained(graph, seed).double()
        single = trained(graph, seed)
        for what, dropped in drops(classes, seed).items():
            assert difference(shrink(exact, classes, dropped), masked_reference(exact, classes, dropped)) <= EXACT, what
            assert difference(shrink(single, classes, dropped), masked_reference(single, classes, dropped)) <= SINGLE


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 1_000_000))
def test_the_smaller_network_equals_the_masked_one_on_random_graphs(seed: int) -> None:
    graph = random_graph(seed)
    classes = channel_classes(graph)
    network = trained(graph, seed).double()
    for dropped in drops(classes, seed).values():
        assert difference(shrink(network, classes, dropped), masked_reference(network, classes, dropped)) <= EXACT


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "pre-activation"])
def test_dropped_channels_mattered(name: str) -> None:
    """The comparison with the masked network would mean nothing if both equalled the whole one."""
    graph = topology(name)
    classes = channel_classes(graph)
    network = trained(graph, 1).double()
    assert difference(shrink(network, classes, random_drop(classes, 0.5, 1)), network) > 1e-3


def test_zeroing_filters_without_their_batch_norm_and_readers_is_another_function() -> None:
    graph = topology("chain")
    classes = channel_classes(graph)
    dropped = random_drop(classes, 0.5, 0)
    network = trained(graph, 0).double()
    filters_only = trained(graph, 0).double()
    parameters = dict(filters_only.named_parameters())
    with torch.no_grad():
        for axis in classes.axes:
            if axis.role == "out":
                gone = torch.tensor([int(c) in dropped for c in axis.slots.runs(1)])
                parameters[f"{axis.layer}.{axis.tensor}"][gone] = 0.0
    assert difference(shrink(network, classes, dropped), filters_only) > 1e-2


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_equals_its_masked_self_at_a_budget(name: str) -> None:
    graph = network_named(name)
    classes = channel_classes(graph)
    network = trained(graph).double()
    budget = (0.75, 0.6, 0.5)[list(PRESETS).index(name) % 3]
    step = Prune.model_validate({"type": "prune", "budget": {"macs": budget}, "round_to": 1, "scope": "global"})
    removals = choose_removals(graph, classes, channel_scores(network, classes, "l2", seed=0), step)
    smaller = shrink(network, classes, removals.dropped)
    masked = masked_reference(network, classes, removals.dropped)
    scale = 1 + float(masked(inputs(graph, torch.float64)).detach().abs().max())
    assert difference(smaller, masked) <= EXACT * scale
    assert cost(smaller.graph) == removals.cost
    assert sum(p.numel() for p in smaller.parameters()) == removals.cost.params
    assert cost(smaller.graph).macs <= budget * cost(graph).macs


def test_dropping_nothing_keeps_every_bit() -> None:
    network = trained(topology("residual"))
    same = shrink(network, channel_classes(network.graph), [])
    assert same.graph == network.graph
    assert same is not network
    for (name, before), (other, after) in zip(network.state_dict().items(), same.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(before, after)
        assert before.data_ptr() != after.data_ptr()


def test_kept_channels_keep_their_order_and_values() -> None:
    graph = build_graph(
        read_layers([conv(5, name="a"), layer("batch_norm", name="n"), conv(2, name="b"), *HEAD]), PICTURE
    )
    classes = channel_classes(graph)
    network = trained(graph)
    dropped = classes.slots["a"].ids[[1, 3]].tolist()
    before, after = network.state_dict(), shrink(network, classes, dropped).state_dict()
    kept = [0, 2, 4]
    assert torch.equal(after["a.weight"], before["a.weight"][kept])
    assert torch.equal(after["n.running_var"], before["n.running_var"][kept])
    assert torch.equal(after["b.weight"], before["b.weight"][:, kept])
    assert torch.equal(after["n.num_batches_tracked"], before["n.num_batches_tracked"])
    assert all(tensor.is_contiguous() for tensor in after.values())


def test_dropping_some_and_then_others_leaves_the_same_weights_as_dropping_both() -> None:
    network = trained(topology("residual"))
    classes = channel_classes(network.graph)
    both = random_drop(classes, 0.6, 2)
    first, second = set(both[::2]), both[1::2]
    between = shrink(network, classes, first)
    left = [c for c in classes.all().tolist() if c not in first]
    new = channel_classes(between.graph)
    number = dict(zip(left, new.all().tolist(), strict=True))
    twice = shrink(between, new, [number[c] for c in second]).state_dict()
    for name, tensor in shrink(network, classes, both).state_dict().items():
        assert torch.equal(tensor, twice[name])


def test_the_network_given_stays_as_it_is_and_mode_type_and_frozen_parameters_are_handed_on() -> None:
    network = trained(topology("chain")).double().train()
    network.get_parameter("conv1.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    classes = channel_classes(network.graph)
    smaller = shrink(network, classes, random_drop(classes, 0.5, 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert all(module.training for module in smaller.modules())
    assert smaller.get_parameter("conv1.weight").dtype == torch.float64
    assert not smaller.get_parameter("conv1.weight").requires_grad
    assert smaller.get_parameter("conv2.weight").requires_grad


def test_the_smaller_network_can_be_trained() -> None:
    network = trained(topology("residual"))
    classes = channel_classes(network.graph)
    smaller = shrink(network, classes, random_drop(classes, 0.5, 0)).train()
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1, momentum=0.9)
    smaller(inputs(smaller.graph, torch.float32)).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())


def test_tensors_that_carry_the_names_of_parameters_are_cut_as_these_are() -> None:
    network = trained(topology("depthwise"))
    classes = channel_classes(network.graph)
    dropped = random_drop(classes, 0.5, 0)
    average = {name: parameter.detach() * 2 for name, parameter in network.named_parameters()}
    cut = shrink_tensors(average, classes, dropped)
    for name, parameter in shrink(network, classes, dropped).named_parameters():
        assert torch.equal(cut[name], parameter.detach() * 2)


def test_a_pinned_class_cannot_be_dropped() -> None:
    network = trained(topology("chain"))
    classes = channel_classes(network.graph)
    output = int(classes.slots[network.graph.output].ids[0])
    with pytest.raises(AssertionError, match="network output"):
        shrink(network, classes, [output])


def test_a_rule_that_forgets_a_tie_is_found_out() -> None:
    """The check inside `shrink` can fail: here batch norm is said not to follow its channels."""
    network = trained(topology("pre-activation"))
    classes = channel_classes(network.graph)
    wrong = [axis for axis in classes.axes if axis.role != "norm"]
    broken: Any = Classes(classes.slots, tuple(wrong), classes.groups, classes.pins, classes.slot_count)
    with pytest.raises(AssertionError, match="surgery gave"):
        shrink(network, broken, np.asarray(random_drop(classes, 0.5, 0)).tolist())
