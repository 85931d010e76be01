"""Checkpoint files: whole or refused, never half."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from worker.checkpoint import (
    Arrays,
    CheckpointRefused,
    _as_os_error,
    check_checkpoint,
    read_checkpoint,
    spec_digest,
    write_checkpoint,
)

ARRAYS: Arrays = {
    "network/conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "masks/conv1.weight": np.array([True, False]),
    "network/batch_norm1.num_batches_tracked": np.array(7, dtype=np.int64),
    "rng": np.arange(5, dtype=np.uint8),
}
STATE = {"spec_sha256": "a" * 64, "step": 3, "loss": 0.1 + 0.2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one checkpoint."""
    write_checkpoint(tmp_path, "checkpoint", ARRAYS, STATE)
    return tmp_path


def test_what_was_written_comes_back_bit_for_bit(folder: Path) -> None:
    found = read_checkpoint(folder, spec_sha256="a" * 64)
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert np.array_equal(found.arrays[name], array)
    assert found.state["loss"] == 0.1 + 0.2
    assert found.state["step"] == 3


def test_nothing_but_the_two_files_is_left(folder: Path) -> None:
    write_checkpoint(folder, "checkpoint", ARRAYS, STATE | {"step": 4})
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "checkpoint.safetensors"]
    assert read_checkpoint(folder).state["step"] == 4


def test_no_file_holds_a_pickle(folder: Path) -> None:
    content = (folder / "checkpoint.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") < 2000  # the header's length: JSON follows
    json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("byte", [0, 9, 200, -1])
def test_a_changed_byte_is_refused(folder: Path, byte: int) -> None:
    path = folder / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointRefused, match="sha256"):
        check_checkpoint(path, folder / "checkpoint.json")


def test_a_cut_file_another_job_another_format_and_missing_files_are_refused(folder: Path) -> None:
    tensors, state = folder / "checkpoint.safetensors", folder / "checkpoint.json"
    with pytest.raises(CheckpointRefused, match="another job"):
        check_checkpoint(tensors, state, spec_sha256="b" * 64)
    document = json.loads(state.read_text())
    state.write_text(json.dumps(document | {"format_version": 99}))
    with pytest.raises(CheckpointRefused, match="format version 99, not 1"):
        check_checkpoint(tensors, state)
    state.write_text(json.dumps(document)[:-5])
    with pytest.raises(CheckpointRefused, match="not JSON"):
        check_checkpoint(tensors, state)
    state.write_text("[]")
    with pytest.raises(CheckpointRefused, match="not a JSON object"):
        check_checkpoint(tensors, state)
    state.write_text(json.dumps({"format_version": 1}))
    with pytest.raises(CheckpointRefused, match="does not say what its tensors are"):
        check_checkpoint(tensors, state)
    state.write_text(json.dumps(document))
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    with pytest.raises(CheckpointRefused, match=f"{len(content) - 1} bytes, not {len(content)}"):
        check_checkpoint(tensors, state)
    tensors.unlink()
    with pytest.raises(CheckpointRefused, match="cannot be read"):
        check_checkpoint(tensors, state)
    state.unlink()
    with pytest.raises(CheckpointRefused, match="cannot be read"):
        check_checkpoint(tensors, state)


def test_a_file_that_is_no_safetensors_is_refused_even_if_its_digest_fits(folder: Path) -> None:
    import hashlib

    tensors, state = folder / "checkpoint.safetensors", folder / "checkpoint.json"
    tensors.write_bytes(b"\xff" * 64)
    digest = hashlib.sha256(b"\xff" * 64).hexdigest()
    document = json.loads(state.read_text()) | {"tensors": {"size_bytes": 64, "sha256": digest}}
    state.write_text(json.dumps(document))
    with pytest.raises(CheckpointRefused, match="not a safetensors file"):
        read_checkpoint(folder)


def test_a_folder_that_cannot_be_written_is_the_systems_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        write_checkpoint(tmp_path / "file" / "below", "checkpoint", ARRAYS, STATE)
    assert caught.value.errno == errno.ENOTDIR


def test_the_errors_of_the_writing_library_keep_their_number() -> None:
    error = SafetensorError('Error while serializing: I/O error: No space left on device (os error 28) at path "x"')
    assert _as_os_error(error).errno == errno.ENOSPC
    assert _as_os_error(SafetensorError("something else")).errno == errno.EIO


def test_the_digest_of_a_spec_does_not_depend_on_the_order_of_its_keys() -> None:
    assert spec_digest({"a": 1, "b": [1, {"c": 2, "d": 3}]}) == spec_digest({"b": [1, {"d": 3, "c": 2}], "a": 1})
    assert spec_digest({"a": 1}) != spec_digest({"a": 1.5})


def test_checking_needs_no_torch() -> None:
    program = "import sys, worker.checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
