"""Uploaded weights: what a safetensors file must be to be accepted. Read without torch, a megabyte at a time.

    8 bytes     length of the header, little endian
    header      JSON: {"<tensor>": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}; `__metadata__` is text
    data        the tensors, one after the other without gaps

Nothing in the file is trusted. Pointers of faults lead into the header: `/conv1.weight/dtype`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from app.errors import Fault, InvalidWeights
from app.validation.faults import MOST_FAULTS

FLOATS = ("F32", "F16", "BF16", "F64")
"""safetensors' names of the types that weights may have; they become float32."""
COUNTER = "num_batches_tracked"
"""The tensor in which PyTorch counts the batches of a batch norm: accepted as int64, and not read."""
VARIANCE = "running_var"
"""The running variance of a batch norm: not below 0."""

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64"}
"""PyTorch's names of the accepted types; int64 only for `COUNTER`."""
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8}
MOST_HEADER_BYTES = 8 << 20  # 80 bytes a tensor; as Python objects it is some ten times larger
MOST_TENSORS = 50_000  # 10,000 layers with five each
MOST_AXES = 8
LONGEST_NAME = 512
FIRST_BYTES = 64 * 1024  # one read has the header of most networks
PIECE_BYTES = 1 << 20
METADATA = "__metadata__"
PICKLE = "this is a PyTorch pickle: save with safetensors.torch.save_file"
FOREIGN = (
    (b"PK\x03\x04", "this is a zip archive, not a safetensors file: save with safetensors.torch.save_file"),
    (b"\x93NUMPY", "this is a NumPy array, not a safetensors file: save with safetensors.numpy.save_file"),
    (b"\x89HDF", "this is an HDF5 file, not a safetensors file: save with safetensors.torch.save_file"),
    (b"\x1f\x8b", "this is a gzip file: send the safetensors file itself"),
)

Read = Callable[[int, int], bytes]
"""Bytes [start, end) of a file."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `kind` by safetensors' names (`F32`), its bytes [begin, end) after the header."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_weights(path: Path, size_bytes: int) -> tuple[TensorEntry, ...]:
    """The tensors of an uploaded file of this size, in the order of their bytes, all of them finite in float32.

    Raises InvalidWeights: it is no safetensors file, or one with other types, holes, values that are not finite, or
    variances below 0.
    """
    with path.open("rb") as file:

        def read(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        entries, data = read_entries(read, size_bytes)
        file.seek(data)
        broken = {entry.name: what for entry in entries if (what := _wrong_values(file, entry)) is not None}
    if broken:
        faults = [Fault(_pointer(name), f"{name} has {what}") for name, what in broken.items()]
        raise InvalidWeights(faults[:MOST_FAULTS])
    _compare_with_library(path, entries)
    return entries


def read_entries(read: Read, size_bytes: int) -> tuple[tuple[TensorEntry, ...], int]:
    """(the tensors in the order of their bytes, where the data begin) of a file of this size; reads the header alone.

    Raises InvalidWeights.
    """
    first = read(0, min(size_bytes, FIRST_BYTES))
    length = int.from_bytes(first[:8], "little")
    if len(first) < 9 or first[8:9] != b"{" or not 2 <= length <= size_bytes - 8:
        raise InvalidWeights([_foreign(first, length, size_bytes)])
    if length > MOST_HEADER_BYTES:
        message = f"the header has {length} bytes; at most {MOST_HEADER_BYTES} are allowed"
        raise InvalidWeights([Fault("", message, limit=MOST_HEADER_BYTES, value=length)])
    header = first[8 : 8 + length]
    if len(header) < length:
        header += read(len(first), 8 + length)
    document = _parse(header)
    document.pop(METADATA, None)
    if not 1 <= len(document) <= MOST_TENSORS:
        message = f"{len(document)} tensors: a file has 1 to {MOST_TENSORS}"
        raise InvalidWeights([Fault("", message, limit=MOST_TENSORS, value=len(document))])
    entries, faults = [], []
    for name, stated in document.items():
        found = _entry(name, stated)
        if isinstance(found, TensorEntry):
            entries.append(found)
        else:
            faults.append(found)
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    faults = faults[:MOST_FAULTS] or [*_layout_faults(entries, size_bytes - 8 - length)][:1]
    if faults:
        raise InvalidWeights(faults)
    return tuple(entries), 8 + length


def _foreign(first: bytes, length: int, size_bytes: int) -> Fault:
    """What the bytes are that do not begin like a safetensors file."""
    if first[8:9] == b"{":
        message = (
            f"the file is cut off or damaged: its header would have {length} bytes, the whole file has {size_bytes}"
        )
        return Fault("", message, limit=max(0, size_bytes - 8), value=length)
    if first.startswith(b"PK\x03\x04") and b"/data.pkl" in first:
        return Fault("", PICKLE)
    if len(first) > 2 and first[0] == 0x80 and 2 <= first[1] <= 5 and first[2] != 0:  # pickle's protocols 2 to 5
        return Fault("", PICKLE)
    for magic, sentence in FOREIGN:
        if first.startswith(magic):
            return Fault("", sentence)
    return Fault("", "this is not a safetensors file: save with safetensors.torch.save_file")


def _parse(header: bytes) -> dict[str, Any]:
    """The header's JSON object. Raises InvalidWeights: it is none, is nested too deep, or names a tensor twice."""
    if header.count(b"{") + header.count(b"[") > 4 * MOST_TENSORS:
        raise InvalidWeights([Fault("", f"the header has more than {MOST_TENSORS} tensors", limit=MOST_TENSORS)])
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise InvalidWeights([Fault("", f"the header is not JSON: {reason}")]) from error
    if not isinstance(document, dict):
        raise InvalidWeights([Fault("", "the header is not a JSON object")])
    return document


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise InvalidWeights([Fault("", f"the header names {name[:LONGEST_NAME]!r} twice")])
        made[name] = value
    return made


