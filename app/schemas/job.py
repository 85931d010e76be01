"""A job, and what it reports while it runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas.answer import Answer

JobState = Literal["queued", "running", "paused", "cancelling", "succeeded", "failed", "cancelled"]
_SHA256 = Field(pattern="^[0-9a-f]{64}$")


class ProgressSchema(Answer):
    """How far a job is, over all of its phases."""

    phase: str
    epoch: int
    epochs: int | None
    step: int
    steps: int | None
    fraction: float = Field(ge=0, le=1)
    images_per_s: float | None
    eta_s: float | None


class JobErrorSchema(Answer):
    """Why a job failed."""

    code: str
    message: str
    pointer: str | None
    hint: str


class QueueSchema(Answer):
    """Why a queued job waits."""

    position: int
    reason: Literal["no_worker", "backing_off", "all_busy", "starting"]
    workers_alive: int


class JobSchema(Answer):
    """A job."""

    id: str
    name: str | None
    labels: dict[str, str]
    state: JobState
    attempt: int
    progress: ProgressSchema
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: JobErrorSchema | None
    summary: dict[str, Any] | None = Field(
        description='{"baseline": M, "final": M}, and "int8": M where an 8-bit file was asked for and delivered'
    )
    stopped_early: bool
    retry_of: str | None
    allowed: list[str] = Field(description="Verbs that are legal now.")
    spec: dict[str, Any] = Field(description="The job as submitted, with every default filled in.")
    links: dict[str, str]
    queue: QueueSchema | None = None


class JobsSchema(Answer):
    """A page of jobs."""

    items: list[JobSchema]
    next_cursor: str | None


class EventSchema(Answer):
    """Something that happened."""

    seq: int
    at: str
    type: str
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any]


class EventsSchema(Answer):
    """A page of events."""

    items: list[EventSchema]
    next_after: int


class MetricsSchema(Answer):
    """Curves: series name to [step, value] pairs."""

    series: dict[str, list[tuple[int, float | None]]]


class CheckpointSchema(Answer):
    """A checkpoint that a job can go on from."""

    attempt: int
    step: int
    epoch: int
    phase: str
    at: str
    metrics: dict[str, Any]
    size_bytes: int
    sha256: str = _SHA256


class CheckpointsSchema(Answer):
    """Checkpoints, newest first."""

    items: list[CheckpointSchema]


class ArtifactSchema(Answer):
    """A delivered file."""

    name: str
    kind: str
    size_bytes: int
    sha256: str = _SHA256
    media_type: str
    href: str


class ArtifactsSchema(Answer):
    """Delivered files."""

    items: list[ArtifactSchema]
