"""What users change of jobs. With `app/jobs/attempts.py`, the only writer of job rows.

Each command is one transaction that locks the row, decides, and writes row and events together. It is committed when
the function returns, so that an answer sent after it is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from app.database.engine import Database
from app.database.tables import IdempotencyKeyRow, JobLabelRow, JobRow, new_id
from app.errors import IdempotencyMismatch, IllegalTransition
from app.failpoints import failpoint
from app.jobs import outbox
from app.jobs.events import NewEvent, write_events
from app.jobs.queries import VIEW, JobView, get_job, read_job
from app.jobs.references import check_unused, record_sources
from app.jobs.transitions import clear_objects, purge_job, transition
from app.spec.job import parse_job
from app.spec.references import Reference, references_in

SUBMIT_ROUTE = "POST /v1/jobs"


def submit_job(
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
    """Insert a queued job; returns it and True, or the earlier job and False for a key used with the same body.

    `idempotency` is the request's key and the sha256 of its body's bytes, stored for 7 days per tenant and `route`. A
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
            record_sources(session, tenant, job_id, needs)
        failpoint("submit_before_commit")
        return view, True

    def landed(session: Session, result: tuple[JobView, bool]) -> bool:
        return session.scalar(select(JobRow.id).where(JobRow.id == result[0].id)) is not None

    result = db.transact(body, landed)
    failpoint("submit_after_commit")
    return result


def _use_key(session: Session, db: Database, scope: tuple[str, str, str, str], job_id: str) -> JobView | None:
    """Insert the key for `job_id`; returns None if it is new, else the job that it made. Waits for a twin's commit."""
    tenant, route, key, request_sha256 = scope
    inserted = session.execute(
        db.insert(IdempotencyKeyRow)
        .values(
            tenant_id=tenant, route=route, key=key, request_sha256=request_sha256, job_id=job_id, created_at=db.now()
        )
        .on_conflict_do_nothing()
        .returning(IdempotencyKeyRow.key)
    ).one_or_none()
    if inserted is not None:
        return None
    earlier = session.execute(
        select(IdempotencyKeyRow.request_sha256, IdempotencyKeyRow.job_id).where(
            IdempotencyKeyRow.tenant_id == tenant, IdempotencyKeyRow.route == route, IdempotencyKeyRow.key == key
        )
    ).one()
    if earlier.request_sha256 != request_sha256:
        raise IdempotencyMismatch
    return read_job(session, tenant, earlier.job_id)


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
    outbox.post_errand(session, db, "ring", job_id)
    return JobView.of_row(row)


