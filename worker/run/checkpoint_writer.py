"""Checkpoints of a run: tensors are copied at once, and written while the training goes on."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.errors import DiskFull
from app.failpoints import failpoint
from app.planning.phases import PhaseName
from worker.checkpoint import STEM, write_checkpoint
from worker.journal import Journal, SavedCheckpoint
from worker.run.state import Reached

# A checkpoint inside an epoch comes at most every 20 times as long as the last one took to write: 5 % of the time.
REST_FACTOR = 20


class CheckpointWriter:
    """Writes checkpoints beside the training: copies tensors at once, a thread writes and announces the files.

    The announced files belong to whoever reads the journal. The last one also stays under another name (`latest`), for
    this process.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        *,
        interval_s: float,
        identity: Mapping[str, Any],
        write: Callable[..., Path] = write_checkpoint,
    ) -> None:
        """`identity` goes into each checkpoint's JSON (job, digest of its spec); `interval_s` is inside epochs."""
        self._folder = folder / "checkpoints"
        self._latest = folder / "latest"
        self._journal = journal
        self._interval_s = interval_s
        self._identity = dict(identity)
        self._write = write
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None
        self._last_at = time.monotonic()
        self._last_took_s = 0.0
        self._last_step = -1
        self._failures = 0

    @property
    def latest(self) -> Path | None:
        """The folder of the newest checkpoint that is on the disk; None if there is none."""
        self.wait_for_write()
        return self._latest if (self._latest / f"{STEM}.json").exists() else None

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for one inside an epoch."""
        return time.monotonic() - self._last_at >= max(self._interval_s, REST_FACTOR * self._last_took_s)

    def save(self, reached: Reached, *, phase: PhaseName, epoch: int, metrics: Mapping[str, float]) -> None:
        """Copy what was reached and have it written, unless this step has its checkpoint already.

        Raises:
            DiskFull: the disk was full twice in a row.
        """
        self.wait_for_write()
        if reached.step == self._last_step:
            return
        arrays, state = reached.capture()
        state |= self._identity
        step = reached.step
        self._last_at, self._last_step = time.monotonic(), step

        def write() -> None:
            began = time.monotonic()
            failpoint("checkpoint_write")
            tensors = self._write(self._folder, f"{step:012d}", arrays, state)
            document = tensors.with_suffix(".json")
            self._link_latest(tensors, document)
            self._last_took_s = time.monotonic() - began
            self._journal.checkpoint(SavedCheckpoint(step, epoch, phase, tensors, document, metrics))

        self._pending = self._writer.submit(write)

    def wait_for_write(self) -> None:
        """Wait until the last checkpoint is written. If the disk was full: an event, the second time an error."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._failures = 0
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._failures += 1
            self._last_step = -1
            if self._failures > 1:
                raise DiskFull("the worker's disk was full at two checkpoints in a row") from exc
            self._journal.event(
                "warning", "the disk is full: a checkpoint was skipped", level="warn", code=DiskFull.code
            )

    def close(self) -> None:
        """End the thread; a checkpoint that is being written is finished."""
        self._writer.shutdown(wait=True)

    def _link_latest(self, tensors: Path, document: Path) -> None:
        self._latest.mkdir(exist_ok=True)
        for source, ending in ((tensors, "safetensors"), (document, "json")):
            sibling = self._latest / f".{STEM}.{ending}"
            sibling.unlink(missing_ok=True)
            os.link(source, sibling)
            sibling.replace(self._latest / f"{STEM}.{ending}")
