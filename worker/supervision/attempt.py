"""One attempt of one job, from the claim to its end: lines of the trainer are read, fenced rows are written.

One object per attempt, and nothing outlives it: reader, pipes and files of a trainer are removed before the next claim,
so that no line of a dead trainer can reach the next job. Every write carries the attempt. If no row is changed,
LostOwnership is raised and the attempt ends silently, because another worker owns the job.
"""

from __future__ import annotations

import errno
import queue
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog

from app.database.engine import Database
from app.datasets import registry
from app.errors import DiskFull, JobError, LostOwnership, StorageFull, TimeLimit, Unavailable
from app.failpoints import failpoint
from app.jobs import attempts
from app.jobs.artifacts import NewArtifact
from app.jobs.attempts import Claim
from app.jobs.events import LOG_CAP_BYTES, NewEvent
from app.settings import Settings
from app.spec.job import parse_job
from app.spec.references import references_in
from app.storage import Storage
from worker.supervision.trainer_pool import TrainerPool, TrainerProcess
from worker.supervision.transfers import CheckpointFiles, Transfers

log = structlog.get_logger()
T = TypeVar("T")

# Until a trainer that does not obey is killed; a stop waits for its result.
PATIENCE_S = {"cancel": 10.0, "pause": 120.0}
RELEASE_S = 20.0  # a deploy waits 30 s for the whole worker
ORPHAN_S = 5.0  # a trainer ends itself this long after its supervisor should have ended it
TICK_S = 0.1
MOST_PENDING = 10_000  # events, and points of series, that wait while the database is away
LOG_BYTES = 64 * 1024  # of the trainer's log in one renewal
LAST_WORDS_BYTES = 4096
LONG_PHASES = frozenset({"preparing", "measuring", "exporting"})  # phases in which no line comes for minutes
FINAL_LINES = frozenset({"done", "paused", "cancelled", "failed"})


@dataclass
class PendingWrites:
    """What the trainer reported and the database does not have yet."""

    events: list[NewEvent] = field(default_factory=list)
    metrics: list[tuple[str, int, float]] = field(default_factory=list)
    progress: dict[str, Any] | None = None
    log_offset: int = 0

    @property
    def filled(self) -> bool:
        """True if there is anything to write but the log."""
        return bool(self.events or self.metrics or self.progress)


@dataclass(frozen=True)
class AttemptInputs:
    """The folders that a trainer reads: the packed data set, the checkpoint to resume from, the networks of the job."""

    data: Path
    resume: Path | None
    sources: Path | None


