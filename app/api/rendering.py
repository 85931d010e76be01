"""Rows as the documents that the API answers with. The fields and their order are those of `app/schemas`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from app.jobs.artifacts import ArtifactView, CheckpointView
from app.jobs.events import EventView
from app.jobs.queries import JobView
from app.jobs.workers import WorkerView
from app.schemas.answer import Answer
from app.schemas.job import ArtifactSchema, CheckpointSchema, EventSchema, JobSchema, ProgressSchema
from app.schemas.service import WorkerSchema

Document = dict[str, Any]

VERBS = ("cancel", "stop", "pause", "resume", "retry")
PARTS = ("events", "metrics", "logs", "report", "artifacts", "checkpoints")


class Json(Response):
    """A document as UTF-8 JSON; NaN and infinities, which JSON does not have, become null."""

    media_type = "application/json"

    def __init__(self, document: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(document, inf_nan_mode="null"), status_code=status_code, headers=headers)


def etag_of(document: Document) -> str:
    """The ETag of a document: of its bytes, so that it changes exactly when the answer does."""
    return f'"{hashlib.sha256(to_json(document, inf_nan_mode="null")).hexdigest()[:32]}"'


def document_of(schema: type[Answer], row: object, **computed: Any) -> Document:
    """The answer of the shape `schema`: each field as computed, else the attribute of `row` with its name.

    A field with a default is left out unless it is computed. Values are not converted, as pydantic would: a whole
    number of seconds stays whole. A page of 200 jobs takes 6.1 ms with this, 5.8 ms with a literal dict, 8.4 ms with
    models that are dumped.
    """
    return {
        name: computed[name] if name in computed else getattr(row, name)
        for name, required in _fields(schema)
        if required or name in computed
    }


@cache
def _fields(schema: type[Answer]) -> tuple[tuple[str, bool], ...]:
    """The names of the schema's fields in order, and whether each is always there."""
    return tuple((name, field.is_required()) for name, field in schema.model_fields.items())


def job_document(job: JobView, queue: Mapping[str, Any] | None = None) -> Document:
    """A job; `queue` says why a waiting one waits."""
    return document_of(
        JobSchema,
        job,
        state=job.shown_state,
        progress=_progress(job),
        created_at=moment(job.created_at),
        started_at=moment(job.started_at),
        finished_at=moment(job.finished_at),
        links=job_links(job.id),
        **({} if queue is None else {"queue": queue}),
    )


def job_links(job_id: str) -> dict[str, str]:
    """The addresses of everything about a job."""
    base = f"/v1/jobs/{job_id}"
    return {"self": base, "page": f"/jobs/{job_id}"} | {name: f"{base}/{name}" for name in (*PARTS, *VERBS)}


def event_document(event: EventView) -> Document:
    """An event, the same in the list and in the stream."""
    return document_of(EventSchema, event, at=moment(event.at))


def artifact_document(job_id: str, artifact: ArtifactView) -> Document:
    """A delivered file and the address of its bytes."""
    return document_of(ArtifactSchema, artifact, href=f"/v1/jobs/{job_id}/artifacts/{artifact.name}")


def checkpoint_document(checkpoint: CheckpointView) -> Document:
    """A checkpoint that a job can go on from."""
    return document_of(CheckpointSchema, checkpoint, at=moment(checkpoint.at))


def worker_document(worker: WorkerView) -> Document:
    """A worker and the jobs that it reported as running."""
    return document_of(WorkerSchema, worker, started_at=moment(worker.started_at), seen_at=moment(worker.seen_at))


def moment(at: datetime | None) -> str | None:
    """A time as RFC 3339 in UTC, with microseconds."""
    return None if at is None else at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _progress(job: JobView) -> Document:
    """What the worker reported last; zeros before its first report, all of it after success."""
    epochs = job.spec.get("training", {}).get("epochs")
    start = {"phase": "preparing", "epoch": 0, "epochs": epochs, "step": 0, "fraction": 0.0}
    progress = dict.fromkeys(ProgressSchema.model_fields) | start | (job.progress or {})
    if job.state == "succeeded":
        progress |= {"fraction": 1.0, "eta_s": 0}
    elif job.terminal:
        progress["eta_s"] = None
    return progress
