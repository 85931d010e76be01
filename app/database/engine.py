"""The database: engine, sessions, time, and the one place where its errors become ours.

SQLite: a session that may write begins with BEGIN IMMEDIATE. A deferred transaction that reads and then writes fails at
once with "database is locked", whatever busy_timeout says (4,436 errors in 2,000 claims by 8 processes; with IMMEDIATE
none). Postgres: READ COMMITTED; after a wait for a lock it evaluates the WHERE again, which is all that the transitions
of a job need.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy.exc
from sqlalchemy import ColumnElement, Connection, Engine, create_engine, event, func, literal, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from app.database import revision
from app.database.tables import Row, UtcDateTime
from app.errors import StartupError, StorageFull, Unavailable

T = TypeVar("T")

POSTGRES_CONNECT = {
    "connect_timeout": 3,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
}
POSTGRES_OPTIONS = (
    "-c statement_timeout=5000 -c lock_timeout=2000 -c idle_in_transaction_session_timeout=15000 -c timezone=UTC"
)
POSTGRES_UPGRADE_OPTIONS = "-c statement_timeout=300000 -c lock_timeout=5000 -c timezone=UTC"
SQLITE_BUSY_S = 5
SQLITE_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",  # NORMAL is 1.5 ms faster and may lose the last commits at a power cut
    f"busy_timeout={SQLITE_BUSY_S * 1000}",
    "foreign_keys=ON",
    "trusted_schema=OFF",
    "journal_size_limit=67108864",
)
NETWORK_FILESYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "afs"}
COMMIT_LOOKUPS_AFTER_S = (0.0, 0.2, 1.0, 3.0, 5.0)
DISK_FULL = "53100"  # SQLSTATE disk_full
UPGRADE_LOCK = 0x65_73_70_61  # "espa": one upgrade at a time


class CommitUnknown(Unavailable):
    """The connection died during COMMIT: it may or may not have taken effect."""


class Database:
    """One database of one process. Sessions come from a pool; use it from any thread, never across a fork."""

    def __init__(self, url: str, *, pool_size: int = 20, max_overflow: int = 20) -> None:
        self.url = make_url(url)
        self.dialect = self.url.get_backend_name()
        if self.dialect == "sqlite":
            self._engine = _sqlite_engine(self.url, pool_size=pool_size, max_overflow=max_overflow)
        elif self.dialect == "postgresql":
            self._engine = _postgres_engine(self.url, pool_size=pool_size, max_overflow=max_overflow)
        else:
            raise StartupError(
                f"no support for {self.dialect} databases: ESPALIER_DATABASE_URL takes sqlite: or postgresql:"
            )
        self._writer = self._engine.execution_options(write=True)
        self._write_lock = threading.Lock() if self.dialect == "sqlite" else None

    def now(self, plus_s: float = 0.0) -> ColumnElement[datetime]:
        """The present moment plus `plus_s` seconds, as SQL: Postgres' own clock; on SQLite (one host) this process'."""
        if self.dialect == "sqlite":
            return literal(datetime.now(UTC) + timedelta(seconds=plus_s), UtcDateTime)
        clock = func.clock_timestamp(type_=UtcDateTime)
        return clock if plus_s == 0 else clock + literal(timedelta(seconds=plus_s))

    def insert(self, table: type[Row]) -> postgresql.Insert | sqlite.Insert:
        """An INSERT that knows `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return sqlite.insert(table) if self.dialect == "sqlite" else postgresql.insert(table)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads. Raises Unavailable."""
        with _translate_errors(), _session(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose transaction is committed at the end, and rolled back if anything raises.

        Raises Unavailable (CommitUnknown if the connection died during the commit), StorageFull.
        """
        with self._one_writer(), _translate_errors(), _session(self._writer) as session:
            yield session
            try:
                session.commit()
            except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError) as error:
                if error.connection_invalidated:
                    raise CommitUnknown from error
                raise

    @contextmanager
    def _one_writer(self) -> Iterator[None]:
        """One writer at a time in this process: SQLite does not wait fairly, and one of 30 submits starved for 5 s."""
        if self._write_lock is None:
            yield
            return
        if not self._write_lock.acquire(timeout=SQLITE_BUSY_S):
            raise Unavailable("the database is busy: try again")
        try:
            yield
        finally:
            self._write_lock.release()

    def transact(self, body: Callable[[Session], T], landed: Callable[[Session, T], bool]) -> T:
        """Run `body` and commit its writes once, also when the connection dies during the commit; returns its result.

        After such a death `landed` (in a new session, with the result of `body`) says whether the commit took effect;
        if not, `body` runs again. Raises Unavailable if the database does not come back within 10 s.
        """
        for _ in range(3):
            try:
                with self.write() as session:
                    result = body(session)
            except CommitUnknown:
                if not self._look_up_commit(landed, result):
                    continue
            return result
        raise Unavailable

    def _look_up_commit(self, landed: Callable[[Session, T], bool], result: T) -> bool:
        for pause_s in COMMIT_LOOKUPS_AFTER_S:
            time.sleep(pause_s)
            try:
                with self.read() as session:
                    return landed(session, result)
            except Unavailable:
                continue
        raise Unavailable

    def check_version(self) -> None:
        """Raise StartupError, which says what to do, for a schema that is not the one this code was written for."""
        with self._as_startup_error(), self.read() as session:
            revision.check_current(session.connection())

    def upgrade(self) -> None:
        """Upgrade the schema to this code's, as the only process that does. Raises StartupError if it is newer."""
        with self._as_startup_error(), _translate_errors(), upgrading(self.url) as connection:
            revision.upgrade(connection)

    @contextmanager
    def _as_startup_error(self) -> Iterator[None]:
        try:
            yield
        except Unavailable as error:
            where = self.url.render_as_string(hide_password=True)
            reason = str(error.__cause__ or error).splitlines()[0]
            raise StartupError(f"the database {where} does not answer: {reason}; see ESPALIER_DATABASE_URL") from error

    def close(self) -> None:
        """Close the pooled connections."""
        self._engine.dispose()


def _session(engine: Engine) -> Session:
    """A session without state to synchronize: rows are read as columns and written by statements."""
    return Session(engine, expire_on_commit=False, autoflush=False, execution_options={"synchronize_session": False})


def _sqlite_engine(url: URL, *, pool_size: int, max_overflow: int) -> Engine:
    if not url.database or url.database == ":memory:":
        raise StartupError("a SQLite database needs a file: ESPALIER_DATABASE_URL=sqlite:////folder/espalier.sqlite")
    folder = Path(url.database).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"cannot make the database's folder {folder}: {error.strerror}; set ESPALIER_HOME"
        ) from error
    kind = filesystem_type(folder)
    if kind in NETWORK_FILESYSTEMS:
        raise StartupError(
            f"{folder} is on a network file system ({kind}), where SQLite loses data: use a local disk or Postgres"
        )
    engine = create_engine(
        url, pool_size=pool_size, max_overflow=max_overflow, pool_timeout=3, connect_args={"timeout": SQLITE_BUSY_S}
    )
    _prepare_sqlite(engine, SQLITE_PRAGMAS)
    return engine


def _prepare_sqlite(engine: Engine, pragmas: tuple[str, ...]) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 must never begin by itself
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgres_engine(url: URL, *, pool_size: int, max_overflow: int) -> Engine:
    return create_engine(
        url,
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=3,
        pool_recycle=1800,
        connect_args={**POSTGRES_CONNECT, "options": POSTGRES_OPTIONS},
    )


@contextmanager
def upgrading(url: URL | str) -> Iterator[Connection]:
    """A connection in a transaction that no other upgrade shares; committed at the end.

    On SQLite foreign keys are off: a migration that rebuilds a table drops the old one, and the cascade would empty
    others.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": 60})
        _prepare_sqlite(engine, ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=OFF"))
    else:
        engine = create_engine(
            url, poolclass=NullPool, connect_args={**POSTGRES_CONNECT, "options": POSTGRES_UPGRADE_OPTIONS}
        )
    with engine.execution_options(write=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
            connection.execute(text("SET LOCAL lock_timeout = 5000"))
        yield connection


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise Unavailable for a database that does not answer, StorageFull for a full disk; our own mistakes stay."""
    try:
        yield
    except sqlalchemy.exc.TimeoutError as error:
        raise Unavailable("all connections to the database are in use: try again") from error
    except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError) as error:
        if _is_disk_full(error.orig):
            raise StorageFull("the database's disk is full: free space, then try again") from error
        if _is_our_mistake(error.orig):
            raise
        raise Unavailable from error


def _is_disk_full(error: BaseException | None) -> bool:
    return getattr(error, "sqlstate", None) == DISK_FULL or getattr(error, "sqlite_errorname", None) == "SQLITE_FULL"


def _is_our_mistake(error: BaseException | None) -> bool:
    """True for wrong SQL, which SQLite also calls OperationalError ("no such table")."""
    return getattr(error, "sqlite_errorname", None) == "SQLITE_ERROR"


def filesystem_type(folder: Path) -> str | None:
    """The type of the file system that holds the folder, as /proc/mounts names it; None where that is not known."""
    try:
        mounts = [line.split(" ") for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return None
    resolved = folder.resolve()
    holding = [
        (len(where), kind) for _, where, kind, *_ in mounts if resolved.is_relative_to(where.replace("\\040", " "))
    ]
    return max(holding)[1] if holding else None
