"""What a job has in the object store, and the rows that make it exist: checkpoints while it runs, artifacts once it
succeeded.

Keys carry the attempt, so that two attempts of a job never write the same object:

    jobs/<job>/attempts/<attempt>/checkpoints/<step, 12 digits>.safetensors and .json
    jobs/<job>/attempts/<attempt>/artifacts/<name>

Bytes are stored first and rows after; only what has a row is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select

from app.database.engine import Database
from app.database.tables import ArtifactRow, CheckpointRow
from app.errors import NotFound
from app.jobs.events import require_job


@dataclass(frozen=True)
class NewArtifact:
    """A file whose bytes are in the store under `key`, which begins with the prefix of the attempt that delivers it."""

    name: str
    kind: str
    key: str
    sha256: str
    size_bytes: int
    media_type: str


class ArtifactView(NewArtifact):
    """A delivered file; `key` is that of its bytes in the object store."""


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint; `key` is that of its tensors in the object store, `state_key` that of the rest."""

    attempt: int
    step: int
    epoch: int
    phase: str
    at: datetime
    key: str
    size_bytes: int
    sha256: str
    metrics: dict[str, Any]

    @property
    def state_key(self) -> str:
        """The key of the JSON beside the tensors."""
        return state_key(self.key)


def job_prefix(job_id: str) -> str:
    """The prefix of everything that a job has in the store."""
    return f"jobs/{job_id}/"


def attempt_prefix(job_id: str, attempt: int) -> str:
    """The prefix under which this attempt writes, and no other one does."""
    return f"jobs/{job_id}/attempts/{attempt}/"


def checkpoint_key(job_id: str, attempt: int, step: int) -> str:
    """The key of a checkpoint's tensors."""
    return f"{attempt_prefix(job_id, attempt)}checkpoints/{step:012d}.safetensors"


def state_key(tensors_key: str) -> str:
    """The key of the JSON that belongs to a checkpoint's tensors."""
    return tensors_key.removesuffix(".safetensors") + ".json"


def artifact_key(job_id: str, attempt: int, name: str) -> str:
    """The key of an artifact."""
    return f"{attempt_prefix(job_id, attempt)}artifacts/{name}"


def list_artifacts(db: Database, tenant: str, job_id: str) -> list[ArtifactView]:
    """The job's delivered files by name; none before it succeeded. Raises JobNotFound."""
    with db.read() as session:
        require_job(session, tenant, job_id)
        rows = session.execute(_artifacts().where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.name))
        return [ArtifactView(*tuple(row)) for row in rows]


def get_artifact(db: Database, tenant: str, job_id: str, name: str) -> ArtifactView:
    """One delivered file. Raises JobNotFound, NotFound."""
    with db.read() as session:
        require_job(session, tenant, job_id)
        row = session.execute(_artifacts().where(ArtifactRow.job_id == job_id, ArtifactRow.name == name)).one_or_none()
    if row is None:
        raise NotFound("the job has no artifact with this name")
    return ArtifactView(*tuple(row))


def list_checkpoints(db: Database, tenant: str, job_id: str) -> list[CheckpointView]:
    """The job's checkpoints, newest first: at most two. Raises JobNotFound."""
    with db.read() as session:
        require_job(session, tenant, job_id)
        return [CheckpointView(*tuple(row)) for row in session.execute(_checkpoints(job_id))]


def latest_checkpoints(db: Database, job_id: str, n: int = 2) -> list[CheckpointView]:
    """At most `n` checkpoints to resume from, newest first."""
    with db.read() as session:
        return [CheckpointView(*tuple(row)) for row in session.execute(_checkpoints(job_id).limit(n))]


def _artifacts() -> Select[*tuple[Any, ...]]:
    return select(
        ArtifactRow.name,
        ArtifactRow.kind,
        ArtifactRow.key,
        ArtifactRow.sha256,
        ArtifactRow.size_bytes,
        ArtifactRow.media_type,
    )


def _checkpoints(job_id: str) -> Select[*tuple[Any, ...]]:
    return (
        select(
            CheckpointRow.attempt,
            CheckpointRow.step,
            CheckpointRow.epoch,
            CheckpointRow.phase,
            CheckpointRow.at,
            CheckpointRow.key,
            CheckpointRow.size_bytes,
            CheckpointRow.sha256,
            CheckpointRow.metrics,
        )
        .where(CheckpointRow.job_id == job_id)
        .order_by(CheckpointRow.attempt.desc(), CheckpointRow.step.desc())
    )
