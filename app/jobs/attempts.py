"""A worker's moves of jobs: claim, renew, checkpoint, and the ways an attempt ends. With `app/jobs/commands.py`, the only writer
of job rows.

Every write carries the attempt (the fencing token): zero rows changed raises LostOwnership, and the worker must stop
and write nothing more. A write whose commit got lost on the way is looked up by the row's beat, and repeated only if it
is not there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, case, delete, func, insert, select, update
from sqlalchemy.orm import Session, aliased

from app.database.engine import Database
from app.database.tables import ArtifactRow, CheckpointRow, JobRow, WorkerRow, storable_text
from app.errors import LostOwnership, Poisoned
from app.failpoints import failpoint
from app.jobs import outbox
from app.jobs.artifacts import NewArtifact, attempt_prefix, latest_checkpoints
from app.jobs.events import NewEvent, write_log, write_metrics
from app.jobs.transitions import JobAfter, clear_objects, purge, transition

__all__ = [
    "Claim",
    "NewArtifact",
    "NewEvent",
    "WorkerView",
    "abandon",
    "beat_worker",
    "claim",
    "crash",
    "fail",
    "finish",
    "forget_worker",
    "latest_checkpoints",
    "list_workers",
    "obey_cancel",
    "obey_pause",
    "reap",
    "record_checkpoint",
    "register_worker",
    "release",
    "renew",
    "workers_alive",
]

SPEC_VERSION = 1  # the newest job language this code speaks: a newer API's jobs wait for a newer worker
MOST_CRASHES = 3
KEPT_CHECKPOINTS = 2
WORKER_ALIVE_S = 30.0  # a worker says that it is alive every 10 s


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
    """The next job, now `running` and this worker's for `lease_s` seconds; None if none waits.

    `hint` is looked at first.
    """
    failpoint("claim_before")
    with db.read() as session:
        if session.scalar(select(JobRow.id).where(*_claimable(db)).limit(1)) is None:
            return None  # an idle look takes no lock

    def body(session: Session) -> JobAfter | None:
        hinted = _take(session, db, worker_id, lease_s, hint) if hint is not None else None
        return hinted or _take(session, db, worker_id, lease_s)

    def landed(session: Session, after: JobAfter | None) -> bool:
        return after is None or _beat(session, after.job_id, after.attempt) == after.beat

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


def _take(session: Session, db: Database, worker_id: str, lease_s: float, job_id: str | None = None) -> JobAfter | None:
    """One queued job, taken; workers on Postgres step over rows that another is taking."""
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
    """The user's wish; the lease runs `lease_s` seconds more and what happened is written with it.

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
    return _fenced(db, claim, values, events, also=also, seen=seen).wish


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
    """The bytes under `key` are now the job's newest checkpoint; all but the two newest go. Raises LostOwnership.

    A step beyond all earlier ones is progress: crashes before it are forgiven.
    """
    _check_key(claim, key)
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

    _fenced(db, claim, values, [event], also=also)


