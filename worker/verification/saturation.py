"""Whether sums of two 8-bit products fit into 16 bits, read from the integer weights of a delivered ONNX file.

x86 with AVX2 or AVX-512 and without VNNI multiplies uint8 activations by int8 weights with VPMADDUBSW, which adds two
neighbouring products into 16 bits and cuts the sum off at 32,767. Which two weights are neighbours is the kernel's
choice, so the bound takes the two of an output channel that give the largest sum. What holds here holds on any
processor: VNNI, AMX and ARM add in 32 bits.

Axes: O output channels, R what is summed over (input channels and kernel positions).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from app.errors import JsonValue, VerificationFailed
from app.spec.quantize import Scheme

LARGEST_ACTIVATION = 255  # uint8; the runtime shifts int8 activations to uint8 on x86
SATURATES_ABOVE = 32_767  # int16; the other end, -32,768, is no multiple of 255: one limit serves both signs
EVERYWHERE = "every processor"
VNNI_ONLY = "processors with VNNI or AMX, and ARM"
WEIGHT_OPERANDS = {
    "Conv": 1,
    "Gemm": 1,
    "MatMul": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
}
"""Operators that sum products of activations and weights, with the place of the weights among their inputs.

Add and Mul have no sums: each of their products stands alone. ConvTranspose has no integer kernel.
"""


@dataclass(frozen=True)
class PairSums:
    """The largest sum of two products that an 8-bit file can come to, and the layer in which it does."""

    scheme: Scheme
    largest: int
    layer: str | None

    @property
    def right_on(self) -> str:
        """The processors on which the file computes what was verified, by arithmetic."""
        return EVERYWHERE if self.largest <= SATURATES_ABOVE else VNNI_ONLY

    def document(self) -> dict[str, JsonValue]:
        """The part of the file's entry in report and manifest."""
        return {
            "scheme": self.scheme,
            "largest_pair_sum": self.largest,
            "saturates_above": SATURATES_ABOVE,
            "right_on": self.right_on,
        }


def read_pair_sums(file: Path, scheme: Scheme) -> PairSums:
    """The largest pair sum of an 8-bit ONNX file.

    Raises:
        VerificationFailed: the weights of an integer layer are no constants of the file, so that nothing bounds them.
    """
    sums = layer_sums(onnx.load(file), file.name)
    layer = max(sums, key=lambda name: sums[name], default=None)
    return PairSums(scheme, 0 if layer is None else sums[layer], layer)


def check_pair_sums(file: Path, scheme: Scheme) -> PairSums:
    """The largest pair sum of an 8-bit ONNX file that is right where its scheme says.

    Raises:
        VerificationFailed: the scheme is int8_static and sums can saturate, or the weights cannot be read.
    """
    found = read_pair_sums(file, scheme)
    if scheme == "int8_static" and found.largest > SATURATES_ABOVE:
        raise VerificationFailed(
            f"{file.name} is not right on every processor, as int8_static has to be: in layer {found.layer} two "
            f"products can add up to {found.largest}, and 16 bits hold {SATURATES_ABOVE}"
        )
    return found


def layer_sums(model: Any, name: str) -> dict[str, int]:
    """The largest pair sum of each layer with int8 weights, by the name of the layer; `name` is the file's, for errors."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {value: node for node in model.graph.node for value in node.output}
    sums = {}
    for node in model.graph.node:
        if node.op_type in WEIGHT_OPERANDS:
            operand = node.input[WEIGHT_OPERANDS[node.op_type]]
            maker = makers.get(operand)
            while maker is not None and maker.op_type in ("DequantizeLinear", "Identity"):
                operand, maker = maker.input[0], makers.get(maker.input[0])
            if maker is not None and maker.op_type == "Constant":
                (tensor,) = [field.t for field in maker.attribute if field.name == "value"]
            elif operand in constants:
                tensor = constants[operand]
            else:
                raise VerificationFailed(
                    f"{name} cannot be verified: the weights of layer {node.name} are no constants"
                )
            if tensor.data_type == onnx.TensorProto.INT8:  # the kernels for uint8 weights add in 32 bits
                sums[node.name] = largest_pair_sum(_rows(node, numpy_helper.to_array(tensor)))
    return sums


def largest_pair_sum(weight_OR: NDArray[np.int8]) -> int:
    """The largest sum of two products of activations and weights of one output channel, without its sign."""
    largest = 0
    for side_OR in (weight_OR.astype(np.int32), -weight_OR.astype(np.int32)):
        ranked_OR = np.sort(np.maximum(side_OR, 0), axis=1)
        largest = max(largest, LARGEST_ACTIVATION * int(ranked_OR[:, -2:].sum(axis=1).max(initial=0)))
    return largest


def _rows(node: Any, weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """The weights `O x R` of an operator."""
    if "Conv" in node.op_type:
        return weight.reshape(len(weight), -1)
    turned = any(field.name == "transB" and field.i for field in node.attribute)
    return weight if turned else weight.reshape(-1, weight.shape[-1]).T
