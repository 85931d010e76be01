"""The networks that jobs start from or learn from: finished jobs and uploaded weights, not deleted while needed.

A job's row and its rows in `job_sources` are one transaction, and a deletion locks the source's row first. So a source
cannot be deleted between the planning of a job and its row, nor while a job that needs it has not finished.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import and_, insert, select
from sqlalchemy.orm import Session

from app.access import visible
from app.database.engine import Database
from app.database.tables import TERMINAL, ArtifactRow, JobRow, JobSourceRow, WeightsRow
from app.errors import Fault, InUse, InvalidSpec, InvalidWeights, ObjectNotFound, SourceUnavailable
from app.spec.job import JobSpec
from app.spec.references import Kind, Reference, Source, every_reference, references_in
from app.spec.retrain import NetworkName
from app.storage import Storage
from app.validation.safetensors_header import NAMES, TensorEntry, read_entries

WEIGHTS_FILE = "weights.safetensors"
ARCHITECTURE_FILE = "architecture.json"
ARTIFACTS: dict[NetworkName, dict[str, str]] = {
    "pruned": {WEIGHTS_FILE: "pruned.safetensors", ARCHITECTURE_FILE: "architecture.json"},
    "baseline": {WEIGHTS_FILE: "baseline.safetensors", ARCHITECTURE_FILE: "baseline.architecture.json"},
}
"""Names under which a job delivers each of its networks, by the names that a source's files have on a worker."""
KINDS = {name: kind for kind, name in NAMES.items()}
UNFINISHED = "has not finished, it is {state}: wait until it has succeeded"
MOST_USERS_NAMED = 3  # jobs that a refusal lists


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: `name` on a worker, `key` in the store."""

    name: str
    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FoundSource:
    """What the rows say about one reference: its files, and for uploaded weights the tensors; or its `problem`."""

    files: tuple[SourceFile, ...] = ()
    tensors: tuple[dict[str, Any], ...] | None = None
    problem: str | None = None


def resolve_sources(db: Database, storage: Storage, tenant: str, spec: JobSpec) -> dict[str, Source]:
    """What `make_plan` needs to know about every network that `spec` refers to, by its key.

    Of a file of weights only the header is read. Without references there is no query.

    Raises InvalidSpec with a fault at each place that names something unknown, unfinished, failed or deleted;
    Unavailable.
    """
    named = references_in(spec)
    if not named:
        return {}
    with db.read() as session:
        found = _find_sources(session, tenant, named)
    sources: dict[str, Source] = {}
    problems: dict[str, str] = {}
    for reference in named:
        try:
            sources[reference.key] = _read_source(storage, reference, found[reference.key])
        except _Unusable as unusable:
            problems[reference.key] = str(unusable)
    if problems:
        raise InvalidSpec(
            [_fault_of(place, problems[place.key]) for place in every_reference(spec) if place.key in problems]
        )
    return sources


def locate_files(db: Database, tenant: str, named: Sequence[Reference]) -> dict[str, tuple[SourceFile, ...]]:
    """The files of each network, by its key. Raises SourceUnavailable if one was deleted; Unavailable."""
    with db.read() as session:
        found = _find_sources(session, tenant, named)
    for reference in named:
        problem = found[reference.key].problem
        if problem is not None:
            raise SourceUnavailable(problem, pointer=reference.pointer)
    return {key: one.files for key, one in found.items()}


def record_sources(session: Session, tenant: str, job_id: str, named: Sequence[Reference]) -> None:
    """Insert, in the transaction of a new job, a row for each network that it needs.

    Raises InvalidSpec if one was deleted since the job was planned.
    """
    wanted: dict[tuple[Kind, str], Reference] = {}
    for reference in named:
        wanted.setdefault((reference.kind, reference.id), reference)
    ids = {kind: sorted(name for of, name in wanted if of == kind) for kind in ("job", "weights")}
    present: set[tuple[str, str]] = set()
    if ids["job"]:  # shared locks: two jobs may need the same, a deletion waits
        there = (
            select(JobRow.id)
            .where(JobRow.id.in_(ids["job"]), visible(tenant), JobRow.state == "succeeded")
            .order_by(JobRow.id)
        )
        present |= {("job", found) for found in session.scalars(there.with_for_update(read=True))}
    if ids["weights"]:
        known = select(WeightsRow.id).where(WeightsRow.id.in_(ids["weights"]), WeightsRow.tenant_id == tenant)
        locked = known.order_by(WeightsRow.id).with_for_update(read=True)
        present |= {("weights", found) for found in session.scalars(locked)}
    faults = [_fault_of(wanted[one], _unknown_source(wanted[one])) for one in wanted if one not in present]
    if faults:
        raise InvalidSpec(faults)
    rows = [{"job_id": job_id, "kind": kind, "source_id": source_id} for kind, source_id in wanted]
    session.execute(insert(JobSourceRow), rows)


def check_unused(session: Session, kind: Kind, source_id: str) -> None:
    """Raise InUse, naming jobs, while one that has not finished needs it; the caller holds the lock of its row."""
    users = session.scalars(
        select(JobSourceRow.job_id)
        .join(JobRow, JobRow.id == JobSourceRow.job_id)
        .where(JobSourceRow.kind == kind, JobSourceRow.source_id == source_id, JobRow.state.not_in(TERMINAL))
        .order_by(JobSourceRow.job_id)
        .limit(MOST_USERS_NAMED)
    ).all()
    if users:
        what = "this job's network" if kind == "job" else "the weights"
        raise InUse(f"jobs that have not finished need {what}: {', '.join(users)}; cancel them or wait")


class _Unusable(Exception):
    """A reference that cannot be used; the message says why and what to do."""


def _find_sources(session: Session, tenant: str, named: Sequence[Reference]) -> dict[str, FoundSource]:
    """What the rows say about each reference, by key: one query for all jobs, one for all weights."""
    job_ids = {reference.id for reference in named if reference.kind == "job"}
    weights_ids = {reference.id for reference in named if reference.kind == "weights"}
    states: dict[str, str] = {}
    delivered: dict[tuple[str, str], SourceFile] = {}
    if job_ids:
        names = [name for files in ARTIFACTS.values() for name in files.values()]
        rows = session.execute(
            select(
                JobRow.id, JobRow.state, ArtifactRow.name, ArtifactRow.key, ArtifactRow.size_bytes, ArtifactRow.sha256
            )
            .outerjoin(ArtifactRow, and_(ArtifactRow.job_id == JobRow.id, ArtifactRow.name.in_(names)))
            .where(JobRow.id.in_(job_ids), visible(tenant))
        )
        for row in rows:
            states[row.id] = row.state
            if row.name is not None:
                delivered[row.id, row.name] = SourceFile(row.name, row.key, row.size_bytes, row.sha256)
    uploaded: dict[str, WeightsRow] = {}
    if weights_ids:
        wanted = select(WeightsRow).where(WeightsRow.id.in_(weights_ids), WeightsRow.tenant_id == tenant)
        uploaded = {row.id: row for row in session.scalars(wanted)}
    found = {}
    for reference in named:
        if reference.kind == "job":
            found[reference.key] = _find_job(reference, states.get(reference.id), delivered)
        else:
            found[reference.key] = _find_weights(reference, uploaded.get(reference.id))
    return found


def _find_job(reference: Reference, state: str | None, delivered: dict[tuple[str, str], SourceFile]) -> FoundSource:
    if state is None:
        return FoundSource(problem=_unknown_source(reference))
    if state != "succeeded":
        how = {"failed": "failed: name one that succeeded", "cancelled": "was cancelled: name one that succeeded"}
        return FoundSource(problem=f"job {reference.id} {how.get(state, UNFINISHED.format(state=state))}")
    assert reference.artifact is not None, "the reference of a job says which network"
    files = []
    for name, artifact in ARTIFACTS[reference.artifact].items():
        file = delivered.get((reference.id, artifact))
        if file is None:
            return FoundSource(problem=f"job {reference.id} delivered no {artifact}: name another job")
        files.append(replace(file, name=name))
    return FoundSource(tuple(files))


def _find_weights(reference: Reference, row: WeightsRow | None) -> FoundSource:
    if row is None:
        return FoundSource(problem=_unknown_source(reference))
    file = SourceFile(WEIGHTS_FILE, weights_key(row.id), row.size_bytes, row.sha256)
    return FoundSource((file,), tuple(row.tensors))


def _read_source(storage: Storage, reference: Reference, found: FoundSource) -> Source:
    """The network's tensors and its architecture, of the files in the store. Raises _Unusable, Unavailable."""
    if found.problem is not None:
        raise _Unusable(found.problem)
    files = {file.name: file for file in found.files}
    if found.tensors is not None:
        try:
            storage.size(files[WEIGHTS_FILE].key)
        except ObjectNotFound as error:
            raise _Unusable(
                f"the bytes of weights {reference.id} are gone from the store: upload them again"
            ) from error
        return Source.of_tensors(
            {tensor["name"]: tuple(tensor["shape"]) for tensor in found.tensors},
            {tensor["name"]: KINDS[tensor["dtype"]] for tensor in found.tensors},
        )
    try:
        document = json.loads(storage.get_bytes(files[ARCHITECTURE_FILE].key))
        entries = _stored_entries(storage, files[WEIGHTS_FILE])
        return Source.of_architecture(
            document, {entry.name: entry.shape for entry in entries}, {entry.name: entry.kind for entry in entries}
        )
    except ObjectNotFound as error:
        raise _Unusable(f"the files of job {reference.id} are gone from the store: run it again") from error
    except (InvalidWeights, KeyError, TypeError, ValueError) as error:
        raise _Unusable(f"the network of job {reference.id} cannot be read any more: run it again") from error


def _stored_entries(storage: Storage, file: SourceFile) -> tuple[TensorEntry, ...]:
    """The tensors of a stored safetensors file, of which only the header is read."""
    return read_entries(lambda start, end: b"".join(storage.stream(file.key, start, end)), file.size_bytes)[0]


def weights_key(weights_id: str) -> str:
    """The key of the bytes of uploaded weights."""
    return f"{weights_prefix(weights_id)}{WEIGHTS_FILE}"


def weights_prefix(weights_id: str) -> str:
    """The prefix of everything that uploaded weights have in the store."""
    return f"weights/{weights_id}/"


def _unknown_source(reference: Reference) -> str:
    if reference.kind == "job":
        return f"there is no job {reference.id}: name one that succeeded and was not deleted"
    return f"there are no weights {reference.id}: upload them with POST /v1/weights"


def _fault_of(reference: Reference, problem: str) -> Fault:
    return Fault(reference.pointer, problem, value=reference.id)