def _drop_old_checkpoints(session: Session, db: Database, job_id: str) -> None:
    """Rows now, objects by the outbox: a crash in between leaves garbage, never a row without bytes."""
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
        outbox.post(session, db, "delete_prefix", key.removesuffix("safetensors"))


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
    """The job succeeded: its artifacts, whose bytes are in the store already, exist from now on, all at once.

    Raises LostOwnership if another attempt has the job or the user cancelled it: then nothing is delivered.
    """
    for artifact in artifacts:
        _check_key(claim, artifact.key)

    def also(session: Session, _: JobAfter) -> None:
        rows = [{"job_id": claim.job_id, **vars(artifact)} for artifact in artifacts]
        if rows:
            session.execute(insert(ArtifactRow), rows)
        clear_objects(session, db, claim.job_id, keep_artifacts=True)

    how = "the job was stopped; what it had is delivered" if stopped_early else "the job succeeded"
    _fenced(
        db,
        claim,
        {
            **_no_owner(db, "succeeded"),
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
    """The job failed for good, with code, message, pointer and hint. Raises LostOwnership."""
    failed = NewEvent("job.failed", "error", str(error["message"]), {"error": error})
    values = {**_no_owner(db, "failed"), "finished_at": db.now(), "error": error}
    _fenced(db, claim, values, [*events, failed], also=lambda session, after: _end(session, db, after))


def obey_cancel(db: Database, claim: Claim, events: Sequence[NewEvent] = ()) -> None:
    """The job is cancelled, as its user asked. Raises LostOwnership, also if nobody asked."""
    cancelled = NewEvent("job.cancelled", "info", "the job was cancelled")
    _fenced(
        db,
        claim,
        {**_no_owner(db, "cancelled"), "finished_at": db.now()},
        [*events, cancelled],
        where=(JobRow.wish == "cancel",),
        also=lambda session, after: _end(session, db, after),
    )


def obey_pause(db: Database, claim: Claim) -> bool:
    """True: the job is paused, after a checkpoint.

    False: its user resumed it meanwhile, train on. Raises LostOwnership.
    """
    paused = NewEvent("job.paused", "info", "the job was paused")
    try:
        _fenced(db, claim, _no_owner(db, "paused"), [paused], where=(JobRow.wish == "pause",))
    except LostOwnership:
        with db.read() as session:
            if session.scalar(select(JobRow.id).where(*_fence(claim))) is None:
                raise
        return False
    return True


def release(db: Database, claim: Claim, *, why: str = "the worker was stopped") -> str:
    """The state after the worker gave the job back (a deploy, a store that is away): no crash is counted, and what its
    user asked for is done.

    Raises LostOwnership.
    """

    def body(session: Session) -> JobAfter:
        return _give_back(session, db, _fence(claim), None, why=why) or _lost()

    return _surely(db, claim.job_id, claim.attempt, body).state


def crash(db: Database, claim: Claim, reason: dict[str, Any]) -> str:
    """The state after the trainer died: `queued` with a delay, `failed` (poison) at the third time without progress, or
    what its user asked for. `reason` goes into the event (exit_code, signal, last_words, message). Raises
    LostOwnership.
    """

    def body(session: Session) -> JobAfter:
        return _give_back(session, db, _fence(claim), reason) or _lost()

    return _surely(db, claim.job_id, claim.attempt, body).state


def reap(db: Database, job_id: str, attempt: int, beat: int, reason: dict[str, Any]) -> str | None:
    """The state after taking a job from a worker that is silent since `beat`; None if it was heard of meanwhile."""

    def body(session: Session) -> JobAfter | None:
        fence = (JobRow.id == job_id, JobRow.attempt == attempt, JobRow.state == "running", JobRow.beat == beat)
        return _give_back(session, db, fence, reason)

    with db.write() as session:
        after = body(session)
    return after.state if after is not None else None


def abandon(db: Database, worker_id: str, reason: dict[str, Any] | None = None) -> list[str]:
    """The ids of the jobs taken from a worker whose process is known to be dead: no need to wait for its leases."""
    with db.read() as session:
        owned = session.execute(
            select(JobRow.id, JobRow.attempt, JobRow.beat).where(JobRow.state == "running", JobRow.owner == worker_id)
        ).all()
    why = reason or {"message": "the worker's process ended"}
    return [job_id for job_id, attempt, beat in owned if reap(db, job_id, attempt, beat, why) is not None]


def _give_back(
    session: Session,
    db: Database,
    fence: Sequence[ColumnElement[bool]],
    reason: dict[str, Any] | None,
    *,
    why: str = "",
) -> JobAfter | None:
    """A running job without its worker: where its user's wish, and the number of its crashes, send it.

    `reason` is that of a crash; without one it was released, and `why` says why. None: not ours.
    """
    job = session.execute(select(JobRow.id, JobRow.wish, JobRow.crashes).where(*fence).with_for_update()).one_or_none()
    if job is None:
        return None
    crashes = job.crashes + (reason is not None)
    poisoned = reason is not None and crashes >= MOST_CRASHES  # crashes of a paused job count, but never end it
    state = {"cancel": "cancelled", "pause": "paused"}.get(job.wish, "failed" if poisoned else "queued")
    delay_s = back_off_s(crashes) if reason is not None and state == "queued" else 0.0
    values = {**_no_owner(db, state), "crashes": crashes, "available_at": db.now(delay_s)}
    if state == "queued":
        values["wish"] = job.wish  # "stop" holds for the next worker too
        outbox.post(session, db, "ring", job.id, after_s=delay_s)
    if state in ("cancelled", "failed"):
        values["finished_at"] = db.now()
    events = [_loss(reason, why, crashes, delay_s)]
    if state == "failed":
        assert reason is not None, "only a crash poisons"
        values["error"] = Poisoned(f"{_how(reason)}, {MOST_CRASHES} times without progress").document()
        events.append(NewEvent("job.failed", "error", values["error"]["message"], {"error": values["error"]}))
    elif state != "queued":
        events.append(NewEvent(f"job.{state}", "info", f"the job was {state}"))
    after = transition(session, db, fence, values, events)
    if after is not None and state in ("cancelled", "failed"):
        _end(session, db, after)
    return after


def back_off_s(crashes: int) -> float:
    """Seconds until the next attempt: 5, 10, 20, ... at most 300, by a random factor from 0.5 to 1.5."""
    return float(min(300.0, 5.0 * 2 ** (crashes - 1)) * random.uniform(0.5, 1.5))


def _loss(reason: dict[str, Any] | None, why: str, crashes: int, delay_s: float) -> NewEvent:
    if reason is None:
        return NewEvent("job.released", "info", f"{why}; the job goes on from its checkpoint", {"crashes": crashes})
    data = {**reason, "crashes": crashes, "retry_in_s": round(delay_s, 1)}
    return NewEvent("worker.lost", "warn", _how(reason), data)


def _how(reason: dict[str, Any]) -> str:
    if "message" in reason:
        return str(reason["message"])
    if "signal" in reason:
        return f"the trainer was ended by signal {reason['signal']}"
    return f"the trainer ended with exit code {reason.get('exit_code')}"


def _end(session: Session, db: Database, after: JobAfter) -> None:
    """What a job that failed or was cancelled leaves behind goes; the job itself too if its user deleted it."""
    if after.deleted_at is not None:
        purge(session, db, after.job_id)
    else:
        clear_objects(session, db, after.job_id, keep_artifacts=False)


def _no_owner(db: Database, state: str) -> dict[str, Any]:
    return {"state": state, "wish": None, "owner": None, "lease_until": None, "available_at": db.now()}


def _fence(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (JobRow.id == claim.job_id, JobRow.attempt == claim.attempt, JobRow.state == "running")


def _fenced(
    db: Database,
    claim: Claim,
    values: dict[str, Any],
    events: Sequence[NewEvent],
    *,
    where: Sequence[ColumnElement[bool]] = (),
    also: Callable[[Session, JobAfter], None] = lambda session, after: None,
    seen: bool = True,
) -> JobAfter:
    """The row after a move of this attempt, with whatever `also` writes in the same transaction.

    Raises LostOwnership.
    """

    def body(session: Session) -> JobAfter:
        changed = {**values, "beat": JobRow.beat + 1}
        after = transition(session, db, (*_fence(claim), *where), changed, events, seen=seen) or _lost()
        also(session, after)
        return after

    return _surely(db, claim.job_id, claim.attempt, body)


def _surely(db: Database, job_id: str, attempt: int, body: Callable[[Session], JobAfter]) -> JobAfter:
    return db.transact(body, lambda session, after: _beat(session, job_id, attempt) == after.beat)


def _beat(session: Session, job_id: str, attempt: int) -> int | None:
    return session.scalar(select(JobRow.beat).where(JobRow.id == job_id, JobRow.attempt == attempt))


def _lost() -> JobAfter:
    raise LostOwnership


def _check_key(claim: Claim, key: str) -> None:
    """An attempt delivers what it wrote itself.

    In 1 of 1,040 jobs of a fault test a dead trainer's last lines reached the next job: wrong weights, every fence
    passed.
    """
    prefix = attempt_prefix(claim.job_id, claim.attempt)
    if not key.startswith(prefix):
        raise ValueError(f"{key} does not lie under {prefix}")


@dataclass(frozen=True)
class WorkerView:
    """A worker that is or was alive, and the ids of the jobs it said it runs."""

    id: str
    host: str
    pid: int
    slots: int
    device: str
    running: list[str]
    started_at: datetime
    seen_at: datetime
    alive: bool


def register_worker(db: Database, worker_id: str, host: str, pid: int, slots: int, device: str) -> None:
    """The worker is alive."""
    with db.write() as session:
        session.execute(
            insert(WorkerRow).values(
                id=worker_id,
                host=host,
                pid=pid,
                slots=slots,
                device=device,
                running=[],
                started_at=db.now(),
                seen_at=db.now(),
            )
        )


def beat_worker(db: Database, worker_id: str, running: list[str]) -> bool:
    """True: the worker is still alive and runs these jobs. False: it was forgotten, as after a day of silence."""
    with db.write() as session:
        values = {"running": running, "seen_at": db.now()}
        row = session.execute(
            update(WorkerRow).where(WorkerRow.id == worker_id).values(**values).returning(WorkerRow.id)
        )
        return row.first() is not None


def forget_worker(db: Database, worker_id: str) -> None:
    """The worker ended."""
    with db.write() as session:
        session.execute(delete(WorkerRow).where(WorkerRow.id == worker_id))


def list_workers(db: Database) -> list[WorkerView]:
    """Every worker that did not say good-bye, oldest first; `alive` if it was heard of in the last 30 s."""
    with db.read() as session:
        rows = session.execute(
            select(
                WorkerRow.id, WorkerRow.host, WorkerRow.pid, WorkerRow.slots, WorkerRow.device, WorkerRow.running,
                WorkerRow.started_at, WorkerRow.seen_at, WorkerRow.seen_at > db.now(-WORKER_ALIVE_S),
            ).order_by(WorkerRow.started_at, WorkerRow.id)
        )  # fmt: skip
        return [WorkerView(*row) for row in rows]


def workers_alive(session: Session, db: Database) -> tuple[int, int]:
    """How many workers are alive, and how many jobs they can run together."""
    workers, slots = session.execute(
        select(func.count(), func.coalesce(func.sum(WorkerRow.slots), 0)).where(
            WorkerRow.seen_at > db.now(-WORKER_ALIVE_S)
        )
    ).one()
    return int(workers), int(slots)
