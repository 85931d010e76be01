"""A user's moves, and what users read: the same on SQLite and Postgres."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from app.database.engine import Database
from app.database.tables import JobLabelRow, JobRow, OutboxRow
from app.errors import (
    IdempotencyMismatch,
    IllegalTransition,
    InvalidCursor,
    InvalidParameter,
    JobNotFound,
    NotFinished,
    NotFound,
)
from app.jobs import attempts, commands, queries, workers
from app.jobs.artifacts import list_artifacts
from app.jobs.events import list_events, read_log, read_metrics
from tests.support.jobs import lives
from tests.support.jobs.lives import SPEC, TENANT, event_types

VERBS = {
    "cancel": commands.cancel_job,
    "stop": commands.stop_job,
    "pause": commands.pause_job,
    "resume": commands.resume_job,
}
# What each verb makes of each state; whatever is not here must be refused.
LEGAL = {
    ("queued", "cancel"): "cancelled",
    ("queued", "pause"): "paused",
    ("queued with a checkpoint", "cancel"): "cancelled",
    ("queued with a checkpoint", "pause"): "paused",
    ("queued with a checkpoint", "stop"): "queued",
    ("queued to stop", "cancel"): "cancelled",
    ("queued to stop", "stop"): "queued",
    ("running", "cancel"): "cancelling",
    ("running", "stop"): "running",
    ("running", "pause"): "running",
    ("running to pause", "cancel"): "cancelling",
    ("running to pause", "stop"): "running",
    ("running to pause", "pause"): "running",
    ("running to pause", "resume"): "running",
    ("running to stop", "cancel"): "cancelling",
    ("running to stop", "stop"): "running",
    ("cancelling", "cancel"): "cancelling",
    ("paused", "cancel"): "cancelled",
    ("paused", "resume"): "queued",
    ("paused with a checkpoint", "cancel"): "cancelled",
    ("paused with a checkpoint", "resume"): "queued",
    ("paused with a checkpoint", "stop"): "queued",
}


@pytest.mark.parametrize("state", lives.EVERY_STATE)
def test_each_verb_in_each_state_does_its_move_or_is_refused_with_the_state_and_what_is_allowed(
    db: Database, state: str
) -> None:
    for verb, act in VERBS.items():
        job_id = lives.job_in(db, state)
        before = queries.get_job(db, TENANT, job_id)
        expected = LEGAL.get((state, verb))
        if expected is not None:
            assert act(db, TENANT, job_id).shown_state == expected, verb
            assert queries.get_job(db, TENANT, job_id).shown_state == expected
        else:
            with pytest.raises(IllegalTransition) as refused:
                act(db, TENANT, job_id)
            assert refused.value.state == before.shown_state
            assert verb not in refused.value.allowed
            assert set(refused.value.allowed) == {v for v in VERBS if (state, v) in LEGAL} | {"delete"} | (
                {"retry"} if before.terminal else set()
            )
            assert queries.get_job(db, TENANT, job_id) == before
        event_types(db, job_id)


@pytest.mark.parametrize("state", lives.EVERY_STATE)
def test_a_deleted_job_is_gone_at_once_and_its_rows_and_objects_go_with_it(db: Database, state: str) -> None:
    job_id = lives.job_in(db, state)
    attempt = queries.get_job(db, TENANT, job_id).attempt
    running = queries.get_job(db, TENANT, job_id).state == "running"
    commands.delete_job(db, TENANT, job_id)
    with pytest.raises(JobNotFound):
        queries.get_job(db, TENANT, job_id)
    with pytest.raises(JobNotFound):
        list_events(db, TENANT, job_id)
    assert queries.list_jobs(db, TENANT) == ([], None)
    if running:  # its worker is told at the next renewal, and ends it
        claim = attempts.Claim(job_id, attempt, TENANT, SPEC, None, 0, None)
        assert attempts.renew(db, claim, worker_id="w") == "cancel"
        attempts.obey_cancel(db, claim)
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(JobRow)) == 0
        subjects = set(session.scalars(select(OutboxRow.subject).where(OutboxRow.kind == "delete_prefix")))
    assert f"jobs/{job_id}/" in subjects


def test_a_new_job_waits_and_says_so(db: Database) -> None:
    view, created = commands.submit_job(db, tenant=TENANT, spec=SPEC, name="seed", labels={"team": "vision"})
    assert created
    assert queries.get_job(db, TENANT, view.id) == view
    assert (view.state, view.attempt, view.name, view.labels) == ("queued", 0, "seed", {"team": "vision"})
    assert view.spec == SPEC
    assert list(view.spec) == list(SPEC), "the order of keys is what was sent"
    assert abs(datetime.now(UTC) - view.created_at) < timedelta(seconds=5)
    [event] = list_events(db, TENANT, view.id)
    assert (event.seq, event.type, event.level) == (1, "job.submitted", "info")
    with db.read() as session:
        assert session.execute(select(OutboxRow.kind, OutboxRow.subject)).all() == [("ring", view.id)]


def test_the_same_key_and_body_give_the_same_job_and_another_body_is_refused(db: Database) -> None:
    first, created = commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("key", "a" * 64))
    again, created_again = commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("key", "a" * 64))
    assert (created, created_again) == (True, False)
    assert again == first
    with pytest.raises(IdempotencyMismatch):
        commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("key", "b" * 64))
    other_route, created = commands.submit_job(
        db, tenant=TENANT, spec=SPEC, idempotency=("key", "b" * 64), route="POST /v1/x"
    )
    assert created
    assert other_route.id != first.id
    assert len(queries.list_jobs(db, TENANT)[0]) == 2


def test_the_key_of_a_deleted_job_is_free_again(db: Database) -> None:
    for state_of_first in ("waits", "runs"):
        first, _ = commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=(state_of_first, "a" * 64))
        if state_of_first == "runs":
            lives.claim(db, first.id)
        commands.delete_job(db, TENANT, first.id)
        second, created = commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=(state_of_first, "a" * 64))
        assert created
        assert second.id != first.id


def test_texts_that_no_database_takes_are_stored_without_what_it_refuses(db: Database) -> None:
    view = lives.submit(db, name="nul \0 lone \ud800 pair \U0001f333")
    assert view.name == "nul \ufffd lone ? pair \U0001f333"
    assert queries.get_job(db, TENANT, view.id).name == view.name


def test_pages_are_newest_first_and_hold_each_job_once_while_new_ones_come(db: Database) -> None:
    made = [lives.submit(db).id for _ in range(5)]
    page, cursor = queries.list_jobs(db, TENANT, limit=2)
    seen = [job.id for job in page]
    while cursor is not None:
        lives.submit(db)
        page, cursor = queries.list_jobs(db, TENANT, limit=2, cursor=cursor)
        seen += [job.id for job in page]
    assert seen == made[::-1]


def test_jobs_of_one_moment_are_paged_by_their_ids(db: Database) -> None:
    made = sorted((lives.submit(db).id for _ in range(4)), reverse=True)
    with db.write() as session:
        session.execute(JobRow.__table__.update().values(created_at=datetime(2026, 1, 1, tzinfo=UTC)))
    first, cursor = queries.list_jobs(db, TENANT, limit=3)
    rest, end = queries.list_jobs(db, TENANT, limit=3, cursor=cursor)
    assert [job.id for job in (*first, *rest)] == made
    assert end is None


def test_jobs_are_found_by_state_and_label(db: Database) -> None:
    by_state = {state: lives.job_in(db, state) for state in ("queued", "running", "cancelling", "succeeded")}
    for state, job_id in by_state.items():
        assert [job.id for job in queries.list_jobs(db, TENANT, state=state)[0]] == [job_id], state
    labelled = lives.submit(db, labels={"team": "vision", "k": "v"}).id
    lives.submit(db, labels={"team": "audio"})
    assert [job.id for job in queries.list_jobs(db, TENANT, label=("team", "vision"))[0]] == [labelled]
    assert queries.list_jobs(db, TENANT, label=("team", "vision"), state="running")[0] == []
    commands.delete_job(db, TENANT, labelled)
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(JobLabelRow)) == 1
    with pytest.raises(InvalidParameter, match="cancelling"):
        queries.list_jobs(db, TENANT, state="dead")
    with pytest.raises(InvalidParameter):
        queries.list_jobs(db, TENANT, limit=0)


def test_a_cursor_is_good_only_for_its_own_list(db: Database) -> None:
    for _ in range(3):
        lives.submit(db, labels={"a": "b"})
    _, cursor = queries.list_jobs(db, TENANT, limit=1, state="queued")
    assert cursor is not None
    assert queries.list_jobs(db, TENANT, limit=1, state="queued", cursor=cursor)[0]
    with pytest.raises(InvalidCursor):
        queries.list_jobs(db, TENANT, limit=1, cursor=cursor)
    with pytest.raises(InvalidCursor):
        queries.list_jobs(db, TENANT, limit=1, state="queued", label=("a", "b"), cursor=cursor)
    with pytest.raises(InvalidCursor):
        queries.list_jobs(db, "other", limit=1, state="queued", cursor=cursor)
    for junk in ("", "x", "%%%", "\ud800", "é", cursor[:-3], cursor[:20] + "A" + cursor[21:], "A" * 10_000):
        with pytest.raises(InvalidCursor):
            queries.list_jobs(db, TENANT, limit=1, state="queued", cursor=junk)


def test_another_tenants_job_does_not_exist(db: Database) -> None:
    job_id = lives.submit(db).id
    for act in VERBS.values():
        with pytest.raises(JobNotFound):
            act(db, "other", job_id)
    for read in (
        queries.get_job,
        queries.job_version,
        list_events,
        read_metrics,
        read_log,
        queries.read_report,
    ):
        with pytest.raises(JobNotFound):
            read(db, "other", job_id)
    with pytest.raises(JobNotFound):
        commands.delete_job(db, "other", job_id)
    with pytest.raises(JobNotFound):
        commands.retry_job(db, "other", job_id)
    with pytest.raises(JobNotFound):
        list_artifacts(db, "other", job_id)
    assert queries.list_jobs(db, "other") == ([], None)


def test_the_version_differs_after_every_visible_change_and_only_then(db: Database) -> None:
    job_id = lives.submit(db).id

    def version() -> str:
        seen = queries.job_version(db, TENANT, job_id)
        assert queries.get_job(db, TENANT, job_id).version == seen
        return seen

    versions = [version()]
    claim = lives.claim(db, job_id)
    versions.append(version())
    attempts.renew(db, claim, worker_id="w", progress={"phase": "training", "step": 1})
    versions.append(version())
    attempts.renew(db, claim, worker_id="w", log="words\n", metrics=[("train.loss", 1, 2.0)])
    assert version() == versions[-1], "a beat alone is no news"
    commands.pause_job(db, TENANT, job_id)
    versions.append(version())
    commands.pause_job(db, TENANT, job_id)
    assert version() == versions[-1], "the same wish again is no news"
    attempts.obey_pause(db, claim)
    versions.append(version())
    assert len(set(versions)) == len(versions)


def test_a_retry_is_a_new_job_with_the_same_spec(db: Database) -> None:
    first = lives.submit(db, name="seed", labels={"team": "vision"})
    with pytest.raises(IllegalTransition) as refused:
        commands.retry_job(db, TENANT, first.id)
    assert refused.value.state == "queued"
    commands.cancel_job(db, TENANT, first.id)
    second, created = commands.retry_job(db, TENANT, first.id, idempotency=("key", "a" * 64))
    assert created
    assert second.retry_of == first.id
    assert replace(second, retry_of=None).spec == first.spec
    assert (second.name, second.labels, second.state, second.attempt) == ("seed", {"team": "vision"}, "queued", 0)
    assert commands.retry_job(db, TENANT, first.id, idempotency=("key", "a" * 64)) == (second, False)
    assert [job.id for job in queries.list_jobs(db, TENANT, label=("team", "vision"))[0]] == [second.id, first.id]


def test_the_report_comes_with_success_and_never_for_a_job_that_failed(db: Database) -> None:
    job_id = lives.submit(db).id
    with pytest.raises(NotFinished):
        queries.read_report(db, TENANT, job_id)
    lives.finish(db, lives.claim(db, job_id))
    assert queries.read_report(db, TENANT, job_id) == {"job_id": job_id, "notes": ["as measured"]}
    with pytest.raises(NotFound, match="failed has no report"):
        queries.read_report(db, TENANT, lives.job_in(db, "failed"))


def test_a_waiting_job_says_why_it_waits(db: Database) -> None:
    first, second = lives.submit(db), lives.submit(db)
    assert queries.queue_facts(db, second) == {"position": 2, "reason": "no_worker", "workers_alive": 0}
    workers.register_worker(db, "w", host="h", pid=1, slots=1, device="cpu")
    assert queries.queue_facts(db, first) == {"position": 1, "reason": "starting", "workers_alive": 1}
    claim = lives.claim(db, first.id)
    assert queries.queue_facts(db, second) == {"position": 1, "reason": "all_busy", "workers_alive": 1}
    attempts.crash(db, claim, {"exit_code": 70})
    waiting = queries.get_job(db, TENANT, first.id)
    assert queries.queue_facts(db, waiting) == {"position": 2, "reason": "backing_off", "workers_alive": 1}
    workers.remove_worker(db, "w")
    assert queries.queue_facts(db, second)["reason"] == "no_worker"
