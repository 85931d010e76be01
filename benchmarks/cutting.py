"""How long it takes to score, choose and cut the channels of a large network on one core, and in how much memory.

    .venv/bin/python benchmarks/cutting.py [--network resnet50] [--size 224] [--short] [--write | --table]

Every criterion is measured in processes of its own, from random weights to the smaller network, checked as in a job.
Seconds are those that the process computes, in one thread: what else the machine does is left out.
Memory is the highest resident memory from the loaded network on, the network included, divided by the size of its
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import records

CRITERIA = ("l1", "l2", "bn_scale", "fpgm", "lamp", "random")
SCOPES = ("layer", "global")
BUDGET = 0.5
MOST_SECONDS = 3.0
MOST_MEMORY = 3.0
MAGNITUDES = ("l1", "l2", "bn_scale", "lamp")

Row = dict[str, Any]


def measure_here(name: str, size: int, criterion: str, scope: str) -> Row:
    """Seconds of each part and the peak of memory, in this process, which has measured nothing before."""
    import torch

    from app.planning.plan import JobLimits, make_plan
    from app.pruning.channel_classes import channel_classes
    from app.spec.data import DataFacts
    from app.spec.job import parse_job
    from app.spec.prune import Prune
    from worker.network import build_network
    from worker.precision import choose_precision
    from worker.pruning.importance import channel_scores
    from worker.pruning.schedules import prune_stages
    from worker.run.removal import RemovalContext, cut_channels

    torch.set_num_threads(1)
    shape = (3, size, size)
    facts = DataFacts("pictures", shape, 1000, tuple(map(str, range(1000))), 2000, 1000, "uint8")
    step = {"type": "prune", "budget": {"macs": BUDGET}, "criterion": criterion, "scope": scope}
    document = {
        "spec_version": 1,
        "data": {"dataset": "pictures"},
        "model": {"preset": name, "input_shape": list(shape)},
        "optimizations": [step],
    }
    plan = make_plan(parse_job(document), facts, limits=JobLimits.none())
    (settled,) = plan.spec.optimizations
    assert isinstance(settled, Prune)
    precision = choose_precision(plan.spec.training, "cpu", spatial_axes=2)
    before_network = _resident()
    network = build_network(plan.baseline, seed=0).eval()
    precision.to_device(network)
    context = RemovalContext(lambda: iter(()), 0, precision, plan.baseline_cost, lambda: network)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory counts from here
    began = time.process_time()
    smaller = cut_channels(
        network, settled, prune_stages(settled, plan.spec.training)[0], context, start=plan.baseline
    ).network
    total = time.process_time() - began
    peak = _highest() - before_network
    kept = sum(node.macs for node in smaller.graph.nodes) / plan.baseline_cost.macs
    began = time.process_time()
    classes = channel_classes(plan.baseline)
    grouped = time.process_time()
    channel_scores(network, classes, settled.criterion, seed=0)
    scored = time.process_time()
    parts = {"groups": grouped - began, "score": scored - grouped, "choose and cut": total - (scored - began)}
    return {"seconds": parts, "total": total, "kept": kept, "weights_bytes": weights, "memory_bytes": peak}


def measure(name: str, size: int, criterion: str, scope: str, repeats: int) -> Row:
    """The figures of one criterion: medians over processes."""
    command = [sys.executable, __file__, "--alone", json.dumps([name, size, criterion, scope])]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found.append(json.loads(done.stdout))
    totals = [one["total"] for one in found]
    return {
        "network": name,
        "input": size,
        "criterion": criterion,
        "scope": scope,
        "seconds": {step: statistics.median(one["seconds"][step] for one in found) for step in found[0]["seconds"]},
        "total_s": statistics.median(totals),
        "totals_s": totals,
        "macs": found[0]["kept"],
        "memory_per_weights": max(one["memory_bytes"] / one["weights_bytes"] for one in found),
        "weights_mib": found[0]["weights_bytes"] / 2**20,
    }


def table(result: Row) -> str:
    """The figures as Markdown, and what the goals say."""
    rows = result["rows"]
    steps = list(rows[0]["seconds"])
    head = ["network", "criterion", "scope", *(f"{step} s" for step in steps), "total s (range)", "memory / weights"]
    body = [
        [
            row["network"],
            row["criterion"],
            row["scope"],
            *(f"{row['seconds'][step]:.2f}" for step in steps),
            f"{row['total_s']:.2f} ({min(row['totals_s']):.2f} to {max(row['totals_s']):.2f})",
            f"{row['memory_per_weights']:.2f}",
        ]
        for row in rows
    ]
    slowest = max((row for row in rows if row["criterion"] in MAGNITUDES), key=lambda row: row["total_s"])
    largest = max(rows, key=lambda row: row["memory_per_weights"])
    verdicts = [
        f"- Slowest magnitude criterion: {slowest['total_s']:.2f} s, goal {MOST_SECONDS:g}: "
        + ("met" if slowest["total_s"] <= MOST_SECONDS else "missed"),
        f"- Most memory: {largest['memory_per_weights']:.2f} times the weights, goal {MOST_MEMORY:g}: "
        + ("met" if largest["memory_per_weights"] <= MOST_MEMORY else "missed"),
    ]
    about = (
        f"{records.conditions(result)} One thread; {rows[0]['network']} at {rows[0]['input']} x {rows[0]['input']} "
        f"({rows[0]['weights_mib']:.0f} MiB of weights) to {BUDGET:g} of its MACs; median of {len(rows[0]['totals_s'])}."
    )
    return "\n\n".join([about, records.markdown(head, body), "\n".join(verdicts)])


def _resident() -> int:
    return _status("VmRSS")


def _highest() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) << 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--short", action="store_true", help="one criterion, once")
    parser.add_argument("--write", action="store_true", help="store the figures in benchmarks/results")
    parser.add_argument("--table", action="store_true", help="print the newest stored figures and end")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure_here(*options.alone)))
        return
    if options.table:
        path = records.latest("cutting")
        sys.exit("no stored figures") if path is None else print(table(json.loads(path.read_text())))
        return
    wanted = [("l2", "layer")] if options.short else [(c, s) for c in CRITERIA for s in SCOPES]
    repeats = 1 if options.short else 3
    found = {"rows": [measure(options.network, options.size, c, s, repeats) for c, s in wanted]}
    print(table(records.about() | found))
    if options.write:
        print(f"\n{records.write('cutting', found).name}")


if __name__ == "__main__":
    main()
