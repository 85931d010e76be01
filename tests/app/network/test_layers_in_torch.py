"""What the graph says about every layer and preset is what torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from app.network.cost import SAFETENSORS_METADATA, cost, layer_rows
from app.network.graph import Graph, build_graph
from app.network.layers.registry import LAYERS, read_layers
from app.network.presets.registry import PRESETS, preset_layers
from tests.support.networks.layer_samples import SAMPLES, LayerList, input_shape
from worker.network import Network, build_network

# torch copies its input for "same" with an even kernel, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

PRESET_WIDTH = 0.125


def _samples() -> list[Any]:
    return [
        pytest.param(network, input_shape(axes), id=f"{kind}-{axes}d-{i}")
        for kind in LAYERS
        for axes in (1, 2, 3)
        for i, network in enumerate(SAMPLES[kind](axes) if kind in SAMPLES else [])
    ]


def _presets() -> list[Any]:
    found = []
    for name, preset in PRESETS.items():
        for axes in preset.axes:
            # The smallest size that the preset takes, unequal on the axes: mixed-up axes must show.
            shape = (3, *(preset.smallest + extra for extra in (1, 0, 2)[:axes]))
            found.append(pytest.param(preset_layers(name, shape, 7, PRESET_WIDTH), shape, id=f"{name}-{axes}d"))
    return found


NETWORKS = _samples() + _presets()


def test_every_layer_type_has_samples_in_each_rank() -> None:
    assert set(SAMPLES) == set(LAYERS)
    for kind, samples in SAMPLES.items():
        for axes in (1, 2, 3):
            assert any(layer["type"] == kind for network in samples(axes) for layer in network), (kind, axes)


def _built(layers: LayerList, shape: tuple[int, ...]) -> tuple[Graph, Network]:
    graph = build_graph(read_layers(layers), shape)
    return graph, build_network(graph, seed=1)


def _walk(network: Network, images: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Each node's output and counted multiply-accumulates, computed node by node in the order of the graph."""
    values, found = {"input": images}, {}
    for node in network.graph.nodes:
        with FlopCounterMode(display=False) as counter:
            values[node.name] = network.get_submodule(node.name)(*[values[name] for name in node.inputs])
        found[node.name] = (values[node.name], counter.get_total_flops() // 2)
    return found


@pytest.mark.parametrize(("layers", "shape"), NETWORKS)
def test_shapes_and_macs_are_those_of_the_modules(layers: LayerList, shape: tuple[int, ...]) -> None:
    graph, network = _built(layers, shape)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    network.eval()
    with torch.no_grad():
        walked = _walk(network, images)
        output = network(images)
    for node in graph.nodes:
        value, macs = walked[node.name]
        assert tuple(value.shape[1:]) == node.shape, node
        assert macs == 2 * node.macs, node
    assert torch.equal(output, walked[graph.output][0])
    assert cost(graph).macs == sum(macs for _, macs in walked.values()) // 2


@pytest.mark.parametrize(("layers", "shape"), NETWORKS)
def test_tensors_and_parameters_are_those_of_the_modules(layers: LayerList, shape: tuple[int, ...]) -> None:
    graph, network = _built(layers, shape)
    for node in graph.nodes:
        module = network.get_submodule(node.name)
        stored = {key: value for key, value in module.state_dict().items() if key != "num_batches_tracked"}
        trained = dict(module.named_parameters())
        assert [(key, tuple(value.shape), key in trained) for key, value in stored.items()] == [
            (key, tensor.shape, tensor.trainable) for key, tensor in node.tensors.items()
        ]
        assert node.params == sum(parameter.numel() for parameter in trained.values())
    assert cost(graph).params == sum(parameter.numel() for parameter in network.parameters())
    assert [row.params for row in layer_rows(graph)] == [node.params for node in graph.nodes]


@pytest.mark.parametrize(("layers", "shape"), NETWORKS)
def test_bytes_are_the_size_of_the_file(layers: LayerList, shape: tuple[int, ...], tmp_path: Path) -> None:
    graph, network = _built(layers, shape)
    tensors = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "weights.safetensors", metadata=SAFETENSORS_METADATA)
    assert cost(graph).bytes == (tmp_path / "weights.safetensors").stat().st_size


@pytest.mark.parametrize(("layers", "shape"), NETWORKS)
def test_the_written_out_layers_give_the_identical_graph(layers: LayerList, shape: tuple[int, ...]) -> None:
    graph = build_graph(read_layers(layers), shape)
    documents = graph.to_layers()
    again = build_graph(read_layers(documents), shape)
    assert again == graph
    assert again.to_layers() == documents
    assert [node.name for node in again.nodes] == [node.name for node in graph.nodes]


@pytest.mark.parametrize(("layers", "shape"), NETWORKS)
def test_training_steps_reach_every_parameter(layers: LayerList, shape: tuple[int, ...]) -> None:
    graph, network = _built(layers, shape)
    output = network(torch.randn(4, *shape, generator=torch.Generator().manual_seed(3)))
    assert output.shape == (4, *graph[graph.output].shape)
    if output.requires_grad:
        (output.square().sum() + output.sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_macs_of_a_known_network_are_the_published_ones() -> None:
    """ResNet-20 on 32 x 32: 0.27 million parameters (He et al. 2015, table 6), 40.6 million multiply-accumulates."""
    graph = build_graph(read_layers(preset_layers("resnet20", (3, 32, 32), 10)), (3, 32, 32), classes=10)
    total = cost(graph)
    assert total.params == pytest.approx(0.27e6, rel=0.03)
    assert total.macs == pytest.approx(40.6e6, rel=0.02)
