"""Jobs brought to any point of their lives, by what users and workers do."""

from __future__ import annotations

from typing import Any

from app.database.engine import Database
from app.jobs import attempts, commands
from app.jobs.artifacts import NewArtifact, artifact_key, checkpoint_key
from app.jobs.attempts import Claim
from app.jobs.events import list_events
from app.jobs.queries import JobView

TENANT = "default"
SPEC: dict[str, Any] = {
    "spec_version": 1,
    "data": {"dataset": "mnist"},
    "model": {"preset": "simple_cnn"},
}
ERROR = {"code": "diverged", "message": "the loss is no longer a number", "pointer": None, "hint": "lower lr"}
EVERY_STATE = (
    "queued",
    "queued with a checkpoint",
    "queued to stop",
    "running",
    "running to pause",
    "running to stop",
    "cancelling",
    "paused",
    "paused with a checkpoint",
    "succeeded",
    "failed",
    "cancelled",
)


def submit(db: Database, **more: Any) -> JobView:
    """A new job."""
    return commands.submit_job(db, tenant=TENANT, spec=SPEC, **more)[0]


def claim(db: Database, job_id: str, worker_id: str = "w", lease_s: float = 60) -> Claim:
    """The claim of this very job, which must wait."""
    claimed = attempts.claim(db, worker_id=worker_id, hint=job_id, lease_s=lease_s)
    assert claimed is not None
    assert claimed.job_id == job_id
    return claimed


def checkpoint(db: Database, claimed: Claim, step: int) -> str:
    """The key of a checkpoint that is recorded now."""
    key = checkpoint_key(claimed.job_id, claimed.attempt, step)
    attempts.record_checkpoint(
        db,
        claimed,
        step=step,
        epoch=1,
        phase="training",
        key=key,
        size_bytes=1,
        sha256="0" * 64,
        metrics={"val.loss": 1.0},
    )
    return key


def finish(db: Database, claimed: Claim, **more: Any) -> None:
    """Deliver one artifact and a report."""
    artifact = NewArtifact(
        "pruned.safetensors",
        "weights",
        artifact_key(claimed.job_id, claimed.attempt, "pruned.safetensors"),
        "1" * 64,
        7,
        "x/y",
    )
    report = {"job_id": claimed.job_id, "notes": ["as measured"]}
    attempts.finish(db, claimed, summary={"final": {"accuracy": 0.9}}, report=report, artifacts=[artifact], **more)


def job_in(db: Database, state: str) -> str:
    """The id of a new job in one of EVERY_STATE."""
    job_id = submit(db).id
    if state == "queued":
        return job_id
    claimed = claim(db, job_id)
    if "checkpoint" in state or state == "queued to stop":
        checkpoint(db, claimed, 10)
    if state.startswith("queued"):
        attempts.release(db, claimed)
        if state == "queued to stop":
            commands.stop_job(db, TENANT, job_id)
    elif state.startswith("paused"):
        commands.pause_job(db, TENANT, job_id)
        assert attempts.obey_pause(db, claimed)
    elif state == "running to pause":
        commands.pause_job(db, TENANT, job_id)
    elif state == "running to stop":
        commands.stop_job(db, TENANT, job_id)
    elif state in ("cancelling", "cancelled"):
        commands.cancel_job(db, TENANT, job_id)
        if state == "cancelled":
            attempts.obey_cancel(db, claimed)
    elif state == "succeeded":
        finish(db, claimed)
    elif state == "failed":
        attempts.fail(db, claimed, ERROR)
    return job_id


def event_types(db: Database, job_id: str) -> list[str]:
    """The types of a job's events, whose numbers must be 1, 2, 3, ..."""
    events = list_events(db, TENANT, job_id, limit=1000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.type for event in events]
