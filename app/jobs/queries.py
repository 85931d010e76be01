"""What users read of jobs: one, a page of them, its version, its report, why it waits."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, exists, func, or_, select, tuple_
from sqlalchemy.orm import Session

from app.access import visible
from app.database.engine import Database
from app.database.tables import STATES, TERMINAL, JobLabelRow, JobRow
from app.errors import Fault, InvalidCursor, InvalidParameter, JobNotFound, NotFinished, NotFound
from app.jobs.transitions import allowed_verbs, shown_state
from app.jobs.workers import count_workers

PAGE_LIMIT = 200


@dataclass(frozen=True)
class JobView:
    """A job as it stood at one moment. `state` is the stored one; `shown_state` is what users see."""

    id: str
    tenant: str
    name: str | None
    labels: dict[str, str]
    spec: dict[str, Any]
    state: str
    wish: str | None
    attempt: int
    progress: dict[str, Any] | None
    error: dict[str, Any] | None
    summary: dict[str, Any] | None
    stopped_early: bool
    retry_of: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    available_at: datetime
    priority: int
    progress_step: int
    crashes: int
    revision: int

    @classmethod
    def of_row(cls, row: Row[*tuple[Any, ...]]) -> JobView:
        """The view of a row with the columns `VIEW`."""
        return cls(*tuple(row))

    @property
    def shown_state(self) -> str:
        """`state`, or `cancelling` while a running job is told to cancel."""
        return shown_state(self.state, self.wish)

    @property
    def terminal(self) -> bool:
        """True once nothing can change any more but the job's deletion."""
        return self.state in TERMINAL

    @property
    def allowed(self) -> tuple[str, ...]:
        """The verbs that are legal now."""
        return allowed_verbs(self.state, self.wish, self.progress_step)

    @property
    def version(self) -> str:
        """What `job_version` returns: it differs after every visible change."""
        return str(self.revision)


VIEW = (
    JobRow.id, JobRow.tenant_id, JobRow.name, JobRow.labels, JobRow.spec, JobRow.state, JobRow.wish, JobRow.attempt,
    JobRow.progress, JobRow.error, JobRow.summary, JobRow.stopped_early, JobRow.retry_of, JobRow.created_at,
    JobRow.started_at, JobRow.finished_at, JobRow.available_at, JobRow.priority, JobRow.progress_step, JobRow.crashes,
    JobRow.revision,
)  # fmt: skip


def get_job(db: Database, tenant: str, job_id: str) -> JobView:
    """The job. Raises JobNotFound, also for another tenant's job."""
    with db.read() as session:
        return read_job(session, tenant, job_id)


def read_job(session: Session, tenant: str, job_id: str, *, lock: bool = False) -> JobView:
    """The job; with `lock`, nobody else changes its row until the transaction ends. Raises JobNotFound."""
    query = select(*VIEW).where(JobRow.id == job_id, visible(tenant))
    row = session.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise JobNotFound
    return JobView.of_row(row)


def job_version(db: Database, tenant: str, job_id: str) -> str:
    """A text that differs after every visible change of the job; reads one number of one row. Raises JobNotFound."""
    with db.read() as session:
        revision = session.scalar(select(JobRow.revision).where(JobRow.id == job_id, visible(tenant)))
    if revision is None:
        raise JobNotFound
    return str(revision)


def list_jobs(
    db: Database,
    tenant: str,
    *,
    state: str | None = None,
    label: tuple[str, str] | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> tuple[list[JobView], str | None]:
    """A page of the tenant's jobs, newest first, and the cursor of the next page (None: the last).

    `limit` above 200 is cut. The cursor is bound to tenant, state and label. Raises InvalidParameter, InvalidCursor.
    """
    if limit < 1:
        raise InvalidParameter("limit: at least 1")
    limit = min(limit, PAGE_LIMIT)
    binding = json.dumps([tenant, state, label])
    query = select(*VIEW).where(visible(tenant), *_matching(tenant, state, label))
    if cursor is not None:
        place = _read_cursor(cursor, binding)
        query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(*place))
    with db.read() as session:
        rows = session.execute(query.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit + 1)).all()
    page = [JobView.of_row(row) for row in rows[:limit]]
    more = len(rows) > limit
    return page, _make_cursor(page[-1], binding) if more else None


def _matching(tenant: str, state: str | None, label: tuple[str, str] | None) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if state == "cancelling":
        conditions.append(and_(JobRow.state == "running", JobRow.wish == "cancel"))
    elif state == "running":
        conditions.append(and_(JobRow.state == "running", JobRow.wish.is_distinct_from("cancel")))
    elif state in STATES:
        conditions.append(JobRow.state == state)
    elif state is not None:
        message = f"must be one of: {', '.join((*STATES, 'cancelling'))}"
        raise InvalidParameter(f"state {message}", [Fault("/query/state", message)])
    if label is not None:
        key, value = label
        conditions.append(
            exists().where(
                JobLabelRow.tenant_id == tenant,
                JobLabelRow.k == key,
                JobLabelRow.v == value,
                JobLabelRow.job_id == JobRow.id,
            )
        )
    return conditions


def _make_cursor(last: JobView, binding: str) -> str:
    place = f"{last.created_at.isoformat()} {last.id}"
    return base64.urlsafe_b64encode(f"{_seal(place, binding)} {place}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str, binding: str) -> tuple[datetime, str]:
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        seal, _, place = base64.b64decode(padded, b"-_", validate=True).decode().partition(" ")
        at, _, job_id = place.partition(" ")
        if seal == _seal(place, binding):
            return datetime.fromisoformat(at), job_id
    except (binascii.Error, ValueError) as error:
        raise InvalidCursor from error
    raise InvalidCursor


def _seal(place: str, binding: str) -> str:
    """The checksum by which a cursor of other filters, or an edited one, is refused; no secret: it opens nothing."""
    return hashlib.sha256(f"{binding} {place}".encode()).hexdigest()[:16]


def read_report(db: Database, tenant: str, job_id: str) -> dict[str, Any]:
    """The report of a job that succeeded. Raises JobNotFound, NotFinished, NotFound (it failed or was cancelled)."""
    with db.read() as session:
        row = session.execute(
            select(JobRow.state, JobRow.report).where(JobRow.id == job_id, visible(tenant))
        ).one_or_none()
    if row is None:
        raise JobNotFound
    if row.state not in TERMINAL:
        raise NotFinished
    if row.report is None:
        raise NotFound(f"a job that {'failed' if row.state == 'failed' else 'was cancelled'} has no report")
    report: dict[str, Any] = row.report
    return report


def queue_facts(db: Database, job: JobView) -> dict[str, Any]:
    """Why a waiting job waits: `position` (1 is next), `reason` and `workers_alive`.

    `no_worker`: none is alive; `backing_off`: it waits after a crash; `all_busy`: every slot has a job; `starting`: a
    worker claims it in a moment.
    """
    with db.read() as session:
        before = or_(
            JobRow.priority > job.priority,
            and_(
                JobRow.priority == job.priority,
                tuple_(JobRow.available_at, JobRow.id) < tuple_(job.available_at, job.id),
            ),
        )
        ahead = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state == "queued", before)) or 0
        running = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state == "running")) or 0
        workers, slots = count_workers(session, db)
        backing_off = session.scalar(select(db.now() < job.available_at))
    if workers == 0:
        reason = "no_worker"
    elif backing_off:
        reason = "backing_off"
    else:
        reason = "all_busy" if running >= slots else "starting"
    return {"position": ahead + 1, "reason": reason, "workers_alive": workers}
