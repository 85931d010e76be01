"""The sweeps: what is taken from whom, rung for, deleted, forgotten."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from app.database.engine import Database
from app.database.tables import IdempotencyKeyRow, OutboxRow, WorkerRow
from app.errors import LostOwnership, Unavailable
from app.jobs import attempts, commands, outbox, queries, workers
from app.jobs.artifacts import artifact_key, checkpoint_key, list_artifacts, state_key
from app.jobs.recovery import Sweeper
from app.settings import Settings
from app.storage import LocalStorage, Storage
from tests.support.jobs import lives
from tests.support.jobs.lives import SPEC, TENANT, event_types
from tests.support.services.uploads import put_bytes

NO_AGE = timedelta(seconds=-5)  # the store's clock may be a little ahead


class CountingBell:
    """A doorbell that remembers its rings."""

    def __init__(self) -> None:
        self.rung: list[str] = []

    def ring(self, job_id: str) -> None:
        self.rung.append(job_id)

    def close(self) -> None:
        self.rung.clear()


class AwayStorage(LocalStorage):
    """A store that does not answer."""

    def list(self, prefix: str) -> list[object]:  # type: ignore[override]
        raise Unavailable


class Clock:
    """A monotonic clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def bell() -> CountingBell:
    return CountingBell()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sweeper(db: Database, local_storage: Storage, bell: CountingBell, settings: Settings, clock: Clock) -> Sweeper:
    return Sweeper(db, local_storage, bell, settings, monotonic=clock)


def test_a_job_is_reaped_when_its_lease_is_over_and_its_beat_stood_for_a_third_of_it(
    db: Database, sweeper: Sweeper, clock: Clock
) -> None:
    claim = lives.claim(db, lives.submit(db).id, lease_s=-1)
    assert sweeper.reap_silent() == []
    clock.now_s += 19.9
    assert sweeper.reap_silent() == []
    clock.now_s += 0.2
    assert sweeper.reap_silent() == [claim.job_id]
    job = queries.get_job(db, TENANT, claim.job_id)
    assert (job.state, job.crashes) == ("queued", 1)
    assert event_types(db, claim.job_id)[-1] == "worker.lost"
    with pytest.raises(LostOwnership):
        attempts.renew(db, claim, worker_id="w")


def test_a_clock_an_hour_ahead_steals_no_job_from_a_living_worker(db: Database, sweeper: Sweeper, clock: Clock) -> None:
    claim = lives.claim(db, lives.submit(db).id, lease_s=-3600)
    for _ in range(20):
        assert sweeper.reap_silent() == []
        clock.now_s += 10
        attempts.renew(db, claim, worker_id="w", lease_s=-3600)


def test_a_clock_an_hour_behind_delays_the_reaping_by_one_and_a_half_leases(
    db: Database, sweeper: Sweeper, clock: Clock
) -> None:
    claim = lives.claim(db, lives.submit(db).id, lease_s=3600)
    assert sweeper.reap_silent() == []
    clock.now_s += 89
    assert sweeper.reap_silent() == []
    clock.now_s += 1
    assert sweeper.reap_silent() == [claim.job_id]


def test_a_beat_between_the_look_and_the_taking_saves_the_job(db: Database) -> None:
    claim = lives.claim(db, lives.submit(db).id, lease_s=-1)
    attempts.renew(db, claim, worker_id="w", lease_s=-1)
    assert attempts.reap(db, claim.job_id, claim.attempt, 1, {"message": "silent"}) is None
    assert attempts.reap(db, claim.job_id, claim.attempt, 2, {"message": "silent"}) == "queued"
    assert attempts.reap(db, claim.job_id, claim.attempt, 2, {"message": "silent"}) is None


