"""Uploaded data sets brought to any point of their lives."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from app.database.engine import Database
from app.datasets import registry
from app.datasets.registry import DatasetView
from app.jobs.recovery import Sweeper
from app.settings import Settings
from app.storage import Storage

TENANT = "default"
PACKED_FILES = ["dataset.json", "test.images.npy", "test.labels.npy", "train.images.npy", "train.labels.npy"]


class SilentBell:
    """A doorbell that nobody hears."""

    def ring(self, job_id: str) -> None:
        return

    def close(self) -> None:
        return


def register(db: Database, storage: Storage, path: Path, *, tenant: str = TENANT, kind: str = "auto") -> DatasetView:
    """A data set in state `checking`."""
    data = path.read_bytes()
    return registry.register_upload(
        db,
        storage,
        tenant,
        path,
        name="mine",
        kind=kind,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def ready(db: Database, storage: Storage, settings: Settings, path: Path, **more: Any) -> DatasetView:
    """A data set whose check is over."""
    view = register(db, storage, path, **more)
    registry.check_upload(db, storage, settings, view.id)
    return registry.get_dataset(db, more.get("tenant", TENANT), view.id)


def check_pending(db: Database, storage: Storage, settings: Settings) -> None:
    """Check every data set whose check is not over, as the API does at its start."""
    for dataset_id in registry.list_pending(db):
        registry.check_upload(db, storage, settings, dataset_id)


def sweep(db: Database, storage: Storage, settings: Settings) -> None:
    """Run the errands that wait in the outbox, collect all garbage."""
    sweeper = Sweeper(db, storage, SilentBell(), settings)
    sweeper.sweep()
    sweeper.collect_garbage(timedelta(seconds=-5))


def keys(storage: Storage) -> list[str]:
    """The keys of all stored data sets, without their common prefix."""
    return [stored.key.removeprefix("datasets/") for stored in storage.list("datasets/")]
