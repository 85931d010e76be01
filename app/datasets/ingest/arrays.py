"""`.npz` files: headers are read first, objects (pickles) are refused, images are written to disk in blocks."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.datasets.ingest.archive import Archive, ArchiveMember, Stream, read_exactly, refuse_rest
from app.datasets.ingest.limits import Rejected, UploadLimits, UploadProblem, rejection
from app.datasets.packed.packed import ArrayFile, DType, examples_per_block

LONGEST_HEADER = 10_000  # numpy's own limit for headers from an unknown source
MOST_AXES = 5  # example number, channels, three axes of space
LONGEST_CLASS_NAME = 200
ARRAYS = {"x_train": "train", "x_test": "test"}
LABELS = {"y_train": "train", "y_test": "test"}


@dataclass
class Arrays:
    """What was found besides the images, which are in `<split>.images.npy` already."""

    labels: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    # by split: count, example shape, type
    images: dict[str, tuple[int, tuple[int, ...], DType]] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # "train.images": what the sender calls it


@dataclass(frozen=True)
class NpyHeader:
    """The header of one `.npy` member."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    header_bytes: int

    @property
    def data_bytes(self) -> int:
        """How many bytes must follow the header."""
        size = self.dtype.itemsize
        for axis in self.shape:
            size *= axis
        return size


def pack_npz(archive: Archive, out: Path, limits: UploadLimits) -> Arrays:
    """Write the images of an `.npz` archive to `out`; returns labels, class names and notes.

    Raises Rejected with the name of the array that is wrong.
    """
    arrays = Arrays(names={f"{split}.images": name for name, split in ARRAYS.items()})
    arrays.names |= {f"{split}.labels": name for name, split in LABELS.items()}
    others: list[str] = []
    for entry, stream in archive.members():
        name = entry.name.removesuffix(".npy")
        if name in ARRAYS:
            split = ARRAYS[name]
            arrays.images[split] = _pack_images(entry, stream, name, out / f"{split}.images.npy", arrays.notes, limits)
        elif name in LABELS:
            arrays.labels[LABELS[name]] = _read_labels(entry, stream, name, limits)
        elif name == "classes":
            arrays.class_names = _read_class_names(entry, stream, limits)
        else:
            others.append(name)
    _check_keys(arrays, others)
    if others:
        arrays.notes.append(f"arrays that are not used: {', '.join(sorted(others)[:20])}")
    return arrays


def _check_keys(arrays: Arrays, others: list[str]) -> None:
    found = [name for name, split in ARRAYS.items() if split in arrays.images]
    found += [name for name, split in LABELS.items() if split in arrays.labels]
    needed = ["x_train", "y_train"] + (["x_test", "y_test"] if {"x_test", "y_test"} & set(found) else [])
    missing = [name for name in needed if name not in found]
    if missing:
        listed = ", ".join([*found, *sorted(others)[:20]]) or "nothing"
        raise Rejected(*(UploadProblem(name, f"is missing; the file holds: {listed}") for name in missing))


def read_header(entry: ArchiveMember, stream: Stream, name: str) -> NpyHeader:
    """The header of a `.npy` member, checked against the member's size.

    Raises Rejected for objects, structured types, impossible shapes and sizes that do not fit.
    """
    magic = read_exactly(stream, 8, name)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise rejection(name, "is not a .npy array")
    length_bytes = 2 if magic[6] == 1 else 4
    length = int.from_bytes(read_exactly(stream, length_bytes, name), "little")
    if length > LONGEST_HEADER:
        raise rejection(name, f"has a header of {length} bytes; the limit is {LONGEST_HEADER}")
    text = read_exactly(stream, length, name).decode("latin-1" if magic[6] < 3 else "utf-8", "replace")
    try:
        fields = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise rejection(name, "has a header that is not a plain description of an array") from error
    header = _parse_header(fields, name, 8 + length_bytes + length)
    if header.header_bytes + header.data_bytes != entry.size:
        raise rejection(name, f"says it holds {header.data_bytes} bytes, but has {entry.size - header.header_bytes}")
    return header


