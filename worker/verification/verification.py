"""Every exported file is verified before it is delivered: a clean process loads it and must give the same logits.

Axes: N batch, C channels, x spatial, K classes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import JsonValue, VerificationFailed
from app.failpoints import failpoint
from app.network.architecture import Preprocessing, read_architecture
from app.network.cost import cost
from app.network.graph import Graph
from app.spec.quantize import Scheme
from worker.evaluation import score
from worker.export.files import INT8_MODEL, MODEL_SOURCE, Stem, architecture_name, portable_network
from worker.export.pytorch_source import model_source
from worker.export.sparse_file import SPARSE_WEIGHTS
from worker.network import Network
from worker.verification.saturation import PairSums, check_pair_sums

SCRIPT = Path(__file__).with_name("clean_process.py")
SAME_RUNTIME = 1e-5  # of the largest logit: it is 0 with a reference from the CPU; another layout's rounding fits
OTHER_RUNTIME = 1e-4  # of the largest logit: onnxruntime adds up in another order, with batch norm folded
CLOSE_CALL = 1e-3  # of the largest logit: two classes nearer than this may change places
MOST_ELEMENTS = 1 << 22  # of the largest activation of one batch: 16 MiB, near the caches
LARGEST_BATCH = 128
MOST_ELEMENTS_GPU = 1 << 26  # 256 MiB: a GPU has no caches to keep to, and small batches leave it idle
LARGEST_BATCH_GPU = 512
SLOWEST_MACS_PER_S = 2e8  # a machine that is slower than this counts as hung
START_ALLOWANCE_S = 300.0  # import of torch from a cold disk on a busy machine
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # layout by number of axes, as in the clean process

Logits = NDArray[np.float32]
NetworkKey = Stem | Literal["int8"]
StoredLayout = Literal["channels_first", "channels_last", "no_channels"]


@dataclass(frozen=True)
class FileVerification:
    """What one delivered file gave on the test split, against the trained network's logits.

    `pair_sums` bounds the arithmetic of an 8-bit file; of others it is None.
    """

    max_abs_difference: float
    tolerance: float
    accuracy: float
    loss: float
    examples: int
    changed_answers: int  # close calls only: anything else fails
    pair_sums: PairSums | None = None

    def document(self) -> dict[str, JsonValue]:
        """The file's entry in `report.verification`."""
        return {
            "max_abs_difference": self.max_abs_difference,
            "tolerance": self.tolerance,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "examples": self.examples,
            "changed_answers": self.changed_answers,
            **({} if self.pair_sums is None else self.pair_sums.document()),
        }


@dataclass(frozen=True)
class Verification:
    """What each file gave, the logits of the delivered files by network, and the sha256 of every file that was read."""

    files: Mapping[str, FileVerification]
    logits: Mapping[NetworkKey, Logits]
    sha256: Mapping[str, str]

    def document(self) -> dict[str, JsonValue]:
        """The report's `verification`."""
        return {name: file.document() for name, file in self.files.items()}


@dataclass(frozen=True)
class _Check:
    """One run of one file: what is loaded, where its logits are written, the names of the files that it verifies.

    `twin` is a second file of the same weights: it is verified by having the same bits.
    """

    network: NetworkKey
    names: tuple[str, ...]
    weights: Path
    architecture: Path
    logits: Path
    bound: float
    model: Path | None = None
    twin: Path | None = None
    pair_sums: PairSums | None = None

    def order(self) -> dict[str, str | None]:
        return {
            "model": None if self.model is None else str(self.model),
            "weights": str(self.weights),
            "twin": None if self.twin is None else str(self.twin),
            "architecture": str(self.architecture),
            "logits": str(self.logits),
        }


