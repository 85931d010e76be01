"""IDX uploads and files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from app.datasets.ingest.idx import match_idx_name
from app.datasets.ingest.limits import Rejected, UploadLimits
from app.datasets.ingest.pack import PackedUpload, pack_upload
from tests.support.services.uploads import idx, images, labels, mnist_files, tarred, zipped

LIMITS = UploadLimits(unpacked_bytes=1_000_000, ratio_from_bytes=10_000)


def pack(tmp_path: Path, upload: Path, kind: str = "auto") -> PackedUpload:
    out = tmp_path / "out"
    out.mkdir()
    return pack_upload(upload, kind, out, LIMITS)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train-images-idx3-ubyte", ("train", "images")),
        ("MNIST/raw/t10k-labels-idx1-ubyte.gz", ("test", "labels")),
        ("train-labels.idx1-ubyte", ("train", "labels")),
        ("emnist-letters-test-images-idx3-ubyte.gz", ("test", "images")),
        ("train_images.png", None),
        ("strain-images-idx3-ubyte", None),
    ],
)
def test_usual_names_say_what_a_file_is(name: str, role: tuple[str, str] | None) -> None:
    assert match_idx_name(name) == role


@pytest.mark.parametrize("zipped_members", [False, True])
@pytest.mark.parametrize("folder", ["", "MNIST/raw/"])
def test_the_four_files_become_a_data_set(tmp_path: Path, zipped_members: bool, folder: str) -> None:
    files = {folder + name: data for name, data in mnist_files(zipped_members=zipped_members).items()}
    found = pack(tmp_path, tarred(tmp_path / "u", {**files, "readme.txt": b"hello"}, mode="w:gz"))
    assert found.format == "idx"
    np.testing.assert_array_equal(np.load(tmp_path / "out/train.images.npy"), images(20, (6, 6)))
    np.testing.assert_array_equal(np.load(tmp_path / "out/test.labels.npy"), labels(10))
    assert (found.manifest.train, found.manifest.test, found.manifest.example_shape) == (20, 10, (6, 6))


def test_training_files_alone_have_a_tenth_held_out(tmp_path: Path) -> None:
    files = {name: data for name, data in mnist_files().items() if name.startswith("train")}
    found = pack(tmp_path, zipped(tmp_path / "u", files))
    assert found.manifest.held_out
    assert (found.manifest.train, found.manifest.test) == (18, 2)


def test_big_endian_floats_are_read(tmp_path: Path) -> None:
    sent = images(20, (6,), dtype="float32")
    file = bytes([0, 0, 0x0D, 2]) + struct.pack(">2I", 20, 6) + sent.astype(">f4").tobytes()
    only_train = {"train-images": file, "train-labels": idx(labels(20))}
    pack(tmp_path, zipped(tmp_path / "u", only_train))
    kept = np.concatenate([np.load(tmp_path / f"out/{split}.images.npy") for split in ("train", "test")])
    assert kept.dtype == np.float32
    assert {row.tobytes() for row in kept} == {row.tobytes() for row in sent}


TRAIN = "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("changes", "file", "reason"),
    [
        ({TRAIN: None}, TRAIN, "is missing"),
        ({"t10k-labels-idx1-ubyte": None}, "t10k-labels-idx1-ubyte", "is missing"),
        ({TRAIN: idx(images(20, (6, 6)), counts=(21, 6, 6))}, TRAIN, "cut off"),
        ({TRAIN: idx(images(20, (6, 6)), counts=(19, 6, 6))}, TRAIN, "bytes after its end"),
        ({TRAIN: idx(images(1, (6, 6)), counts=(2**32 - 1,) * 3)}, TRAIN, "the limit is"),
        ({TRAIN: idx(images(20, (6, 6)), counts=(0, 6, 6))}, TRAIN, "none is 0"),
        ({TRAIN: idx(images(36, (20,)), counts=(720,))}, TRAIN, "at least one more is needed"),
        ({TRAIN: b"\x89PNG" + bytes(100)}, TRAIN, "not an IDX file"),
        ({TRAIN: bytes([0, 0, 8, 9]) + bytes(100)}, TRAIN, "not an IDX file"),
        ({TRAIN: b""}, TRAIN, "cut off"),
        ({f"{TRAIN}.gz": gzip.compress(b"x")}, f"{TRAIN}.gz", "second file of train images"),
        ({TRAIN: None, f"{TRAIN}.gz": b"no gzip"}, f"{TRAIN}.gz", "not a whole gzip file"),
        ({TRAIN: None, f"{TRAIN}.gz": gzip.compress(idx(images(20, (6, 6))))[:-9]}, f"{TRAIN}.gz", "gzip file"),
        ({TRAIN: None, f"{TRAIN}.gz": gzip.compress(idx(np.zeros((20, 60, 60))))}, f"{TRAIN}.gz", "archive bomb"),
        ({"train-labels-idx1-ubyte": idx(labels(19))}, "train-labels-idx1-ubyte", "19 labels for the 20"),
        ({"train-labels-idx1-ubyte": idx(labels(20)[:, None])}, "train-labels-idx1-ubyte", "has 2 axes"),
        ({"train-labels-idx1-ubyte": idx(labels(2), counts=(2**31,))}, "train-labels-idx1-ubyte", "the limit is"),
    ],
)  # fmt: skip
def test_a_file_that_lies_is_refused_by_name(
    tmp_path: Path, changes: dict[str, bytes | None], file: str, reason: str
) -> None:
    members = {**mnist_files(zipped_members=False), **changes}
    upload = zipped(tmp_path / "u", {name: data for name, data in members.items() if data is not None})
    with pytest.raises(Rejected) as refusal:
        pack(tmp_path, upload)
    assert refusal.value.problems[0].file == file
    assert reason in refusal.value.problems[0].message
