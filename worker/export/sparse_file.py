"""`pruned.sparse.safetensors`: the weights of a network with many zeros, stored without them.

A tensor is stored as it is, or, where that is smaller, as two:

    <key>.mask     uint8: one bit for each element in row-major order, the lowest bit of a byte first; 1: it is stored
    <key>.values   float32: the stored elements in the same order; all others are +0.0

The metadata has one key, `espalier`: {"format_version": 1, "shapes": {<key>: the shape of each tensor that is two}}.
`load` in the `model.py` of the same job reads it (`worker/export/pytorch_source.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.network.cost import FLOAT_BYTES

SPARSE_WEIGHTS = "pruned.sparse.safetensors"
HEADER_BYTES = 192  # about what a second entry of the header and a shape in the metadata take
FORMAT_VERSION = 1


def sparse_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """(what is stored, the shapes of the tensors that are stored as two) of contiguous float32 tensors on the CPU.

    An element is left out if its bits are those of +0.0, so that reading gives every bit back, -0.0 and NaN too.
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for key, tensor in tensors.items():
        values = tensor.numpy().ravel()
        kept = values.view(np.int32) != 0
        bits = np.packbits(kept, bitorder="little")
        if bits.nbytes + FLOAT_BYTES * int(np.count_nonzero(kept)) + HEADER_BYTES < values.nbytes:
            stored |= {f"{key}.mask": torch.from_numpy(bits), f"{key}.values": torch.from_numpy(values[kept])}
            shapes[key] = list(tensor.shape)
        else:
            stored[key] = tensor
    return stored, shapes


def save_sparse(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the file; the same tensors give the same bytes."""
    stored, shapes = sparse_tensors(tensors)
    about = {"format_version": FORMAT_VERSION, "shapes": shapes}
    save_file(stored, path, metadata={"espalier": json.dumps(about, sort_keys=True, separators=(",", ":"))})
