"""The deployment for a team, real all through: Postgres, Celery over a Redis server, S3, two workers, and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.database.engine import Database
from tests.support.services.servers import postgres, redis_url, s3, valkey
from tests.support.services.service import FAST_LEASES, Service, running, synthetic_job


class Cluster:
    """An API and its workers, each with a home of its own, as on machines of their own."""

    def __init__(self, service: Service, workers: dict[str, subprocess.Popen[str]], broker: object) -> None:
        self.service = service
        self.workers = workers
        self.broker = broker

    def owner(self, job_id: str) -> subprocess.Popen[str]:
        """The worker process that runs the job."""
        for worker in self.service.get("/v1/workers")["items"]:
            if job_id in worker["running"]:
                return next(process for process in self.workers.values() if process.pid == worker["pid"])
        raise AssertionError("no worker says that it runs the job")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        database = stack.enter_context(stack.enter_context(postgres()).empty_database())
        broker = stack.enter_context(valkey())
        store = stack.enter_context(s3())
        store.make_bucket("espalier")
        environment = {
            **FAST_LEASES,
            **store.environment,
            "ESPALIER_DATABASE_URL": database,
            "ESPALIER_BROKER_URL": redis_url(broker),
            "ESPALIER_STORAGE_URL": "s3://espalier/team",
        }
        migration = Database(database)
        migration.upgrade()
        migration.close()
        api_home = tmp_path / "api"
        api = stack.enter_context(
            running(
                ["app.serve", "--port", "0", "--workers", "0"],
                {**environment, "ESPALIER_HOME": str(api_home)},
                tmp_path / "api.log",
            )
        )
        assert api.stdout is not None
        line = api.stdout.readline()
        assert line.startswith("listening on"), (tmp_path / "api.log").read_text()
        service = Service(api, api_home, line.split()[-1])
        stack.enter_context(service.client)
        workers = {
            name: stack.enter_context(
                running(["worker"], {**environment, "ESPALIER_HOME": str(tmp_path / name)}, tmp_path / f"{name}.log")
            )
            for name in ("one", "two")
        }
        yield Cluster(service, workers, broker)


def trainers_of(worker: subprocess.Popen[str]) -> list[int]:
    """The process ids of a worker's trainers, the warm spare included."""
    return [
        int(pid)
        for task in Path(f"/proc/{worker.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]


@pytest.mark.parametrize("victim", ["worker", "trainer"])
def test_a_killed_process_costs_an_attempt_and_not_the_job(cluster: Cluster, victim: str) -> None:
    service = cluster.service
    spec = synthetic_job()
    spec["data"] = {"synthetic": {"classes": 4, "train": 2048, "test": 128, "seed": 1}}
    spec["training"] = {**spec["training"], "epochs": 16}
    job_id = service.submit(spec)
    service.wait(job_id, lambda job: job["state"] == "running" and (job["progress"] or {}).get("epoch", 0) >= 3)
    owner = cluster.owner(job_id)
    victims = [owner.pid] if victim == "worker" else trainers_of(owner)
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    job = service.finish(job_id)
    assert job["attempt"] == 2
    types = [event["type"] for event in service.events(job_id)]
    assert {"worker.lost", "job.resumed_from_checkpoint"} <= set(types)
    assert types.count("job.succeeded") == 1
    for item in service.get(f"/v1/jobs/{job_id}/artifacts")["items"]:
        assert len(service.client.get(item["href"], follow_redirects=True).content) == item["size_bytes"]
