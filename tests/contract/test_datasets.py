"""The registry of data sets over every database and object store: arrival, check, use, deletion, crashes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select

from app.database.engine import Database
from app.database.tables import DatasetRow, OutboxRow
from app.datasets import registry
from app.datasets.packed.packed import read_manifest
from app.errors import DataInvalid, DataUnavailable, InUse, InvalidSpec, NotFound
from app.jobs import commands
from app.settings import Settings
from app.spec.data import DataFacts, DataSpec, Synthetic
from app.storage import Storage
from tests.support.services.datasets import PACKED_FILES, TENANT, keys, ready, register, sweep
from tests.support.services.uploads import images, labels, npz


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    return npz(tmp_path / "upload", x_train=images(40), y_train=labels(40))


def submit(db: Database, dataset: str) -> str:
    spec: dict[str, Any] = {"spec_version": 1, "data": {"dataset": dataset}, "model": {"preset": "simple_cnn"}}
    return commands.submit_job(db, tenant=TENANT, spec=spec)[0].id


def facts_of(db: Database, dataset_id: str) -> DataFacts:
    return registry.read_facts(db, TENANT, DataSpec(dataset=dataset_id))


def test_an_upload_is_checked_used_and_deleted(
    db: Database, storage: Storage, settings: Settings, upload: Path
) -> None:
    arrived = register(db, storage, upload)
    assert (arrived.state, arrived.manifest, registry.list_pending(db)) == ("checking", None, [arrived.id])
    with pytest.raises(InvalidSpec, match="is still being checked"):
        facts_of(db, arrived.id)

    registry.check_upload(db, storage, settings, arrived.id)
    view = registry.get_dataset(db, TENANT, arrived.id)
    assert (view.state, view.format, view.problems, registry.list_pending(db)) == ("ready", "npz", (), [])
    assert facts_of(db, view.id) == DataFacts("mine", (8, 8), 2, ("0", "1"), 36, 4, "uint8")
    document = view.document()
    assert (document["splits"], document["shape"], document["classes"]) == (
        {"train": 36, "test": 4},
        [8, 8],
        ["0", "1"],
    )
    sweep(db, storage, settings)
    assert keys(storage) == [f"{view.id}/packed/{name}" for name in PACKED_FILES], "the upload itself is gone"

    folder = registry.materialize_data(DataSpec(dataset=view.id), None, db=db, storage=storage, settings=settings)
    assert read_manifest(folder) == view.manifest
    assert np.load(folder / "train.images.npy").shape == (36, 8, 8)
    assert (
        registry.materialize_data(DataSpec(dataset=view.id), None, db=db, storage=storage, settings=settings) == folder
    )

    job = submit(db, view.id)
    with pytest.raises(InUse, match=job):
        registry.delete_dataset(db, TENANT, view.id)
    commands.cancel_job(db, TENANT, job)
    registry.delete_dataset(db, TENANT, view.id)
    with pytest.raises(NotFound):
        registry.delete_dataset(db, TENANT, view.id)
    with pytest.raises(NotFound):
        registry.get_dataset(db, TENANT, view.id)
    sweep(db, storage, settings)
    assert keys(storage) == []
    with pytest.raises(DataUnavailable, match="was deleted before the job ran"):
        registry.materialize_data(DataSpec(dataset=view.id), None, db=db, storage=storage, settings=settings)


def test_the_same_file_twice_is_stored_once_until_both_are_deleted(
    db: Database, storage: Storage, settings: Settings, upload: Path
) -> None:
    first = ready(db, storage, settings, upload)
    second = ready(db, storage, settings, upload, kind="npz")
    assert (second.state, second.manifest) == ("ready", first.manifest)
    sweep(db, storage, settings)
    assert keys(storage) == [f"{first.id}/packed/{name}" for name in PACKED_FILES]

    registry.delete_dataset(db, TENANT, first.id)
    sweep(db, storage, settings)
    assert len(keys(storage)) == 5, "the second one still uses them"
    registry.materialize_data(DataSpec(dataset=second.id), None, db=db, storage=storage, settings=settings)
    third = ready(db, storage, settings, upload)
    assert third.state == "ready"
    registry.delete_dataset(db, TENANT, second.id)
    registry.delete_dataset(db, TENANT, third.id)
    sweep(db, storage, settings)
    assert keys(storage) == []


def test_another_tenants_data_sets_do_not_exist(
    db: Database, local_storage: Storage, settings: Settings, upload: Path
) -> None:
    theirs = ready(db, local_storage, settings, upload, tenant="other")
    mine = ready(db, local_storage, settings, upload)
    assert [view.id for view in registry.list_datasets(db, TENANT)[0]] == [mine.id]
    for call in (registry.get_dataset, registry.delete_dataset):
        with pytest.raises(NotFound):
            call(db, TENANT, theirs.id)
    with pytest.raises(InvalidSpec, match="there is no such data set"):
        facts_of(db, theirs.id)
    with db.read() as session:
        assert set(session.scalars(select(DatasetRow.packed_id))) == {theirs.id, mine.id}, "nothing is shared"


@pytest.mark.parametrize("junk", ["", "x", "ds_", "ds_" + "0" * 25 + "\x00", "../x", "ds_" + "\u0661" * 26, "x" * 300])
def test_an_id_that_is_none_is_not_found(db: Database, junk: str) -> None:
    with pytest.raises(NotFound):
        registry.get_dataset(db, TENANT, junk)
    with pytest.raises(NotFound):
        registry.delete_dataset(db, TENANT, junk)


def test_pages_are_newest_first_and_end(db: Database, local_storage: Storage, upload: Path) -> None:
    made = [register(db, local_storage, upload).id for _ in range(5)]
    found: list[str] = []
    before = None
    for _ in range(3):
        page, before = registry.list_datasets(db, TENANT, limit=2, before=before)
        found += [view.id for view in page]
    assert before is None
    assert sorted(found) == sorted(made)
    assert found == sorted(made, reverse=True)


def test_two_checks_at_once_do_the_work_once(
    db: Database, local_storage: Storage, settings: Settings, upload: Path
) -> None:
    view = register(db, local_storage, upload)
    with ThreadPoolExecutor(2) as threads:
        for check in [threads.submit(registry.check_upload, db, local_storage, settings, view.id) for _ in range(2)]:
            check.result()
    assert registry.get_dataset(db, TENANT, view.id).state == "ready"
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(OutboxRow)) == 1, "one of them found nothing to do"


def test_built_in_and_synthetic_data_need_no_row(db: Database, local_storage: Storage, settings: Settings) -> None:
    assert registry.read_facts(db, TENANT, DataSpec(dataset="mnist")).train == 60_000
    synthetic = DataSpec(synthetic=Synthetic(classes=3, train=9, test=3))
    assert registry.read_facts(db, TENANT, synthetic).classes == 3
    folder = registry.materialize_data(synthetic, (1, 4, 4), db=db, storage=local_storage, settings=settings)
    assert np.load(folder / "train.images.npy").shape == (9, 1, 4, 4)
    with pytest.raises(DataInvalid, match="take their shape from the job"):
        registry.materialize_data(synthetic, None, db=db, storage=local_storage, settings=settings)
    large = DataSpec(synthetic=Synthetic(train=1_000_000))
    with pytest.raises(DataInvalid, match="the limit is"):
        registry.materialize_data(large, (3, 512, 512), db=db, storage=local_storage, settings=settings)
    with pytest.raises(InvalidSpec, match=r"built-in name \(fashion-mnist, mnist\)"):
        facts_of(db, "cifar-1000")
