"""The example jobs of the documentation, run: on fewer images and for fewer epochs, otherwise as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.jobs import task_of

from app.ingest.synthetic import ensure_synthetic
from app.spec.job import parse_job
from worker.journal import MemoryJournal
from worker.pipeline import Delivered, run

FILES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.json"))


EXPORTED = {"pruned.safetensors", "pruned.onnx", "model.py"}


def shortened(path: Path) -> dict[str, Any]:
    """The example with 120 training images, 40 test images, 2 epochs and 1 of retraining.

    The first and the last with all exports; the others, whose layers are the first one's, with the weights alone: an
    export to ONNX takes longer than their training.
    """
    document: dict[str, Any] = json.loads(path.read_text())
    if path not in (FILES[0], FILES[-1]):
        document["exports"] = ["safetensors"]
    document["data"] = {"synthetic": {**document["data"]["synthetic"], "train": 120, "test": 40}}
    document["training"] |= {"epochs": 2, "batch_size": 32}
    for step in document["optimizations"]:
        if "retrain" in step:
            step["retrain"]["epochs"] = 1
    return document


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_trained_and_every_file_proven(path: Path, tmp_path: Path) -> None:
    document = shortened(path)
    synthetic = parse_job(document).data.synthetic
    assert synthetic is not None
    outcome = run(
        task_of(document, ensure_synthetic(synthetic, (3, 32, 32), tmp_path / "cache"), tmp_path), MemoryJournal()
    )
    assert isinstance(outcome, Delivered)
    proven = outcome.report["verification"]
    expected = EXPORTED if "exports" not in document else {"pruned.safetensors"}
    assert proven.keys() >= expected
    for name in expected:
        assert proven[name]["accuracy"] == outcome.report["final"]["accuracy"]
    final, baseline = outcome.summary["final"], outcome.summary["baseline"]
    (step,) = document["optimizations"]
    if step["type"] == "prune":
        assert final["nonzero_params"] < 0.9 * baseline["nonzero_params"]
    else:
        assert final["nonzero_params"] == baseline["nonzero_params"]
