"""The Celery side of a worker: one thin task. The message carries a job id and may be lost, doubled or late; the row is the truth."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.signals import worker_shutting_down

from app.queue import celery_options
from worker.supervisor import Supervisor

TASK = "espalier.ring"


def run_celery(supervisor: Supervisor, broker_url: str, slots: int) -> None:
    """Serve rings from the broker until SIGTERM; running jobs are then told to checkpoint and return."""
    app = Celery("espalier", broker=broker_url, set_as_current=False)
    app.conf.update(celery_options(worker=True), worker_concurrency=slots)

    @app.task(name=TASK, ignore_result=True)  # type: ignore[untyped-decorator]
    def ring(job_id: str) -> None:
        supervisor.run_until_idle(hint=job_id)

    def stop(**_: Any) -> None:
        supervisor.stopping.set()

    worker_shutting_down.connect(stop, weak=False)
    app.worker_main(
        [
            "worker", "--pool=threads", f"--concurrency={slots}", "--queues=espalier", "--loglevel=WARNING",
            "--without-gossip", "--without-mingle", "--without-heartbeat",
        ]  # fmt: skip
    )
