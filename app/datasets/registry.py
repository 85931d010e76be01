"""The registry of data sets: what a name or an id stands for, uploads until they are deleted, copies of workers.

    datasets/<id>/upload              the file as sent, until it is checked
    datasets/<id>/packed/<file>       the packed form (see app/datasets/packed/packed.py)

The same file sent twice by one tenant is packed and stored once: `packed_id` says under whose id.
"""

from __future__ import annotations

import errno
import re
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import ColumnElement, and_, func, insert, select, update
from sqlalchemy.orm import Session

from app.database.engine import Database
from app.database.tables import TERMINAL, DatasetRow, JobRow, new_id
from app.datasets.ingest.builtin import BUILTIN, ensure_builtin
from app.datasets.ingest.child import CheckInterrupted, CheckResult, check_in_child
from app.datasets.ingest.limits import UploadLimits
from app.datasets.ingest.synthetic import ensure_synthetic, synthetic_bytes
from app.datasets.packed.packed import MANIFEST, PACKED, Manifest, ensure_packed, hold_lock, packed_files
from app.datasets.packed.resizing import prepare_pictures
from app.errors import (
    DataInvalid,
    DataUnavailable,
    DiskFull,
    Fault,
    InUse,
    InvalidSpec,
    JsonValue,
    NotFound,
    ObjectNotFound,
    StorageFull,
    Unavailable,
)
from app.jobs import outbox
from app.jobs.references import MOST_USERS_NAMED
from app.settings import Settings
from app.spec.data import DataFacts, DataSpec, synthetic_facts
from app.storage import Storage

FORMATS = ("auto", "image_folder", "npz", "cifar", "idx")
PAGE_LIMIT = 200
ID = re.compile(r"ds_[0-9a-z]{26}", re.ASCII)
FULL = {errno.ENOSPC, errno.EDQUOT}

log = structlog.get_logger()


@dataclass(frozen=True)
class DatasetView:
    """An uploaded data set; it has a `manifest` when it is `ready`, and `problems` of files that cannot be used."""

    id: str
    name: str
    state: str
    format: str
    manifest: Manifest | None
    problems: tuple[dict[str, str], ...]
    size_bytes: int
    sha256: str
    created_at: datetime

    def document(self) -> dict[str, JsonValue]:
        """The data set as the API shows it."""
        packed = self.manifest
        shape: list[JsonValue] | None = None
        if packed is not None and packed.example_shape is not None:
            shape = list(packed.example_shape)
        return {
            "id": self.id,
            "name": self.name,
            "state": self.state,
            "format": self.format,
            "splits": None if packed is None else {"train": packed.train, "test": packed.test},
            "classes": [] if packed is None else list(packed.classes),
            "shape": shape,
            "dtype": None if packed is None else packed.dtype,
            "held_out": None if packed is None else packed.held_out,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "problems": [dict(problem) for problem in self.problems],
            "notes": [] if packed is None else list(packed.notes),
            "created_at": self.created_at.isoformat().replace("+00:00", "Z"),
        }


def upload_key(dataset_id: str) -> str:
    """The key of an upload that is not checked yet."""
    return f"datasets/{dataset_id}/upload"


def packed_prefix(packed_id: str) -> str:
    """The prefix of the packed files, `packed_id` being the data set that packed them."""
    return f"datasets/{packed_id}/packed/"


def register_upload(
    db: Database, storage: Storage, tenant: str, path: Path, *, name: str, kind: str, size_bytes: int, sha256: str
) -> DatasetView:
    """Store the received file at `path`, then insert its data set in state `checking`; returns it.

    Raises Unavailable, StorageFull.
    """
    dataset_id = new_id("ds")
    storage.put_file(upload_key(dataset_id), path)
    with db.write() as session:
        session.execute(
            insert(DatasetRow).values(
                id=dataset_id,
                tenant_id=tenant,
                name=name,
                state="checking",
                format=kind,
                problems=[],
                notes=[],
                size_bytes=size_bytes,
                sha256=sha256,
                created_at=db.now(),
            )
        )
        return _require_dataset(session, tenant, dataset_id)


def get_dataset(db: Database, tenant: str, dataset_id: str) -> DatasetView:
    """An uploaded data set. Raises NotFound."""
    with db.read() as session:
        return _require_dataset(session, tenant, dataset_id)


