"""A job from its description to its files: the run's table of contents.

prepare     plan, data, network, and where an earlier attempt left it            preparation.py
carry_out   train; for each pruning step score, choose, mask or remove,          stages.py, training.py,
compressing.py
            recalibrate, retrain; evaluate after each
deliver     measure latencies, export, prove each file, report                   delivery.py

python -m worker.pipeline SPEC.json DATA_FOLDER OUT_FOLDER       runs one job alone, without the service
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import InvalidSpec, JobError
from worker.delivery import Delivered, Delivery, deliver
from worker.journal import Journal, MemoryJournal
from worker.preparation import Task, prepare
from worker.stages import carry_out
from worker.watching import Interrupted

__all__ = ["Cancelled", "Delivered", "Delivery", "Outcome", "Paused", "Task", "run"]


@dataclass(frozen=True)
class Paused:
    """The user paused the job: everything reached is in its last checkpoint."""


@dataclass(frozen=True)
class Cancelled:
    """The user cancelled the job."""


Outcome = Delivered | Paused | Cancelled


def run(task: Task, journal: Journal) -> Outcome:
    """Run one attempt of a job to its end.

    Raises:
        JobError: DataInvalid, SourceUnavailable, WeightsInvalid, Diverged, OutOfMemory, BudgetMissed, LayerEmptied,
            QuantizationFailed, VerificationFailed or DiskFull.
    """
    job = prepare(task, journal)
    try:
        stopped_early = carry_out(job)
        return deliver(job, stopped_early=stopped_early)
    except Interrupted as told:
        return Paused() if told.wish == "pause" else Cancelled()
    finally:
        job.close()


def table(summary: Mapping[str, Any]) -> str:
    """Dense against pruned, as lines of text."""
    baseline, final = summary["baseline"], summary["final"]
    rows = [("", "dense", "pruned"), ("accuracy", f"{baseline['accuracy']:.4f}", f"{final['accuracy']:.4f}")]
    for name in ("params", "nonzero_params", "macs", "bytes"):
        rows.append((name, f"{baseline[name]:,}", f"{final[name]:,}"))
    for runtime, batches in baseline["latency_ms"].items():
        for batch, times in batches.items():
            pruned = final["latency_ms"][runtime][batch]
            rows.append((f"{runtime} {batch} ms", f"{times['p50']:.3f}", f"{pruned['p50']:.3f}"))
    return "\n".join(f"{name:24}{dense:>14}{pruned:>14}" for name, dense, pruned in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job alone; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.pipeline", description="Run one job without the service.")
    parser.add_argument("spec", type=Path, help="the job, a JSON file")
    parser.add_argument("data", type=Path, help="a packed data set (a folder with dataset.json)")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument(
        "--sources", type=Path, default=None, help="folder with the networks that the job refers to, one folder each"
    )
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; default: torch's own choice")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    journal = MemoryJournal(echo=sys.stderr, keep=False)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=options.out) as scratch:
        task = Task(
            job_id="local",
            attempt=1,
            spec=json.loads(options.spec.read_text(encoding="utf-8")),
            data=options.data,
            scratch=Path(scratch),
            sources=options.sources,
            threads=options.threads,
        )
        try:
            outcome = run(task, journal)
        except (InvalidSpec, JobError) as error:
            advice = f" ({error.advice})" if isinstance(error, JobError) else ""
            print(f"{error.code}: {error.message}{advice}", file=sys.stderr)
            return 1
        assert isinstance(outcome, Delivered), "nobody wished otherwise"
        for delivery in outcome.artifacts:
            shutil.move(delivery.path, options.out / delivery.name)
    print(table(outcome.summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
