"""The monitor of a job's trainings and loss curves: it writes metrics and events, has checkpoints saved, and obeys wishes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from app.errors import EspalierError
from worker.evaluation import NO_LOSS
from worker.journal import Journal, Wish
from worker.network import snapshot
from worker.run.checkpoint_writer import CheckpointWriter
from worker.run.progress import ProgressTracker
from worker.run.state import Reached
from worker.training.loop import EpochResult, Fit, Window


class Interrupted(EspalierError):
    """The user asked the job to leave its training."""

    code = "interrupted"

    def __init__(self, wish: Wish) -> None:
        super().__init__(f"the user asked for: {wish}")
        self.wish: Wish = wish


def at_most_every(seconds: float, look: Callable[[], None]) -> Callable[[], None]:
    """`look`, for loops that turn quickly: called at the first turn, and then when so many seconds have passed."""
    last = -math.inf

    def turn() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            look()

    return turn


class Monitored(Protocol):
    """A job, as far as its monitor knows it."""

    journal: Journal
    tracker: ProgressTracker
    checkpoints: CheckpointWriter
    reached: Reached
    rewind_epochs: frozenset[int]


class JobMonitor:
    """The monitor of all trainings and loss curves of one job: writes down what happens, ends them when the user asks."""

    def __init__(self, job: Monitored, *, began: float) -> None:
        """`began`, on the monotonic clock: from there on seconds are added to the job's."""
        self._job = job
        self._images_per_s: float | None = None
        self._metrics: dict[str, float] = {}
        self._counted_until = began

    def enter(self, phase_name: str, *, message: str, resumed: bool = False) -> None:
        """Begin the phase of this name: write an event, and the progress."""
        self._job.tracker.enter(phase_name)
        phase = self._job.tracker.part.phase
        self._images_per_s = None
        self._job.journal.event(
            "phase.started",
            message,
            phase=phase,
            epochs=self._job.tracker.part.epochs,
            steps=self._job.tracker.part.steps,
            resumed=resumed,
        )
        if not resumed:  # else the fraction would fall until its training says where it stands
            self._job.journal.progress(self._job.tracker.progress(0.0))

    def check_interrupts(self) -> None:
        """Obey a wish between two phases, where everything reached is in the last checkpoint.

        Raises:
            Interrupted: cancel, pause or stop.
        """
        wish = self._job.journal.wish()
        if wish == "pause":
            self.checkpoint()
            self._job.checkpoints.wait_for_write()
        if wish is not None:
            raise Interrupted(wish)

    def check_removal(self) -> None:
        """Obey a wish in the middle of a removal: the last checkpoint is of its start, so none is written.

        Raises:
            Interrupted: cancel, pause or stop.
        """
        wish = self._job.journal.wish()
        if wish is not None:
            self._job.checkpoints.wait_for_write()
            raise Interrupted(wish)

    def check_cancel_or_pause(self) -> None:
        """Obey a wish when all training is over: only cancel and pause mean anything then. Raises Interrupted."""
        wish = self._job.journal.wish()
        if wish in ("cancel", "pause"):
            self._job.checkpoints.wait_for_write()
            raise Interrupted(wish)

    def checkpoint(self) -> None:
        """Have a checkpoint of this moment written."""
        self.add_elapsed()
        fit = self._job.reached.fit
        epoch = fit.position.epoch if fit is not None else self._job.tracker.part.epochs
        self._job.checkpoints.save(
            self._job.reached, phase=self._job.tracker.part.phase, epoch=epoch, metrics=self._metrics
        )

    def add_elapsed(self) -> None:
        """Add the seconds since the last call to those of the job, and of the compression under way."""
        now = time.monotonic()
        seconds, self._counted_until = now - self._counted_until, now
        self._job.reached.record.seconds += seconds
        for record in self._job.reached.record.steps[-1:]:
            record.seconds += seconds if record.after is None else 0.0

    def before_step(self, fit: Fit) -> None:
        """Obey a wish, or write a checkpoint if one is due."""
        wish = self._job.journal.wish()
        if wish is None and not self._job.checkpoints.due:
            return
        if wish != "cancel":
            fit.read_losses(self)  # a loss that is no number must not be kept
            if wish != "stop":
                self.checkpoint()
        if wish is not None:
            self._job.checkpoints.wait_for_write()
            raise Interrupted(wish)

    def rises(self) -> Mapping[tuple[int, float], float]:
        """The loss curves of the removal under way: (index of a group, part kept) -> rise of the loss."""
        return {(group, kept): rise for group, kept, rise in self._job.reached.record.curves}

    def cut_measured(self, group: int, kept: float, rise: float, *, share: float) -> None:
        """Note a cut and the progress, write a checkpoint if one is due, obey a wish. Raises Interrupted."""
        reached = self._job.reached
        reached.record.curves.append((group, kept, rise))
        reached.passed += 1
        self._job.journal.progress(self._job.tracker.progress(share))
        if self._job.checkpoints.due:
            self.checkpoint()
        self.check_interrupts()

    def window(self, fit: Fit, window: Window) -> None:
        """Write the metrics of these steps, and the progress."""
        step = self._job_step(window.step)
        for name, value in window.losses.items():
            self._job.journal.metric(f"train.{name}", step, value)
        self._job.journal.metric("train.lr", step, window.rate)
        self._job.journal.metric("train.images_per_s", step, window.images_per_s)
        self._images_per_s = window.images_per_s
        self._metrics = {"train.loss": window.losses["loss"]}
        self._report_progress(fit)

    def epoch_finished(self, fit: Fit, result: EpochResult) -> None:
        """Write metrics, an event and the progress; save a checkpoint unless the phase is over: its end has one."""
        step = self._job_step(fit.position.step)
        self._metrics = {"train.loss": result.loss}
        if result.accuracy is not None and result.validation_loss is not None:
            self._metrics["val.accuracy"] = result.accuracy
            if result.validation_loss < NO_LOSS:
                self._metrics["val.loss"] = result.validation_loss
        for name, value in self._metrics.items():
            if name.startswith("val."):
                self._job.journal.metric(name, step, value)
        if fit.masks is not None:
            zeros, weights = fit.masks.zeros(), fit.masks.sizes()
            self._job.journal.metric("sparsity", step, zeros / weights)
            _assert_zeros(fit)
        self._report_epoch(fit, result)
        if fit.recipe.phase == "training" and result.epoch in self._job.rewind_epochs:
            self._job.reached.kept[f"rewind/{result.epoch}"] = snapshot(fit.network)
        self._report_progress(fit)
        if not fit.finished:
            self.checkpoint()

    def _report_epoch(self, fit: Fit, result: EpochResult) -> None:
        epochs = fit.recipe.epochs
        held_out = "" if result.accuracy is None else f", validation accuracy {result.accuracy:.4f}"
        self._job.journal.event(
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
            self._job.journal.event(
                "training.stopped_early",
                f"no better for {fit.stale_epochs} epochs: {fit.recipe.phase} ends after epoch {result.epoch}",
                epoch=result.epoch,
            )

    def _job_step(self, step: int) -> int:
        return self._job.tracker.steps_before + step

    def _report_progress(self, fit: Fit) -> None:
        position = fit.position
        self._job.journal.progress(
            self._job.tracker.progress(
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
