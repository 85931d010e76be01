"""Trainer processes: where they are started, and what the supervisor holds of each.

The kernel ends a child when the *thread* that forked it ends (PR_SET_PDEATHSIG), so every trainer is started by one thread that
lives as long as the worker. It also keeps warm spares: a trainer that has torch imported before its job exists.
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
SPARE_DELAY_S = 3.0  # importing torch takes two seconds of one core: not while the new job takes its first steps


class TrainerProcess:
    """One trainer: its lines out, our lines in, its log, its end."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: the pipe is closed
        self._reader = threading.Thread(target=self._read, name=f"trainer-{process.pid}", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """True until the process has ended."""
        return self.process.poll() is None

    def say(self, **line: Any) -> bool:
        """Send one line; False if the trainer no longer listens."""
        if self.process.stdin is None:
            return False
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True

    def next_line(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line, None at the end of the pipe; raises queue.Empty when nothing came in time."""
        return self.lines.get(timeout=timeout_s)

    def show_stack(self) -> None:
        """Have the stack of every thread written to the trainer's log."""
        if self.alive:
            self.process.send_signal(signal.SIGUSR1)

    def end(self) -> int:
        """Kill the trainer and everything it started, close its pipes; its exit code (negative: the signal)."""
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

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for text in self.process.stdout:
                if not text.endswith("\n"):
                    break  # cut in half by the trainer's death
                self.lines.put(json.loads(text))
        finally:
            self.lines.put(None)  # also after a line that is no JSON: whoever listens must not wait for ever


class TrainerPool:
    """Starts trainers, and keeps `spares` of them warm."""

    def __init__(self, scratch: Path, *, spares: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self._scratch = scratch
        self._spares = spares
        self._environment = dict(environment or {})
        self._waiting: queue.Queue[Future[TrainerProcess] | None] = queue.Queue()
        self._warm: list[TrainerProcess] = []
        self._started = 0
        self._thread = threading.Thread(target=self._work, name="nursery", daemon=True)
        self._thread.start()

    def take(self) -> TrainerProcess:
        """A trainer for one job: a warm spare, or a fresh one."""
        wanted: Future[TrainerProcess] = Future()
        self._waiting.put(wanted)
        return wanted.result()

    def close(self) -> None:
        """End the spares and the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            try:
                wanted = self._waiting.get(timeout=SPARE_DELAY_S if self._started else 0)
            except queue.Empty:
                self._keep_warm()
                continue
            if wanted is None:
                break
            try:
                wanted.set_result(self._warm.pop(0) if self._warm and self._warm[0].alive else self._start())
            except OSError as error:
                wanted.set_exception(error)
        for spare in self._warm:
            spare.discard()

    def _keep_warm(self) -> None:
        """Have as many spares as wanted; where none can be started, the next turn tries again.

        This thread must not end: the kernel would end every running trainer with it.
        """
        for dead in [spare for spare in self._warm if not spare.alive]:
            self._warm.remove(dead)
            dead.discard()
        try:
            while len(self._warm) < self._spares:
                self._warm.append(self._start())
        except OSError as error:
            log.warning("no spare trainer could be started", reason=str(error))

    def _start(self) -> TrainerProcess:
        self._started += 1
        self._scratch.mkdir(parents=True, exist_ok=True)
        words = self._scratch / f"trainer-{os.getpid()}-{self._started}.log"
        environment = {name: os.environ[name] for name in ALLOWED if name in os.environ}
        with words.open("wb") as stderr:
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
        return TrainerProcess(process, words)
