"""Write docs/benchmarks.md from the newest stored results. Run: .venv/bin/python benchmarks/document.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cutting
import latency
import quality_tables
import records
import retraining

PAGE = records.ROOT / "docs" / "benchmarks.md"
HEAD = """# What was measured

This page is made by `benchmarks/document.py` from the newest files in `benchmarks/results/`: no number is written by hand.
How to measure again: [benchmarks/README.md](../benchmarks/README.md).
"""
QUALITY = """*Ours* is a plain `{"type": "prune", ...}` with every default. The peers are `torch.nn.utils.prune` over all layers and
layer by layer, and Torch-Pruning's global and local scope, retrained on the same images for as many epochs; of all their
scopes and schedules the best cell of a row counts. The goals: nowhere below it, above it by more than the standard error
from a quarter of the MACs down, by a point at 0.12 of the MACs and at 95 % zeros; dense networks never below the best
training that peers use."""


def page() -> str:
    """The page; a section says so where nothing is stored."""
    quality = records.latest("quality", ".jsonl")
    retrained = records.latest("retraining", ".jsonl")
    parts = [
        HEAD.rstrip(),
        "## Accuracy against the peers",
        QUALITY,
        quality_tables.document(list(records.rows(quality))) if quality else "Nothing is stored.",
        "## Retraining policies",
        retraining.table(list(records.rows(retrained))) if retrained else "Nothing is stored.",
        "## Latency of pruned networks",
        _newest("latency", latency.table),
        "## Time and memory of a removal",
        _newest("cutting", cutting.table),
    ]
    return "\n\n".join(parts) + "\n"


def _newest(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    path = records.latest(name)
    return "Nothing is stored." if path is None else table(json.loads(path.read_text()))


if __name__ == "__main__":
    PAGE.write_text(page())
