"""Starts the process that touches an upload, waits for it, and turns however it ends into an answer."""

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
LOOK_S = 0.05
OUTPUT = "output.txt"
MOST_WORDS = 4000
SLOWEST = 3  # wall-clock seconds for each second of processor time that is allowed: disks are slow, machines are shared
TRIES_WHEN_KILLED = 2
INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME")


class CheckInterrupted(Exception):
    """The service stops: the check was ended and has to be done again."""


@dataclass(frozen=True)
class CheckResult:
    """What a check found: format and manifest, or neither and the reasons as problems."""

    format: str | None
    manifest: Manifest | None
    problems: tuple[Mapping[str, str], ...]
    words: str = ""  # what the child wrote to its outputs: nothing, unless it is broken


def check_in_child(
    upload: Path, kind: str, work: Path, limits: UploadLimits, *, name: str, stopping: threading.Event | None = None
) -> CheckResult:
    """The answer about an upload, which a child process checks and packs into `work/packed`; `work` is an empty folder.

    A child that something outside kills gets a second try, because the upload may not be to blame.

    Raises Interrupted when `stopping` is set before the child is done.
    """
    for tries_left in reversed(range(TRIES_WHEN_KILLED)):
        code = _run(_command(upload, kind, work, limits, name), work, limits, stopping)
        result = work / RESULT
        if code == 0 and result.exists():
            return read_answer(result)
        if code in (-signal.SIGXCPU, None) or code >= 0 or not tries_left:
            break
        _empty(work)
    words = (work / OUTPUT).read_text("utf-8", "replace")[-MOST_WORDS:]
    return CheckResult(None, None, ({"file": "upload", "message": _reason(code, limits)},), words)


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


def _run(command: list[str], work: Path, limits: UploadLimits, stopping: threading.Event | None) -> int | None:
    """The exit code, None where the child took too long and was killed; its own words are in `work`."""
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
            start_new_session=True,  # a Ctrl-C is for the service, which then ends the child itself
        )
        deadline = time.monotonic() + SLOWEST * limits.cpu_s
        try:
            while True:
                try:
                    return child.wait(LOOK_S)
                except subprocess.TimeoutExpired:
                    if stopping is not None and stopping.is_set():
                        raise CheckInterrupted from None
                    if time.monotonic() > deadline:
                        return None
        finally:
            child.kill()
            child.wait()


def _reason(code: int | None, limits: UploadLimits) -> str:
    if code is None or code == -signal.SIGXCPU:
        return f"takes more than {limits.cpu_s} s to check: send fewer or smaller files"
    if code < 0:
        return f"could not be checked: the checking process was killed by {signal.Signals(-code).name} (memory?)"
    return f"could not be checked: the checking process ended with code {code}; the service's log says more"


def _empty(work: Path) -> None:
    shutil.rmtree(work / PACKED, ignore_errors=True)
    (work / RESULT).unlink(missing_ok=True)
