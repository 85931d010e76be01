"""The packed folder: complete or not there, built once by the first process, named by its content."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.datasets.packed.packed import ArrayFile, ensure_packed, read_blocks, read_manifest, write_manifest
from tests.support.services.uploads import images, labels


def fill(folder: Path, *, seed: int = 0, names: tuple[str, ...] = ("a", "b"), name: str = "x") -> None:
    for split, count in (("train", 6), ("test", 2)):
        np.save(folder / f"{split}.images.npy", images(count, seed=seed))
        np.save(folder / f"{split}.labels.npy", labels(count))
    write_manifest(folder, name=name, dtype="uint8", classes=names, example_shape=(8, 8), notes=["hello"])


def test_a_manifest_says_what_was_packed(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest.train, manifest.test, manifest.scale, manifest.notes) == (6, 2, 1 / 255, ("hello",))
    assert manifest.from_document(manifest.document()) == manifest
    with pytest.raises(ValueError, match="packed data set of format 2, this program reads 1"):
        manifest.from_document({**manifest.document(), "format_version": 2})


def test_the_hash_names_images_labels_and_class_names_but_not_the_data_sets_name(tmp_path: Path) -> None:
    hashes = []
    variants: list[dict[str, object]] = [{}, {"seed": 1}, {"names": ("a", "c")}, {"name": "other"}]
    for number, variant in enumerate(variants):
        folder = tmp_path / str(number)
        folder.mkdir()
        fill(folder, **variant)  # type: ignore[arg-type]
        hashes.append(read_manifest(folder).sha256)
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]


@pytest.mark.parametrize("shape", [(3,), (400, 700)])
def test_an_array_written_in_blocks_is_read_back_in_blocks_and_by_numpy(tmp_path: Path, shape: tuple[int, ...]) -> None:
    sent = images(40, shape)
    with ArrayFile(tmp_path / "x.npy", shape, "uint8") as file:
        for block in np.array_split(sent, 7):
            file.write(block[:, ::1])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), sent)
    np.testing.assert_array_equal(np.concatenate(list(read_blocks(tmp_path / "x.npy"))), sent)


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def build(partial: Path) -> None:
        (partial / "half").write_text("x")
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        ensure_packed(tmp_path / "set", build)
    assert [path.name for path in tmp_path.iterdir()] == [".set.lock"]
    assert ensure_packed(tmp_path / "set", fill) == tmp_path / "set"


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".set.12345678.partial").mkdir()
    (tmp_path / ".other.12345678.partial").mkdir()
    (tmp_path / "set").mkdir()
    ensure_packed(tmp_path / "set", fill)
    assert {path.name for path in tmp_path.iterdir()} == {"set", ".set.lock", ".other.12345678.partial"}
    assert read_manifest(tmp_path / "set").train == 6


BUILD_AND_READ = """
import sys, time
from pathlib import Path
import numpy as np
from app.datasets.packed.packed import ensure_packed, read_manifest, write_manifest

def build(partial):
    with (partial.parent / "builds").open("a") as log:
        log.write("x")
    time.sleep(0.3)
    for split, count in (("train", 6), ("test", 2)):
        np.save(partial / f"{split}.images.npy", np.zeros((count, 4), np.uint8))
        np.save(partial / f"{split}.labels.npy", np.arange(count) % 2)
    write_manifest(partial, name="x", dtype="uint8", classes=("a", "b"), example_shape=(4,))

print(read_manifest(ensure_packed(Path(sys.argv[1]), build)).train)
"""


def test_several_processes_at_once_build_once_and_all_get_the_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD_AND_READ, str(tmp_path / "set")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [child.communicate(timeout=60)[0] for child in children] == ["6\n"] * 3
    assert (tmp_path / "builds").read_text() == "x"
