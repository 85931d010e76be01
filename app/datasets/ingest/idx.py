"""IDX files, the format of MNIST and its successors: big-endian header, then the numbers."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from app.datasets.ingest.archive import Archive, ArchiveMember, Stream, read_exactly, refuse_rest
from app.datasets.ingest.arrays import Arrays, check_example, check_finite, check_labels
from app.datasets.ingest.limits import Rejected, UploadLimits, UploadProblem, rejection
from app.datasets.packed.packed import ArrayFile, DType, examples_per_block

NAME = re.compile(
    r"(?:^|[-_.])(?P<split>train|t10k|test)[-_.](?P<kind>images|labels)(?:[-_.]idx[1-5])?(?:[-_.]ubyte)?(?:\.gz)?$"
)
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MOST_AXES = 5


@dataclass(frozen=True)
class IdxHeader:
    """The header of an IDX file: the element type, and the counts of its axes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def match_idx_name(name: str) -> tuple[str, str] | None:
    """(`train` or `test`, `images` or `labels`) for a name such as `train-images-idx3-ubyte.gz`, else None."""
    found = NAME.search(name.split("/")[-1].lower())
    if found is None:
        return None
    return "train" if found["split"] == "train" else "test", found["kind"]


def pack_idx(archive: Archive, out: Path, limits: UploadLimits) -> Arrays:
    """Write the images of an archive's IDX files to `out`; returns the labels, and what the images are.

    Raises Rejected with the name of the file that is wrong.
    """
    arrays = Arrays()
    for entry, packed in archive.members():
        role = match_idx_name(entry.name)
        if role is None:
            continue
        split, kind = role
        if f"{split}.{kind}" in arrays.names:
            raise rejection(entry.name, f"is a second file of {split} {kind}, beside {arrays.names[f'{split}.{kind}']}")
        arrays.names[f"{split}.{kind}"] = entry.name
        stream = Inflated(packed, entry, limits) if entry.name.lower().endswith(".gz") else packed
        if kind == "images":
            arrays.images[split] = write_images(stream, entry.name, out / f"{split}.images.npy", limits)
        else:
            arrays.labels[split] = read_labels(stream, entry.name, limits)
    needed = {"train.images": "train-images-idx3-ubyte", "train.labels": "train-labels-idx1-ubyte"}
    if any(role.startswith("test.") for role in arrays.names):
        needed |= {"test.images": "t10k-images-idx3-ubyte", "test.labels": "t10k-labels-idx1-ubyte"}
    missing = [name for role, name in needed.items() if role not in arrays.names]
    if missing:
        raise Rejected(*(UploadProblem(name, "is missing (the file may end in .gz)") for name in missing))
    return arrays


def read_header(stream: Stream, name: str) -> IdxHeader:
    """The header of an IDX file.

    Raises Rejected for a file of another format.
    """
    magic = read_exactly(stream, 4, name)
    if magic[:2] != b"\x00\x00" or magic[2] not in TYPES or not 1 <= magic[3] <= MOST_AXES:
        raise rejection(name, "is not an IDX file: it does not begin with 0, 0, a known type and 1 to 5 axes")
    counts = np.frombuffer(read_exactly(stream, 4 * magic[3], name), ">u4")
    return IdxHeader(np.dtype(TYPES[magic[2]]), tuple(int(count) for count in counts))


def write_images(stream: Stream, name: str, path: Path, limits: UploadLimits) -> tuple[int, tuple[int, ...], DType]:
    """Write the images of an IDX file to `path` as `.npy`; returns their count, example shape and type.

    Raises Rejected where the counts do not fit the bytes.
    """
    header = read_header(stream, name)
    if len(header.shape) < 2 or 0 in header.shape:
        raise rejection(
            name,
            f"has the shape {header.shape}: the first axis counts the images, at least one more is needed, none is 0",
        )
    if header.dtype.kind == "i":
        raise rejection(name, f"holds {header.dtype.name}; images are unsigned bytes or floats")
    dtype: DType = "uint8" if header.dtype.kind == "u" else "float32"
    count, shape = header.shape[0], header.shape[1:]
    example_bytes = header.dtype.itemsize
    for axis in shape:
        example_bytes *= axis
    check_example(example_bytes, name, limits)
    step = examples_per_block(shape, header.dtype.itemsize)
    with ArrayFile(path, shape, dtype) as file:
        for start in range(0, count, step):
            rows = min(step, count - start)
            block = np.frombuffer(read_exactly(stream, rows * example_bytes, name), header.dtype).reshape(rows, *shape)
            with np.errstate(over="ignore"):
                kept = block.astype(dtype, copy=False)
            check_finite(kept, name, start)
            file.write(kept)
    refuse_rest(stream, name)
    return count, shape, dtype


def read_labels(stream: Stream, name: str, limits: UploadLimits) -> npt.NDArray[np.int64]:
    """The labels of an IDX file, N.

    Raises Rejected where the count does not fit the bytes or a label is impossible.
    """
    header = read_header(stream, name)
    if len(header.shape) != 1 or header.dtype.kind not in "iu":
        raise rejection(
            name, f"has {len(header.shape)} axes of {header.dtype.name}; labels are one axis of whole numbers"
        )
    if header.shape[0] > limits.labels:
        raise rejection(name, f"says it holds {header.shape[0]} labels; the limit is {limits.labels}")
    values = np.frombuffer(read_exactly(stream, header.shape[0] * header.dtype.itemsize, name), header.dtype)
    refuse_rest(stream, name)
    return check_labels(values, name, limits)


class Inflated:
    """The content of a `.gz` member, counted: it may not unpack to more than the limits."""

    def __init__(self, packed: Stream, entry: ArchiveMember, limits: UploadLimits) -> None:
        self._file = gzip.GzipFile(fileobj=cast(Any, packed))
        self._entry = entry
        self._limits = limits
        self._total = 0

    def read(self, size: int, /) -> bytes:
        try:
            data = self._file.read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise rejection(self._entry.name, f"is not a whole gzip file: {error}") from error
        self._total += len(data)
        if self._total > self._limits.unpacked_bytes:
            raise rejection(self._entry.name, f"unpacks to more than {self._limits.unpacked_bytes} bytes")
        if self._total > self._limits.ratio_from_bytes and self._total > self._limits.ratio * max(1, self._entry.size):
            raise rejection(
                self._entry.name,
                f"unpacks to more than {self._limits.ratio} times its size: this looks like an archive bomb",
            )
        return data
