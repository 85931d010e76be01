"""What an error answers with."""

from __future__ import annotations

from typing import Any

from app.schemas.answer import Answer


class FaultSchema(Answer):
    """One mistake: where in what was sent, what, and the limit it broke."""

    pointer: str
    message: str
    limit: Any = None
    value: Any = None


class ProblemSchema(Answer):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str
    errors: list[FaultSchema]
