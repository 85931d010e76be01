"""How much faster a pruned network answers in onnxruntime: `round_to`, and every budget with the default.

    .venv/bin/python benchmarks/latency.py [--network deep_cnn] [--short] [--write | --table]

Widths are those of a job's plan, weights are random: what a layer computes does not change how long it takes. Each
pruned network takes turns with the dense one, run by run, on one thread, whose own time is counted: what else the machine
does is left out. A figure is the median over the rounds of the ratio of their medians. `--write` stores the figures as
benchmarks/results/<date>-latency.json, `--table` prints the newest.

Trained networks share a budget out by what their layers are worth, so the same is measured with the widths that
`quality.py` stored for `deep_cnn`, ours and Torch-Pruning's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import data_sets
import records

from app.errors import InvalidSpec
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.network.presets.registry import preset_layers
from app.planning.plan import Plan, make_plan
from app.spec.data import synthetic_facts
from app.spec.job import parse_job
from worker.latency import Stopwatch
from worker.network import Network, build_network

SHAPE, CLASSES = (3, 32, 32), 10
BATCH_SIZES = (1, 16)
ALIGNMENTS = (1, 4, 8, 16)
BUDGETS = (0.5, 0.25)
SWEEP = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1)
METHODS = ("espalier default", "Torch-Pruning global", "Torch-Pruning local")
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
            }
        )
    ratios = take_turns(dense, networks, rounds=rounds, seconds=seconds)
    return [row | {"ratios": found} for row, found in zip(rows, ratios, strict=True)]


def measure_trained(*, rounds: int, seconds: float) -> list[Row]:
    """One row for each widths of `deep_cnn` that stored results of `quality.py` have; of several seeds the first."""
    path = records.latest("quality", ".jsonl")
    chosen: dict[tuple[Any, ...], Row] = {}
    for line in records.rows(path) if path is not None else ():
        if line.get("model") == "deep_cnn" and line.get("structure") == "channels" and "widths" in line:
            chosen.setdefault((line["data"], line["amount"], line["method"]), line)
    rows = []
    for (data, budget, method), line in sorted(chosen.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2])):
        if method not in METHODS:
            continue
        shape = data_sets.SHAPES[data]
        dense, smaller = (deep_cnn(shape, line["widths"][-1], widths) for widths in (None, line["widths"]))
        (ratios,) = take_turns(dense, [smaller], rounds=rounds, seconds=seconds)
        row = {"data": data, "budget": budget, "method": method, "macs": line["macs"], "widths": line["widths"]}
        rows.append(row | {"accuracy": line["accuracy"], "ratios": ratios})
    return rows


def deep_cnn(shape: tuple[int, ...], classes: int, widths: Sequence[int] | None) -> Network:
    """The preset with these output widths, layer by layer; None: its own."""
    layers = preset_layers("deep_cnn", shape, classes)
    large = [layer for layer in layers if layer["type"] in ("conv", "linear")]
    for layer, width in zip(large, widths or (), strict=widths is not None):
        layer["out_channels" if layer["type"] == "conv" else "out_features"] = width
    return build_network(build_graph(read_layers(layers), shape), seed=0).eval()


def take_turns(
    dense: Network, networks: Sequence[Network], *, rounds: int, seconds: float
) -> list[dict[str, list[float]]]:
    """For each network its time relative to the dense one, by batch size: one number a round."""
    ratios: list[dict[str, list[float]]] = [{} for _ in networks]
    for batch_size in BATCH_SIZES:
        monitor = Stopwatch(dense, seconds=seconds, batch_size=batch_size, clock=time.thread_time)
        for _ in range(rounds):
            for found, network in zip(ratios, networks, strict=True):
                ratio = monitor.time_ms(network) / monitor.dense_ms
                found.setdefault(f"batch_{batch_size}", []).append(round(ratio, 4))
    return ratios


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
    if result.get("trained"):
        about = "`deep_cnn` with the widths that trained networks got, with their accuracy in %:"
        head = ["data", "budget", "method", "MACs kept", "widths", "accuracy", *head[-len(BATCH_SIZES) :]]
        parts += [about, records.markdown(head, [_trained_line(row) for row in result["trained"]])]
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
    return [*line, *_ratios(row)]


def _trained_line(row: Row) -> list[str]:
    line = [row["data"], f"{row['budget']:g}", row["method"].removesuffix(" default"), f"{row['macs']:.3f}"]
    return [*line, "-".join(map(str, row["widths"])), f"{100 * row['accuracy']:.1f}", *_ratios(row)]


def _ratios(row: Row) -> list[str]:
    found = [row["ratios"][f"batch_{size}"] for size in BATCH_SIZES]
    return [f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in found]


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
    found = {"rounds": rounds, "rows": rows}
    if not options.short:
        found["trained"] = measure_trained(rounds=rounds, seconds=seconds)
    print(table(records.about() | found))
    if options.write:
        print(f"\n{records.write('latency', found).name}")


if __name__ == "__main__":
    main()
