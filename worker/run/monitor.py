"""Who looks over a job's training: passes on what happens, keeps checkpoints, and obeys what the user wishes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.errors import DiskFull, EspalierError
from app.failpoints import failpoint
from worker.checkpoint import STEM, write_checkpoint
from worker.evaluation import NO_LOSS
from worker.journal import Journal, Phase, SavedCheckpoint, Wish
from worker.run.progress import ProgressTracker
from worker.run.state import Reached
from worker.training.averaging import snapshot
from worker.training.loop import EpochResult, Fit, Window

REST_FACTOR = (
    20  # a checkpoint at most every 20 times as long as the last one took to write: 5 % of the time at the most
)


class Interrupted(EspalierError):
    """The user wishes that the job leaves its training."""

    code = "interrupted"

    def __init__(self, wish: Wish) -> None:
        super().__init__(f"the user wishes: {wish}")
        self.wish: Wish = wish


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
        self.settle()
        return self._latest if (self._latest / f"{STEM}.json").exists() else None

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for one inside an epoch."""
        return time.monotonic() - self._last_at >= max(self._interval_s, REST_FACTOR * self._last_took_s)

    def save(self, reached: Reached, *, phase: Phase, epoch: int, metrics: Mapping[str, float]) -> None:
        """Copy what was reached and have it written. Nothing happens if this step has its checkpoint already.

        Raises:
            DiskFull: the disk was full twice in a row.
        """
        self.settle()
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
            self._keep(tensors, document)
            self._last_took_s = time.monotonic() - began
            self._journal.checkpoint(SavedCheckpoint(step, epoch, phase, tensors, document, metrics))

        self._pending = self._writer.submit(write)

    def settle(self) -> None:
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

    def _keep(self, tensors: Path, document: Path) -> None:
        self._latest.mkdir(exist_ok=True)
        for source, ending in ((tensors, "safetensors"), (document, "json")):
            sibling = self._latest / f".{STEM}.{ending}"
            sibling.unlink(missing_ok=True)
            os.link(source, sibling)
            sibling.replace(self._latest / f"{STEM}.{ending}")


