"""The service itself: its workers and its health."""

from __future__ import annotations

from app.schemas.answer import Answer


class WorkerSchema(Answer):
    """A worker."""

    id: str
    alive: bool
    host: str
    pid: int
    slots: int
    device: str
    running: list[str]
    started_at: str
    seen_at: str


class WorkersSchema(Answer):
    """Workers."""

    items: list[WorkerSchema]


class HealthSchema(Answer):
    """Fine."""

    status: str
