"""The embedded service: API and workers on one machine, all of their state in one folder.

    python -m app.serve --port N --home DIR [--workers K]

Prints one line, `listening on http://127.0.0.1:N`, when it is ready. Ctrl-C or SIGTERM ends all of it: running jobs
write a checkpoint and are queued, and a second start on the same folder continues them.
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
from app.main import create_app, require_key
from app.parent_death import parent_environment
from app.settings import Settings, load_settings, trainer_threads

log = structlog.get_logger()

RESTART_S = 1.0  # a worker that ended is back within 2 s
GRACE_S = 40.0  # a worker needs 30 s at the most to checkpoint and release


class WorkerProcesses:
    """K worker processes. One that ends is started again."""

    def __init__(self, settings: Settings, count: int) -> None:
        self._environment = {
            **os.environ,
            **parent_environment(),
            "ESPALIER_HOME": str(settings.home_folder),
            "ESPALIER_THREADS": str(trainer_threads(settings, count)),
        }
        self._processes = [self._start_worker() for _ in range(count)]
        self._stopping = threading.Event()
        self._restarts = threading.Thread(target=self._restart_ended, name="workers")
        self._restarts.start()

    def close(self) -> None:
        """Ask every worker to write checkpoints and end; kill one that does not."""
        self._stopping.set()
        self._restarts.join()
        for process in self._processes:
            process.terminate()
        until = time.monotonic() + GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start_worker(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "worker"], env=self._environment, start_new_session=True)

    def _restart_ended(self) -> None:
        while not self._stopping.wait(RESTART_S):
            for index, process in enumerate(self._processes):
                if process.poll() is not None:
                    log.warning("worker ended, starting it again", exit_code=process.returncode)
                    try:
                        self._processes[index] = self._start_worker()
                    except OSError as error:  # no memory, no process: the next second may have some
                        log.error("worker cannot be started", reason=str(error))


def main(arguments: list[str] | None = None) -> int:
    """Run the embedded service until a signal stops it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="serve", description="Run the embedded service: API and workers, no broker.")
    parser.add_argument("--port", type=int, help="port to listen on (default: ESPALIER_PORT, else 8000; 0: a free one)")
    parser.add_argument("--home", type=Path, help="folder of all state (default: ESPALIER_HOME, else ~/.espalier)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default 1; 0: API alone)")
    options = parser.parse_args(arguments)
    configure_logs()
    try:
        _run_service(_read_settings(options), options.workers)
    except StartupError as error:
        print(f"espalier: {error.message}", file=sys.stderr)
        return 1
    return 0


def _read_settings(options: argparse.Namespace) -> Settings:
    given = {"port": options.port, "home": options.home}
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    require_key(settings)
    return settings


def _run_service(settings: Settings, workers: int) -> None:
    with _lock_folder(settings.home_folder):
        listener = _bind_listener(settings.host, settings.port)
        database = Database(settings.database)
        database.upgrade()
        database.close()
        app = create_app(settings)
        server = ApiServer(app, settings, app.state.context.stopping)

        def stop_server(_number: int, _frame: FrameType | None) -> None:
            """Stop the server and return: uvicorn raises the signal again at its end, while workers still run.

            A signal that comes before uvicorn handles it is not lost either.
            """
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop_server)
        processes = WorkerProcesses(settings, workers)
        try:
            server.run(sockets=[listener])
        finally:
            processes.close()


@contextmanager
def _lock_folder(home: Path) -> Iterator[None]:
    """Lock the folder while the service runs. Raises StartupError if another one runs on it."""
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


def _bind_listener(host: str, port: int) -> socket.socket:
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
