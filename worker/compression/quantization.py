"""Static 8-bit quantization of an ONNX file through ONNX Runtime, and which layers stay in float32 for its accuracy.

Which layers *can* be quantized says `app/compression/int8.py`; which of these *stay in float32* is chosen here
(`quantize`), by trying files on a sample; `worker/run/int8.py` draws the sample, and judges and reports the file of a
job; `app/spec/quantize.py` is what the job asks for.

Activations are uint8 with a zero point, one range per tensor; weights int8, symmetric, one scale per output channel;
biases int32; written as QuantizeLinear / DequantizeLinear pairs (Jacob et al., arXiv 1712.05877; Krishnamoorthi,
arXiv 1806.08342, section 3). The runtime turns them into integer kernels. The logits stay in float32.

Axes: N batch, C channels, x spatial, K classes.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from app.compression.int8 import integer_layers
from app.errors import EspalierError, QuantizationFailed
from app.network.architecture import Preprocessing
from app.network.cost import cost
from app.network.graph import Graph
from app.spec.quantize import Scheme
from worker.data.dataset import Split
from worker.export.onnx_model import OUTPUT_NAME
from worker.verification.clean_process import onnx_network
from worker.verification.verification import Logits

QUANTIZED_OPERATORS = frozenset({"Conv", "Gemm"})
OPERATORS_WITH_WEIGHTS = QUANTIZED_OPERATORS | {"ConvTranspose"}
OPERATORS_BETWEEN = frozenset({"Add", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax"})
"""Computed in 8 bits where layers before and after are; with a constant operand they stay in float32."""
OPERATORS_AFTER = frozenset(
    {"Relu", "Clip", "MaxPool", "AveragePool", "Flatten", "Reshape", "Resize", "Slice", "Transpose"}
)
"""Computed in 8 bits where the layers that they read are."""
MOST_NUMBERS_TOGETHER = 1 << 24  # numbers that all layers compute for a calibration batch: ONNX Runtime keeps them all
HISTOGRAM_NUMBERS = 3e8  # of all tensors that go into histograms, 50 ns each
PERCENTILE = 99.999  # of the values of a tensor: 99.99 cuts pixels off, and trebles the error of a small network
MOST_MEASURED = 64  # layers, or runs of neighbours where there are more, whose error is measured one by one
MEASURED_MACS = 2e10  # spent on each of them
FEWEST_IMAGES, MOST_IMAGES = 8, 256  # on which an error is measured
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})

Calibration = Literal["min_max", "percentile"]
FloatImages = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Examples of one part as the network takes them: float32 images in batches, and N labels."""

    part: Split
    preprocessing: Preprocessing
    batch_size: int

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.part) // self.batch_size)

    def batch(self, number: int) -> FloatImages:
        """The images N x C x ... of one batch, preprocessed."""
        start = number * self.batch_size
        return self.preprocessing.apply(self.part.read(np.arange(start, min(start + self.batch_size, len(self.part)))))

    def first(self, count: int) -> Sample:
        """The first `count` of them, or all if there are fewer."""
        return Sample(self.part.take(np.arange(min(count, len(self.part)))), self.preprocessing, self.batch_size)


@dataclass(frozen=True)
class Quantized:
    """An 8-bit file: how it was made, and how good it is on the sample on which it was chosen.

    `in_float` has the layers that stay in float32 for the accuracy, each with its error: the root mean square by
    which the logits move when it alone is quantized, in standard deviations of the logits. `drop` is the loss of
    accuracy against float32 on the sample, `tries` the number of files that were compared.
    """

    file: Path
    calibration: Calibration
    in_float: Mapping[str, float]
    drop: float
    rmse: float
    tries: int = 1


