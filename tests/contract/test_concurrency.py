"""Many at once: no job twice, no event number twice or missing, no request carried out twice."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from app.database.engine import Database
from app.database.tables import EventRow, JobRow
from app.errors import IllegalTransition, LostOwnership
from app.jobs import attempts, commands, queries
from app.jobs.events import NewEvent, list_events
from app.jobs.transitions import transition
from tests.support.checkout import ROOT
from tests.support.jobs import lives
from tests.support.jobs.lives import SPEC, TENANT, event_types


def test_nine_workers_in_three_processes_claim_each_job_once(db: Database, database_url: str) -> None:
    made = {lives.submit(db).id for _ in range(90)}
    command = [sys.executable, "-m", "tests.support.services.claimer", database_url, "3"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [line.split() for process in processes for line in process.communicate(timeout=120)[0].splitlines() if line]
    assert [process.returncode for process in processes] == [0] * 3
    assert {attempt for _, attempt in lines} == {"1"}
    assert sorted(job_id for job_id, _ in lines) == sorted(made)
    expected = ["job.submitted", "job.claimed", "warning", "warning", "job.succeeded"]
    assert all(event_types(db, job_id) == expected for job_id in made)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_worker_steps_over_a_job_that_another_is_taking(db: Database) -> None:
    first, second = lives.submit(db).id, lives.submit(db).id
    with db.write() as session:
        session.execute(select(JobRow.id).where(JobRow.id == first).with_for_update())
        claim = attempts.claim(db, worker_id="w")
        assert claim is not None
        assert claim.job_id == second
        assert attempts.claim(db, worker_id="w") is None
        assert attempts.claim(db, worker_id="w", hint=first) is None
    assert lives.claim(db, first).attempt == 1


def test_twins_of_a_request_make_one_job(db: Database) -> None:
    start = threading.Barrier(8)

    def send(key: str) -> tuple[str, bool]:
        start.wait()
        view, created = commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=(key, "a" * 64))
        return view.id, created

    with ThreadPoolExecutor(8) as pool:
        for key in ("one", "two", "three", "four", "five"):
            answers = list(pool.map(send, [key] * 8))
            assert len({job_id for job_id, _ in answers}) == 1
            assert sum(created for _, created in answers) == 1
    assert len(queries.list_jobs(db, TENANT)[0]) == 5


def test_readers_see_event_numbers_without_gaps_while_six_write(db: Database) -> None:
    job_id = lives.submit(db).id
    claim = lives.claim(db, job_id)
    done = threading.Event()
    gaps = []

    def read() -> None:
        after = 0
        while True:
            over = done.is_set()
            for event in list_events(db, TENANT, job_id, after=after, limit=1000):
                if event.seq != after + 1:
                    gaps.append((after, event.seq))
                after = event.seq
            if over:
                assert after == 2 + 6 * 20 * 2
                return

    def roll_back(events: list[NewEvent]) -> None:
        with db.write() as session:
            transition(session, db, [JobRow.id == job_id], {}, events)
            raise ZeroDivisionError

    def write(number: int) -> None:
        for turn in range(20):
            events = [NewEvent("warning", "warn", f"{number} {turn} {n}") for n in (1, 2)]
            attempts.renew(db, claim, worker_id="w", events=events)
            with pytest.raises(ZeroDivisionError):
                roll_back(events)

    with ThreadPoolExecutor(8) as pool:
        reader = pool.submit(read)
        try:
            for writer in [pool.submit(write, number) for number in range(6)]:
                writer.result()
        finally:
            done.set()
        reader.result()
    assert gaps == []


def test_a_cancel_and_a_finish_at_once_leave_one_end(db: Database) -> None:
    ends = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(15):
            job_id = lives.submit(db).id
            claim = lives.claim(db, job_id)
            finished, cancelled = (
                pool.submit(lives.finish, db, claim),
                pool.submit(commands.cancel_job, db, TENANT, job_id),
            )
            refused = (type(finished.exception()), type(cancelled.exception()))
            state = queries.get_job(db, TENANT, job_id).shown_state
            ends.append(state)
            assert (state, refused) in (
                ("succeeded", (type(None), IllegalTransition)),
                ("cancelling", (LostOwnership, type(None))),
            )
            with db.read() as session:
                types = session.scalars(
                    select(EventRow.type).where(EventRow.job_id == job_id).order_by(EventRow.seq)
                ).all()
            assert types[2:] == (["job.succeeded"] if state == "succeeded" else ["job.stopping"])
    assert len(ends) == 15
