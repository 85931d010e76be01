"""A user's moves of jobs, and what users read of them. With `app/jobs/attempts.py`, the only writer of job rows.

Each move is one transaction that locks the row, decides, and writes row and events together; it is committed when the
function returns, so that whoever answers afterwards answers what is true.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, delete, exists, func, insert, or_, select, tuple_, update
from sqlalchemy.orm import Session

from app.access import visible
from app.database.engine import Database
from app.database.tables import STATES, TERMINAL, IdempotencyKeyRow, JobLabelRow, JobRow, new_id
from app.errors import (
    Fault,
    IdempotencyMismatch,
    IllegalTransition,
    InvalidCursor,
    InvalidParameter,
    JobNotFound,
    NotFinished,
    NotFound,
)
from app.failpoints import failpoint
from app.jobs import outbox, references
from app.jobs.artifacts import list_checkpoints
from app.jobs.attempts import workers_alive
from app.jobs.events import NewEvent, list_events, read_log, read_metrics, write_events
from app.jobs.transitions import allowed_verbs, clear_objects, purge, shown_state, transition
from app.spec.job import parse_job
from app.spec.references import Reference, references_in

__all__ = [
    "JobView",
    "cancel_job",
    "delete_job",
    "get_job",
    "job_version",
    "list_checkpoints",
    "list_events",
    "list_jobs",
    "pause_job",
    "queue_facts",
    "read_log",
    "read_metrics",
    "read_report",
    "resume_job",
    "retry_job",
    "stop_job",
    "submit",
]

SUBMIT_ROUTE = "POST /v1/jobs"
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
        """Differs after every visible change; equal to what `job_version` gives."""
        return str(self.revision)


VIEW = (
    JobRow.id, JobRow.tenant_id, JobRow.name, JobRow.labels, JobRow.spec, JobRow.state, JobRow.wish, JobRow.attempt,
    JobRow.progress, JobRow.error, JobRow.summary, JobRow.stopped_early, JobRow.retry_of, JobRow.created_at,
    JobRow.started_at, JobRow.finished_at, JobRow.available_at, JobRow.priority, JobRow.progress_step, JobRow.crashes,
    JobRow.revision,
)  # fmt: skip


def submit(
    db: Database,
    *,
    tenant: str,
    spec: dict[str, Any],
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    idempotency: tuple[str, str] | None = None,
    retry_of: str | None = None,
    route: str = SUBMIT_ROUTE,
    needs: Sequence[Reference] = (),
) -> tuple[JobView, bool]:
    """The new job and True; or, for a key that was used with the same body, the job of that time and False.

    `idempotency` is the request's key and the sha256 of its body's bytes, kept for 7 days per tenant and `route`. A
    concurrent twin waits for the first. `needs` are the networks that the spec refers to: they cannot be deleted before
    the job is over.

    Raises IdempotencyMismatch if the key was used with another body, InvalidSpec if a network was deleted meanwhile.
    """
    job_id = new_id("job")  # made before the transaction, so that an unknown commit can be looked up

    def body(session: Session) -> tuple[JobView, bool]:
        if idempotency is not None:
            earlier = _use_key(session, db, (tenant, route, *idempotency), job_id)
            if earlier is not None:
                return earlier, False
        view = _insert_job(session, db, job_id, tenant, spec, name, dict(labels or {}), retry_of)
        if needs:
            references.keep(session, tenant, job_id, needs)
        failpoint("submit_before_commit")
        return view, True

    def landed(session: Session, result: tuple[JobView, bool]) -> bool:
        return session.scalar(select(JobRow.id).where(JobRow.id == result[0].id)) is not None

    result = db.transact(body, landed)
    failpoint("submit_after_commit")
    return result


def _use_key(session: Session, db: Database, scope: tuple[str, str, str, str], job_id: str) -> JobView | None:
    """None if the key is new and now taken; else the job that it made. The INSERT waits for a twin's commit."""
    tenant, route, key, request_sha256 = scope
    taken = session.execute(
        db.insert(IdempotencyKeyRow)
        .values(
            tenant_id=tenant, route=route, key=key, request_sha256=request_sha256, job_id=job_id, created_at=db.now()
        )
        .on_conflict_do_nothing()
        .returning(IdempotencyKeyRow.key)
    ).one_or_none()
    if taken is not None:
        return None
    earlier = session.execute(
        select(IdempotencyKeyRow.request_sha256, IdempotencyKeyRow.job_id).where(
            IdempotencyKeyRow.tenant_id == tenant, IdempotencyKeyRow.route == route, IdempotencyKeyRow.key == key
        )
    ).one()
    if earlier.request_sha256 != request_sha256:
        raise IdempotencyMismatch
    return _get(session, tenant, earlier.job_id)


