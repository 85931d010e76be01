"""Graph -> torch network. Axes: N batch, C channels, x spatial (one to three), K classes.

Every node becomes a sub-module of its own name, so that state_dict keys are `<node>.weight` and hooks can be set by
name; a node that shares the parameters of another has none, the other's module is called again in its place
(`Node.home`). Convolutions, linear layers and norms are torch.nn modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.network.graph import Graph, Node
from app.network.layers import registry as spec
from app.network.layers.names import INPUT


class ForwardStep(NamedTuple):
    """One line of the forward pass: a chain of sub-modules on earlier outputs, and which outputs nobody needs then.

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
                self.add_module(node.name, build_module(node))
        self._steps = forward_steps(graph)

    def forward(self, images_NCx: Tensor) -> Tensor:
        """The output of the last node for a batch."""
        modules = self._modules
        values = {INPUT: images_NCx}
        for output, chain, inputs, frees, _ in self._steps:
            first = modules[chain[0]]
            assert first is not None
            value = first(*[values[name] for name in inputs])
            for name in chain[1:]:
                module = modules[name]
                assert module is not None
                value = module(value)
            for name in frees:
                del values[name]
            values[output] = value
        result: Tensor = values[self.graph.output]
        return result


def calls_of(network: Network, name: str) -> tuple[str, ...]:
    """The nodes that a forward pass computes with the module of node `name`, in the order of the calls."""
    calls = (call for step in network._steps for call in step.calls)
    return tuple(call for call in calls if network.graph[call].home == name)


def build_network(graph: Graph, *, seed: int | None = None) -> Network:
    """The network of a graph with fresh weights, float32 on the CPU, in training mode.

    The weights are drawn from a generator of their own when `seed` is given (torch's global one is left alone), else
    from torch's.
    """
    with torch.device("meta"):
        network = Network(graph)
    _allocate(network)
    initialise(network, None if seed is None else torch.Generator().manual_seed(seed))
    return network


