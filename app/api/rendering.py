"""Rows as the documents that the API answers with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from app.jobs.artifacts import ArtifactView, CheckpointView
from app.jobs.events import EventView
from app.jobs.queries import JobView
from app.jobs.workers import WorkerView

Document = dict[str, Any]

VERBS = ("cancel", "stop", "pause", "resume", "retry")
PARTS = ("events", "metrics", "logs", "report", "artifacts", "checkpoints")


class Json(Response):
    """A document as UTF-8 JSON; NaN and infinities, which JSON has not, become null."""

    media_type = "application/json"

    def __init__(self, document: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(document, inf_nan_mode="null"), status_code=status_code, headers=headers)


def etag_of(document: Document) -> str:
    """The ETag of a document: of its bytes, so that it changes exactly when the answer does."""
    return f'"{hashlib.sha256(to_json(document, inf_nan_mode="null")).hexdigest()[:32]}"'


def job_document(job: JobView, queue: Mapping[str, Any] | None = None) -> Document:
    """A job; `queue` says why a waiting one waits."""
    document: Document = {
        "id": job.id,
        "name": job.name,
        "labels": job.labels,
        "state": job.shown_state,
        "attempt": job.attempt,
        "progress": _progress(job),
        "created_at": moment(job.created_at),
        "started_at": moment(job.started_at),
        "finished_at": moment(job.finished_at),
        "error": job.error,
        "summary": job.summary,
        "stopped_early": job.stopped_early,
        "retry_of": job.retry_of,
        "allowed": list(job.allowed),
        "spec": job.spec,
        "links": job_links(job.id),
    }
    if queue is not None:
        document["queue"] = dict(queue)
    return document


def job_links(job_id: str) -> dict[str, str]:
    """Where everything about a job is."""
    base = f"/v1/jobs/{job_id}"
    return {"self": base, "page": f"/jobs/{job_id}"} | {name: f"{base}/{name}" for name in (*PARTS, *VERBS)}


def event_document(event: EventView) -> Document:
    """An event, as in the list so in the stream."""
    return {
        "seq": event.seq,
        "at": moment(event.at),
        "type": event.type,
        "level": event.level,
        "message": event.message,
        "data": event.data,
    }


def artifact_document(job_id: str, artifact: ArtifactView) -> Document:
    """A delivered file and where its bytes are."""
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
        "media_type": artifact.media_type,
        "href": f"/v1/jobs/{job_id}/artifacts/{artifact.name}",
    }


def checkpoint_document(checkpoint: CheckpointView) -> Document:
    """A checkpoint that a job can go on from."""
    return {
        "attempt": checkpoint.attempt,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "phase": checkpoint.phase,
        "at": moment(checkpoint.at),
        "metrics": checkpoint.metrics,
        "size_bytes": checkpoint.size_bytes,
        "sha256": checkpoint.sha256,
    }


def worker_document(worker: WorkerView) -> Document:
    """A worker and the jobs it says it runs."""
    return {
        "id": worker.id,
        "alive": worker.alive,
        "host": worker.host,
        "pid": worker.pid,
        "slots": worker.slots,
        "device": worker.device,
        "running": worker.running,
        "started_at": moment(worker.started_at),
        "seen_at": moment(worker.seen_at),
    }


def moment(at: datetime | None) -> str | None:
    """A time as RFC 3339 in UTC, with microseconds."""
    return None if at is None else at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _progress(job: JobView) -> Document:
    """What the worker last said; before the first word zeros, after success the whole."""
    progress: Document = {
        "phase": "preparing",
        "epoch": 0,
        "epochs": job.spec.get("training", {}).get("epochs"),
        "step": 0,
        "steps": None,
        "fraction": 0.0,
        "images_per_s": None,
        "eta_s": None,
    }
    progress |= job.progress or {}
    if job.state == "succeeded":
        progress |= {"fraction": 1.0, "eta_s": 0}
    elif job.terminal:
        progress["eta_s"] = None
    return progress