def _insert_job(
    session: Session,
    db: Database,
    job_id: str,
    tenant: str,
    spec: dict[str, Any],
    name: str | None,
    labels: dict[str, str],
    retry_of: str | None,
) -> JobView:
    row = session.execute(
        insert(JobRow)
        .values(
            id=job_id,
            tenant_id=tenant,
            name=name,
            labels=labels,
            spec=spec,
            spec_version=spec["spec_version"],
            dataset=spec["data"].get("dataset"),
            state="queued",
            available_at=db.now(),
            created_at=db.now(),
            retry_of=retry_of,
            event_seq=1,
        )
        .returning(*VIEW)
    ).one()
    if labels:
        session.execute(
            insert(JobLabelRow), [{"tenant_id": tenant, "k": k, "v": v, "job_id": job_id} for k, v in labels.items()]
        )
    write_events(session, db, job_id, 0, 1, [NewEvent("job.submitted", "info", "the job waits for a worker")])
    outbox.post(session, db, "ring", job_id)
    return _view(row)


def retry_job(
    db: Database, tenant: str, job_id: str, *, idempotency: tuple[str, str] | None = None
) -> tuple[JobView, bool]:
    """A new job with the same spec, name and labels and True; False as in `submit`.

    Raises JobNotFound, IllegalTransition; InvalidSpec if a network that the spec refers to was deleted.
    """
    earlier = get_job(db, tenant, job_id)
    if not earlier.terminal:
        raise IllegalTransition("retry", earlier.shown_state, earlier.allowed)
    return submit(
        db,
        tenant=tenant,
        spec=earlier.spec,
        name=earlier.name,
        labels=earlier.labels,
        idempotency=idempotency,
        retry_of=job_id,
        route=f"POST /v1/jobs/{job_id}/retry",
        needs=references_in(parse_job(earlier.spec)),
    )


def get_job(db: Database, tenant: str, job_id: str) -> JobView:
    """The job. Raises JobNotFound, also for another tenant's job."""
    with db.read() as session:
        return _get(session, tenant, job_id)


def job_version(db: Database, tenant: str, job_id: str) -> str:
    """What differs after every visible change of the job: one number of one row. Raises JobNotFound."""
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
    page = [_view(row) for row in rows[:limit]]
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
    """Tells a cursor of other filters, or an edited one, from ours; no secret: it gives access to nothing."""
    return hashlib.sha256(f"{binding} {place}".encode()).hexdigest()[:16]


def cancel_job(db: Database, tenant: str, job_id: str) -> JobView:
    """The job, cancelled if no worker has it, else `cancelling`: it cannot succeed any more.

    Raises JobNotFound, IllegalTransition.
    """
    with db.write() as session:
        job = _lock(session, tenant, job_id, "cancel")
        if job.state == "running":
            return _wish(session, db, job, "cancel")
        event = NewEvent("job.cancelled", "info", "the job was cancelled")
        values = {"state": "cancelled", "wish": None, "finished_at": db.now()}
        clear_objects(session, db, job_id, keep_artifacts=False)
        return _move(session, db, job, values, event)


def stop_job(db: Database, tenant: str, job_id: str) -> JobView:
    """The job, told to deliver the best it has: at its next batch if it runs, else as soon as a worker takes it.

    Raises JobNotFound, IllegalTransition; the latter also for a waiting job without a checkpoint, which has nothing to
    deliver.
    """
    with db.write() as session:
        job = _lock(session, tenant, job_id, "stop")
        if job.state == "running":
            return _wish(session, db, job, "stop")
        if job.wish == "stop":
            return job
        outbox.post(session, db, "ring", job_id)
        event = NewEvent("job.stopping", "info", "the job will be delivered as it is", {"wish": "stop"})
        return _move(session, db, job, {"state": "queued", "wish": "stop", "available_at": db.now()}, event)


