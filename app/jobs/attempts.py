"""What workers change of jobs: claim, renew, checkpoint, and the ways an attempt ends. With `app/jobs/commands.py`, the
only writer of job rows.

Every write carries the attempt (the fencing token). If no row is changed, LostOwnership is raised, and the worker must
stop and write nothing more. A write whose commit was lost on the way is looked up by the row's beat, and repeated only
if it is not there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, case, delete, func, insert, select
from sqlalchemy.orm import Session, aliased

from app.database.engine import Database
from app.database.tables import ArtifactRow, CheckpointRow, JobRow, storable_text
from app.errors import LostOwnership, Poisoned
from app.failpoints import failpoint
from app.jobs import outbox
from app.jobs.artifacts import NewArtifact, attempt_prefix
from app.jobs.events import NewEvent, write_log, write_metrics
from app.jobs.transitions import JobAfter, clear_objects, purge_job, transition

SPEC_VERSION = 1  # the newest job language this code speaks: a newer API's jobs wait for a newer worker
MOST_CRASHES = 3
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Claim:
    """The right of one worker to one attempt of a job. `wish` is what the user wanted when it was claimed."""

    job_id: str
    attempt: int
    tenant: str
    spec: dict[str, Any]
    wish: str | None
    progress_step: int
    name: str | None


def claim(db: Database, *, worker_id: str, hint: str | None = None, lease_s: float = 60) -> Claim | None:
    """Give the next job to this worker for `lease_s` seconds, its state `running`; None if none waits.

    The job with the id `hint` comes first, if it waits.
    """
    failpoint("claim_before")
    with db.read() as session:
        if session.scalar(select(JobRow.id).where(*_claimable(db)).limit(1)) is None:
            return None  # without a lock: an idle worker asks every second

    def body(session: Session) -> JobAfter | None:
        hinted = _claim_first(session, db, worker_id, lease_s, hint) if hint is not None else None
        return hinted or _claim_first(session, db, worker_id, lease_s)

    def landed(session: Session, after: JobAfter | None) -> bool:
        return after is None or _read_beat(session, after.job_id, after.attempt) == after.beat

    after = db.transact(body, landed)
    if after is None:
        return None
    with db.read() as session:
        job = session.execute(
            select(JobRow.tenant_id, JobRow.spec, JobRow.progress_step, JobRow.name).where(JobRow.id == after.job_id)
        ).one()
    return Claim(after.job_id, after.attempt, job.tenant_id, job.spec, after.wish, job.progress_step, job.name)


def _claimable(db: Database, job: Any = JobRow) -> tuple[ColumnElement[bool], ...]:
    return (job.state == "queued", job.available_at <= db.now(), job.spec_version <= SPEC_VERSION)


def _claim_first(
    session: Session, db: Database, worker_id: str, lease_s: float, job_id: str | None = None
) -> JobAfter | None:
    """Claim the first queued job, or the one with this id; workers on Postgres skip rows that another one claims."""
    waiting = aliased(JobRow)
    first = select(waiting.id).where(*_claimable(db, waiting))
    if job_id is not None:
        first = first.where(waiting.id == job_id)
    first = first.order_by(waiting.priority.desc(), waiting.available_at, waiting.id).limit(1)
    return transition(
        session,
        db,
        (JobRow.id == first.with_for_update(skip_locked=True).scalar_subquery(), JobRow.state == "queued"),
        {
            "state": "running",
            "attempt": JobRow.attempt + 1,
            "beat": JobRow.beat + 1,
            "owner": worker_id,
            "lease_until": db.now(lease_s),
            "started_at": func.coalesce(JobRow.started_at, db.now()),
        },
        [NewEvent("job.claimed", "info", "a worker took the job", {"worker": worker_id})],
    )


def renew(
    db: Database,
    claim: Claim,
    *,
    worker_id: str,
    lease_s: float = 60,
    progress: dict[str, Any] | None = None,
    events: Sequence[NewEvent] = (),
    metrics: Sequence[tuple[str, int, float]] = (),
    log: str = "",
) -> str | None:
    """Extend the lease to `lease_s` seconds from now and write what happened since; returns the user's wish.

    Raises LostOwnership.
    """
    text = storable_text(log)
    size_bytes = len(text.encode())
    values: dict[str, Any] = {
        "owner": worker_id,
        "lease_until": db.now(lease_s),
        "log_bytes": JobRow.log_bytes + size_bytes,
    }
    if progress is not None:
        values["progress"] = progress

    def also(session: Session, after: JobAfter) -> None:
        write_metrics(session, db, claim.job_id, metrics)
        if text:
            write_log(session, claim.job_id, text, size_bytes, after.log_bytes)

    seen = bool(progress is not None or events)
    return _write_fenced(db, claim, values, events, also=also, seen=seen).wish


def record_checkpoint(
    db: Database,
    claim: Claim,
    *,
    step: int,
    epoch: int,
    phase: str,
    key: str,
    size_bytes: int,
    sha256: str,
    metrics: dict[str, float],
) -> None:
    """Insert the row of the checkpoint stored under `key`, and remove all but the two newest. Raises LostOwnership.

    A step beyond all earlier ones is progress: the count of crashes starts again.
    """
    _require_own_key(claim, key)
    advanced = step > JobRow.progress_step
    values = {
        "crashes": case((advanced, 0), else_=JobRow.crashes),
        "progress_step": case((advanced, step), else_=JobRow.progress_step),
    }
    event = NewEvent(
        "checkpoint.saved",
        "info",
        f"checkpoint at step {step}",
        {"step": step, "epoch": epoch, "phase": phase, "size_bytes": size_bytes, "metrics": metrics},
    )

    def also(session: Session, _: JobAfter) -> None:
        row = {"epoch": epoch, "phase": phase, "at": db.now(), "key": key, "size_bytes": size_bytes, "sha256": sha256}
        session.execute(
            db.insert(CheckpointRow)
            .values(job_id=claim.job_id, attempt=claim.attempt, step=step, metrics=metrics, **row)
            .on_conflict_do_update(index_elements=["job_id", "attempt", "step"], set_={**row, "metrics": metrics})
        )
        _drop_old_checkpoints(session, db, claim.job_id)

    _write_fenced(db, claim, values, [event], also=also)


def _drop_old_checkpoints(session: Session, db: Database, job_id: str) -> None:
    """Remove rows now and post errands for the objects: a crash in between leaves garbage, no row without bytes."""
    old = session.execute(
        select(CheckpointRow.attempt, CheckpointRow.step, CheckpointRow.key)
        .where(CheckpointRow.job_id == job_id)
        .order_by(CheckpointRow.attempt.desc(), CheckpointRow.step.desc())
        .offset(KEPT_CHECKPOINTS)
        .limit(1000)
    ).all()
    for attempt, step, key in old:
        session.execute(
            delete(CheckpointRow).where(
                CheckpointRow.job_id == job_id, CheckpointRow.attempt == attempt, CheckpointRow.step == step
            )
        )
        outbox.post_errand(session, db, "delete_prefix", key.removesuffix("safetensors"))


def finish(
    db: Database,
    claim: Claim,
    *,
    summary: dict[str, Any],
    report: dict[str, Any],
    artifacts: Sequence[NewArtifact],
    stopped_early: bool = False,
    events: Sequence[NewEvent] = (),
) -> None:
    """End the job as succeeded and insert the rows of its artifacts, whose bytes are in the store, all at once.

    Raises LostOwnership if another attempt has the job or the user cancelled it: then nothing is delivered.
    """
    for artifact in artifacts:
        _require_own_key(claim, artifact.key)

    def also(session: Session, _: JobAfter) -> None:
        rows = [{"job_id": claim.job_id, **vars(artifact)} for artifact in artifacts]
        if rows:
            session.execute(insert(ArtifactRow), rows)
        clear_objects(session, db, claim.job_id, keep_artifacts=True)

    how = "the job was stopped; what it had is delivered" if stopped_early else "the job succeeded"
    _write_fenced(
        db,
        claim,
        {
            **_without_worker(db, "succeeded"),
            "finished_at": db.now(),
            "summary": summary,
            "report": report,
            "stopped_early": stopped_early,
        },
        [*events, NewEvent("job.succeeded", "info", how, {"stopped_early": stopped_early})],
        where=(JobRow.wish.is_distinct_from("cancel"),),
        also=also,
    )


def fail(db: Database, claim: Claim, error: dict[str, Any], events: Sequence[NewEvent] = ()) -> None:
    """End the job as failed, with code, message, pointer and hint. Raises LostOwnership."""
    failed = NewEvent("job.failed", "error", str(error["message"]), {"error": error})
    values = {**_without_worker(db, "failed"), "finished_at": db.now(), "error": error}
    _write_fenced(db, claim, values, [*events, failed], also=lambda session, after: _clear_ended(session, db, after))


def obey_cancel(db: Database, claim: Claim, events: Sequence[NewEvent] = ()) -> None:
    """End the job as cancelled, as its user asked. Raises LostOwnership, also if nobody asked."""
    cancelled = NewEvent("job.cancelled", "info", "the job was cancelled")
    _write_fenced(
        db,
        claim,
        {**_without_worker(db, "cancelled"), "finished_at": db.now()},
        [*events, cancelled],
        where=(JobRow.wish == "cancel",),
        also=lambda session, after: _clear_ended(session, db, after),
    )


def obey_pause(db: Database, claim: Claim) -> bool:
    """Pause the job after its checkpoint; False if its user resumed it meanwhile: the worker trains on.

    Raises LostOwnership.
    """
    paused = NewEvent("job.paused", "info", "the job was paused")
    try:
        _write_fenced(db, claim, _without_worker(db, "paused"), [paused], where=(JobRow.wish == "pause",))
    except LostOwnership:
        with db.read() as session:
            if session.scalar(select(JobRow.id).where(*_fence(claim))) is None:
                raise
        return False
    return True


def release(db: Database, claim: Claim, *, why: str = "the worker was stopped") -> str:
    """Release a job that the worker cannot continue (a deploy, a store that is away); returns the state after it.

    No crash is counted, and what its user asked for is done. Raises LostOwnership.
    """

    def body(session: Session) -> JobAfter:
        return _take_from_worker(session, db, _fence(claim), None, why=why) or _raise_lost()

    return _transact_once(db, claim.job_id, claim.attempt, body).state


def crash(db: Database, claim: Claim, reason: dict[str, Any]) -> str:
    """Record that the trainer died; returns the state after it.

    That is `queued` with a delay, `failed` (poison) at the third time without progress, or what its user asked for.
    `reason` is the event's data: exit_code, signal, last_words, message. Raises LostOwnership.
    """

    def body(session: Session) -> JobAfter:
        return _take_from_worker(session, db, _fence(claim), reason) or _raise_lost()

    return _transact_once(db, claim.job_id, claim.attempt, body).state


def reap(db: Database, job_id: str, attempt: int, beat: int, reason: dict[str, Any]) -> str | None:
    """Take the job from a worker silent since `beat`; returns the state after it, None if the worker has written."""

    def body(session: Session) -> JobAfter | None:
        fence = (JobRow.id == job_id, JobRow.attempt == attempt, JobRow.state == "running", JobRow.beat == beat)
        return _take_from_worker(session, db, fence, reason)

    with db.write() as session:
        after = body(session)
    return after.state if after is not None else None


def reap_worker(db: Database, worker_id: str, reason: dict[str, Any] | None = None) -> list[str]:
    """Take all jobs from a worker whose process is dead, without waiting for its leases; returns their ids."""
    with db.read() as session:
        owned = session.execute(
            select(JobRow.id, JobRow.attempt, JobRow.beat).where(JobRow.state == "running", JobRow.owner == worker_id)
        ).all()
    why = reason or {"message": "the worker's process ended"}
    return [job_id for job_id, attempt, beat in owned if reap(db, job_id, attempt, beat, why) is not None]


def _take_from_worker(
    session: Session,
    db: Database,
    fence: Sequence[ColumnElement[bool]],
    reason: dict[str, Any] | None,
    *,
    why: str = "",
) -> JobAfter | None:
    """Move a running job to the state that its user's wish and the number of its crashes lead to; None if not ours.

    `reason` is that of a crash; without one it was released, and `why` says why.
    """
    job = session.execute(select(JobRow.id, JobRow.wish, JobRow.crashes).where(*fence).with_for_update()).one_or_none()
    if job is None:
        return None
    crashes = job.crashes + (reason is not None)
    poisoned = reason is not None and crashes >= MOST_CRASHES  # crashes of a paused job count, but never end it
    state = {"cancel": "cancelled", "pause": "paused"}.get(job.wish, "failed" if poisoned else "queued")
    delay_s = back_off_s(crashes) if reason is not None and state == "queued" else 0.0
    values = {**_without_worker(db, state), "crashes": crashes, "available_at": db.now(delay_s)}
    if state == "queued":
        values["wish"] = job.wish  # "stop" is for the next worker too
        outbox.post_errand(session, db, "ring", job.id, after_s=delay_s)
    if state in ("cancelled", "failed"):
        values["finished_at"] = db.now()
    events = [_loss_event(reason, why, crashes, delay_s)]
    if state == "failed":
        assert reason is not None, "only a crash poisons"
        values["error"] = Poisoned(f"{_describe_crash(reason)}, {MOST_CRASHES} times without progress").document()
        events.append(NewEvent("job.failed", "error", values["error"]["message"], {"error": values["error"]}))
    elif state != "queued":
        events.append(NewEvent(f"job.{state}", "info", f"the job was {state}"))
    after = transition(session, db, fence, values, events)
    if after is not None and state in ("cancelled", "failed"):
        _clear_ended(session, db, after)
    return after


def back_off_s(crashes: int) -> float:
    """Seconds until the next attempt: 5, 10, 20, ... at most 300, times a random factor from 0.5 to 1.5."""
    return float(min(300.0, 5.0 * 2 ** (crashes - 1)) * random.uniform(0.5, 1.5))


def _loss_event(reason: dict[str, Any] | None, why: str, crashes: int, delay_s: float) -> NewEvent:
    if reason is None:
        return NewEvent("job.released", "info", f"{why}; the job goes on from its checkpoint", {"crashes": crashes})
    data = {**reason, "crashes": crashes, "retry_in_s": round(delay_s, 1)}
    return NewEvent("worker.lost", "warn", _describe_crash(reason), data)


def _describe_crash(reason: dict[str, Any]) -> str:
    if "message" in reason:
        return str(reason["message"])
    if "signal" in reason:
        return f"the trainer was ended by signal {reason['signal']}"
    return f"the trainer ended with exit code {reason.get('exit_code')}"


def _clear_ended(session: Session, db: Database, after: JobAfter) -> None:
    """Remove the objects of a job that failed or was cancelled, and the job itself if its user deleted it."""
    if after.deleted_at is not None:
        purge_job(session, db, after.job_id)
    else:
        clear_objects(session, db, after.job_id, keep_artifacts=False)


def _without_worker(db: Database, state: str) -> dict[str, Any]:
    return {"state": state, "wish": None, "owner": None, "lease_until": None, "available_at": db.now()}


def _fence(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (JobRow.id == claim.job_id, JobRow.attempt == claim.attempt, JobRow.state == "running")


def _write_fenced(
    db: Database,
    claim: Claim,
    values: dict[str, Any],
    events: Sequence[NewEvent],
    *,
    where: Sequence[ColumnElement[bool]] = (),
    also: Callable[[Session, JobAfter], None] = lambda session, after: None,
    seen: bool = True,
) -> JobAfter:
    """Update the job if this attempt still owns it, with what `also` writes in the same transaction; returns the row.

    Raises LostOwnership.
    """

    def body(session: Session) -> JobAfter:
        changed = {**values, "beat": JobRow.beat + 1}
        after = transition(session, db, (*_fence(claim), *where), changed, events, seen=seen) or _raise_lost()
        also(session, after)
        return after

    return _transact_once(db, claim.job_id, claim.attempt, body)


def _transact_once(db: Database, job_id: str, attempt: int, body: Callable[[Session], JobAfter]) -> JobAfter:
    return db.transact(body, lambda session, after: _read_beat(session, job_id, attempt) == after.beat)


def _read_beat(session: Session, job_id: str, attempt: int) -> int | None:
    return session.scalar(select(JobRow.beat).where(JobRow.id == job_id, JobRow.attempt == attempt))


def _raise_lost() -> JobAfter:
    raise LostOwnership


def _require_own_key(claim: Claim, key: str) -> None:
    """Raise ValueError for a key of another attempt: an attempt delivers only what it wrote itself.

    In 1 of 1,040 jobs of a fault test a dead trainer's last lines reached the next job, and its weights were delivered
    although every fence held.
    """
    prefix = attempt_prefix(claim.job_id, claim.attempt)
    if not key.startswith(prefix):
        raise ValueError(f"{key} does not begin with {prefix}")
