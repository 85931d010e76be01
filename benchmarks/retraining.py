"""What retraining after a removal is worth: policies against epochs, as jobs of a started embedded service.

    .venv/bin/python benchmarks/retraining.py [--data emoji] [--structures channels weights] [--seeds 3] [--resume]
    .venv/bin/python benchmarks/retraining.py --table        # from the newest results

Every cell is a job that is POSTed, trains, prunes (channels to a quarter of the MACs, or nine tenths of the weights) and
retrains; its report says how good it is. Jobs of one seed train the same dense network, bit for bit. Results are JSON
lines, written as they come.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import data_sets
import httpx
import records

CACHE = records.ROOT / "var" / "benchmarks" / "cache"
AMOUNTS: dict[str, dict[str, Any]] = {"channels": {"budget": {"macs": 0.25}}, "weights": {"sparsity": 0.9}}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "fine_tune": {"policy": "fine_tune"},
    "fine_tune at a tenth": {"policy": "fine_tune", "lr": 0.01},
    "lr_rewind": {"policy": "lr_rewind"},
    "lr_rewind from the top": {"policy": "lr_rewind", "lr": 0.1},
    "lr_rewind, distilled": {"policy": "lr_rewind", "distillation": {}},
    "weight_rewind": {"policy": "weight_rewind"},
}
MASKS_ONLY = ("weight_rewind",)
FINISHED = {"succeeded", "failed", "cancelled"}

Row = dict[str, Any]


def network(data: str) -> dict[str, Any]:
    """The model of the jobs: a small VGG for pictures, the preset for signals."""
    shape = list(data_sets.SHAPES[data])
    if len(shape) == 2:
        return {"preset": "audio_cnn", "input_shape": shape}
    layers: list[dict[str, Any]] = []
    for place, channels in enumerate((32, 64, 96, 96)):
        layers.append({"type": "conv", "out_channels": channels, "kernel_size": 3, "padding": 1, "bias": False})
        layers += [{"type": "batch_norm"}, {"type": "relu"}]
        layers += [{"type": "max_pool", "kernel_size": 2}] if place < 3 else []
    layers += [{"type": "global_avg_pool"}, {"type": "flatten"}]
    layers.append({"type": "linear", "out_features": data_sets.CLASSES[data]})
    return {"layers": layers, "input_shape": shape}


class Service:
    """An embedded service of one worker, in a process of its own."""

    def __init__(self, home: str, threads: int) -> None:
        command = [sys.executable, "-m", "app.serve", "--port", "0", "--home", home]
        environment = os.environ | {"ESPALIER_THREADS": str(threads)}
        with (Path(home) / "serve.log").open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=records.ROOT, env=environment
            )
        assert self._process.stdout is not None
        self.client = httpx.Client(base_url=self._process.stdout.readline().split()[-1], timeout=120)

    def upload(self, path: Path) -> str:
        """The id of an uploaded data set that is ready."""
        answer = self.client.post(
            "/v1/datasets", params={"name": path.stem, "format": "npz"}, content=path.read_bytes()
        )
        found = answer.raise_for_status().json()
        while found["state"] == "checking":
            time.sleep(0.5)
            found = self.client.get(f"/v1/datasets/{found['id']}").raise_for_status().json()
        assert found["state"] == "ready", found["problems"]
        return str(found["id"])

    def carry_out(self, document: dict[str, Any]) -> dict[str, Any]:
        """The report of a job, POSTed now and followed to its end."""
        answer = self.client.post("/v1/jobs", json=document)
        assert answer.status_code < 300, answer.text
        job = answer.json()
        while job["state"] not in FINISHED:
            job = self.client.get(f"/v1/jobs/{job['id']}", params={"wait_s": 20}).raise_for_status().json()
        assert job["state"] == "succeeded", job["error"]
        artifacts = self.client.get(f"/v1/jobs/{job['id']}/artifacts").raise_for_status().json()["items"]
        href = next(artifact["href"] for artifact in artifacts if artifact["name"] == "report.json")
        report: dict[str, Any] = self.client.get(href).raise_for_status().json()
        return report

    def close(self) -> None:
        """End it as Ctrl-C would."""
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(90)


def cells(structures: Sequence[str], policies: Sequence[str], epochs: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """(structure, policy, retraining epochs); without retraining there is one number of epochs: 0."""
    for structure in structures:
        for policy in policies:
            if policy in MASKS_ONLY and structure != "weights":
                continue
            for count in [0] if policy == "none" else epochs:
                yield structure, policy, count


def run(options: argparse.Namespace, path: Path) -> None:
    """POST the jobs that the file has no line of yet."""
    done = {_identity(row) for row in records.rows(path)} if path.exists() else set()
    records.append(path, records.about() | {"threads": options.threads})
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as home:
        service = Service(home, options.threads)
        try:
            source: dict[str, Any] = {"dataset": "fashion-mnist", "limit": options.limit}
            if options.data == "synthetic":
                source = {"synthetic": data_sets.SYNTHETIC}
            elif options.data != "fashion-mnist":
                source = {"dataset": service.upload(data_sets.archive(options.data, CACHE))}
            for seed in range(options.seeds):
                for structure, policy, epochs in cells(options.structures, options.policies, options.retrain_epochs):
                    row = {"data": options.data, "epochs": options.epochs, "seed": seed}
                    row |= {"structure": structure, "policy": policy, "retrain_epochs": epochs}
                    if _identity(row) in done:
                        continue
                    began = time.monotonic()
                    report = service.carry_out(_job(options, source, row))
                    found = {"dense": report["baseline"]["accuracy"], "accuracy": report["final"]["accuracy"]}
                    records.append(path, row | found | {"seconds": round(time.monotonic() - began, 1)})
                    print(f"seed {seed} {structure} {policy} {epochs}: {found['accuracy']:.4f}", flush=True)
        finally:
            service.close()


def _job(options: argparse.Namespace, source: dict[str, Any], row: Row) -> dict[str, Any]:
    retrain = POLICIES[row["policy"]] | {"epochs": row["retrain_epochs"]}
    step = {"type": "prune", "structure": row["structure"], **AMOUNTS[row["structure"]], "retrain": retrain}
    pictures = len(data_sets.SHAPES[options.data]) == 3
    return {
        "spec_version": 1,
        "name": f"retraining: {row['structure']}, {row['policy']}, {row['retrain_epochs']} epochs",
        "data": source,
        "model": network(options.data),
        "training": {
            "epochs": options.epochs,
            "seed": row["seed"],
            "augmentation": ["random_crop"] if pictures else [],
        },
        "optimizations": [step],
        "exports": ["safetensors"],
    }


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("data", "epochs", "seed", "structure", "policy", "retrain_epochs"))


def table(rows: Sequence[Row]) -> str:
    """One table a data set: accuracies by policy and epochs, and the policy that is best."""
    headers, results = [row for row in rows if "machine" in row], [row for row in rows if "policy" in row]
    if not results:
        return "No results yet."
    parts = [f"{records.conditions(headers[-1])} Accuracy in %, mean ± standard deviation over the seeds."]
    for data, epochs in sorted({(row["data"], row["epochs"]) for row in results}):
        chosen = [row for row in results if (row["data"], row["epochs"]) == (data, epochs)]
        for structure in sorted({row["structure"] for row in chosen}):
            parts.append(_of_structure(data, epochs, structure, [r for r in chosen if r["structure"] == structure]))
    return "\n\n".join(parts)


def _of_structure(data: str, epochs: int, structure: str, rows: Sequence[Row]) -> str:
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        found[row["policy"], row["retrain_epochs"]].append(100 * row["accuracy"])
    counts = sorted({count for _, count in found if count})
    body = []
    for policy in dict.fromkeys(policy for policy, _ in found):
        cells = [found.get((policy, count)) or found.get((policy, 0), []) for count in counts]
        body.append([policy, *(records.mean_and_spread(cell) if cell else "-" for cell in cells)])
    dense = records.mean_and_spread([100 * value for value in {row["seed"]: row["dense"] for row in rows}.values()])
    seeds = len({row["seed"] for row in rows})
    amount = "0.25 of the MACs" if structure == "channels" else "90 % zeros"
    head = f"{data}, {structure} to {amount}, {epochs} epochs of training; dense {dense}; seeds: {seeds}."
    best = []
    for count in counts:
        means = {policy: statistics.mean(values) for (policy, epochs), values in found.items() if epochs == count}
        best.append(f"{max(means, key=lambda policy: means[policy])} at {count} epochs")
    return "\n\n".join(
        [
            head,
            records.markdown(["policy", *(f"{count} epochs" for count in counts)], body),
            f"Best: {', '.join(best)}.",
        ]
    )


def main() -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="emoji", choices=data_sets.SHAPES)
    parser.add_argument("--structures", nargs="+", default=list(AMOUNTS), choices=AMOUNTS)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of the training")
    parser.add_argument("--retrain-epochs", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--limit", type=int, default=10_000, help="training images of Fashion-MNIST")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    records.add_gathering_options(parser)
    parser.add_argument("--short", action="store_true", help="two jobs on images drawn from a seed: does it still run?")
    options = parser.parse_args()
    if options.short:
        options.data, options.seeds, options.epochs, options.retrain_epochs = "synthetic", 1, 2, [1]
        options.structures, options.policies = ["channels"], ["none", "lr_rewind"]
    records.gather("retraining", options, run, table)


if __name__ == "__main__":
    main()
