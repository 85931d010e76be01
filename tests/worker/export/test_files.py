"""Exported files: their names, their bytes, and that a half-written one never stands under its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from app.network.architecture import Preprocessing, read_architecture
from app.network.cost import cost
from tests.support.networks.topologies import topology, trained
from worker.export.files import export_network, kind_of, media_type_of, write_json, write_manifest, write_whole

NAMES = ("a", "b", "ü")
PREPROCESSING = Preprocessing(1 / 255, (0.5,) * 3, (0.25,) * 3)


def export(folder: Path, stem: str = "pruned", **more: object) -> list[str]:
    network = trained(topology("residual"))
    written = export_network(
        network,
        folder,
        stem=stem,  # type: ignore[arg-type]
        class_names=NAMES,
        preprocessing=PREPROCESSING,
        **more,  # type: ignore[arg-type]
    )
    return [path.name for path in written]


def test_the_pruned_network_comes_in_all_formats_and_the_baseline_as_weights_and_architecture(tmp_path: Path) -> None:
    assert export(tmp_path) == ["pruned.safetensors", "architecture.json", "model.py", "pruned.onnx"]
    assert export(tmp_path, "baseline") == ["baseline.safetensors", "baseline.architecture.json"]
    assert len(list(tmp_path.iterdir())) == 6


def test_weights_and_architecture_are_there_whatever_formats_are_asked_for(tmp_path: Path) -> None:
    assert export(tmp_path, formats=["onnx"]) == ["pruned.safetensors", "architecture.json", "pruned.onnx"]
    assert export(tmp_path / "b", formats=[]) == ["pruned.safetensors", "architecture.json"]


def test_the_file_of_weights_has_the_size_that_the_cost_predicts_and_is_the_same_each_time(tmp_path: Path) -> None:
    export(tmp_path / "a")
    export(tmp_path / "b")
    weights = tmp_path / "a" / "pruned.safetensors"
    assert weights.stat().st_size == cost(topology("residual")).bytes
    assert weights.read_bytes() == (tmp_path / "b" / "pruned.safetensors").read_bytes()
    with safe_open(weights, "pt") as opened:
        assert opened.metadata() == {"espalier": '{"format_version":1}'}


def test_weights_of_another_precision_or_memory_format_are_written_as_plain_float32(tmp_path: Path) -> None:
    network = trained(topology("residual"))
    expected = {name: tensor.bfloat16().float() for name, tensor in network.state_dict().items()}
    network.to(torch.bfloat16).to(memory_format=torch.channels_last)
    export_network(network, tmp_path, stem="pruned", class_names=NAMES, preprocessing=PREPROCESSING, formats=())
    found = load_file(tmp_path / "pruned.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_the_architecture_read_again_is_the_graph_with_its_classes_and_preprocessing(tmp_path: Path) -> None:
    export(tmp_path)
    document = json.loads((tmp_path / "architecture.json").read_text(encoding="utf-8"))
    assert set(document) == {"format_version", "input_shape", "classes", "preprocessing", "layers"}
    graph, names, preprocessing = read_architecture(document)
    assert (graph, names, preprocessing) == (topology("residual"), NAMES, PREPROCESSING)


def test_the_manifest_states_name_size_and_sha256_of_each_file_and_whose_they_are(tmp_path: Path) -> None:
    files = [tmp_path / name for name in export(tmp_path)]
    manifest = write_manifest(
        tmp_path, job_id="job_1", attempt=3, files=files, verification={"pruned.onnx": {"tolerance": 0.1}}
    )
    document = json.loads(manifest.read_text())
    assert (document["job_id"], document["attempt"]) == ("job_1", 3)
    assert [entry["name"] for entry in document["files"]] == [path.name for path in files]
    for entry in document["files"]:
        content = (tmp_path / entry["name"]).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert [entry["name"] for entry in document["files"] if "verification" in entry] == ["pruned.onnx"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_json(target, {"a": 1})

    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(target, fails)
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "report.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_every_artifact_has_a_kind_and_a_media_type() -> None:
    names = [
        *["pruned.safetensors", "architecture.json", "model.py", "pruned.onnx", "baseline.safetensors"],
        *["baseline.architecture.json", "report.json", "manifest.json"],
    ]
    assert [kind_of(name) for name in names] == [
        *["weights", "architecture", "source", "onnx", "weights"],
        *["architecture", "report", "manifest"],
    ]
    assert [media_type_of(name).split(";")[0] for name in names] == [
        *["application/octet-stream", "application/json", "text/x-python", "application/octet-stream"],
        *["application/octet-stream", "application/json", "application/json", "application/json"],
    ]
