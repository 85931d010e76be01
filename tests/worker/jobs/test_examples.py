"""The five example jobs run to their last file; shortened, everything else as it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkout import ROOT
from tests.support.jobs.tiny import task_of, tiny_data
from worker.journal import MemoryJournal
from worker.pipeline import Delivered, run

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.json"))


def shortened(document: dict[str, Any]) -> dict[str, Any]:
    """The same job with fewer images and epochs."""
    document["data"]["synthetic"] |= {"train": 160, "test": 40}
    document["training"]["epochs"] = 2
    for step in document["optimizations"]:
        if "retrain" in step:
            step["retrain"]["epochs"] = 1
    return document


def delivered(path: Path, folder: Path) -> Delivered:
    """What the job of an example file delivers."""
    document = shortened(json.loads(path.read_text()))
    data = tiny_data(folder / "cache", document["data"]["synthetic"], tuple(document["model"]["input_shape"]))
    outcome = run(task_of(document, data, folder / "scratch"), MemoryJournal())
    assert isinstance(outcome, Delivered)
    return outcome


def test_there_is_one_example_for_each_family() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_runs_and_its_files_are_proven(path: Path, tmp_path: Path) -> None:
    report = delivered(path, tmp_path).report
    (step,) = report["steps"]
    files = {"pruned.safetensors", "pruned.onnx", "model.py", "baseline.safetensors"}
    zeros = {"pruned.sparse.safetensors"} if step["optimization"]["type"] == "prune" else set()
    assert set(report["verification"]) == files | zeros
    assert step["applied"]
    kind = step["optimization"]["type"]
    if kind == "prune":
        assert step["after"]["nonzero_params"] < step["before"]["nonzero_params"] <= step["before"]["params"]
        assert all(row["sparsity"] > 0 for row in step["layers"])
        assert any("zeros alone do not make" in note for note in report["notes"])
    elif kind == "regularization":
        assert step["before"] == step["after"]
    else:
        assert {row["type"] for row in step["layers"]} >= {
            {"batch_norm": "batch_norm", "dropout": "dropout", "residual": "add"}[kind]
        }
        assert report["final"]["params"] == step["after"]["params"]
