"""Recovery after crashes: sweeps that take jobs from silent workers, run errands, and remove what nobody needs.

Sweeps are idempotent: any process may run them, at any time, also several at once.

Reaping does not trust wall clocks. A sweeper remembers on its own monotonic clock when it first saw each beat of each
running job. It takes the job from its worker when the lease is over and the beat has not changed for a third of it, or
when the beat has not changed for one and a half leases. So a clock that jumps an hour ahead costs nobody a job: a
worker that is alive beats every sixth of a lease.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import delete, func, select

from app.database.engine import Database
from app.database.tables import (
    TERMINAL,
    ArtifactRow,
    CheckpointRow,
    DatasetRow,
    IdempotencyKeyRow,
    JobRow,
    WeightsRow,
    WorkerRow,
)
from app.errors import Unavailable
from app.jobs import attempts, outbox, workers
from app.jobs.artifacts import state_key
from app.jobs.doorbell import Doorbell, open_bell
from app.settings import Settings
from app.storage import Storage, StoredObject

log = structlog.get_logger()

RING_EVERY_S = 15.0
HOUSEKEEPING_EVERY_S = 3600.0
FIRST_HOUSEKEEPING_S = 60.0
GARBAGE_AGE = timedelta(hours=24)  # a worker that was frozen may still be writing objects
IDEMPOTENCY_LIFE = timedelta(days=7)
SILENT_WORKER_LIFE = timedelta(days=1)
IDS_A_QUERY = 500
SILENCE = {"message": "the worker is silent: its lease is over"}
ATTEMPT_KEY = re.compile(r"jobs/([^/]+)/attempts/(\d+)/.+")


class Sweeper:
    """The sweeps of one process, and the beats of running jobs that it saw in earlier ones."""

    def __init__(
        self,
        db: Database,
        storage: Storage,
        bell: Doorbell | None,
        settings: Settings,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db = db
        self._storage = storage
        self._bell = bell or open_bell(settings)
        self._lease_s = settings.lease_s
        self._monotonic = monotonic
        self._first_seen: dict[tuple[str, int, int], float] = {}
        self._ring_at = monotonic()
        self._housekeeping_at = monotonic() + FIRST_HOUSEKEEPING_S * random.uniform(0.5, 1.5)

    def sweep(self) -> None:
        """Run everything that is due. Raises Unavailable; the next sweep does what this one did not reach."""
        self.reap_silent()
        self.run_errands()
        if self._monotonic() >= self._ring_at:
            self._ring_at = self._monotonic() + RING_EVERY_S
            self.ring_for_waiting()
        if self._monotonic() >= self._housekeeping_at:
            self._housekeeping_at = self._monotonic() + HOUSEKEEPING_EVERY_S
            self.remove_expired()
            self.collect_garbage()

    def try_sweep(self) -> None:
        """Run one of many sweeps: an error is logged, and the next sweep tries again."""
        try:
            self.sweep()
        except Unavailable as error:
            log.warning("sweep failed", reason=str(error))
        except Exception:  # one odd row or object must not end recovery for all the others
            log.exception("sweep broke")

    def reap_silent(self) -> list[str]:
        """Take jobs from workers that are silent; returns their ids."""
        with self._db.read() as session:
            running = session.execute(
                select(JobRow.id, JobRow.attempt, JobRow.beat, JobRow.lease_until < self._db.now()).where(
                    JobRow.state == "running"
                )
            ).all()
        now = self._monotonic()
        known = self._first_seen
        beats = [(job, attempt, beat) for job, attempt, beat, _ in running]
        self._first_seen = {beat: known.get(beat, now) for beat in beats}
        reaped = []
        for job, attempt, beat, expired in running:
            silent_s = now - self._first_seen[job, attempt, beat]
            if silent_s >= self._lease_s * 1.5 or (expired and silent_s >= self._lease_s / 3):
                state = attempts.reap(self._db, job, attempt, beat, SILENCE)
                if state is not None:
                    reaped.append(job)
                    log.warning("job taken from a silent worker", job=job, attempt=attempt, state=state)
        return reaped

    def ring_for_waiting(self) -> list[str]:
        """Ring again for as many waiting jobs as there are idle slots, not for each that waits; returns their ids."""
        with self._db.read() as session:
            _, slots = workers.count_workers(session, self._db)
            running = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state == "running")) or 0
            waiting = session.scalars(
                select(JobRow.id)
                .where(JobRow.state == "queued", JobRow.available_at <= self._db.now())
                .order_by(JobRow.priority.desc(), JobRow.available_at, JobRow.id)
                .limit(max(0, slots - running))
            ).all()
        for job_id in waiting:
            self._bell.ring(job_id)
        return list(waiting)

    def run_errands(self) -> int:
        """Run the errands that are due; returns how many succeeded. One whose store is away is tried again later."""
        done = 0
        while errands := outbox.claim_due(self._db):
            for errand_id, kind, subject in errands:
                try:
                    self._run_errand(kind, subject)
                except Unavailable as error:
                    log.warning("errand failed, to be tried again", kind=kind, subject=subject, reason=str(error))
                    outbox.retry_later(self._db, errand_id)
                else:
                    outbox.mark_done(self._db, errand_id)
                    done += 1
        return done

    def _run_errand(self, kind: str, subject: str) -> None:
        if kind == "ring":
            self._bell.ring(subject)
        else:
            self._storage.delete_prefix(subject)

    def remove_expired(self) -> None:
        """Remove idempotency keys after 7 days, and errands that are done and workers that are silent after a day."""
        now = self._db.now
        with self._db.write() as session:
            session.execute(
                delete(IdempotencyKeyRow).where(IdempotencyKeyRow.created_at < now(-IDEMPOTENCY_LIFE.total_seconds()))
            )
            session.execute(delete(WorkerRow).where(WorkerRow.seen_at < now(-SILENT_WORKER_LIFE.total_seconds())))
        outbox.remove_done(self._db)

    def collect_garbage(self, older_than: timedelta = GARBAGE_AGE) -> list[str]:
        """Remove objects that no row names and no running attempt can still name; returns their keys.

        Objects are listed before rows are read: the other order would delete what is committed in between.
        """
        self._storage.sweep_temporaries(older_than.total_seconds())
        before = datetime.now(UTC) - older_than
        old = [stored for stored in self._storage.list("jobs/") if stored.modified_at <= before]
        old_data = [stored for stored in self._storage.list("datasets/") if stored.modified_at <= before]
        old_weights = [stored for stored in self._storage.list("weights/") if stored.modified_at <= before]
        garbage = [*self._job_orphans(old), *self._data_orphans(old_data), *self._weights_orphans(old_weights)]
        for key in garbage:
            self._storage.delete(key)
        if garbage:
            log.info("garbage collected", objects=len(garbage))
        return garbage

    def _job_orphans(self, objects: Iterable[StoredObject]) -> Iterator[str]:
        by_job: dict[str, list[tuple[int, str]]] = {}
        for stored in objects:
            match = ATTEMPT_KEY.fullmatch(stored.key)
            if match is not None:
                by_job.setdefault(match[1], []).append((int(match[2]), stored.key))
        for ids in _batches(sorted(by_job)):
            with self._db.read() as session:
                rows = session.execute(select(JobRow.id, JobRow.attempt, JobRow.state).where(JobRow.id.in_(ids)))
                jobs = {job_id: (attempt, state) for job_id, attempt, state in rows}
                named = set(session.scalars(select(ArtifactRow.key).where(ArtifactRow.job_id.in_(ids))))
                for key in session.scalars(select(CheckpointRow.key).where(CheckpointRow.job_id.in_(ids))):
                    named |= {key, state_key(key)}
            for job_id in ids:
                present, state = jobs.get(job_id, (0, "gone"))
                over = state == "gone" or state in TERMINAL
                yield from (key for attempt, key in by_job[job_id] if key not in named and (over or attempt < present))

    def _data_orphans(self, objects: Iterable[StoredObject]) -> Iterator[str]:
        by_id = _group_by_id(objects)
        for ids in _batches(sorted(by_id)):
            with self._db.read() as session:
                alive = set[str | None]()
                for column in (DatasetRow.id, DatasetRow.packed_id):  # a data set may share what another one packed
                    known = select(column).where(column.in_(ids), DatasetRow.deleted_at.is_(None))
                    alive |= set(session.scalars(known))
            for dataset_id in ids:
                if dataset_id not in alive:
                    yield from by_id[dataset_id]

    def _weights_orphans(self, objects: Iterable[StoredObject]) -> Iterator[str]:
        by_id = _group_by_id(objects)
        for ids in _batches(sorted(by_id)):
            with self._db.read() as session:
                alive = set(session.scalars(select(WeightsRow.id).where(WeightsRow.id.in_(ids))))
            yield from (key for weights_id in ids if weights_id not in alive for key in by_id[weights_id])


def _group_by_id(objects: Iterable[StoredObject]) -> dict[str, list[str]]:
    """Keys of the form `<folder>/<id>/...` by their id."""
    found: dict[str, list[str]] = {}
    for stored in objects:
        found.setdefault(stored.key.split("/")[1], []).append(stored.key)
    return found


def _batches(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), IDS_A_QUERY):
        yield ids[start : start + IDS_A_QUERY]
