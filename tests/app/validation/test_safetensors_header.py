"""Uploaded weights: what is taken is what the safetensors library reads, and every lie of a file is found and named."""

from __future__ import annotations

import io
import json
import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save
from safetensors.torch import save as save_torch

from app.errors import Fault, InvalidWeights
from app.validation import safetensors_header
from app.validation.safetensors_header import PICKLE, TensorEntry, check_weights, read_entries
from tests.support.jobs.weights import entry, good, tensors_of, weights_file

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
TWO = {"a.weight": entry(0, 8), "b.weight": entry(8, 16)}


def check(tmp_path: Path, content: bytes) -> tuple[TensorEntry, ...]:
    path = tmp_path / "upload"
    path.write_bytes(content)
    return check_weights(path, len(content))


def refusal(tmp_path: Path, content: bytes) -> list[Fault]:
    with pytest.raises(InvalidWeights) as refused:
        check(tmp_path, content)
    return list(refused.value.faults)


def sentence(tmp_path: Path, content: bytes) -> str:
    (fault,) = refusal(tmp_path, content)
    return fault.message


@pytest.mark.parametrize("kind", FLOATS)
def test_floating_point_tensors_are_accepted_with_names_shapes_and_types(tmp_path: Path, kind: str) -> None:
    tensors = {
        "conv1.weight": torch.randn(4, 3, 3, 3).to(FLOATS[kind]),
        "conv1.bias": torch.zeros(4, dtype=FLOATS[kind]),
        "none": torch.zeros(0, 5, dtype=FLOATS[kind]),
        "one": torch.tensor(1.5, dtype=FLOATS[kind]),
    }
    file = save_torch(tensors, metadata={"format": "pt"})
    found = check(tmp_path, file)
    assert {one.name: (one.kind, one.shape) for one in found} == tensors_of(file)
    assert {one.name: one.shape for one in found} == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_counters_of_batch_norm_are_accepted_as_torch_saves_them(tmp_path: Path) -> None:
    norm = torch.nn.BatchNorm2d(3)
    found = {one.name: one.kind for one in check(tmp_path, save_torch(norm.state_dict()))}
    assert found["num_batches_tracked"] == "I64"
    assert found["running_var"] == "F32"


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path: Path, kind: str, value: float) -> None:
    many = safetensors_header.PIECE_BYTES // 2 + 77
    tensors = {name: torch.ones(many, dtype=FLOATS[kind]) for name in ("first", "last", "sound")}
    tensors["first"][0] = value
    tensors["last"][-1] = value
    faults = refusal(tmp_path, save_torch(tensors))
    assert sorted(fault.pointer for fault in faults) == ["/first", "/last"]
    assert all("not finite in float32" in fault.message for fault in faults)


@pytest.mark.parametrize("kind", FLOATS)
def test_a_variance_below_0_is_found_where_it_cannot_be(tmp_path: Path, kind: str) -> None:
    many = safetensors_header.PIECE_BYTES // 2 + 77
    tensors = {f"norm.{name}": torch.zeros(many, dtype=FLOATS[kind]) for name in ("running_mean", "running_var")}
    tensors["norm.running_var"][0] = -0.0
    assert len(check(tmp_path, save_torch(tensors))) == 2
    tensors["norm.running_var"][-1] = tensors["norm.running_mean"][-1] = -1e-4
    (fault,) = refusal(tmp_path, save_torch(tensors))
    assert (fault.pointer, fault.message) == ("/norm.running_var", "norm.running_var has variances below 0")


