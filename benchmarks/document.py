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
QUALITY = """Each row starts from the same trained networks. *Ours* is a plain `{"type": "prune", ...}`: every default. The
peers are the better of `torch.nn.utils.prune` over all layers and layer by layer, or of Torch-Pruning's global and local
scope, retrained on the same images for as many epochs: at a constant rate (the better of a tenth and a hundredth of the
highest), and along the falling schedule that is ours. The goal: half a point above a constant rate from a quarter of the
MACs down, nowhere below it, and never a point below the peers along our schedule."""


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
