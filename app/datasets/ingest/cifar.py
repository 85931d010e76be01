"""CIFAR-10 and CIFAR-100 in their binary form: records of one or two label bytes and 3 x 32 x 32 picture bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.datasets.ingest.archive import Archive, Stream, read_exactly
from app.datasets.ingest.arrays import Arrays, check_class_names
from app.datasets.ingest.limits import UploadLimits, rejection
from app.datasets.packed.packed import ArrayFile

SHAPE = (3, 32, 32)
PICTURE_BYTES = 3 * 32 * 32
RECORDS_AT_ONCE = 1024
PICKLED_BATCH = re.compile(r"^data_batch_\d+$")


@dataclass(frozen=True)
class Form:
    """One of the two layouts: which files, how many label bytes (the last one counts), how many classes."""

    name: str
    train: re.Pattern[str]
    test: str
    class_names: str
    label_bytes: int
    classes: int


FORMS = (
    Form("CIFAR-10", re.compile(r"^data_batch_\d+\.bin$"), "test_batch.bin", "batches.meta.txt", 1, 10),
    Form("CIFAR-100", re.compile(r"^train\.bin$"), "test.bin", "fine_label_names.txt", 2, 100),
)


def find_form(names: list[str]) -> Form | None:
    """The layout whose training files are among the file names, else None."""
    return next((form for form in FORMS if any(form.train.match(name) for name in names)), None)


def is_pickled(names: list[str]) -> bool:
    """Whether the file names are those of the python versions, which hold pickles."""
    return any(PICKLED_BATCH.match(name) for name in names) or {"train", "test", "meta"} <= set(names)


def pack_cifar(archive: Archive, out: Path, limits: UploadLimits) -> Arrays:
    """Write the pictures of a CIFAR archive to `out` in the archive's order; returns labels and class names.

    Raises Rejected where the files are missing, pickled, or not whole records.
    """
    names = [entry.parts[-1] for entry in archive.entries]
    form = find_form(names)
    if form is None:
        if is_pickled(names):
            raise rejection(
                "upload",
                "is the python version of CIFAR, which is pickled and never loaded: send the binary version (*.bin)",
            )
        raise rejection("data_batch_1.bin", "is missing (CIFAR-10), and so is train.bin (CIFAR-100)")
    arrays = Arrays()
    labels: dict[str, list[int]] = {"train": [], "test": []}
    files = {split: ArrayFile(out / f"{split}.images.npy", SHAPE, "uint8") for split in labels}
    try:
        for entry, stream in archive.members():
            name = entry.parts[-1]
            if form.train.match(name):
                _pack_records(stream, entry.size, name, form, files["train"], labels["train"])
            elif name == form.test:
                _pack_records(stream, entry.size, name, form, files["test"], labels["test"])
            elif name == form.class_names and entry.size < limits.picture_bytes:
                text = read_exactly(stream, entry.size, name).decode("utf-8", "replace")
                arrays.class_names = check_class_names(
                    [line.strip() for line in text.splitlines() if line.strip()], name
                )
    finally:
        for file in files.values():
            file.close()
    for split, values in labels.items():
        if values:
            arrays.labels[split] = np.array(values, np.int64)
            arrays.images[split] = (files[split].count, SHAPE, "uint8")
            arrays.names[f"{split}.labels"] = arrays.names[f"{split}.images"] = f"{form.name} {split}"
        else:
            files[split].path.unlink()
    return arrays


def _pack_records(stream: Stream, size: int, name: str, form: Form, images: ArrayFile, labels: list[int]) -> None:
    record_bytes = form.label_bytes + PICTURE_BYTES
    if size == 0 or size % record_bytes:
        raise rejection(
            name, f"has {size} bytes, which is no whole number of {form.name} records of {record_bytes} bytes"
        )
    for start in range(0, size // record_bytes, RECORDS_AT_ONCE):
        count = min(RECORDS_AT_ONCE, size // record_bytes - start)
        records = np.frombuffer(read_exactly(stream, count * record_bytes, name), np.uint8).reshape(count, record_bytes)
        numbers = records[:, form.label_bytes - 1]
        if int(numbers.max()) >= form.classes:
            raise rejection(name, f"holds the label {int(numbers.max())}; {form.name} has {form.classes} classes")
        labels.extend(numbers.tolist())
        images.write(records[:, form.label_bytes :].reshape(count, *SHAPE))
