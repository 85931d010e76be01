"""The pool of trainer processes, and the supervisor's side of each.

The kernel ends a child when the *thread* that forked it ends (PR_SET_PDEATHSIG), so every trainer is started by one
thread that runs as long as the worker. It also has spares ready: trainers that imported torch before their job exists.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from app.parent_death import parent_environment

log = structlog.get_logger()

# What a trainer may see of this process's environment: no credentials, no URLs.
ALLOWED = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "ESPALIER_DEVICE",
        "ESPALIER_FAILPOINT",
        "ESPALIER_THREADS",
        "HOME",
        "LANG",
        "LC_ALL",
        "LD_LIBRARY_PATH",
        "MKL_NUM_THREADS",
        "OMP_NUM_THREADS",
        "PATH",
        "PYTHONPATH",
        "PYTHONWARNINGS",
        "TMPDIR",
        "TZ",
        "VIRTUAL_ENV",
    }
)
SPARE_DELAY_S = 3.0  # importing torch takes two seconds of one core: not during the first steps of the new job


class TrainerProcess:
    """One trainer process: lines are read from it and sent to it; it has a log; it can be ended."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: the pipe is closed
        self._reader = threading.Thread(target=self._read_lines, name=f"trainer-{process.pid}", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """True until the process has ended."""
        return self.process.poll() is None

    def send_line(self, **line: Any) -> bool:
        """Send one line; False if the trainer does not read any more."""
        if self.process.stdin is None:
            return False
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True

    def next_line(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line, None at the end of the pipe. Raises queue.Empty if no line comes in time."""
        return self.lines.get(timeout=timeout_s)

    def show_stack(self) -> None:
        """Make the trainer write the stack of every thread to its log."""
        if self.alive:
            self.process.send_signal(signal.SIGUSR1)

    def end(self) -> int:
        """Kill the trainer and everything it started, close its pipes; returns its exit code (negative: the signal)."""
        if self.alive:
            with suppress(ProcessLookupError):  # it ended in between
                os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a line that the dead trainer never read
                    pipe.close()
        return code

    def discard(self) -> None:
        """End a trainer that no job has, and remove its log."""
        self.end()
        self.log.unlink(missing_ok=True)

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        try:
            for text in self.process.stdout:
                if not text.endswith("\n"):
                    break  # cut off by the trainer's death
                self.lines.put(json.loads(text))
        finally:
            self.lines.put(None)  # also after a line that is not JSON, so that the reader does not wait for ever


class TrainerPool:
    """Starts trainers, and has `spares` of them ready."""

    def __init__(self, scratch: Path, *, spares: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self._scratch = scratch
        self._spares = spares
        self._environment = dict(environment or {})
        self._waiting: queue.Queue[Future[TrainerProcess] | None] = queue.Queue()
        self._ready: list[TrainerProcess] = []
        self._started = 0
        self._thread = threading.Thread(target=self._serve_requests, name="trainer-pool", daemon=True)
        self._thread.start()

    def take_trainer(self) -> TrainerProcess:
        """Take a trainer for one job out of the pool: a spare, or a new one."""
        wanted: Future[TrainerProcess] = Future()
        self._waiting.put(wanted)
        return wanted.result()

    def close(self) -> None:
        """End the spares and the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _serve_requests(self) -> None:
        while True:
            try:
                wanted = self._waiting.get(timeout=SPARE_DELAY_S if self._started else 0)
            except queue.Empty:
                self._start_spares()
                continue
            if wanted is None:
                break
            try:
                wanted.set_result(self._ready.pop(0) if self._ready and self._ready[0].alive else self._start())
            except OSError as error:
                wanted.set_exception(error)
        for spare in self._ready:
            spare.discard()

    def _start_spares(self) -> None:
        """Start spares until there are enough; if one cannot be started, the next turn tries again.

        This thread must not end: the kernel would end every running trainer with it.
        """
        for dead in [spare for spare in self._ready if not spare.alive]:
            self._ready.remove(dead)
            dead.discard()
        try:
            while len(self._ready) < self._spares:
                self._ready.append(self._start())
        except OSError as error:
            log.warning("no spare trainer could be started", reason=str(error))

    def _start(self) -> TrainerProcess:
        self._started += 1
        self._scratch.mkdir(parents=True, exist_ok=True)
        log_path = self._scratch / f"trainer-{os.getpid()}-{self._started}.log"
        environment = {name: os.environ[name] for name in ALLOWED if name in os.environ}
        with log_path.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.trainer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                start_new_session=True,
                cwd=self._scratch,
                env={**environment, **self._environment, **parent_environment()},
            )
        return TrainerProcess(process, log_path)