def list_datasets(
    db: Database, tenant: str, *, limit: int = PAGE_LIMIT, before: str | None = None
) -> tuple[list[DatasetView], str | None]:
    """A page of the tenant's data sets, newest first, and the `before` of the next page (None: this is the last)."""
    limit = min(limit, PAGE_LIMIT)
    wanted = select(DatasetRow).where(_visible(tenant))
    if before is not None:
        wanted = wanted.where(DatasetRow.id < before)
    with db.read() as session:
        rows = session.scalars(wanted.order_by(DatasetRow.id.desc()).limit(limit + 1)).all()
    views = [_view(row) for row in rows[:limit]]
    return views, views[-1].id if len(rows) > limit else None


def delete_dataset(db: Database, tenant: str, dataset_id: str) -> None:
    """Hide a data set at once and remove its objects soon after. Workers drop their copies when they fetch another one.

    Raises NotFound; InUse while a job that has not finished refers to it.
    """
    with db.write() as session:
        _require_dataset(session, tenant, dataset_id)
        row = session.scalar(select(DatasetRow).where(DatasetRow.id == dataset_id, _visible(tenant)).with_for_update())
        if row is None:
            raise NotFound("there is no such data set")
        users = session.scalars(
            select(JobRow.id)
            .where(JobRow.dataset == dataset_id, JobRow.state.not_in(TERMINAL))
            .order_by(JobRow.id)
            .limit(MOST_USERS_NAMED)
        ).all()
        if users:
            raise InUse(f"jobs that have not finished use the data set: {', '.join(users)}; cancel them or wait")
        session.execute(update(DatasetRow).where(DatasetRow.id == dataset_id).values(deleted_at=db.now()))
        for owner in {dataset_id, row.packed_id or dataset_id}:
            sharers = and_(DatasetRow.packed_id == owner, DatasetRow.deleted_at.is_(None))
            if not session.scalar(select(func.count()).select_from(DatasetRow).where(sharers)):
                outbox.post_errand(session, db, "delete_prefix", f"datasets/{owner}/")


def read_facts(db: Database, tenant: str, data: DataSpec) -> DataFacts:
    """The facts of a data set that a plan depends on. Synthetic data have no shape yet, `()`: they take the job's.

    Raises InvalidSpec with a pointer into the job where the data set is unknown or cannot be used.
    """
    if data.synthetic is not None:
        return synthetic_facts(data.synthetic, ())
    assert data.dataset is not None
    if data.dataset in BUILTIN:
        return BUILTIN[data.dataset].facts
    try:
        view = get_dataset(db, tenant, data.dataset)
    except NotFound as error:
        names = ", ".join(sorted(BUILTIN))
        message = f"there is no such data set: use a built-in name ({names}) or the id of an uploaded one"
        raise InvalidSpec([Fault("/data/dataset", message)]) from error
    if view.manifest is None:
        why = {
            "checking": "is still being checked: try again in a moment",
            "rejected": "was rejected: see its problems",
        }
        raise InvalidSpec([Fault("/data/dataset", f"the data set {why[view.state]}")])
    return view.manifest.facts()


def list_pending(db: Database) -> list[str]:
    """Ids of data sets that wait for their check or whose check was interrupted, oldest first, of all tenants."""
    with db.read() as session:
        pending = and_(DatasetRow.state == "checking", DatasetRow.deleted_at.is_(None))
        return list(session.scalars(select(DatasetRow.id).where(pending).order_by(DatasetRow.id)))


