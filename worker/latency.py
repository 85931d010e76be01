"""How long one forward pass takes, dense against pruned, per runtime and batch size.

Protocol: CPU, a stated number of threads, warm-up, the two networks take turns run by run (so that a busy machine slows
both), median and 95th percentile. Ratios are what to compare; milliseconds depend on the machine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import JsonValue
from app.network.blocks import WEIGHTED
from app.network.cost import cost
from app.network.graph import Graph
from worker.export.files import portable_network, portable_tensors
from worker.network import Network

BATCH_SIZES = (1, 32)
MOST_RUNS = 200
FEWEST_RUNS = 5
WARM_UP_RUNS = 20
PATIENCE = 4  # times a measurement's share of the time, then one run is enough: a large network on one thread
PARTS = 8  # of a measurement, whose spread tells its error
KERNEL_TIME = "_kernel_time"  # how onnxruntime's profile ends the name of an operator's run
WEIGHTED_OPERATORS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul")
NO_GAIN = 0.95  # a ratio of medians above this is within the noise of a busy machine

Timings = dict[str, dict[str, dict[str, float]]]
Run = Callable[[], object]
Runner = Callable[[NDArray[np.float32]], Run]  # images -> one run on them
Change = Literal["smaller", "more layers", "zeros", "none"]


@dataclass(frozen=True)
class Latency:
    """`latency_ms` of both networks (`{runtime: {"batch_1": {"p50", "p95"}, ...}}`), notes, and how it was measured.

    `int8` and `int8_notes` are those of an 8-bit file, in onnxruntime only; empty where there is none.
    """

    dense: Timings
    pruned: Timings
    notes: tuple[str, ...]
    conditions: Mapping[str, JsonValue]
    int8: Timings = field(default_factory=dict)
    int8_notes: tuple[str, ...] = ()


def measure_latency(
    dense: Network,
    pruned: Network,
    *,
    threads: int = 1,
    int8: bytes | None = None,
    seconds: float = 4.0,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    waiting: Callable[[], None] | None = None,
) -> Latency:
    """Latencies of both networks in torch (eager) and onnxruntime (the exported graph, batch norm folded), on the CPU.

    Args:
        dense, pruned: networks of the same input shape; they are copied, not touched.
        threads: of either runtime; torch's own setting is restored afterwards.
        int8: the 8-bit ONNX file of the pruned network, which takes turns with the two networks in onnxruntime.
        seconds: of measuring in total, shared by all runtimes and batch sizes. A large network may take up to four
            times that for five runs, and has at least one.
        batch_sizes: examples per run.
        waiting: called between the measurements; may raise to give up.
    """
    share = seconds / (2 * len(batch_sizes))
    timings: tuple[Timings, Timings, Timings] = ({}, {}, {})
    runs: dict[str, JsonValue] = {}
    notes: list[str] = []
    change = _change(dense, pruned)
    with _torch_threads(threads):
        for runtime, runner in (("torch", _torch_runs), ("onnxruntime", _onnx_runs)):
            prepared = runner((dense, pruned), threads)
            if int8 is not None and runtime == "onnxruntime":
                prepared.append(_session_runs(int8, threads))
            for batch_size in batch_sizes:
                images = _noise((batch_size, *dense.graph.input_shape))
                measured = _take_turns([run(images) for run in prepared], share)
                key = f"batch_{batch_size}"
                runs[f"{runtime}.{key}"] = len(measured[0])
                for one, milliseconds in zip(timings, measured, strict=False):
                    one.setdefault(runtime, {})[key] = _percentiles(milliseconds)
                if waiting is not None:
                    waiting()
            notes += _notes(runtime, timings[0][runtime], timings[1][runtime], change)
    conditions: dict[str, JsonValue] = {"device": "cpu", "threads": threads, "runs": runs}
    int8_notes = tuple(_int8_notes(timings[2], timings[1]))
    return Latency(timings[0], timings[1], tuple(notes), conditions, timings[2], int8_notes)


@dataclass(frozen=True)
class Measured:
    """A time in milliseconds, and its standard error: from the ratios of medians in eight parts of the measurement."""

    ms: float
    error_ms: float


class Stopwatch:
    """Times of networks in onnxruntime, one thread, `batch_size` images, each in turns with the dense network.

    `dense_ms` is the median of the dense network. A time is the dense network's times the ratio of the medians of one
    measurement, so that a machine that is busy for a while slows both. `clock` counts seconds; `time.thread_time`
    does not count those in which others had the processor.
    """

    def __init__(
        self,
        dense: Network,
        *,
        seconds: float = 0.4,
        batch_size: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._images = _noise((batch_size, *dense.graph.input_shape))
        self._seconds, self._clock = seconds, clock
        (maker,) = _onnx_runs((dense,), 1)
        self._dense = maker(self._images)
        self.dense_ms = float(np.median(_take_turns((self._dense, self._dense), seconds, clock)[0]))

    def time_ms(self, network: Network, *, patience: float = 1.0) -> float:
        """Milliseconds of one run; `patience` times the usual length of a measurement."""
        return self.time(network, patience=patience).ms

    def time(self, network: Network, *, patience: float = 1.0) -> Measured:
        """Milliseconds of one run, and how far the measurement can be trusted."""
        (maker,) = _onnx_runs((network,), 1)
        measured = _take_turns(
            (self._dense, maker(self._images)), patience * self._seconds, self._clock, most=round(patience * MOST_RUNS)
        )
        dense, other = (np.array(milliseconds) for milliseconds in measured)
        parts = [
            float(np.median(b) / np.median(a))
            for a, b in zip(np.array_split(dense, PARTS), np.array_split(other, PARTS), strict=True)
            if len(a)
        ]
        error = float(np.std(parts, ddof=1)) / len(parts) ** 0.5 if len(parts) > 1 else 0.0
        ratio = float(np.median(other) / np.median(dense))
        return Measured(self.dense_ms * ratio, self.dense_ms * error)

    def layer_ms(self, network: Network) -> dict[str, float]:
        """Milliseconds of each layer with weights in a run of the whole network, by its name; as the runtime notes them.

        A layer is fused with what follows it, so its time includes a norm and an activation behind it.
        """
        model = onnx_bytes_of(network)
        return _profile(network.graph, model, self._images, self._seconds)


def onnx_bytes_of(network: Network) -> bytes:
    """The ONNX file of a network, as it is exported."""
    from worker.export.onnx_model import onnx_bytes

    return onnx_bytes(network.graph, {name: tensor.numpy() for name, tensor in portable_tensors(network).items()})


def _profile(graph: Graph, model: bytes, images: NDArray[np.float32], seconds: float) -> dict[str, float]:
    """The median time of each layer with weights, from onnxruntime's own profile of so many seconds of runs."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = _session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        _take_turns([lambda: session.run(["logits"], {"images": images})], seconds)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[float]] = {}
    for event in events:
        weighted = event.get("args", {}).get("op_name") in WEIGHTED_OPERATORS
        if weighted and event["name"].endswith(KERNEL_TIME):
            found.setdefault(event["name"].removesuffix(KERNEL_TIME), []).append(event["dur"] / 1e3)
    times: dict[str, float] = {}
    for name, milliseconds in found.items():
        layer = _layer_of(graph, name)
        if layer is not None:
            times[layer] = times.get(layer, 0.0) + float(np.median(milliseconds))
    return times


