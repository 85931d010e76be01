"""Copies of packed pictures in the size that a job's network takes, made once beside the originals."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.datasets.packed.packed import SPLITS, ArrayFile, hold_lock, read_manifest


def prepare_pictures(folder: Path, input_shape: tuple[int, ...]) -> None:
    """Make the resized copies that a job with this `input_shape` `(C, H, W)` needs, if it needs any."""
    if read_manifest(folder).facts().layout(input_shape) == "pictures":
        for split in SPLITS:
            ensure_resized(folder, split, input_shape)


def ensure_resized(folder: Path, split: str, shape: tuple[int, ...]) -> Path:
    """Make the `.npy` file N x C x H x W of one split's pictures in `shape`, if it is not there; returns its path.

    It is renamed when it is complete.
    """
    path = folder / f"{split}.{'x'.join(map(str, shape))}.images.npy"
    if path.exists():
        return path
    with hold_lock(folder / ".resize.lock"):
        if path.exists():
            return path
        for left in folder.glob(f".{path.name}.*.partial"):  # by a killed process
            left.unlink()
        partial = folder / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            with ArrayFile(partial, shape, "uint8") as file:
                for picture_HWC in stored_pictures(folder, split):
                    file.write(resize_picture(picture_HWC, shape)[None])
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def stored_pictures(folder: Path, split: str) -> Iterator[npt.NDArray[np.uint8]]:
    """Every picture of a split in its own size, H x W x (1 or 3)."""
    if read_manifest(folder).example_shape is not None:
        yield from np.load(folder / f"{split}.images.npy", mmap_mode="r")
        return
    with (folder / f"{split}.pixels.bin").open("rb") as file:
        for offset, height, width, channels in np.load(folder / f"{split}.sizes.npy").tolist():
            file.seek(offset)
            pixels = np.frombuffer(file.read(height * width * channels), np.uint8)
            yield pixels.reshape(height, width, channels)


def resize_picture(picture_HWC: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The picture as C x H x W of `shape`: grey where C is 1, RGB where it is 3, resampled over all its pixels."""
    channels, height, width = shape
    picture = Image.fromarray(picture_HWC[:, :, 0] if picture_HWC.shape[2] == 1 else picture_HWC)
    picture = picture.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)
