"""How Alembic runs: in the transaction of `Database.upgrade()`, or in its own for the developer's command line."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.types import TypeDecorator

from app.database.engine import upgrading
from app.database.tables import Row
from app.settings import load_settings


def render(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """Our types as the columns they are: a migration must not change when the code does."""
    return f"sa.{item.impl!r}" if kind == "type" and isinstance(item, TypeDecorator) else False


def run(connection: Connection) -> None:
    """Run the migrations that were asked for; SQLite rebuilds a table that changes (batch mode)."""
    context.configure(
        connection=connection,
        target_metadata=Row.metadata,
        render_item=render,
        render_as_batch=True,
        transactional_ddl=True,
    )
    context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with upgrading(load_settings().database) as connection:
        run(connection)
