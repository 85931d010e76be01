"""The doorbell: datagrams to workers that poll, and Celery over a real server, keep the same promises."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.database.engine import Database
from app.jobs import queries, workers
from app.jobs.doorbell import QUEUE, TASK, BellListener, CeleryBell, Doorbell, LocalBell, celery_app, open_bell
from app.jobs.recovery import Sweeper
from app.settings import Settings
from app.storage import Storage
from tests.support.checkout import ROOT
from tests.support.jobs import lives
from tests.support.jobs.lives import TENANT
from tests.support.services import servers

FAR_S = "60"  # a poll that comes too late for every test: the ring alone delivers
AT_ONCE_S = 3.0


class Ringer:
    """A worker process that prints what it claims."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.services.ringer", *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def next(self, timeout_s: float) -> str | None:
        """The next line; None if none comes in time."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):  # the rest is Celery's banner
                self._lines.put(line[2:].strip())


class Delivery:
    """One way of ringing, with workers that listen to it."""

    def __init__(self, bell: Doorbell, arguments: tuple[str, ...]) -> None:
        self.bell = bell
        self._arguments = arguments

    @contextmanager
    def worker(self) -> Iterator[Ringer]:
        """A worker that listens."""
        ringer = Ringer(*self._arguments)
        try:
            assert ringer.next(30) == "ready"
            yield ringer
        finally:
            ringer.close()


@pytest.fixture
def sqlite_db(tmp_path: Path, sqlite_template: Path) -> Iterator[Database]:
    path = tmp_path / "espalier.sqlite"
    path.write_bytes(sqlite_template.read_bytes())
    database = Database(f"sqlite:///{path}")
    yield database
    database.close()


@pytest.fixture(params=["local", "celery"])
def delivery(request: pytest.FixtureRequest, sqlite_db: Database, tmp_path: Path) -> Iterator[Delivery]:
    url = str(sqlite_db.url)
    if request.param == "local":
        bell: Doorbell = LocalBell(tmp_path / "doorbells")
        arguments = (url, "local", str(tmp_path / "doorbells"), FAR_S)
    else:
        broker_url = servers.redis_url(request.getfixturevalue("valkey_server"))
        bell, arguments = CeleryBell(broker_url), (url, "celery", broker_url)
    yield Delivery(bell, arguments)
    bell.close()


def test_a_ring_brings_the_job_to_a_worker_at_once_however_often_it_rings(
    sqlite_db: Database, delivery: Delivery
) -> None:
    with delivery.worker() as worker:
        for _ in range(3):
            job_id = lives.submit(sqlite_db).id
            for _ in range(5):
                delivery.bell.ring(job_id)
            assert worker.next(AT_ONCE_S) == job_id
            assert queries.get_job(sqlite_db, TENANT, job_id).attempt == 1
        assert worker.next(0.3) is None


def test_rings_for_what_does_not_wait_do_nothing_and_the_next_one_works(
    sqlite_db: Database, delivery: Delivery
) -> None:
    done = lives.job_in(sqlite_db, "succeeded")
    with delivery.worker() as worker:
        for nonsense in (done, "job_unknown", "", "x" * 5000, "\u00e9\0"):
            delivery.bell.ring(nonsense)
        job_id = lives.submit(sqlite_db).id
        delivery.bell.ring(job_id)
        assert worker.next(AT_ONCE_S) == job_id
        assert worker.next(0.3) is None


def test_an_idle_worker_takes_the_job_while_another_is_busy(sqlite_db: Database, delivery: Delivery) -> None:
    busy = lives.submit(sqlite_db, name="busy").id
    with delivery.worker() as first:
        delivery.bell.ring(busy)
        assert first.next(AT_ONCE_S) == busy
        with delivery.worker() as second:
            for _ in range(3):
                job_id = lives.submit(sqlite_db).id
                delivery.bell.ring(job_id)
                assert second.next(AT_ONCE_S) == job_id
            assert first.next(0) is None


def test_a_lost_ring_is_rung_again_by_a_sweep(
    sqlite_db: Database, delivery: Delivery, local_storage: Storage, settings: Settings
) -> None:
    workers.register_worker(sqlite_db, "w", host="h", pid=1, slots=1, device="cpu")
    with delivery.worker() as worker:
        job_id = lives.submit(sqlite_db).id
        assert worker.next(0.3) is None
        Sweeper(sqlite_db, local_storage, delivery.bell, settings).ring_for_waiting()
        assert worker.next(AT_ONCE_S) == job_id


def test_without_any_ring_a_poll_finds_the_job(sqlite_db: Database, tmp_path: Path) -> None:
    ringer = Ringer(str(sqlite_db.url), "local", str(tmp_path / "doorbells"), "0.2")
    try:
        assert ringer.next(30) == "ready"
        job_id = lives.submit(sqlite_db).id
        assert ringer.next(AT_ONCE_S) == job_id
    finally:
        ringer.close()


def test_a_local_ring_reaches_every_listener_and_passes_over_dead_ones(tmp_path: Path) -> None:
    bell = LocalBell(tmp_path)
    bell.ring("nobody listens")
    with BellListener(tmp_path) as first, BellListener(tmp_path) as second:
        (tmp_path / f"{2**22 + 1}.{servers.free_port()}").touch()
        (tmp_path / "junk").touch()
        bell.ring("job_1")
        assert [listener.wait_for_ring(1) for listener in (first, second)] == ["job_1", "job_1"]
        assert first.wait_for_ring(0.05) is None
        with BellListener(tmp_path):
            assert len(list(tmp_path.iterdir())) == 3, "notes of the dead are gone"
    assert list(tmp_path.iterdir()) == []
    bell.ring("nobody listens any more")
    bell.close()


def test_ringing_never_waits_for_a_broker_that_is_absent_or_frozen(valkey_server: servers.Server) -> None:
    absent = CeleryBell(f"redis://127.0.0.1:{servers.free_port()}/0")
    assert seconds(lambda: absent.ring("job_1")) < 0.05
    frozen = CeleryBell(servers.redis_url(valkey_server))
    valkey_server.freeze()
    for _ in range(2000):
        assert seconds(lambda: frozen.ring("job_1")) < 0.05
    for bell in (absent, frozen):
        assert seconds(bell.close) < 3
    valkey_server.thaw()


def test_a_bell_rings_again_once_the_broker_is_back_and_so_does_the_worker(
    sqlite_db: Database, valkey_server: servers.Server
) -> None:
    broker_url = servers.redis_url(valkey_server)
    bell = CeleryBell(broker_url)
    with Delivery(bell, (str(sqlite_db.url), "celery", broker_url)).worker() as worker:
        valkey_server.kill()
        bell.ring(lives.submit(sqlite_db).id)
        time.sleep(0.5)
        valkey_server.start()
        deadline = time.monotonic() + 30
        taken = None
        while taken is None and time.monotonic() < deadline:
            bell.ring("job_any")
            taken = worker.next(1)
        assert taken is not None
    bell.close()


def test_messages_that_are_no_rings_do_not_end_a_worker(sqlite_db: Database, valkey_server: servers.Server) -> None:
    broker_url = servers.redis_url(valkey_server)
    bell = CeleryBell(broker_url)
    with Delivery(bell, (str(sqlite_db.url), "celery", broker_url)).worker() as worker:
        stranger = celery_app(broker_url, worker=False)
        stranger.send_task(TASK, [], queue=QUEUE)
        stranger.send_task(TASK, [{"no": "id"}, 2], queue=QUEUE)
        stranger.send_task("some.other.task", ["x"], queue=QUEUE)
        stranger.close()
        job_id = lives.submit(sqlite_db).id
        bell.ring(job_id)
        assert worker.next(AT_ONCE_S) == job_id
    bell.close()


def test_the_bell_of_a_deployment_follows_its_broker(tmp_path: Path) -> None:
    local = open_bell(Settings(home=tmp_path))
    remote = open_bell(Settings(home=tmp_path, broker_url="redis://127.0.0.1:1/0", api_key=SecretStr("k")))
    assert isinstance(local, LocalBell)
    assert isinstance(remote, CeleryBell)
    local.close()
    remote.close()


def test_a_note_names_its_process_and_an_open_port(tmp_path: Path) -> None:
    with BellListener(tmp_path):
        [note] = tmp_path.iterdir()
        pid, port = map(int, note.name.split("."))
        assert pid == os.getpid()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, pytest.raises(OSError, match="in use"):
            probe.bind(("127.0.0.1", port))


def seconds(act: Callable[[], None]) -> float:
    """How long it took."""
    began = time.monotonic()
    act()
    return time.monotonic() - began