def check_upload(
    db: Database, storage: Storage, settings: Settings, dataset_id: str, *, stopping: threading.Event | None = None
) -> None:
    """Check and pack an upload in a child process, store the packed form, end its state `checking`.

    It may be called twice, also at once, and after a crash: on one machine the second caller waits and finds it done,
    on two machines the first to finish wins. If the store or the database is away, or `stopping` is set, the state
    stays `checking`, and `list_pending` names it.
    """
    work = settings.cache / "checks" / dataset_id
    with hold_lock(work.with_name(f".{dataset_id}.lock")):  # the file stays: without it a third caller would not wait
        try:
            if not _share_packed(db, dataset_id):
                shutil.rmtree(work, ignore_errors=True)  # left by a killed process
                work.mkdir()
                _check_and_pack(db, storage, settings, dataset_id, work, stopping)
        except (Unavailable, CheckInterrupted) as error:
            log.warning("upload not checked yet", dataset=dataset_id, reason=str(error) or type(error).__name__)
        except OSError as error:
            if error.errno not in FULL:
                raise
            log.error("upload not checked yet", dataset=dataset_id, reason=f"no space under {settings.cache}")
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _share_packed(db: Database, dataset_id: str) -> bool:
    """Share the tenant's packed copy of the same file, if there is one; True if nothing is left to check."""
    with db.write() as session:
        row = session.scalar(select(DatasetRow).where(DatasetRow.id == dataset_id, DatasetRow.deleted_at.is_(None)))
        if row is None or row.state != "checking":
            return True
        twin = session.scalar(
            select(DatasetRow)
            .where(
                _visible(row.tenant_id),
                DatasetRow.sha256 == row.sha256,
                DatasetRow.state == "ready",
                DatasetRow.format.in_(FORMATS if row.format == "auto" else (row.format,)),
            )
            .order_by(DatasetRow.id)
            .limit(1)
            .with_for_update()  # its deletion waits and then sees that we share
        )
        if twin is None:
            return False
        values = {"facts": twin.facts, "format": twin.format, "problems": twin.problems, "packed_id": twin.packed_id}
        _end_check(session, db, dataset_id, "ready", notes=twin.notes, **values)
        return True


def _check_and_pack(
    db: Database,
    storage: Storage,
    settings: Settings,
    dataset_id: str,
    work: Path,
    stopping: threading.Event | None,
) -> None:
    with db.read() as session:
        row = session.scalars(select(DatasetRow).where(DatasetRow.id == dataset_id)).one()
    child = work / "child"
    child.mkdir()
    try:
        upload = _fetch_upload(storage, dataset_id, work)
    except ObjectNotFound:
        answer = CheckResult(
            None, None, ({"file": "upload", "message": "its bytes are gone from the store: send it again"},)
        )
    else:
        limits = UploadLimits(unpacked_bytes=settings.max_unpacked_bytes)
        answer = check_in_child(upload, row.format, child, limits, name=row.name, stopping=stopping)
    if answer.manifest is not None:
        answer = _store_packed(storage, dataset_id, child / PACKED, answer)
    elif answer.output:
        log.warning("the checking process wrote output", dataset=dataset_id, output=answer.output)
    with db.write() as session:
        if answer.manifest is None:
            done = _end_check(session, db, dataset_id, "rejected", problems=list(answer.problems))
        else:
            done = _end_check(
                session,
                db,
                dataset_id,
                "ready",
                problems=list(answer.problems),
                format=answer.format,
                facts=answer.manifest.document(),
                notes=list(answer.manifest.notes),
                packed_id=dataset_id,
            )
        if not done and session.scalar(select(DatasetRow.deleted_at).where(DatasetRow.id == dataset_id)) is not None:
            outbox.post_errand(session, db, "delete_prefix", f"datasets/{dataset_id}/")  # deleted while it was packed


def _fetch_upload(storage: Storage, dataset_id: str, work: Path) -> Path:
    """The upload as a file of this machine. Raises ObjectNotFound, Unavailable."""
    local = storage.local_path(upload_key(dataset_id))
    if local is None:
        local = work / "upload"
        storage.fetch(upload_key(dataset_id), local)
    return local


def _store_packed(storage: Storage, dataset_id: str, folder: Path, answer: CheckResult) -> CheckResult:
    """Store the packed files, the manifest last; returns the answer, or a refusal where they do not fit there."""
    try:
        for path in [*packed_files(folder), folder / MANIFEST]:
            storage.put_file(packed_prefix(dataset_id) + path.name, path)
    except StorageFull:
        message = "the service's object store is full: free space there, then send it again"
        return CheckResult(None, None, ({"file": "upload", "message": message},))
    return answer


def _end_check(session: Session, db: Database, dataset_id: str, state: str, **values: Any) -> bool:
    """End the state `checking` and remove the upload's bytes; False if another process did or the row was deleted."""
    waiting = and_(DatasetRow.id == dataset_id, DatasetRow.state == "checking", DatasetRow.deleted_at.is_(None))
    done = session.execute(update(DatasetRow).where(waiting).values(state=state, **values).returning(DatasetRow.id))
    if done.first() is None:
        return False
    outbox.post_errand(session, db, "delete_prefix", upload_key(dataset_id))
    return True


