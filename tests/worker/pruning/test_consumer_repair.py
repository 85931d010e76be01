"""The layers that read removed channels are fitted without a forward pass, to what the whole network gave there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.pruning.channel_classes import channel_classes
from tests.support.networks.dags import random_drop, random_graph
from tests.support.networks.topologies import HEAD, PICTURE, TOPOLOGIES, Layers, conv, layer, topology, trained
from worker.network import Network
from worker.pruning import consumer_repair
from worker.pruning.consumer_repair import ConsumerRepair
from worker.pruning.reconstruction import reconstruct
from worker.pruning.surgery import kept_channels, masked_reference, shrink

CHAIN: Layers = [conv(6, name="cut"), layer("batch_norm"), layer("relu"), conv(5, name="reader"), layer("relu"), *HEAD]


def images(graph: Graph, count: int = 96) -> list[Tensor]:
    return list(torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(11)).split(32))


def chain() -> Network:
    return trained(build_graph(read_layers(CHAIN), PICTURE))


@torch.no_grad()
def output_error(found: Network, whole: Network, name: str) -> float:
    """The relative squared error of a layer's outputs, on images that were not looked at."""
    unseen = torch.randn(64, *whole.graph.input_shape, generator=torch.Generator().manual_seed(13))
    outputs = []
    for network in (found, whole):
        hook = network.get_submodule(name).register_forward_hook(lambda module, given, output: outputs.append(output))
        network.eval()(unseen)
        hook.remove()
    return float((outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum())


def test_the_reader_comes_nearer_and_what_was_removed_stays_zero() -> None:
    network = chain()
    classes = channel_classes(network.graph)
    dropped = [int(c) for c in classes.slots["cut"].ids[:3]]
    repair = ConsumerRepair(network, images(network.graph))
    masked = masked_reference(network, classes, dropped)
    before = output_error(masked, network, "reader")
    others = {name: tensor.clone() for name, tensor in masked.state_dict().items() if not name.startswith("reader")}
    assert repair.apply(masked, classes, dropped) == ("reader",)
    assert output_error(masked, network, "reader") < before
    assert not masked.get_parameter("reader.weight")[:, :3].any()
    assert all(torch.equal(tensor, masked.state_dict()[name]) for name, tensor in others.items())


def chain_with_a_copy() -> Network:
    """The chain, in which channel 3 of the first convolution is channel 0 once more."""
    network = chain()
    with torch.no_grad():
        for key in ("cut.weight", "cut.bias", "batch_norm1.weight", "batch_norm1.bias"):
            network.get_parameter(key)[3] = network.get_parameter(key)[0]
        for key in ("batch_norm1.running_mean", "batch_norm1.running_var"):
            network.get_buffer(key)[3] = network.get_buffer(key)[0]
    return network


def test_a_channel_that_another_can_replace_is_replaced_exactly() -> None:
    network = chain_with_a_copy()
    classes = channel_classes(network.graph)
    dropped = [int(classes.slots["cut"].ids[3])]
    repair = ConsumerRepair(network, images(network.graph))
    masked = masked_reference(network, classes, dropped)
    assert output_error(masked, network, "linear1") > 1e-4
    repair.apply(masked, classes, dropped, ridge=1e-9)
    assert output_error(masked, network, "linear1") < 1e-8


def test_it_is_the_fit_that_a_reconstruction_finds_for_the_first_reader() -> None:
    network = chain_with_a_copy()
    with torch.no_grad():
        network.get_parameter("cut.bias")[3] += 0.05  # or there is nothing for the ridge to weigh
    classes = channel_classes(network.graph)
    dropped = [int(classes.slots["cut"].ids[3])]
    seen = torch.cat(images(network.graph, 100))
    repair = ConsumerRepair(network, [seen[:80]])
    masked = masked_reference(network, classes, dropped)
    repair.apply(masked, classes, dropped)
    smaller, kept = shrink(network, classes, dropped), kept_channels(classes, dropped)
    found = reconstruct(smaller, network, [seen], kept=kept, ridges=[1e-2], frozen={"batch_norm1"})
    assert found.layers["reader"]["reconstructed"]
    left = masked.get_parameter("reader.weight")[:, [0, 1, 2, 4, 5]]
    torch.testing.assert_close(smaller.get_parameter("reader.weight"), left, rtol=1e-4, atol=1e-5)


def test_frozen_and_too_large_layers_are_left_as_the_cut_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    network = chain()
    classes = channel_classes(network.graph)
    dropped = [int(classes.slots["cut"].ids[0])]
    masked = masked_reference(network, classes, dropped)
    assert ConsumerRepair(network, images(network.graph), frozen={"reader"}).apply(masked, classes, dropped) == ()
    monkeypatch.setattr(consumer_repair, "MOST_FEATURES", 53)
    assert ConsumerRepair(network, images(network.graph)).apply(masked, classes, dropped) == ()
    monkeypatch.undo()
    monkeypatch.setattr(consumer_repair, "MOST_BYTES", 100)
    assert ConsumerRepair(network, images(network.graph)).apply(masked, classes, dropped) == ()
    torch.testing.assert_close(masked.state_dict(), masked_reference(network, classes, dropped).state_dict())


def check_zeros(network: Network, seed: int) -> None:
    """What was removed stays zero, whatever joins and shares it, and the second time gives the same bits."""
    classes = channel_classes(network.graph)
    dropped = random_drop(classes, 0.4, seed)
    repair = ConsumerRepair(network, images(network.graph, 32))
    masked = masked_reference(network, classes, dropped)
    repair.apply(masked, classes, dropped)
    again = masked_reference(network, classes, dropped)
    repair.apply(again, classes, dropped)
    expected = masked_reference(masked, classes, dropped)
    for name, tensor in masked.state_dict().items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, expected.state_dict()[name])
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_what_was_removed_stays_zero_in_every_topology(name: str) -> None:
    check_zeros(trained(topology(name)), 2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 1_000_000))
def test_what_was_removed_stays_zero_in_random_graphs(seed: int) -> None:
    check_zeros(trained(random_graph(seed), seed), seed)
