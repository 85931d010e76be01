"""CIFAR uploads in their binary form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.datasets.ingest.limits import Rejected, UploadLimits
from app.datasets.ingest.pack import PackedUpload, pack_upload
from tests.support.services.uploads import cifar10_batch, images, tarred, zipped


def pack(tmp_path: Path, upload: Path) -> PackedUpload:
    out = tmp_path / "out"
    out.mkdir()
    return pack_upload(upload, "auto", out, UploadLimits())


NAMES = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"


def test_cifar_10_is_packed_batch_by_batch_with_its_class_names(tmp_path: Path) -> None:
    folder = "cifar-10-batches-bin/"
    members = {
        f"{folder}data_batch_1.bin": cifar10_batch(20),
        f"{folder}batches.meta.txt": NAMES,
        f"{folder}test_batch.bin": cifar10_batch(10, seed=2),
        f"{folder}data_batch_2.bin": cifar10_batch(10, seed=1),
        f"{folder}readme.html": b"<html>",
    }
    found = pack(tmp_path, tarred(tmp_path / "u", members, mode="w:gz"))
    assert found.format == "cifar"
    facts = found.manifest.facts()
    assert (facts.train, facts.test, facts.classes, facts.example_shape) == (30, 10, 10, (3, 32, 32))
    assert facts.class_names[9] == "truck"
    kept = np.load(tmp_path / "out/train.images.npy")
    np.testing.assert_array_equal(kept[:20].reshape(20, 3072), images(20, (3072,)))
    np.testing.assert_array_equal(kept[20:].reshape(10, 3072), images(10, (3072,), seed=1))
    np.testing.assert_array_equal(np.load(tmp_path / "out/train.labels.npy"), [*range(10)] * 3)


def test_cifar_100_uses_the_fine_labels(tmp_path: Path) -> None:
    fine = np.arange(200) % 100
    records = np.concatenate(
        [(fine // 5)[:, None].astype(np.uint8), fine[:, None].astype(np.uint8), images(200, (3072,))], axis=1
    )
    found = pack(
        tmp_path, zipped(tmp_path / "u", {"train.bin": records.tobytes(), "test.bin": records[:100].tobytes()})
    )
    assert found.manifest.facts().classes == 100
    np.testing.assert_array_equal(np.load(tmp_path / "out/train.labels.npy"), fine)
    np.testing.assert_array_equal(np.load(tmp_path / "out/test.images.npy").reshape(100, 3072), records[:100, 2:])


def test_training_batches_alone_have_a_tenth_held_out(tmp_path: Path) -> None:
    found = pack(tmp_path, zipped(tmp_path / "u", {"data_batch_1.bin": cifar10_batch(100)}))
    assert (found.manifest.train, found.manifest.test, found.manifest.held_out) == (90, 10, True)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"data_batch_1.bin": cifar10_batch(3) + b"x"}, "9220 bytes, which is no whole number"),
        ({"data_batch_1.bin": b""}, "0 bytes"),
        ({"data_batch_1.bin": b"\x0a" + bytes(3072)}, "the label 10; CIFAR-10 has 10 classes"),
        ({"train.bin": b"\x00\x64" + bytes(3072)}, "the label 100"),
        ({"data_batch_1": b"\x80\x04", "data_batch_2": b"", "test_batch": b""}, "pickled and never loaded"),
        ({"cifar-100-python/train": b"\x80", "cifar-100-python/test": b"", "cifar-100-python/meta": b""}, "pickled"),
    ],
)
def test_files_that_are_not_whole_records_are_refused(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        pack(tmp_path, zipped(tmp_path / "u", members))


def test_a_stated_format_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(Rejected, match="is missing"):
        pack_upload(zipped(tmp_path / "u", {"x": b""}), "cifar", tmp_path / "out", UploadLimits())
    with pytest.raises(Rejected, match="not one of auto, image_folder"):
        pack_upload(zipped(tmp_path / "v", {"x": b""}), "parquet", tmp_path / "out", UploadLimits())
