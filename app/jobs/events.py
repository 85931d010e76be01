"""What a running job reports: events, points of its series, its log; as rows, so that a replay is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from app.access import visible
from app.database.engine import Database
from app.database.tables import EventRow, JobRow, LogChunkRow, MetricRow
from app.errors import JobNotFound

MOST_EVENTS = 1000
LOG_CAP_BYTES = 4 << 20
LOG_CUT = "[earlier lines were left out]\n"


@dataclass(frozen=True)
class NewEvent:
    """An event that has no number yet. With `at` None, its time is that of its writing."""

    type: str
    level: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    at: datetime | None = None


@dataclass(frozen=True)
class EventView:
    """An event with its number."""

    seq: int
    at: datetime
    type: str
    level: str
    message: str
    data: dict[str, Any]


def write_events(
    session: Session, db: Database, job_id: str, attempt: int, last_seq: int, events: Sequence[NewEvent]
) -> None:
    """Insert the events with the numbers up to `last_seq`, which the UPDATE of the same transaction reserved."""
    if not events:
        return
    rows = [
        {
            "job_id": job_id,
            "seq": seq,
            "attempt": attempt,
            "at": event.at,
            "type": event.type,
            "level": event.level,
            "message": event.message,
            "data": event.data,
        }
        for seq, event in enumerate(events, last_seq - len(events) + 1)
    ]
    if any(row["at"] is None for row in rows):
        now = session.scalar(select(db.now()))
        rows = [{**row, "at": row["at"] or now} for row in rows]
    session.execute(insert(EventRow), rows)


def write_metrics(session: Session, db: Database, job_id: str, points: Sequence[tuple[str, int, float]]) -> None:
    """Insert points of series; of several for one step the last one counts.

    Points that are not finite are left out: a chart cannot show them, nor JSON write them.
    """
    newest = {(series, step): value for series, step, value in points if math.isfinite(value)}
    if newest:
        rows = [
            {"job_id": job_id, "series": name, "step": step, "value": value} for (name, step), value in newest.items()
        ]
        statement = db.insert(MetricRow)
        session.execute(
            statement.on_conflict_do_update(
                index_elements=["job_id", "series", "step"], set_={"value": statement.excluded.value}
            ),
            rows,
        )


def write_log(session: Session, job_id: str, text: str, size_bytes: int, log_bytes: int) -> None:
    """Append `size_bytes` of text that end at `log_bytes` of the whole log.

    Only the newest 4 MiB stay: the reason of a crash is at the end.
    """
    session.execute(insert(LogChunkRow).values(job_id=job_id, seq=log_bytes - size_bytes, text=text))
    if log_bytes > LOG_CAP_BYTES:
        session.execute(
            delete(LogChunkRow).where(LogChunkRow.job_id == job_id, LogChunkRow.seq < log_bytes - LOG_CAP_BYTES)
        )


def list_events(db: Database, tenant: str, job_id: str, after: int = 0, limit: int = 200) -> list[EventView]:
    """The job's events with numbers above `after`, in order, at most `limit` (cut to 1,000). Raises JobNotFound."""
    with db.read() as session:
        require_job(session, tenant, job_id)
        rows = session.execute(
            select(EventRow.seq, EventRow.at, EventRow.type, EventRow.level, EventRow.message, EventRow.data)
            .where(EventRow.job_id == job_id, EventRow.seq > after)
            .order_by(EventRow.seq)
            .limit(min(limit, MOST_EVENTS))
        )
        return [EventView(*row) for row in rows]


def read_metrics(db: Database, tenant: str, job_id: str) -> dict[str, list[tuple[int, float]]]:
    """The job's series by name, each as (step, value) in the order of steps. Raises JobNotFound."""
    series: dict[str, list[tuple[int, float]]] = {}
    with db.read() as session:
        require_job(session, tenant, job_id)
        rows = session.execute(
            select(MetricRow.series, MetricRow.step, MetricRow.value)
            .where(MetricRow.job_id == job_id)
            .order_by(MetricRow.series, MetricRow.step)
        )
        for name, step, value in rows:
            series.setdefault(name, []).append((step, value))
    return series


def read_log(db: Database, tenant: str, job_id: str) -> str:
    """The job's log, of a long one the newest 4 MiB. Raises JobNotFound."""
    with db.read() as session:
        require_job(session, tenant, job_id)
        chunks = session.execute(
            select(LogChunkRow.seq, LogChunkRow.text).where(LogChunkRow.job_id == job_id).order_by(LogChunkRow.seq)
        ).all()
    cut = LOG_CUT if chunks and chunks[0].seq > 0 else ""
    return cut + "".join(chunk.text for chunk in chunks)


def require_job(session: Session, tenant: str, job_id: str) -> None:
    """Raise JobNotFound unless the tenant sees the job."""
    if session.scalar(select(JobRow.id).where(JobRow.id == job_id, visible(tenant))) is None:
        raise JobNotFound
