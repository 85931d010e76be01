"""How an attempt ends that goes wrong outside the trainer: the job always gets an end that says why, or its next turn."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.database.engine import Database
from app.errors import DataInvalid, StorageFull, Unavailable
from app.jobs import attempts, commands, queries
from app.jobs.events import list_events
from app.jobs.queries import JobView
from app.settings import Settings
from app.storage import LocalStorage
from tests.support.jobs import lives
from worker.supervision import supervisor, transfers
from worker.supervision.attempt import AttemptRunner
from worker.supervision.trainer_pool import TrainerPool

SPEC: dict[str, Any] = {
    "spec_version": 1,
    "data": {"synthetic": {"classes": 2, "train": 8, "test": 4, "seed": 1}},
    "model": {"preset": "simple_cnn", "input_shape": [1, 8, 8]},
}


class Store(LocalStorage):
    """A folder whose reads are preceded by `before`."""

    def __init__(self, root: Path, before: Callable[[], None] = lambda: None) -> None:
        super().__init__(root)
        self.before = before

    def fetch(self, key: str, path: Path) -> None:
        self.before()
        super().fetch(key, path)


@pytest.fixture
def trainer_pool(tmp_path: Path) -> Iterator[TrainerPool]:
    """A pool whose folder is a file: no trainer starts."""
    (tmp_path / "blocked").touch()
    made = TrainerPool(tmp_path / "blocked", spares=0)
    yield made
    made.close()


def run_one(
    db: Database,
    trainer_pool: TrainerPool,
    folder: Path,
    *,
    store: Store | None = None,
    spec: dict[str, Any] = SPEC,
    scratch: Path | None = None,
    meanwhile: Callable[[str], None] = lambda job_id: None,
    stopping: Callable[[], bool] = lambda: False,
) -> JobView:
    """The job after its second attempt, which has a checkpoint to fetch."""
    job_id = commands.submit_job(db, tenant=lives.TENANT, spec=spec)[0].id
    first = lives.claim(db, job_id)
    lives.checkpoint(db, first, 1)
    attempts.release(db, first)
    run = AttemptRunner(
        lives.claim(db, job_id),
        db=db,
        storage=store or Store(folder / "objects"),
        settings=Settings(home=folder, renew_s=0.1),
        trainer_pool=trainer_pool,
        scratch=scratch or folder / "scratch",
        worker_id="w",
        slot=0,
        stopping=stopping,
    )
    thread = threading.Thread(target=run.run)
    thread.start()
    meanwhile(job_id)
    thread.join(20)
    assert not thread.is_alive()
    return queries.get_job(db, lives.TENANT, job_id)


def last_event(db: Database, job: JobView) -> str:
    return list_events(db, lives.TENANT, job.id)[-1].message


def refuse(error: Exception) -> Callable[[], None]:
    def before() -> None:
        raise error

    return before


def test_a_store_that_stays_away_gives_the_job_back_without_a_crash(
    db: Database, trainer_pool: TrainerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "RETRY_FOR_S", 0.0)
    store = Store(tmp_path / "objects", refuse(Unavailable("the object store does not answer: try again")))
    job = run_one(db, trainer_pool, tmp_path, store=store)
    assert (job.state, job.crashes) == ("queued", 0)
    assert last_event(db, job) == "the object store does not answer; the job goes on from its checkpoint"


def test_a_store_that_stays_full_fails_the_job(
    db: Database, trainer_pool: TrainerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "RETRY_FOR_S", 0.0)
    job = run_one(db, trainer_pool, tmp_path, store=Store(tmp_path / "objects", refuse(StorageFull())))
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == "disk_full"


def test_a_failed_job_does_not_tell_where_this_host_keeps_its_files(
    db: Database, trainer_pool: TrainerPool, tmp_path: Path
) -> None:
    store = Store(tmp_path / "objects", refuse(DataInvalid(f"{tmp_path}/cache/x holds no packed data set")))
    job = run_one(db, trainer_pool, tmp_path, store=store)
    assert job.error is not None
    assert job.error["message"] == "<home>/cache/x holds no packed data set"


def test_a_deleted_data_set_fails_the_job(db: Database, trainer_pool: TrainerPool, tmp_path: Path) -> None:
    gone = {"dataset": "ds_00000000000000000000000000"}
    job = run_one(db, trainer_pool, tmp_path, spec={**SPEC, "data": gone})
    assert job.error is not None
    assert (job.error["code"], job.error["pointer"]) == ("data_unavailable", "/data/dataset")


def test_a_deleted_network_that_the_job_needs_fails_it(db: Database, trainer_pool: TrainerPool, tmp_path: Path) -> None:
    model = {"job": "job_" + "0" * 26, "input_shape": [1, 8, 8]}
    job = run_one(db, trainer_pool, tmp_path, spec={**SPEC, "model": model})
    assert job.error is not None
    assert (job.error["code"], job.error["pointer"]) == ("source_unavailable", "/model/job")
    assert "submit the job again" in job.error["hint"]


def test_a_trainer_that_cannot_be_started_counts_as_a_crash(
    db: Database, trainer_pool: TrainerPool, tmp_path: Path
) -> None:
    job = run_one(db, trainer_pool, tmp_path)
    assert (job.state, job.crashes) == ("queued", 1)
    assert last_event(db, job).startswith("the worker failed: ")
    assert str(tmp_path) not in last_event(db, job)


def test_a_scratch_folder_that_cannot_be_made_counts_as_a_crash(
    db: Database, trainer_pool: TrainerPool, tmp_path: Path
) -> None:
    job = run_one(db, trainer_pool, tmp_path, scratch=tmp_path / "blocked")
    assert (job.state, job.crashes) == ("queued", 1)


@pytest.mark.parametrize(
    ("act", "state"), [(commands.cancel_job, "cancelled"), (commands.pause_job, "paused"), (None, "queued")]
)
def test_nobody_waits_for_a_slow_download(
    db: Database, trainer_pool: TrainerPool, tmp_path: Path, act: Callable[[Database, str, str], Any] | None, state: str
) -> None:
    arrived, stopping, over = threading.Event(), threading.Event(), threading.Event()

    def download() -> None:
        arrived.set()
        over.wait(30)

    def meanwhile(job_id: str) -> None:
        assert arrived.wait(10)
        if act is None:
            stopping.set()
        else:
            act(db, lives.TENANT, job_id)

    try:
        job = run_one(
            db,
            trainer_pool,
            tmp_path,
            store=Store(tmp_path / "objects", download),
            meanwhile=meanwhile,
            stopping=stopping.is_set,
        )
    finally:
        over.set()
    assert (job.state, job.crashes) == (state, 0)


def test_a_trainer_pool_outlives_a_spare_that_cannot_be_started(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.touch()
    trainer_pool = TrainerPool(scratch, spares=1)
    with pytest.raises(FileExistsError):
        trainer_pool.take_trainer()
    scratch.unlink()
    trainer = trainer_pool.take_trainer()
    trainer.discard()
    trainer_pool.close()
    assert list(scratch.iterdir()) == []


def test_a_worker_removes_the_scratch_of_dead_workers_of_its_host_only(tmp_path: Path) -> None:
    host, dead = platform.node(), 2**22 + 1  # above the largest pid
    for name in (f"{host}.{dead}", f"{host}.{os.getppid()}", f"elsewhere.{dead}", f"{host}.{os.getpid()}"):
        (tmp_path / name / "job-1").mkdir(parents=True)
    own = supervisor._make_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{host}.{os.getppid()}", f"elsewhere.{dead}", own.name]
    )
    assert list(own.iterdir()) == []