def _allocate(network: Network) -> None:
    """Gives every tensor memory on the CPU. `to_empty` does too, but imports sympy for it: 2 s for a first network."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


INEXACT = (spec.Sigmoid,)
"""torch computes most elements in vectors and the rest one by one: of these, with another last bit."""


def forward_steps(graph: Graph) -> tuple[ForwardStep, ...]:
    """The order in which a forward pass runs, and what it may forget when.

    Max pooling runs before the monotone activation (relu and its like) that only it reads: the result is the same,
    since a function that never falls may be exchanged with a maximum, and the activation then touches a quarter of
    the elements. On two CPU cores a training step of a small network with pooling is a third faster; the graph, the
    export and the report keep the written order. Not before sigmoid: the last bit of its results depends on where an
    element stands in memory (`INEXACT`), and delivered source, in the written order, has to give every bit.
    """
    early: dict[str, Node] = {}  # pooling -> the activation that comes after it
    for node in graph.nodes:
        readers = graph.consumers(node.name)
        exact = node.layer.is_monotone() and not isinstance(node.layer, INEXACT)
        if exact and len(readers) == 1 and isinstance(readers[0].layer, spec.MaxPool):
            early[readers[0].name] = node
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


# --- weights ---


def initialise(network: Network, generator: torch.Generator | None) -> None:
    """Draws the weights of every layer: normal, mean 0, standard deviation `gain / sqrt(fan_in)`.

    After He et al. 2015, arXiv 1502.01852, equation 10; `gain` is `weight_gain`. Biases are 0, norms start as the
    identity, prelu with slope 0.25.
    """
    adds = sum(node.type == "add" for node in network.graph.nodes)
    with torch.no_grad():
        for node in network.graph.nodes:
            if node.shares is not None:
                continue
            module: Any = network.get_submodule(node.name)
            if isinstance(node.layer, spec.Conv | spec.ConvTranspose | spec.Linear):
                deviation = weight_gain(network.graph, node, adds) / math.sqrt(_fan_in(node))
                module.weight.normal_(0.0, deviation, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif node.tensors:
                module.reset_parameters()


def _fan_in(node: Node) -> float:
    """How many products one output element sums, on average; those with padding are zero and not counted.

    On small maps that matters: a 3 x 3 window on 2 x 2 positions meets 4 of its 9.
    """
    weight = node.tensors["weight"].shape
    if isinstance(node.layer, spec.ConvTranspose):
        channels, axes = node.input_shapes[0][0], len(node.shape) - 1
        taps = math.prod(weight[2:]) / math.prod(node.layer.strides(axes))
        return max(1.0, channels / node.layer.group_count(channels) * taps)
    if not isinstance(node.layer, spec.Conv):
        return weight[1]
    axes = len(node.shape) - 1
    geometry = (node.layer.strides(axes), node.layer.dilations(axes), node.layer.paddings(axes))
    met = 1.0
    for size, given, kernel, stride, dilation, (before, _) in zip(
        node.input_shapes[0][1:], node.shape[1:], weight[2:], *geometry, strict=True
    ):
        meetings = 0
        for tap in range(kernel):
            offset = tap * dilation - before  # output o meets position o * stride + offset
            first = max(0, -(offset // stride))
            last = min(given - 1, (size - 1 - offset) // stride)
            meetings += max(0, last - first + 1)
        met *= meetings / given
    return weight[1] * met


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
_LINEAR_UNITS = ("relu", "relu6", "leaky_relu", "prelu", "silu", "gelu", "hardswish")
_NORMS = ("batch_norm", "group_norm", "layer_norm")


def weight_gain(graph: Graph, node: Node, adds: int) -> float:
    """The gain of a layer's weights, by what its output goes into.

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
    kind = following[0].type
    if kind in _LINEAR_UNITS or kind in _NORMS:
        return math.sqrt(2)
    if kind == "add":
        return 1 / math.sqrt(adds)
    return 5 / 3 if kind == "tanh" else 1.0


# --- modules ---


class Sum(nn.Module):
    """The sum of its inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs of one shape -> the same shape."""
        total = inputs[0] + inputs[1]
        for value in inputs[2:]:
            total = total + value
        return total


class Product(nn.Module):
    """The product of its inputs; axes of size 1 are stretched."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs that broadcast -> their common shape."""
        product = inputs[0] * inputs[1]
        for value in inputs[2:]:
            product = product * value
        return product


class Join(nn.Module):
    """Its inputs one behind the other along the channels."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """N x Ci x ... -> N x (sum of Ci) x ..."""
        return torch.cat(inputs, dim=1)


class Channels(nn.Module):
    """The channels [start, stop)."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> N x (stop - start) x ..."""
        return value_NCx[:, self.start : self.stop]


