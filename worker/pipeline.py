"""A job from its description to its files: the run's table of contents.

prepare       plan, data, network, and where an earlier attempt left it     run/preparation.py
run_stages    train; for each compression score, choose, mask or remove,    run/stages.py, run/handlers.py,
              recalibrate, retrain; evaluate after each                     training/loop.py
deliver       measure latencies, export, verify each file, report           run/delivery.py

python -m worker.pipeline SPEC.json DATA_FOLDER OUT_FOLDER      runs one job alone, without the service
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
from worker.journal import Journal, MemoryJournal
from worker.run.delivery import Delivered, Delivery, deliver
from worker.run.job import Task
from worker.run.monitor import Interrupted
from worker.run.preparation import prepare
from worker.run.stages import run_stages

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
        stopped_early = run_stages(job)
        return deliver(job, stopped_early=stopped_early)
    except Interrupted as told:
        return Paused() if told.wish == "pause" else Cancelled()
    finally:
        job.close()


def table(summary: Mapping[str, Any]) -> str:
    """Dense against pruned, and against its 8-bit file if there is one, as lines of text."""
    columns = {"dense": summary["baseline"], "pruned": summary["final"], "int8": summary.get("int8")}
    found = {title: measures for title, measures in columns.items() if measures is not None}
    rows = [["", *found], ["accuracy", *(f"{measures['accuracy']:.4f}" for measures in found.values())]]
    for name in ("params", "nonzero_params", "macs", "bytes"):
        rows.append([name, *(f"{measures[name]:,}" for measures in found.values())])
    for runtime, batches in summary["baseline"]["latency_ms"].items():
        for batch in batches:
            times = [measures["latency_ms"].get(runtime, {}).get(batch) for measures in found.values()]
            rows.append([f"{runtime} {batch} ms", *("" if one is None else f"{one['p50']:.3f}" for one in times)])
    return "\n".join(f"{row[0]:24}" + "".join(f"{value:>14}" for value in row[1:]) for row in rows)


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
        assert isinstance(outcome, Delivered), "without a service nobody can ask for a pause or a cancel"
        for delivery in outcome.artifacts:
            shutil.move(delivery.path, options.out / delivery.name)
    print(table(outcome.summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
