"""Graph -> torch: the same results as the written order, weights from a seed, depth that trains."""

from __future__ import annotations

import copy

import pytest
import torch

from app.network.graph import Graph, build_graph
from app.network.layers.activations import Activation
from app.network.layers.registry import LAYERS, read_layers
from tests.support.networks.layer_samples import LayerList, conv, layer
from worker.layers.registry import rule_of
from worker.network import INEXACT, Network, build_network, forward_steps

PICTURE = (3, 12, 12)
HEAD = [layer("global_avg_pool"), layer("flatten"), layer("linear", out_features=10)]
POOL = layer("max_pool", kernel_size=3, stride=2, padding=1, ceil_mode=True)


def graph_of(layers: LayerList, shape: tuple[int, ...] = PICTURE) -> Graph:
    return build_graph(read_layers(layers), shape)


def images_of(shape: tuple[int, ...], batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(5))


def in_written_order(network: Network, images: torch.Tensor) -> torch.Tensor:
    values = {"input": images}
    for node in network.graph.nodes:
        values[node.name] = network.get_submodule(node.name)(*[values[name] for name in node.inputs])
    return values[network.graph.output]


ACTIVATIONS = {name: kind for name, kind in LAYERS.items() if issubclass(kind, Activation)}
MONOTONE = [name for name, kind in ACTIVATIONS.items() if kind().is_monotone() and not issubclass(kind, INEXACT)]


@pytest.mark.parametrize("kind", MONOTONE)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_pooling_before_a_monotone_activation_changes_no_result_and_no_gradient(kind: str, axes: int) -> None:
    shape = (3, 9, 8, 7)[: axes + 1]
    graph = graph_of([conv(5), layer("batch_norm"), layer(kind), POOL, conv(4), *HEAD], shape)
    assert ("max_pool1", f"{kind}1") in [step.chain for step in forward_steps(graph)]
    network = build_network(graph, seed=1).double()
    images = images_of(shape).double()
    fast = network(images)
    wanted = in_written_order(network, images)
    assert torch.equal(fast, wanted)
    got = torch.autograd.grad(fast.square().sum(), list(network.parameters()), retain_graph=True)
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), list(network.parameters())), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_that_is_called_monotone_never_falls_and_others_do(kind: str) -> None:
    node = graph_of([conv(1, kernel_size=1, padding=0), layer(kind), *HEAD])[f"{kind}1"]
    module = rule_of(node).module(node.layer, node).double()
    if kind == "prelu":
        with torch.no_grad():
            module.weight.fill_(-0.5)  # type: ignore[union-attr, operator]
    if kind == "softmax":  # over the channels: what another channel gains, this one loses
        values = torch.stack([torch.zeros(2001), torch.linspace(-20, 20, 2001)]).double()[None]
    else:
        values = torch.linspace(-20, 20, 2001).double()[None, None]
    falls = bool((module(values)[0, 0].diff() < -1e-12).any())
    assert falls != ACTIVATIONS[kind]().is_monotone()


@pytest.mark.parametrize("kind", [*sorted(set(ACTIVATIONS) - set(MONOTONE)), "batch_norm", "dropout"])
def test_pooling_stays_after_layers_that_are_not_monotone(kind: str) -> None:
    steps = forward_steps(graph_of([conv(5), layer(kind), POOL, *HEAD]))
    assert all(len(step.chain) == 1 for step in steps)


