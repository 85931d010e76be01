"""A transition of a job's state: one conditional UPDATE and its event rows in one transaction. Where no row fulfils the
condition, another process was first, and nothing is written.

    queued -> running -> succeeded | failed | cancelled      queued | running <-> paused

A user's request to a running job is the flag `wish` (cancel > stop > pause); `cancelling` is a running job with the
wish to cancel. Terminal states are final: no transition starts from one, only the removal of the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.orm import Session

from app.database.engine import Database
from app.database.tables import TERMINAL, CheckpointRow, JobRow
from app.jobs import outbox
from app.jobs.artifacts import attempt_prefix, job_prefix
from app.jobs.events import NewEvent, write_events


@dataclass(frozen=True)
class JobAfter:
    """The columns of a job's row that are read after a transition."""

    job_id: str
    attempt: int
    beat: int
    event_seq: int
    log_bytes: int
    state: str
    wish: str | None
    deleted_at: datetime | None


def transition(
    session: Session,
    db: Database,
    where: Sequence[ColumnElement[bool]],
    values: Mapping[str, Any],
    events: Sequence[NewEvent] = (),
    *,
    seen: bool = True,
) -> JobAfter | None:
    """Update the row that fulfils `where` and insert its events; returns the row as it is then, None if there is none.

    Event numbers come from the row: its lock is held until the commit, so a job's events become visible in order,
    without gaps. `seen` is False for a change that no reader sees: the revision stays.
    """
    # RETURNING deleted_at, not deleted_at IS NOT NULL, which SQLite 3.40 answers wrongly with jobs_newest's condition.
    changed: dict[str, Any] = {**values, "event_seq": JobRow.event_seq + len(events)}
    if seen:
        changed["revision"] = JobRow.revision + 1
    row = session.execute(
        update(JobRow)
        .where(*where)
        .values(**changed)
        .returning(
            JobRow.id,
            JobRow.attempt,
            JobRow.beat,
            JobRow.event_seq,
            JobRow.log_bytes,
            JobRow.state,
            JobRow.wish,
            JobRow.deleted_at,
        )
    ).one_or_none()
    if row is None:
        return None
    after = JobAfter(*tuple(row))
    write_events(session, db, after.job_id, after.attempt, after.event_seq, events)
    return after


def clear_objects(session: Session, db: Database, job_id: str, *, keep_artifacts: bool) -> None:
    """Remove a terminal job's checkpoint rows, and post errands that delete its objects: all, or its checkpoints alone.

    Rows are removed before objects, so that no row is without its bytes.
    """
    if keep_artifacts:
        attempts = session.scalars(select(CheckpointRow.attempt).where(CheckpointRow.job_id == job_id).distinct())
        prefixes = [f"{attempt_prefix(job_id, attempt)}checkpoints/" for attempt in attempts]
    else:
        prefixes = [job_prefix(job_id)]
    session.execute(delete(CheckpointRow).where(CheckpointRow.job_id == job_id))
    for prefix in prefixes:
        outbox.post_errand(session, db, "delete_prefix", prefix)


def purge_job(session: Session, db: Database, job_id: str) -> None:
    """Remove the job's row, the rows that refer to it, and its objects."""
    clear_objects(session, db, job_id, keep_artifacts=False)
    session.execute(delete(JobRow).where(JobRow.id == job_id))


def shown_state(state: str, wish: str | None) -> str:
    """The state as users see it: `cancelling` is a running job that was told to cancel."""
    return "cancelling" if state == "running" and wish == "cancel" else state


def allowed_verbs(state: str, wish: str | None, progress_step: int) -> tuple[str, ...]:
    """What a user may do with a job now; asking for the same again is allowed while the worker has not obeyed yet."""
    if state in TERMINAL:
        return ("retry", "delete")
    verbs = ["cancel"]
    if state == "running":
        if wish != "cancel":
            verbs.append("stop")
        if wish in (None, "pause"):
            verbs.append("pause")
        if wish == "pause":
            verbs.append("resume")
    else:
        if progress_step > 0:
            verbs.append("stop")  # delivers what the checkpoint holds
        if state == "queued" and wish is None:
            verbs.append("pause")
        if state == "paused":
            verbs.append("resume")
    return (*verbs, "delete")
