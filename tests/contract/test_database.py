"""The database itself: versions of the schema, time, and what its errors become."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy.exc
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import literal, select, text, update
from sqlalchemy.orm import Session

from app.database.engine import Database, filesystem_type
from app.database.tables import JobRow, Row, new_id
from app.errors import NewerDatabase, StartupError, StorageFull, Unavailable
from app.jobs import attempts, commands, queries
from app.jobs.events import NewEvent, read_log
from tests.support.checkout import ROOT
from tests.support.jobs import lives
from tests.support.jobs.lives import SPEC, TENANT, event_types
from tests.support.services import proxies, servers

MIGRATIONS = ROOT / "migrations" / "versions"


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'new' / 'espalier.sqlite'}"
    else:
        with request.getfixturevalue("postgres_server").empty_database() as url:
            yield url


def test_the_migrations_make_exactly_the_tables_that_the_code_knows(empty_url: str) -> None:
    db = Database(empty_url)
    db.upgrade()
    db.upgrade()
    db.check_version()
    with db.read() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Row.metadata) == []
    db.close()


def test_processes_that_start_together_upgrade_once(empty_url: str) -> None:
    databases = [Database(empty_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Database.upgrade, databases))
    for db in databases:
        db.check_version()
        db.close()


def test_a_database_of_a_later_release_is_refused_with_what_to_do(db: Database) -> None:
    with db.write() as session:
        [present] = session.scalars(text("SELECT version_num FROM alembic_version"))
        session.execute(text("UPDATE alembic_version SET version_num = '20991231_later'"))
    for start in (db.check_version, db.upgrade):
        with pytest.raises(NewerDatabase, match=r"later release .*20991231_later.* install that release, or restore"):
            start()
    with db.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": present})
    db.check_version()


def test_a_database_that_was_not_upgraded_is_refused_with_the_command(empty_url: str) -> None:
    db = Database(empty_url)
    with pytest.raises(StartupError, match=re.escape("python -m app.migrate")):
        db.check_version()
    db.close()


def test_migrations_are_named_by_their_day() -> None:
    names = [path.name for path in MIGRATIONS.glob("*.py") if path.name != "__init__.py"]
    assert names
    assert all(re.fullmatch(r"20\d{6}_[a-z0-9_]+\.py", name) for name in names)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://localhost/x"])
def test_a_database_that_cannot_hold_jobs_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(StartupError, match="ESPALIER_DATABASE_URL"):
        Database(url)


def test_a_database_that_does_not_answer_is_named_without_its_password() -> None:
    port = servers.free_port()
    db = Database(f"postgresql+psycopg://me:secret@127.0.0.1:{port}/x")
    for start in (db.check_version, db.upgrade):
        with pytest.raises(StartupError, match=rf"127.0.0.1:{port}/x does not answer") as refused:
            start()
        assert "secret" not in str(refused.value)
    with pytest.raises(Unavailable):
        lives.submit(db)
    db.close()


def test_times_are_aware_and_keep_their_microseconds(db: Database) -> None:
    job_id = lives.submit(db).id
    moment = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=timezone(timedelta(hours=5)))
    with db.write() as session:
        session.execute(update(JobRow).values(created_at=moment))
    read = queries.get_job(db, TENANT, job_id).created_at
    assert read == moment
    assert read.tzinfo is UTC
    with pytest.raises(sqlalchemy.exc.StatementError, match="naive"), db.write() as session:
        session.execute(update(JobRow).values(created_at=datetime(2026, 1, 1)))
    with db.read() as session:
        now, later = session.execute(select(db.now(), db.now(90.5))).one()
    assert abs(now - datetime.now(UTC)) < timedelta(seconds=5)
    assert abs(later - now - timedelta(seconds=90.5)) < timedelta(seconds=1)


def test_ids_sort_by_the_time_of_their_making_and_are_safe_in_paths() -> None:
    made = []
    for _ in range(5):
        made.append(new_id("job"))
        time.sleep(0.002)
    assert made == sorted(made)
    assert len({new_id("job") for _ in range(1000)}) == 1000
    assert all(re.fullmatch(r"job_[0-9a-hjkmnp-tv-z]{26}", one) for one in made)


def test_what_is_raised_in_a_session_rolls_everything_back(db: Database) -> None:
    job_id = lives.submit(db).id

    def change() -> None:
        with db.write() as session:
            session.execute(update(JobRow).values(name="changed"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert queries.get_job(db, TENANT, job_id).name is None


def test_wrong_sql_is_our_bug_and_not_an_absent_database(db: Database) -> None:
    with pytest.raises((sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError)), db.read() as session:
        session.execute(text("SELECT * FROM no_such_table"))


def test_a_pool_without_a_free_connection_says_try_again(database_url: str) -> None:
    db = Database(database_url, pool_size=1, max_overflow=0)
    with db.read() as session:
        session.execute(select(literal(1)))
        with pytest.raises(Unavailable, match="in use"):
            lives.submit(db)
    lives.submit(db)
    db.close()


def test_no_index_of_jobs_names_what_changes_with_every_renewal() -> None:
    renewed = {"lease_until", "beat", "progress", "event_seq", "revision", "log_bytes", "owner"}
    for index in JobRow.metadata.tables["jobs"].indexes:
        assert renewed.isdisjoint(re.findall(r"\w+", " ".join(map(str, index.expressions)))), index.name


def test_renewals_on_postgres_touch_no_index(postgres_server: servers.Postgres) -> None:
    with postgres_server.database() as url:
        db = Database(url, pool_size=1, max_overflow=0)
        claim = lives.claim(db, lives.submit(db).id)
        for step in range(100):
            attempts.renew(db, claim, worker_id="w", progress={"step": step})
        with db.read() as session:
            session.execute(text("SELECT pg_stat_force_next_flush()"))
        with db.read() as session:
            total, hot = session.execute(
                text("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'")
            ).one()
        db.close()
    assert total == 101
    assert hot >= 95


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_sqlite_database_locked_by_a_backup_says_try_again_and_reads_go_on(database_url: str) -> None:
    db = Database(database_url)
    job_id = lives.submit(db).id
    backup = sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)
    backup.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(Unavailable):
        commands.cancel_job(db, TENANT, job_id)
    assert 4 < time.monotonic() - began < 9
    assert queries.get_job(db, TENANT, job_id).state == "queued"
    backup.execute("ROLLBACK")
    backup.close()
    commands.cancel_job(db, TENANT, job_id)
    db.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_full_disk_is_called_so_and_reads_go_on(database_url: str) -> None:
    db = Database(database_url, pool_size=1, max_overflow=0)
    job_id = lives.submit(db).id
    with db.read() as session:
        session.execute(text("PRAGMA max_page_count = 1"))  # is raised to what there is
    big = {**SPEC, "filler": "x" * 1_000_000}
    with pytest.raises(StorageFull, match="free space"):
        commands.submit_job(db, tenant=TENANT, spec=big)
    assert [job.id for job in queries.list_jobs(db, TENANT)[0]] == [job_id]
    with db.read() as session:
        session.execute(text("PRAGMA max_page_count = 1000000"))
    commands.submit_job(db, tenant=TENANT, spec=big)
    db.close()


def test_a_killed_backend_is_one_try_again_and_the_next_request_works(postgres_server: servers.Postgres) -> None:
    with postgres_server.database() as url:
        db = Database(url, pool_size=1, max_overflow=0)
        job_id = lives.submit(db).id

        def lose_connection() -> None:
            with db.write() as session:
                [pid] = session.scalars(text("SELECT pg_backend_pid()"))
                postgres_server.sql(f"SELECT pg_terminate_backend({pid})")
                session.execute(update(JobRow).values(name="lost"))

        with pytest.raises(Unavailable):
            lose_connection()
        assert queries.get_job(db, TENANT, job_id).name is None
        db.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_submit_whose_commit_got_lost_makes_one_job(postgres_server: servers.Postgres, when: str) -> None:
    with postgres_server.database() as url, proxies.proxy(postgres_server.port) as proxy:
        db = Database(url.replace(f":{postgres_server.port}/", f":{proxy.port}/"))
        proxy.cut(b"COMMIT", when)  # type: ignore[arg-type]
        view, created = commands.submit_job(db, tenant=TENANT, spec=SPEC, idempotency=("key", "a" * 64))
        assert proxy.cuts == 1
        assert created
        assert [job.id for job in queries.list_jobs(db, TENANT)[0]] == [view.id]
        assert event_types(db, view.id) == ["job.submitted"]
        db.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_renewal_whose_commit_got_lost_writes_its_events_once(postgres_server: servers.Postgres, when: str) -> None:
    with postgres_server.database() as url, proxies.proxy(postgres_server.port) as proxy:
        db = Database(url.replace(f":{postgres_server.port}/", f":{proxy.port}/"))
        claim = lives.claim(db, lives.submit(db).id)
        proxy.cut(b"COMMIT", when)  # type: ignore[arg-type]
        attempts.renew(db, claim, worker_id="w", events=[NewEvent("warning", "warn", "once")], log="once\n")
        proxy.cut(b"COMMIT", when)  # type: ignore[arg-type]
        lives.finish(db, claim)
        assert proxy.cuts == 2
        assert event_types(db, claim.job_id) == ["job.submitted", "job.claimed", "warning", "job.succeeded"]
        assert read_log(db, TENANT, claim.job_id) == "once\n"
        db.close()


def test_a_database_that_stays_away_after_a_lost_commit_says_try_again(postgres_server: servers.Postgres) -> None:
    class Away(Database):
        """Loses every commit, and has nothing when looked up."""

        looks = 0

        def _look_up_commit(self, landed: object, result: object) -> bool:
            self.looks += 1
            proxy.cut(b"COMMIT", "before")
            return False

    with postgres_server.database() as url, proxies.proxy(postgres_server.port) as proxy:
        db = Away(url.replace(f":{postgres_server.port}/", f":{proxy.port}/"))
        proxy.cut(b"COMMIT", "before")
        with pytest.raises(Unavailable):
            lives.submit(db)
        assert db.looks == 3
        db.close()


def test_the_filesystem_of_a_folder_is_known() -> None:
    assert filesystem_type(Path("/proc")) == "proc"
    assert filesystem_type(Path("/proc/self/no/such")) == "proc"


def test_writers_on_sqlite_never_fail_at_the_step_from_reading_to_writing(db: Database) -> None:
    job_id = lives.submit(db).id

    def count(session: Session) -> int:
        return int(session.scalars(select(JobRow.priority).where(JobRow.id == job_id)).one())

    def add(_: int) -> None:
        with db.write() as session:
            session.execute(select(JobRow.id).where(JobRow.id == job_id).with_for_update())
            present = count(session)
            session.execute(update(JobRow).values(priority=present + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(80)))
    with db.read() as session:
        assert count(session) == 80
