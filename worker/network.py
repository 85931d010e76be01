"""Graph -> torch network. Axes: N batch, C channels, x spatial (one to three), K classes.

Every node becomes a sub-module of its own name, so that state_dict keys are `<node>.weight` and hooks can be set by
name; a node that shares the parameters of another has none, the other's module is called again instead
(`Node.home`). What a layer becomes stands in `worker/layers`. Convolutions, linear layers and norms are torch.nn modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.network.blocks import NORMS
from app.network.graph import Graph
from app.network.layers.activations import Activation, Sigmoid
from app.network.layers.names import INPUT
from app.network.layers.pooling import MaxPool
from app.network.node import Node
from worker.layers.registry import rule_of

INEXACT = (Sigmoid,)
"""Layers of whose results the last bit depends on whether torch computes an element in a vector or alone."""


class ForwardStep(NamedTuple):
    """One line of the forward pass: a chain of sub-modules on earlier outputs, and which outputs nobody needs after it.

    `calls` are the nodes whose modules they are, in the same order.
    """

    output: str
    chain: tuple[str, ...]
    inputs: tuple[str, ...]
    frees: tuple[str, ...]
    calls: tuple[str, ...]


class Network(nn.Module):
    """The network of a graph: images N x C x ... -> logits N x K."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        for node in graph.nodes:
            if node.shares is None:
                self.add_module(node.name, rule_of(node).module(node.layer, node))
        self._steps = forward_steps(graph)

    def forward(self, images_NCx: Tensor) -> Tensor:
        """The output of the last node for a batch."""
        values = {INPUT: images_NCx}
        for step in self._steps:
            run_step(self, step, values)
        return values[self.graph.output]


# Functions, not methods: a layer may have any name that nn.Module leaves free.


def steps_of(network: Network) -> tuple[ForwardStep, ...]:
    """The lines of the forward pass in order."""
    return network._steps


def run_step(network: Network, step: ForwardStep, values: dict[str, Tensor]) -> None:
    """Compute one line of the forward pass: add its output to `values`, and forget what nobody needs after it."""
    modules = network._modules
    first = modules[step.chain[0]]
    assert first is not None
    value = first(*[values[name] for name in step.inputs])
    for name in step.chain[1:]:
        module = modules[name]
        assert module is not None
        value = module(value)
    for name in step.frees:
        del values[name]
    values[step.output] = value


class Walk:
    """A forward pass over several batches at once, line by line. `look` is called before each batch; it may raise."""

    def __init__(self, network: Network, batches: Sequence[Tensor], look: Callable[[], None]) -> None:
        self._network = network
        self._look = look
        self._steps = iter(steps_of(network))
        self.values: list[dict[str, Tensor]] = [{INPUT: images_NCx} for images_NCx in batches]

    def run(self, step: ForwardStep) -> None:
        """Compute one line for every batch."""
        for values in self.values:
            self._look()
            run_step(self._network, step, values)

    def run_until(self, name: str) -> None:
        """Compute what is still missing, up to the output of node `name`."""
        while name not in self.values[0]:
            self.run(next(self._steps))


def live_elements(graph: Graph) -> int:
    """The most numbers of one example that a forward pass has to remember at a time."""
    with torch.device("meta"):
        steps = steps_of(Network(graph))
    sizes = {node.name: node.elements for node in graph.nodes} | {INPUT: math.prod(graph.input_shape)}
    live = most = sizes[INPUT]
    for step in steps:
        live += sizes[step.output]
        most = max(most, live)
        live -= sum(sizes[name] for name in step.frees)
    return most


def calls_of(network: Network, name: str) -> tuple[str, ...]:
    """The nodes that a forward pass computes with the module of node `name`, in the order of the calls."""
    calls = (call for step in network._steps for call in step.calls)
    return tuple(call for call in calls if network.graph[call].home == name)


def build_network(graph: Graph, *, seed: int | None = None) -> Network:
    """The network of a graph with fresh weights, float32 on the CPU, in training mode.

    With `seed` the weights are drawn from a generator of their own, and torch's global one does not change; else from
    torch's.
    """
    with torch.device("meta"):
        network = Network(graph)
    _allocate(network)
    initialise(network, None if seed is None else torch.Generator().manual_seed(seed))
    return network


