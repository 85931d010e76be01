"""The end of a job: latencies, files, the verification of each in a clean process, the report."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import DiskFull, JsonValue
from app.network.cost import cost
from app.schemas.report import ClassRowSchema, ReportFileSchema
from worker.evaluation import Scores, score
from worker.export.files import export_network, file_sha256, kind_of, media_type_of, write_json, write_manifest
from worker.latency import Latency, measure_latency
from worker.network import Network, assign_tensors, build_network, floating_tensors
from worker.run.handlers import Ending, step_rows
from worker.run.int8 import Int8File, int8_document, int8_measures, int8_row, make_int8, write_int8
from worker.run.job import Job, halved_batches
from worker.run.report import class_rows, compressed_bytes, environment, measures, sparse_file
from worker.run.sensitivity import table_document
from worker.verification.verification import Logits, NetworkKey, Verification, compute_logits, verify_files

REPORT = "report.json"


@dataclass(frozen=True)
class Delivery:
    """One file of the result, on this machine's disk."""

    name: str
    kind: str
    path: Path
    size_bytes: int
    sha256: str
    media_type: str

    def document(self) -> dict[str, JsonValue]:
        """The delivery as JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "media_type": self.media_type,
        }


@dataclass(frozen=True)
class Delivered:
    """A job that succeeded: its files (the manifest last), summary and report."""

    artifacts: list[Delivery]
    summary: dict[str, Any]
    report: dict[str, Any]
    stopped_early: bool


def deliver(job: Job, *, stopped_early: bool) -> Delivered:
    """Measure, export and verify what was reached.

    Raises:
        VerificationFailed: a file does not reproduce the network.
        QuantizationFailed: the 8-bit file could not be made.
        DiskFull: there is no room for the files.
        Interrupted: the user cancelled or paused.
    """
    try:
        return _deliver(job, stopped_early)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull("the worker's disk is full: the result could not be written") from exc


@dataclass(frozen=True)
class _Result:
    """What is delivered: both networks on the CPU, the 8-bit file, the files with their verification, the latencies."""

    dense: Network
    pruned: Network
    int8: Int8File | None
    latency: Latency
    folder: Path
    files: list[Path]
    verified: Verification


def _deliver(job: Job, stopped_early: bool) -> Delivered:
    result = _produce(job)
    labels = job.splits.test.labels
    baseline_scores, final_scores = (score(result.verified.logits[key], labels) for key in ("baseline", "pruned"))
    final = _measured(result.pruned, final_scores, result.latency.pruned, result.folder / "pruned.safetensors")
    summary = {
        "baseline": _measured(
            result.dense, baseline_scores, result.latency.dense, result.folder / "baseline.safetensors"
        ),
        "final": final,
    }
    if result.int8 is not None and result.int8.met:
        summary["int8"] = int8_measures(result.int8, final, result.latency.int8)
    job.monitor.add_elapsed()
    classes = class_rows(job.dataset.class_names, baseline_scores, final_scores)
    report = _shaped(_report_parts(job, result, summary, classes, stopped_early))
    files = [*result.files, result.folder / REPORT]
    write_json(result.folder / REPORT, report)
    verification, task = result.verified.document(), job.task
    files.append(
        write_manifest(result.folder, job_id=task.job_id, attempt=task.attempt, files=files, verification=verification)
    )
    job.journal.progress(job.tracker.progress(1.0))
    return Delivered([_delivery(path) for path in files], summary, report, stopped_early)


def _produce(job: Job) -> _Result:
    """Make the 8-bit file if one is asked for, measure latencies, export, and verify every file."""
    dense = build_network(job.plan.baseline)
    assign_tensors(dense, {name: tensor.cpu() for name, tensor in job.reached.kept["baseline"].items()})
    pruned, test = on_cpu(job.reached.network), job.splits.test
    references: dict[NetworkKey, Logits] = {
        "pruned": compute_logits(pruned, test.images, job.preprocessing),
        "baseline": compute_logits(dense, test.images, job.preprocessing),
    }
    int8 = make_int8(job, pruned, references["pruned"])
    latency = _measure(job, dense, pruned, int8)
    folder = job.task.scratch / "export"
    files = _export(job, dense, pruned, int8, folder)
    if int8 is not None and int8.met:
        references["int8"] = int8.logits
    verified = verify_files(
        folder,
        images=test.images,
        labels=test.labels,
        reference_logits=references,
        scheme="int8_static" if int8 is None else int8.step.scheme,
        threads=torch.get_num_threads(),
        waiting=job.monitor.check_cancel_or_pause,
    )
    return _Result(dense, pruned, int8, latency, folder, files, verified)


def _report_parts(
    job: Job, result: _Result, summary: Mapping[str, Any], classes: Sequence[ClassRowSchema], stopped_early: bool
) -> dict[str, Any]:
    """The parts of the report; None: the report has no such part."""
    int8, latency, final = result.int8, result.latency, summary["final"]
    row = int8_row(job, int8, result.pruned, final, latency.int8)
    return {
        "job_id": job.task.job_id,
        "attempt": job.task.attempt,
        "stopped_early": stopped_early,
        "baseline": summary["baseline"],
        "final": final,
        "int8": None if int8 is None else int8_document(int8, final, latency.int8),
        "steps": step_rows(job, Ending(final, row)),
        "classes": classes,
        "sensitivity": None if job.plan.spec.sensitivity is None else table_document(job),
        "verification": result.verified.document(),
        "latency": dict(latency.conditions),
        "compressed_bytes": compressed_bytes([path for path in result.files if path.suffix == ".safetensors"]),
        "sparse": sparse_file(result.folder),
        "data": _data(job),
        "environment": environment(job.precision) | {"seed": job.training.seed},
        "seconds": round(job.reached.record.seconds, 3),
        "notes": _notes(job),
    }


def _shaped(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The report as its schema has it, in the order in which it is given."""
    stated = {name: part for name, part in parts.items() if part is not None}
    shaped: dict[str, Any] = _in_order_of(
        stated, ReportFileSchema.model_validate(stated).model_dump(exclude_unset=True)
    )
    return shaped