class AttemptRunner:
    """One attempt of one job in one slot."""

    def __init__(
        self,
        claim: Claim,
        *,
        db: Database,
        storage: Storage,
        settings: Settings,
        trainer_pool: TrainerPool,
        scratch: Path,
        worker_id: str,
        slot: int,
        stopping: Callable[[], bool],
    ) -> None:
        self._claim = claim
        self._db = db
        self._storage = storage
        self._settings = settings
        self._trainer_pool = trainer_pool
        self._worker_id = worker_id
        self._slot = slot
        self._stopping = stopping
        self._transfers = Transfers(claim, db, storage)
        self._scratch = scratch / f"{claim.job_id}-{claim.attempt}"
        self._trainer: TrainerProcess | None = None
        self._trainer_ready = False
        self._pending = PendingWrites()
        self._phase = "preparing"
        self._wish = claim.wish
        self._sent_wish: str | None = claim.wish
        self._wish_sent_at = time.monotonic()
        self._started_at = time.monotonic()
        self._renewed_at = boot_time()
        self._last_line_at = time.monotonic()
        self._uploads: list[Future[None]] = []
        self._log = log.bind(job=claim.job_id, attempt=claim.attempt)

    def run(self) -> None:
        """Run the attempt until it has ended in any way, and write that."""
        self._log.info("attempt started")
        try:
            try:
                failpoint("claim_after")
                self._scratch.mkdir(parents=True, exist_ok=True)
                self._write_end(self._run_trainer())
            except LostOwnership:
                raise
            except Exception as error:
                self._write_failure(error)
        except LostOwnership as lost:
            self._log.warning("attempt lost", reason=str(lost))
        except Unavailable as error:
            self._log.error("attempt abandoned", reason=str(error))  # the lease runs out, the job is queued again
        finally:
            if self._trainer is not None:
                self._trainer.discard()
            self._transfers.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _write_failure(self, error: Exception) -> None:
        """End the attempt after an error of this process: as failed, released, or crashed."""
        if self._trainer is not None:
            self._trainer.end()
        ending = _as_job_error(error)
        if ending is not None:
            self._write_all()
            self._fail_job(ending.document())
            self._log.warning("job failed", code=ending.code)
        elif isinstance(error, Unavailable):
            attempts.release(self._db, self._claim, why=error.message.removesuffix(": try again"))
            self._log.error("job released", reason=error.message)
        else:  # a mistake of this worker: it counts as a crash, so that the job runs again, though not for ever
            self._log.error("attempt failed", exc_info=error)
            reason = {"message": f"the worker failed: {self._without_paths(str(error)) or type(error).__name__}"}
            self._write_surely(lambda: attempts.crash(self._db, self._claim, reason=reason))

    def _run_trainer(self) -> dict[str, Any] | None:
        """Fetch the inputs, start the trainer, read its lines; returns the last one, None if it ended without one."""
        fetching = self._transfers.run_later(self._fetch_inputs)
        while not fetching.done() and self._requested_end() is None:  # a download that is under way ends by itself
            time.sleep(TICK_S / 4)
            self._keep_lease()
        if self._requested_end() is not None:
            return {"line": self._requested_end()}
        inputs = fetching.result()
        trainer = self._trainer = self._trainer_pool.take_trainer()
        self._last_line_at = time.monotonic()
        trainer.send_line(
            run={
                "job_id": self._claim.job_id,
                "attempt": self._claim.attempt,
                "spec": self._claim.spec,
                "data": str(inputs.data),
                "scratch": str(self._scratch),
                "resume": str(inputs.resume) if inputs.resume else None,
                "sources": str(inputs.sources) if inputs.sources else None,
                "threads": self._settings.threads,
                "device": self._settings.device,
                "slot": self._slot,
                "checkpoint_interval_s": self._settings.checkpoint_s,
                "wish": self._wish,
                "silence_s": self._settings.self_fence_s + ORPHAN_S,
            }
        )
        while True:
            try:
                line = trainer.next_line(TICK_S)
            except queue.Empty:
                line = {}
            if line is None or line.get("line") in FINAL_LINES:
                return line
            self._handle_line(line)
            self._keep_lease()
            if not self._send_wish(trainer):
                trainer.end()
                return {"line": self._requested_end()}  # the job goes on from the last checkpoint
            if self._is_silent(trainer):
                trainer.end()
                return None

    def _requested_end(self) -> str | None:
        """The last line of a trainer that ends because of a wish or of a stop; None if there is neither."""
        if self._wish == "cancel":
            return "cancelled"
        return "paused" if self._wish == "pause" or self._stopping() else None

    def _fetch_inputs(self) -> AttemptInputs:
        """Fetch everything that the trainer reads to this machine's disk; in the thread of the transfers."""
        spec = parse_job(self._claim.spec)
        data = self._transfers.retry_while_away(
            lambda: registry.materialize_data(
                spec.data,
                self._claim.spec["model"].get("input_shape"),
                db=self._db,
                storage=self._storage,
                settings=self._settings,
            )
        )
        sources = self._scratch / "sources" if (named := references_in(spec)) else None
        if sources is not None:
            self._transfers.fetch_sources(named, sources)
        folder = self._scratch / "resume"
        folder.mkdir(exist_ok=True)
        resume, problems = self._transfers.fetch_checkpoint(folder)
        for problem in problems:
            self._add_event("checkpoint.corrupt", problem, level="warn")
        if resume is not None:
            self._add_event("job.resumed_from_checkpoint", "the job goes on from its last checkpoint")
        return AttemptInputs(data, resume, sources)

    def _handle_line(self, line: dict[str, Any]) -> None:
        """Buffer what one line of the trainer reports, or start what it asks for."""
        if not line:
            return
        if line["line"] == "ready":
            self._trainer_ready = True
            return
        assert (line["job"], line["attempt"]) == (self._claim.job_id, self._claim.attempt), "a line of another attempt"
        self._last_line_at = time.monotonic()
        if line["line"] == "event":
            at = datetime.fromtimestamp(line["at"], UTC)
            self._pending.events.append(NewEvent(line["type"], line["level"], line["message"], line["data"], at))
            del self._pending.events[:-MOST_PENDING]
        elif line["line"] == "metric":
            self._pending.metrics.append((line["series"], line["step"], line["value"]))
            del self._pending.metrics[:-MOST_PENDING]
        elif line["line"] == "progress":
            self._pending.progress = line["progress"]
            self._phase = line["progress"]["phase"]
        elif line["line"] == "checkpoint":
            files = CheckpointFiles(
                line["step"], line["epoch"], line["phase"], Path(line["tensors"]), Path(line["state"]), line["metrics"]
            )
            self._uploads.append(self._transfers.publish_checkpoint(files))

    def _keep_lease(self) -> None:
        """Renew the lease if it is due, and collect uploads that ended.

        Raises LostOwnership if the lease could not be renewed in time, TimeLimit.
        """
        now = boot_time()
        since_s = now - self._renewed_at
        if since_s >= self._settings.renew_s or (since_s >= min(1.0, self._settings.renew_s) and self._pending.filled):
            self._renew_lease()
        if boot_time() - self._renewed_at > self._settings.self_fence_s:
            raise LostOwnership("the lease could not be renewed in time: the attempt ended itself")
        if time.monotonic() - self._started_at > self._settings.job_time_limit_s:
            raise TimeLimit(f"the attempt ran {self._settings.job_time_limit_s:.0f} s")
        for upload in [u for u in self._uploads if u.done()]:
            self._uploads.remove(upload)
            try:
                upload.result()
            except Unavailable as error:  # the training goes on: the store may be back for a later checkpoint
                self._add_event("warning", f"a checkpoint could not be stored: {error.message}", level="warn")

    def _send_wish(self, trainer: TrainerProcess) -> bool:
        """Send the trainer a new wish; False when it has not obeyed for too long."""
        wish = "pause" if self._stopping() and self._wish != "cancel" else self._wish
        if wish != self._sent_wish:
            trainer.send_line(wish=wish)
            self._sent_wish, self._wish_sent_at = wish, time.monotonic()
        if wish not in PATIENCE_S:
            return True
        patience_s = RELEASE_S if self._stopping() else PATIENCE_S[wish]
        return time.monotonic() - self._wish_sent_at < patience_s

    def _is_silent(self, trainer: TrainerProcess) -> bool:
        """True if no line came for so long that the trainer must hang; its log then has its stack."""
        silent_s = time.monotonic() - self._last_line_at
        if silent_s < self._settings.silence_s * (3 if self._phase in LONG_PHASES else 1):
            return False
        self._log.error("trainer silent", seconds=round(silent_s))
        trainer.show_stack()
        time.sleep(0.5)
        return True

    def _renew_lease(self) -> None:
        """Renew the lease and write what is pending; while the database is away, the attempt goes on."""
        try:
            self._write_buffer()
        except Unavailable as error:
            self._log.warning("renewal failed", reason=str(error))
            time.sleep(0.5)

    def _write_buffer(self, log_bytes: int = LOG_BYTES) -> None:
        sent = boot_time()
        events, metrics, progress = list(self._pending.events), list(self._pending.metrics), self._pending.progress
        words, offset = self._read_new_log(log_bytes)
        wish = attempts.renew(
            self._db,
            self._claim,
            worker_id=self._worker_id,
            lease_s=self._settings.lease_s,
            progress=progress,
            events=events,
            metrics=metrics,
            log=words,
        )
        self._renewed_at = sent
        del self._pending.events[: len(events)]
        del self._pending.metrics[: len(metrics)]
        self._pending.progress = None
        self._pending.log_offset = offset
        self._wish = wish
        if self._trainer is not None:
            self._trainer.send_line(beat=round(sent, 1))

    def _wait_for(self, work: Future[T]) -> T:
        """Wait for `work` while renewing the lease; returns its result."""
        while not work.done():
            time.sleep(TICK_S / 4)
            self._keep_lease()
        return work.result()

    def _write_end(self, final: dict[str, Any] | None) -> None:
        """Write how the attempt ended, from the trainer's last line, its exit code and the wish."""
        code = self._wait_for_exit() if self._trainer is not None else 0
        self._wait_for_uploads()
        self._write_all()
        line = final["line"] if final is not None else None
        if final is not None and line == "done" and code == 0:
            self._deliver_files(final)
        elif final is not None and line == "failed":
            self._fail_job(final["error"])
        elif self._wish == "cancel":
            self._write_surely(lambda: attempts.obey_cancel(self._db, self._claim))
        elif line == "paused" or self._stopping():
            self._pause_or_release()
        else:
            self._record_crash(code)
        self._log.info("attempt ended", line=line, exit_code=code)

    def _wait_for_uploads(self) -> None:
        """Wait until the last checkpoint is stored; at most 20 s when the worker stops or the job is cancelled."""
        began = time.monotonic()
        while self._uploads:
            urgent = self._stopping() or self._wish == "cancel"
            if urgent and time.monotonic() - began > RELEASE_S:
                return
            time.sleep(TICK_S / 4)
            self._keep_lease()

    def _pause_or_release(self) -> None:
        """Pause the job after its checkpoint if the user asked for it, else release it for another worker."""
        if self._wish == "pause" and self._write_surely(lambda: attempts.obey_pause(self._db, self._claim)):
            return
        self._write_surely(lambda: attempts.release(self._db, self._claim))

    def _fail_job(self, error: dict[str, Any]) -> None:
        shown = {**error, "message": self._without_paths(error["message"])}
        self._write_surely(lambda: attempts.fail(self._db, self._claim, error=shown))

    def _record_crash(self, code: int) -> None:
        words = self._read_log_end()
        reason = {"exit_code": code, "last_words": words}
        if code < 0:
            reason["signal"] = -code
        elif not self._trainer_ready:
            why = words.rstrip().rpartition("\n")[2] or f"exit code {code}"
            reason["message"] = f"a trainer cannot start on this worker ({why}): install the worker's extra there"
        self._write_surely(lambda: attempts.crash(self._db, self._claim, reason=reason))

    def _deliver_files(self, final: dict[str, Any]) -> None:
        """Store the bytes of every file, then write their rows in one fenced transaction."""
        artifacts: list[NewArtifact] = []

        def publish() -> None:
            for file in final["artifacts"]:
                key = self._transfers.publish_artifact(file["name"], Path(file["path"]))
                artifacts.append(
                    NewArtifact(file["name"], file["kind"], key, file["sha256"], file["size_bytes"], file["media_type"])
                )

        self._wait_for(self._transfers.run_later(publish))
        failpoint("finish_before_commit")
        self._write_all()
        if self._wish != "cancel":
            try:
                self._write_surely(
                    lambda: attempts.finish(
                        self._db,
                        self._claim,
                        summary=final["summary"],
                        report=final["report"],
                        artifacts=artifacts,
                        stopped_early=final["stopped_early"],
                    )
                )
                failpoint("finish_after_commit")
                return
            except LostOwnership:
                self._write_all()  # if the job is still ours, a cancel came first; if not, this raises again
        self._write_surely(lambda: attempts.obey_cancel(self._db, self._claim))

    def _wait_for_exit(self) -> int:
        """Wait 10 s for the trainer to end by itself, then end it; returns its exit code."""
        assert self._trainer is not None
        until = time.monotonic() + 10
        while self._trainer.alive and time.monotonic() < until:
            self._keep_lease()
            time.sleep(TICK_S / 4)
        return self._trainer.end()

    def _write_surely(self, write: Callable[[], T]) -> T:
        """Repeat a write while the database is away, up to 10 min, or 20 s when the worker stops; returns its result."""
        until = time.monotonic() + (RELEASE_S if self._stopping() else 600)
        while True:
            try:
                return write()
            except Unavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _write_all(self) -> None:
        """Write what is pending, the end of the log included."""
        self._write_surely(lambda: self._write_buffer(LOG_CAP_BYTES))

    def _add_event(self, type: str, message: str, *, level: str = "info") -> None:  # noqa: A002
        self._pending.events.append(NewEvent(type, level, message, {}, datetime.now(UTC)))

    def _read_new_log(self, most_bytes: int) -> tuple[str, int]:
        """The text that the trainer wrote to its log since the last renewal, and the offset of its end."""
        if self._trainer is None or not self._trainer.log.exists():
            return "", self._pending.log_offset
        with self._trainer.log.open("rb") as file:
            file.seek(self._pending.log_offset)
            new = file.read(most_bytes)
        return self._without_paths(new.decode("utf-8", "replace")), self._pending.log_offset + len(new)

    def _read_log_end(self) -> str:
        if self._trainer is None or not self._trainer.log.exists():
            return ""
        return self._without_paths(self._trainer.log.read_bytes()[-LAST_WORDS_BYTES:].decode("utf-8", "replace"))

    def _without_paths(self, text: str) -> str:
        """The text with names for this host's folders, and without NUL, which Postgres refuses."""
        for folder, name in (
            (str(self._scratch), "<scratch>"),
            (str(self._settings.home_folder), "<home>"),
            (str(Path.cwd()), "."),
        ):
            text = text.replace(folder, name)
        return text.replace("\0", "")


def _as_job_error(error: Exception) -> JobError | None:
    """The error that ends the job: the given one, or a full disk, which would stop another attempt too; else None."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, StorageFull):
        return DiskFull("no space is left in the object store or on the worker's disk")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull()
    return None


def boot_time() -> float:
    """Seconds on a clock that also runs while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
