"""The embedded service: API and workers on one machine, all of their state in one folder.

    python -m app.serve --port N --home DIR [--workers K]

Prints one line, `listening on http://127.0.0.1:N`, when it is ready. Ctrl-C or SIGTERM ends all of it: running jobs are
checkpointed and queued, and a second start on the same folder goes on where it was.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import structlog

from app.api.server import ApiServer
from app.database.engine import Database
from app.errors import StartupError
from app.logs import configure_logs
from app.main import create_app
from app.parent_death import parent_environment
from app.settings import Settings, load_settings, trainer_threads

log = structlog.get_logger()

RESTART_S = 1.0  # a worker that ended is back within 2 s
GRACE_S = 40.0  # a worker needs 30 s at the most to checkpoint and release


class WorkerProcesses:
    """K worker processes; one that ends is started again."""

    def __init__(self, settings: Settings, count: int) -> None:
        self._environment = {
            **os.environ,
            **parent_environment(),
            "ESPALIER_HOME": str(settings.home_folder),
            "ESPALIER_THREADS": str(trainer_threads(settings, count)),
        }
        self._processes = [self._start() for _ in range(count)]
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._keep, name="workers")
        self._watch.start()

    def close(self) -> None:
        """Tell every worker to checkpoint and end; kill one that does not."""
        self._stopping.set()
        self._watch.join()
        for process in self._processes:
            process.terminate()
        until = time.monotonic() + GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "worker"], env=self._environment, start_new_session=True)

    def _keep(self) -> None:
        while not self._stopping.wait(RESTART_S):
            for place, process in enumerate(self._processes):
                if process.poll() is not None:
                    log.warning("worker ended, starting it again", exit_code=process.returncode)
                    try:
                        self._processes[place] = self._start()
                    except OSError as error:  # no memory, no process: the next second may have some
                        log.error("worker cannot be started", reason=str(error))


def main(arguments: list[str] | None = None) -> int:
    """Run the embedded service until it is told to stop; the exit code."""
    parser = argparse.ArgumentParser(prog="serve", description="Run the embedded service: API and workers, no broker.")
    parser.add_argument("--port", type=int, help="port to listen on (default: ESPALIER_PORT, else 8000; 0: a free one)")
    parser.add_argument("--home", type=Path, help="folder of all state (default: ESPALIER_HOME, else ~/.espalier)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default 1; 0: API alone)")
    options = parser.parse_args(arguments)
    configure_logs()
    try:
        _run(_settings(options), options.workers)
    except StartupError as error:
        print(f"espalier: {error.message}", file=sys.stderr)
        return 1
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    given = {"port": options.port, "home": options.home}
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    if settings.api_key is None and settings.host not in {"127.0.0.1", "::1", "localhost"}:
        raise StartupError(
            f"listening on {settings.host} needs a key: set ESPALIER_API_KEY, or ESPALIER_HOST=127.0.0.1"
        )
    return settings


def _run(settings: Settings, workers: int) -> None:
    with _own(settings.home_folder):
        listener = _bind(settings.host, settings.port)
        database = Database(settings.database)
        database.upgrade()
        database.close()
        server = ApiServer(create_app(settings), settings)

        def outlive(_number: int, _frame: FrameType | None) -> None:
            """uvicorn raises its signal again behind itself, where the workers still have to checkpoint."""
            server.should_exit = True  # and one that comes before uvicorn listens for it is not lost

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, outlive)
        staff = WorkerProcesses(settings, workers)
        try:
            server.run(sockets=[listener])
        finally:
            staff.close()


@contextmanager
def _own(home: Path) -> Iterator[None]:
    """The folder is ours alone while the service runs."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "serve.lock").open("w")
    except OSError as error:
        raise StartupError(f"cannot write to {home}: {error.strerror}; choose another folder with --home") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupError(f"another service already runs on {home}; stop it or choose another --home") from error
        yield


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartupError(
            f"port {port} of {host} cannot be used ({error.strerror}); choose another with --port"
        ) from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
