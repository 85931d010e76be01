"""The rows: jobs and what belongs to them, data sets, workers, the outbox. One schema for SQLite and Postgres.

Only `app/jobs/commands.py` and `app/jobs/attempts.py` write job rows. `lease_until`, `beat`, `progress` and `event_seq`
are never indexed: 400 renewals are 398 HOT updates on Postgres without such an index and none with it. Recovery reads
the few running rows instead.
"""

from __future__ import annotations

import math
import secrets
import time
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"  # no i, l, o, u: ids are read aloud

STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")
WISHES = ("cancel", "stop", "pause")
DATASET_STATES = ("checking", "ready", "rejected")
SOURCE_KINDS = ("job", "weights")
OUTBOX_KINDS = ("ring", "delete_prefix")


def new_id(kind: str) -> str:
    """A new id: `<kind>_` and 26 characters, 48 bits of milliseconds and 80 random bits, so that ids sort by age."""
    number = (time.time_ns() // 1_000_000 & (1 << 48) - 1) << 80 | secrets.randbits(80)
    return f"{kind}_" + "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def storable_text(value: str) -> str:
    """The text without NUL and lone surrogates, which Postgres and the driver refuse."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def storable(value: Any) -> Any:
    """The JSON value as every database and JSON parser takes it: NaN and infinities are null, NUL is U+FFFD."""
    if isinstance(value, str):
        return storable_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {storable_text(str(key)): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


class UtcDateTime(TypeDecorator[datetime]):
    """A time with its zone, read in UTC with microseconds; a time without a zone is refused.

    SQLite stores text that sorts by time.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive time {value!r}: times carry their zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class StorableJson(TypeDecorator[Any]):
    """A JSON document as it was given.

    `json` on Postgres, not `jsonb`, which loses the order of keys; nothing searches inside.
    """

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return storable(value)


class StorableText(TypeDecorator[str]):
    """Text of any length from outside: NUL and lone surrogates are replaced."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable_text(value)


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Row(DeclarativeBase):
    """The base of all tables: it names all constraints, so that migrations can find them."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        dict[str, Any]: StorableJson,
        int: BigInteger,
    }


def _job_key() -> Mapped[str]:
    return mapped_column(String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


class JobRow(Row):
    """One job: the truth about its state.

    A user's request is the flag `wish`; `attempt` is the fencing token of its worker.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    name: Mapped[str | None] = mapped_column(StorableText)
    labels: Mapped[dict[str, Any]]
    spec: Mapped[dict[str, Any]]
    spec_version: Mapped[int] = mapped_column(SmallInteger)
    dataset: Mapped[str | None] = mapped_column(String(255))  # the spec's data.dataset, to see which are in use
    state: Mapped[str] = mapped_column(String(16))
    wish: Mapped[str | None] = mapped_column(String(16))
    priority: Mapped[int] = mapped_column(SmallInteger, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    beat: Mapped[int] = mapped_column(default=0)  # +1 with every write of a worker
    revision: Mapped[int] = mapped_column(default=1)  # +1 with every change that a reader sees
    owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[datetime | None]
    available_at: Mapped[datetime]
    crashes: Mapped[int] = mapped_column(SmallInteger, default=0)  # since the last checkpoint with a higher step
    progress_step: Mapped[int] = mapped_column(default=0)
    event_seq: Mapped[int] = mapped_column(default=0)
    log_bytes: Mapped[int] = mapped_column(default=0)
    progress: Mapped[dict[str, Any] | None] = mapped_column(StorableJson)
    error: Mapped[dict[str, Any] | None] = mapped_column(StorableJson)
    summary: Mapped[dict[str, Any] | None] = mapped_column(StorableJson)
    report: Mapped[dict[str, Any] | None] = mapped_column(StorableJson)
    stopped_early: Mapped[bool] = mapped_column(default=False)
    retry_of: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(_one_of("state", STATES), name="state"),
        CheckConstraint(_one_of("wish", WISHES), name="wish"),
        {"postgresql_with": {"fillfactor": 70}},
    )


_WAITING = text("state = 'queued'")
_RUNNING = text("state = 'running'")
_SHOWN = text("deleted_at IS NULL")
_NOT_DONE = text("done_at IS NULL")

Index(
    "jobs_waiting",
    JobRow.priority.desc(),
    JobRow.available_at,
    JobRow.id,
    postgresql_where=_WAITING,
    sqlite_where=_WAITING,
)
Index("jobs_running", JobRow.tenant_id, postgresql_where=_RUNNING, sqlite_where=_RUNNING)
Index(
    "jobs_newest",
    JobRow.tenant_id,
    JobRow.created_at.desc(),
    JobRow.id.desc(),
    postgresql_where=_SHOWN,
    sqlite_where=_SHOWN,
)


class EventRow(Row):
    """What happened to a job; `seq` is 1, 2, 3, ... without gaps."""

    __tablename__ = "events"

    job_id: Mapped[str] = _job_key()
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime]
    type: Mapped[str] = mapped_column(String(64))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(StorableText)
    data: Mapped[dict[str, Any]]

    __table_args__ = ({"sqlite_with_rowid": False},)


class MetricRow(Row):
    """One point of a job's series; a step that is trained again after a crash replaces its point."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = _job_key()
    series: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[float] = mapped_column(Double)

    __table_args__ = ({"sqlite_with_rowid": False},)


class LogChunkRow(Row):
    """A piece of a job's log; `seq` is the offset of its first byte in the whole log."""

    __tablename__ = "log_chunks"

    job_id: Mapped[str] = _job_key()
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(StorableText)


class CheckpointRow(Row):
    """A checkpoint whose bytes are in the object store: `key` (.safetensors) and the same name with .json."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = _job_key()
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epoch: Mapped[int] = mapped_column(Integer)
    phase: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime]
    key: Mapped[str] = mapped_column(String(512))
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    metrics: Mapped[dict[str, Any]]


class ArtifactRow(Row):
    """A delivered file; the rows of a job appear together, with its success."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = _job_key()
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    kind: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(512))
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int]
    media_type: Mapped[str] = mapped_column(String(255))


