"""The worker: claims jobs, runs each in a trainer process, says that it is alive.

It has `slots` places, one per GPU. A ring (a Celery message, or a datagram of the API next door) makes it look at the queue at
once; without one it looks every `poll_s`. The ring is never the job: the row is.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import threading
from pathlib import Path

import structlog

from app.database.engine import Database
from app.errors import Unavailable
from app.jobs import attempts, workers
from app.jobs.recovery import Sweeper
from app.settings import Settings
from app.storage import Storage
from worker.supervision.attempt import AttemptRunner
from worker.supervision.trainer_pool import TrainerPool

log = structlog.get_logger()

BEAT_S = 10.0  # a worker counts as dead after 30 s


class Supervisor:
    """One worker process: its slots, its nursery of trainers, its row in the workers table."""

    def __init__(self, settings: Settings, db: Database, storage: Storage) -> None:
        self.id = f"w_{secrets.token_hex(6)}"
        self.stopping = threading.Event()
        self._settings = settings
        self._db = db
        self._storage = storage
        self._free = list(range(settings.slots))
        self._running: dict[int, str] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._scratch = _own_scratch(settings.scratch)
        _take_over(db)
        threads = {"ESPALIER_THREADS": str(settings.threads)} if settings.threads else {}
        self._nursery = TrainerPool(self._scratch, spares=settings.slots, environment=threads)
        self._register()
        self._threads.append(threading.Thread(target=self._beat, name="beat"))
        self._threads[0].start()  # apart from the sweeps: a store that is away holds them up for minutes
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()

    def run_until_idle(self, hint: str | None = None) -> None:
        """Claim and run jobs in a free slot until none waits; return at once when no slot is free."""
        slot = self._take_slot()
        if slot is None:
            return  # the running job's slot looks again when it ends
        try:
            while not self.stopping.is_set():
                claim = attempts.claim(self._db, worker_id=self.id, hint=hint, lease_s=self._settings.lease_s)
                if claim is None:
                    return
                hint = None
                self._running[slot] = claim.job_id
                AttemptRunner(
                    claim,
                    db=self._db,
                    storage=self._storage,
                    settings=self._settings,
                    trainer_pool=self._nursery,
                    scratch=self._scratch,
                    worker_id=self.id,
                    slot=slot,
                    stopping=self.stopping.is_set,
                ).run()
                self._running.pop(slot, None)
        except Unavailable as error:
            log.warning("database or store away", reason=str(error))  # the next look finds them back
        finally:
            self._running.pop(slot, None)
            with self._lock:
                self._free.append(slot)

    def look(self, hint: str | None = None) -> None:
        """Look at the queue from a thread of its own, if a slot is free."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if self._free and not self.stopping.is_set():
            thread = threading.Thread(target=self.run_until_idle, args=(hint,), name="slot")
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Let running jobs checkpoint and be released, end the trainers, take the row away."""
        self.stopping.set()
        for thread in self._threads:
            thread.join()
        self._nursery.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        try:
            workers.remove_worker(self._db, self.id)
        except Unavailable as error:
            log.warning("worker row stays", reason=str(error))

    def _take_slot(self) -> int | None:
        with self._lock:
            return self._free.pop(0) if self._free else None

    def _register(self) -> None:
        workers.register_worker(
            self._db,
            self.id,
            host=platform.node(),
            pid=os.getpid(),
            slots=self._settings.slots,
            device=self._settings.device,
        )

    def _beat(self) -> None:
        """Say again and again that this worker is alive."""
        while not self.stopping.wait(min(BEAT_S, self._settings.sweep_s)):
            try:
                if not workers.record_beat(self._db, self.id, running=sorted(self._running.values())):
                    self._register()  # this host was suspended for a day
            except Unavailable as error:
                log.warning("beat failed", reason=str(error))

    def _sweep(self) -> None:
        """Sweep again and again; a sweep may fail, or be cut off by the worker's end, and comes again."""
        sweeper = Sweeper(self._db, self._storage, None, self._settings)
        while not self.stopping.wait(self._settings.sweep_s):
            sweeper.try_sweep()


def _take_over(db: Database) -> None:
    """Give back at once what dead workers of this host held: their leases need not run out."""
    for worker in workers.list_workers(db):
        if worker.host == platform.node() and _ended(worker.pid):
            lost = attempts.reap_worker(db, worker.id)
            workers.remove_worker(db, worker.id)
            log.info("took over from a dead worker", worker=worker.id, jobs=lost)


def _own_scratch(folder: Path) -> Path:
    """This process's part of the scratch folder, empty; what dead workers of this host left there is removed."""
    host = platform.node()
    for part in folder.iterdir() if folder.exists() else ():
        owner, _, pid = part.name.rpartition(".")
        if owner == host and pid.isdecimal() and _ended(int(pid)):
            shutil.rmtree(part, ignore_errors=True)
    own = folder / f"{host}.{os.getpid()}"
    own.mkdir(parents=True, exist_ok=True)
    return own


def _ended(pid: int) -> bool:
    """True if the worker that started earlier with this number is gone; a restarted container gives it to this one."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
