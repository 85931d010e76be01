"""Odd jobs that the API accepts: they end well, or with a code, a sentence and advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.jobs import SYNTHETIC, task_of, tiny_data, tiny_spec

from worker.journal import MemoryJournal
from worker.pipeline import Delivered, run

HALF_THE_CHANNELS = {"type": "prune", "budget": {"params": 0.6}, "round_to": 1, "retrain": {"policy": "none"}}


@pytest.mark.parametrize("shape", [(2, 32), (1, 4, 6, 6)], ids=["signals", "volumes"])
def test_jobs_on_signals_and_volumes_are_delivered_bit_for_bit(shape: tuple[int, ...], tmp_path: Path) -> None:
    layers: list[dict[str, Any]] = [
        {"type": "conv", "out_channels": 8, "kernel_size": 3, "padding": "same"},
        *({"type": kind} for kind in ("batch_norm", "relu", "global_avg_pool", "flatten")),
        {"type": "linear", "out_features": 3},
    ]
    spec = tiny_spec(
        HALF_THE_CHANNELS, model={"input_shape": list(shape), "layers": layers}, exports=["safetensors", "pytorch"]
    )
    data = tiny_data(tmp_path / "cache", SYNTHETIC, shape)
    outcome = run(task_of(spec, data, tmp_path), MemoryJournal())
    assert isinstance(outcome, Delivered)
    assert outcome.summary["final"]["params"] < outcome.summary["baseline"]["params"]
    proofs = outcome.report["verification"]
    assert {"pruned.safetensors", "baseline.safetensors"} <= set(proofs)
    assert all(proof["max_abs_difference"] == 0 for proof in proofs.values())