def _parse_header(fields: object, name: str, header_bytes: int) -> NpyHeader:
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise rejection(name, "has a header without descr, fortran_order and shape")
    shape, descr, fortran_order = fields["shape"], fields["descr"], fields["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(axis) is int and axis >= 0 for axis in shape):
        raise rejection(name, "has a shape that is not a tuple of counts")
    if len(shape) > MOST_AXES:
        raise rejection(name, f"has {len(shape)} axes; the limit is {MOST_AXES}")
    if not isinstance(descr, str) or not isinstance(fortran_order, bool):
        raise rejection(name, "is a structured array: save plain numbers")
    try:
        dtype = np.dtype(descr)
    except (TypeError, ValueError) as error:
        raise rejection(name, "has an element type that numpy does not know") from error
    if dtype.hasobject:
        raise rejection(
            name, "holds Python objects, which are pickled and never loaded: save numbers, or texts with dtype=str"
        )
    return NpyHeader(dtype, shape, fortran_order, header_bytes)


def _pack_images(
    entry: ArchiveMember, stream: Stream, name: str, path: Path, notes: list[str], limits: UploadLimits
) -> tuple[int, tuple[int, ...], DType]:
    header = read_header(entry, stream, name)
    if len(header.shape) < 2:
        raise rejection(
            name, f"has the shape {header.shape}: the first axis counts the examples, at least one more is needed"
        )
    if 0 in header.shape:
        raise rejection(name, f"has the shape {header.shape}: it is empty")
    check_example(header.data_bytes // header.shape[0], name, limits)
    dtype: DType
    if header.dtype == np.uint8:
        dtype = "uint8"
    elif header.dtype.kind == "f":
        dtype = "float32"
        if header.dtype.itemsize != 4:
            notes.append(f"{name} was {header.dtype.name} and is kept as float32")
    else:
        advice = f'save {name}.astype("uint8") for values 0 to 255, or .astype("float32")'
        raise rejection(name, f"holds {header.dtype.name}; uint8 and float32 are taken: {advice}")
    with ArrayFile(path, header.shape[1:], dtype) as file:
        for block in _blocks(header, stream, name, path):
            check_finite(block, name, file.count)
            with np.errstate(over="ignore"):
                kept = block.astype(dtype, copy=False)
            check_finite(kept, name, file.count)
            file.write(kept)
    return header.shape[0], header.shape[1:], dtype


def check_example(size: int, name: str, limits: UploadLimits) -> None:
    """Raise Rejected if one example has more bytes than the limit."""
    if size > limits.example_bytes:
        raise rejection(name, f"holds examples of {size} bytes; the limit is {limits.example_bytes}")


def check_finite(block: npt.NDArray[Any], name: str, start: int) -> None:
    """Raise Rejected if the examples from number `start` on hold NaN or infinity."""
    if block.dtype.kind == "f" and not np.isfinite(block).all():
        first = start + int(np.argmax(~np.isfinite(block.reshape(len(block), -1)).all(axis=1)))
        raise rejection(name, f"holds values that are not finite float32 numbers, the first in example {first}")


def _blocks(header: NpyHeader, stream: Stream, name: str, path: Path) -> Iterator[npt.NDArray[Any]]:
    """The examples in order, about 4 MiB at a time; Fortran order is converted on disk, not in memory."""
    step = examples_per_block(header.shape[1:], header.dtype.itemsize)
    if not header.fortran_order:
        example_bytes = header.data_bytes // header.shape[0]
        for start in range(0, header.shape[0], step):
            count = min(step, header.shape[0] - start)
            data = read_exactly(stream, count * example_bytes, name)
            yield np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])
        refuse_rest(stream, name)
        return
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        missing = header.data_bytes
        while missing:
            missing -= file.write(read_exactly(stream, min(missing, 1 << 20), name))
    refuse_rest(stream, name)
    mapped = np.memmap(raw, header.dtype, "r", shape=header.shape, order="F")
    for start in range(0, header.shape[0], step):
        yield np.ascontiguousarray(mapped[start : start + step])
    del mapped
    raw.unlink()


def _read_labels(entry: ArchiveMember, stream: Stream, name: str, limits: UploadLimits) -> npt.NDArray[np.int64]:
    header = read_header(entry, stream, name)
    if header.dtype.kind not in "iu":
        raise rejection(name, f"holds {header.dtype.name}; labels are whole numbers from 0: save {name}.astype(int)")
    if len(header.shape) == 2 and header.shape[1] > 1:
        raise rejection(
            name,
            f"has the shape {header.shape}; labels are one number each: of one-hot rows save {name}.argmax(axis=1)",
        )
    if len(header.shape) not in (1, 2):
        raise rejection(name, f"has the shape {header.shape}; labels are one number an example")
    if header.shape[0] > limits.labels:
        raise rejection(name, f"holds {header.shape[0]} labels; the limit is {limits.labels}")
    values = np.frombuffer(read_exactly(stream, header.data_bytes, name), header.dtype)
    refuse_rest(stream, name)
    return check_labels(values, name, limits)


def check_labels(values: npt.NDArray[Any], name: str, limits: UploadLimits) -> npt.NDArray[np.int64]:
    """The labels as int64, N.

    Raises Rejected for none, a negative one, and more classes than the limit.
    """
    if not len(values):
        raise rejection(name, "holds no labels")
    smallest, largest = int(values.min()), int(values.max())
    if smallest < 0:
        raise rejection(name, f"holds the label {smallest}; labels count from 0")
    if largest >= limits.classes:
        raise rejection(
            name, f"holds the label {largest}; the limit is {limits.classes} classes, counted from 0 without gaps"
        )
    return values.astype(np.int64)


def _read_class_names(entry: ArchiveMember, stream: Stream, limits: UploadLimits) -> tuple[str, ...]:
    name = "classes"
    header = read_header(entry, stream, name)
    if header.dtype.kind not in "USiu" or len(header.shape) != 1:
        raise rejection(name, f"holds {header.dtype.name} of shape {header.shape}; class names are a list of texts")
    if header.shape[0] > limits.classes or header.data_bytes > limits.picture_bytes:
        raise rejection(name, f"is too large: at most {limits.classes} names")
    data = read_exactly(stream, header.data_bytes, name)
    refuse_rest(stream, name)
    values = np.frombuffer(data, header.dtype) if header.dtype.itemsize else np.empty(0, "U1")
    try:
        return check_class_names(
            [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()],
            name,
        )
    except (UnicodeDecodeError, ValueError) as error:
        raise rejection(name, "holds names that are not UTF-8") from error


def check_class_names(names: list[str], file: str) -> tuple[str, ...]:
    """The class names.

    Raises Rejected for empty, long, unprintable and repeated ones.
    """
    for name in names:
        if not name or len(name) > LONGEST_CLASS_NAME or not name.isprintable():
            raise rejection(
                file, f"holds the name {name[:40]!a}; names have 1 to {LONGEST_CLASS_NAME} printable characters"
            )
    if len(set(names)) != len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise rejection(file, f"names the class {twice!r} twice")
    return tuple(names)