def pause_job(db: Database, tenant: str, job_id: str) -> JobView:
    """The job, paused if no worker has it, else told to checkpoint and leave. Raises JobNotFound, IllegalTransition."""
    with db.write() as session:
        job = _lock(session, tenant, job_id, "pause")
        if job.state == "running":
            return _wish(session, db, job, "pause")
        return _move(session, db, job, {"state": "paused"}, NewEvent("job.paused", "info", "the job was paused"))


def resume_job(db: Database, tenant: str, job_id: str) -> JobView:
    """The job, waiting for a worker again, or not told to pause any more. Raises JobNotFound, IllegalTransition."""
    with db.write() as session:
        job = _lock(session, tenant, job_id, "resume")
        event = NewEvent("job.resumed", "info", "the job goes on")
        if job.state == "running":
            return _move(session, db, job, {"wish": None}, event)
        outbox.post(session, db, "ring", job_id)
        return _move(session, db, job, {"state": "queued", "wish": None, "available_at": db.now()}, event)


def delete_job(db: Database, tenant: str, job_id: str) -> None:
    """Remove the job, its rows and its objects; a running one is hidden at once, cancelled, then removed.

    Raises JobNotFound; InUse while a job that has not finished needs its network.
    """
    with db.write() as session:
        job = _lock(session, tenant, job_id, "delete")
        if job.state == "succeeded":
            references.check_unused(session, "job", job_id)
        if job.state != "running":
            purge(session, db, job_id)
            return
        session.execute(delete(IdempotencyKeyRow).where(IdempotencyKeyRow.job_id == job_id))
        session.execute(update(JobRow).where(JobRow.id == job_id).values(deleted_at=db.now()))
        if job.wish != "cancel":
            _wish(session, db, job, "cancel")


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
    worker takes it in a moment.
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
        workers, slots = workers_alive(session, db)
        backing_off = session.scalar(select(db.now() < job.available_at))
    if workers == 0:
        reason = "no_worker"
    elif backing_off:
        reason = "backing_off"
    else:
        reason = "all_busy" if running >= slots else "starting"
    return {"position": ahead + 1, "reason": reason, "workers_alive": workers}


def _get(session: Session, tenant: str, job_id: str) -> JobView:
    row = session.execute(_visible_job(tenant, job_id)).one_or_none()
    if row is None:
        raise JobNotFound
    return _view(row)


def _lock(session: Session, tenant: str, job_id: str, verb: str) -> JobView:
    """The job, which nobody else changes until the transaction ends. Raises JobNotFound, IllegalTransition."""
    row = session.execute(_visible_job(tenant, job_id).with_for_update()).one_or_none()
    if row is None:
        raise JobNotFound
    job = _view(row)
    if verb not in job.allowed:
        raise IllegalTransition(verb, job.shown_state, job.allowed)
    return job


def _wish(session: Session, db: Database, job: JobView, wish: str) -> JobView:
    """The running job with a user's wish, which its worker reads with the next renewal.

    The same wish again changes nothing.
    """
    if job.wish == wish:
        return job
    message = {
        "cancel": "the job was told to cancel",
        "stop": "the job was told to stop and deliver the best it has",
        "pause": "the job was told to pause",
    }[wish]
    return _move(session, db, job, {"wish": wish}, NewEvent("job.stopping", "info", message, {"wish": wish}))


def _move(session: Session, db: Database, job: JobView, values: dict[str, Any], event: NewEvent) -> JobView:
    after = transition(session, db, (JobRow.id == job.id, JobRow.state == job.state), values, [event])
    assert after is not None, "the row is locked"
    return _view(session.execute(select(*VIEW).where(JobRow.id == job.id)).one())


def _visible_job(tenant: str, job_id: str) -> Select[*tuple[Any, ...]]:
    return select(*VIEW).where(JobRow.id == job_id, visible(tenant))


def _view(row: Row[*tuple[Any, ...]]) -> JobView:
    return JobView(*tuple(row))