def test_the_largest_numbers_of_each_type_are_finite_and_float64_must_fit_float32(tmp_path: Path) -> None:
    largest = {kind: torch.full((3,), torch.finfo(dtype).max, dtype=dtype) for kind, dtype in FLOATS.items()}
    (fault,) = refusal(tmp_path, save_torch(largest))
    assert fault.pointer == "/F64"
    del largest["F64"]
    assert len(check(tmp_path, save_torch(largest))) == 3
    assert check(tmp_path, save_torch({"x": torch.tensor([3.4e38, -3.4e38, 1e-300], dtype=torch.float64)}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_another_type_is_refused_with_the_tensors_name(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"conv1.weight": torch.zeros(4, dtype=dtype), "fine": torch.zeros(2)}
    (fault,) = refusal(tmp_path, save_torch(tensors))
    assert fault.pointer == "/conv1.weight/dtype"
    assert fault.message.startswith("conv1.weight is ")
    assert "float32, float16, bfloat16, float64" in fault.message


class Bomb:
    """Fails the test if anybody unpickles it."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("old", [True, False])
def test_a_pickle_is_refused_unread_with_what_to_do(tmp_path: Path, old: bool) -> None:
    saved = io.BytesIO()
    torch.save({"weight": torch.ones(3), "bomb": Bomb()}, saved, _use_new_zipfile_serialization=not old)
    assert sentence(tmp_path, saved.getvalue()) == PICKLE
    for protocol in range(2, 6):
        assert sentence(tmp_path, pickle.dumps({"weight": [1.0] * 5, "bomb": Bomb()}, protocol)) == PICKLE


def test_what_other_programs_write_is_called_by_its_name(tmp_path: Path) -> None:
    archive, array = io.BytesIO(), io.BytesIO()
    np.savez(archive, a=np.ones(3))
    np.save(array, np.ones(3))
    assert "zip archive" in sentence(tmp_path, archive.getvalue())
    assert "NumPy array" in sentence(tmp_path, array.getvalue())
    assert "HDF5" in sentence(tmp_path, b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "gzip" in sentence(tmp_path, b"\x1f\x8b\x08" + bytes(100))
    for junk in (b"hello", b"x", b"\0" * 100, b"\xff" * 100, b"{}", b"GGUF" + bytes(100)):
        assert "not a safetensors file" in sentence(tmp_path, junk)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    file = good(a__weight=(2, 3), b__weight=(4,))
    assert check(tmp_path, file)
    for size in range(1, len(file)):
        assert refusal(tmp_path, file[:size]), size
    assert "follow the last tensor" in sentence(tmp_path, file + b"\0")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 10**6, 0, 1])
def test_a_header_of_an_impossible_length_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    assert refusal(tmp_path, weights_file(TWO, bytes(16), length=length))


def test_a_huge_header_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    size = 1 << 30
    with path.open("wb") as file:
        file.write((size - 8).to_bytes(8, "little") + b"{")
        file.truncate(size)
    tracemalloc.start()
    with pytest.raises(InvalidWeights, match="at most 8388608 are allowed"):
        check_weights(path, size)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_large_tensors_are_checked_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = 96 << 20
    head = weights_file({"zeros": entry(0, size)})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    tracemalloc.start()
    check_weights(path, len(head) + size)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        '{"a.weight": 1,, }',
        '{"a.weight"',
        "{" + '"a":{' * 60_000,
        '{"a":' + "[" * 150_000,
        b'{"a\xff": 1}',
        '{"a": ' + "9" * 10_000 + "}",
        "{}",
        '{"__metadata__": {"format": "pt"}}',
        "{} []",
        '{"a": NaN}',
        "[" * 1000,
        b"{" * 1000,
        "{" + "[" * 3_000_000,
    ],
    ids=lambda header: repr(header[:20]),
)
def test_a_header_that_is_not_one_json_object_of_tensors_is_refused(tmp_path: Path, header: str | bytes) -> None:
    assert refusal(tmp_path, weights_file(header))


def test_a_tensor_or_a_field_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 8))
    assert "'a.weight' twice" in sentence(tmp_path, weights_file(f'{{"a.weight": {one}, "a.weight": {one}}}', bytes(8)))
    twin = '{"a.weight": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}'
    assert "'dtype' twice" in sentence(tmp_path, weights_file(twin, bytes(8)))


LIES: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("overlap", {"a": entry(0, 8), "b": entry(4, 12)}, 12, "/b/data_offsets", "b overlaps a"),
    ("the same bytes", {"a": entry(0, 8), "b": entry(0, 8)}, 8, "/b/data_offsets", "b overlaps a"),
    ("inside", {"a": entry(0, 16), "b": entry(4, 8)}, 16, "/b/data_offsets", "b overlaps a"),
    ("gap", {"a": entry(0, 8), "b": entry(12, 16)}, 16, "/b/data_offsets", "a gap of 4 bytes lies before b"),
    ("gap at the front", {"a": entry(4, 8)}, 8, "/a/data_offsets", "a gap of 4 bytes lies before a"),
    ("past the end", {"a": entry(0, 16)}, 8, "", "need 16 bytes after the header, it has 8"),
    ("far past the end", {"a": entry(0, 2**40)}, 8, "", "cut off"),
    ("backwards", {"a": entry(8, 0, [2])}, 8, "/a/data_offsets", "begin, end"),
    ("negative", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "/a/data_offsets", "begin, end"),
    ("three offsets", {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 8, "/a/data_offsets", "begin"),
    ("text offsets", {"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}, 4, "/a/data_offsets", "begin"),
    ("huge offset", {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**64]}}, 4, "/a/data_offsets", "begin"),
    ("shape too large", {"a": entry(0, 8, [3])}, 8, "/a/data_offsets", "float32 of this shape takes 12"),
    ("shape too small", {"a": entry(0, 8, [])}, 8, "/a/data_offsets", "float32 of this shape takes 4"),
    ("product overflows", {"a": entry(0, 8, [2**32, 2**32, 2])}, 8, "/a/data_offsets", "takes 147573952589676412928"),
    ("negative sizes", {"a": entry(0, 8, [-1, -2])}, 8, "/a/shape", "a list of at most 8 sizes"),
    ("boolean size", {"a": entry(0, 4, [True])}, 4, "/a/shape", "a list of at most 8 sizes"),
    ("size of float", {"a": entry(0, 8, [2.0])}, 8, "/a/shape", "a list of at most 8 sizes"),
    ("many axes", {"a": entry(0, 4, [1] * 9)}, 4, "/a/shape", "a list of at most 8 sizes"),
    ("no shape", {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "/a", "does not state"),
    ("a list", {"a": [1, 2]}, 0, "/a", "does not state"),
    ("unknown type", {"a": entry(0, 8, dtype="F1024")}, 8, "/a/dtype", "a is F1024"),
    ("type of no name", {"a": entry(0, 8, dtype=["F32"])}, 8, "/a/dtype", "a is list"),
    ("slash", {"a/b~c": entry(0, 8, dtype="I8")}, 8, "/a~1b~0c/dtype", "is I8"),
    ("no name", {"": entry(0, 8)}, 8, "", "printable"),
    ("NUL", {"a\0": entry(0, 8)}, 8, "", "printable"),
    ("surrogate", {"a\ud800": entry(0, 8)}, 8, "", "printable"),
    ("long name", {"a" * 513: entry(0, 8)}, 8, "", "printable"),
]


@pytest.mark.parametrize(("header", "size", "pointer", "message"), [lie[1:] for lie in LIES], ids=[x[0] for x in LIES])
def test_a_false_statement_of_the_header_is_named_with_its_place(
    tmp_path: Path, header: dict[str, Any], size: int, pointer: str, message: str
) -> None:
    with pytest.raises(InvalidWeights, match=message) as refused:
        check(tmp_path, weights_file(header, bytes(size)))
    assert refused.value.faults[0].pointer == pointer


def test_every_tensor_that_is_wrong_is_named_up_to_a_hundred(tmp_path: Path) -> None:
    header = {f"t{n}": entry(4 * n, 4 * n + 4, [1], "I32") for n in range(150)}
    faults = refusal(tmp_path, weights_file(header, bytes(600)))
    assert len(faults) == 100
    assert faults[1].pointer == "/t1/dtype"


def test_more_tensors_than_a_network_has_are_refused(tmp_path: Path) -> None:
    header = {f"{n}": entry(4 * n, 4 * n + 4) for n in range(safetensors_header.MOST_TENSORS + 1)}
    assert "50001 tensors" in sentence(tmp_path, weights_file(header, bytes(4 * len(header))))


def test_only_the_header_is_read_for_names_and_shapes() -> None:
    file = good(a__weight=(300, 300), b__weight=(300, 300))
    reads: list[tuple[int, int]] = []

    def read(start: int, end: int) -> bytes:
        reads.append((start, end))
        return file[start:end]

    entries, data = read_entries(read, len(file))
    assert [one.name for one in entries] == ["a.weight", "b.weight"]
    assert data == len(file) - 2 * 300 * 300 * 4
    assert reads == [(0, safetensors_header.FIRST_BYTES)]


def test_a_long_header_is_read_whole() -> None:
    file = good(**{f"layer{n:05}__weight": (1,) for n in range(2000)})
    assert len(read_entries(lambda start, end: file[start:end], len(file))[0]) == 2000


def test_a_header_that_the_library_refuses_is_refused_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> None:
        raise SafetensorError("no")

    monkeypatch.setattr(safetensors_header, "safe_open", no)
    assert "the safetensors library refuses the file: no" in sentence(tmp_path, good(a=(2,)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_accepted_can_be_read_by_the_library(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of a good file are changed at random: refused, or read by safetensors with finite values."""
    file = bytearray(good(a__weight=(2, 2), b__weight=(3,)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(file) - 1))
        file[at] = data.draw(st.integers(0, 255))
    try:
        entries = check(tmp_path, bytes(file))
    except InvalidWeights:
        return
    with safe_open(tmp_path / "upload", "numpy") as opened:
        assert set(opened.keys()) == {one.name for one in entries}
    if all(one.kind != "BF16" for one in entries):
        assert all(np.isfinite(tensor).all() for tensor in load(bytes(file)).values() if tensor.dtype.kind == "f")


def test_what_numpy_saves_is_accepted(tmp_path: Path) -> None:
    file = save({"head.weight": np.ones((2, 3), np.float32), "head.bias": np.zeros(2, np.float32)})
    assert [one.shape for one in sorted(check(tmp_path, file), key=lambda one: one.name)] == [(2,), (2, 3)]