def _in_order_of(given: Any, dumped: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: _in_order_of(part, dumped[name]) for name, part in given.items()}
    if isinstance(given, list | tuple):
        return [_in_order_of(*pair) for pair in zip(given, dumped, strict=True)]
    return dumped


def _measure(job: Job, dense: Network, pruned: Network, int8: Int8File | None) -> Latency:
    """The latencies of both networks and the 8-bit file; what they show is noted."""
    job.monitor.enter("measuring", message="measuring latencies, dense and pruned in turns")
    latency = measure_latency(
        dense,
        pruned,
        int8=None if int8 is None else int8.model,
        seconds=job.task.latency_s,
        waiting=job.monitor.check_cancel_or_pause,
    )
    if any(record.rounds for record in job.reached.record.steps):
        for sentence in latency.notes:
            job.reached.record.note(sentence)
    if int8 is not None and int8.met:
        for sentence in latency.int8_notes:
            job.reached.record.note(sentence)
    return latency


def _export(job: Job, dense: Network, pruned: Network, int8: Int8File | None, folder: Path) -> list[Path]:
    """The files of both networks, written into `folder`; the 8-bit file only if it keeps to max_accuracy_drop."""
    job.monitor.enter("exporting", message="exporting, and verifying each file in a clean process")
    job.monitor.check_cancel_or_pause()
    masks = job.reached.masks
    files: list[Path] = []
    for stem, network in (("pruned", pruned), ("baseline", dense)):
        files += export_network(
            network,
            folder,
            stem=stem,  # type: ignore[arg-type]
            class_names=job.dataset.class_names,
            preprocessing=job.preprocessing,
            formats=job.plan.spec.exports,
            sparse=masks is not None and masks.zeros() > 0,
        )
        if stem == "pruned" and int8 is not None and int8.met:
            files.append(write_int8(folder, int8))
    return files


def on_cpu(network: Network) -> Network:
    """A copy of the network on the CPU, in torch's usual layout: what is exported, and what gives the reference."""
    copy = build_network(network.graph)
    assign_tensors(copy, {name: tensor.cpu() for name, tensor in floating_tensors(network).items()})
    return copy.eval()


def _measured(network: Network, scores: Scores, latency_ms: dict[str, Any], weights: Path) -> dict[str, Any]:
    size_bytes = weights.stat().st_size
    assert size_bytes == cost(network.graph).bytes, (
        f"{weights.name} has {size_bytes} bytes, {cost(network.graph).bytes} were planned"
    )
    return measures(network, scores, latency_ms=latency_ms)


def _data(job: Job) -> dict[str, Any]:
    return {
        "name": job.dataset.name,
        "sha256": job.dataset.sha256,
        "train": len(job.splits.train),
        "validation": len(job.splits.validation),
        "test": len(job.splits.test),
        "preprocessing": job.preprocessing.document(),
    }


def _notes(job: Job) -> list[str]:
    """What was noted on the way, and what the data and the device add."""
    notes = [*job.reached.record.notes, *job.dataset.notes, *job.precision.notes]
    if job.validation is None:
        notes.append("nothing was held out for validation: the last weights were taken, not the best epoch's")
    if job.reached.micro_batches > 1:
        notes.append(f"memory ran out once: {halved_batches(job)}")
    if job.reached.choice_parts > 1:
        notes.append(f"memory ran out: it was evaluated and chosen on {job.images_at_a_time()} images at a time")
    return list(dict.fromkeys(notes))


def _delivery(path: Path) -> Delivery:
    return Delivery(
        name=path.name,
        kind=kind_of(path.name),
        path=path,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        media_type=media_type_of(path.name),
    )
