"""Checkpoint files: tensors as safetensors, everything else as JSON; never pickle. Nothing here needs torch.

A checkpoint is two files, `<name>.safetensors` and `<name>.json`. The JSON is written last and holds size and sha256
of the first, so a pair is whole exactly when `check_checkpoint` accepts it. What the tensors mean is told in
`worker/run/state.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from app.errors import EspalierError

FORMAT_VERSION = 1
STEM = "checkpoint"  # the two files in the folder that a resumed job is given
_CHUNK_BYTES = 1 << 20

Arrays = dict[str, NDArray[Any]]


class CheckpointRefused(EspalierError):
    """The checkpoint cannot be used."""

    code = "checkpoint_corrupt"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that passed every check: arrays by name, and the state beside them."""

    arrays: Arrays
    state: dict[str, Any]


def spec_digest(spec: Mapping[str, Any]) -> str:
    """The sha256 of a job's document, the same for every spelling of the same JSON."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_checkpoint(folder: Path, name: str, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> Path:
    """The path of `<name>.safetensors`, durable beside its `<name>.json`.

    Both are written to a sibling, synced and renamed, tensors first: a crash at any moment leaves the pair before or
    the pair after.

    Raises:
        OSError: the disk is full or failing; no file of this name is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = folder / f"{name}.safetensors"
    _write_durably(tensors, lambda path: _save(arrays, path))
    document = {
        **state,
        "format_version": FORMAT_VERSION,
        "tensors": {"size_bytes": tensors.stat().st_size, "sha256": file_digest(tensors)},
    }
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    _write_durably(folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
    return tensors


def check_checkpoint(tensors: Path, state: Path, *, spec_sha256: str | None = None) -> dict[str, Any]:
    """The state of a checkpoint whose two files are whole and, where `spec_sha256` is given, belong to that job.

    Raises:
        CheckpointRefused: a file is missing, cut, changed, of another format version or of another job; the message
        says which.
    """
    document = _read_state(state)
    if document.get("format_version") != FORMAT_VERSION:
        raise CheckpointRefused(
            f"{state.name} has format version {document.get('format_version')}, not {FORMAT_VERSION}"
        )
    if spec_sha256 is not None and document.get("spec_sha256") != spec_sha256:
        raise CheckpointRefused(f"{state.name} belongs to another job description")
    stated = document.get("tensors")
    if not isinstance(stated, dict):
        raise CheckpointRefused(f"{state.name} does not say what its tensors are")
    try:
        size_bytes = tensors.stat().st_size
        if size_bytes != stated.get("size_bytes"):
            raise CheckpointRefused(f"{tensors.name} has {size_bytes} bytes, not {stated.get('size_bytes')}")
        if file_digest(tensors) != stated.get("sha256"):
            raise CheckpointRefused(f"{tensors.name} does not have the sha256 that was written with it")
    except OSError as exc:
        raise CheckpointRefused(f"{tensors.name} cannot be read: {exc.strerror}") from exc
    return document


def read_checkpoint(folder: Path, *, spec_sha256: str | None = None, name: str = STEM) -> LoadedCheckpoint:
    """The checkpoint `name` of a folder.

    Raises:
        CheckpointRefused: as check_checkpoint, or the tensors' file is no safetensors file.
    """
    tensors = folder / f"{name}.safetensors"
    state = check_checkpoint(tensors, folder / f"{name}.json", spec_sha256=spec_sha256)
    try:
        return LoadedCheckpoint(load_file(tensors), state)
    except SafetensorError as exc:
        raise CheckpointRefused(f"{tensors.name} is not a safetensors file: {exc}") from exc


def file_digest(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointRefused(f"{path.name} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise CheckpointRefused(f"{path.name} is not JSON: it was cut or changed") from exc
    if not isinstance(document, dict):
        raise CheckpointRefused(f"{path.name} is not a JSON object")
    return document


def _save(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    try:
        # order="C" keeps a 0-dimensional array 0-dimensional, which ascontiguousarray does not
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)
    except SafetensorError as exc:
        raise _as_os_error(exc) from exc


def _as_os_error(error: SafetensorError) -> OSError:
    """The system's error inside a message such as `I/O error: No space left on device (os error 28)`."""
    _, _, number = str(error).partition("(os error ")
    code = int(number.partition(")")[0]) if number else 5
    return OSError(code, os.strerror(code))


def _write_durably(path: Path, write: Callable[[Path], object]) -> None:
    sibling = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(sibling)
        with sibling.open("rb+") as file:
            os.fsync(file.fileno())
        sibling.replace(path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
