"""A worker's moves and the fence around them: the same on SQLite and Postgres."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from app.database.engine import Database
from app.database.tables import JobRow, OutboxRow, Row
from app.errors import LostOwnership, NotFound
from app.jobs import attempts, commands, queries, workers
from app.jobs.artifacts import (
    NewArtifact,
    attempt_prefix,
    get_artifact,
    latest_checkpoints,
    list_artifacts,
    list_checkpoints,
)
from app.jobs.attempts import Claim
from app.jobs.events import LOG_CAP_BYTES, LOG_CUT, NewEvent, list_events, read_log, read_metrics
from tests.support.jobs import lives
from tests.support.jobs.lives import TENANT, event_types

WRITES: dict[str, Callable[[Database, Claim], Any]] = {
    "renew": lambda db, claim: attempts.renew(
        db,
        claim,
        worker_id="old",
        progress={"x": 1},
        events=[NewEvent("a", "info", "b")],
        metrics=[("m", 1, 1.0)],
        log="x",
    ),
    "checkpoint": lambda db, claim: lives.checkpoint(db, claim, 99),
    "finish": lives.finish,
    "fail": lambda db, claim: attempts.fail(db, claim, lives.ERROR),
    "cancel": attempts.obey_cancel,
    "pause": attempts.obey_pause,
    "release": attempts.release,
    "crash": lambda db, claim: attempts.crash(db, claim, {"exit_code": 1}),
}


def everything(db: Database) -> dict[str, list[Any]]:
    """All rows of all tables."""
    with db.read() as session:
        return {table.name: sorted(map(str, session.execute(select(table)))) for table in Row.metadata.sorted_tables}


def objects_to_delete(db: Database) -> set[str]:
    """The prefixes that the outbox will delete."""
    with db.read() as session:
        return set(session.scalars(select(OutboxRow.subject).where(OutboxRow.kind == "delete_prefix")))


@pytest.mark.parametrize("write", WRITES)
def test_an_old_attempts_writes_change_nothing(db: Database, write: str) -> None:
    job_id = lives.submit(db).id
    old = lives.claim(db, job_id, "old")
    attempts.release(db, old)
    new = lives.claim(db, job_id, "new")
    commands.pause_job(db, TENANT, job_id)
    before = everything(db)
    with pytest.raises(LostOwnership):
        WRITES[write](db, old)
    assert everything(db) == before
    assert attempts.renew(db, new, worker_id="new") == "pause"


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "paused", "queued with a checkpoint"])
def test_a_worker_cannot_write_to_a_job_that_left_it(db: Database, state: str) -> None:
    job_id = lives.job_in(db, state)
    job = queries.get_job(db, TENANT, job_id)
    before = everything(db)
    for write in WRITES.values():
        with pytest.raises(LostOwnership):
            write(db, Claim(job_id, job.attempt, TENANT, job.spec, None, 0, None))
        assert everything(db) == before


def test_a_claim_takes_the_oldest_of_the_highest_priority_and_the_hint_before_both(db: Database) -> None:
    first, second, third, urgent = (lives.submit(db).id for _ in range(4))
    with db.write() as session:
        session.execute(update(JobRow).where(JobRow.id == urgent).values(priority=1))
    order = [attempts.claim(db, worker_id="w", hint=hint) for hint in (third, None, "job_unknown", third, None)]
    assert [claim and claim.job_id for claim in order] == [third, urgent, first, second, None]


def test_a_claim_says_who_has_the_job_and_starts_its_clock_once(db: Database) -> None:
    job_id = lives.submit(db, name="seed").id
    claim = lives.claim(db, job_id, "w1")
    assert (claim.attempt, claim.tenant, claim.spec, claim.wish, claim.progress_step, claim.name) == (
        1, TENANT, lives.SPEC, None, 0, "seed",
    )  # fmt: skip
    started = queries.get_job(db, TENANT, job_id).started_at
    assert started is not None
    attempts.release(db, claim)
    assert lives.claim(db, job_id, "w2").attempt == 2
    assert queries.get_job(db, TENANT, job_id).started_at == started
    claimed = [event for event in list_events(db, TENANT, job_id) if event.type == "job.claimed"]
    assert [event.data["worker"] for event in claimed] == ["w1", "w2"]


def test_a_job_in_a_newer_language_waits_for_a_newer_worker(db: Database) -> None:
    commands.submit_job(db, tenant=TENANT, spec={**lives.SPEC, "spec_version": 2})
    assert attempts.claim(db, worker_id="w") is None


def test_a_renewal_writes_what_happened_and_brings_the_wish(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    events = [NewEvent("epoch.finished", "info", f"epoch {n}", {"epoch": n, "loss": math.nan}) for n in (1, 2)]
    assert (
        attempts.renew(
            db, claim, worker_id="w", progress={"phase": "training", "images_per_s": math.inf}, events=events
        )
        is None
    )
    assert queries.get_job(db, TENANT, job_id).progress == {"phase": "training", "images_per_s": None}
    commands.stop_job(db, TENANT, job_id)
    assert attempts.renew(db, claim, worker_id="w") == "stop"
    assert queries.get_job(db, TENANT, job_id).progress == {"phase": "training", "images_per_s": None}
    assert event_types(db, job_id) == [
        "job.submitted",
        "job.claimed",
        "epoch.finished",
        "epoch.finished",
        "job.stopping",
    ]
    assert list_events(db, TENANT, job_id, after=3, limit=1)[0].data == {"epoch": 2, "loss": None}


def test_a_step_that_is_trained_again_replaces_its_point(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    points = [("train.loss", 2, 2.0), ("train.loss", 1, 3.0), ("val.loss", 1, math.nan), ("train.loss", 2, 1.5)]
    attempts.renew(db, claim, worker_id="w", metrics=points)
    attempts.renew(db, claim, worker_id="w", metrics=[("train.loss", 1, 2.5), ("val.accuracy", 1, 0.5)])
    assert read_metrics(db, TENANT, job_id) == {"train.loss": [(1, 2.5), (2, 1.5)], "val.accuracy": [(1, 0.5)]}


def test_a_log_keeps_its_newest_part_and_says_what_it_lost(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    attempts.renew(db, claim, worker_id="w", log="first\n")
    attempts.renew(db, claim, worker_id="w", log="nul \0, lone \udc80, é\n")
    assert read_log(db, TENANT, job_id) == "first\nnul \ufffd, lone ?, é\n"
    block = "x" * (LOG_CAP_BYTES // 4 - 1) + "\n"
    for _ in range(5):
        attempts.renew(db, claim, worker_id="w", log=block)
    log = read_log(db, TENANT, job_id)
    assert log.startswith(LOG_CUT)
    assert log.endswith(block)
    assert LOG_CAP_BYTES * 3 // 4 <= len(log) - len(LOG_CUT) <= LOG_CAP_BYTES


def test_of_checkpoints_the_two_newest_stay_and_the_older_ones_objects_go(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    keys = [lives.checkpoint(db, claim, step) for step in (10, 20, 30)]
    assert [saved.key for saved in latest_checkpoints(db, job_id)] == [keys[2], keys[1]]
    assert objects_to_delete(db) == {keys[0].removesuffix("safetensors")}
    attempts.release(db, claim)
    second = lives.claim(db, job_id)
    assert second.progress_step == 30
    newest = lives.checkpoint(db, second, 25)
    assert [saved.key for saved in list_checkpoints(db, TENANT, job_id)] == [newest, keys[2]]
    assert latest_checkpoints(db, job_id)[0].state_key == newest.removesuffix("safetensors") + "json"
    lives.checkpoint(db, second, 25)  # a repeated record is the same record
    assert len(list_checkpoints(db, TENANT, job_id)) == 2


def test_an_attempt_delivers_only_what_lies_under_its_own_prefix(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    before = everything(db)
    for foreign in (attempt_prefix(job_id, 2), attempt_prefix("job_other", 1), f"jobs/{job_id}/attempts/11/"):
        artifact = NewArtifact("model.py", "source", f"{foreign}artifacts/model.py", "0" * 64, 1, "text/x-python")
        with pytest.raises(ValueError, match="does not begin with"):
            attempts.finish(db, claim, summary={}, report={}, artifacts=[artifact])
        with pytest.raises(ValueError, match="does not begin with"):
            attempts.record_checkpoint(
                db, claim, step=1, epoch=1, phase="training", key=f"{foreign}checkpoints/1.safetensors",
                size_bytes=1, sha256="0" * 64, metrics={},
            )  # fmt: skip
    assert everything(db) == before


def test_success_shows_everything_at_once_and_lets_the_checkpoints_go(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    lives.checkpoint(db, claim, 10)
    assert list_artifacts(db, TENANT, job_id) == []
    lives.finish(db, claim, stopped_early=True, events=[NewEvent("phase.started", "info", "exporting")])
    job = queries.get_job(db, TENANT, job_id)
    assert (job.state, job.summary, job.stopped_early) == ("succeeded", {"final": {"accuracy": 0.9}}, True)
    assert job.finished_at is not None
    [artifact] = list_artifacts(db, TENANT, job_id)
    assert artifact == get_artifact(db, TENANT, job_id, "pruned.safetensors")
    assert artifact.sha256 == "1" * 64
    with pytest.raises(NotFound):
        get_artifact(db, TENANT, job_id, "other")
    assert list_checkpoints(db, TENANT, job_id) == []
    assert objects_to_delete(db) == {f"jobs/{job_id}/attempts/1/checkpoints/"}
    assert event_types(db, job_id)[-2:] == ["phase.started", "job.succeeded"]


def test_after_a_cancel_a_job_cannot_succeed(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    commands.cancel_job(db, TENANT, job_id)
    before = everything(db)
    with pytest.raises(LostOwnership):
        lives.finish(db, claim)
    assert everything(db) == before
    attempts.obey_cancel(db, claim)
    assert queries.get_job(db, TENANT, job_id).state == "cancelled"
    assert objects_to_delete(db) == {f"jobs/{job_id}/"}


def test_nobody_is_cancelled_who_was_not_asked_to(db: Database) -> None:
    claim = lives.claim(db, lives.submit(db).id)
    with pytest.raises(LostOwnership):
        attempts.obey_cancel(db, claim)
    assert queries.get_job(db, TENANT, claim.job_id).state == "running"


def test_a_pause_that_was_taken_back_lets_the_worker_train_on(db: Database) -> None:
    job_id = lives.job_in(db, "running to pause")
    claim = Claim(job_id, 1, TENANT, lives.SPEC, None, 0, None)
    commands.resume_job(db, TENANT, job_id)
    assert attempts.obey_pause(db, claim) is False
    assert queries.get_job(db, TENANT, job_id).state == "running"
    commands.pause_job(db, TENANT, job_id)
    assert attempts.obey_pause(db, claim) is True
    assert queries.get_job(db, TENANT, job_id).state == "paused"
    assert attempts.claim(db, worker_id="w") is None


def test_three_crashes_without_progress_poison_a_job_and_progress_forgives(db: Database) -> None:
    job_id = lives.submit(db).id
    states = []
    for crash in range(1, 6):
        claim = lives.claim(db, job_id)
        if crash == 2:
            lives.checkpoint(db, claim, 10)  # forgives the first
        if crash == 3:
            lives.checkpoint(db, claim, 5)  # no progress
        states.append(attempts.crash(db, claim, {"signal": 11, "last_words": "boom"}))
        if states[-1] == "failed":
            break
        with db.write() as session:
            session.execute(update(JobRow).values(available_at=db.now()))
    assert states == ["queued", "queued", "queued", "failed"]
    job = queries.get_job(db, TENANT, job_id)
    assert job.error is not None
    assert job.error["code"] == "poison"
    assert job.error["message"] == "the trainer was ended by signal 11, 3 times without progress"
    assert job.finished_at is not None
    assert event_types(db, job_id)[-2:] == ["worker.lost", "job.failed"]
    lost = list_events(db, TENANT, job_id)[-2]
    assert (lost.data["last_words"], lost.data["crashes"]) == ("boom", 3)


def test_a_crashed_job_waits_longer_each_time(db: Database) -> None:
    job_id = lives.submit(db).id
    for least_s, most_s in ((2.5, 7.5), (5.0, 15.0)):
        attempts.crash(db, lives.claim(db, job_id), {"exit_code": 70})
        assert attempts.claim(db, worker_id="w", hint=job_id) is None
        with db.read() as session:
            now = session.scalar(select(db.now()))
        assert now is not None
        waits_s = (queries.get_job(db, TENANT, job_id).available_at - now).total_seconds()
        assert least_s - 1 < waits_s < most_s
        with db.write() as session:
            session.execute(update(JobRow).values(available_at=db.now()))


@pytest.mark.parametrize(("wish", "after_crash", "after_release"), [
    ("cancel", "cancelled", "cancelled"),
    ("pause", "paused", "paused"),
    ("stop", "queued", "queued"),
])  # fmt: skip
def test_what_the_user_wished_is_done_when_the_worker_goes(
    db: Database, wish: str, after_crash: str, after_release: str
) -> None:
    act = {"cancel": commands.cancel_job, "pause": commands.pause_job, "stop": commands.stop_job}[wish]
    for give_back, expected in (
        (lambda claim: attempts.crash(db, claim, {"exit_code": 70}), after_crash),
        (lambda claim: attempts.release(db, claim), after_release),
    ):
        claim = lives.claim(db, lives.submit(db).id)
        act(db, TENANT, claim.job_id)
        assert give_back(claim) == expected
        job = queries.get_job(db, TENANT, claim.job_id)
        assert job.state == expected
        assert (job.finished_at is not None) == (expected == "cancelled")
        assert job.wish == ("stop" if wish == "stop" else None)
        event_types(db, claim.job_id)


def test_a_released_job_runs_again_at_once_without_a_crash(db: Database) -> None:
    job_id = lives.submit(db).id
    for attempt in range(1, 6):
        claim = lives.claim(db, job_id)
        assert claim.attempt == attempt
        assert attempts.release(db, claim) == "queued"
    assert queries.get_job(db, TENANT, job_id).crashes == 0


def test_a_release_never_poisons_a_job_that_crashed_while_it_was_told_to_pause(db: Database) -> None:
    job_id = lives.submit(db).id
    for _ in range(3):
        claim = lives.claim(db, job_id)
        commands.pause_job(db, TENANT, job_id)
        assert attempts.crash(db, claim, {"exit_code": 70}) == "paused"
        commands.resume_job(db, TENANT, job_id)
    assert attempts.release(db, lives.claim(db, job_id), why="the store is away") == "queued"
    last = list_events(db, TENANT, job_id)[-1]
    assert last.message == "the store is away; the job goes on from its checkpoint"


def test_a_worker_that_was_forgotten_learns_it_from_its_beat(db: Database) -> None:
    workers.register_worker(db, "w", host="h", pid=1, slots=1, device="cpu")
    assert workers.record_beat(db, "w", ["job"])
    assert [worker.running for worker in workers.list_workers(db)] == [["job"]]
    workers.remove_worker(db, "w")
    assert not workers.record_beat(db, "w", [])


def test_a_stop_at_rest_reaches_the_next_worker(db: Database) -> None:
    job_id = lives.job_in(db, "paused with a checkpoint")
    commands.stop_job(db, TENANT, job_id)
    claim = lives.claim(db, job_id)
    assert (claim.wish, claim.progress_step) == ("stop", 10)
    lives.finish(db, claim, stopped_early=True)
    assert queries.get_job(db, TENANT, job_id).stopped_early


def test_a_failure_is_final_and_says_what_to_do(db: Database) -> None:
    job_id = lives.job_in(db, "failed")
    job = queries.get_job(db, TENANT, job_id)
    assert (job.state, job.error) == ("failed", lives.ERROR)
    last = list_events(db, TENANT, job_id)[-1]
    assert (last.type, last.level, last.message) == ("job.failed", "error", lives.ERROR["message"])


def test_the_jobs_of_a_dead_process_need_not_wait_for_its_lease(db: Database) -> None:
    mine, other = lives.claim(db, lives.submit(db).id, "dead"), lives.claim(db, lives.submit(db).id, "alive")
    assert attempts.reap_worker(db, "dead") == [mine.job_id]
    assert queries.get_job(db, TENANT, mine.job_id).state == "queued"
    assert queries.get_job(db, TENANT, mine.job_id).crashes == 1
    assert queries.get_job(db, TENANT, other.job_id).state == "running"


def test_workers_are_listed_until_they_say_good_bye(db: Database) -> None:
    workers.register_worker(db, "w1", host="h", pid=1, slots=2, device="cpu")
    workers.register_worker(db, "w2", host="h", pid=2, slots=1, device="cuda:0")
    workers.record_beat(db, "w2", running=["job_x"])
    first, second = workers.list_workers(db)
    assert (first.id, first.slots, first.running, first.alive) == ("w1", 2, [], True)
    assert (second.id, second.device, second.running) == ("w2", "cuda:0", ["job_x"])
    workers.remove_worker(db, "w1")
    assert [worker.id for worker in workers.list_workers(db)] == ["w2"]
