"""The packed form of a data set: one folder of arrays and `dataset.json`, written once, never changed.

dataset.json            the manifest below
<split>.labels.npy      int64, N
<split>.images.npy      uint8 or float32, N x the axes that were sent
<split>.pixels.bin      or, for pictures of mixed sizes: their bytes one after the other, height x width x channels,
<split>.sizes.npy       and int64 N x 4: offset, height, width, channels
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from app.spec.data import DataFacts

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
PACKED = "packed"  # the folder that the checking process fills, its answer beside it
RESULT = "result.json"
SPLITS = ("train", "test")
BLOCK_BYTES = 4 << 20  # how much of an array is in memory at once

DType = Literal["uint8", "float32"]


@dataclass(frozen=True)
class Manifest:
    """The content of `dataset.json`.

    `sha256` is over all arrays and class names, so it is that of the content, wherever it came from.
    `scale` multiplies stored values to about 0..1: 1/255 for uint8, 1 for float32.
    """

    name: str
    dtype: DType
    scale: float
    classes: tuple[str, ...]
    example_shape: tuple[int, ...] | None
    pictures: bool
    train: int
    test: int
    held_out: bool
    notes: tuple[str, ...]
    sha256: str

    def facts(self) -> DataFacts:
        """The facts that a job's plan depends on."""
        return DataFacts(
            name=self.name,
            example_shape=self.example_shape,
            classes=len(self.classes),
            class_names=self.classes,
            train=self.train,
            test=self.test,
            dtype=self.dtype,
            pictures=self.pictures,
        )

    def document(self) -> dict[str, Any]:
        """The manifest as JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "dtype": self.dtype,
            "scale": self.scale,
            "classes": list(self.classes),
            "example_shape": None if self.example_shape is None else list(self.example_shape),
            "pictures": self.pictures,
            "splits": {"train": self.train, "test": self.test},
            "held_out": self.held_out,
            "notes": list(self.notes),
            "sha256": self.sha256,
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Manifest:
        """The manifest that `document` describes.

        Raises ValueError for another format version.
        """
        if document.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"packed data set of format {document.get('format_version')}, this program reads {FORMAT_VERSION}"
            )
        shape = document["example_shape"]
        return cls(
            name=document["name"],
            dtype=document["dtype"],
            scale=document["scale"],
            classes=tuple(document["classes"]),
            example_shape=None if shape is None else tuple(shape),
            pictures=document["pictures"],
            train=document["splits"]["train"],
            test=document["splits"]["test"],
            held_out=document["held_out"],
            notes=tuple(document["notes"]),
            sha256=document["sha256"],
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed folder.

    Raises FileNotFoundError where there is none, ValueError where it is not one.
    """
    return Manifest.from_document(json.loads((folder / MANIFEST).read_text()))


def write_manifest(
    folder: Path,
    *,
    name: str,
    dtype: DType,
    classes: Sequence[str],
    example_shape: tuple[int, ...] | None,
    pictures: bool = False,
    held_out: bool = False,
    notes: Sequence[str] = (),
) -> Manifest:
    """Complete a packed folder with `dataset.json`: counts and content hash are those of its files; returns it."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, dtype, list(classes), example_shape, pictures]).encode())
    for path in packed_files(folder):
        digest.update(f"\n{path.name} {sha256_of(path)}".encode())
    counts = {split: len(np.load(folder / f"{split}.labels.npy", mmap_mode="r")) for split in SPLITS}
    manifest = Manifest(
        name=name,
        dtype=dtype,
        scale=1 / 255 if dtype == "uint8" else 1.0,
        classes=tuple(classes),
        example_shape=example_shape,
        pictures=pictures,
        train=counts["train"],
        test=counts["test"],
        held_out=held_out,
        notes=tuple(notes),
        sha256=digest.hexdigest(),
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.document(), indent=1))
    return manifest


def packed_files(folder: Path) -> list[Path]:
    """The array files of a packed folder, by name; not the manifest and not the resized copies."""
    names = [f"{split}.{part}" for split in SPLITS for part in ("images.npy", "labels.npy", "pixels.bin", "sizes.npy")]
    return sorted(folder / name for name in names if (folder / name).exists())


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ArrayFile:
    """Writes one `.npy` file block by block; the number of examples is known at the end only."""

    def __init__(self, path: Path, example_shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.path = path
        self.example_shape = example_shape
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._file = path.open("wb")
        self._header_bytes = self._write_header()

    def _write_header(self) -> int:
        self._file.seek(0)
        # numpy pads the header for a growing first axis, so the final header has the length of this one
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.example_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def write(self, examples: npt.NDArray[Any]) -> None:
        """Append examples of the file's shape and type."""
        assert examples.shape[1:] == self.example_shape, (examples.shape, self.example_shape)
        self._file.write(np.ascontiguousarray(examples, dtype=self.dtype).data)
        self.count += len(examples)

    def close(self) -> None:
        """Write the final header; a second call does nothing."""
        if not self._file.closed:
            assert self._write_header() == self._header_bytes
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def examples_per_block(example_shape: tuple[int, ...], itemsize: int) -> int:
    """The number of examples that are read at once: about 4 MiB of them, at least one."""
    return max(1, BLOCK_BYTES // max(1, int(np.prod(example_shape, dtype=np.int64)) * itemsize))


def read_blocks(path: Path) -> Iterator[npt.NDArray[Any]]:
    """The examples of a `.npy` file in order, 4 MiB at a time, by plain reads: mapped pages would count as memory."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        assert version == (1, 0), version
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran_order
        step = examples_per_block(shape[1:], dtype.itemsize)
        for start in range(0, shape[0], step):
            block = np.empty((min(step, shape[0] - start), *shape[1:]), dtype)
            file.readinto(block.data.cast("B"))
            yield block


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`: one process at a time; the kernel frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure_packed(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make `folder` if it is not there, by `build(partial)` in a sibling that is then renamed; returns it, complete.

    Several processes may call it at once: one builds, the others wait. A sibling left by a killed process is removed.
    """
    if (folder / MANIFEST).exists():
        return folder
    with hold_lock(folder.with_name(f".{folder.name}.lock")):
        if (folder / MANIFEST).exists():
            return folder
        for left in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left)
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
        try:
            build(partial)
            sync_folder(partial)
            if folder.exists():  # without a manifest: it was never complete
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def sync_folder(folder: Path) -> None:
    """Make the folder's files survive a power cut."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
