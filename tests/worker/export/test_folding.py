"""Folding a batch norm into the layer before it leaves the function as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from tests.support.networks.topologies import TOPOLOGIES, conv, layer, pictures, topology, trained
from worker.export.files import portable_tensors
from worker.export.folding import fold_batch_norms
from worker.network import Network, build_network

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def folded(network: Network) -> Network:
    tensors = {name: tensor.numpy() for name, tensor in portable_tensors(network).items()}
    graph, found = fold_batch_norms(network.graph, tensors)
    result = build_network(graph).eval()
    result.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})
    return result


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_folded_network_gives_the_same_logits_with_fewer_batch_norms(name: str) -> None:
    network = trained(topology(name))
    smaller = folded(network)
    images = torch.from_numpy(pictures(network.graph, 5))
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), network(images), rtol=1e-5, atol=1e-5)
    fed = [
        node
        for node in network.graph.nodes
        if node.type == "batch_norm"
        and node.inputs[0] in network.graph
        and feeds_it_alone(network.graph, node.inputs[0])
    ]
    assert len(network.graph.nodes) - len(smaller.graph.nodes) == len(fed)


def feeds_it_alone(graph: Graph, name: str) -> bool:
    if graph[name].type not in ("conv", "conv_transpose", "linear") or len(graph.places(graph[name].home)) > 1:
        return False
    return len(graph.consumers(name)) == 1


def test_a_convolution_that_something_else_reads_keeps_its_batch_norm() -> None:
    layers = [conv(3, name="a"), layer("batch_norm"), layer("add", inputs=["a", "batch_norm1"]), layer("flatten")]
    network = trained(build_graph(read_layers(layers), (2, 4, 4)))
    assert [node.type for node in folded(network).graph.nodes] == ["conv", "batch_norm", "add", "flatten"]


def test_a_convolution_that_is_used_twice_keeps_the_batch_norms_after_it() -> None:
    layers = [conv(2, name="a"), layer("batch_norm"), layer("conv", shares="a"), layer("batch_norm"), layer("flatten")]
    network = trained(build_graph(read_layers(layers), (2, 4, 4)))
    assert folded(network).graph == network.graph


def test_the_arguments_do_not_change_and_the_folded_layer_keeps_its_name_and_gains_a_bias() -> None:
    network = trained(topology("chain"))
    tensors = {name: tensor.numpy().copy() for name, tensor in portable_tensors(network).items()}
    before = {name: array.copy() for name, array in tensors.items()}
    graph, found = fold_batch_norms(network.graph, tensors)
    assert all(np.array_equal(tensors[name], before[name]) for name in before)
    assert "conv2.bias" not in tensors
    assert found["conv2.bias"].shape == (5,)
    assert graph.tensors().keys() == found.keys()


def test_grouped_transposed_convolutions_fold_group_by_group() -> None:
    layers = [
        layer("conv_transpose", out_channels=6, kernel_size=2, groups=3, bias=False),
        layer("batch_norm"),
        layer("flatten"),
    ]
    network = trained(build_graph(read_layers(layers), (3, 4, 4)))
    smaller = folded(network)
    images = torch.from_numpy(pictures(network.graph, 3))
    assert [node.type for node in smaller.graph.nodes] == ["conv_transpose", "flatten"]
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), network(images), rtol=1e-5, atol=1e-6)
