"""Write docs/benchmarks.md from the newest stored results. Run: .venv/bin/python benchmarks/document.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import compressions
import cutting
import latency
import quality_tables
import recipes
import records
import retraining
import time_to_accuracy

PAGE = records.ROOT / "docs" / "benchmarks.md"
HEAD = """# What was measured

This page is made by `benchmarks/document.py` from the newest files in `benchmarks/results/`: no number is written by hand.
How to measure again: [benchmarks/README.md](../benchmarks/README.md).
"""
QUALITY = """*Ours* is a plain `{"type": "prune", ...}` with every default. The peers are `torch.nn.utils.prune` over all layers and
layer by layer, and Torch-Pruning's global and local scope, retrained on the same images in the same batches for as many
epochs, by SGD at constant rates or along a line to 0, and along our schedule with our optimizer; of all their scopes and
schedules the best cell of a row counts. Ours reconstructs what it cuts and learns from the dense network, as a plain job
does; the peers have neither. `letters` was in no choice. Rows with fewer than 5 seeds are of a grid that is still being
run: a single seed says little. The goals: nowhere below it, above it by more than the standard error
from a quarter of the MACs down, by a point at 0.12 of the MACs and at 95 % zeros; dense networks never below the best
training that peers use."""


def page() -> str:
    """The page; a section says so where nothing is stored."""
    parts = [
        HEAD.rstrip(),
        "## Accuracy against the peers",
        QUALITY,
        _lines("quality", quality_tables.document),
        "## 2:4 zeros, low rank, 8 bits",
        _lines("compressions", compressions.table),
        "## Recipes of a training",
        _lines("recipes", recipes.table),
        "## Time to a tutorial's accuracy",
        _newest("time-to-accuracy", time_to_accuracy.table),
        "## Retraining policies",
        _lines("retraining", retraining.table),
        "## Latency of pruned networks",
        _newest("latency", latency.table),
        "## Time and memory of a removal",
        _newest("cutting", cutting.table),
    ]
    return "\n\n".join(parts) + "\n"


def _lines(name: str, table: Callable[[list[dict[str, Any]]], str]) -> str:
    path = records.latest(name, ".jsonl")
    return "Nothing is stored." if path is None else table(list(records.rows(path)))


def _newest(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    path = records.latest(name)
    return "Nothing is stored." if path is None else table(json.loads(path.read_text()))


if __name__ == "__main__":
    PAGE.write_text(page())
