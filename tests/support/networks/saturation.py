"""What an 8-bit file computes on x86 without VNNI, in NumPy: sums of two neighbouring products are cut off at 16 bits.

The convolutions and linear layers with int8 weights are computed here, from the integers of the file; the rest, which
has no such sums, by ONNX Runtime in float32 without fusing it into integer kernels.

Axes: N batch, G groups, P positions, O output channels of a group, R what is summed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

Array = np.ndarray[Any, Any]
INT16 = np.iinfo(np.int16)


def dot(columns_NGPR: Array, weight_GOR: Array, *, saturating: bool) -> tuple[Array, int]:
    """(sums `N x G x O x P` in 32 bits, how many sums of two were cut off): VPMADDUBSW, VPMADDWD, VPADDD."""
    products_NGOPR = columns_NGPR[:, :, None].astype(np.int32) * weight_GOR[None, :, :, None].astype(np.int32)
    if products_NGOPR.shape[-1] % 2:
        products_NGOPR = np.pad(products_NGOPR, [(0, 0)] * 4 + [(0, 1)])
    pairs = products_NGOPR[..., ::2] + products_NGOPR[..., 1::2]
    fitting = np.clip(pairs, INT16.min, INT16.max)
    return (fitting if saturating else pairs).sum(axis=-1, dtype=np.int32), int((fitting != pairs).sum())


@dataclass(frozen=True)
class IntegerLayer:
    """A convolution or linear layer that takes uint8 activations, by name `activations`, and int8 weights."""

    name: str
    activations: str
    output: str
    weight: Array
    zero_point: int
    scales: Array
    biases: Array
    fields: dict[str, Any]

    @cached_property
    def rows(self) -> Array:
        """The weights in the order in which x86 sums: kernel positions outside, input channels inside."""
        groups = self.fields.get("group", 1)
        return np.moveaxis(self.weight, 1, -1).reshape(groups, len(self.weight) // groups, -1)

    def columns(self, activations_NCx: Array) -> Array:
        """What each position is computed from, `N x G x P x R`; beyond the border stands the zero point."""
        kernel = self.weight.shape[2:]
        axes, groups = len(kernel), self.fields.get("group", 1)
        pads = self.fields.get("pads", [0] * 2 * axes)
        around = [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)]
        padded = np.pad(activations_NCx, around, constant_values=self.zero_point)
        dilations, strides = self.fields.get("dilations", [1] * axes), self.fields.get("strides", [1] * axes)
        reach = tuple(step * (size - 1) + 1 for step, size in zip(dilations, kernel, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
        steps = (slice(None), slice(None), *(slice(None, None, one) for one in (*strides, *dilations)))
        windows_NCpk = windows[steps]
        count, channels, positions = len(padded), padded.shape[1], windows_NCpk.shape[2 : 2 + axes]
        split = windows_NCpk.reshape(count, groups, channels // groups, prod(positions), prod(kernel))
        return split.transpose(0, 1, 3, 4, 2).reshape(count, groups, prod(positions), -1)

    def compute(self, activations_NCx: Array, *, saturating: bool) -> tuple[Array, int]:
        """(the layer's output in float32 `N x O x P`, or `N x O` of a linear layer; how many sums were cut off)."""
        sums_NGOP, cut = dot(self.columns(activations_NCx), self.rows, saturating=saturating)
        offset_GO = self.zero_point * self.rows.sum(axis=-1, dtype=np.int32)
        whole_NOP = (sums_NGOP - offset_GO[None, :, :, None]).reshape(len(activations_NCx), len(self.weight), -1)
        return (whole_NOP * self.scales[:, None] + self.biases[:, None]).astype(np.float32), cut


class Machine:
    """An 8-bit file, opened; its logits as a processor gives them that saturates, or one that does not."""

    def __init__(self, file: Path) -> None:
        model = onnx.load(file)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.layers = list(self._layers(model.graph))
        whole = onnx.ModelProto.FromString(model.SerializeToString())
        for layer in self.layers:
            whole.graph.output.add().name = layer.output
        self._whole = _session(whole)
        kept = [node for node in model.graph.node if node.output[0] not in {layer.output for layer in self.layers}]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        for layer in self.layers:
            model.graph.input.append(onnx.helper.make_tensor_value_info(layer.output, onnx.TensorProto.FLOAT, None))
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(layer.activations, onnx.TensorProto.UINT8, None)
            )
        unique = {output.name: output for output in model.graph.output}
        del model.graph.output[:]
        model.graph.output.extend(unique.values())
        self._rest = _session(model)

    def exact(self, images_NCx: Array) -> Array:
        """The logits `N x K` that ONNX Runtime computes in float32: no sum of 16 bits is in them."""
        logits_NK: Array = self._whole.run(["logits"], {"images": images_NCx})[0]
        return logits_NK

    def logits(self, images_NCx: Array, *, saturating: bool) -> tuple[Array, int]:
        """(logits `N x K`, how many sums of two were cut off); later layers see what saturation did before them."""
        names = [layer.output for layer in self.layers]
        values = dict(zip(names, self._whole.run(names, {"images": images_NCx}), strict=True))
        cut = 0
        for layer in self.layers:
            (activations,) = self._rest.run([layer.activations], {"images": images_NCx, **values})
            found, more = layer.compute(activations, saturating=saturating)
            values[layer.output] = found.reshape(values[layer.output].shape)
            cut += more
        if "logits" in values:
            return values["logits"], cut
        return self._rest.run(["logits"], {"images": images_NCx, **values})[0], cut

    def _layers(self, graph: Any) -> Iterator[IntegerLayer]:
        makers = {value: node for node in graph.node for value in node.output}
        for node in graph.node:
            sources = [makers.get(name) for name in node.input]
            if node.op_type in ("Conv", "Gemm") and all(one and one.op_type == "DequantizeLinear" for one in sources):
                activations, weights, *biases = ([*source.input] for source in sources if source is not None)
                fields = {field.name: onnx.helper.get_attribute_value(field) for field in node.attribute}
                assert fields.get("auto_pad", b"NOTSET") == b"NOTSET"
                weight, scale = self.constants[weights[0]], self.constants[activations[1]]
                assert weight.dtype == np.int8
                yield IntegerLayer(
                    name=node.name,
                    activations=activations[0],
                    output=node.output[0],
                    weight=weight if node.op_type == "Conv" or fields.get("transB") else weight.T,
                    zero_point=int(self.constants[activations[2]]),
                    scales=np.broadcast_to(scale * self.constants[weights[1]], weight.shape[:1]),
                    biases=self._bias(biases[0], len(weight)) if biases else np.zeros(len(weight), np.float32),
                    fields=fields,
                )

    def _bias(self, inputs: list[str], channels: int) -> Array:
        whole, scale = (self.constants[name] for name in inputs[:2])
        return np.broadcast_to(whole * scale, (channels,)).astype(np.float32)


def _session(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
