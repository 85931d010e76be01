"""Uploads as users and attackers send them, built in memory or in a folder of the test."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.storage import Storage


def put_bytes(storage: Storage, key: str, content: bytes) -> None:
    """Store the bytes as an object."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        storage.put_file(key, Path(file.name))


def npz(path: Path, **arrays: Any) -> Path:
    """An `.npz` file of the arrays."""
    np.savez(path, **arrays)
    return path.with_suffix(".npz")


def images(count: int, shape: tuple[int, ...] = (8, 8), *, seed: int = 0, dtype: str = "uint8") -> np.ndarray[Any, Any]:
    """Random images, count x shape."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, *shape))
    return (drawn / 255).astype("float32") if dtype == "float32" else drawn.astype(dtype)


def labels(count: int, classes: int = 2) -> np.ndarray[Any, Any]:
    """0, 1, ..., 0, 1, ... as int64."""
    return np.arange(count) % classes


def npy(header: str, data: bytes, *, version: int = 1) -> bytes:
    """A `.npy` file with a header that may say anything."""
    text = header.encode("latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def npy_header(shape: object, descr: object = "|u1", fortran_order: object = False) -> str:
    """The text of a `.npy` header."""
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran_order!r}, 'shape': {shape!r}, }}\n"


def zipped(path: Path, members: Mapping[str, bytes], *, deflate: bool = False) -> Path:
    """A zip file of the members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, members: Mapping[str, bytes], *, mode: str = "w") -> Path:
    """A tar file of the members; `mode` as tarfile takes it (`w:gz`, `w:xz`)."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def picture(
    size: tuple[int, int] = (8, 8),
    *,
    mode: str = "RGB",
    kind: str = "PNG",
    seed: int = 0,
    **options: Any,
) -> bytes:
    """A picture file of random pixels; `size` is width x height."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    drawn = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    made = Image.fromarray(drawn[:, :, 0] if bands == 1 else drawn, mode="L" if bands == 1 else None)
    file = io.BytesIO()
    (made if made.mode == mode else made.convert(mode)).save(file, format=kind, **options)
    return file.getvalue()


def class_folders(per_class: int = 10, classes: tuple[str, ...] = ("cat", "dog"), root: str = "") -> dict[str, bytes]:
    """Members of an archive with `per_class` small pictures in each class folder."""
    return {f"{root}{name}/{number}.png": picture(seed=number) for name in classes for number in range(per_class)}


def idx(array: np.ndarray[Any, Any], *, counts: tuple[int, ...] | None = None) -> bytes:
    """An IDX file of a uint8 array; `counts` lies about its axes."""
    axes = array.shape if counts is None else counts
    return bytes([0, 0, 0x08, len(axes)]) + struct.pack(f">{len(axes)}I", *axes) + array.astype(np.uint8).tobytes()


def mnist_files(train: int = 20, test: int = 10, side: int = 6, *, zipped_members: bool = True) -> dict[str, bytes]:
    """The four IDX files of a small data set of the MNIST kind, `.gz` or plain."""
    files = {
        "train-images-idx3-ubyte": idx(images(train, (side, side))),
        "train-labels-idx1-ubyte": idx(labels(train)),
        "t10k-images-idx3-ubyte": idx(images(test, (side, side), seed=1)),
        "t10k-labels-idx1-ubyte": idx(labels(test)),
    }
    return {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in files.items()} if zipped_members else files


def cifar10_batch(count: int, *, seed: int = 0) -> bytes:
    """Records of CIFAR-10's binary form."""
    pixels = images(count, (3072,), seed=seed)
    return np.concatenate([labels(count, 10)[:, None].astype(np.uint8), pixels], axis=1).tobytes()
