"""The schema's revision: the database's, this code's, and the upgrade from one to the other (Alembic)."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from app.errors import NewerDatabase, StartupError


def check_current(connection: Connection) -> None:
    """Raise NewerDatabase if the database's schema is newer than this code, StartupError if it must be upgraded."""
    scripts = ScriptDirectory.from_config(_config())
    present = _present_revision(connection, scripts)
    if present != scripts.get_current_head():
        raise StartupError("the database's schema is not up to date; run: python -m app.migrate")


def upgrade(connection: Connection) -> None:
    """Run the missing migrations in the connection's transaction. Raises NewerDatabase."""
    config = _config()
    _present_revision(connection, ScriptDirectory.from_config(config))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    if connection.dialect.name == "sqlite":
        broken = connection.execute(text("PRAGMA foreign_key_check")).all()
        if broken:
            raise StartupError(f"the upgrade would leave {len(broken)} rows without their job; restore a backup")


def _present_revision(connection: Connection, scripts: ScriptDirectory) -> str | None:
    """The database's revision, None before the first. Raises NewerDatabase if this code does not know it."""
    present = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in scripts.walk_revisions()}
    if present is not None and present not in known:
        raise NewerDatabase(
            f"the database was made by a later release of Espalier (schema {present}): "
            "install that release, or restore a backup from before its upgrade"
        )
    return present


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.set_main_option("file_template", "%%(year)d%%(month).2d%%(day).2d_%%(slug)s")
    return config


def _migrations() -> Path:
    """The folder `migrations`, beside `app` in a checkout and in an installation."""
    folder = Path(__file__).parents[2] / "migrations"
    if not (folder / "env.py").is_file():
        raise StartupError("the folder `migrations` is missing beside `app`: install Espalier again")
    return folder
