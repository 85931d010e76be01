"""8-bit files: integers in every layer that has a kernel for them, and float32 where the accuracy needs it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from app.compression.int8 import INTEGER, float_layers, integer_layers
from app.errors import QuantizationFailed
from app.network.architecture import Preprocessing
from app.network.graph import Graph, build_graph
from app.network.layers.registry import CONTAINERS, LAYERS, read_layers
from app.spec.quantize import Scheme
from tests.support.networks.saturation import Machine
from tests.support.networks.topologies import CLASSES, HEAD, TOPOLOGIES, conv, layer, pictures, topology, trained
from worker.compression.quantization import (
    Quantizer,
    Sample,
    agreement,
    quantize,
    rmse_ratio,
    saturates,
)
from worker.data.dataset import Split
from worker.export.files import portable_tensors
from worker.export.onnx_model import onnx_bytes
from worker.network import Network
from worker.run.monitor import Interrupted

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def sample_of(graph: Graph, count: int = 48, *, seed: int = 0, labels: Any = None, batch: int = 16) -> Sample:
    channels = graph.input_shape[0]
    part = Split(pictures(graph, count, seed), np.arange(count) % CLASSES if labels is None else labels)
    return Sample(part, Preprocessing(1.0, (0.0,) * channels, (1.0,) * channels), batch)


def quantizer_of(
    network: Network, folder: Path, waiting: Callable[[], None] | None = None, scheme: Scheme = "int8_static"
) -> Quantizer:
    tensors = {name: tensor.numpy() for name, tensor in portable_tensors(network).items()}
    folder.mkdir(exist_ok=True)
    return Quantizer(
        onnx_bytes(network.graph, tensors), network.graph, sample_of(network.graph), folder, scheme, 1, waiting
    )


def optimized(file: Path, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs, counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def stored(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}


def true_logits(quantizer: Quantizer, file: Path) -> np.ndarray[Any, Any]:
    """The logits of the calibration images that the runtime gives where it is right, and else the simulation."""
    if quantizer.scheme == "int8_vnni" and saturates():
        return Machine(file).logits(quantizer.calibration.part.images, saturating=False)[0]
    return quantizer.logits(file, quantizer.calibration)


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_convolution_and_linear_layer_becomes_an_integer_kernel_and_the_logits_stay(
    name: str, scheme: Scheme, tmp_path: Path
) -> None:
    network = trained(topology(name))
    quantizer = quantizer_of(network, tmp_path, scheme=scheme)
    file = quantizer.file(())
    found = optimized(file, tmp_path)
    wanted = Counter(node.type for node in integer_layers(network.graph))
    assert found["QLinearConv"] == wanted["conv"]
    assert found["QGemm"] == wanted["linear"]
    assert not found["Conv"] + found["Gemm"]
    wanted_NK = quantizer.logits(quantizer.source, quantizer.calibration)
    # measured, at most: 0.097 with 7 bits and 0.100 with 8 ("norms"), 0.077 and 0.051 in the other topologies
    assert rmse_ratio(true_logits(quantizer, file), wanted_NK) < 0.12
    assert onnx.load(file).graph.node[-1].output == ["logits"]
    assert not [node for node in onnx.load(file).graph.node if node.op_type == "Gemm" and "logits" in node.name]


FLOAT_OPERATORS = {
    "conv_transpose": "ConvTranspose",
    "batch_norm": "BatchNormalization",
    "group_norm": "InstanceNormalization",
    "layer_norm": "LayerNormalization",
    "prelu": "PRelu",
    "gelu": "Gelu",
    "hardswish": "HardSigmoid",
    "hardsigmoid": "HardSigmoid",
    "tanh": "Tanh",
    "upsample": "Resize",
    "pad": "Pad",
}
MIDDLES: dict[str, list[dict[str, Any]]] = {
    "conv_transpose": [layer("conv_transpose", out_channels=4, kernel_size=3, groups=2)],
    "batch_norm": [layer("relu"), layer("batch_norm")],
    "group_norm": [layer("group_norm", num_groups=2)],
    "upsample": [layer("upsample", scale_factor=2, mode="bilinear")],
    "pad": [layer("pad", padding=1, value=0.5)],
}


@pytest.mark.parametrize("kind", FLOAT_OPERATORS)
def test_a_layer_said_to_stay_in_float32_does_and_its_neighbours_do_not(kind: str, tmp_path: Path) -> None:
    layers = [conv(4), *MIDDLES.get(kind, [layer(kind)]), conv(4), *HEAD]
    network = trained(build_graph(read_layers(layers), (3, 8, 8)))
    assert list(float_layers(network.graph)) == [f"{kind}1"]
    found = optimized(quantizer_of(network, tmp_path).file(()), tmp_path)
    assert found[FLOAT_OPERATORS[kind]] == 1
    assert found["QLinearConv"] == 2
    assert found["DequantizeLinear"] >= 1


PASSING = ("relu", "relu6", "leaky_relu", "sigmoid", "silu", "softmax", "channel_shuffle", "slice")


def test_of_every_layer_of_the_language_is_known_what_8_bits_do_to_it() -> None:
    pools = {"max_pool", "avg_pool", "global_avg_pool", "flatten"}
    joins = {"add", "multiply", "concat"}
    gone = {"dropout", "spatial_dropout"}
    known = INTEGER | FLOAT_OPERATORS.keys() | set(PASSING) | pools | joins | gone
    assert known == {name for name, kind in LAYERS.items() if kind not in CONTAINERS}


@pytest.mark.parametrize("kind", [*PASSING, "max_pool", "avg_pool", "nearest"])
def test_other_layers_pass_8_bits_on(kind: str, tmp_path: Path) -> None:
    pool = {"kernel_size": 2}
    fields = {"channel_shuffle": {"groups": 2}, "slice": {"stop": 2}, "max_pool": pool, "avg_pool": pool}.get(kind, {})
    middle = layer("upsample", scale_factor=2) if kind == "nearest" else layer(kind, **fields)
    network = trained(build_graph(read_layers([conv(4), middle, conv(4), *HEAD]), (3, 8, 8)))
    assert not float_layers(network.graph)
    found = optimized(quantizer_of(network, tmp_path).file(()), tmp_path)
    assert found["QuantizeLinear"] == 1, "the images are quantized once"


def test_the_file_is_a_quarter_has_a_dynamic_batch_and_nothing_of_this_machine_in_it(tmp_path: Path) -> None:
    layers = [conv(32), layer("relu"), conv(32), layer("relu"), layer("flatten"), layer("linear", out_features=3)]
    network = trained(build_graph(read_layers(layers), (3, 8, 8)))
    quantizer = quantizer_of(network, tmp_path)
    file = quantizer.file(())
    data = file.read_bytes()
    assert 0.25 < len(data) / len(quantizer.model) < 0.35
    assert data == quantizer.file(()).read_bytes()
    assert data == quantizer_of(network, tmp_path / "again").file(()).read_bytes()
    assert not re.search(rb"/tmp|/home|/root|/work|ort\.quant|pre_process|\.py\b", data)
    assert str(tmp_path).encode() not in data
    model = onnx.load(file)
    assert model.producer_name == "espalier"
    assert not model.metadata_props
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    weight = stored(file)["conv2.weight_quantized"]
    assert weight.dtype == np.int8
    assert stored(file)["conv2.weight_scale"].shape == (32,), "one scale for each output channel"
    assert not list(Path(tmp_path).glob("ort.quant*"))


def test_the_batch_does_not_change_the_logits(tmp_path: Path) -> None:
    network = trained(topology("residual"))
    quantizer = quantizer_of(network, tmp_path)
    file = quantizer.file(())
    alone, together = (sample_of(network.graph, batch=size) for size in (1, 48))
    assert np.array_equal(quantizer.logits(file, alone), quantizer.logits(file, together))


@pytest.mark.parametrize(("scheme", "largest"), [("int8_static", 64), ("int8_vnni", 127)])
def test_the_scheme_decides_the_range_of_the_weights(scheme: Scheme, largest: int, tmp_path: Path) -> None:
    quantizer = quantizer_of(trained(topology("chain")), tmp_path, scheme=scheme)
    weight = stored(quantizer.file(()))["conv1.weight_quantized"]
    assert np.abs(weight.astype(int)).max() == largest


def test_pruned_weights_are_zero_in_8_bits_and_a_channel_of_zeros_is_no_obstacle(tmp_path: Path) -> None:
    network = trained(topology("chain"))
    weight = network.get_parameter("conv2.weight")
    with torch.no_grad():
        weight[0] = 0
        weight[1, 0] = 0
    found = stored(quantizer_of(network, tmp_path).file(()))["conv2.weight_quantized"]
    zeros = (weight == 0).numpy()
    assert not found[zeros].any()
    assert found[~zeros].any()


def test_a_layer_in_float32_keeps_its_weights_to_the_bit(tmp_path: Path) -> None:
    network = trained(topology("residual"))
    quantizer = quantizer_of(network, tmp_path)
    plain, tensors = stored(quantizer.source), stored(quantizer.file(["residual1_conv2", "linear1"]))
    for name in ("residual1_conv2.weight", "linear1.weight"):
        assert np.array_equal(tensors[name], plain[name])
    assert "conv1.weight" not in tensors
    assert tensors["conv1.weight_quantized"].dtype == np.int8


def test_between_layers_in_float32_nothing_is_rounded(tmp_path: Path) -> None:
    network = trained(topology("products"))
    quantizer = quantizer_of(network, tmp_path)
    others = [name for name in quantizer.names if name != "linear1"]
    rounded = [
        node.input[0] for node in onnx.load(quantizer.file(others)).graph.node if node.op_type == "QuantizeLinear"
    ]
    assert rounded == ["flatten1.output"]


def spoilt(width: int = 8) -> Network:
    """A network whose second convolution gives one channel a thousand times the size of the others: 8 bits lose them."""
    layers = [conv(width), layer("relu"), conv(width), layer("relu"), conv(width), layer("relu"), conv(width), *HEAD]
    network = trained(build_graph(read_layers(layers), (3, 8, 8)))
    with torch.no_grad():
        network.get_parameter("conv2.weight")[0] *= 1000
        network.get_parameter("conv2.bias")[0] = 900
        network.get_parameter("conv3.weight")[:, 0] /= 1000
    return network


def judged(quantizer: Quantizer) -> Sample:
    """Other images, with the answers of the float32 file as labels: its accuracy is 1."""
    sample = sample_of(quantizer.graph, 300, seed=1)
    labels = quantizer.logits(quantizer.source, sample).argmax(axis=1)
    return sample_of(quantizer.graph, 300, seed=1, labels=labels)


def test_the_layers_that_lose_most_are_left_in_float32_and_no_others(tmp_path: Path) -> None:
    quantizer = quantizer_of(spoilt(), tmp_path)
    sample = judged(quantizer)
    errors = quantizer.errors()
    assert set(list(errors)[:2]) == {"conv2", "conv3"}
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    found = quantize(quantizer, sample, most_drop=0.06)  # measured: 0.043 with these two, 0.81 with one
    assert set(found.in_float) == {"conv2", "conv3"}
    assert found.drop <= 0.06
    assert found.tries == 2 + 2, "both calibrations, then 2 and 1 layers of 5"
    labels = sample.part.labels
    assert (quantizer.logits(found.file, sample).argmax(axis=1) == labels).mean() == pytest.approx(1 - found.drop)


def test_a_wish_that_holds_at_once_costs_one_file(tmp_path: Path) -> None:
    quantizer = quantizer_of(trained(topology("chain")), tmp_path)
    found = quantize(quantizer, judged(quantizer), most_drop=0.1)
    assert (found.tries, found.calibration, found.in_float) == (1, "min_max", {})


def test_outliers_of_few_pixels_are_cut_off_first(tmp_path: Path) -> None:
    network = trained(topology("chain"))
    quantizer = quantizer_of(network, tmp_path)
    sample = judged(quantizer)
    with_outlier = pictures(network.graph, 3000)
    with_outlier[0, 0, 0, 0] = 50
    quantizer.calibration = Sample(Split(with_outlier, np.zeros(3000, np.int64)), sample.preprocessing, 100)
    found = quantize(quantizer, sample, most_drop=0.05)
    assert (found.tries, found.calibration, found.in_float) == (2, "percentile", {})


def test_a_wish_that_nothing_meets_gives_the_file_that_loses_least(tmp_path: Path) -> None:
    quantizer = quantizer_of(trained(topology("residual")), tmp_path)
    sample = judged(quantizer)
    found = quantize(quantizer, sample, most_drop=-0.5)  # even float32 would miss it
    assert found.tries == 2 + 3, "6 layers: 3, 4 and 5 of them in float32"
    assert found.drop <= 0.05


def test_excluded_layers_stay_out_of_the_search(tmp_path: Path) -> None:
    quantizer = quantizer_of(spoilt(), tmp_path)
    found = quantize(quantizer, judged(quantizer), most_drop=0.06, exclude=["conv2", "conv3"])
    assert (found.tries, found.in_float) == (1, {})
    assert {"conv2.weight", "conv3.weight"} <= stored(found.file).keys()
    with pytest.raises(QuantizationFailed, match="excluded"):
        quantize(quantizer, judged(quantizer), most_drop=0.02, exclude=quantizer.names)


def test_neighbours_are_measured_together_where_there_are_many_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.compression import quantization

    monkeypatch.setattr(quantization, "MOST_MEASURED", 2)
    quantizer = quantizer_of(trained(topology("residual")), tmp_path)
    errors = quantizer.errors()
    assert list(errors) == sorted(quantizer.names, key=list(errors).index)
    assert len(set(errors.values())) == 2
    assert quantizer.files == 2


def test_a_network_with_broken_numbers_is_one_clear_error(tmp_path: Path) -> None:
    network = trained(topology("chain"))
    with torch.no_grad():
        network.get_parameter("conv2.weight").fill_(float("nan"))
    with pytest.raises(QuantizationFailed, match="ONNX Runtime could not quantize the network: ") as caught:
        quantizer_of(network, tmp_path).file(())
    assert caught.value.document()["code"] == "quantization_failed"
    assert "without quantize" in caught.value.advice


def test_a_wish_to_leave_passes_through_the_library(tmp_path: Path) -> None:
    def cancelled() -> None:
        raise Interrupted("cancel")

    quantizer = quantizer_of(trained(topology("chain")), tmp_path, cancelled)
    with pytest.raises(Interrupted):
        quantizer.file(())


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fpu avx2 avx512f avx512_vnni", False),
        ("AMD64", "fpu avx2 avx_vnni", False),
        ("x86_64", "fpu avx2 avx512f", True),
        ("aarch64", "fp asimd", False),
    ],
)
def test_sums_saturate_on_x86_without_vnni_only(tmp_path: Path, machine: str, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert saturates(tmp_path / "cpuinfo", machine) is expected


def test_distances_of_logits() -> None:
    wanted = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]], np.float32)
    assert agreement(wanted[::-1], wanted) == 0
    assert agreement(wanted + 1, wanted) == 1
    assert rmse_ratio(wanted, wanted) == 0
    assert rmse_ratio(wanted + wanted.std(), wanted) == pytest.approx(1)