def saturates(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> bool:
    """Whether sums of two 8-bit products overflow on this processor: x86 without VNNI adds them up in 16 bits.

    Files of the scheme int8_static do not depend on it; one of int8_vnni cannot be verified where it holds.
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i686", "x86"):
        return False
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return VNNI.isdisjoint(flags)


def numbers_of(graph: Graph) -> int:
    """Numbers that all layers together compute for one image."""
    return sum(node.elements for node in graph.nodes)


def calibration_batch_size(graph: Graph) -> int:
    """Images per calibration batch, at most 32."""
    return max(1, min(32, MOST_NUMBERS_TOGETHER // numbers_of(graph)))


def logits_of(model: Path, sample: Sample, *, threads: int, waiting: Callable[[], None] | None = None) -> Logits:
    """Logits `N x K` that an ONNX file gives for the sample, in the settings in which files are verified.

    `waiting` is called between batches; it may raise to give up.
    """
    with _translated():
        network = onnx_network(str(model), threads)
    parts = []
    for number in range(len(sample)):
        images_NCx = sample.batch(number)
        with _translated():
            parts.append(network(images_NCx))
        if waiting is not None:
            waiting()
    return np.concatenate(parts)


def agreement(found_NK: Logits, wanted_NK: Logits) -> float:
    """The part of the examples (0 to 1) for which both give the same class."""
    return float((found_NK.argmax(axis=1) == wanted_NK.argmax(axis=1)).mean())


def rmse_ratio(found_NK: Logits, wanted_NK: Logits) -> float:
    """Root mean square difference, in standard deviations of `wanted`; 0 where both are the same constant."""
    difference = float(np.sqrt(np.square(found_NK.astype(np.float64) - wanted_NK).mean()))
    return difference / max(float(wanted_NK.astype(np.float64).std()), 1e-12)


@dataclass
class Quantizer:
    """Makes 8-bit files of one float32 ONNX file, `model`, of the network `graph`.

    Ranges are measured once for each calibration, on `calibration`. `folder` is for files that are needed meanwhile.
    `scheme` decides the range of the weights: -64 to 64 (int8_static), or -127 to 127 (int8_vnni).
    """

    model: bytes
    graph: Graph
    calibration: Sample
    folder: Path
    scheme: Scheme
    threads: int
    waiting: Callable[[], None] | None = None
    files: int = field(default=0, init=False)

    @cached_property
    def source(self) -> Path:
        """The float32 file, marked as what ONNX Runtime's own pre-processing gives: shapes known, norms folded."""
        model = onnx.load_from_string(self.model)
        model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        path = self.folder / "float32.onnx"
        onnx.save(model, path)
        return path

    @cached_property
    def operators(self) -> Any:
        """The file's graph of operators."""
        return onnx.load(self.source).graph

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The layers that may be quantized, by the name under which their weights are stored, in order."""
        return tuple(dict.fromkeys(node.home for node in integer_layers(self.graph)))

    def file(self, in_float: Collection[str], calibration: Calibration = "min_max") -> Path:
        """Write the 8-bit file in which the layers `in_float` stay as they are; its path.

        Raises:
            QuantizationFailed: ONNX Runtime cannot quantize the network.
            OSError: the disk is full.
        """
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        self.files += 1
        made, path = self.folder / "made.onnx", self.folder / f"int8-{self.files}.onnx"
        excluded = self._excluded_operators(in_float)
        images = self.calibration
        if calibration == "percentile":
            images = images.first(max(FEWEST_IMAGES, int(HISTOGRAM_NUMBERS / numbers_of(self.graph))))
        methods = {"min_max": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
        with _translated(), _temporary_files_in(self.folder), redirect_stdout(StringIO()):
            quantize_static(
                self.source,
                made,
                _Reader(images, self.waiting),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=sorted(QUANTIZED_OPERATORS | OPERATORS_BETWEEN | OPERATORS_AFTER),
                nodes_to_exclude=excluded,
                per_channel=True,
                reduce_range=self.scheme == "int8_static",
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=methods[calibration],
                calibration_cache_path=self.folder / f"ranges-{calibration}.json",
                extra_options={"CalibStridedMinMax": 1, "CalibPercentile": PERCENTILE},  # 1: batch by batch
            )
            path.write_bytes(_tidied(onnx.load(made)))
        return path

    def logits(self, file: Path, sample: Sample) -> Logits:
        """Logits `N x K` of a file."""
        return logits_of(file, sample, threads=self.threads, waiting=self.waiting)

    def errors(self) -> dict[str, float]:
        """Of each layer, worst first: how far the logits move when it alone is quantized (see `Quantized`).

        Of more than 64 layers, neighbours are measured together.
        """
        affordable = int(MEASURED_MACS / max(1, cost(self.graph).macs))
        sample = self.calibration.first(max(FEWEST_IMAGES, min(MOST_IMAGES, affordable)))
        wanted_NK = self.logits(self.source, sample)
        errors: dict[str, float] = {}
        for run in _runs(self.names, MOST_MEASURED):
            file = self.file([name for name in self.names if name not in run])
            errors |= dict.fromkeys(run, rmse_ratio(self.logits(file, sample), wanted_NK))
            file.unlink()
        return dict(sorted(errors.items(), key=lambda item: -item[1]))

    def _excluded_operators(self, in_float: Collection[str]) -> list[str]:
        """The operators that are not quantized: those of the layers, and what has such a layer before or after it."""
        operators, of_layer = self.operators.node, {node.name: node.home for node in self.graph.nodes}
        constants = {tensor.name for tensor in self.operators.initializer}
        live = {
            node.name
            for node in operators
            if node.op_type in QUANTIZED_OPERATORS and of_layer[node.name] not in in_float
        }
        before = _reached_operators(operators, live)
        after = _reached_operators([_reversed(node) for node in reversed(operators)], live)
        return [
            node.name
            for node in operators
            if (node.op_type in QUANTIZED_OPERATORS and node.name not in live)
            or (
                node.op_type in OPERATORS_BETWEEN
                and not (node.name in before and node.name in after and constants.isdisjoint(node.input))
            )
        ]


def quantize(quantizer: Quantizer, sample: Sample, *, most_drop: float, exclude: Collection[str] = ()) -> Quantized:
    """The 8-bit file that loses at most `most_drop` of the accuracy on `sample` with the fewest layers in float32.

    In order: every layer, ranges from the smallest to the largest value; ranges without the outermost values; then
    layers stay in float32, those with the largest error first, and their number is found by bisection. If nothing
    is enough, the file that loses least.

    Args:
        quantizer: of the network.
        sample: on which the choice is made: never the test part.
        most_drop: part of 1.
        exclude: layers that stay in float32 whatever happens.

    Raises:
        QuantizationFailed: ONNX Runtime cannot quantize the network, or every layer is excluded.
        OSError: the disk is full.
    """
    if set(exclude).issuperset(quantizer.names):
        raise QuantizationFailed("every layer that could be quantized is excluded")
    search = _FileSearch(quantizer, sample, most_drop, exclude)
    if search.is_enough({}, "min_max") or search.is_enough({}, "percentile"):
        return search.tried[-1]
    calibration = search.least_loss().calibration
    ranked = [(name, error) for name, error in quantizer.errors().items() if name not in exclude]
    good: Quantized | None = None
    low, high = 0, len(ranked)  # so many in float32: too few, and enough (all of them are not quantized at all)
    while high - low > 1:
        middle = (low + high) // 2
        if search.is_enough(dict(ranked[:middle]), calibration):
            good, high = search.tried[-1], middle
        else:
            low = middle
    return replace(good or search.least_loss(), tries=len(search.tried))


class _FileSearch:
    """Files that are tried on a sample, against the float32 file."""

    def __init__(self, quantizer: Quantizer, sample: Sample, most_drop: float, exclude: Collection[str]) -> None:
        self._quantizer, self._sample, self._most_drop, self._exclude = quantizer, sample, most_drop, frozenset(exclude)
        self._wanted_NK = quantizer.logits(quantizer.source, sample)
        self._right = self._right_answers(self._wanted_NK)
        self.tried: list[Quantized] = []

    def is_enough(self, in_float: Mapping[str, float], calibration: Calibration) -> bool:
        """Try the file in which these layers and the excluded ones stay in float32; whether it loses little enough."""
        file = self._quantizer.file(self._exclude | in_float.keys(), calibration)
        found_NK = self._quantizer.logits(file, self._sample)
        images, lost = len(found_NK), self._right - self._right_answers(found_NK)
        rmse = rmse_ratio(found_NK, self._wanted_NK)
        self.tried.append(Quantized(file, calibration, in_float, lost / images, rmse, len(self.tried) + 1))
        return lost <= self._most_drop * images + 1e-9

    def least_loss(self) -> Quantized:
        """Of the files that were tried, the one that loses least."""
        return min(self.tried, key=lambda one: (one.drop, one.rmse))

    def _right_answers(self, logits_NK: Logits) -> int:
        return int((logits_NK.argmax(axis=1) == self._sample.part.labels).sum())


class _Reader:
    """The calibration images as ONNX Runtime reads them, a range of batches at a time; the names are its own."""

    def __init__(self, sample: Sample, waiting: Callable[[], None] | None) -> None:
        self._sample = sample
        self._waiting = waiting
        self._left = iter(range(len(sample)))

    def __len__(self) -> int:
        return len(self._sample)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Continue with these batches."""
        self._left = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, FloatImages] | None:
        """The next batch; None at the end of the range."""
        if self._waiting is not None:
            self._waiting()
        number = next(self._left, None)
        return None if number is None else {"images": self._sample.batch(number)}