def retry_job(
    db: Database, tenant: str, job_id: str, *, idempotency: tuple[str, str] | None = None
) -> tuple[JobView, bool]:
    """Submit a job with the same spec, name and labels again; returns what `submit_job` returns.

    Raises JobNotFound, IllegalTransition; InvalidSpec if a network that the spec refers to was deleted.
    """
    earlier = get_job(db, tenant, job_id)
    if not earlier.terminal:
        raise IllegalTransition("retry", earlier.shown_state, earlier.allowed)
    return submit_job(
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


def cancel_job(db: Database, tenant: str, job_id: str) -> JobView:
    """Cancel the job if no worker has it, else ask its worker to; returns it. It cannot succeed any more.

    Raises JobNotFound, IllegalTransition.
    """
    with db.write() as session:
        job = _lock_job(session, tenant, job_id, "cancel")
        if job.state == "running":
            return _set_wish(session, db, job, "cancel")
        event = NewEvent("job.cancelled", "info", "the job was cancelled")
        values = {"state": "cancelled", "wish": None, "finished_at": db.now()}
        clear_objects(session, db, job_id, keep_artifacts=False)
        return _change_job(session, db, job, values, event)


def stop_job(db: Database, tenant: str, job_id: str) -> JobView:
    """Ask for the best result so far: at the next batch of a running job, else as soon as a worker claims it.

    Returns the job. Raises JobNotFound, IllegalTransition; the latter also for a waiting job without a checkpoint,
    which has nothing to deliver.
    """
    with db.write() as session:
        job = _lock_job(session, tenant, job_id, "stop")
        if job.state == "running":
            return _set_wish(session, db, job, "stop")
        if job.wish == "stop":
            return job
        outbox.post_errand(session, db, "ring", job_id)
        event = NewEvent("job.stopping", "info", "the job will be delivered as it is", {"wish": "stop"})
        return _change_job(session, db, job, {"state": "queued", "wish": "stop", "available_at": db.now()}, event)


def pause_job(db: Database, tenant: str, job_id: str) -> JobView:
    """Pause the job if no worker has it, else ask its worker to write a checkpoint and release it; returns the job.

    Raises JobNotFound, IllegalTransition.
    """
    with db.write() as session:
        job = _lock_job(session, tenant, job_id, "pause")
        if job.state == "running":
            return _set_wish(session, db, job, "pause")
        return _change_job(session, db, job, {"state": "paused"}, NewEvent("job.paused", "info", "the job was paused"))


def resume_job(db: Database, tenant: str, job_id: str) -> JobView:
    """Queue a paused job again, or withdraw the wish to pause a running one; returns the job.

    Raises JobNotFound, IllegalTransition.
    """
    with db.write() as session:
        job = _lock_job(session, tenant, job_id, "resume")
        event = NewEvent("job.resumed", "info", "the job goes on")
        if job.state == "running":
            return _change_job(session, db, job, {"wish": None}, event)
        outbox.post_errand(session, db, "ring", job_id)
        return _change_job(session, db, job, {"state": "queued", "wish": None, "available_at": db.now()}, event)


def delete_job(db: Database, tenant: str, job_id: str) -> None:
    """Remove the job, its rows and its objects; a running one is hidden at once, cancelled, then removed.

    Raises JobNotFound; InUse while a job that has not finished needs its network.
    """
    with db.write() as session:
        job = _lock_job(session, tenant, job_id, "delete")
        if job.state == "succeeded":
            check_unused(session, "job", job_id)
        if job.state != "running":
            purge_job(session, db, job_id)
            return
        session.execute(delete(IdempotencyKeyRow).where(IdempotencyKeyRow.job_id == job_id))
        session.execute(update(JobRow).where(JobRow.id == job_id).values(deleted_at=db.now()))
        if job.wish != "cancel":
            _set_wish(session, db, job, "cancel")


def _lock_job(session: Session, tenant: str, job_id: str, verb: str) -> JobView:
    """The job, which nobody else changes until the transaction ends. Raises JobNotFound, IllegalTransition."""
    job = read_job(session, tenant, job_id, lock=True)
    if verb not in job.allowed:
        raise IllegalTransition(verb, job.shown_state, job.allowed)
    return job


def _set_wish(session: Session, db: Database, job: JobView, wish: str) -> JobView:
    """Write a user's wish into a running job, where its worker reads it at the next renewal; returns the job.

    The same wish again changes nothing.
    """
    if job.wish == wish:
        return job
    message = {
        "cancel": "the job was told to cancel",
        "stop": "the job was told to stop and deliver the best it has",
        "pause": "the job was told to pause",
    }[wish]
    return _change_job(session, db, job, {"wish": wish}, NewEvent("job.stopping", "info", message, {"wish": wish}))


def _change_job(session: Session, db: Database, job: JobView, values: dict[str, Any], event: NewEvent) -> JobView:
    """Write `values` and the event; returns the job as it is then. The caller holds the row's lock."""
    after = transition(session, db, (JobRow.id == job.id, JobRow.state == job.state), values, [event])
    assert after is not None, "the row is locked"
    return JobView.of_row(session.execute(select(*VIEW).where(JobRow.id == job.id)).one())
