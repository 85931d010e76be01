"""A worker process of the delivery suite: claims what it is rung for, and prints `> ` and each job's id.

    python -m tests.support.services.ringer DATABASE_URL local HOME POLL_S
    python -m tests.support.services.ringer DATABASE_URL celery BROKER_URL

A job named `busy` occupies it until the job is cancelled. With Celery it runs the real command line of its worker, and
never polls.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from celery.signals import worker_ready

from app.database.engine import Database
from app.jobs import attempts
from app.jobs.doorbell import QUEUE, TASK, BellListener, celery_app

WORKER_ARGUMENTS = [
    "worker", "--pool=threads", "--concurrency=1", f"--queues={QUEUE}", "--loglevel=WARNING",
    "--without-gossip", "--without-mingle", "--without-heartbeat",
]  # fmt: skip


def take_all(db: Database, hint: str | None) -> None:
    """Claim until nothing waits."""
    while (claim := attempts.claim(db, worker_id="w", hint=hint)) is not None:
        print(">", claim.job_id, flush=True)
        while claim.name == "busy" and attempts.renew(db, claim, worker_id="w") != "cancel":
            time.sleep(0.05)


def listen(db: Database, doorbells: Path, poll_s: float) -> None:
    """Wait for the local bell, for ever."""
    with BellListener(doorbells) as bell:
        print("> ready", flush=True)
        while True:
            take_all(db, bell.wait_for_ring(poll_s))


def serve(db: Database, broker_url: str) -> None:
    """Run Celery's worker until SIGTERM."""
    app = celery_app(broker_url, worker=True)

    @app.task(name=TASK, ignore_result=True)  # type: ignore[untyped-decorator, unused-ignore]
    def ring(job_id: str) -> None:
        take_all(db, job_id)

    worker_ready.connect(lambda **_: print("> ready", flush=True), weak=False)
    app.worker_main(WORKER_ARGUMENTS)


if __name__ == "__main__":
    database = Database(sys.argv[1])
    if sys.argv[2] == "local":
        listen(database, Path(sys.argv[3]), float(sys.argv[4]))
    else:
        serve(database, sys.argv[3])
