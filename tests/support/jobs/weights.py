"""Files of weights as users and attackers send them, as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save


def good(**shapes: tuple[int, ...]) -> bytes:
    """A safetensors file of float32 tensors with these shapes and random values; dots in names are written `__`."""
    random = np.random.default_rng(0)
    return save({name.replace("__", "."): random.normal(size=shape).astype("f4") for name, shape in shapes.items()})


def weights_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with any header (a JSON value, text or bytes) and any data; `length` lies about the header's."""
    text = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else b""
    text = text or json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: object = "F32") -> dict[str, Any]:
    """What a header says of a tensor; default shape: one axis of four-byte numbers."""
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors_of(file: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor that the header of a good file states."""
    header: Mapping[str, Any] = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return {
        name: (stated["dtype"], tuple(stated["shape"])) for name, stated in header.items() if name != "__metadata__"
    }
