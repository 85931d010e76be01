"""The process that reads an upload: `python -m app.datasets.ingest UPLOAD FORMAT OUT --limits JSON --name NAME`.

It writes the packed folder OUT/packed and OUT/result.json, and ends with 0 for a data set and for a refusal alike. It
has no credentials, and limits of memory and time: whatever a hostile file does to it, the API gets a sentence.
"""

from __future__ import annotations

import argparse
import errno
import json
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from app.datasets.ingest.limits import Rejected, UploadLimits, UploadProblem
from app.datasets.ingest.pack import pack_upload
from app.datasets.packed.packed import PACKED, RESULT
from app.parent_death import end_with_parent

DISK_ERRORS = {
    errno.ENOSPC: "the service's disk is full: free space there, then send it again",
    errno.EDQUOT: "the service's disk quota is used up: free space there, then send it again",
    errno.EFBIG: "unpacks to a larger file than the limit allows",
}


def main(arguments: list[str] | None = None) -> int:
    """Check and pack one upload; returns 0 when `result.json` holds the answer."""
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
    confine_process(limits)
    (chosen.out / RESULT).write_text(
        json.dumps(pack_or_refuse(chosen.upload, chosen.format, chosen.out, limits, chosen.name))
    )
    return 0


def confine_process(limits: UploadLimits) -> None:
    """Limit this process until its end: processor seconds, size of a file it writes, address space; no core dump."""
    for what, most in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, limits.unpacked_bytes + (1 << 20)),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard), hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG, which is answered in words


def pack_or_refuse(upload: Path, kind: str, out: Path, limits: UploadLimits, name: str) -> dict[str, object]:
    """Pack the upload; returns the answer for `result.json`: a manifest, or the problems of a refusal."""
    packed = out / PACKED
    packed.mkdir()
    try:
        packed_upload = pack_upload(upload, kind, packed, limits, name=name)
    except Rejected as refusal:
        return _answer(None, None, refusal.problems)
    except MemoryError:
        problem = UploadProblem("upload", f"needs more memory to be read than the limit of {limits.memory_bytes} bytes")
        return _answer(None, None, [problem])
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _answer(None, None, [UploadProblem("upload", DISK_ERRORS[error.errno])])
    return _answer(packed_upload.format, packed_upload.manifest.document(), packed_upload.problems)


def _answer(
    kind: str | None, manifest: dict[str, object] | None, problems: Sequence[UploadProblem]
) -> dict[str, object]:
    return {"format": kind, "manifest": manifest, "problems": [problem.document() for problem in problems]}


if __name__ == "__main__":
    sys.exit(main())
