"""How much faster a pruned network answers in onnxruntime: `round_to`, and every budget with the default.

    .venv/bin/python benchmarks/latency.py [--network deep_cnn] [--short] [--write | --table]

Widths are those of a job's plan, weights are random: what a layer computes does not change how long it takes. Each
pruned network takes turns with the dense one, run by run, on one thread, whose own time is counted: what else the machine
does is left out. A figure is the median over the rounds of the ratio of their medians. `--write` stores the figures as
benchmarks/results/<date>-latency.json, `--table` prints the newest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import records

from app.errors import InvalidSpec
from app.spec.data import synthetic_facts
from app.spec.job import parse_job
from app.spec.plan import Plan, make_plan
from worker.latency import Stopwatch
from worker.network import build_network

SHAPE, CLASSES = (3, 32, 32), 10
BATCH_SIZES = (1, 16)
ALIGNMENTS = (1, 4, 8, 16)
BUDGETS = (0.5, 0.25)
SWEEP = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1)
GOALS = {(0.5, 1): 0.65, (0.5, 16): 0.70, (0.25, 1): 0.35, (0.25, 16): 0.45}  # deep_cnn, default round_to
NEVER_SLOWER = 1.03  # the dense network against itself comes to 0.97 to 1.03 on a busy machine

Row = dict[str, Any]


def planned(name: str, budget: float, round_to: int | None) -> Plan:
    """The job's plan: the network as given, and as it is after cutting it to this part of its MACs.

    Raises InvalidSpec where blocks are too wide for the budget.
    """
    step = {"type": "prune", "budget": {"macs": budget}, "round_to": round_to}
    document = {
        "spec_version": 1,
        "data": {"synthetic": {"classes": CLASSES}},
        "model": {"preset": name, "input_shape": list(SHAPE)},
        "optimizations": [step],
    }
    spec = parse_job(document)
    assert spec.data.synthetic is not None
    return make_plan(spec, synthetic_facts(spec.data.synthetic, SHAPE))


def measure(name: str, *, rounds: int, seconds: float) -> list[Row]:
    """The rows of one network: every budget and alignment, each at all batch sizes."""
    dense = build_network(planned(name, 0.5, None).baseline, seed=0).eval()
    wanted: list[tuple[float, int | None]] = [(budget, None) for budget in SWEEP]
    wanted += [(budget, round_to) for budget in BUDGETS for round_to in ALIGNMENTS]
    rows: list[Row] = []
    networks = []
    for budget, round_to in wanted:
        try:
            plan = planned(name, budget, round_to)
        except InvalidSpec:  # blocks this wide do not allow it
            continue
        networks.append(build_network(plan.planned, seed=0).eval())
        rows.append(
            {
                "network": name,
                "budget": budget,
                "round_to": round_to,
                "macs": plan.planned_cost.macs / plan.baseline_cost.macs,
                "widths": [node.shape[0] for node in plan.planned.nodes if node.type in ("conv", "linear")],
                "ratios": {},
            }
        )
    for batch_size in BATCH_SIZES:
        watch = Stopwatch(dense, seconds=seconds, batch_size=batch_size, clock=time.thread_time)
        ratios: list[list[float]] = [[] for _ in rows]
        for _ in range(rounds):
            for place, smaller in enumerate(networks):
                ratios[place].append(watch.time_ms(smaller) / watch.dense_ms)
        for row, found in zip(rows, ratios, strict=True):
            row["ratios"][f"batch_{batch_size}"] = [round(ratio, 4) for ratio in found]
            row.setdefault("dense_ms", {})[f"batch_{batch_size}"] = round(watch.dense_ms, 4)
    return rows


def table(result: Row) -> str:
    """The figures as Markdown: alignments, then the sweep of budgets, then what the goals say."""
    rows = result["rows"]
    head = ["network", "budget", "round_to", "MACs kept", "widths", *(f"batch {size}" for size in BATCH_SIZES)]
    by_alignment = [_line(row) for row in rows if row["round_to"] is not None]
    sweep = [_line(row) for row in rows if row["round_to"] is None]
    about = (
        f"{records.conditions(result)} One thread; time relative to the dense network, median of {result['rounds']} "
        "rounds (lowest to highest)."
    )
    parts = [about, records.markdown(head, by_alignment), "With the default `round_to`:"]
    parts += [records.markdown(head, sweep), *verdicts(rows)]
    return "\n\n".join(parts)


def verdicts(rows: list[Row]) -> list[str]:
    """One sentence for each goal."""
    said = []
    for row in rows:
        for size in BATCH_SIZES:
            goal = GOALS.get((row["budget"], size))
            if row["round_to"] is None and goal is not None and row["network"] == "deep_cnn":
                found = _median(row, size)
                word = "met" if found <= goal else "missed"
                said.append(f"- {row['budget']:g} of the MACs, batch {size}: {found:.2f}, goal {goal:.2f}: {word}")
    slow = [row for row in rows if row["round_to"] is None and any(_median(row, s) > NEVER_SLOWER for s in BATCH_SIZES)]
    listed = ", ".join(f"{row['network']} at {row['budget']:g}" for row in slow)
    said.append(f"- Slower than dense with the default `round_to`: {listed or 'at no budget'}.")
    return ["\n".join(said)]


def _line(row: Row) -> list[str]:
    widths = "-".join(map(str, row["widths"])) if len(row["widths"]) <= 8 else f"{len(row['widths'])} layers"
    line = [row["network"], f"{row['budget']:g}", str(row["round_to"] or "-"), f"{row['macs']:.3f}", widths]
    for size in BATCH_SIZES:
        found = row["ratios"][f"batch_{size}"]
        line.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return line


def _median(row: Row, batch_size: int) -> float:
    return statistics.median(row["ratios"][f"batch_{batch_size}"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", action="append", help="default: deep_cnn and resnet20")
    parser.add_argument("--short", action="store_true", help="one short round")
    parser.add_argument("--write", action="store_true", help="store the figures in benchmarks/results")
    parser.add_argument("--table", action="store_true", help="print the newest stored figures and end")
    options = parser.parse_args()
    if options.table:
        path = records.latest("latency")
        sys.exit("no stored figures") if path is None else print(table(json.loads(path.read_text())))
        return
    rounds, seconds = (1, 0.1) if options.short else (5, 0.8)
    rows = [
        row
        for name in options.network or ("deep_cnn", "resnet20")
        for row in measure(name, rounds=rounds, seconds=seconds)
    ]
    result = records.about() | {"rounds": rounds, "rows": rows}
    print(table(result))
    if options.write:
        print(f"\n{records.write('latency', {'rounds': rounds, 'rows': rows}).name}")


if __name__ == "__main__":
    main()
