"""The registry of uploaded weights: safetensors files, checked before they are stored, kept until they are deleted.

    weights/<id>/weights.safetensors

A row exists only for a file that was checked and whose bytes are in the store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, insert, select

from app.database.engine import Database
from app.database.tables import WeightsRow, new_id
from app.errors import JsonValue, NotFound
from app.jobs import outbox
from app.jobs.references import check_unused, weights_key, weights_prefix
from app.storage import Storage
from app.validation.safetensors_header import NAMES, check_weights

PAGE_LIMIT = 200
ID = re.compile(r"wt_[0-9a-z]{26}", re.ASCII)
HEAD = (WeightsRow.id, WeightsRow.name, WeightsRow.size_bytes, WeightsRow.sha256, WeightsRow.created_at)


@dataclass(frozen=True)
class WeightsView:
    """Uploaded weights; `tensors` (name, shape, dtype each) is None in a list, where they would be megabytes."""

    id: str
    name: str
    size_bytes: int
    sha256: str
    created_at: datetime
    tensors: tuple[dict[str, Any], ...] | None = None

    def document(self) -> dict[str, JsonValue]:
        """The weights as the API shows them."""
        document: dict[str, JsonValue] = {"id": self.id, "name": self.name}
        if self.tensors is not None:
            document["tensors"] = list(self.tensors)
        return document | {
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "created_at": self.created_at.isoformat().replace("+00:00", "Z"),
        }


def register_weights(
    db: Database, storage: Storage, tenant: str, path: Path, *, name: str, size_bytes: int, sha256: str
) -> WeightsView:
    """Check every value of the received file at `path`, store it, then insert its row; returns the weights.

    Raises InvalidWeights, Unavailable, StorageFull.
    """
    entries = check_weights(path, size_bytes)
    tensors = [{"name": entry.name, "shape": list(entry.shape), "dtype": NAMES[entry.kind]} for entry in entries]
    weights_id = new_id("wt")
    storage.put_file(weights_key(weights_id), path)
    with db.write() as session:
        created_at = session.scalars(
            insert(WeightsRow)
            .values(
                id=weights_id,
                tenant_id=tenant,
                name=name,
                tensors=tensors,
                size_bytes=size_bytes,
                sha256=sha256,
                created_at=db.now(),
            )
            .returning(WeightsRow.created_at)
        ).one()
    return WeightsView(weights_id, name, size_bytes, sha256, created_at, tuple(tensors))


def get_weights(db: Database, tenant: str, weights_id: str) -> WeightsView:
    """Uploaded weights with their tensors. Raises NotFound."""
    with db.read() as session:
        row = session.scalar(select(WeightsRow).where(*_row_of(tenant, weights_id)))
    if row is None:
        raise _not_found()
    return WeightsView(row.id, row.name, row.size_bytes, row.sha256, row.created_at, tuple(row.tensors))


def list_weights(
    db: Database, tenant: str, *, limit: int = PAGE_LIMIT, before: str | None = None
) -> tuple[list[WeightsView], str | None]:
    """A page of the tenant's weights, newest first, and the `before` of the next page (None: this is the last)."""
    limit = min(limit, PAGE_LIMIT)
    wanted = select(*HEAD).where(WeightsRow.tenant_id == tenant)
    if before is not None:
        wanted = wanted.where(WeightsRow.id < before)
    with db.read() as session:
        rows: Sequence[Any] = session.execute(wanted.order_by(WeightsRow.id.desc()).limit(limit + 1)).all()
    views = [WeightsView(*row) for row in rows[:limit]]
    return views, views[-1].id if len(rows) > limit else None


def delete_weights(db: Database, tenant: str, weights_id: str) -> None:
    """Remove the row of weights at once and their bytes soon after.

    Raises NotFound; InUse while a job that has not finished needs them.
    """
    its = and_(*_row_of(tenant, weights_id))
    with db.write() as session:
        if session.scalar(select(WeightsRow.id).where(its).with_for_update()) is None:
            raise _not_found()
        check_unused(session, "weights", weights_id)
        session.execute(delete(WeightsRow).where(its))
        outbox.post_errand(session, db, "delete_prefix", weights_prefix(weights_id))


def _row_of(tenant: str, weights_id: str) -> tuple[ColumnElement[bool], ...]:
    """The condition for the row. Raises NotFound for a text that is no id: a driver may refuse it as a parameter."""
    if not ID.fullmatch(weights_id):
        raise _not_found()
    return (WeightsRow.id == weights_id, WeightsRow.tenant_id == tenant)


def _not_found() -> NotFound:
    return NotFound("there are no such weights")
