"""The worker: claims jobs, runs each in a trainer process, reports that it is alive.

It has `slots` places for jobs, one per GPU. A ring (a Celery message, or a datagram of the API on this host) makes it
poll the queue at once; without one it polls every `poll_s`. A ring is only a hint: the row is the job.
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
    """One worker process: its slots, its pool of trainers, its row in the table of workers."""

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
        self._scratch = _make_scratch(settings.scratch)
        _reap_dead_workers(db)
        threads = {"ESPALIER_THREADS": str(settings.threads)} if settings.threads else {}
        self._trainer_pool = TrainerPool(self._scratch, spares=settings.slots, environment=threads)
        self._register()
        self._threads.append(threading.Thread(target=self._beat_until_stop, name="beat"))
        self._threads[0].start()  # a thread of its own: sweeps can wait minutes for a store that is away
        threading.Thread(target=self._sweep_until_stop, name="sweep", daemon=True).start()

    def run_until_idle(self, hint: str | None = None) -> None:
        """Claim and run jobs in a free slot until none waits; returns at once when no slot is free."""
        slot = self._take_slot()
        if slot is None:
            return  # the slot of a running job polls again when it ends
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
                    trainer_pool=self._trainer_pool,
                    scratch=self._scratch,
                    worker_id=self.id,
                    slot=slot,
                    stopping=self.stopping.is_set,
                ).run()
                self._running.pop(slot, None)
        except Unavailable as error:
            log.warning("database or store does not answer", reason=str(error))  # the next poll tries again
        finally:
            self._running.pop(slot, None)
            with self._lock:
                self._free.append(slot)

    def poll_queue(self, hint: str | None = None) -> None:
        """Poll the queue from a thread of its own, if a slot is free; `hint` is the id of a job that was rung for."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if self._free and not self.stopping.is_set():
            thread = threading.Thread(target=self.run_until_idle, args=(hint,), name="slot")
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Wait until running jobs have written checkpoints and are released, end the trainers, remove the row."""
        self.stopping.set()
        for thread in self._threads:
            thread.join()
        self._trainer_pool.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        try:
            workers.remove_worker(self._db, self.id)
        except Unavailable as error:
            log.warning("the row of this worker was not removed", reason=str(error))

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

    def _beat_until_stop(self) -> None:
        """Record every 10 s that this worker is alive, until it stops."""
        while not self.stopping.wait(min(BEAT_S, self._settings.sweep_s)):
            try:
                if not workers.record_beat(self._db, self.id, running=sorted(self._running.values())):
                    self._register()  # this host was suspended for a day
            except Unavailable as error:
                log.warning("beat failed", reason=str(error))

    def _sweep_until_stop(self) -> None:
        """Sweep until the worker stops. A sweep may fail or be interrupted by the worker's end: another follows."""
        sweeper = Sweeper(self._db, self._storage, None, self._settings)
        while not self.stopping.wait(self._settings.sweep_s):
            sweeper.try_sweep()


def _reap_dead_workers(db: Database) -> None:
    """Take jobs from dead workers of this host at once, without waiting for their leases, and remove their rows."""
    for worker in workers.list_workers(db):
        if worker.host == platform.node() and _has_ended(worker.pid):
            lost = attempts.reap_worker(db, worker.id)
            workers.remove_worker(db, worker.id)
            log.info("jobs taken from a dead worker", worker=worker.id, jobs=lost)


def _make_scratch(folder: Path) -> Path:
    """Make this process's empty part of the scratch folder, and remove the parts of dead workers; returns its path."""
    host = platform.node()
    for part in folder.iterdir() if folder.exists() else ():
        owner, _, pid = part.name.rpartition(".")
        if owner == host and pid.isdecimal() and _has_ended(int(pid)):
            shutil.rmtree(part, ignore_errors=True)
    own = folder / f"{host}.{os.getpid()}"
    own.mkdir(parents=True, exist_ok=True)
    return own


def _has_ended(pid: int) -> bool:
    """True if the earlier worker with this pid has ended; in a restarted container this process may have its pid."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
