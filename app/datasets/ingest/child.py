"""Starts the process that reads an upload, waits for it, and turns the way it ends into an answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from app.datasets.ingest.limits import UploadLimits
from app.datasets.packed.packed import PACKED, RESULT, Manifest
from app.parent_death import parent_environment

PROJECT = Path(__file__).parents[3]
POLL_S = 0.05
OUTPUT = "output.txt"
MOST_OUTPUT = 4000
WALL_S_PER_CPU_S = (
    3  # wall-clock seconds for each second of processor time that is allowed: disks are slow, machines are shared
)
TRIES_WHEN_KILLED = 2
INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME")


class CheckInterrupted(Exception):
    """The service stops: the check was ended and has to be repeated."""


@dataclass(frozen=True)
class CheckResult:
    """What a check found: format and manifest, or neither and the reasons as problems."""

    format: str | None
    manifest: Manifest | None
    problems: tuple[Mapping[str, str], ...]
    output: str = ""  # of the child; empty, unless it is broken


def check_in_child(
    upload: Path, kind: str, work: Path, limits: UploadLimits, *, name: str, stopping: threading.Event | None = None
) -> CheckResult:
    """Check and pack an upload in a child process; returns its answer.

    The packed files are in `work/packed`; `work` is an empty folder. If something outside kills the child, another one
    tries again, because the upload may not be to blame.

    Raises CheckInterrupted when `stopping` is set before the child is done.
    """
    for tries_left in reversed(range(TRIES_WHEN_KILLED)):
        code = _run_child(_command(upload, kind, work, limits, name), work, limits, stopping)
        result = work / RESULT
        if code == 0 and result.exists():
            return read_answer(result)
        if code in (-signal.SIGXCPU, None) or code >= 0 or not tries_left:
            break
        _empty_folder(work)
    output = (work / OUTPUT).read_text("utf-8", "replace")[-MOST_OUTPUT:]
    return CheckResult(None, None, ({"file": "upload", "message": _refusal(code, limits)},), output)


def read_answer(result: Path) -> CheckResult:
    """The answer that a child wrote."""
    document = json.loads(result.read_text())
    manifest = document["manifest"]
    return CheckResult(
        document["format"],
        None if manifest is None else Manifest.from_document(manifest),
        tuple(document["problems"]),
    )


def _command(upload: Path, kind: str, work: Path, limits: UploadLimits, name: str) -> list[str]:
    program = [sys.executable, "-m", "app.datasets.ingest", str(upload.absolute()), kind, str(work.absolute())]
    return [*program, f"--limits={json.dumps(asdict(limits))}", f"--name={name}"]


def _run_child(command: list[str], work: Path, limits: UploadLimits, stopping: threading.Event | None) -> int | None:
    """Run the child; returns its exit code, None where it took too long and was killed. Its output is in `work`."""
    environment = {key: os.environ[key] for key in INHERITED if key in os.environ}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (work / OUTPUT).open("wb") as output:
        child = subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**environment, **threads, **parent_environment()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that a Ctrl-C reaches the service only, which then ends the child
        )
        deadline = time.monotonic() + WALL_S_PER_CPU_S * limits.cpu_s
        try:
            while True:
                try:
                    return child.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    if stopping is not None and stopping.is_set():
                        raise CheckInterrupted from None
                    if time.monotonic() > deadline:
                        return None
        finally:
            child.kill()
            child.wait()


def _refusal(code: int | None, limits: UploadLimits) -> str:
    if code is None or code == -signal.SIGXCPU:
        return f"takes more than {limits.cpu_s} s to check: send fewer or smaller files"
    if code < 0:
        return f"could not be checked: the checking process was killed by {signal.Signals(-code).name} (memory?)"
    return f"could not be checked: the checking process ended with code {code}; the service's log says more"


def _empty_folder(work: Path) -> None:
    shutil.rmtree(work / PACKED, ignore_errors=True)
    (work / RESULT).unlink(missing_ok=True)