def _allocate(network: Network) -> None:
    """Give every tensor memory on the CPU. `to_empty` does too, but imports sympy for it: 2 s for a first network."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def forward_steps(graph: Graph) -> tuple[ForwardStep, ...]:
    """The order in which a forward pass runs, and after which step it may forget an output.

    Max pooling runs before the monotone activation (relu and its like) that only it reads: the result is the same,
    since a function that never falls may be exchanged with a maximum, and the activation then touches a quarter of
    the elements. On two CPU cores a training step of a small network with pooling is a third faster; the graph, the
    export and the report keep the written order. Not before sigmoid: the last bit of its results depends on where an
    element stands in memory (`INEXACT`), and delivered source, in the written order, has to give every bit.
    """
    early = _pooled_activations(graph)
    late = {node.name for node in early.values()}
    order: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    for node in graph.nodes:
        if node.name in early:
            activation = early[node.name]
            order.append((node.name, (node.name, activation.name), activation.inputs))
        elif node.name not in late:
            order.append((node.name, (node.name,), node.inputs))
    last = {name: position for position, (_, _, inputs) in enumerate(order) for name in inputs}
    frees: list[list[str]] = [[] for _ in order]
    for name, position in last.items():
        frees[position].append(name)
    return tuple(
        ForwardStep(output, tuple(graph[name].home for name in chain), inputs, tuple(done), chain)
        for (output, chain, inputs), done in zip(order, frees, strict=True)
    )


def _pooled_activations(graph: Graph) -> dict[str, Node]:
    """By the name of each max pooling that runs before the activation it reads: that activation."""
    found: dict[str, Node] = {}
    for node in graph.nodes:
        readers = graph.consumers(node.name)
        exact = node.layer.is_monotone() and not isinstance(node.layer, INEXACT)
        if exact and len(readers) == 1 and isinstance(readers[0].layer, MaxPool):
            found[readers[0].name] = node
    return found


# --- weights ---


def initialise(network: Network, generator: torch.Generator | None) -> None:
    """Draw the weights of every layer: normal, mean 0, standard deviation `gain / sqrt(fan_in)`.

    After He et al. 2015, arXiv 1502.01852, equation 10; `gain` is `weight_gain`. Biases are 0, norms start as the
    identity, prelu with slope 0.25.
    """
    adds = sum(node.type == "add" for node in network.graph.nodes)
    with torch.no_grad():
        for node in network.graph.nodes:
            if node.shares is not None:
                continue
            module: Any = network.get_submodule(node.name)
            fan_in = rule_of(node).fan_in
            if fan_in is not None:
                deviation = weight_gain(network.graph, node, adds) / math.sqrt(fan_in(node.layer, node))
                module.weight.normal_(0.0, deviation, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif node.tensors:
                module.reset_parameters()


_THROUGH = (
    "max_pool",
    "avg_pool",
    "dropout",
    "spatial_dropout",
    "flatten",
    "upsample",
    "pad",
    "slice",
    "channel_shuffle",
    "concat",
)
"""Layers that pass values on much as they are: what reads their output decides the gain."""


def weight_gain(graph: Graph, node: Node, adds: int) -> float:
    """The gain of a layer's weights, by the layer that reads its output.

    sqrt(2) before rectifiers (which halve the mean square) and norms (which do not mind), 1 before other layers, 5/3
    before tanh; 1 / sqrt(adds) where it enters one of `adds` sums without a norm, so that a sum of many branches
    stays of order one (as GPT-2 does, Radford et al. 2019, section 2.3); 1 / sqrt(3) for the class scores, torch's
    own start: a loss near ln K.
    """
    following = graph.consumers(node.name)
    while following and following[0].type in _THROUGH:
        following = graph.consumers(following[0].name)
    if not following:
        return 1 / math.sqrt(3)
    reader = following[0]
    if isinstance(reader.layer, Activation):
        return reader.layer.gain
    if reader.type in NORMS:
        return math.sqrt(2)
    return 1 / math.sqrt(adds) if reader.type == "add" else 1.0


# --- values ---


def floating_tensors(network: Network) -> dict[str, Tensor]:
    """The network's parameters and floating buffers by name, not copies: what training changes."""
    return {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}


@torch.no_grad()
def snapshot(network: Network) -> dict[str, Tensor]:
    """Copies of `floating_tensors`, in their own layout, on their own device."""
    return {name: tensor.clone() for name, tensor in floating_tensors(network).items()}


@torch.no_grad()
def assign_tensors(network: Network, tensors: dict[str, Tensor]) -> None:
    """Give the network these values, in place: names, shapes and layouts stay.

    Raises KeyError for a name and RuntimeError for a shape that the network does not have.
    """
    own = floating_tensors(network)
    if missing := own.keys() ^ tensors.keys():
        raise KeyError(f"tensors that are only on one side: {', '.join(sorted(missing))}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}, the network {tuple(own[name].shape)}")
        own[name].copy_(tensor)
