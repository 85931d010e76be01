"""A graph and its weights as one ONNX file: one rule per layer, milliseconds, nothing in it but the network.

`torch.onnx` would trace the module instead: 3 to 4 s for the first network, absolute paths of this machine in every
node to strip, decompositions to pay for at run time. What is written here is proven in onnxruntime before delivery.

Axes: N batch, C channels, x spatial, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from app.network.graph import Graph, Node
from app.network.layers import registry as spec
from app.network.layers.names import INPUT
from worker.export.folding import fold_batch_norms

OPSET = 20  # the first with Gelu
IR_VERSION = 10
INPUT_NAME, OUTPUT_NAME, BATCH_AXIS = "images", "logits", "batch"

Array = NDArray[Any]


def onnx_bytes(graph: Graph, tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The ONNX file of a network in eval mode, batch norm folded where it can be; same input, same bytes.

    Input `images`, float32 [batch, C, ...]; output `logits`, float32 [batch, K]; initializers are called as in the
    safetensors file, one for all layers that share it. The largest network that the job language allows (500 M
    parameters) stays below protobuf's 2 GiB.
    """
    graph, tensors = fold_batch_norms(graph, tensors)
    writer = _Writer(graph)
    for node in graph.nodes:
        own = {name: tensors[f"{node.home}.{name}"] for name in node.uses}
        _RULES[type(node.layer)](writer, node, own)
    model = writer.model()
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class _Writer:
    """Collects the operators and initializers of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._operators: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._values = {INPUT: INPUT_NAME}

    def inputs(self, node: Node) -> list[str]:
        """The values that a node reads."""
        return [self._values[name] for name in node.inputs]

    def tensor(self, node: Node, name: str, array: Array) -> str:
        """The name of an initializer `<layer>.<name>` with this content."""
        full = f"{node.name}.{name}"
        self._initializers[full] = numpy_helper.from_array(np.ascontiguousarray(array), full)
        return full

    def weight(self, node: Node, name: str, array: Array) -> str:
        """The name of the initializer of one tensor: one for all nodes that share it."""
        full = f"{node.home}.{name}"
        if full not in self._initializers:
            self._initializers[full] = numpy_helper.from_array(np.ascontiguousarray(array), full)
        return full

    def sizes(self, node: Node, name: str, sizes: Sequence[int]) -> str:
        """The name of an initializer with whole numbers."""
        return self.tensor(node, name, np.asarray(sizes, np.int64))

    def between(self, node: Node, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """The value of an operator that is not yet the node's output."""
        return self._add(node, kind, inputs, f"{node.name}.part{len(self._operators)}", attributes)

    def output(self, node: Node, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Add the operator that gives the node's output."""
        last = node.name == self._graph.output
        value = self._add(node, kind, inputs, OUTPUT_NAME if last else f"{node.name}.output", attributes)
        self._values[node.name] = value

    def passes(self, node: Node) -> None:
        """Let the node's output be its input: it does nothing outside training."""
        if node.name == self._graph.output:
            self.output(node, "Identity", self.inputs(node))
        else:
            self._values[node.name] = self.inputs(node)[0]

    def model(self) -> onnx.ModelProto:
        """The file: one graph, a dynamic batch axis, no metadata."""
        graph = helper.make_graph(
            self._operators,
            "network",
            [self._stated(INPUT_NAME, self._graph.input_shape)],
            [self._stated(OUTPUT_NAME, self._graph[self._graph.output].shape)],
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph, producer_name="espalier", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
        )

    def _add(self, node: Node, kind: str, inputs: Sequence[str], value: str, attributes: Mapping[str, Any]) -> str:
        name = node.name if value in (OUTPUT_NAME, f"{node.name}.output") else value
        self._operators.append(helper.make_node(kind, list(inputs), [value], name=name, **attributes))
        return value

    @staticmethod
    def _stated(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [BATCH_AXIS, *shape])


Own = Mapping[str, NDArray[np.float32]]
Rule = Callable[[_Writer, Node, Own], None]


def _axes(node: Node) -> int:
    return len(node.input_shapes[0]) - 1


def _per_channel(node: Node, values_C: Array) -> Array:
    """Values per channel, shaped so that they spread over the spatial axes."""
    return values_C.reshape(-1, *[1] * _axes(node))


def _weights(writer: _Writer, node: Node, own: Own) -> list[str]:
    return [writer.weight(node, name, array) for name, array in own.items()]


def _conv(writer: _Writer, node: Node, own: Own) -> None:
    layer, axes = node.layer, _axes(node)
    assert isinstance(layer, spec.Conv)
    paddings = layer.paddings(axes)
    writer.output(
        node,
        "Conv",
        [*writer.inputs(node), *_weights(writer, node, own)],
        kernel_shape=layer.kernel(axes),
        strides=layer.strides(axes),
        dilations=layer.dilations(axes),
        group=layer.group_count(node.input_shapes[0][0]),
        pads=[before for before, _ in paddings] + [behind for _, behind in paddings],
    )


def _conv_transpose(writer: _Writer, node: Node, own: Own) -> None:
    layer, axes = node.layer, _axes(node)
    assert isinstance(layer, spec.ConvTranspose)
    writer.output(
        node,
        "ConvTranspose",
        [*writer.inputs(node), *_weights(writer, node, own)],
        kernel_shape=layer.kernel(axes),
        strides=layer.strides(axes),
        dilations=layer.dilations(axes),
        group=layer.group_count(node.input_shapes[0][0]),
        pads=layer.paddings(axes) * 2,
        output_padding=layer.output_paddings(axes),
    )


def _linear(writer: _Writer, node: Node, own: Own) -> None:
    writer.output(node, "Gemm", [*writer.inputs(node), *_weights(writer, node, own)], transB=1)


def _batch_norm(writer: _Writer, node: Node, own: Own) -> None:
    assert isinstance(node.layer, spec.BatchNorm)
    inputs = [*writer.inputs(node), *_weights(writer, node, own)]
    writer.output(node, "BatchNormalization", inputs, epsilon=node.layer.eps)


def _group_norm(writer: _Writer, node: Node, own: Own) -> None:
    """Statistics over each group as an instance norm of `N x G x rest`, then weight and bias per channel."""
    layer = node.layer
    assert isinstance(layer, spec.GroupNorm)
    groups = layer.num_groups
    apart = writer.between(node, "Reshape", [*writer.inputs(node), writer.sizes(node, "grouped", [0, groups, -1])])
    ones = writer.tensor(node, "ones", np.ones(groups, np.float32))
    zeros = writer.tensor(node, "zeros", np.zeros(groups, np.float32))
    normal = writer.between(node, "InstanceNormalization", [apart, ones, zeros], epsilon=layer.eps)
    whole = writer.between(node, "Reshape", [normal, writer.sizes(node, "shape", [0, *node.shape])])
    weight = writer.weight(node, "weight", _per_channel(node, own["weight"]))
    bias = writer.weight(node, "bias", _per_channel(node, own["bias"]))
    writer.output(node, "Add", [writer.between(node, "Mul", [whole, weight]), bias])


def _layer_norm(writer: _Writer, node: Node, own: Own) -> None:
    """Over the channels at each position; ONNX wants that axis last."""
    layer, axes = node.layer, _axes(node)
    assert isinstance(layer, spec.LayerNorm)
    (value,), weights = writer.inputs(node), _weights(writer, node, own)
    if not axes:
        writer.output(node, "LayerNormalization", [value, *weights], axis=-1, epsilon=layer.eps)
        return
    last = writer.between(node, "Transpose", [value], perm=[0, *range(2, axes + 2), 1])
    normal = writer.between(node, "LayerNormalization", [last, *weights], axis=-1, epsilon=layer.eps)
    writer.output(node, "Transpose", [normal], perm=[0, axes + 1, *range(1, axes + 1)])


def _prelu(writer: _Writer, node: Node, own: Own) -> None:
    slope = writer.weight(node, "weight", _per_channel(node, own["weight"]))
    writer.output(node, "PRelu", [*writer.inputs(node), slope])


def _relu6(writer: _Writer, node: Node, own: Own) -> None:
    low, high = (writer.tensor(node, name, np.asarray(value, np.float32)) for name, value in (("low", 0), ("high", 6)))
    writer.output(node, "Clip", [*writer.inputs(node), low, high])


def _silu(writer: _Writer, node: Node, own: Own) -> None:
    (value,) = writer.inputs(node)
    writer.output(node, "Mul", [value, writer.between(node, "Sigmoid", [value])])


def _leaky_relu(writer: _Writer, node: Node, own: Own) -> None:
    assert isinstance(node.layer, spec.LeakyReLU)
    writer.output(node, "LeakyRelu", writer.inputs(node), alpha=node.layer.negative_slope)


def _operator(kind: str, **attributes: Any) -> Rule:
    """The rule of a layer that is one operator without weights."""
    return lambda writer, node, own: writer.output(node, kind, writer.inputs(node), **attributes)


def _in_pairs(kind: str) -> Rule:
    """The rule of a layer that joins its inputs two at a time, from left to right as torch does."""

    def rule(writer: _Writer, node: Node, own: Own) -> None:
        first, *middle, last = writer.inputs(node)
        for value in middle:
            first = writer.between(node, kind, [first, value])
        writer.output(node, kind, [first, last])

    return rule


def _window(node: Node) -> tuple[dict[str, Any], list[int]]:
    """A pool's attributes with all padding said in numbers, and how far its last windows reach beyond it on each axis.

    `ceil_mode` is not used: runtimes disagree about it, and the graph knows the output's size.
    """
    layer, axes = node.layer, _axes(node)
    assert isinstance(layer, spec.MaxPool | spec.AvgPool)
    kernel, strides, paddings = layer.kernel(axes), layer.strides(axes), layer.paddings(axes)
    beyond = [
        max(0, (out - 1) * stride + size - (room + 2 * padding))
        for out, stride, size, room, padding in zip(
            node.shape[1:], strides, kernel, node.input_shapes[0][1:], paddings, strict=True
        )
    ]
    pads = [*paddings, *(padding + more for padding, more in zip(paddings, beyond, strict=True))]
    return {"kernel_shape": kernel, "strides": strides, "pads": pads}, beyond


def _max_pool(writer: _Writer, node: Node, own: Own) -> None:
    writer.output(node, "MaxPool", writer.inputs(node), **_window(node)[0])


def _avg_pool(writer: _Writer, node: Node, own: Own) -> None:
    """A mean; with `ceil_mode` what lies beyond the padding does not count: a factor per position makes that good."""
    layer, axes = node.layer, _axes(node)
    assert isinstance(layer, spec.AvgPool)
    window, beyond = _window(node)
    if not (layer.count_include_pad and any(beyond)):
        counted = int(layer.count_include_pad)
        writer.output(node, "AveragePool", writer.inputs(node), count_include_pad=counted, **window)
        return
    factor: Array = np.ones((), np.float64)
    for axis, (size, stride, padding) in enumerate(
        zip(layer.kernel(axes), layer.strides(axes), layer.paddings(axes), strict=True)
    ):
        starts = np.arange(node.shape[1 + axis]) * stride
        counted_positions = np.minimum(starts + size, node.input_shapes[0][1 + axis] + 2 * padding) - starts
        factor = np.multiply.outer(factor, size / counted_positions)
    mean = writer.between(node, "AveragePool", writer.inputs(node), count_include_pad=1, **window)
    writer.output(node, "Mul", [mean, writer.tensor(node, "factor", factor.astype(np.float32))])


def _upsample(writer: _Writer, node: Node, own: Own) -> None:
    layer, axes = node.layer, _axes(node)
    assert isinstance(layer, spec.Upsample)
    scales = writer.tensor(node, "scales", np.asarray([1, 1, *layer.factors(axes)], np.float32))
    how = (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if layer.mode == "nearest"
        else {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    )
    writer.output(node, "Resize", [*writer.inputs(node), "", scales], **how)


def _slice(writer: _Writer, node: Node, own: Own) -> None:
    layer = node.layer
    assert isinstance(layer, spec.Slice)
    numbers = (("start", layer.start), ("stop", layer.stop), ("axis", 1))
    writer.output(
        node, "Slice", [*writer.inputs(node), *(writer.sizes(node, name, [value]) for name, value in numbers)]
    )


def _shuffle(writer: _Writer, node: Node, own: Own) -> None:
    layer, (channels, *spatial) = node.layer, node.shape
    assert isinstance(layer, spec.ChannelShuffle)
    blocks = writer.sizes(node, "blocks", [0, layer.groups, channels // layer.groups, *spatial])
    apart = writer.between(node, "Reshape", [*writer.inputs(node), blocks])
    turned = writer.between(node, "Transpose", [apart], perm=[0, 2, 1, *range(3, 3 + len(spatial))])
    writer.output(node, "Reshape", [turned, writer.sizes(node, "shape", [0, channels, *spatial])])


def _pad(writer: _Writer, node: Node, own: Own) -> None:
    layer = node.layer
    assert isinstance(layer, spec.Pad)
    amounts = layer.amounts(node.input_shapes[0])
    pads = writer.sizes(node, "pads", [0, *(before for before, _ in amounts), 0, *(behind for _, behind in amounts)])
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    value = [writer.tensor(node, "value", np.asarray(layer.value, np.float32))] if layer.mode == "constant" else []
    writer.output(node, "Pad", [*writer.inputs(node), pads, *value], mode=modes[layer.mode])


_RULES: dict[type[spec.Layer], Rule] = {
    spec.Conv: _conv,
    spec.ConvTranspose: _conv_transpose,
    spec.Linear: _linear,
    spec.BatchNorm: _batch_norm,
    spec.GroupNorm: _group_norm,
    spec.LayerNorm: _layer_norm,
    spec.ReLU: _operator("Relu"),
    spec.ReLU6: _relu6,
    spec.LeakyReLU: _leaky_relu,
    spec.SiLU: _silu,
    spec.GELU: _operator("Gelu"),
    spec.Hardswish: _operator("HardSwish"),
    spec.Hardsigmoid: _operator("HardSigmoid", alpha=1 / 6, beta=0.5),
    spec.Sigmoid: _operator("Sigmoid"),
    spec.Tanh: _operator("Tanh"),
    spec.Softmax: _operator("Softmax", axis=1),
    spec.PReLU: _prelu,
    spec.Dropout: lambda writer, node, own: writer.passes(node),
    spec.SpatialDropout: lambda writer, node, own: writer.passes(node),
    spec.MaxPool: _max_pool,
    spec.AvgPool: _avg_pool,
    spec.GlobalAvgPool: _operator("GlobalAveragePool"),
    spec.Upsample: _upsample,
    spec.Flatten: _operator("Flatten", axis=1),
    spec.Slice: _slice,
    spec.ChannelShuffle: _shuffle,
    spec.Pad: _pad,
    spec.Add: _in_pairs("Add"),
    spec.Multiply: _in_pairs("Mul"),
    spec.Concat: _operator("Concat", axis=1),
}
