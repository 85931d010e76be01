"""The embedded service as a process, and what a test says to it over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
# A twentieth of the times that the service uses, so that a dead worker's job runs again after four seconds.
FAST_LEASES = {
    "ESPALIER_LEASE_S": "3",
    "ESPALIER_RENEW_S": "0.5",
    "ESPALIER_SELF_FENCE_S": "2",
    "ESPALIER_SWEEP_S": "0.4",
    "ESPALIER_POLL_S": "0.5",
}


class Service:
    """A started service: its process, its folder, a client."""

    def __init__(self, process: subprocess.Popen[str], home: Path, url: str) -> None:
        self.process = process
        self.home = home
        self.client = httpx.Client(base_url=url, timeout=30)

    def get(self, path: str, **parameters: Any) -> Any:
        """The JSON at `path`, which must be a 200."""
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def submit(self, spec: Mapping[str, Any]) -> str:
        """The id of a new job, which must be accepted."""
        answer = self.client.post("/v1/jobs", json=spec)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The job."""
        return dict(self.get(f"/v1/jobs/{job_id}"))

    def act(self, job_id: str, verb: str) -> dict[str, Any]:
        """The job after `verb` was accepted."""
        answer = self.client.post(f"/v1/jobs/{job_id}/{verb}")
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def wait(self, job_id: str, until: Callable[[dict[str, Any]], bool], timeout_s: float = 120) -> dict[str, Any]:
        """The job once `until` holds; fails with the job, its events and its log if that takes too long."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if until(job):
                return job
            if job["state"] in TERMINAL or time.monotonic() > deadline:
                raise AssertionError(f"waited in vain: {self.story(job)}")
            time.sleep(0.05)

    def finish(self, job_id: str, timeout_s: float = 180) -> dict[str, Any]:
        """The job, succeeded."""
        return self.wait(job_id, lambda job: job["state"] == "succeeded", timeout_s)

    def story(self, job: Mapping[str, Any]) -> str:
        """What is known of a job, for a failing test."""
        events = self.get(f"/v1/jobs/{job['id']}/events", limit=1000)["items"]
        log = self.client.get(f"/v1/jobs/{job['id']}/logs").text
        lines = [f"{event['seq']} {event['type']}: {event['message']}" for event in events]
        return f"{job['state']} {job['progress']} {job['error']}\n" + "\n".join(lines) + f"\n{log[-3000:]}"

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """All events of a job."""
        return list(self.get(f"/v1/jobs/{job_id}/events", limit=1000)["items"])

    def processes(self, module: str) -> list[int]:
        """The process ids of this service's `python -m <module>` processes: workers name its folder, trainers stand in it."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                ours = f"ESPALIER_HOME={self.home}".encode() in (folder / "environ").read_bytes().split(b"\0")
                ours = ours or (folder / "cwd").readlink().is_relative_to(self.home)
            except OSError:
                continue  # it ended meanwhile
            if ours and module.encode() in command:
                found.append(int(folder.name))
        return found


@contextmanager
def embedded_service(
    home: Path, *, workers: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """`python -m app.serve` on a free port, ended by SIGTERM; fails if anything of it stays behind."""
    home.mkdir(parents=True, exist_ok=True)
    log = home / "serve.log"
    command = ["app.serve", "--port", "0", "--home", str(home), "--workers", str(workers)]
    with running(command, environment or {}, log) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), f"it said {line!r}; {log.read_text()[-3000:]}"
        service = Service(process, home, line.split()[-1])
        with service.client:
            yield service


def synthetic_job(**changes: Any) -> dict[str, Any]:
    """A job of a few seconds: a small network on synthetic pictures, half of its weights zero."""
    spec: dict[str, Any] = {
        "spec_version": 1,
        "data": {"synthetic": {"classes": 4, "train": 512, "test": 128, "seed": 1}},
        "model": {
            "input_shape": [1, 16, 16],
            "layers": [
                {"type": "conv", "out_channels": 8, "kernel_size": 3, "padding": "same"},
                {"type": "batch_norm"},
                {"type": "relu"},
                {"type": "max_pool", "kernel_size": 2},
                {"type": "flatten"},
                {"type": "linear", "out_features": 4},
            ],
        },
        "training": {"epochs": 2, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.05}},
        "optimizations": [{"type": "prune", "structure": "weights", "sparsity": 0.5, "retrain": {"epochs": 1}}],
    }
    return {**spec, **changes}


def long_job(**changes: Any) -> dict[str, Any]:
    """A job that trains until somebody interferes: a minute or more."""
    spec = synthetic_job(**changes)
    spec["data"] = {"synthetic": {"classes": 4, "train": 4096, "test": 128, "seed": 1}}
    spec["training"] = {**spec["training"], "epochs": 60}
    return spec


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m <command>` with what it needs from the environment beside ours, ended by SIGTERM."""
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env={**os.environ, "ESPALIER_THREADS": "1", **environment},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            assert process.stdout is not None
            process.stdout.close()