def test_a_silent_workers_job_does_what_its_user_wished(db: Database, sweeper: Sweeper, clock: Clock) -> None:
    wishes = {"cancelled": commands.cancel_job, "paused": commands.pause_job, "queued": commands.stop_job}
    claims = {state: lives.claim(db, lives.submit(db).id, lease_s=-1) for state in wishes}
    for state, act in wishes.items():
        act(db, TENANT, claims[state].job_id)
    deleted = lives.claim(db, lives.submit(db).id, lease_s=-1)
    commands.delete_job(db, TENANT, deleted.job_id)
    sweeper.reap_silent()
    clock.now_s += 20
    assert len(sweeper.reap_silent()) == 4
    assert {state: queries.get_job(db, TENANT, claims[state].job_id).state for state in wishes} == {
        s: s for s in wishes
    }
    assert {job.id for job in queries.list_jobs(db, TENANT)[0]} == {claim.job_id for claim in claims.values()}
    assert outbox_left(db) >= {f"jobs/{deleted.job_id}/", f"jobs/{claims['cancelled'].job_id}/"}


def test_rings_are_for_as_many_waiting_jobs_as_there_are_idle_slots(
    db: Database, sweeper: Sweeper, bell: CountingBell
) -> None:
    waiting = [lives.submit(db).id for _ in range(4)]
    assert sweeper.ring_for_waiting() == []
    workers.register_worker(db, "w", host="h", pid=1, slots=3, device="cpu")
    lives.claim(db, waiting[0])
    assert sweeper.ring_for_waiting() == waiting[1:3]
    assert bell.rung == waiting[1:3]


def test_errands_are_carried_out_once_and_objects_of_a_deleted_job_are_gone(
    db: Database, sweeper: Sweeper, bell: CountingBell, local_storage: Storage
) -> None:
    job_id, other = lives.submit(db).id, lives.submit(db).id
    for owner in (job_id, other):
        put_bytes(local_storage, artifact_key(owner, 1, "model.py"), b"x")
    commands.delete_job(db, TENANT, job_id)
    assert sweeper.run_errands() == 3
    assert sorted(bell.rung) == sorted([job_id, other])
    assert [stored.key for stored in local_storage.list("jobs/")] == [artifact_key(other, 1, "model.py")]
    assert sweeper.run_errands() == 0


def test_only_old_checkpoints_objects_are_deleted_not_a_step_that_begins_alike(
    db: Database, sweeper: Sweeper, local_storage: Storage
) -> None:
    claim = lives.claim(db, lives.submit(db).id)
    for step in (10, 100, 1000):
        key = checkpoint_key(claim.job_id, claim.attempt, step)
        put_bytes(local_storage, key, b"tensors")
        put_bytes(local_storage, state_key(key), b"{}")
        lives.checkpoint(db, claim, step)
    sweeper.run_errands()
    kept = [stored.key.rpartition("/")[2] for stored in local_storage.list("jobs/")]
    assert kept == [f"{step:012d}.{suffix}" for step in (100, 1000) for suffix in ("json", "safetensors")]


