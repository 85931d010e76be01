"""One job from POST to proven weights, through nothing but the service's HTTP interface."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = {
    "spec_version": 1,
    "name": "demo: seed CNN on Fashion-MNIST",
    "data": {"dataset": "fashion-mnist"},
    "model": {"preset": "simple_cnn"},
    "training": {"epochs": 3},
    "optimizations": [
        {"type": "prune", "structure": "weights", "criterion": "l1", "sparsity": 0.8, "retrain": {"epochs": 1}},
    ],
}
# Runs in a clean process: nothing of this project is imported, only the delivered model.py, torch, safetensors and NumPy.
CHECK = """
import importlib.util, json, sys
import numpy as np, torch
folder, images, labels = sys.argv[1:]
spec = importlib.util.spec_from_file_location("model", folder + "/model.py")
model = importlib.util.module_from_spec(spec); spec.loader.exec_module(model)
network = model.load(folder + "/pruned.safetensors").eval()
about = json.load(open(folder + "/architecture.json"))
how = about["preprocessing"]
shape = (-1, 1, 1)
mean, std = torch.tensor(how["mean"]).view(shape), torch.tensor(how["std"]).view(shape)
images, labels = np.load(images), torch.from_numpy(np.load(labels))
right = 0
with torch.inference_mode():
    for start in range(0, len(labels), 500):
        batch = torch.from_numpy(images[start:start + 500]).reshape(-1, *about["input_shape"]).float()
        right += int((network((batch * how["scale"] - mean) / std).argmax(1) == labels[start:start + 500]).sum())
weights = [m.weight for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
zeros = sum(int((w == 0).sum()) for w in weights)
print(json.dumps({"accuracy": right / len(labels), "sparsity": zeros / sum(w.numel() for w in weights)}))
"""


class Service:
    """The embedded service in a process of its own."""

    def __init__(self, home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app.serve", "--port", "0", "--home", str(home)],
            stdout=subprocess.PIPE,
            stderr=(home / "serve.log").open("w"),
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("listening on "):
                self.url = line.split()[-1]
                return
        sys.exit(f"demo: the service did not start; its last words:\n{(home / 'serve.log').read_text()[-2000:]}")

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: object) -> Any:
        """The JSON answer to `body`."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def download(self, path: str, target: Path) -> str:
        """Store the bytes at `path`; their sha256."""
        with urllib.request.urlopen(self.url + path, timeout=300) as answer:
            data = answer.read()
        target.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    def stop(self) -> None:
        """End it as Ctrl-C would."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def follow(service: Service, job_id: str) -> dict[str, Any]:
    """The finished job; a live line meanwhile."""
    live = sys.stdout.isatty()
    said = ""
    while True:
        job: dict[str, Any] = service.get(f"/v1/jobs/{job_id}?wait_s=2")
        progress = job["progress"] or {}
        epoch = f"epoch {progress['epoch']}/{progress['epochs']}" if progress.get("epochs") else ""
        speed = f"{progress['images_per_s']:,.0f} images/s" if progress.get("images_per_s") else ""
        left = f"{progress['eta_s']:.0f} s left" if progress.get("eta_s") is not None else ""
        line = "  ".join(
            part
            for part in (
                f"{progress.get('fraction') or 0:4.0%}",
                job["state"],
                progress.get("phase") or "",
                epoch,
                speed,
                left,
            )
            if part
        )
        if live:
            print(f"\r  {line:<100}", end="", flush=True)
        elif (key := f"{job['state']} {progress.get('phase')} {epoch}") != said:
            said = key
            print(f"  {line}", flush=True)
        if job["state"] in {"succeeded", "failed", "cancelled"}:
            if live:
                print()
            return job


def table(report: dict[str, Any]) -> str:
    """Dense against pruned, as text."""
    before, after = report["baseline"], report["final"]
    rows = [("", "dense", "pruned")]
    rows += [("test accuracy", f"{before['accuracy']:.4f}", f"{after['accuracy']:.4f}")]
    for name in ("params", "nonzero_params", "macs", "bytes"):
        rows.append((name, f"{before[name]:,}", f"{after[name]:,}"))
    for runtime, batches in before["latency_ms"].items():
        for batch, times in batches.items():
            rows.append(
                (
                    f"{runtime} {batch} p50 ms",
                    f"{times['p50']:.3f}",
                    f"{after['latency_ms'][runtime][batch]['p50']:.3f}",
                )
            )
    return "\n".join(f"  {name:<28}{dense:>14}{pruned:>14}" for name, dense, pruned in rows)


def main() -> None:
    """Run the demo; ends with a non-zero exit code if anything does not reproduce."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=ROOT / "var" / "demo", help="folder of the demo's state")
    home: Path = parser.parse_args().home
    home.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print("demo: starting the embedded service (SQLite, local folder, no broker)", flush=True)
    service = Service(home)
    try:
        print(f"demo: POST {service.url}/v1/jobs\n{json.dumps(JOB, indent=2)}", flush=True)
        job = follow(service, service.post("/v1/jobs", JOB)["id"])
        if job["state"] != "succeeded":
            sys.exit(f"demo: the job {job['state']}: {json.dumps(job['error'])}")
        folder = home / "artifacts" / job["id"]
        folder.mkdir(parents=True, exist_ok=True)
        for artifact in service.get(f"/v1/jobs/{job['id']}/artifacts")["items"]:
            if service.download(artifact["href"], folder / artifact["name"]) != artifact["sha256"]:
                sys.exit(f"demo: {artifact['name']} is not what the manifest says")
        print(f"demo: downloaded to {folder}, every sha256 as stated")
    finally:
        service.stop()
    report = json.loads((folder / "report.json").read_text())
    packed = home / "cache" / "builtin" / "fashion-mnist"
    check = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            CHECK,
            str(folder),
            str(packed / "test.images.npy"),
            str(packed / "test.labels.npy"),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if check.returncode:
        sys.exit(f"demo: the delivered files do not load in a clean process:\n{check.stderr}")
    reproduced = json.loads(check.stdout)
    print(table(report))
    for note in report["notes"]:
        print(f"  note: {note}")
    print(f"  {time.monotonic() - started:.0f} s")
    if abs(reproduced["accuracy"] - report["final"]["accuracy"]) > 1e-9:
        sys.exit(
            f"demo: the report says {report['final']['accuracy']}, the delivered file gives {reproduced['accuracy']}"
        )
    print(
        f"demo: dense {report['baseline']['accuracy']:.4f} pruned {reproduced['accuracy']:.4f} "
        f"sparsity {reproduced['sparsity']:.4f} verified"
    )


if __name__ == "__main__":
    main()
