"""The last steps that all formats of arrays share: labels that fit, a test part, the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.datasets.ingest.arrays import Arrays
from app.datasets.ingest.limits import rejection
from app.datasets.packed.holdout import HELD_OUT_SHARE, stratified_mask
from app.datasets.packed.packed import ArrayFile, DType, Manifest, read_blocks, write_manifest


def finish_arrays(arrays: Arrays, out: Path, *, name: str) -> Manifest:
    """Complete a folder whose images are in `<split>.images.npy`: labels, a hold-out where no test was sent, manifest.

    Raises Rejected where images and labels do not fit each other, or there is only one class.
    """
    _, shape, dtype = arrays.images["train"]
    for split, (images, example_shape, example_dtype) in arrays.images.items():
        _check_fit(arrays, split, images)
        if (example_shape, example_dtype) != (shape, dtype):
            sizes = f"{example_dtype} {list(example_shape)}, the training part of {dtype} {list(shape)}"
            raise rejection(arrays.names[f"{split}.images"], f"holds examples of {sizes}")
    class_names = _class_names(arrays)
    held_out = "test" not in arrays.images
    if held_out:
        mask = stratified_mask(arrays.labels["train"], HELD_OUT_SHARE, np.random.default_rng(0))
        if not mask.any():
            raise rejection(
                arrays.names["train.images"],
                "has no class of two examples, of which one could be held out as test: send a test part",
            )
        _hold_out(out, mask, shape, dtype)
        arrays.labels["test"] = arrays.labels["train"][mask]
        arrays.labels["train"] = arrays.labels["train"][~mask]
        tenth = "a tenth of each class, are held out as test"
        arrays.notes.append(f"no test part was sent: {len(arrays.labels['test'])} examples, {tenth}")
    empty = sorted(set(range(len(class_names))) - set(np.unique(arrays.labels["train"]).tolist()))
    if empty:
        listed = ", ".join(class_names[number] for number in empty[:10])
        arrays.notes.append(f"{len(empty)} of {len(class_names)} classes have no training example: {listed}")
    for split, labels in arrays.labels.items():
        np.save(out / f"{split}.labels.npy", labels)
    return write_manifest(
        out, name=name, dtype=dtype, classes=class_names, example_shape=shape, held_out=held_out, notes=arrays.notes
    )


def _check_fit(arrays: Arrays, split: str, images: int) -> None:
    labels = len(arrays.labels[split])
    if labels != images:
        label_name, image_name = arrays.names[f"{split}.labels"], arrays.names[f"{split}.images"]
        raise rejection(label_name, f"holds {labels} labels for the {images} examples of {image_name}")


def _class_names(arrays: Arrays) -> tuple[str, ...]:
    largest = max(int(labels.max()) for labels in arrays.labels.values())
    if len(np.unique(arrays.labels["train"])) < 2:
        raise rejection(arrays.names["train.labels"], "holds a single class; at least two are needed")
    names = arrays.class_names
    if names is None:
        return tuple(str(number) for number in range(largest + 1))
    if len(names) <= largest:
        raise rejection("classes", f"holds {len(names)} names, but the labels go up to {largest}")
    return names


def _hold_out(out: Path, mask: npt.NDArray[np.bool_], shape: tuple[int, ...], dtype: DType) -> None:
    """Move the examples where `mask` is true from `train.images.npy` to `test.images.npy`, in their order."""
    whole = out / "whole.npy"
    (out / "train.images.npy").rename(whole)
    start = 0
    with (
        ArrayFile(out / "train.images.npy", shape, dtype) as train,
        ArrayFile(out / "test.images.npy", shape, dtype) as test,
    ):
        for block in read_blocks(whole):
            held_out = mask[start : start + len(block)]
            train.write(block[~held_out])
            test.write(block[held_out])
            start += len(block)
    whole.unlink()