def test_pooling_stays_after_sigmoid_whose_last_bit_depends_on_the_place_in_memory() -> None:
    assert all(len(step.chain) == 1 for step in forward_steps(graph_of([conv(5), layer("sigmoid"), POOL, *HEAD])))
    values = torch.randn(69, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([torch.sigmoid(value.reshape(1))[0] for value in values])
    assert torch.allclose(torch.sigmoid(values), alone, rtol=1e-6)  # not equal on every machine


def test_pooling_stays_after_a_leaky_relu_that_falls() -> None:
    steps = forward_steps(graph_of([conv(5), layer("leaky_relu", negative_slope=-0.1), POOL, *HEAD]))
    assert all(len(step.chain) == 1 for step in steps)


def test_pooling_stays_after_an_activation_that_others_read_too_and_before_average_pooling() -> None:
    shared = [
        conv(5),
        layer("relu"),
        POOL,
        conv(5, stride=2, padding=2, inputs=["relu1"]),
        layer("add", inputs=["max_pool1", "conv2"]),
    ]
    average = [conv(5), layer("relu"), layer("avg_pool", kernel_size=2), *HEAD]
    for layers in (shared, average):
        assert all(len(step.chain) == 1 for step in forward_steps(graph_of(layers)))


def test_values_are_forgotten_after_their_last_reader() -> None:
    graph = graph_of([conv(3), layer("relu"), conv(3), layer("add", inputs=["conv2", "conv1"]), *HEAD])
    assert {step.output: set(step.frees) for step in forward_steps(graph)} == {
        "conv1": {"input"},
        "relu1": set(),
        "conv2": {"relu1"},
        "add1": {"conv2", "conv1"},
        "global_avg_pool1": {"add1"},
        "flatten1": {"global_avg_pool1"},
        "linear1": {"flatten1"},
    }


def test_keys_are_the_graphs_tensors_in_its_order() -> None:
    graph = graph_of(
        [conv(4), layer("batch_norm"), layer("prelu"), layer("residual", layers=[conv(6, stride=2)]), *HEAD]
    )
    keys = [key for key in build_network(graph).state_dict() if not key.endswith("num_batches_tracked")]
    assert keys == list(graph.tensors())


DEEP = [conv(48), layer("relu"), *[conv(48), layer("relu")] * 30, *HEAD]


def test_a_seed_gives_the_same_weights_and_does_not_use_torchs_generator() -> None:
    graph = graph_of(DEEP)
    before = torch.random.get_rng_state()
    first, second, other = (build_network(graph, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert not torch.equal(first.state_dict()["conv1.weight"], other.state_dict()["conv1.weight"])


def test_without_a_seed_weights_come_from_torchs_generator() -> None:
    graph = graph_of([conv(4), *HEAD])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = build_network(graph), build_network(graph)
        torch.manual_seed(3)
        again = build_network(graph)
    assert torch.equal(first.state_dict()["conv1.weight"], again.state_dict()["conv1.weight"])
    assert not torch.equal(first.state_dict()["conv1.weight"], second.state_dict()["conv1.weight"])


def test_norms_and_biases_start_as_the_identity() -> None:
    graph = graph_of([conv(4), layer("batch_norm"), layer("prelu"), conv(4), layer("group_norm", num_groups=2), *HEAD])
    state = build_network(graph, seed=0).state_dict()
    for name in ("batch_norm1", "group_norm1"):
        assert torch.equal(state[f"{name}.weight"], torch.ones(4))
        assert torch.equal(state[f"{name}.bias"], torch.zeros(4))
    assert torch.equal(state["batch_norm1.running_mean"], torch.zeros(4))
    assert torch.equal(state["batch_norm1.running_var"], torch.ones(4))
    assert state["batch_norm1.num_batches_tracked"] == 0
    assert torch.equal(state["prelu1.weight"], torch.full((4,), 0.25))
    assert all(not state[key].any() for key in ("conv1.bias", "conv2.bias", "linear1.bias"))


CHAIN_OF_SUMS = [conv(16), *[layer("residual", layers=[conv(16), layer("relu"), conv(16)]), layer("relu")] * 16, *HEAD]


@pytest.mark.parametrize(
    ("layers", "name", "shape"),
    [
        (DEEP, "relu31", PICTURE),
        (DEEP, "relu31", (3, 2, 2)),
        (DEEP, "relu31", (3, 40)),
        (CHAIN_OF_SUMS, "relu16", PICTURE),
    ],
)
def test_activations_and_gradients_keep_their_size_through_depth_without_norms(
    layers: LayerList, name: str, shape: tuple[int, ...]
) -> None:
    graph = graph_of(layers, shape)
    network = build_network(graph, seed=0)
    seen: list[torch.Tensor] = []
    network.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    network(images_of(shape, 16)).square().mean().backward()
    assert 0.1 < float(seen[0].detach().square().mean().sqrt()) < 10
    first, last = (network.get_parameter(f"{key}.weight").grad for key in ("conv1", "linear1"))
    assert first is not None
    assert last is not None
    assert 0.01 < float(first.norm() / last.norm()) < 100


def test_a_transposed_convolution_keeps_the_size_of_its_input() -> None:
    up = layer("conv_transpose", out_channels=16, kernel_size=4, stride=2, padding=1)
    network = build_network(graph_of([up, layer("relu")], (16, 12, 12)), seed=0)
    root_mean_square = float(network(images_of((16, 12, 12))).detach().square().mean().sqrt())
    assert 0.7 < root_mean_square < 1.4


def test_dropout_works_in_training_only() -> None:
    network = build_network(graph_of([conv(8), layer("spatial_dropout"), layer("dropout"), *HEAD]), seed=0)
    images = images_of(PICTURE)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_a_copy_is_independent() -> None:
    network = build_network(graph_of([conv(4), layer("relu"), POOL, *HEAD]), seed=0)
    images = images_of(PICTURE)
    wanted = network(images)
    other = copy.deepcopy(network)
    assert other.graph is network.graph
    with torch.no_grad():
        other.get_parameter("conv1.weight").zero_()
    assert torch.equal(network(images), wanted)
    assert not torch.equal(other(images), wanted)


def test_channels_last_gives_the_same_results() -> None:
    block = layer("residual", layers=[conv(12, stride=2), layer("batch_norm")], shortcut="pad")
    layers = [conv(8), layer("relu"), POOL, block, layer("squeeze_excite"), layer("layer_norm"), *HEAD]
    network = build_network(graph_of(layers), seed=0).double().eval()
    images = images_of(PICTURE).double()
    wanted = network(images)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.allclose(network(images.contiguous(memory_format=torch.channels_last)), wanted, atol=1e-12)
