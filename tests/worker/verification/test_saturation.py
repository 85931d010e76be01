"""8-bit files on processors that cut sums of two products off at 16 bits: right by arithmetic, or known not to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import VerificationFailed
from app.network.architecture import Preprocessing
from app.network.graph import Graph
from app.spec.quantize import Scheme
from tests.support.networks.saturation import INT16, IntegerLayer, Machine, dot
from tests.support.networks.topologies import TOPOLOGIES, pictures, topology, trained
from worker.compression.quantization import Quantizer, Sample, rmse_ratio, saturates
from worker.data.dataset import Split
from worker.export.files import portable_tensors
from worker.export.onnx_model import onnx_bytes
from worker.verification.saturation import (
    SATURATES_ABOVE,
    check_pair_sums,
    largest_pair_sum,
    layer_sums,
    read_pair_sums,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
IMAGES = 16


def sample_of(graph: Graph) -> Sample:
    channels = graph.input_shape[0]
    part = Split(pictures(graph, IMAGES), np.zeros(IMAGES, np.int64))
    return Sample(part, Preprocessing(1.0, (0.0,) * channels, (1.0,) * channels), IMAGES)


def quantized(name: str, scheme: Scheme, folder: Path) -> tuple[Quantizer, Path]:
    network = trained(topology(name))
    tensors = {name: tensor.numpy() for name, tensor in portable_tensors(network).items()}
    graph = network.graph
    quantizer = Quantizer(onnx_bytes(graph, tensors), graph, sample_of(graph), folder, scheme, 1)
    return quantizer, quantizer.file(())


def worst(layer: IntegerLayer) -> tuple[int, int]:
    """(the largest sum of two products, how many are cut off), with activations of 255 and the worst neighbours."""
    largest, cut = 0, 0
    for sign in (1, -1):
        ranked_GOR = sign * np.sort(sign * layer.rows.astype(np.int16), axis=-1)[..., ::-1]
        bright = np.full((1, len(ranked_GOR), 1, ranked_GOR.shape[-1]), 255, np.uint8)
        cut += dot(bright, ranked_GOR, saturating=True)[1]
        whole, _ = dot(bright[..., :2], ranked_GOR[..., :2], saturating=False)
        largest = max(largest, int((sign * whole).max()))
    return largest, cut


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_seven_bits_give_the_same_bits_on_a_processor_that_saturates(name: str, tmp_path: Path) -> None:
    quantizer, file = quantized(name, "int8_static", tmp_path)
    assert check_pair_sums(file, "int8_static").largest <= 255 * (64 + 64)
    machine, images = Machine(file), quantizer.calibration.part.images
    exact_NK, _ = machine.logits(images, saturating=False)
    found_NK, cut = machine.logits(images, saturating=True)
    assert cut == 0
    assert np.array_equal(found_NK, exact_NK)
    for layer in machine.layers:
        assert worst(layer)[1] == 0
        bright = np.full((2, *_input_shape(layer)), 255, np.uint8)
        found, cut = layer.compute(bright, saturating=True)
        assert cut == 0
        assert np.array_equal(found, layer.compute(bright, saturating=False)[0])


def _input_shape(layer: IntegerLayer) -> tuple[int, ...]:
    channels = layer.weight.shape[1] * layer.fields.get("group", 1)
    return (channels, *(2 * size for size in layer.weight.shape[2:]))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_bound_is_what_the_worst_activations_and_neighbours_reach(name: str, tmp_path: Path) -> None:
    for scheme in ("int8_static", "int8_vnni"):
        (tmp_path / scheme).mkdir()
        _, file = quantized(name, scheme, tmp_path / scheme)  # type: ignore[arg-type]
        sums = layer_sums(onnx.load(file), file.name)
        layers = Machine(file).layers
        assert sums.keys() == {layer.name for layer in layers}
        for layer in layers:
            largest, cut = worst(layer)
            assert largest == sums[layer.name]
            assert (cut > 0) == (largest > SATURATES_ABOVE)
        assert (max(sums.values()) > SATURATES_ABOVE) == (scheme == "int8_vnni")


def test_eight_bits_lose_the_logits_on_a_processor_that_saturates(tmp_path: Path) -> None:
    """Squeeze-and-excite gates are the worst of the topologies: the logits move by 2.8 standard deviations."""
    quantizer, file = quantized("depthwise", "int8_vnni", tmp_path)
    images = quantizer.calibration.part.images
    wanted_NK = quantizer.logits(quantizer.source, quantizer.calibration)
    found_NK, cut = Machine(file).logits(images, saturating=True)
    assert cut > 100
    assert rmse_ratio(found_NK, wanted_NK) > 1
    assert rmse_ratio(Machine(file).logits(images, saturating=False)[0], wanted_NK) < 0.12
    with pytest.raises(VerificationFailed, match=r"int8-1\.onnx is not right on every processor.* in layer \w+ two "):
        check_pair_sums(file, "int8_static")
    assert check_pair_sums(file, "int8_vnni").right_on == "processors with VNNI or AMX, and ARM"


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_simulation_computes_what_the_runtime_computes(name: str, tmp_path: Path) -> None:
    quantizer, file = quantized(name, "int8_vnni", tmp_path)
    machine, images = Machine(file), quantizer.calibration.part.images
    found_NK, _ = machine.logits(images, saturating=False)
    assert rmse_ratio(found_NK, machine.exact(images)) < 0.005
    if not saturates():  # else the runtime is wrong; between the layers it rounds elsewhere: at most 0.014
        assert rmse_ratio(quantizer.logits(file, quantizer.calibration), found_NK) < 0.03


def test_sums_of_two_are_cut_off_at_16_bits_and_added_in_32() -> None:
    columns = np.full((1, 1, 1, 5), 255, np.uint8)
    weight = np.array([[[127, 127, 127, 127, 127]], [[-127, -127, 64, 64, 1]]], np.int8).reshape(1, 2, 5)
    exact, _ = dot(columns, weight, saturating=False)
    found, cut = dot(columns, weight, saturating=True)
    assert exact.ravel().tolist() == [255 * 5 * 127, 255 * (1 + 128 - 254)]
    assert found.ravel().tolist() == [2 * INT16.max + 255 * 127, INT16.min + 255 * 128 + 255]
    assert cut == 3


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ([[64, 64, 64]], 32_640),
        ([[-64, -64, 64]], 32_640),
        ([[65, 64]], 32_895),
        ([[127, 1, -127]], 32_640),
        ([[127, -127]], 32_385),
        ([[-128]], 32_640),
        ([[100, 0], [0, 100]], 25_500),
        ([[-128, -128]], 65_280),
        ([[0, 0]], 0),
    ],
)
def test_the_bound_takes_the_two_worst_weights_of_one_output_channel(weights: list[list[int]], wanted: int) -> None:
    assert largest_pair_sum(np.array(weights, np.int8)) == wanted


WEIGHT = np.array([[100, 3], [100, 2], [-90, 1]], np.int8)  # 3 x 2: along the first axis two weights of 100 meet


def model_of(*nodes: Any, weight: np.ndarray[Any, Any] = WEIGHT) -> Any:
    tensors = {
        "scale": np.float32(0.1),
        "zero": np.uint8(9),
        "weight": weight,
        "kernel": weight.reshape(*weight.shape, 1, 1),
        "float": weight.astype(np.float32),
    }
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph([*nodes], "network", inputs, outputs, initializers))


def node(kind: str, inputs: str, output: str = "y", **fields: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], name="layer", **fields)


CONSTANT = node("Constant", "", "made", value=numpy_helper.from_array(WEIGHT, "made"))
DEQUANTIZED = node("DequantizeLinear", "weight scale", "w")
TALL, WIDE = 255 * 200, 255 * 103


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([DEQUANTIZED, node("MatMul", "x w")], TALL),
        ([DEQUANTIZED, node("Gemm", "x w")], TALL),
        ([DEQUANTIZED, node("Gemm", "x w", transB=1)], WIDE),
        ([DEQUANTIZED, node("Identity", "w", "same"), node("MatMul", "x same")], TALL),
        ([CONSTANT, node("DequantizeLinear", "made scale", "w"), node("MatMul", "x w")], TALL),
        ([node("DequantizeLinear", "kernel scale", "w"), node("Conv", "x w")], WIDE),
        ([node("QLinearConv", "x scale zero kernel scale zero scale zero")], WIDE),
        ([node("QLinearMatMul", "x scale zero weight scale zero scale zero")], TALL),
        ([node("ConvInteger", "x kernel")], WIDE),
        ([node("MatMulInteger", "x weight")], TALL),
    ],
)
def test_integer_weights_are_found_in_every_operator_that_sums(nodes: list[Any], wanted: int) -> None:
    assert layer_sums(model_of(*nodes), "file") == {"layer": wanted}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("MatMul", "x float")],
        [DEQUANTIZED, node("Mul", "x w")],
        [DEQUANTIZED, node("Add", "x w")],
    ],
)
def test_floats_and_products_that_stand_alone_cannot_saturate(nodes: list[Any], tmp_path: Path) -> None:
    onnx.save(model_of(*nodes), tmp_path / "file.onnx")
    found = check_pair_sums(tmp_path / "file.onnx", "int8_static")
    assert (found.largest, found.layer, found.right_on) == (0, None, "every processor")


def test_weights_of_uint8_are_added_in_32_bits() -> None:
    model = model_of(DEQUANTIZED, node("MatMul", "x w"), weight=np.full((3, 2), 255, np.uint8))
    assert layer_sums(model, "file") == {}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero", "w")],
        [DEQUANTIZED, node("Transpose", "w", "turned"), node("Relu", "turned", "w2")],
    ],
)
def test_weights_that_are_no_constants_cannot_be_verified(nodes: list[Any], tmp_path: Path) -> None:
    onnx.save(model_of(*nodes, node("MatMul", f"x {nodes[-1].output[0]}")), tmp_path / "file.onnx")
    with pytest.raises(
        VerificationFailed, match=r"file\.onnx cannot be verified: the weights of layer layer are no const"
    ):
        read_pair_sums(tmp_path / "file.onnx", "int8_vnni")
