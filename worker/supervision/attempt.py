"""One attempt of one job, from the claim to its end: the trainer's lines in, fenced rows out.

One object per attempt, and nothing outlives it: reader, pipes and files of a trainer are gone before the next claim, so that no
line of a dead trainer can reach the next job. Every write carries the attempt; zero rows changed raises LostOwnership, and the
attempt ends silently, because somebody else owns the job.
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

PATIENCE_S = {"cancel": 10.0, "pause": 120.0}  # from telling the trainer to killing it; who stops wants the result
RELEASE_S = 20.0  # a deploy waits 30 s for the whole worker
ORPHAN_S = 5.0  # a trainer ends itself so long after its supervisor should have ended it
TICK_S = 0.1
MOST_EVENTS = 10_000  # buffered while the database is away
LOG_BYTES = 64 * 1024  # of the trainer's log in one renewal
LAST_WORDS_BYTES = 4096
LONG_BREATH = frozenset({"preparing", "measuring", "exporting"})  # phases in which no line comes for minutes
FINAL_LINES = frozenset({"done", "paused", "cancelled", "failed"})


@dataclass
class Buffer:
    """What the trainer said and the database does not have yet."""

    events: list[NewEvent] = field(default_factory=list)
    metrics: list[tuple[str, int, float]] = field(default_factory=list)
    progress: dict[str, Any] | None = None
    log_offset: int = 0

    @property
    def filled(self) -> bool:
        """True if there is something to write."""
        return bool(self.events or self.metrics or self.progress)


@dataclass(frozen=True)
class Gathered:
    """Folders of one attempt: the packed data set, the checkpoint to resume from, the networks the job refers to."""

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
        self._nursery = trainer_pool
        self._worker_id = worker_id
        self._slot = slot
        self._stopping = stopping
        self._porter = Transfers(claim, db, storage)
        self._scratch = scratch / f"{claim.job_id}-{claim.attempt}"
        self._trainer: TrainerProcess | None = None
        self._trainer_ready = False
        self._buffer = Buffer()
        self._phase = "preparing"
        self._wish = claim.wish
        self._told: str | None = claim.wish
        self._told_at = time.monotonic()
        self._started = time.monotonic()
        self._renewed = boot_time()
        self._heard = time.monotonic()
        self._uploads: list[Future[None]] = []
        self._log = log.bind(job=claim.job_id, attempt=claim.attempt)

    def run(self) -> None:
        """Run the attempt to its end, whatever the end is."""
        self._log.info("attempt started")
        try:
            try:
                failpoint("claim_after")
                self._scratch.mkdir(parents=True, exist_ok=True)
                self._settle(self._follow())
            except LostOwnership:
                raise
            except Exception as error:
                self._give_up(error)
        except LostOwnership as lost:
            self._log.warning("attempt lost", reason=str(lost))
        except Unavailable as error:
            self._log.error("attempt given up", reason=str(error))  # the lease runs out, the job is queued again
        finally:
            if self._trainer is not None:
                self._trainer.discard()
            self._porter.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _give_up(self, error: Exception) -> None:
        """Write how the attempt ends that went wrong on this side of the pipe: failed, given back, or crashed."""
        if self._trainer is not None:
            self._trainer.end()
        ending = _as_job_error(error)
        if ending is not None:
            self._flush()
            self._fail(ending.document())
            self._log.warning("job failed", code=ending.code)
        elif isinstance(error, Unavailable):
            attempts.release(self._db, self._claim, why=error.message.removesuffix(": try again"))
            self._log.error("job given back", reason=error.message)
        else:  # a mistake of this worker: it counts as a crash, so that the job runs again, though not for ever
            self._log.error("attempt broke", exc_info=error)
            reason = {"message": f"the worker failed: {self._without_paths(str(error)) or type(error).__name__}"}
            self._insist(lambda: attempts.crash(self._db, self._claim, reason=reason))

    def _follow(self) -> dict[str, Any] | None:
        """Gather data and checkpoint, start the trainer, listen until its last line; None if it ended without one."""
        gathering = self._porter.do(self._gather)
        while not gathering.done() and self._leaving() is None:  # a download goes on alone, nobody waits for it
            time.sleep(TICK_S / 4)
            self._tick()
        if self._leaving() is not None:
            return {"line": self._leaving()}
        gathered = gathering.result()
        trainer = self._trainer = self._nursery.take()
        self._heard = time.monotonic()
        trainer.say(
            run={
                "job_id": self._claim.job_id,
                "attempt": self._claim.attempt,
                "spec": self._claim.spec,
                "data": str(gathered.data),
                "scratch": str(self._scratch),
                "resume": str(gathered.resume) if gathered.resume else None,
                "sources": str(gathered.sources) if gathered.sources else None,
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
            self._take(line)
            self._tick()
            if not self._pass_on_wish(trainer):
                trainer.end()
                return {"line": self._leaving()}  # its last checkpoint has to do
            if self._silent(trainer):
                trainer.end()
                return None

    def _leaving(self) -> str | None:
        """The last line of a trainer that leaves as it is told to now; None if nobody wants that."""
        if self._wish == "cancel":
            return "cancelled"
        return "paused" if self._wish == "pause" or self._stopping() else None

    def _gather(self) -> Gathered:
        """Everything that the trainer reads, on this machine's disk; in the porter's thread."""
        spec = parse_job(self._claim.spec)
        data = self._porter.keep_trying(
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
            self._porter.fetch_sources(named, sources)
        folder = self._scratch / "resume"
        folder.mkdir(exist_ok=True)
        resume, problems = self._porter.fetch_checkpoint(folder)
        for problem in problems:
            self._note("checkpoint.corrupt", problem, level="warn")
        if resume is not None:
            self._note("job.resumed_from_checkpoint", "the job goes on from its last checkpoint")
        return Gathered(data, resume, sources)

    def _take(self, line: dict[str, Any]) -> None:
        """Put one line of the trainer where it belongs."""
        if not line:
            return
        if line["line"] == "ready":
            self._trainer_ready = True
            return
        assert (line["job"], line["attempt"]) == (self._claim.job_id, self._claim.attempt), "a line of another attempt"
        self._heard = time.monotonic()
        if line["line"] == "event":
            at = datetime.fromtimestamp(line["at"], UTC)
            self._buffer.events.append(NewEvent(line["type"], line["level"], line["message"], line["data"], at))
            del self._buffer.events[:-MOST_EVENTS]
        elif line["line"] == "metric":
            self._buffer.metrics.append((line["series"], line["step"], line["value"]))
            del self._buffer.metrics[:-MOST_EVENTS]
        elif line["line"] == "progress":
            self._buffer.progress = line["progress"]
            self._phase = line["progress"]["phase"]
        elif line["line"] == "checkpoint":
            files = CheckpointFiles(
                line["step"], line["epoch"], line["phase"], Path(line["tensors"]), Path(line["state"]), line["metrics"]
            )
            self._uploads.append(self._porter.publish_checkpoint(files))

    def _tick(self) -> None:
        """Renew the lease, watch the clocks, look at the checkpoints that were stored."""
        now = boot_time()
        since_s = now - self._renewed
        if since_s >= self._settings.renew_s or (since_s >= min(1.0, self._settings.renew_s) and self._buffer.filled):
            self._renew()
        if boot_time() - self._renewed > self._settings.self_fence_s:
            raise LostOwnership("the lease could not be renewed in time: the attempt ended itself")
        if time.monotonic() - self._started > self._settings.job_time_limit_s:
            raise TimeLimit(f"the attempt ran {self._settings.job_time_limit_s:.0f} s")
        for upload in [u for u in self._uploads if u.done()]:
            self._uploads.remove(upload)
            try:
                upload.result()
            except Unavailable as error:  # the training goes on: the store may be back for a later checkpoint
                self._note("warning", f"a checkpoint could not be stored: {error.message}", level="warn")

    def _pass_on_wish(self, trainer: TrainerProcess) -> bool:
        """Tell the trainer what is wished; False when it has not obeyed for too long."""
        wish = "pause" if self._stopping() and self._wish != "cancel" else self._wish
        if wish != self._told:
            trainer.say(wish=wish)
            self._told, self._told_at = wish, time.monotonic()
        if wish not in PATIENCE_S:
            return True
        patience_s = RELEASE_S if self._stopping() else PATIENCE_S[wish]
        return time.monotonic() - self._told_at < patience_s

    def _silent(self, trainer: TrainerProcess) -> bool:
        """True if the trainer has said nothing for so long that it must hang; its log then has its stack."""
        silent_s = time.monotonic() - self._heard
        if silent_s < self._settings.silence_s * (3 if self._phase in LONG_BREATH else 1):
            return False
        self._log.error("trainer silent", seconds=round(silent_s))
        trainer.show_stack()
        time.sleep(0.5)
        return True

    def _renew(self) -> None:
        """Renew the lease and write what is buffered; the database away is a reason to wait, not to end."""
        try:
            self._write_buffer()
        except Unavailable as error:
            self._log.warning("renewal failed", reason=str(error))
            time.sleep(0.5)

    def _write_buffer(self, log_bytes: int = LOG_BYTES) -> None:
        sent = boot_time()
        events, metrics, progress = list(self._buffer.events), list(self._buffer.metrics), self._buffer.progress
        words, offset = self._new_log(log_bytes)
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
        self._renewed = sent
        del self._buffer.events[: len(events)]
        del self._buffer.metrics[: len(metrics)]
        self._buffer.progress = None
        self._buffer.log_offset = offset
        self._wish = wish
        if self._trainer is not None:
            self._trainer.say(beat=round(sent, 1))

    def _attend(self, work: Future[T]) -> T:
        """The result of `work`, with the lease renewed while it lasts."""
        while not work.done():
            time.sleep(TICK_S / 4)
            self._tick()
        return work.result()

    def _settle(self, final: dict[str, Any] | None) -> None:
        """Write the attempt's end."""
        code = self._wait_for_exit() if self._trainer is not None else 0
        self._await_uploads()
        self._flush()
        line = final["line"] if final is not None else None
        if final is not None and line == "done" and code == 0:
            self._deliver(final)
        elif final is not None and line == "failed":
            self._fail(final["error"])
        elif self._wish == "cancel":
            self._insist(lambda: attempts.obey_cancel(self._db, self._claim))
        elif line == "paused" or self._stopping():
            self._rest()
        else:
            self._crash(code)
        self._log.info("attempt ended", line=line, exit_code=code)

    def _await_uploads(self) -> None:
        """Wait until the last checkpoint is stored; not for long where the end of the attempt is awaited."""
        began = time.monotonic()
        while self._uploads:
            awaited = self._stopping() or self._wish == "cancel"
            if awaited and time.monotonic() - began > RELEASE_S:
                return
            time.sleep(TICK_S / 4)
            self._tick()

    def _rest(self) -> None:
        """After a checkpoint: paused if the user asked for it, else queued for whoever takes it."""
        if self._wish == "pause" and self._insist(lambda: attempts.obey_pause(self._db, self._claim)):
            return
        self._insist(lambda: attempts.release(self._db, self._claim))

    def _fail(self, error: dict[str, Any]) -> None:
        shown = {**error, "message": self._without_paths(error["message"])}
        self._insist(lambda: attempts.fail(self._db, self._claim, error=shown))

    def _crash(self, code: int) -> None:
        words = self._last_words()
        reason = {"exit_code": code, "last_words": words}
        if code < 0:
            reason["signal"] = -code
        elif not self._trainer_ready:
            why = words.rstrip().rpartition("\n")[2] or f"exit code {code}"
            reason["message"] = f"a trainer cannot start on this worker ({why}): install the worker's extra there"
        self._insist(lambda: attempts.crash(self._db, self._claim, reason=reason))

    def _deliver(self, final: dict[str, Any]) -> None:
        """Bytes first, rows after: every file into the store, then one fenced transaction."""
        artifacts: list[NewArtifact] = []

        def publish() -> None:
            for file in final["artifacts"]:
                key = self._porter.publish_artifact(file["name"], Path(file["path"]))
                artifacts.append(
                    NewArtifact(file["name"], file["kind"], key, file["sha256"], file["size_bytes"], file["media_type"])
                )

        self._attend(self._porter.do(publish))
        failpoint("finish_before_commit")
        self._flush()
        if self._wish != "cancel":
            try:
                self._insist(
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
                self._flush()  # still ours: a cancel came first; not ours: raises again
        self._insist(lambda: attempts.obey_cancel(self._db, self._claim))

    def _wait_for_exit(self) -> int:
        """The trainer's exit code, after its pipe has closed by itself or by us."""
        assert self._trainer is not None
        until = time.monotonic() + 10
        while self._trainer.alive and time.monotonic() < until:
            self._tick()
            time.sleep(TICK_S / 4)
        return self._trainer.end()

    def _insist(self, write: Callable[[], T]) -> T:
        """The result of a last write: repeated while the database is away, for as long as anybody could wait for it."""
        until = time.monotonic() + (RELEASE_S if self._stopping() else 600)
        while True:
            try:
                return write()
            except Unavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _flush(self) -> None:
        """Write what is buffered, the end of the log included."""
        self._insist(lambda: self._write_buffer(LOG_CAP_BYTES))

    def _note(self, type: str, message: str, *, level: str = "info") -> None:  # noqa: A002
        self._buffer.events.append(NewEvent(type, level, message, {}, datetime.now(UTC)))

    def _new_log(self, most_bytes: int) -> tuple[str, int]:
        """What the trainer wrote to its log since the last renewal, and where that ends."""
        if self._trainer is None or not self._trainer.log.exists():
            return "", self._buffer.log_offset
        with self._trainer.log.open("rb") as file:
            file.seek(self._buffer.log_offset)
            new = file.read(most_bytes)
        return self._without_paths(new.decode("utf-8", "replace")), self._buffer.log_offset + len(new)

    def _last_words(self) -> str:
        if self._trainer is None or not self._trainer.log.exists():
            return ""
        return self._without_paths(self._trainer.log.read_bytes()[-LAST_WORDS_BYTES:].decode("utf-8", "replace"))

    def _without_paths(self, text: str) -> str:
        """The text with this host's folders left out, and no NUL, which Postgres refuses."""
        for folder, name in (
            (str(self._scratch), "<scratch>"),
            (str(self._settings.home_folder), "<home>"),
            (str(Path.cwd()), "."),
        ):
            text = text.replace(folder, name)
        return text.replace("\0", "")


def _as_job_error(error: Exception) -> JobError | None:
    """What ends the job for good: the error itself, or a full disk, which another attempt would find as full."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, StorageFull):
        return DiskFull("no space is left in the object store or on the worker's disk")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull()
    return None


def boot_time() -> float:
    """Seconds on a clock that also counts while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