def materialize_data(
    data: DataSpec, input_shape: Sequence[int] | None, *, db: Database, storage: Storage, settings: Settings
) -> Path:
    """Make the packed folder of a job's data on this machine's disk, if it is missing; several workers may call it.

    Returns its path. Built-in data sets come from their sources, uploads from the object store (hard links where it is
    a local folder), synthetic ones are drawn for the job's `input_shape` `(C, *spatial)`; pictures are resized to it
    here, before the training.

    Raises DataUnavailable where the data set was deleted or cannot be obtained, DataInvalid, DiskFull; Unavailable
    while the store or the database is away.
    """
    try:
        if data.synthetic is not None:
            if input_shape is None:
                raise DataInvalid("synthetic data take their shape from the job", pointer="/model/input_shape")
            size = synthetic_bytes(data.synthetic, tuple(input_shape))
            if size > settings.max_unpacked_bytes:
                limit = settings.max_unpacked_bytes
                raise DataInvalid(f"the synthetic images would take {size} bytes; the limit is {limit}")
            return ensure_synthetic(data.synthetic, tuple(input_shape), settings.cache)
        assert data.dataset is not None
        if data.dataset in BUILTIN:
            return ensure_builtin(data.dataset, settings)
        folder = _materialize_upload(data.dataset, db=db, storage=storage, settings=settings)
        if input_shape is not None:
            prepare_pictures(folder, tuple(input_shape))
        return folder
    except StorageFull as error:
        raise DiskFull(f"no space for the data set under {settings.cache}") from error
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"no space for the data set under {settings.cache}") from error
        raise


def _materialize_upload(dataset_id: str, *, db: Database, storage: Storage, settings: Settings) -> Path:
    with db.read() as session:
        found = select(DatasetRow).where(DatasetRow.id == dataset_id, DatasetRow.deleted_at.is_(None))
        row = session.scalar(found)
    if row is None or row.facts is None:
        what = "was deleted before the job ran" if row is None else "is not ready"
        raise DataUnavailable(
            f"the data set {dataset_id} {what}",
            pointer="/data/dataset",
            hint="upload it again and send a new job with its new id",
        )
    manifest = Manifest.from_document(row.facts)
    prefix = packed_prefix(row.packed_id or dataset_id)
    folder = settings.cache / "datasets" / manifest.sha256
    if not (folder / MANIFEST).exists():
        drop_deleted_copies(db, settings)

    def build(partial: Path) -> None:
        for stored in storage.list(prefix):
            with suppress(ObjectNotFound):  # deleted meanwhile: then the manifest, which is stored last, is missing
                storage.link_or_fetch(stored.key, partial / stored.key.removeprefix(prefix))
        if not (partial / MANIFEST).exists():
            raise DataUnavailable(
                f"the bytes of the data set {dataset_id} are gone from the object store",
                pointer="/data/dataset",
                hint="upload it again and send a new job with its new id",
            )

    return ensure_packed(folder, build)


def drop_deleted_copies(db: Database, settings: Settings) -> list[str]:
    """Remove the folders of cached uploads that no data set has any more; returns their content hashes.

    None of them is in use: a data set cannot be deleted before the jobs that refer to it are over.
    """
    folder = settings.cache / "datasets"
    present = {path.name for path in folder.iterdir() if len(path.name) == 64} if folder.exists() else set()
    if not present:
        return []
    with db.read() as session:
        rows = session.scalars(select(DatasetRow.facts).where(DatasetRow.deleted_at.is_(None)))
        present -= {facts["sha256"] for facts in rows if facts is not None}
    for sha256 in present:
        shutil.rmtree(folder / sha256, ignore_errors=True)
    return sorted(present)


def _visible(tenant: str) -> ColumnElement[bool]:
    return and_(DatasetRow.tenant_id == tenant, DatasetRow.deleted_at.is_(None))


def _require_dataset(session: Session, tenant: str, dataset_id: str) -> DatasetView:
    if not ID.fullmatch(dataset_id):  # it comes from a URL: a driver may not even take it as a parameter
        raise NotFound("there is no such data set")
    row = session.scalar(select(DatasetRow).where(DatasetRow.id == dataset_id, _visible(tenant)))
    if row is None:
        raise NotFound("there is no such data set")
    return _view(row)


def _view(row: DatasetRow) -> DatasetView:
    return DatasetView(
        id=row.id,
        name=row.name,
        state=row.state,
        format=row.format,
        manifest=None if row.facts is None else Manifest.from_document(row.facts),
        problems=tuple(row.problems),
        size_bytes=row.size_bytes,
        sha256=row.sha256 or "",
        created_at=row.created_at,
    )
