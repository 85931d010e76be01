"""How long it takes to make the longest answers: the plan of a large network, and a page of jobs.

    .venv/bin/python benchmarks/answers.py [--short] [--write]

No server and no network: a document goes in, the bytes of the answer come out. Medians, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records

from app.api.rendering import Json, job_document
from app.database.engine import Database
from app.jobs import commands, queries
from app.planning.plan import make_plan, plan_answer
from app.spec.data import DataFacts
from app.spec.job import parse_job

JOBS = queries.PAGE_LIMIT
LAYERS = 10_000
SHAPE = (3, 32, 32)
FACTS = DataFacts("pictures", SHAPE, 10, tuple(map(str, range(10))), 2000, 1000, "uint8")
TENANT = "default"


def job(model: dict[str, Any]) -> dict[str, Any]:
    """A job with this network, pruned to half of its weights."""
    step = {"type": "prune", "sparsity": 0.5}
    return {"spec_version": 1, "data": {"dataset": "pictures"}, "model": model, "optimizations": [step]}


def chain(layers: int) -> dict[str, Any]:
    """A network of so many layers, as flat as it can be written."""
    head = [{"type": "conv", "out_channels": 4, "kernel_size": 1}, *[{"type": "relu"}] * (layers - 4)]
    tail = [{"type": "global_avg_pool"}, {"type": "flatten"}, {"type": "linear", "out_features": 10}]
    return {"input_shape": list(SHAPE), "layers": [*head, *tail]}


def answer_plan(document: dict[str, Any]) -> bytes:
    """Parse, plan, and the bytes of the answer."""
    return bytes(Json(plan_answer(make_plan(parse_job(document), FACTS))).body)


def measure(action: Callable[[], object], repeats: int) -> float:
    """The median in milliseconds, after one that does not count."""
    action()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        found.append((time.perf_counter() - began) * 1e3)
    return statistics.median(found)


def measure_all(repeats: int) -> dict[str, float]:
    """Milliseconds of each answer."""
    resnet50, long = job({"preset": "resnet50", "input_shape": list(SHAPE)}), job(chain(LAYERS))
    found = {
        "parse, plan and answer of resnet50": measure(lambda: answer_plan(resnet50), repeats),
        f"parse, plan and answer of {LAYERS:,} layers": measure(lambda: answer_plan(long), max(1, repeats // 4)),
    }
    with tempfile.TemporaryDirectory() as folder:
        db = Database(f"sqlite:///{Path(folder) / 'espalier.sqlite'}")
        try:
            db.upgrade()
            for _ in range(JOBS):
                commands.submit_job(db, tenant=TENANT, spec=job(chain(8)))
            page, _ = queries.list_jobs(db, TENANT, limit=JOBS)
            found[f"a page of {len(page)} jobs, read from SQLite"] = measure(
                lambda: queries.list_jobs(db, TENANT, limit=JOBS), repeats
            )
            found[f"a page of {len(page)} jobs, as documents and bytes"] = measure(
                lambda: Json({"items": [job_document(view) for view in page]}), repeats
            )
        finally:
            db.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="few repetitions")
    parser.add_argument("--write", action="store_true", help="store the figures in benchmarks/results")
    options = parser.parse_args()
    repeats = 4 if options.short else 40
    result = {"repeats": repeats, "milliseconds": measure_all(repeats)}
    print(
        records.conditions(records.about()) + f" Median of {repeats}; of {LAYERS:,} layers, of {max(1, repeats // 4)}."
    )
    print()
    print(records.markdown(["answer", "ms"], [[name, f"{ms:.1f}"] for name, ms in result["milliseconds"].items()]))
    if options.write:
        print(f"\n{records.write('answers', result).name}")


if __name__ == "__main__":
    main()