class Shuffle(nn.Module):
    """Channel a * (C / groups) + j goes to j * groups + a (torch.nn.ChannelShuffle, which refuses flat inputs)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> the same shape."""
        batch, channels, *sizes = value_NCx.shape
        blocks = value_NCx.reshape(batch, self.groups, channels // self.groups, *sizes)
        return blocks.transpose(1, 2).flatten(1, 2)


class Padding(nn.Module):
    """torch.nn.functional.pad with `amounts` in its order."""

    def __init__(self, amounts: tuple[int, ...], mode: str, value: float) -> None:
        super().__init__()
        self.amounts = amounts
        self.mode = mode
        self.value = value

    def forward(self, value_NCx: Tensor) -> Tensor:
        """Every axis longer by its amounts."""
        return nn.functional.pad(
            value_NCx, self.amounts, mode=self.mode, value=self.value if self.mode == "constant" else None
        )


class Subsample(nn.Module):
    """Every stride-th position: pooling with a window of one, as a view."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.index = (slice(None), slice(None), *(slice(None, None, stride) for stride in strides))

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> N x C x ceil(size / stride)."""
        return value_NCx[self.index]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels at each position."""

    def forward(self, value_NCx: Tensor) -> Tensor:
        """N x C x ... -> the same shape."""
        return super().forward(value_NCx.movedim(1, -1)).movedim(-1, 1)


_BY_AXES: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "conv_transpose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "max_pool": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "avg_pool": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "global_avg_pool": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "spatial_dropout": (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
}
_WITHOUT_FIELDS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(dim=1),
    "flatten": nn.Flatten,
    "add": Sum,
    "multiply": Product,
    "concat": Join,
}


def build_module(node: Node) -> nn.Module:
    """The torch module of one node, on torch's present default device, with torch's own start values."""
    layer: Any = node.layer
    shape = node.input_shapes[0]
    axes = len(shape) - 1
    if layer.type in _WITHOUT_FIELDS:
        return _WITHOUT_FIELDS[layer.type]()
    if layer.type in _BY_AXES:
        kind: Any = _BY_AXES[layer.type][max(1, axes) - 1]
        return _windowed(kind, layer, shape, axes)
    match layer:
        case spec.Linear():
            return nn.Linear(shape[0], layer.out_features, bias=layer.bias)
        case spec.GroupNorm():
            return nn.GroupNorm(layer.num_groups, shape[0], eps=layer.eps)
        case spec.LayerNorm():
            return ChannelNorm(shape[0], eps=layer.eps)
        case spec.LeakyReLU():
            return nn.LeakyReLU(layer.negative_slope)
        case spec.PReLU():
            return nn.PReLU(shape[0])
        case spec.Dropout():
            return nn.Dropout(layer.p)
        case spec.Upsample():
            return nn.Upsample(scale_factor=tuple(map(float, layer.factors(axes))), mode=layer.mode)
        case spec.Slice():
            return Channels(layer.start, layer.stop)
        case spec.ChannelShuffle():
            return Shuffle(layer.groups)
        case spec.Pad():
            amounts = [amount for pair in reversed(layer.amounts(shape)) for amount in pair]
            return Padding(tuple(amounts if layer.mode == "constant" else amounts[: 2 * axes]), layer.mode, layer.value)
    raise AssertionError(f"no torch module for a layer of type {layer.type}")


def _windowed(kind: Any, layer: Any, shape: spec.Shape, axes: int) -> nn.Module:
    """The module of a layer that torch has in one kind per number of axes."""
    match layer:
        case spec.Conv() | spec.ConvTranspose():
            more: dict[str, Any] = {}
            if isinstance(layer, spec.ConvTranspose):
                more = {"padding": layer.paddings(axes), "output_padding": layer.output_paddings(axes)}
            elif layer.padding == "same":
                more = {"padding": "same"}
            else:
                more = {"padding": tuple(before for before, _ in layer.paddings(axes))}
            return kind(  # type: ignore[no-any-return]
                shape[0],
                layer.out_channels,
                layer.kernel(axes),
                stride=layer.strides(axes),
                dilation=layer.dilations(axes),
                groups=layer.group_count(shape[0]),
                bias=layer.bias,
                **more,
            )
        case spec.MaxPool() | spec.AvgPool() if set(layer.kernel(axes)) == {1} and not any(layer.paddings(axes)):
            return Subsample(tuple(layer.strides(axes)))
        case spec.MaxPool() | spec.AvgPool():
            more = {} if isinstance(layer, spec.MaxPool) else {"count_include_pad": layer.count_include_pad}
            where = {"stride": layer.strides(axes), "padding": layer.paddings(axes), "ceil_mode": layer.ceil_mode}
            return kind(layer.kernel(axes), **where, **more)  # type: ignore[no-any-return]
        case spec.BatchNorm():
            return kind(shape[0], eps=layer.eps, momentum=layer.momentum)  # type: ignore[no-any-return]
        case spec.SpatialDropout():
            return kind(layer.p)  # type: ignore[no-any-return]
    return kind(1)  # type: ignore[no-any-return]


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
