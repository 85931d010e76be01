"""`.npz` uploads: dtype and axes kept, headers checked before anything is loaded, objects never unpickled."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.datasets.ingest.limits import Rejected, UploadLimits
from app.datasets.ingest.pack import PackedUpload, pack_upload
from app.datasets.packed.packed import read_manifest
from tests.support.services.uploads import images, labels, npy, npy_header, npz, zipped

LIMITS = UploadLimits(unpacked_bytes=10_000_000)


def pack(tmp_path: Path, upload: Path, limits: UploadLimits = LIMITS) -> PackedUpload:
    out = tmp_path / "out"
    out.mkdir()
    return pack_upload(upload, "auto", out, limits)


def whole(**changes: Any) -> dict[str, Any]:
    arrays = {"x_train": images(20), "y_train": labels(20), "x_test": images(6, seed=1), "y_test": labels(6)}
    return {name: value for name, value in {**arrays, **changes}.items() if value is not None}


def refused(tmp_path: Path, upload: Path, limits: UploadLimits = LIMITS) -> Rejected:
    with pytest.raises(Rejected) as refusal:
        pack(tmp_path, upload, limits)
    return refusal.value


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(40,), (2, 40), (8, 8), (8, 8, 3), (3, 8, 8), (2, 4, 6, 6)])
def test_arrays_are_kept_as_they_were_sent(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    sent = images(20, shape, dtype=dtype)
    found = pack(tmp_path, npz(tmp_path / "u", **whole(x_train=sent, x_test=images(6, shape, seed=1, dtype=dtype))))
    assert found.format == "npz"
    assert found.manifest == read_manifest(tmp_path / "out")
    kept = np.load(tmp_path / "out/train.images.npy")
    assert kept.dtype == dtype
    np.testing.assert_array_equal(kept, sent)
    np.testing.assert_array_equal(np.load(tmp_path / "out/train.labels.npy"), labels(20))
    facts = found.manifest.facts()
    assert (facts.example_shape, facts.train, facts.test, facts.classes) == (shape, 20, 6, 2)
    assert found.manifest.scale == (1 / 255 if dtype == "uint8" else 1.0)
    assert not found.manifest.held_out


def test_compressed_fortran_and_big_endian_arrays_give_the_same_pack(tmp_path: Path) -> None:
    sent = images(20, (5, 7), dtype="float32")
    (tmp_path / "plain").mkdir()
    plain = pack(tmp_path / "plain", npz(tmp_path / "a", **whole(x_train=sent, x_test=sent[:6])))
    odd = whole(x_train=np.asfortranarray(sent.astype(">f4")), x_test=np.asfortranarray(sent[:6]))
    np.savez_compressed(tmp_path / "b.npz", **odd)
    assert pack(tmp_path, tmp_path / "b.npz").manifest.sha256 == plain.manifest.sha256
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json", "test.images.npy", "test.labels.npy", "train.images.npy", "train.labels.npy",
    ]  # fmt: skip


def test_float64_is_kept_as_float32_and_said_so(tmp_path: Path) -> None:
    sent = images(20).astype("float64") / 7
    found = pack(tmp_path, npz(tmp_path / "u", **whole(x_train=sent, x_test=sent[:6])))
    np.testing.assert_array_equal(np.load(tmp_path / "out/train.images.npy"), sent.astype("float32"))
    assert "x_train was float64 and is kept as float32" in found.manifest.notes


def test_labels_in_a_column_and_class_names_are_taken(tmp_path: Path) -> None:
    arrays = whole(y_train=labels(20)[:, None].astype("uint8"), classes=np.array(["cat", "dog \u00e9", "never seen"]))
    found = pack(tmp_path, npz(tmp_path / "u", **arrays, extra=np.zeros(3)))
    assert found.manifest.classes == ("cat", "dog \u00e9", "never seen")
    assert any("never seen" in note for note in found.manifest.notes)
    assert any("extra" in note for note in found.manifest.notes)


def test_without_a_test_part_a_stratified_tenth_is_held_out_and_said_so(tmp_path: Path) -> None:
    sent, classes = images(100), np.repeat([0, 1, 2, 3], [50, 30, 10, 10])
    found = pack(tmp_path, npz(tmp_path / "u", x_train=sent, y_train=classes))
    kept, held_out = np.load(tmp_path / "out/train.images.npy"), np.load(tmp_path / "out/test.images.npy")
    assert np.bincount(np.load(tmp_path / "out/test.labels.npy")).tolist() == [5, 3, 1, 1]
    assert found.manifest.held_out
    assert any("10 examples" in note and "held out" in note for note in found.manifest.notes)
    assert {row.tobytes() for row in kept} | {row.tobytes() for row in held_out} == {row.tobytes() for row in sent}
    by_bytes = {row.tobytes(): label for row, label in zip(sent, classes, strict=True)}
    for split, rows in (("train", kept), ("test", held_out)):
        assert [by_bytes[row.tobytes()] for row in rows] == np.load(tmp_path / f"out/{split}.labels.npy").tolist()


def test_the_same_upload_is_packed_to_the_same_bytes_every_time(tmp_path: Path) -> None:
    upload = npz(tmp_path / "u", x_train=images(50), y_train=labels(50, 5))
    hashes = set()
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        hashes.add(pack(tmp_path / run, upload).manifest.sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("changes", "file", "reason"),
    [
        ({"x_train": None}, "x_train", "is missing; the file holds: x_test, y_train, y_test"),
        ({"y_train": None}, "y_train", "is missing"),
        ({"y_test": None}, "y_test", "is missing"),
        ({"x_train": images(20).astype("int64")}, "x_train", '.astype("uint8")'),
        ({"x_train": images(20) > 3}, "x_train", "holds bool"),
        ({"x_train": images(20).astype("complex64")}, "x_train", "complex64"),
        ({"x_train": np.arange(20, dtype="uint8")}, "x_train", "at least one more is needed"),
        ({"x_train": images(0), "y_train": labels(0)}, "x_train", "it is empty"),
        ({"x_train": np.zeros((20, 2, 2, 2, 2, 2), "uint8")}, "x_train", "6 axes"),
        ({"x_train": np.where(np.eye(20) > 0, np.nan, 1).astype("float32")}, "x_train", "in example 0"),
        ({"x_train": np.full((20, 2), 1e300)}, "x_train", "not finite float32"),
        ({"y_train": labels(20).astype("float32")}, "y_train", "whole numbers"),
        ({"y_train": np.eye(20)[:, :2].astype(int)}, "y_train", "one-hot"),
        ({"y_train": labels(20) - 1}, "y_train", "label -1"),
        ({"y_train": labels(20) + 2**31}, "y_train", "the limit is 100000 classes"),
        ({"y_train": np.full(20, 2**64 - 1, "uint64")}, "y_train", "the limit is 100000 classes"),
        ({"y_train": labels(19)}, "y_train", "19 labels for the 20 examples of x_train"),
        ({"y_train": np.zeros(20, int)}, "y_train", "single class"),
        ({"x_test": images(6, (9, 9))}, "x_test", "uint8 [9, 9], the training part of uint8 [8, 8]"),
        ({"x_test": images(6, dtype="float32")}, "x_test", "float32 [8, 8]"),
        ({"classes": np.array(["one"])}, "classes", "1 names, but the labels go up to 1"),
        ({"classes": np.array(["same", "same"])}, "classes", "'same' twice"),
        ({"classes": np.array(["a", "b\x00c"])}, "classes", "printable"),
        ({"classes": np.array([["a", "b"]])}, "classes", "list of texts"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_name_of_the_array(
    tmp_path: Path, changes: dict[str, Any], file: str, reason: str
) -> None:
    refusal = refused(tmp_path, npz(tmp_path / "u", **whole(**changes)))
    assert refusal.problems[0].file == file
    assert reason in refusal.problems[0].message


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["x_train", "y_train", "classes"])
def test_objects_are_never_unpickled(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    np.savez(file, **whole(), allow_pickle=True)
    arrays = whole(**{name: np.array([Explosive()] * 20, dtype=object)})
    np.savez(tmp_path / "u.npz", **arrays)
    refusal = refused(tmp_path, tmp_path / "u.npz")
    assert refusal.problems[0].file == name
    assert "object" in refusal.problems[0].message.lower()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (npy(npy_header((10**12,)), b""), "says it holds 1000000000000 bytes, but has 0"),
        (npy(npy_header((20, 10**6, 10**6)), bytes(100)), "but has 100"),
        (npy(npy_header((20, -8)), bytes(100)), "not a tuple of counts"),
        (npy(npy_header((20, True)), bytes(20)), "not a tuple of counts"),
        (npy(npy_header((1,) * 70), b"1"), "70 axes"),
        (npy(npy_header((20, 8), descr="|O"), bytes(160)), "Python objects"),
        (npy(npy_header((20, 8), descr=[("a", "<i4")]), bytes(640)), "structured"),
        (npy(npy_header((20, 8), descr="nonsense"), bytes(160)), "does not know"),
        (npy("__import__('os').mkdir('exploded')", b""), "not a plain description"),
        (npy("(" * 5000, b""), "not a plain description"),
        (npy("{'shape': (1,)}", b""), "without descr"),
        (npy(" " * 100_000, b"", version=2), "header of 100000 bytes"),
        (npy(npy_header((20, 8)), bytes(159)), "but has 159"),
        (npy(npy_header((20, 8)), bytes(161)), "but has 161"),
        (b"\x93NUMPY\x09\x00", "not a .npy array"),
        (b"", "is cut off"),
    ],
)
def test_a_header_that_lies_is_found_before_anything_is_loaded(
    tmp_path: Path, member: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal = refused(tmp_path, zipped(tmp_path / "u", {"x_train.npy": member, "y_train.npy": member}))
    assert refusal.problems[0].file == "x_train"
    assert reason in refusal.problems[0].message
    assert not (tmp_path / "exploded").exists()


def test_an_example_larger_than_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    upload = npz(tmp_path / "u", **whole(x_train=images(20, (50, 50))))
    assert "examples of 2500 bytes" in str(refused(tmp_path, upload, UploadLimits(example_bytes=1000)))


def test_two_classes_of_one_example_cannot_be_held_out(tmp_path: Path) -> None:
    refusal = refused(tmp_path, npz(tmp_path / "u", x_train=images(2), y_train=labels(2)))
    assert "send a test part" in refusal.problems[0].message
