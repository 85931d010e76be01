"""The process that owns the device: one job in on stdin, files into scratch, JSON lines out. It has no credentials.

stdin, one JSON object a line:   {"run": {...}} once, then {"beat": n} at every renewal, {"wish": "cancel"|"stop"|"pause"|null}
stdout, one JSON object a line:  {"line": "ready"} once torch is imported; then, each with job and attempt, `event`, `progress`,
                                 `metric`, `checkpoint`, and last `done`, `paused`, `cancelled` or `failed`

It is started ahead of its job with torch already imported, does one job and ends: no state leaks into the next one. It ends by
itself when stdin closes or stays silent: a trainer never outlives its supervisor.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from app.errors import DataInvalid, Diverged, JobError, JsonValue, OutOfMemory
from app.parent_death import end_with_parent
from app.settings import load_settings
from worker.journal import Progress, SavedCheckpoint, Wish

EXIT_BUG, EXIT_TOLD = 70, 75
EXIT_CODES: tuple[tuple[type[JobError], int], ...] = ((DataInvalid, 64), (Diverged, 65), (OutOfMemory, 66))


class LineJournal:
    """The journal that the pipeline writes: every entry is one line on the supervisor's pipe."""

    def __init__(self, output: IO[str], wishes: SupervisorLines, *, job: str, attempt: int) -> None:
        self._output = output
        self._wishes = wishes
        self._owner: dict[str, JsonValue] = {"job": job, "attempt": attempt}
        self._lock = threading.Lock()

    def write(self, line: str, **fields: Any) -> None:
        """Send one line; whole lines only, whichever thread writes."""
        text = json.dumps({"line": line, **self._owner, **fields}, allow_nan=False)
        with self._lock:
            self._output.write(text + "\n")
            self._output.flush()

    def event(self, type: str, message: str, *, level: str = "info", **data: JsonValue) -> None:  # noqa: A002
        """Tell the user that something happened."""
        self.write("event", type=type, message=message, level=level, data=data, at=time.time())

    def progress(self, progress: Progress) -> None:
        """Tell how far the job is."""
        self.write("progress", progress=progress.document())

    def metric(self, series: str, step: int, value: float) -> None:
        """Add one point to a curve."""
        self.write("metric", series=series, step=step, value=value)

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """Announce a checkpoint whose files are complete."""
        self.write(
            "checkpoint",
            step=saved.step,
            epoch=saved.epoch,
            phase=saved.phase,
            tensors=str(saved.tensors),
            state=str(saved.state),
            metrics=dict(saved.metrics),
        )

    def wish(self) -> Wish | None:
        """What the user asked of the running job."""
        return self._wishes.current


class SupervisorLines:
    """What the supervisor last sent, read by a thread of its own."""

    def __init__(self, lines: IO[str]) -> None:
        self.current: Wish | None = None
        self.runs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lines = lines
        self._heard = time.monotonic()
        self._silence_s = 0.0  # without a line from the supervisor: comes with the job
        self._running = threading.Event()

    def listen(self) -> None:
        """Start to read; end the process when the supervisor is gone or silent."""
        threading.Thread(target=self._read, name="supervisor-lines", daemon=True).start()
        threading.Thread(target=self._watch, name="supervisor-watch", daemon=True).start()

    def _read(self) -> None:
        for text in self._lines:
            self._heard = time.monotonic()
            said = json.loads(text)
            if "run" in said:
                self.current = said["run"].pop("wish", None)
                self._silence_s = said["run"].pop("silence_s")
                self._running.set()
                self.runs.put(said["run"])
            elif "wish" in said:
                self.current = said["wish"]
        os._exit(EXIT_TOLD)

    def _watch(self) -> None:
        self._running.wait()
        while time.monotonic() - self._heard < self._silence_s:
            time.sleep(0.5)
        os._exit(EXIT_TOLD)


def main() -> NoReturn:
    """Wait for one job, run it, and send how it ended."""
    end_with_parent(signal.SIGKILL)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # a hung trainer shows its stack before it is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the supervisor decides
    _prefer_as_oom_victim()
    output = _take_stdout()
    wishes = SupervisorLines(sys.stdin)
    wishes.listen()
    device = _warm_up()
    output.write(json.dumps({"line": "ready", "pid": os.getpid(), "device": device}) + "\n")
    output.flush()
    order = wishes.runs.get()
    journal = LineJournal(output, wishes, job=order["job_id"], attempt=order["attempt"])
    code = _run(order, journal)
    output.flush()
    sys.stderr.flush()
    os._exit(code)  # no interpreter shutdown: nothing is left to write, and threads of torch may be slow to join


def _run(order: Mapping[str, Any], journal: LineJournal) -> int:
    from worker import pipeline

    task = pipeline.Task(
        job_id=order["job_id"],
        attempt=order["attempt"],
        spec=order["spec"],
        data=Path(order["data"]),
        scratch=Path(order["scratch"]),
        resume=Path(order["resume"]) if order.get("resume") else None,
        sources=Path(order["sources"]) if order.get("sources") else None,
        threads=order.get("threads"),
        device=_device_of_slot(order.get("device", "auto"), order.get("slot", 0)),
        checkpoint_interval_s=order.get("checkpoint_interval_s", 60.0),
    )
    try:
        outcome = pipeline.run(task, journal)
    except JobError as error:
        journal.write("failed", error=error.document())
        return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return EXIT_BUG
    if isinstance(outcome, pipeline.Delivered):
        journal.write(
            "done",
            artifacts=[delivery.document() for delivery in outcome.artifacts],
            summary=outcome.summary,
            report=outcome.report,
            stopped_early=outcome.stopped_early,
        )
        return 0
    journal.write("paused" if isinstance(outcome, pipeline.Paused) else "cancelled")
    return 0


def _take_stdout() -> IO[str]:
    """The pipe to the supervisor; whatever else prints goes to stderr, the job's log."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return pipe


def _prefer_as_oom_victim() -> None:
    """Make the kernel end the trainer, not the supervisor, when memory runs out; switch core dumps off."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():
        adjustment.write_text("800")


def _warm_up() -> str:
    """The device's name; torch and the pipeline are imported and one convolution has run."""
    import torch

    import worker.pipeline  # noqa: F401

    settings = load_settings()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device_of_slot(settings.device, 0)
    images_NCHW = torch.zeros(2, 3, 8, 8, device=device, requires_grad=True)
    convolution = torch.nn.Conv2d(3, 4, 3).to(device)
    convolution(images_NCHW).sum().backward()
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _device_of_slot(wanted: str, slot: int) -> str:
    """`auto` as a torch device: the slot's GPU, or the CPU where there is none."""
    import torch

    if wanted != "auto":
        return wanted
    return f"cuda:{slot % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