def test_an_errand_whose_store_is_away_comes_again_and_holds_up_no_other(
    db: Database,
    settings: Settings,
    bell: CountingBell,
    local_storage: Storage,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    job_id, waiting = lives.submit(db).id, lives.submit(db).id
    put_bytes(local_storage, artifact_key(job_id, 1, "model.py"), b"x")
    commands.delete_job(db, TENANT, job_id)
    away = Sweeper(db, AwayStorage(tmp_path_factory.mktemp("away")), bell, settings)
    assert away.run_errands() == 2
    assert waiting in bell.rung
    assert outbox_left(db) == {f"jobs/{job_id}/"}
    back = Sweeper(db, local_storage, bell, settings)
    assert back.run_errands() == 0, "not due yet"
    with db.write() as session:
        session.execute(update(OutboxRow).values(due_at=db.now(-1)))
    assert back.run_errands() == 1
    assert local_storage.list("jobs/") == []


def test_two_sweepers_never_carry_the_same_errand_at_once(db: Database) -> None:
    lives.submit(db)
    assert len(outbox.claim_due(db)) == 1
    assert outbox.claim_due(db) == []


def test_garbage_is_what_no_row_names_and_no_living_attempt_can_name(
    db: Database, settings: Settings, bell: CountingBell, storage: Storage
) -> None:
    running = lives.claim(db, lives.submit(db).id)
    attempts.release(db, running)
    running = lives.claim(db, running.job_id)
    kept_row = lives.checkpoint(db, running, 10)
    done = lives.claim(db, lives.submit(db).id)
    lives.finish(db, done)
    kept = {
        kept_row,
        state_key(kept_row),
        checkpoint_key(running.job_id, 2, 20),  # its row may be on its way
        artifact_key(done.job_id, 1, "pruned.safetensors"),
    }
    garbage = {
        checkpoint_key(running.job_id, 1, 10),  # an attempt that was lost
        artifact_key(running.job_id, 1, "model.py"),
        artifact_key(done.job_id, 1, "left.over"),
        checkpoint_key(done.job_id, 1, 10),
        artifact_key("job_gone", 3, "model.py"),
        "datasets/data_gone/packed/train.images.npy",
    }
    for key in kept | garbage:
        put_bytes(storage, key, b"x")
    sweeper = Sweeper(db, storage, bell, settings)
    assert sweeper.collect_garbage() == [], "nothing is a day old"
    assert set(sweeper.collect_garbage(NO_AGE)) == garbage
    assert {stored.key for stored in storage.list("jobs/")} == kept
    assert list_artifacts(db, TENANT, done.job_id)


def test_old_keys_workers_and_done_errands_are_forgotten(db: Database, sweeper: Sweeper) -> None:
    commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("old", "a" * 64))
    young, _ = commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("young", "a" * 64))
    workers.register_worker(db, "w", host="h", pid=1, slots=1, device="cpu")
    sweeper.run_errands()
    sweeper.remove_expired()
    assert counts(db) == (2, 1, 2)
    with db.write() as session:
        session.execute(
            update(IdempotencyKeyRow).where(IdempotencyKeyRow.key == "old").values(created_at=db.now(-8 * 86400))
        )
        session.execute(update(WorkerRow).values(seen_at=db.now(-2 * 86400)))
        session.execute(update(OutboxRow).values(done_at=db.now(-2 * 86400)))
    sweeper.remove_expired()
    assert counts(db) == (1, 0, 0)
    assert commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("young", "a" * 64)) == (young, False)
    assert commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("old", "b" * 64))[1]


def test_a_sweep_does_all_of_it_and_may_be_repeated(
    db: Database, sweeper: Sweeper, bell: CountingBell, clock: Clock, local_storage: Storage
) -> None:
    workers.register_worker(db, "w", host="h", pid=1, slots=2, device="cpu")
    silent = lives.claim(db, lives.submit(db).id, lease_s=-1)
    waiting = lives.submit(db).id
    put_bytes(local_storage, artifact_key("job_gone", 1, "x"), b"x")
    sweeper.sweep()
    clock.now_s += 3600
    sweeper.sweep()
    sweeper.sweep()
    assert queries.get_job(db, TENANT, silent.job_id).state == "queued"
    assert waiting in bell.rung
    assert local_storage.list("jobs/"), "garbage stays for a day"


def outbox_left(db: Database) -> set[str]:
    """The subjects of the errands that are not done."""
    with db.read() as session:
        return set(session.scalars(select(OutboxRow.subject).where(OutboxRow.done_at.is_(None))))


def counts(db: Database) -> tuple[int, ...]:
    """How many idempotency keys, workers and errands there are."""
    with db.read() as session:
        tables = (IdempotencyKeyRow, WorkerRow, OutboxRow)
        return tuple(session.scalar(select(func.count()).select_from(table)) or 0 for table in tables)


def test_a_sweep_that_breaks_is_followed_by_the_next(db: Database, tmp_path: Path) -> None:
    class Odd(LocalStorage):
        def delete_prefix(self, prefix: str) -> int:
            raise RuntimeError("nobody thought of this")

    bell = CountingBell()
    sweeper = Sweeper(db, Odd(tmp_path), bell, Settings())
    with db.write() as session:
        outbox.post_errand(session, db, "delete_prefix", "jobs/x/")
    sweeper.try_sweep()
    sweeper = Sweeper(db, LocalStorage(tmp_path), bell, Settings())
    with db.write() as session:
        session.execute(update(OutboxRow).values(due_at=db.now(-1)))
    sweeper.try_sweep()
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(OutboxRow).where(OutboxRow.done_at.is_(None))) == 0