def _runs(names: Sequence[str], most: int) -> Iterator[tuple[str, ...]]:
    """The names in order, in at most `most` runs of about the same length."""
    count = min(most, len(names))
    for number in range(count):
        yield tuple(names[number * len(names) // count : (number + 1) * len(names) // count])


@dataclass(frozen=True)
class _ReversedOperator:
    """An operator read backwards: its outputs are its inputs."""

    name: str
    op_type: str
    input: Sequence[str]
    output: Sequence[str]


def _reversed(node: Any) -> _ReversedOperator:
    return _ReversedOperator(node.name, node.op_type, node.output, node.input)


def _reached_operators(nodes: Sequence[Any], live: Collection[str]) -> set[str]:
    """The operators that read a live one, perhaps through operators without weights.

    `nodes` are in an order in which values are made before they are read.
    """
    carrying: set[str] = set()
    reached = set()
    for node in nodes:
        reads = not carrying.isdisjoint(node.input)
        if reads:
            reached.add(node.name)
        if node.name in live or (reads and node.op_type not in OPERATORS_WITH_WEIGHTS):
            carrying.update(node.output)
    return reached


def _tidied(model: Any) -> bytes:
    """The file with its logits in float32, and without anything but the network; same input, same bytes."""
    graph = model.graph
    makers = {value: node for node in graph.node for value in node.output}
    last = makers[OUTPUT_NAME]
    if last.op_type == "DequantizeLinear":  # 256 steps are too few for the logits, whose order is the answer
        rounding = makers[last.input[0]]
        source = makers[rounding.input[0]]
        source.output[list(source.output).index(rounding.input[0])] = OUTPUT_NAME
        graph.node.remove(last)
        graph.node.remove(rounding)
    used = {value for node in graph.node for value in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    del graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    for node in graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    graph.ClearField("doc_string")
    model.ClearField("doc_string")
    model.producer_name, model.producer_version, graph.name = "espalier", "", "network"
    domains = {node.domain for node in graph.node}
    for domain in [entry for entry in model.opset_import if entry.domain not in domains]:
        model.opset_import.remove(domain)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Let a library write its temporary files into `folder`, which is removed with the job."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _translated() -> Iterator[None]:
    """Raise whatever the library raises as `QuantizationFailed`, but for the job's own errors, a full disk, full memory."""
    try:
        yield
    except (EspalierError, OSError, MemoryError):
        raise
    except Exception as exc:
        message = (str(exc).strip() or type(exc).__name__).splitlines()[0][:300]
        raise QuantizationFailed(f"ONNX Runtime could not quantize the network: {message}") from exc
