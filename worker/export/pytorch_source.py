"""`model.py`: a network as plain PyTorch to read, change and own; it needs torch and safetensors, nothing of ours.

One pass over the graph: a node with tensors becomes an attribute in `__init__`, every node one line of `forward`; one
that shares another's parameters calls the other's attribute. Text of users enters as JSON inside a string only; layer
names are checked words (`app/network/layers/names.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from app.network.architecture import Preprocessing
from app.network.cost import cost
from app.network.graph import Graph, Node
from app.network.layers import registry as spec
from app.network.layers.names import INPUT

LINE_LENGTH = 88  # ruff's and Black's default: the file stays as it is in most projects
FIRST_VARIABLE = "images"
INDENT = " " * 8  # of a statement in a method

_HEADER = '''\
"""A convolutional network, trained and pruned by Espalier, in plain PyTorch.

Input   float32, N x {input_shape}, after `preprocess`
Output  float32, N x {classes} logits, in the order of CLASSES
Cost    {params} parameters, {macs} multiply-accumulates for one input

    network = load("pruned.safetensors")
    logits = network(preprocess(images))

Needs torch and safetensors.
"""

import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

INPUT_SHAPE = {shape_tuple}
CLASSES = json.loads({class_names})

# The network's input is (x * SCALE - MEAN) / STD, MEAN and STD per channel.
'''

_FUNCTIONS = '''

def preprocess(images: Tensor) -> Tensor:
    """The network's input of raw images N x C x ... as they are stored."""
    mean = torch.tensor(MEAN, device=images.device).view({per_channel})
    std = torch.tensor(STD, device=images.device).view({per_channel})
    return (images.float() * SCALE - mean) / std


def build() -> Network:
    """The network with fresh weights, in eval mode; call `.train()` to train it."""
    return Network().eval()

'''

_LOAD = '''
def load(path: str | os.PathLike[str]) -> Network:
    """The network with the weights of a safetensors file, in eval mode, on the CPU."""
    network = build()
    network.load_state_dict(load_file(path))
    return network
'''

_LOAD_SPARSE = '''
def load(path: str | os.PathLike[str]) -> Network:
    """The network with the weights of a safetensors file, in eval mode, on the CPU.

    `pruned.sparse.safetensors` leaves zeros out: of a tensor with many of them it has
    `<key>.mask`, one bit for each element in row-major order (the lowest bit of a byte
    first), and `<key>.values`, the elements whose bit is 1.
    """
    network = build()
    weights = load_file(path)
    for key, tensor in network.state_dict().items():
        if f"{key}.mask" in weights:
            bits = weights.pop(f"{key}.mask")[:, None] >> torch.arange(8) & 1
            stored = bits.flatten()[: tensor.numel()].view(tensor.shape) == 1
            weights[key] = torch.zeros(tensor.shape)
            weights[key][stored] = weights.pop(f"{key}.values")
    network.load_state_dict(weights)
    return network