class JobLabelRow(Row):
    """A label of a job, for the search by label."""

    __tablename__ = "job_labels"

    tenant_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    k: Mapped[str] = mapped_column(String(255), primary_key=True)
    v: Mapped[str] = mapped_column(String(255), primary_key=True)
    job_id: Mapped[str] = _job_key()

    __table_args__ = (Index("job_labels_job", "job_id"),)  # the cascade of a deleted job


class JobSourceRow(Row):
    """A finished job or uploaded weights that a job starts from or learns from: in use until the job is over."""

    __tablename__ = "job_sources"

    job_id: Mapped[str] = _job_key()
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    source_id: Mapped[str] = mapped_column(String(64), primary_key=True)

    __table_args__ = (
        CheckConstraint(_one_of("kind", SOURCE_KINDS), name="kind"),
        Index("job_sources_source", "kind", "source_id"),
    )


class IdempotencyKeyRow(Row):
    """A request that made a job: the same key and body again gives the same job."""

    __tablename__ = "idempotency"

    tenant_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    route: Mapped[str] = mapped_column(String(128), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(  # deferred: this row is written first, so that a twin waits for it
        String(64), ForeignKey("jobs.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED")
    )
    created_at: Mapped[datetime]

    __table_args__ = (Index("idempotency_job", "job_id"), Index("idempotency_age", "created_at"))


class OutboxRow(Row):
    """Something to do outside the database after a commit, at least once: ring for a job, delete objects."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(512))
    due_at: Mapped[datetime]
    tries: Mapped[int] = mapped_column(SmallInteger, default=0)
    done_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(_one_of("kind", OUTBOX_KINDS), name="kind"),
        Index("outbox_due", "due_at", postgresql_where=_NOT_DONE, sqlite_where=_NOT_DONE),
        {"sqlite_autoincrement": True},
    )


class WorkerRow(Row):
    """A worker process that was alive at `seen_at`."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(StorableText)
    pid: Mapped[int] = mapped_column(Integer)
    slots: Mapped[int] = mapped_column(Integer)
    device: Mapped[str] = mapped_column(String(64))
    running: Mapped[list[Any]] = mapped_column(StorableJson)
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class DatasetRow(Row):
    """An uploaded data set."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(StorableText)
    state: Mapped[str] = mapped_column(String(16))
    format: Mapped[str] = mapped_column(String(32))
    facts: Mapped[dict[str, Any] | None] = mapped_column(StorableJson)
    problems: Mapped[list[Any]] = mapped_column(StorableJson)
    notes: Mapped[list[Any]] = mapped_column(StorableJson)
    size_bytes: Mapped[int]
    sha256: Mapped[str | None] = mapped_column(String(64))
    packed_id: Mapped[str | None] = mapped_column(String(64))  # the data set that packed it: a file is stored once
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (CheckConstraint(_one_of("state", DATASET_STATES), name="state"),)


Index(
    "datasets_newest",
    DatasetRow.tenant_id,
    DatasetRow.created_at.desc(),
    DatasetRow.id.desc(),
    postgresql_where=_SHOWN,
    sqlite_where=_SHOWN,
)


class WeightsRow(Row):
    """Uploaded weights: a safetensors file that was checked, with `tensors` as the API shows them."""

    __tablename__ = "weights"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(StorableText)
    tensors: Mapped[list[Any]] = mapped_column(StorableJson)
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]

    __table_args__ = (Index("weights_newest", "tenant_id", "id"),)
