"""The table of workers: who is alive, and which jobs each of them runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from app.database.engine import Database
from app.database.tables import WorkerRow

WORKER_ALIVE_S = 30.0  # a worker reports every 10 s


@dataclass(frozen=True)
class WorkerView:
    """A worker that is or was alive, and the ids of the jobs that it reported as running."""

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
    """Insert the worker's row, alive as of now and running no job."""
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


def record_beat(db: Database, worker_id: str, running: list[str]) -> bool:
    """Record that the worker is alive and runs these jobs; False if its row is gone, as after a day of silence."""
    with db.write() as session:
        values = {"running": running, "seen_at": db.now()}
        row = session.execute(
            update(WorkerRow).where(WorkerRow.id == worker_id).values(**values).returning(WorkerRow.id)
        )
        return row.first() is not None


def remove_worker(db: Database, worker_id: str) -> None:
    """Remove the row of a worker that ended."""
    with db.write() as session:
        session.execute(delete(WorkerRow).where(WorkerRow.id == worker_id))


def list_workers(db: Database) -> list[WorkerView]:
    """Every registered worker, oldest first; `alive` if it reported in the last 30 s."""
    with db.read() as session:
        rows = session.execute(
            select(
                WorkerRow.id, WorkerRow.host, WorkerRow.pid, WorkerRow.slots, WorkerRow.device, WorkerRow.running,
                WorkerRow.started_at, WorkerRow.seen_at, WorkerRow.seen_at > db.now(-WORKER_ALIVE_S),
            ).order_by(WorkerRow.started_at, WorkerRow.id)
        )  # fmt: skip
        return [WorkerView(*row) for row in rows]


def count_workers(session: Session, db: Database) -> tuple[int, int]:
    """The number of workers that are alive, and of jobs that they can run at the same time."""
    workers, slots = session.execute(
        select(func.count(), func.coalesce(func.sum(WorkerRow.slots), 0)).where(
            WorkerRow.seen_at > db.now(-WORKER_ALIVE_S)
        )
    ).one()
    return int(workers), int(slots)