def _layer_of(graph: Graph, operator: str) -> str | None:
    """The layer with weights that an operator of the runtime computes, whose name is that of the last layer fused into it."""
    name = operator.removeprefix("fused ").removesuffix("_nchwc").removesuffix(".output")
    while name in graph:
        node = graph[name]
        if node.type in WEIGHTED:
            return node.home
        if len(node.inputs) != 1:
            return None
        name = node.inputs[0]
    return None


def _torch_runs(networks: Sequence[Network], threads: int) -> list[Runner]:
    """One maker of runs per network, in eager mode on a CPU copy."""

    def maker(network: Network) -> Runner:
        copy = portable_network(network)

        def run_on(images: NDArray[np.float32]) -> Run:
            images_NCx = torch.from_numpy(images)

            def run() -> object:
                with torch.inference_mode():
                    return copy(images_NCx)

            return run

        return run_on

    return [maker(network) for network in networks]


def _onnx_runs(networks: Sequence[Network], threads: int) -> list[Runner]:
    """One maker of runs per network, in a session of the graph as it is exported."""
    return [_session_runs(onnx_bytes_of(network), threads) for network in networks]


def _session_runs(model: bytes, threads: int) -> Runner:
    """A maker of runs of one ONNX file."""
    import onnxruntime  # not before it is needed: a trainer starts without it

    options = _session_options(threads)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run_on(images: NDArray[np.float32]) -> Run:
        return lambda: session.run(["logits"], {"images": images})

    return run_on