class JobMonitor:
    """The watch of all trainings of one job."""

    reached: Reached

    def __init__(self, journal: Journal, tracker: ProgressTracker, checkpoints: CheckpointWriter) -> None:
        """`reached` is set once the job knows where it stands, before its first stage."""
        self.journal = journal
        self.tracker = tracker
        self.checkpoints = checkpoints
        self.keep_epochs: frozenset[int] = (
            frozenset()
        )  # of the first training: weights for retraining with weight_rewind
        self._images_per_s: float | None = None
        self._metrics: dict[str, float] = {}
        self._charged_at = time.monotonic()

    def enter(self, part: int, *, message: str, resumed: bool = False) -> None:
        """Begin a part of the course: an event, progress, and the user's wish is looked at.

        Raises:
            Interrupted: the user wishes something.
        """
        self.tracker.enter(part)
        phase = self.tracker.part.phase
        self._images_per_s = None
        self.journal.event(
            "phase.started",
            message,
            phase=phase,
            epochs=self.tracker.part.epochs,
            steps=self.tracker.part.steps,
            resumed=resumed,
        )
        if not resumed:  # else the fraction would fall until its training says where it stands
            self.journal.progress(self.tracker.progress(0.0))

    def look(self) -> None:
        """Obey a wish between two phases: everything reached is in the last checkpoint.

        Raises:
            Interrupted: cancel, pause or stop.
        """
        wish = self.journal.wish()
        if wish == "pause":
            self.checkpoint()
            self.checkpoints.settle()
        if wish is not None:
            raise Interrupted(wish)

    def look_to_leave(self) -> None:
        """Obey a wish when all training is over: only cancel and pause mean anything then. Raises Interrupted."""
        wish = self.journal.wish()
        if wish in ("cancel", "pause"):
            self.checkpoints.settle()
            raise Interrupted(wish)

    def checkpoint(self) -> None:
        """Have a checkpoint of this moment written."""
        self.charge()
        fit = self.reached.fit
        epoch = fit.position.epoch if fit is not None else self.tracker.part.epochs
        self.checkpoints.save(self.reached, phase=self.tracker.part.phase, epoch=epoch, metrics=self._metrics)

    def charge(self) -> None:
        """Add the seconds since the last charge to the job's, and to those of the compression under way."""
        now = time.monotonic()
        seconds, self._charged_at = now - self._charged_at, now
        self.reached.record.seconds += seconds
        for record in self.reached.record.steps[-1:]:
            record.seconds += seconds if record.after is None else 0.0

    def before_step(self, fit: Fit) -> None:
        """Obey a wish, or write a checkpoint if one is due."""
        wish = self.journal.wish()
        if wish is None and not self.checkpoints.due:
            return
        if wish != "cancel":
            fit.look(self)  # a loss that is no number must not be kept
            if wish != "stop":
                self.checkpoint()
        if wish is not None:
            self.checkpoints.settle()
            raise Interrupted(wish)

    def window(self, fit: Fit, window: Window) -> None:
        """Metrics and progress."""
        step = self._job_step(window.step)
        for name, value in window.losses.items():
            self.journal.metric(f"train.{name}", step, value)
        self.journal.metric("train.lr", step, window.rate)
        self.journal.metric("train.images_per_s", step, window.images_per_s)
        self._images_per_s = window.images_per_s
        self._metrics = {"train.loss": window.losses["loss"]}
        self._report_progress(fit)

    def epoch_finished(self, fit: Fit, result: EpochResult) -> None:
        """Metrics, an event, progress, and a checkpoint unless the phase is over: its end has one."""
        step = self._job_step(fit.position.step)
        self._metrics = {"train.loss": result.loss}
        if result.accuracy is not None and result.validation_loss is not None:
            self._metrics["val.accuracy"] = result.accuracy
            if result.validation_loss < NO_LOSS:
                self._metrics["val.loss"] = result.validation_loss
        for name, value in self._metrics.items():
            if name.startswith("val."):
                self.journal.metric(name, step, value)
        if fit.masks is not None:
            zeros, weights = fit.masks.zeros(), fit.masks.sizes()
            self.journal.metric("sparsity", step, zeros / weights)
            _assert_zeros(fit)
        self._tell_epoch(fit, result)
        if fit.recipe.phase == "training" and result.epoch in self.keep_epochs:
            self.reached.kept[f"rewind/{result.epoch}"] = snapshot(fit.network)
        self._report_progress(fit)
        if not fit.finished:
            self.checkpoint()

    def _tell_epoch(self, fit: Fit, result: EpochResult) -> None:
        epochs = fit.recipe.epochs
        held_out = "" if result.accuracy is None else f", validation accuracy {result.accuracy:.4f}"
        self.journal.event(
            "epoch.finished",
            f"{fit.recipe.phase}: epoch {result.epoch} of {epochs}, loss {result.loss:.4f}{held_out}",
            phase=fit.recipe.phase,
            epoch=result.epoch,
            epochs=epochs,
            loss=result.loss,
            val_accuracy=result.accuracy,
            val_loss=self._metrics.get("val.loss"),
            averaged=result.averaged,
            best=result.improved,
        )
        if fit.finished and result.epoch < epochs:
            self.journal.event(
                "training.stopped_early",
                f"no better for {fit.stale_epochs} epochs: {fit.recipe.phase} ends after epoch {result.epoch}",
                epoch=result.epoch,
            )

    def _job_step(self, step: int) -> int:
        return self.tracker.progress(0.0).step + step

    def _report_progress(self, fit: Fit) -> None:
        position = fit.position
        self.journal.progress(
            self.tracker.progress(
                position.step / max(1, fit.steps),
                epoch=min(fit.recipe.epochs, position.epoch + (1 if position.batch else 0)),
                step=position.step,
                images_per_s=self._images_per_s,
            )
        )


def _assert_zeros(fit: Fit) -> None:
    assert fit.masks is not None
    for name, parameter in fit.network.named_parameters():
        if name in fit.masks:
            alive = int(((fit.masks[name] == 0) & (parameter.detach() != 0)).sum())
            assert alive == 0, f"{alive} pruned weights of {name} are not zero"