def _entry(name: str, stated: Any) -> TensorEntry | Fault:
    """The tensor as the header states it, or what is wrong with it alone."""
    at = _pointer(name)
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        message = f"a tensor's name has 1 to {LONGEST_NAME} printable characters; a layer's: <layer>.weight"
        return Fault("", message, limit=LONGEST_NAME, value=len(name))
    if not isinstance(stated, dict) or not {"dtype", "shape", "data_offsets"} <= stated.keys():
        return Fault(at, f"{name} does not state dtype, shape and data_offsets")
    kind, shape, offsets = stated["dtype"], stated["shape"], stated["data_offsets"]
    if kind not in FLOATS and not (kind == "I64" and name.rpartition(".")[2] == COUNTER):
        taken = ", ".join(NAMES[known] for known in FLOATS)
        shown = kind[:20] if isinstance(kind, str) else type(kind).__name__
        return Fault(f"{at}/dtype", f"{name} is {shown}; weights are one of: {taken}", limit=list(FLOATS), value=shown)
    if not _are_sizes(shape) or len(shape) > MOST_AXES:
        return Fault(f"{at}/shape", f"{name}: a shape is a list of at most {MOST_AXES} sizes", limit=MOST_AXES)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return Fault(f"{at}/data_offsets", f"{name}: data_offsets are [begin, end]")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[kind]
    if end - begin != needed:
        message = f"{name} has {end - begin} bytes; {NAMES[kind]} of this shape takes {needed}"
        return Fault(f"{at}/data_offsets", message, limit=needed, value=end - begin)
    return TensorEntry(name, kind, tuple(shape), begin, end)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)


def _layout_faults(entries: Sequence[TensorEntry], data_bytes: int) -> Iterator[Fault]:
    """Where tensors overlap, leave gaps, or are more or less than the file has after its header."""
    present, before = 0, None
    for entry in entries:
        at = f"{_pointer(entry.name)}/data_offsets"
        if entry.begin < present:
            yield Fault(at, f"{entry.name} overlaps {before}", limit=present, value=entry.begin)
        elif entry.begin > present:
            message = f"a gap of {entry.begin - present} bytes lies before {entry.name}"
            yield Fault(at, message, limit=present, value=entry.begin)
        present, before = max(present, entry.end), entry.name
    if present > data_bytes:
        message = f"the file is cut off: its tensors need {present} bytes after the header, it has {data_bytes}"
        yield Fault("", message, limit=present, value=data_bytes)
    elif present < data_bytes:
        message = f"{data_bytes - present} bytes follow the last tensor"
        yield Fault("", message, limit=present, value=data_bytes)


def _wrong_values(file: BinaryIO, entry: TensorEntry) -> str | None:
    """What is wrong with the values of the tensor, whose bytes are next in the file; None: nothing."""
    left, wrong = entry.end - entry.begin, None
    of_variances = entry.name.rpartition(".")[2] == VARIANCE
    while left:
        piece = file.read(min(left, PIECE_BYTES))
        if not piece:
            raise InvalidWeights([Fault("", "the file is cut off: it became shorter while it was read")])
        left -= len(piece)
        if wrong is None and entry.kind != "I64":
            values = _as_float32(piece, entry.kind)
            if not bool(np.isfinite(values).all()):
                wrong = "values that are not finite in float32"
            elif of_variances and bool((values < 0).any()):
                wrong = "variances below 0"
    return wrong


def _as_float32(piece: bytes, kind: str) -> npt.NDArray[np.float32]:
    if kind == "BF16":  # NumPy has no such type: it is the upper half of a float32
        return (np.frombuffer(piece, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    values = np.frombuffer(piece, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[kind])
    with np.errstate(over="ignore"):  # float64 beyond float32's largest becomes infinite, which is what is asked for
        return values.astype(np.float32, copy=False)


def _compare_with_library(path: Path, entries: Sequence[TensorEntry]) -> None:
    """Compare our reading of the header with that of the library with which the worker reads.

    Raises InvalidWeights: the library refuses the file, or finds other tensors.
    """
    try:
        with safe_open(path, "numpy") as file:
            names = set(file.keys())
    except (SafetensorError, ValueError) as error:
        raise InvalidWeights([Fault("", f"the safetensors library refuses the file: {str(error)[:200]}")]) from error
    if names != {entry.name for entry in entries}:
        raise InvalidWeights([Fault("", "the safetensors library finds other tensors in the file")])


def _pointer(name: str) -> str:
    return "/" + name.replace("~", "~0").replace("/", "~1")