def _session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _take_turns(
    turns: Sequence[Run], seconds: float, clock: Callable[[], float] = time.perf_counter, *, most: int = MOST_RUNS
) -> list[list[float]]:
    """Milliseconds of each run of each of them, taken in turns, after a warm-up of a fifth of the time."""
    start = time.perf_counter()
    for count in range(WARM_UP_RUNS):
        for run in turns:
            run()
        elapsed = time.perf_counter() - start
        if elapsed > seconds or (count and elapsed > seconds / 5):
            break
    measured: list[list[float]] = [[] for _ in turns]
    while len(measured[0]) < most:
        for run, milliseconds in zip(turns, measured, strict=True):
            before = clock()
            run()
            milliseconds.append((clock() - before) * 1e3)
        allowed = seconds if len(measured[0]) >= FEWEST_RUNS else PATIENCE * seconds
        if time.perf_counter() - start >= allowed:
            break
    return measured


def _percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(milliseconds, (50, 95))
    return {"p50": round(float(p50), 4), "p95": round(float(p95), 4)}


def _notes(
    runtime: str, dense: Mapping[str, Mapping[str, float]], pruned: Mapping[str, Mapping[str, float]], change: Change
) -> Iterator[str]:
    """One sentence for a runtime in which the pruned network is not faster; none where nothing was pruned."""
    figures = _slow_figures(pruned, dense)
    if not figures or change == "none":
        return
    if change == "zeros":
        yield (
            f"zeros alone do not make {runtime} faster: {figures}; they make the compressed file smaller. "
            "Prune channels for speed."
        )
    elif change == "more layers":
        yield (
            f"the network of smaller layers is not faster in {runtime}: {figures}; it multiplies less, but in more layers, "
            "each of which is started and writes its map. Wider layers, smaller ranks or pruned channels gain more."
        )
    else:
        yield (
            f"the smaller network is not faster in {runtime}: {figures}; at this size most of the time is spent on "
            "starting each layer, or on widths that the runtime pads (see round_to)."
        )


def _int8_notes(int8: Timings, floating: Timings) -> Iterator[str]:
    """One sentence where the 8-bit file is not faster than the float32 file of the same network."""
    if int8 and (figures := _slow_figures(int8["onnxruntime"], floating["onnxruntime"])):
        yield (
            f"8 bits are not faster than float32 in onnxruntime on this processor: {figures}; they make the file smaller"
        )


def _slow_figures(found: Mapping[str, Mapping[str, float]], before: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of the batch sizes at which `found` brings no gain over `before`; empty where it does at all."""
    return ", ".join(
        f"{found[key]['p50']:.3g} ms against {before[key]['p50']:.3g} ms at batch {key.removeprefix('batch_')}"
        for key in before
        if found[key]["p50"] > NO_GAIN * before[key]["p50"]
    )


def _change(dense: Network, pruned: Network) -> Change:
    """What was done: fewer multiply-accumulates, perhaps in more layers, only zeros, or nothing."""
    if cost(pruned.graph).macs < cost(dense.graph).macs:
        more = _weighted_layers(pruned) > _weighted_layers(dense)
        return "more layers" if more else "smaller"
    return "zeros" if _nonzero(pruned) < _nonzero(dense) else "none"


def _weighted_layers(network: Network) -> int:
    return sum(node.type in WEIGHTED for node in network.graph.nodes)


def _nonzero(network: Network) -> int:
    return sum(int(torch.count_nonzero(parameter)) for parameter in network.parameters())


def _noise(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Set the number of torch's threads, and set it back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
