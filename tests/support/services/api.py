"""The API in this process over SQLite and a local folder, and a worker that only writes what a real one would."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from app.api.context import Context
from app.database.engine import Database
from app.jobs import attempts
from app.jobs.artifacts import NewArtifact, artifact_key
from app.jobs.attempts import Claim
from app.jobs.events import NewEvent
from app.main import create_app
from app.settings import Settings
from tests.support.services.raw_http import serving
from tests.support.services.uploads import put_bytes

WORKER = "worker-1"
SPEC: dict[str, Any] = {
    "spec_version": 1,
    "name": "small",
    "data": {"synthetic": {"classes": 10, "train": 64, "test": 32, "seed": 0}},
    "model": {"preset": "simple_cnn", "input_shape": [1, 28, 28]},
    "training": {"epochs": 2, "batch_size": 16},
}
FILES = {"pruned.safetensors": b"0123456789" * 10, "report.json": b"{}", "model.py": b"def build(): ...\n"}


def measure(accuracy: float, macs: int) -> dict[str, Any]:
    """An M of the contract."""
    return {
        "accuracy": accuracy,
        "loss": 0.3,
        "params": 2 * macs,
        "nonzero_params": macs,
        "macs": macs,
        "bytes": 8 * macs,
        "latency_ms": {"torch": {"batch_1": {"p50": 1.0, "p95": 2.0}}},
    }


SUMMARY = {"baseline": measure(0.93, 1000), "final": measure(0.92, 500)}
REPORT: dict[str, Any] = {
    **SUMMARY,
    "steps": [],
    "classes": [{"name": "shoe", "baseline_accuracy": 0.9, "final_accuracy": 0.8, "change": -0.1, "examples": 16}],
    "verification": {"pruned.safetensors": {"max_abs_difference": 1e-7, "accuracy": 0.92}},
    "environment": {},
    "notes": [],
}


@dataclass
class Api:
    """A client of the API and the backends below it."""

    client: TestClient
    context: Context

    @property
    def db(self) -> Database:
        """The API's database."""
        return self.context.db

    def submit(self, **changes: Any) -> dict[str, Any]:
        """A new job."""
        answer = self.client.post("/v1/jobs", json=SPEC | changes)
        assert answer.status_code == 201, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def claim(self, job_id: str) -> Claim:
        """The job, taken by our worker."""
        claim = attempts.claim(self.db, worker_id=WORKER, hint=job_id)
        assert claim is not None
        assert claim.job_id == job_id
        return claim

    def say(self, claim: Claim, *events: tuple[str, str], **more: Any) -> str | None:
        """Write events as (type, message); the user's wish."""
        new = [NewEvent(kind, "info", message) for kind, message in events]
        return attempts.renew(self.db, claim, worker_id=WORKER, events=new, **more)

    def deliver(
        self,
        claim: Claim,
        files: dict[str, bytes] | None = None,
        *,
        early: bool = False,
        summary: dict[str, Any] | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        """Finish the job with these files; `report` has parts instead of the usual ones, or more."""
        rows = []
        for name, content in (files or FILES).items():
            key = artifact_key(claim.job_id, claim.attempt, name)
            put_bytes(self.context.storage, key, content)
            sha256 = hashlib.sha256(content).hexdigest()
            rows.append(NewArtifact(name, "model", key, sha256, len(content), "application/octet-stream"))
        attempts.finish(
            self.db,
            claim,
            summary=SUMMARY if summary is None else summary,
            report={"job_id": claim.job_id, **REPORT, **(report or {})},
            artifacts=rows,
            stopped_early=early,
        )

    def delivered(self, **changes: Any) -> str:
        """The id of a job that succeeded."""
        job_id: str = self.submit(**changes)["id"]
        self.deliver(self.claim(job_id))
        return job_id


@contextlib.contextmanager
def open_api(home: Path, **settings: Any) -> Iterator[Api]:
    """The API with its state under `home`."""
    chosen = Settings(home=home, **settings)
    database = Database(chosen.database)
    database.upgrade()
    database.close()
    app = create_app(chosen)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=True) as client:
        yield Api(client, app.state.context)


@contextlib.contextmanager
def served_api(home: Path, **settings: Any) -> Iterator[tuple[Api, int]]:
    """The API, and a second one over the same state in our server on a port: an application has one event loop."""
    with open_api(home, **settings) as api:
        served = create_app(api.context.settings)
        with serving(served, api.context.settings, served.state.context.stopping) as port:
            yield api, port


def error_pointers(problem: dict[str, Any]) -> Sequence[str]:
    """Where a problem says the mistakes are."""
    return [fault["pointer"] for fault in problem["errors"]]
