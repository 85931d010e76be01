"""Start a worker: `python -m worker`, settings from `ESPALIER_*`."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading

from app.database.engine import Database
from app.errors import StartupError
from app.jobs.doorbell import BellListener
from app.logs import configure_logs
from app.parent_death import end_with_parent
from app.settings import Settings, load_settings
from app.storage import Storage
from worker.supervision.supervisor import Supervisor


def main() -> int:
    """Run until SIGTERM or Ctrl-C; returns the exit code."""
    end_with_parent(signal.SIGTERM)
    configure_logs()
    try:
        run_worker(load_settings())
    except StartupError as error:
        print(f"espalier worker: {error.message}", file=sys.stderr)
        return 1
    return 0


def run_worker(settings: Settings) -> None:
    """Run jobs until a signal stops the worker. Raises StartupError with one sentence if the machine is not ready."""
    if importlib.util.find_spec("torch") is None:
        raise StartupError("torch is not installed here; run: pip install -c constraints.txt -e '.[worker]'")
    db = Database(settings.database, pool_size=4)
    db.check_version()
    supervisor = Supervisor(settings, db, Storage.open(settings.storage))
    poller = threading.Thread(target=_poll_until_stop, args=(supervisor, settings), name="poll")
    try:
        if settings.broker_url is None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: supervisor.stopping.set())
            _poll_until_stop(supervisor, settings)
        else:
            from worker.supervision.celery_task import run_celery

            poller.start()
            run_celery(supervisor, settings.broker_url, settings.slots)
    finally:
        supervisor.stopping.set()
        if poller.is_alive():
            poller.join()  # it starts the threads that close() joins
        supervisor.close()
        db.close()


def _poll_until_stop(supervisor: Supervisor, settings: Settings) -> None:
    """Poll the queue at every ring of the local bell, and every `poll_s` without one, until the worker stops."""
    with BellListener(settings.doorbells) as bell:
        while not supervisor.stopping.is_set():
            supervisor.poll_queue(bell.wait_for_ring(settings.poll_s))


if __name__ == "__main__":
    sys.exit(main())
