"""The files that a job delivers: weights, architecture, readable source, ONNX, manifest; each whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from app.errors import JsonValue
from app.network.architecture import Preprocessing, architecture_document
from app.network.cost import SAFETENSORS_METADATA
from worker.export.pytorch_source import model_source
from worker.export.sparse_file import SPARSE_WEIGHTS, save_sparse
from worker.network import Network, build_network

Stem = Literal["pruned", "baseline"]
MANIFEST_VERSION = 1
MODEL_SOURCE = "model.py"
INT8_MODEL = "pruned.int8.onnx"
KINDS = {".safetensors": "weights", ".onnx": "onnx", ".py": "source", ".json": "document"}
KINDS_BY_NAME = {
    "architecture.json": "architecture",
    "baseline.architecture.json": "architecture",
    "report.json": "report",
    "manifest.json": "manifest",
}
MEDIA_TYPES = {
    ".safetensors": "application/octet-stream",
    ".onnx": "application/octet-stream",
    ".py": "text/x-python; charset=utf-8",
    ".json": "application/json",
}


def kind_of(name: str) -> str:
    """The `kind` of an artifact: weights, architecture, source, onnx, report, manifest."""
    return KINDS_BY_NAME.get(name) or KINDS[Path(name).suffix]


def media_type_of(name: str) -> str:
    """The media type of an artifact."""
    return MEDIA_TYPES[Path(name).suffix]


def architecture_name(stem: Stem) -> str:
    """The name of the file that describes the network `stem`."""
    return "architecture.json" if stem == "pruned" else f"{stem}.architecture.json"


def export_network(
    network: Network,
    folder: Path,
    *,
    stem: Stem,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    formats: Collection[str] = ("safetensors", "onnx", "pytorch"),
    sparse: bool = False,
) -> list[Path]:
    """Write the files of one network; their paths, in the order in which they are listed.

    `<stem>.safetensors` and its architecture are always written: they are the result, and other jobs start from them.
    The pruned network also gets `model.py` (format "pytorch") and `pruned.onnx` (format "onnx"); with `sparse` the file
    without zeros too (format "safetensors", `worker/export/sparse_file.py`). Weights are written as contiguous float32 from
    the CPU, whatever precision and memory format the training used.
    """
    from worker.export.onnx_model import onnx_bytes  # not before an export: importing onnx takes 0.3 s

    folder.mkdir(parents=True, exist_ok=True)
    tensors = portable_tensors(network)
    weights, architecture = folder / f"{stem}.safetensors", folder / architecture_name(stem)
    write_whole(weights, lambda path: save_file(tensors, path, metadata=SAFETENSORS_METADATA))
    write_json(architecture, architecture_document(network.graph, class_names, preprocessing))
    written = [weights, architecture]
    sparse = sparse and stem == "pruned" and "safetensors" in formats
    if sparse:
        write_whole(folder / SPARSE_WEIGHTS, lambda path: save_sparse(tensors, path))
        written.insert(1, folder / SPARSE_WEIGHTS)
    if stem == "pruned" and "pytorch" in formats:
        source = model_source(network.graph, class_names, preprocessing, sparse=sparse)
        write_whole(folder / MODEL_SOURCE, lambda path: path.write_text(source, encoding="utf-8"))
        written.append(folder / MODEL_SOURCE)
    if stem == "pruned" and "onnx" in formats:
        model = onnx_bytes(network.graph, {name: tensor.numpy() for name, tensor in tensors.items()})
        write_whole(folder / f"{stem}.onnx", lambda path: path.write_bytes(model))
        written.append(folder / f"{stem}.onnx")
    return written


def portable_tensors(network: Network) -> dict[str, Tensor]:
    """The network's tensors as they are stored: float32, contiguous, on the CPU, without `num_batches_tracked`."""
    return {
        name: tensor.detach().to("cpu", torch.float32).contiguous(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }


def portable_network(network: Network) -> Network:
    """A copy of the network in eval mode, float32 on the CPU, as one gets it by loading its file."""
    copy = build_network(network.graph)
    copy.load_state_dict(portable_tensors(network))
    return copy.eval()


def file_sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    *,
    job_id: str,
    attempt: int,
    files: Sequence[Path],
    verification: Mapping[str, JsonValue] | None = None,
) -> Path:
    """Write `manifest.json`: job, attempt, and of each file name, kind, size in bytes, sha256, verification if any.

    The entry of the 8-bit file states its scheme too. The manifest is written last: a folder that has one is complete.
    Its path.
    """
    entries: list[JsonValue] = []
    for path in files:
        size = path.stat().st_size
        entry: dict[str, JsonValue] = {
            "name": path.name,
            "kind": kind_of(path.name),
            "size": size,
            "size_bytes": size,  # the same number under the name that the list of artifacts has
            "sha256": file_sha256(path),
        }
        if verification and path.name in verification:
            verified = verification[path.name]
            entry["verification"] = verified
            if isinstance(verified, dict) and "scheme" in verified:
                entry["scheme"] = verified["scheme"]
        entries.append(entry)
    manifest = folder / "manifest.json"
    write_json(manifest, {"format_version": MANIFEST_VERSION, "job_id": job_id, "attempt": attempt, "files": entries})
    return manifest


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document whole or not at all: UTF-8, indented, in the order given."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling, force it to the disk and replace `path` with it in one step.

    Raises what `write` raises; then `path` is as it was, and no temporary file remains.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
