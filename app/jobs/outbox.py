"""What must happen outside the database once a transaction is committed.

The transaction writes a row here; recovery carries it out, at least once.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from app.database.engine import Database
from app.database.tables import OutboxRow

LEASE_S = 60.0  # a sweeper that died gives its errands back after this
LONGEST_DELAY_S = 3600.0
KEEP_DONE = timedelta(days=1)


def post(session: Session, db: Database, kind: str, subject: str, *, after_s: float = 0.0) -> None:
    """Ask, in this transaction, for a `ring` of job `subject`, or a `delete_prefix` of all keys that begin with it."""
    session.execute(insert(OutboxRow).values(kind=kind, subject=subject, due_at=db.now(after_s)))


def take_due(db: Database, limit: int = 50) -> list[tuple[int, str, str]]:
    """Errands that are due as (id, kind, subject), taken for a minute: no other sweeper gets them meanwhile."""
    with db.read() as session:
        if (
            session.scalar(
                select(OutboxRow.id).where(OutboxRow.done_at.is_(None), OutboxRow.due_at <= db.now()).limit(1)
            )
            is None
        ):
            return []  # an empty look takes no lock
    with db.write() as session:
        due = (
            select(OutboxRow.id)
            .where(OutboxRow.done_at.is_(None), OutboxRow.due_at <= db.now())
            .order_by(OutboxRow.due_at, OutboxRow.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        ids = list(session.scalars(due))
        rows = session.execute(
            update(OutboxRow)
            .where(OutboxRow.id.in_(ids))
            .values(due_at=db.now(LEASE_S), tries=OutboxRow.tries + 1)
            .returning(OutboxRow.id, OutboxRow.kind, OutboxRow.subject)
        )
        return sorted((row.id, row.kind, row.subject) for row in rows)


def mark_done(db: Database, errand_id: int) -> None:
    """The errand was carried out."""
    with db.write() as session:
        session.execute(update(OutboxRow).where(OutboxRow.id == errand_id).values(done_at=db.now()))


def put_off(db: Database, errand_id: int) -> None:
    """The errand failed: try again after 5 s, 10 s, 20 s, ..., an hour."""
    with db.write() as session:
        tries = session.scalar(select(OutboxRow.tries).where(OutboxRow.id == errand_id))
        delay_s = min(LONGEST_DELAY_S, 5.0 * 2 ** min((tries or 1) - 1, 20))
        session.execute(update(OutboxRow).where(OutboxRow.id == errand_id).values(due_at=db.now(delay_s)))


def forget_done(db: Database) -> None:
    """Remove errands that were done more than a day ago."""
    with db.write() as session:
        session.execute(delete(OutboxRow).where(OutboxRow.done_at < db.now(-KEEP_DONE.total_seconds())))