'''


def model_source(
    graph: Graph, class_names: Sequence[str], preprocessing: Preprocessing, *, sparse: bool = False
) -> str:
    """The text of `model.py` for a graph: `build()`, `load(path)`, `preprocess(images)`, CLASSES.

    Formatted as ruff does it; state_dict keys and results are those of `worker.network.Network`. With `sparse` its
    `load` reads files of `worker/export/sparse_file.py` too.
    """
    total = cost(graph)
    head = _HEADER.format(
        input_shape=_by(graph.input_shape),
        classes=graph[graph.output].shape[0],
        params=f"{total.params:,}",
        macs=f"{total.macs:,}",
        shape_tuple=_tuple(graph.input_shape),
        class_names=_quoted_json(list(class_names)),
    )
    constants = [
        f"SCALE = {preprocessing.scale!r}",
        *_lines("MEAN = [", [repr(value) for value in preprocessing.mean], "]", ""),
        *_lines("STD = [", [repr(value) for value in preprocessing.std], "]", ""),
    ]
    per_channel = ", ".join(["-1", *["1"] * (len(graph.input_shape) - 1)])
    about = f'    """Images N x {_by(graph.input_shape)} -> logits N x {_by(graph[graph.output].shape)}."""'
    body = ["", "", "class Network(nn.Module):", about, "", *_init(graph), "", *_forward(graph)]
    functions = _FUNCTIONS.format(per_channel=per_channel) + (_LOAD_SPARSE if sparse else _LOAD)
    return head + "\n".join([*constants, *body]) + "\n" + functions


def _quoted_json(value: object) -> str:
    """A Python string literal (ASCII, single quotes, stable under ruff) whose content is the JSON of `value`."""
    text = json.dumps(value).replace("'", "\\u0027")
    return "'" + text.replace("\\", "\\\\") + "'"


def _tuple(values: Sequence[int]) -> str:
    return f"({', '.join(map(str, values))}{',' if len(values) == 1 else ''})"


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _sizes(values: Sequence[int]) -> str:
    """One number if all axes have the same, else a tuple."""
    return str(values[0]) if len(set(values)) == 1 else _tuple(values)


def _lines(start: str, arguments: Sequence[str], end: str, indent: str) -> list[str]:
    """The lines of `start`, arguments, `end` (with the brackets): one if it fits, else one an argument, as in ruff."""
    line = f"{indent}{start}{', '.join(arguments)}{end}"
    if len(line) <= LINE_LENGTH or not arguments:
        return [line]
    return [indent + start, *(f"{indent}    {argument}," for argument in arguments), indent + end]


def _init(graph: Graph) -> list[str]:
    lines = ["    def __init__(self) -> None:", "        super().__init__()"]
    for node in graph.nodes:
        if node.layer.type in _MODULES and node.shares is None:
            module, arguments = _MODULES[node.layer.type](node)
            lines += _lines(f"self.{node.name} = nn.{module}(", arguments, ")", INDENT)
    return lines


def _forward(graph: Graph) -> list[str]:
    lines = ["    def forward(self, images: Tensor) -> Tensor:"]
    variables = _variables(graph)
    for node in graph.nodes:
        start, arguments, end = _expression(node, [variables[name] for name in node.inputs])
        statement = _lines(f"{variables[node.name]} = {start}", arguments, end, INDENT)
        comment = f"  # {_by(node.shape)}"
        if node.shape != node.input_shapes[0] and len(statement) == 1 and len(statement[0] + comment) <= LINE_LENGTH:
            statement[0] += comment
        lines += statement
    return [*lines, f"        return {variables[graph.output]}"]


def _variables(graph: Graph) -> dict[str, str]:
    """The variable of each node's output: `x` where only the next line reads it, else one of its own."""
    variables = {INPUT: FIRST_VARIABLE}
    kept = 0
    for node, following in zip(graph.nodes, [*graph.nodes[1:], None], strict=True):
        readers = [reader.name for reader in graph.consumers(node.name)]
        if not readers or (following is not None and set(readers) == {following.name}):
            variables[node.name] = "x"
        else:
            kept += 1
            variables[node.name] = f"x{kept}"
    return variables


class Expression(NamedTuple):
    """The right-hand side of a node's line in `forward`: `start` and `end` hold the brackets of the arguments."""

    start: str
    arguments: Sequence[str] = ()
    end: str = ""


def _call(function: str, *arguments: str) -> Expression:
    return Expression(f"{function}(", arguments, ")")


def _expression(node: Node, inputs: Sequence[str]) -> Expression:
    layer, x, axes = node.layer, inputs[0], len(node.input_shapes[0]) - 1
    if isinstance(layer, spec.LayerNorm) and axes:  # over the channels, which nn.LayerNorm wants last
        return Expression(f"self.{node.home}(", [f"{x}.movedim(1, -1)"], ").movedim(-1, 1)")
    if layer.type in _MODULES:
        return _call(f"self.{node.home}", x)
    if layer.type in _ELEMENTWISE:
        return _call(_ELEMENTWISE[layer.type], x)
    return _FUNCTIONALS[type(layer)](layer, inputs, node, axes)


def _geometry(sizes: Mapping[str, Sequence[int]], defaults: Mapping[str, int]) -> list[str]:
    """Keyword arguments with one number per axis, without those that are the default on every axis."""
    return [f"{name}={_sizes(sizes[name])}" for name in sizes if set(sizes[name]) != {defaults.get(name)}]


def _conv(node: Node) -> tuple[str, list[str]]:
    layer, shape = node.layer, node.input_shapes[0]
    axes = len(shape) - 1
    assert isinstance(layer, spec.Conv | spec.ConvTranspose)
    sizes: dict[str, Sequence[int]] = {"kernel_size": layer.kernel(axes), "stride": layer.strides(axes)}
    padding = []
    if isinstance(layer, spec.ConvTranspose):
        kind = "ConvTranspose"
        sizes |= {"padding": layer.paddings(axes), "output_padding": layer.output_paddings(axes)}
    elif layer.padding == "same":
        kind, padding = "Conv", ['padding="same"']
    else:
        kind = "Conv"
        sizes["padding"] = [before for before, _ in layer.paddings(axes)]
    sizes["dilation"] = layer.dilations(axes)
    arguments = [str(shape[0]), str(layer.out_channels)]
    arguments += _geometry(sizes, {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}) + padding
    groups = layer.group_count(shape[0])
    arguments += [f"groups={groups}"] if groups != 1 else []
    arguments += [] if layer.bias else ["bias=False"]
    return f"{kind}{axes}d", arguments


def _linear(node: Node) -> tuple[str, list[str]]:
    assert isinstance(node.layer, spec.Linear)
    arguments = [str(node.input_shapes[0][0]), str(node.layer.out_features)]
    return "Linear", arguments + ([] if node.layer.bias else ["bias=False"])


def _batch_norm(node: Node) -> tuple[str, list[str]]:
    assert isinstance(node.layer, spec.BatchNorm)
    arguments = [str(node.shape[0]), *_epsilon(node.layer.eps)]
    arguments += [f"momentum={node.layer.momentum!r}"] if node.layer.momentum != 0.1 else []
    return f"BatchNorm{max(1, len(node.shape) - 1)}d", arguments


def _group_norm(node: Node) -> tuple[str, list[str]]:
    assert isinstance(node.layer, spec.GroupNorm)
    return "GroupNorm", [str(node.layer.num_groups), str(node.shape[0]), *_epsilon(node.layer.eps)]


def _layer_norm(node: Node) -> tuple[str, list[str]]:
    assert isinstance(node.layer, spec.LayerNorm)
    return "LayerNorm", [str(node.shape[0]), *_epsilon(node.layer.eps)]


def _prelu(node: Node) -> tuple[str, list[str]]:
    return "PReLU", [str(node.shape[0])]


def _epsilon(eps: float) -> list[str]:
    return [f"eps={eps!r}"] if eps != 1e-5 else []


_MODULES: dict[str, Callable[[Node], tuple[str, list[str]]]] = {
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
}

_ELEMENTWISE = {
    "relu": "F.relu",
    "relu6": "F.relu6",
    "silu": "F.silu",
    "gelu": "F.gelu",
    "hardswish": "F.hardswish",
    "hardsigmoid": "F.hardsigmoid",
    "sigmoid": "torch.sigmoid",
    "tanh": "torch.tanh",
}


def _pool(layer: spec.MaxPool | spec.AvgPool, inputs: Sequence[str], node: Node, axes: int) -> Expression:
    if set(layer.kernel(axes)) == {1} and not any(layer.paddings(axes)):  # every stride-th position
        return Expression(f"{inputs[0]}[:, :, {', '.join(f'::{stride}' for stride in layer.strides(axes))}]")
    sizes: dict[str, Sequence[int]] = {"kernel_size": layer.kernel(axes)}
    if layer.strides(axes) != layer.kernel(axes):
        sizes["stride"] = layer.strides(axes)
    sizes["padding"] = layer.paddings(axes)
    arguments = [inputs[0], *_geometry(sizes, {"padding": 0})]
    arguments += ["ceil_mode=True"] if layer.ceil_mode else []
    if isinstance(layer, spec.MaxPool):
        return _call(f"F.max_pool{axes}d", *arguments)
    arguments += [] if layer.count_include_pad else ["count_include_pad=False"]
    return _call(f"F.avg_pool{axes}d", *arguments)


def _pad(layer: spec.Pad, inputs: Sequence[str], node: Node, axes: int) -> Expression:
    amounts = [number for pair in reversed(layer.amounts(node.input_shapes[0])) for number in pair]
    if layer.mode != "constant":  # the other modes take spatial axes only
        return _call("F.pad", inputs[0], _tuple(amounts[: 2 * axes]), f'mode="{layer.mode}"')
    return _call("F.pad", inputs[0], _tuple(amounts), *([f"value={layer.value!r}"] if layer.value else []))


def _upsample(layer: spec.Upsample, inputs: Sequence[str], node: Node, axes: int) -> Expression:
    factors = f"scale_factor={_sizes(layer.factors(axes))}"
    return _call("F.interpolate", inputs[0], factors, f'mode="{layer.mode}"')


def _shuffle(layer: spec.ChannelShuffle, inputs: Sequence[str], node: Node, axes: int) -> Expression:
    return Expression(f"{inputs[0]}.unflatten(1, ({layer.groups}, -1)).transpose(1, 2).flatten(1, 2)")


def _joined(inputs: Sequence[str], sign: str) -> Expression:
    """`a + b + c`; in parentheses with a line for each where they do not fit on one."""
    line = f" {sign} ".join(inputs)
    if len(line) <= LINE_LENGTH - 20:
        return Expression(line)
    first, *rest = inputs
    lines = [f"{INDENT}    {first}", *(f"{INDENT}    {sign} {name}" for name in rest)]
    return Expression("(\n" + "\n".join(lines) + f"\n{INDENT})")


def _concat(layer: spec.Concat, inputs: Sequence[str], node: Node, axes: int) -> Expression:
    """`torch.cat([a, b], dim=1)`; the list has a line for each input where they do not fit on one."""
    listed = _lines("[", inputs, "]", INDENT + "    ")
    return _call("torch.cat", "\n".join(listed).strip(), "dim=1")


_FUNCTIONALS: dict[type[spec.Layer], Callable[[Any, Sequence[str], Node, int], Expression]] = {
    spec.LeakyReLU: lambda layer, inputs, node, axes: _call("F.leaky_relu", inputs[0], repr(layer.negative_slope)),
    spec.Softmax: lambda layer, inputs, node, axes: _call("F.softmax", inputs[0], "dim=1"),
    spec.Dropout: lambda layer, inputs, node, axes: _call("F.dropout", inputs[0], repr(layer.p), "self.training"),
    spec.SpatialDropout: lambda layer, inputs, node, axes: _call(
        f"F.dropout{axes}d", inputs[0], repr(layer.p), "self.training"
    ),
    spec.MaxPool: _pool,
    spec.AvgPool: _pool,
    spec.GlobalAvgPool: lambda layer, inputs, node, axes: _call(f"F.adaptive_avg_pool{axes}d", inputs[0], "1"),
    spec.Upsample: _upsample,
    spec.Flatten: lambda layer, inputs, node, axes: _call("torch.flatten", inputs[0], "1"),
    spec.Slice: lambda layer, inputs, node, axes: Expression(f"{inputs[0]}[:, {layer.start}:{layer.stop}]"),
    spec.ChannelShuffle: _shuffle,
    spec.Pad: _pad,
    spec.Add: lambda layer, inputs, node, axes: _joined(inputs, "+"),
    spec.Multiply: lambda layer, inputs, node, axes: _joined(inputs, "*"),
    spec.Concat: _concat,
}
