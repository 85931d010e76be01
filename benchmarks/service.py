"""How fast the service answers: medians over loopback of a started embedded service, and the memory of its API process.

    .venv/bin/python benchmarks/service.py [--short] [--write]

Prints one line a figure: validate, submit, GET of a job, POST to the first training step with a warm trainer, resident memory.
`--write` stores them as benchmarks/results/<date>-service.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
RESNET = {
    "spec_version": 1,
    "data": {"synthetic": {"classes": 10, "train": 256, "test": 64, "seed": 0}},
    "model": {"preset": "resnet20", "input_shape": [3, 32, 32]},
    "training": {"epochs": 1},
    "optimizations": [{"type": "prune", "budget": {"macs": 0.5}}],
}
SMALL = {
    **RESNET,
    "model": {"preset": "simple_cnn", "input_shape": [1, 28, 28]},
    "training": {"epochs": 1, "batch_size": 32},
    "optimizations": [],
}


def median_ms(work: Callable[[], Any], n: int) -> float:
    """Median wall time of `work` in milliseconds, after a tenth of the calls as warm-up."""
    times = []
    for index in range(n + n // 10):
        started = time.perf_counter()
        work()
        if index >= n // 10:
            times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def first_step_s(client: httpx.Client) -> float:
    """Seconds from POST to the event that the trainer writes right before its first training step."""
    started = time.time()
    job_id = client.post("/v1/jobs", json=SMALL).raise_for_status().json()["id"]
    while (job := client.get(f"/v1/jobs/{job_id}").json())["state"] not in {"succeeded", "failed"}:
        time.sleep(0.2)
    assert job["state"] == "succeeded", job["error"]
    events = client.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["items"]
    at = next(e["at"] for e in events if e["type"] == "phase.started" and e["data"].get("phase") == "training")
    return datetime.datetime.fromisoformat(at).timestamp() - started


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure(short: bool) -> dict[str, Any]:
    """All figures of one run."""
    n = 30 if short else 200
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as home:
        command = [sys.executable, "-m", "app.serve", "--port", "0", "--home", home]
        with (Path(home) / "serve.log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=url, timeout=30) as client:
                time.sleep(8)  # a warm trainer is what is measured
                first = [first_step_s(client) for _ in range(3 if short else 7) if not time.sleep(6)]
                body = json.dumps(RESNET).encode()
                headers = {"Content-Type": "application/json"}
                figures = {
                    "validate_ms": median_ms(
                        lambda: client.post("/v1/jobs/validate", content=body, headers=headers), n
                    ),
                    "first_step_s": statistics.median(first),
                }
                ids: list[str] = []

                def submit() -> None:
                    ids.append(client.post("/v1/jobs", content=body, headers=headers).json()["id"])

                figures["submit_ms"] = median_ms(submit, n)
                for job_id in ids[1:]:
                    client.post(f"/v1/jobs/{job_id}/cancel")
                figures["get_job_ms"] = median_ms(lambda: client.get(f"/v1/jobs/{ids[-1]}"), n)
                figures["api_resident_mib"] = resident_mib(process.pid)
                client.post(f"/v1/jobs/{ids[0]}/cancel")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    return {"n": n, **figures}


def main() -> None:
    """Measure, print, and store if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="fewer repetitions")
    parser.add_argument("--write", action="store_true", help="store the result under benchmarks/results")
    options = parser.parse_args()
    figures = measure(options.short)
    for name, value in figures.items():
        print(f"{name:<20} {value:.4g}")
    if options.write:
        today = datetime.date.today().isoformat()
        about = {"machine": platform.machine(), "python": platform.python_version(), "torch": version("torch")}
        target = ROOT / "benchmarks" / "results" / f"{today}-service.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"date": today, **about, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
