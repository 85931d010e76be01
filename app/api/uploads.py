"""Files that arrive as the raw body of a request: streamed to this machine's disk, and removed after their use."""

from __future__ import annotations

import errno
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from app.api.bodies import refuse_encoding
from app.api.context import Context
from app.errors import InvalidParameter, StorageFull

PIECE_BYTES = 1 << 20
ABANDONED_S = 3600.0  # an upload that still runs writes at least every 30 s
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class ReceivedFile:
    """A whole upload in a file of this machine."""

    path: Path
    size_bytes: int
    sha256: str


def staging_folder(context: Context) -> Path:
    """The folder in which uploads arrive."""
    return context.settings.home_folder / "uploads"


def sweep_staging(folder: Path) -> None:
    """Remove the partial files of uploads whose process was killed."""
    for path in folder.glob("*.upload"):
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)


@asynccontextmanager
async def receive_upload(request: Request, context: Context) -> AsyncIterator[ReceivedFile]:
    """Write the body to a file that is removed afterwards, whatever happens; at most a few pieces are in memory.

    Raises StorageFull, InvalidParameter, UnsupportedMediaType; TooLarge and RequestTimeout come from `RequestGuard`.
    """
    refuse_encoding(request)
    with _translate_full_disk():
        file = await run_in_threadpool(_open_file, staging_folder(context))
    path = Path(file.name)
    try:
        with _translate_full_disk():
            received = await _write_body(request, file, path)
        if received.size_bytes == 0:
            raise InvalidParameter("the body is empty: send the file as the body (curl --data-binary @FILE)")
        yield received
    finally:
        file.close()
        path.unlink(missing_ok=True)


async def _write_body(request: Request, file: BinaryIO, path: Path) -> ReceivedFile:
    digest = hashlib.sha256()
    size = 0
    piece = bytearray()

    def write_piece(content: bytes) -> None:
        digest.update(content)
        file.write(content)

    async for chunk in request.stream():
        piece += chunk
        if len(piece) >= PIECE_BYTES:
            size += len(piece)
            await run_in_threadpool(write_piece, bytes(piece))
            piece.clear()
    size += len(piece)
    await run_in_threadpool(write_piece, bytes(piece))
    await run_in_threadpool(file.flush)
    return ReceivedFile(path, size, digest.hexdigest())


def _open_file(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.NamedTemporaryFile(dir=folder, suffix=".upload", delete=False)


@contextmanager
def _translate_full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in FULL:
            raise StorageFull("the disk for uploads is full: free space, then try again") from exc
        raise
