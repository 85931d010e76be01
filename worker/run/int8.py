"""The 8-bit file of a job: calibrated and chosen on images that it may see, judged on the test part, told in the report.

Axes: N batch, K classes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.compression.int8 import INTEGER, float_layers
from app.network.cost import cost
from app.spec.quantize import Quantize
from worker.compression.quantization import (
    Quantized,
    Quantizer,
    Sample,
    agreement,
    calibration_batch_size,
    quantize,
    rmse_ratio,
    saturates,
)
from worker.data.dataset import derive_seed
from worker.evaluation import Scores, score
from worker.export.files import INT8_MODEL, portable_tensors, write_whole
from worker.network import Network
from worker.run.job import QUANTIZING, Job
from worker.run.removal import layer_rows
from worker.verification.saturation import EVERYWHERE, SATURATES_ABOVE, PairSums, read_pair_sums
from worker.verification.verification import Logits, verification_batch_size

MOST_CHOSEN_ON, FEWEST_CHOSEN_ON = 10_000, 500  # images; between them as many as CHOSEN_ON_MACS allow
CHOSEN_ON_MACS = 5e11
UNPROVABLE = (
    "the 8-bit file is not delivered: with the scheme int8_vnni it is right only on processors with VNNI or AMX, and on "
    "ARM, and this worker's processor is none of them, so that the file cannot be verified here; submit the job to a worker "
    "that has one, or with the scheme int8_static, which is right on every processor"
)
USUAL_AGREEMENT, USUAL_RMSE_RATIO = 0.97, 0.05  # what is worse is said in the report


@dataclass(frozen=True)
class Int8File:
    """The 8-bit file: its bytes, logits `N x K` and scores on the test part, and whether it keeps to max_accuracy_drop.

    `agreement` and `rmse_ratio` are against float32; `left` has every layer in float32 with the reason; `chosen_on`
    says on what it was chosen, `pair_sums` on which processors it is right.
    """

    step: Quantize
    model: bytes
    logits: Logits
    scores: Scores
    drop: float
    met: bool
    agreement: float
    rmse_ratio: float
    found: Quantized
    left: dict[str, str]
    calibration_images: int
    chosen_on: dict[str, Any]
    pair_sums: PairSums
    seconds: float


def make_int8(job: Job, network: Network, wanted_NK: Logits) -> Int8File | None:
    """The 8-bit file of `network`, whose logits on the test part are `wanted`; None where the job asks for none.

    None also where its scheme is int8_vnni and this worker's processor saturates: the report then says why.

    Raises:
        QuantizationFailed: ONNX Runtime does not manage it.
        Interrupted: the user cancelled or paused.
    """
    if job.quantization is None:
        return None
    step = job.quantization
    if step.scheme == "int8_vnni" and saturates():
        job.journal.event("warning", UNPROVABLE, level="warn", scheme=step.scheme)
        job.reached.record.note(UNPROVABLE)
        return None
    began = time.monotonic()
    job.monitor.enter(QUANTIZING, message="quantizing to 8 bits: ranges from training images, then a comparison")
    job.monitor.check_cancel_or_pause()
    folder = job.task.scratch / "int8"
    folder.mkdir()
    try:
        int8 = _make(job, network, wanted_NK, step, began)
    finally:
        shutil.rmtree(folder)
    _report_int8(job, int8, network)
    return int8


def _make(job: Job, network: Network, wanted_NK: Logits, step: Quantize, began: float) -> Int8File:
    from worker.export.onnx_model import onnx_bytes

    graph = network.graph
    calibration, chosen_on, part = _samples(job, step, network)
    quantizer = Quantizer(
        model=onnx_bytes(graph, {name: tensor.numpy() for name, tensor in portable_tensors(network).items()}),
        graph=graph,
        calibration=calibration,
        folder=job.task.scratch / "int8",
        scheme=step.scheme,
        threads=torch.get_num_threads(),
        waiting=job.monitor.check_cancel_or_pause,
    )
    found = quantize(quantizer, chosen_on, most_drop=step.max_accuracy_drop, exclude=step.exclude)
    # batches as in the clean process of the verification
    largest = max((graph, job.plan.baseline), key=lambda one: cost(one).macs)
    test = Sample(job.splits.test, job.preprocessing, verification_batch_size(largest))
    logits_NK = quantizer.logits(found.file, test)
    labels_N = job.splits.test.labels
    before, scores = score(wanted_NK, labels_N), score(logits_NK, labels_N)
    lost = sum(before.correct) - sum(scores.correct)
    left = float_layers(graph, step.exclude)
    for node in graph.nodes:
        if node.home in found.in_float:
            moved = found.in_float[node.home]
            left[node.name] = f"quantized alone it moves the logits by {moved:.3g} of their standard deviation"
    return Int8File(
        step=step,
        model=found.file.read_bytes(),
        logits=logits_NK,
        scores=scores,
        drop=lost / len(labels_N),
        met=lost <= step.max_accuracy_drop * len(labels_N) + 1e-9,
        agreement=agreement(logits_NK, wanted_NK),
        rmse_ratio=rmse_ratio(logits_NK, wanted_NK),
        found=found,
        left=left,
        calibration_images=len(calibration.part),
        chosen_on={"part": part, "images": len(chosen_on.part), "accuracy_drop": found.drop, "files": found.tries},
        pair_sums=read_pair_sums(found.file, step.scheme),
        seconds=time.monotonic() - began,
    )


def _samples(job: Job, step: Quantize, network: Network) -> tuple[Sample, Sample, str]:
    """(what ranges are measured on, what files are compared on, the name of its part); never the test part.

    Both are drawn by the job's seed and not augmented. Where nothing is held out, files are compared on training images
    that no range was measured on, as long as there are any.
    """
    train, held_out, seed = job.splits.train, job.splits.validation, job.training.seed
    order = np.random.default_rng(derive_seed(seed, "int8")).permutation(len(train))
    drawn, rest = order[: step.calibration_images], order[step.calibration_images :]
    size = verification_batch_size(network.graph)
    calibration = Sample(train.take(drawn), job.preprocessing, calibration_batch_size(network.graph))
    affordable = int(CHOSEN_ON_MACS / max(1, cost(network.graph).macs))
    most = max(FEWEST_CHOSEN_ON, min(MOST_CHOSEN_ON, affordable))
    if len(held_out):
        chosen = np.random.default_rng(derive_seed(seed, "int8 chosen on")).permutation(len(held_out))[:most]
        return calibration, Sample(held_out.take(chosen), job.preprocessing, size), "validation"
    remaining = rest[:most] if len(rest) else drawn[:most]
    return calibration, Sample(train.take(remaining), job.preprocessing, size), "train"


def _report_int8(job: Job, int8: Int8File, network: Network) -> None:
    """Write the event, and the sentences of the report."""
    quantized = [node.name for node in network.graph.nodes if node.type in INTEGER and node.name not in int8.left]
    left = [node.name for node in network.graph.nodes if node.home in int8.found.in_float]
    job.journal.event(
        "quantize.applied" if int8.met else "warning",
        f"8 bits in {len(quantized)} layers: accuracy falls by {int8.drop:.4f}, {int8.step.max_accuracy_drop} is allowed; "
        f"{len(int8.model)} bytes" + ("" if int8.met else ": this file is not delivered"),
        level="info" if int8.met else "warn",
        accuracy=int8.scores.accuracy,
        accuracy_drop=int8.drop,
        bytes=len(int8.model),
        left_in_float32=[*left],
    )
    note = job.reached.record.note
    if not int8.met:
        note(
            f"{INT8_MODEL} is not delivered: it loses {int8.drop:.4f} of the accuracy on the test images, "
            f"{int8.drop - int8.step.max_accuracy_drop:.4f} more than max_accuracy_drop {int8.step.max_accuracy_drop}"
        )
        return
    if left:
        note(
            f"8 bits cost accuracy: {len(left)} of {len(left) + len(quantized)} layers stay in float32: {', '.join(left)}"
        )
    if int8.agreement < USUAL_AGREEMENT or int8.rmse_ratio > USUAL_RMSE_RATIO:
        note(
            f"8 bits change more than usual: {1 - int8.agreement:.2%} of the answers on the test images, and the logits "
            f"by {int8.rmse_ratio:.3g} of their standard deviation; both ways, so that the accuracy hides it"
        )
    if int8.chosen_on["part"] == "train":
        note("nothing was held out for validation: what stays in float32 was decided on training images")
    if int8.pair_sums.right_on != EVERYWHERE:
        note(
            f"{INT8_MODEL} is right only on {int8.pair_sums.right_on}: elsewhere sums of two products are cut off at "
            f"{SATURATES_ABOVE}, and in layer {int8.pair_sums.layer} they can reach {int8.pair_sums.largest}"
        )


def write_int8(folder: Path, int8: Int8File) -> Path:
    """The 8-bit file, written into `folder`."""
    write_whole(folder / INT8_MODEL, lambda path: path.write_bytes(int8.model))
    return folder / INT8_MODEL


def int8_document(int8: Int8File, final: Mapping[str, Any], latency_ms: Mapping[str, Any]) -> dict[str, Any]:
    """The report's `int8`: `M` of the 8-bit file, how it was made, and how far it is from the float32 network.

    Parameters and MACs are those of the network, whatever the format; bytes are those of the ONNX file.
    """
    return {
        **int8_measures(int8, final, latency_ms),
        "met": int8.met,
        "max_accuracy_drop": int8.step.max_accuracy_drop,
        "accuracy_drop": int8.drop,
        "size_bytes": len(int8.model),
        "agreement": int8.agreement,
        "rmse_ratio": int8.rmse_ratio,
        "left_in_float32": [{"name": name, "reason": reason} for name, reason in int8.left.items()],
        "calibration": int8.found.calibration,
        "calibration_images": int8.calibration_images,
        "chosen_on": int8.chosen_on,
        "reduce_range": int8.step.scheme == "int8_static",
        **int8.pair_sums.document(),
    }


def int8_measures(int8: Int8File, final: Mapping[str, Any], latency_ms: Mapping[str, Any]) -> dict[str, Any]:
    """`M` of the 8-bit file of the network whose `M` is `final`."""
    return {
        **final,
        "accuracy": int8.scores.accuracy,
        "loss": int8.scores.loss,
        "bytes": len(int8.model),
        "latency_ms": latency_ms,
    }


def int8_row(
    job: Job, int8: Int8File | None, network: Network, final: Mapping[str, Any], latency_ms: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The row of the report's `steps` (without the optimization itself); None: no 8-bit file was asked for."""
    if job.quantization is None:
        return None
    if int8 is None:
        unchanged = {"before": final, "after": final, "layers": [], "seconds": 0.0}
        return {"applied": False, **unchanged, "scheme": job.quantization.scheme, "reason": UNPROVABLE}
    return _step(int8, network, final, latency_ms) | int8.pair_sums.document()


def _step(int8: Int8File, network: Network, final: Mapping[str, Any], latency_ms: Mapping[str, Any]) -> dict[str, Any]:
    """The row of an 8-bit file that was made, delivered or not."""
    return {
        "applied": int8.met,
        "before": final,
        "after": int8_measures(int8, final, latency_ms) if int8.met else final,
        "layers": [row | _format(int8, row["name"]) for row in layer_rows(network, network.graph, int8.step)]
        if int8.met
        else [],
        "seconds": round(int8.seconds, 3),
    }


def _format(int8: Int8File, name: str) -> dict[str, Any]:
    """In how many bits a layer is computed in the 8-bit file, and why in 32."""
    return {"bits": 32, "reason": int8.left[name]} if name in int8.left else {"bits": 8}
