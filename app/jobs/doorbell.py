"""The doorbell: the message to workers that a job waits.

It may come never, twice or late; the row is the truth, and recovery rings again. In the embedded service it is a
datagram on loopback to every worker of this home; with a broker, a Celery message by task name.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from app.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

log = structlog.get_logger()

TASK = "espalier.ring"
QUEUE = "espalier"
MESSAGE_LIFE_S = 60  # recovery rings again long before
MOST_WAITING_RINGS = 1000
LONGEST_DATAGRAM = 256


class Doorbell(Protocol):
    """A way to send rings."""

    def ring(self, job_id: str) -> None:
        """Tell the workers that the job waits. Never raises, returns at once."""

    def close(self) -> None:
        """Close what rings are sent through."""


class LocalBell:
    """Rings the workers of one home on this machine: a datagram to each port noted in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def ring(self, job_id: str) -> None:
        """Send the id to every listener, without waiting for a full buffer or a listener that ended."""
        for port in _noted_ports(self._folder):
            try:
                self._socket.sendto(job_id.encode()[:LONGEST_DATAGRAM], ("127.0.0.1", port))
            except OSError as error:
                log.debug("ring lost", port=port, reason=str(error))  # the worker polls

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class BellListener:
    """A worker's side of `LocalBell`: a port of its own, noted as an empty file `<folder>/<pid>.<port>`."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        folder.mkdir(parents=True, exist_ok=True)
        _remove_dead_notes(folder)
        port: int = self._socket.getsockname()[1]
        self._note = folder / f"{os.getpid()}.{port}"
        self._note.touch()

    def __enter__(self) -> BellListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for_ring(self, timeout_s: float) -> str | None:
        """The id of the job that was rung for, a hint (anybody can send one); None after `timeout_s` of silence."""
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(LONGEST_DATAGRAM).decode("ascii", "replace")
        except TimeoutError:
            return None

    def close(self) -> None:
        """Remove the note and close the port."""
        self._note.unlink(missing_ok=True)
        self._socket.close()


class CeleryBell:
    """Rings through the broker, from a thread of its own: no request waits for a broker that is away or frozen."""

    def __init__(self, broker_url: str) -> None:
        self._broker_url = broker_url
        self._rings: queue.Queue[str | None] = queue.Queue(MOST_WAITING_RINGS)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def ring(self, job_id: str) -> None:
        """Queue the id for the thread; dropped when a thousand wait, because then the broker was away for long."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._send_rings, name="doorbell", daemon=True)
                self._thread.start()
        try:
            self._rings.put_nowait(job_id)
        except queue.Full:
            log.debug("ring dropped", job=job_id)

    def close(self) -> None:
        """Stop after the current ring; the thread is a daemon, so a frozen broker does not keep the process alive."""
        self._closed.set()
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._rings.put_nowait(None)
            self._thread.join(timeout=2.0)

    def _send_rings(self) -> None:
        from kombu.exceptions import KombuError

        app = celery_app(self._broker_url, worker=False)
        away = False
        while (job_id := self._rings.get()) is not None and not self._closed.is_set():
            try:
                app.send_task(TASK, [job_id], queue=QUEUE, ignore_result=True, expires=MESSAGE_LIFE_S)
            except (KombuError, OSError) as error:
                if not away:
                    log.warning("broker does not answer, rings are lost until it is back", reason=str(error))
                away = True
            else:
                if away:
                    log.info("broker back")
                away = False
        app.close()


def open_bell(settings: Settings) -> Doorbell:
    """The doorbell of this deployment."""
    return CeleryBell(settings.broker_url) if settings.broker_url else LocalBell(settings.doorbells)


def celery_app(broker_url: str, *, worker: bool) -> Celery:
    """A Celery application with the settings that were measured, for sending or for a worker."""
    from celery import Celery  # 12 MiB that the embedded service does not need

    app = Celery("espalier", broker=broker_url, set_as_current=False)
    app.conf.update(celery_options(worker=worker))
    return app


def celery_options(*, worker: bool) -> dict[str, Any]:
    """Celery's settings. Messages are acknowledged early: the claim is the guard, a second delivery would be useless.

    With prefetch off an idle worker gets a message in 0.1 s while another is busy (10 s with it). The transport's
    options decide how long a publish takes without Redis: 0.06 s refused, 1 s frozen; the defaults hang for more than
    40 s.
    """
    return {
        "task_ignore_result": True,
        "result_backend": None,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_default_queue": QUEUE,
        "worker_pool": "threads",
        "worker_prefetch_multiplier": 1,
        "task_acks_late": False,
        "worker_disable_prefetch": True,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_redirect_stdouts": False,
        "worker_hijack_root_logger": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "task_publish_retry": False,
        "broker_connection_timeout": 1,
        "broker_transport_options": {
            "socket_timeout": 5 if worker else 1,
            "socket_connect_timeout": 1,
            "retry_on_timeout": False,
            "max_retries": 1,
            "interval_start": 0,
            "interval_max": 0.1,
        },
    }


def _noted_ports(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return []
    ports = (name.rpartition(".")[2] for name in names)
    return [int(port) for port in ports if port.isascii() and port.isdigit() and 0 < int(port) < 65536]


def _remove_dead_notes(folder: Path) -> None:
    for note in folder.iterdir():
        pid = note.name.partition(".")[0]
        if not (pid.isascii() and pid.isdigit() and _is_alive(int(pid))):
            note.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
