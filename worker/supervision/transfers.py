"""Transfers of files between the worker's disk and the object store, while the job trains.

One thread per attempt, first in first out. Of checkpoints only the newest waits: with a slow store some are skipped, so
that the queue never grows.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app.database.engine import Database
from app.errors import ObjectNotFound, SourceUnavailable, Unavailable
from app.failpoints import failpoint
from app.jobs import attempts, references
from app.jobs.artifacts import artifact_key, checkpoint_key, latest_checkpoints, state_key
from app.jobs.attempts import Claim
from app.jobs.references import SourceFile
from app.spec.references import Reference
from app.storage import Storage
from worker.checkpoint import CheckpointRefused, check_checkpoint, file_digest, spec_digest

T = TypeVar("T")
RETRY_FOR_S = 600.0


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on the worker's disk, as the trainer reported it."""

    step: int
    epoch: int
    phase: str
    tensors: Path
    state: Path
    metrics: dict[str, float]


class Transfers:
    """The uploads and downloads of one attempt."""

    def __init__(self, claim: Claim, db: Database, storage: Storage) -> None:
        self._claim = claim
        self._db = db
        self._storage = storage
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="transfers")
        self._lock = threading.Lock()
        self._newest: CheckpointFiles | None = None
        self._closed = threading.Event()

    def run_later(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the thread of the transfers, after what waits already."""
        return self._pool.submit(work)

    def retry_while_away(self, work: Callable[[], T]) -> T:
        """Call `work` until the store and the database answer, so that the training does not end; returns its result.

        In the thread of the transfers. Raises Unavailable after ten minutes, or once `close` was called.
        """
        started, delay_s = time.monotonic(), 0.5
        while True:
            try:
                return work()
            except Unavailable:
                if self._closed.is_set() or time.monotonic() - started > RETRY_FOR_S:
                    raise
            self._closed.wait(delay_s * random.uniform(0.5, 1.5))
            delay_s = min(30.0, delay_s * 2)

    def publish_checkpoint(self, files: CheckpointFiles) -> Future[None]:
        """Store the bytes, then write the row, in the thread; a newer checkpoint replaces one that still waits."""
        with self._lock:
            replaced, self._newest = self._newest, files
        if replaced is not None:
            _remove(replaced)
        return self._pool.submit(self._publish_newest)

    def publish_artifact(self, name: str, path: Path) -> str:
        """Store the file; returns its key. Called in the thread of the transfers."""
        key = artifact_key(self._claim.job_id, self._claim.attempt, name)
        self.retry_while_away(lambda: self._storage.put_file(key, path))
        return key

    def fetch_checkpoint(self, folder: Path) -> tuple[Path | None, list[str]]:
        """Fetch the newest intact checkpoint to `folder`; returns that, and a sentence for each that is not intact."""
        problems = []
        for saved in latest_checkpoints(self._db, self._claim.job_id):
            tensors, state = folder / "checkpoint.safetensors", folder / "checkpoint.json"
            try:
                for key, path in ((saved.key, tensors), (saved.state_key, state)):
                    self.retry_while_away(lambda key=key, path=path: self._storage.fetch(key, path))  # type: ignore[misc]
            except ObjectNotFound:
                problems.append(f"the checkpoint of step {saved.step} is missing from the store")
                continue
            try:
                check_checkpoint(tensors, state, spec_sha256=spec_digest(self._claim.spec))
            except CheckpointRefused as refused:
                problems.append(f"the checkpoint of step {saved.step} cannot be used: {refused.message}")
                continue
            return folder, problems
        return None, problems

    def fetch_sources(self, named: Sequence[Reference], folder: Path) -> None:
        """Fetch the files of every network that the job refers to, each network to a folder named by its key.

        Raises SourceUnavailable if one was deleted, or its bytes have changed.
        """
        located = self.retry_while_away(lambda: references.locate_files(self._db, self._claim.tenant, named))
        for reference in named:
            for file in located[reference.key]:
                self._fetch_source(reference, file, folder / reference.key / file.name)

    def _fetch_source(self, reference: Reference, file: SourceFile, path: Path) -> None:
        what = f"the network of job {reference.id}" if reference.kind == "job" else f"weights {reference.id}"
        try:
            self.retry_while_away(lambda: self._storage.link_or_fetch(file.key, path))
        except ObjectNotFound as error:
            message = f"{what}: {file.name} is gone from the object store"
            raise SourceUnavailable(message, pointer=reference.pointer) from error
        if file_digest(path) != file.sha256:
            message = f"{what}: the bytes of {file.name} in the object store are not those that were stored"
            raise SourceUnavailable(message, pointer=reference.pointer)

    def close(self) -> None:
        """Stop after the current work; what still waits is dropped."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _publish_newest(self) -> None:
        with self._lock:
            files, self._newest = self._newest, None
        if files is None:
            return  # an earlier turn published the newer one
        try:
            self._publish(files)
        finally:
            _remove(files)

    def _publish(self, files: CheckpointFiles) -> None:
        key = checkpoint_key(self._claim.job_id, self._claim.attempt, files.step)
        self.retry_while_away(lambda: self._storage.put_file(key, files.tensors))
        self.retry_while_away(lambda: self._storage.put_file(state_key(key), files.state))
        failpoint("checkpoint_after_bytes")
        self.retry_while_away(
            lambda: attempts.record_checkpoint(
                self._db,
                self._claim,
                step=files.step,
                epoch=files.epoch,
                phase=files.phase,
                key=key,
                size_bytes=files.tensors.stat().st_size,
                sha256=file_digest(files.tensors),
                metrics=files.metrics,
            )
        )


def _remove(files: CheckpointFiles) -> None:
    files.tensors.unlink(missing_ok=True)
    files.state.unlink(missing_ok=True)