@dataclass
class _CleanProcess:
    """A process that was started: what it has to check, and the files to which it writes."""

    checks: Sequence[_Check]
    process: subprocess.Popen[bytes]
    result: Path
    errors: Path
    deadline: float
    names: str = field(init=False)

    def __post_init__(self) -> None:
        self.names = ", ".join(name for check in self.checks for name in check.names)

    def finished(self) -> bool:
        """Whether it ended well.

        Raises:
            VerificationFailed: It crashed, or is out of time.
        """
        code = self.process.poll()
        if code is None:
            if time.monotonic() > self.deadline:
                raise VerificationFailed(f"{self.names}: the clean process that loads them did not end in time")
            return False
        if code != 0:
            lines = self.errors.read_text(errors="replace").strip().splitlines()
            last = lines[-1][:300] if lines else "it wrote no error"
            raise VerificationFailed(f"{self.names}: the clean process that loads them ended with code {code}: {last}")
        return True

    def end(self) -> None:
        """Kill the process if it still runs, and wait for its end."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def verification_batch_size(graph: Graph, device: str = "cpu") -> int:
    """Examples per batch, so that the largest activation of a batch stays within 16 MiB, on a GPU within 256 MiB."""
    largest = max(node.elements for node in graph.nodes)
    if device == "cpu":
        return max(1, min(LARGEST_BATCH, MOST_ELEMENTS // largest))
    return max(1, min(LARGEST_BATCH_GPU, MOST_ELEMENTS_GPU // largest))


def compute_logits(network: Network, images: NDArray[Any], preprocessing: Preprocessing) -> Logits:
    """Logits `N x K`, float32, of raw images `N x C x ...` in eval mode, on the network's device; its mode stays.

    On the CPU a float32 copy computes them, laid out and batched as in the clean process: they are the reference of
    `verify_files`, from which a right file differs by exactly 0.
    """
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        copy: Any = portable_network(network)
        rank = max((tensor.dim() for tensor in copy.parameters()), default=0)
        network = copy.to(memory_format=CHANNELS_LAST.get(rank, torch.contiguous_format))
    layout = CHANNELS_LAST.get(images.ndim, torch.contiguous_format)
    batch = verification_batch_size(network.graph, device.type)
    was_training = network.training
    network.eval()
    parts: list[Logits] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            ready = torch.from_numpy(preprocessing.apply(images[start : start + batch]))
            parts.append(network(ready.to(device).contiguous(memory_format=layout)).float().cpu().numpy())
    network.train(was_training)
    return np.concatenate(parts)


def compare(
    name: str, found_NK: Logits, wanted_NK: Logits, labels_N: NDArray[np.int64], bound: float
) -> FileVerification:
    """What the file `name` gave, `found`, against `wanted`: within `bound` times the largest wanted logit (at least 1).

    Raises:
        VerificationFailed: a number is not finite, differs by more, or an answer changed that was no close call.
    """
    _check_finite_logits(name, found_NK, wanted_NK)
    scale = max(1.0, float(np.abs(wanted_NK).max()))
    difference = float(np.abs(found_NK.astype(np.float64) - wanted_NK).max())
    ranked_NK = np.sort(wanted_NK, axis=1)
    changed_N = found_NK.argmax(axis=1) != wanted_NK.argmax(axis=1)
    close_N = (ranked_NK[:, -1] - ranked_NK[:, -2] < CLOSE_CALL * scale) if ranked_NK.shape[1] > 1 else changed_N
    scores = score(found_NK, labels_N)
    file = FileVerification(
        max_abs_difference=difference,
        tolerance=bound * scale,
        accuracy=scores.accuracy,
        loss=scores.loss,
        examples=len(found_NK),
        changed_answers=int(changed_N.sum()),
    )
    wrong = int((changed_N & ~close_N).sum())
    if difference > file.tolerance or wrong:
        raise VerificationFailed(
            f"{name} does not reproduce the trained network: logits differ by up to {difference:.3g} "
            f"(allowed {file.tolerance:.3g}) and {file.changed_answers} of {len(found_NK)} answers change; accuracy "
            f"{file.accuracy:.4f} instead of {score(wanted_NK, labels_N).accuracy:.4f}"
        )
    return file


def _check_finite_logits(name: str, found_NK: Logits, wanted_NK: Logits) -> None:
    """Raise `VerificationFailed` where logits have another shape than the wanted ones, or are not finite."""
    if found_NK.shape != wanted_NK.shape:
        raise VerificationFailed(f"{name} gives logits {found_NK.shape}, the trained network {wanted_NK.shape}")
    broken = int(np.size(found_NK) - np.isfinite(found_NK).sum())
    if broken:
        raise VerificationFailed(f"{name} gives {broken} logits of {np.size(found_NK)} that are not finite numbers")
    if not np.isfinite(wanted_NK).all():
        raise VerificationFailed(f"{name} cannot be verified: the trained network's own logits are not finite numbers")


def verify_files(
    folder: Path,
    *,
    images: NDArray[Any],
    labels: NDArray[np.int64],
    reference_logits: Mapping[NetworkKey, Logits],
    scheme: Scheme = "int8_static",
    threads: int,
    waiting: Callable[[], None] | None = None,
    timeout_s: float | None = None,
) -> Verification:
    """Load all files of `folder` in clean processes and compare: torch and onnxruntime each in its own, side by side.

    Args:
        folder: where `export_network` wrote `pruned.*` and, if `reference_logits` has it, `baseline.*`.
        images: raw test images `N x C x ...`; a plain view of a `.npy` opened with `mmap_mode` is not copied.
        labels: N class numbers.
        reference_logits: `N x K` of the trained network on the CPU (`compute_logits`), by stem ("pruned", "baseline");
            of "int8" those that its file gave when it was made, in the settings of the clean process.
        scheme: of the 8-bit file. Its logits verify it on this processor only; the arithmetic of its weights shows
            that it is right on all of them.
        threads: of each process; the reference's count gives the same bits.
        waiting: called a few times per second; may raise to give up.
        timeout_s: of the processes; default by the work there is.

    Raises:
        VerificationFailed: a file crashes, is missing, gives other logits, or contradicts another file,
            or sums of the 8-bit file can saturate against its scheme.
    """
    failpoint("proof")
    with TemporaryDirectory(prefix="verification-", dir=folder.parent) as temporary, ExitStack() as stack:
        scratch = Path(temporary)
        torch_checks, onnx_checks, graph = _checks(folder, scratch, tuple(reference_logits), scheme)
        path, layout = _stored(images, scratch)
        seconds = timeout_s or START_ALLOWANCE_S + 2 * cost(graph).macs * len(images) / SLOWEST_MACS_PER_S
        order = {
            "parent": os.getpid(),
            "threads": threads,
            "batch_size": verification_batch_size(graph),
            "images": {"path": str(path), "layout": layout},
        }
        running = []
        for runtime, checks in (("torch", torch_checks), ("onnxruntime", onnx_checks)):
            if checks:
                started = _start_process(runtime, checks, order, scratch, seconds)
                stack.callback(started.end)
                running.append(started)
        sha256 = _wait_for_hashes(running, waiting)
        return _compare_all([*torch_checks, *onnx_checks], reference_logits, labels, sha256)


def _wait_for_hashes(running: Sequence[_CleanProcess], waiting: Callable[[], None] | None) -> dict[str, str]:
    """Wait until all processes have ended; the sha256 of each file that they read, by its name."""
    while sum(not process.finished() for process in running):
        if waiting is not None:
            waiting()
        time.sleep(0.05)
    sha256: dict[str, str] = {}
    for process in running:
        sha256 |= json.loads(process.result.read_text())["sha256"]
    return sha256


def _checks(
    folder: Path, scratch: Path, networks: Sequence[NetworkKey], scheme: Scheme
) -> tuple[list[_Check], list[_Check], Graph]:
    """What has to be loaded, per runtime, and the largest graph among it (the baseline's, if there is one)."""
    torch_checks, onnx_checks, graphs = [], [], []
    for stem in networks:
        if stem == "int8":
            onnx_checks.append(_int8_check(folder, scratch, scheme))
            continue
        check, graph = _torch_check(stem, folder, scratch)
        torch_checks.append(check)
        graphs.append(graph)
        onnx = folder / f"{stem}.onnx"
        if onnx.is_file():
            onnx_checks.append(
                _Check(stem, (onnx.name,), onnx, check.architecture, scratch / f"{stem}.onnx.npy", OTHER_RUNTIME)
            )
    return torch_checks, onnx_checks, max(graphs, key=lambda graph: cost(graph).macs)


def _int8_check(folder: Path, scratch: Path, scheme: Scheme) -> _Check:
    """The check of the 8-bit file, whose weights are bounded here."""
    file = folder / INT8_MODEL
    _check_written(file)
    architecture, pair_sums = folder / architecture_name("pruned"), check_pair_sums(file, scheme)
    return _Check("int8", (file.name,), file, architecture, scratch / "int8.npy", SAME_RUNTIME, pair_sums=pair_sums)


def _torch_check(stem: Stem, folder: Path, scratch: Path) -> tuple[_Check, Graph]:
    """The check of the weights of one network, with the source and the sparse file where they are; and its graph."""
    weights, architecture = folder / f"{stem}.safetensors", folder / architecture_name(stem)
    _check_written(weights, architecture)
    sparse = folder / SPARSE_WEIGHTS
    twin = sparse if stem == "pruned" and sparse.is_file() else None
    graph, class_names, preprocessing = read_architecture(json.loads(architecture.read_text()))
    source = model_source(graph, class_names, preprocessing, sparse=twin is not None)
    model = folder / MODEL_SOURCE
    names: tuple[str, ...] = (weights.name,) if twin is None else (weights.name, twin.name)
    if stem == "pruned" and model.is_file():
        if model.read_text() != source:
            raise VerificationFailed(f"{model.name} is not the network that {architecture.name} describes")
        names += (model.name,)
    else:  # not asked for, or the baseline: the description alone has to be enough to read the weights
        model = scratch / f"{stem}_model.py"
        model.write_text(source)
    logits = scratch / f"{stem}.torch.npy"
    return _Check(stem, names, weights, architecture, logits, SAME_RUNTIME, model, twin), graph


def _check_written(*paths: Path) -> None:
    """Raise `VerificationFailed` for the first of these files that is not there."""
    for path in paths:
        if not path.is_file():
            raise VerificationFailed(f"{path.name} was not written")


def _start_process(
    runtime: str, checks: Sequence[_Check], order: Mapping[str, Any], scratch: Path, seconds: float
) -> _CleanProcess:
    """Start the clean process of one runtime, with no environment but what is listed here."""
    result, errors, order_path = (scratch / f"{runtime}.{ending}" for ending in ("result.json", "stderr", "order.json"))
    order_path.write_text(
        json.dumps({**order, "runtime": runtime, "result": str(result), "runs": [check.order() for check in checks]})
    )
    threads = str(order["threads"])
    environment = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "TMPDIR": str(scratch),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(SCRIPT), str(order_path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=scratch,
            env=environment,
        )
    return _CleanProcess(checks, process, result, errors, time.monotonic() + seconds)


def _compare_all(
    checks: Sequence[_Check],
    reference_logits: Mapping[NetworkKey, Logits],
    labels: NDArray[np.int64],
    sha256: Mapping[str, str],
) -> Verification:
    """The verification by all checks, whose processes have ended."""
    files: dict[str, FileVerification] = {}
    logits: dict[NetworkKey, Logits] = {}
    for check in checks:
        found = np.load(check.logits)
        for name in check.names:
            file = compare(name, found, reference_logits[check.network], labels, check.bound)
            files[name] = replace(file, pair_sums=check.pair_sums)
        if check.model is not None or check.network == "int8":
            logits[check.network] = found
    return Verification(files, logits, sha256)


def _stored(images: NDArray[Any], scratch: Path) -> tuple[Path, StoredLayout]:
    """A `.npy` with these images and the layout in it: the file they are a view of, or a copy in `scratch`."""
    owner: Any = images
    while not isinstance(owner, np.memmap) and isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, np.memmap) and owner.filename is not None and Path(owner.filename).suffix == ".npy":
        whole = np.load(owner.filename, mmap_mode="r")
        if whole.size == images.size and whole.dtype == images.dtype and owner.offset == whole.offset:
            first = tuple(range(1, whole.ndim - 1))
            views: dict[StoredLayout, NDArray[Any]] = {
                "channels_first": whole,
                "channels_last": whole.transpose(0, whole.ndim - 1, *first) if whole.ndim > 1 else whole,
                "no_channels": whole[:, None],
            }
            for layout, view in views.items():
                if view.shape == images.shape and view.strides == images.strides:
                    return Path(owner.filename), layout
    path = scratch / "images.npy"
    header = {"descr": np.lib.format.dtype_to_descr(images.dtype), "fortran_order": False, "shape": images.shape}
    with path.open("wb") as file:  # no memory map: a full disk is a signal there, here it is an error
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(images), 1024):
            file.write(np.ascontiguousarray(images[start : start + 1024]).data)
    return path, "channels_first"
