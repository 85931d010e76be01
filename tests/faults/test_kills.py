"""kill -9 of a worker or of a trainer in the middle of training: the job finishes, once, and says what happened."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.services.service import FAST_LEASES, Service, embedded_service, synthetic_job


def slow_job() -> dict[str, Any]:
    """A job of some ten seconds with many checkpoints."""
    spec = synthetic_job()
    spec["data"] = {"synthetic": {"classes": 4, "train": 2048, "test": 128, "seed": 1}}
    spec["training"] = {**spec["training"], "epochs": 20}
    return spec


def checkpointed(job: dict[str, Any]) -> bool:
    progress = job["progress"] or {}
    return job["state"] == "running" and (progress.get("epoch") or 0) >= 3


def kill_all(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def check_one_story(service: Service, job_id: str, *, attempts: int) -> None:
    job = service.job(job_id)
    assert job["attempt"] >= attempts
    events = service.events(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    types = [event["type"] for event in events]
    assert types.count("job.succeeded") == 1
    assert types[-1] == "job.succeeded"
    assert "job.resumed_from_checkpoint" in types


@pytest.mark.parametrize("victim", ["worker", "worker.trainer"])
def test_a_killed_process_costs_an_attempt_and_not_the_job(tmp_path: Path, victim: str) -> None:
    with embedded_service(tmp_path / "home", environment=FAST_LEASES) as service:
        job_id = service.submit(slow_job())
        service.wait(job_id, checkpointed)
        kill_all(service.processes(victim))
        service.finish(job_id)
        check_one_story(service, job_id, attempts=2)


def test_the_weights_are_bit_identical_to_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    with embedded_service(tmp_path / "home", environment=FAST_LEASES) as service:
        disturbed = service.submit(slow_job())
        service.wait(disturbed, checkpointed)
        kill_all(service.processes("worker.trainer"))
        service.finish(disturbed)
        undisturbed = service.submit(slow_job())
        service.finish(undisturbed)
        digests = [
            {item["name"]: item["sha256"] for item in service.get(f"/v1/jobs/{job_id}/artifacts")["items"]}
            for job_id in (disturbed, undisturbed)
        ]
        assert digests[0]["pruned.safetensors"] == digests[1]["pruned.safetensors"]


def test_a_restarted_service_goes_on_where_it_was(tmp_path: Path) -> None:
    with embedded_service(tmp_path / "home", environment=FAST_LEASES) as service:
        job_id = service.submit(slow_job())
        service.wait(job_id, checkpointed)
    with embedded_service(tmp_path / "home", environment=FAST_LEASES) as service:
        job = service.job(job_id)
        assert job["state"] in {"queued", "running"}
        service.finish(job_id)
        check_one_story(service, job_id, attempts=2)
        assert "worker.lost" not in [event["type"] for event in service.events(job_id)]


def test_a_service_killed_outright_leaves_no_process_and_loses_no_job(tmp_path: Path) -> None:
    with embedded_service(tmp_path / "home", environment=FAST_LEASES) as service:
        job_id = service.submit(slow_job())
        service.wait(job_id, checkpointed)
        service.process.kill()
        service.process.wait()
        until = time.monotonic() + 45
        while service.processes("worker") + service.processes("worker.trainer"):
            assert time.monotonic() < until, "processes outlived their service"
            time.sleep(0.1)
    with embedded_service(tmp_path / "home", environment=FAST_LEASES) as service:
        service.finish(job_id)
        check_one_story(service, job_id, attempts=2)
