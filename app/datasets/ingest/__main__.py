"""The process that touches an upload: `python -m app.datasets.ingest UPLOAD FORMAT OUT --limits JSON --name NAME`.

It writes the packed folder OUT/packed and OUT/result.json, ends with 0 for a data set and for a refusal alike, and
has no credentials, little memory and a clock: whatever a hostile file does to it, the API sees a sentence.
"""

from __future__ import annotations

import argparse
import errno
import json
import resource
import signal
import sys
from pathlib import Path

from app.datasets.ingest.limits import Rejected, UploadLimits, UploadProblem
from app.datasets.ingest.pack import ingest
from app.datasets.packed.packed import PACKED, RESULT
from app.parent_death import end_with_parent

DISK_ERRORS = {
    errno.ENOSPC: "the service's disk is full: free space there, then send it again",
    errno.EDQUOT: "the service's disk quota is used up: free space there, then send it again",
    errno.EFBIG: "unpacks to a larger file than the limit allows",
}


def main(arguments: list[str] | None = None) -> int:
    """Check and pack one upload; 0 when `result.json` holds the answer."""
    parser = argparse.ArgumentParser(
        prog="python -m app.datasets.ingest", description="Check and pack one uploaded data set."
    )
    parser.add_argument("upload", type=Path)
    parser.add_argument("format", help="auto, image_folder, npz, cifar or idx")
    parser.add_argument("out", type=Path, help="an existing folder")
    parser.add_argument("--limits", type=json.loads, default={}, help="fields of Limits as a JSON object")
    parser.add_argument("--name", default="upload")
    chosen = parser.parse_args(arguments)
    end_with_parent(signal.SIGKILL)
    limits = UploadLimits(**chosen.limits)
    confine(limits)
    (chosen.out / RESULT).write_text(json.dumps(check(chosen.upload, chosen.format, chosen.out, limits, chosen.name)))
    return 0


def confine(limits: UploadLimits) -> None:
    """Bound this process for good: processor seconds, size of a file it writes, address space; no core dump."""
    for what, most in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, limits.unpacked_bytes + (1 << 20)),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard), hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG, which is answered in words


def check(upload: Path, kind: str, out: Path, limits: UploadLimits, name: str) -> dict[str, object]:
    """The answer for `result.json`: a manifest, or the problems of a refusal."""
    packed = out / PACKED
    packed.mkdir()
    try:
        ingested = ingest(upload, kind, packed, limits, name=name)
    except Rejected as refusal:
        return {"format": None, "manifest": None, "problems": [problem.document() for problem in refusal.problems]}
    except MemoryError:
        problem = UploadProblem("upload", f"needs more memory to be read than the limit of {limits.memory_bytes} bytes")
        return {"format": None, "manifest": None, "problems": [problem.document()]}
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return {
            "format": None,
            "manifest": None,
            "problems": [UploadProblem("upload", DISK_ERRORS[error.errno]).document()],
        }
    return {
        "format": ingested.format,
        "manifest": ingested.manifest.document(),
        "problems": [problem.document() for problem in ingested.problems],
    }


if __name__ == "__main__":
    sys.exit(main())
