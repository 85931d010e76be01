"""`model.py`: a network as plain PyTorch to read, change and own; it needs torch and safetensors, nothing of ours.

One pass over the graph: a node with tensors becomes an attribute in `__init__`, every node one line of `forward`; one
that shares another's parameters calls the other's attribute. What a layer becomes stands in `worker/layers`. Text of
users enters as JSON inside a string only; layer names are checked words (`app/network/layers/names.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from app.network.architecture import Preprocessing
from app.network.cost import cost
from app.network.graph import Graph
from app.network.layers.names import INPUT
from worker.layers.registry import rule_of
from worker.layers.source_text import INDENT, LINE_LENGTH, join_lines, tuple_text

FIRST_VARIABLE = "images"

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
        shape_tuple=tuple_text(graph.input_shape),
        class_names=_quoted_json(list(class_names)),
    )
    constants = [
        f"SCALE = {preprocessing.scale!r}",
        *join_lines("MEAN = [", [repr(value) for value in preprocessing.mean], "]", ""),
        *join_lines("STD = [", [repr(value) for value in preprocessing.std], "]", ""),
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


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _init(graph: Graph) -> list[str]:
    lines = ["    def __init__(self) -> None:", "        super().__init__()"]
    for node in graph.nodes:
        attribute = rule_of(node).attribute
        if attribute is not None and node.shares is None:
            module, arguments = attribute(node.layer, node)
            lines += join_lines(f"self.{node.name} = nn.{module}(", arguments, ")", INDENT)
    return lines


def _forward(graph: Graph) -> list[str]:
    lines = ["    def forward(self, images: Tensor) -> Tensor:"]
    variables = _variables(graph)
    for node in graph.nodes:
        inputs = [variables[name] for name in node.inputs]
        start, arguments, end = rule_of(node).source(node.layer, node, inputs)
        statement = join_lines(f"{variables[node.name]} = {start}", arguments, end, INDENT)
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
