"""The Celery side of a worker: one task. Its message carries a job id and may be lost, doubled or late."""

from __future__ import annotations

from typing import Any

from celery.signals import worker_shutting_down

from app.jobs.doorbell import QUEUE, TASK, celery_app
from worker.supervision.supervisor import Supervisor


def run_celery(supervisor: Supervisor, broker_url: str, slots: int) -> None:
    """Serve rings from the broker until SIGTERM; running jobs are then told to write a checkpoint and are released."""
    app = celery_app(broker_url, worker=True)

    @app.task(name=TASK, ignore_result=True)
    def ring(job_id: str) -> None:
        supervisor.run_until_idle(hint=job_id)

    def stop(**_: Any) -> None:
        supervisor.stopping.set()

    worker_shutting_down.connect(stop, weak=False)
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING"]
    app.worker_main(["worker", "--pool=threads", f"--concurrency={slots}", f"--queues={QUEUE}", *quiet])
