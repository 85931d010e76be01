"""Errands: what must be done outside the database once a transaction is committed.

The transaction writes a row here; recovery runs it, at least once.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from app.database.engine import Database
from app.database.tables import OutboxRow

LEASE_S = 60.0  # the errands of a sweeper that died are due again after this
LONGEST_DELAY_S = 3600.0
KEEP_DONE = timedelta(days=1)


def post_errand(session: Session, db: Database, kind: str, subject: str, *, after_s: float = 0.0) -> None:
    """Insert an errand in this transaction: `ring` for the job `subject`, or `delete_prefix` for all keys under it."""
    session.execute(insert(OutboxRow).values(kind=kind, subject=subject, due_at=db.now(after_s)))


def claim_due(db: Database, limit: int = 50) -> list[tuple[int, str, str]]:
    """Claim errands that are due for a minute, so that no other sweeper gets them; returns (id, kind, subject) each."""
    with db.read() as session:
        if (
            session.scalar(
                select(OutboxRow.id).where(OutboxRow.done_at.is_(None), OutboxRow.due_at <= db.now()).limit(1)
            )
            is None
        ):
            return []  # without a lock: most sweeps find nothing
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
    """Record that the errand was run."""
    with db.write() as session:
        session.execute(update(OutboxRow).where(OutboxRow.id == errand_id).values(done_at=db.now()))


def retry_later(db: Database, errand_id: int) -> None:
    """Make an errand that failed due again after 5 s, 10 s, 20 s, ..., an hour."""
    with db.write() as session:
        tries = session.scalar(select(OutboxRow.tries).where(OutboxRow.id == errand_id))
        delay_s = min(LONGEST_DELAY_S, 5.0 * 2 ** min((tries or 1) - 1, 20))
        session.execute(update(OutboxRow).where(OutboxRow.id == errand_id).values(due_at=db.now(delay_s)))


def remove_done(db: Database) -> None:
    """Remove errands that were done more than a day ago."""
    with db.write() as session:
        session.execute(delete(OutboxRow).where(OutboxRow.done_at < db.now(-KEEP_DONE.total_seconds())))
