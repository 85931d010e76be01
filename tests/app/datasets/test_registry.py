"""The registry of data sets where things go wrong: bad uploads, crashes, full and absent stores, bytes that are gone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from app.database.engine import Database
from app.datasets import registry
from app.errors import DataUnavailable, DiskFull, InvalidSpec, StorageFull, Unavailable
from app.settings import Settings
from app.spec.data import DataSpec
from app.storage import LocalStorage, Storage
from tests.support.services.datasets import TENANT, check_pending, keys, ready, register, sweep
from tests.support.services.uploads import class_folders, images, labels, npz, zipped


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open((tmp_path / "objects").as_uri())


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    return npz(tmp_path / "upload", x_train=images(40), y_train=labels(40))


def test_a_bad_upload_ends_rejected_with_problems_and_leaves_nothing(
    db: Database, storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "bad").write_bytes(b"this is no archive")
    view = ready(db, storage, settings, tmp_path / "bad")
    assert (view.state, view.manifest) == ("rejected", None)
    assert view.problems[0]["file"] == "upload"
    assert "neither a zip nor a tar" in view.problems[0]["message"]
    assert view.document()["splits"] is None
    with pytest.raises(InvalidSpec, match="was rejected: see its problems") as refusal:
        registry.read_facts(db, TENANT, DataSpec(dataset=view.id))
    assert refusal.value.faults[0].pointer == "/data/dataset"
    with pytest.raises(DataUnavailable, match="is not ready"):
        registry.materialize_data(DataSpec(dataset=view.id), None, db=db, storage=storage, settings=settings)
    sweep(db, storage, settings)
    assert keys(storage) == []
    assert not any(path.is_dir() for path in (settings.cache / "checks").iterdir())


def test_pictures_are_resized_before_the_job_gets_them(
    db: Database, storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    members = {**class_folders(6, root="train/"), **class_folders(2, root="test/")}
    view = ready(db, storage, settings, zipped(tmp_path / "u", members))
    assert view.document()["shape"] == [8, 8, 3]
    folder = registry.materialize_data(DataSpec(dataset=view.id), (1, 5, 6), db=db, storage=storage, settings=settings)
    assert np.load(folder / "train.1x5x6.images.npy").shape == (12, 1, 5, 6)


def test_what_a_killed_service_left_unchecked_is_checked_at_the_next_start(
    db: Database, storage: Storage, settings: Settings, upload: Path
) -> None:
    view = register(db, storage, upload)
    left = settings.cache / "checks" / view.id / "child"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    check_pending(db, storage, settings)
    assert registry.get_dataset(db, TENANT, view.id).state == "ready"


def test_two_machines_that_check_at_once_end_in_one_answer(
    db: Database, storage: Storage, settings: Settings, upload: Path, tmp_path: Path
) -> None:
    view = register(db, storage, upload)
    other = Settings(home=tmp_path / "other machine")
    with ThreadPoolExecutor(2) as threads:
        for check in [
            threads.submit(registry.check_upload, db, storage, machine, view.id) for machine in (settings, other)
        ]:
            check.result()
    assert registry.get_dataset(db, TENANT, view.id).state == "ready"
    sweep(db, storage, settings)
    assert len(keys(storage)) == 5


class FullStorage(LocalStorage):
    """A store whose disk is full for packed files, or that is away."""

    error: type[Unavailable] = StorageFull

    def put_file(self, key: str, path: Path) -> None:
        if "/packed/" in key:
            raise self.error
        super().put_file(key, path)


class AwayStorage(FullStorage):
    """A store that is away when the packed files come."""

    error = Unavailable


def test_a_full_store_rejects_and_one_that_is_away_waits(
    db: Database, settings: Settings, upload: Path, tmp_path: Path
) -> None:
    full = ready(db, FullStorage(tmp_path / "full"), settings, upload)
    assert full.state == "rejected"
    assert "object store is full" in full.problems[0]["message"]
    away = AwayStorage(tmp_path / "away")
    waiting = ready(db, away, settings, upload)
    assert waiting.state == "checking"
    check_pending(db, Storage.open((tmp_path / "away").as_uri()), settings)
    assert registry.get_dataset(db, TENANT, waiting.id).state == "ready"


def test_an_upload_whose_bytes_are_gone_is_rejected(
    db: Database, storage: Storage, settings: Settings, upload: Path
) -> None:
    view = register(db, storage, upload)
    storage.delete(registry.upload_key(view.id))
    registry.check_upload(db, storage, settings, view.id)
    assert "send it again" in registry.get_dataset(db, TENANT, view.id).problems[0]["message"]


def test_a_stop_of_the_service_leaves_the_check_for_the_next_start(
    db: Database, storage: Storage, settings: Settings, upload: Path
) -> None:
    view = register(db, storage, upload)
    stopping = threading.Event()
    stopping.set()
    registry.check_upload(db, storage, settings, view.id, stopping=stopping)
    assert registry.list_pending(db) == [view.id]


def test_a_data_set_deleted_while_it_is_checked_leaves_nothing(
    db: Database, settings: Settings, upload: Path, tmp_path: Path
) -> None:
    class DeletingStorage(LocalStorage):
        def put_file(self, key: str, path: Path) -> None:
            if key.endswith("dataset.json"):
                registry.delete_dataset(db, TENANT, key.split("/")[1])
            super().put_file(key, path)

    storage = DeletingStorage(tmp_path / "objects")
    view = register(db, storage, upload)
    registry.check_upload(db, storage, settings, view.id)
    sweep(db, storage, settings)
    assert keys(storage) == []


def test_packed_bytes_that_are_gone_end_the_job_with_a_sentence(
    db: Database, storage: Storage, settings: Settings, upload: Path
) -> None:
    view = ready(db, storage, settings, upload)
    storage.delete_prefix(registry.packed_prefix(view.id))
    with pytest.raises(DataUnavailable, match="are gone from the object store"):
        registry.materialize_data(DataSpec(dataset=view.id), None, db=db, storage=storage, settings=settings)
    assert not list((settings.cache / "datasets").glob("[0-9a-f]*"))


def test_local_objects_are_linked_not_copied(db: Database, storage: Storage, settings: Settings, upload: Path) -> None:
    view = ready(db, storage, settings, upload)
    folder = registry.materialize_data(DataSpec(dataset=view.id), None, db=db, storage=storage, settings=settings)
    stored = storage.local_path(registry.packed_prefix(view.id) + "train.images.npy")
    assert stored is not None
    assert stored.samefile(folder / "train.images.npy")
    storage.delete_prefix(f"datasets/{view.id}/")
    assert np.load(folder / "train.images.npy").shape == (36, 8, 8), "a job that runs keeps its data"


def test_a_worker_drops_what_was_deleted_when_it_needs_something_new(
    db: Database, storage: Storage, settings: Settings, upload: Path, tmp_path: Path
) -> None:
    old = ready(db, storage, settings, upload)
    folder = registry.materialize_data(DataSpec(dataset=old.id), None, db=db, storage=storage, settings=settings)
    new = ready(db, storage, settings, npz(tmp_path / "new", x_train=images(40, seed=5), y_train=labels(40)))
    assert folder.exists()
    registry.delete_dataset(db, TENANT, old.id)
    registry.materialize_data(DataSpec(dataset=new.id), None, db=db, storage=storage, settings=settings)
    assert not folder.exists()


def test_a_full_disk_is_said_to_be_full(db: Database, settings: Settings, upload: Path, tmp_path: Path) -> None:
    class NoSpace(LocalStorage):
        def link_or_fetch(self, key: str, path: Path) -> None:
            raise StorageFull

    storage = NoSpace(tmp_path / "objects")
    view = ready(db, storage, settings, upload)
    with pytest.raises(DiskFull, match="no space for the data set under"):
        registry.materialize_data(DataSpec(dataset=view.id), None, db=db, storage=storage, settings=settings)
