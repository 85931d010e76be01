"""The training loop: one for all phases. It knows a network, batches and a recipe; its monitor decides the rest.

    fit = Fit(network, batches, recipe, precision, validation=...)     # resume.py puts it back to a checkpoint
    fit.run(monitor)        # monitor.before_step may raise: the fit stands exactly between two steps
    fit.conclude()          # the network gets the weights that are kept

Nothing is read from the device at each step: losses gather there and are read about every 50 steps. Then the monitor
gets their mean, and a loss that is not finite ends the loop. The order of one step keeps zeros at zero: gradients
masked (before clipping), step, weights masked, average updated, average masked.

Axes: N batch, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from app.errors import EspalierError
from app.failpoints import failpoint
from app.planning.phases import PhaseName
from app.spec.job import Training
from app.spec.optimizations import Regularization
from app.spec.retrain import Distillation
from worker.evaluation import evaluate
from worker.network import Network, assign_tensors, snapshot
from worker.precision import Precision
from worker.training.averaging import Average
from worker.training.freezing import freeze, train_mode
from worker.training.learning_rate import LearningRate
from worker.training.losses import Penalty, cross_entropy, decoupled_decay, distillation
from worker.training.masks import Masks
from worker.training.micro_batches import norms_paced, split_batch
from worker.training.optimizers import build_optimizer

WINDOW_STEPS = 50  # between two readings of the losses: each waits for the device
WINDOW_S = 2.0  # or sooner, where steps are slow: somebody is watching


class NonFiniteLoss(EspalierError):
    """The loss became NaN or infinite."""

    code = "non_finite_loss"

    def __init__(self, step: int, rate: float, value: float) -> None:
        super().__init__(f"the loss became {value} at step {step}, learning rate {rate:.3g}")
        self.step = step
        self.rate = rate


class Batches(Protocol):
    """Training or validation images in batches, on the device. An epoch can be entered in the middle."""

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `N x C x ...` float32 and labels N of the batches from `start` on; the same for the same `number`."""

    def __len__(self) -> int:
        """Batches of one epoch."""


@dataclass(frozen=True)
class Recipe:
    """How one phase trains. `rate` maps progress (0 to 1) to the learning rate; `seed` is this phase's own.

    `mask_updates` maps a step of this phase to the sparsity from before that step on, for masks that grow while
    training; `regrow` makes the masks of a sparsity. Only epochs after the last update can be the best one. `frozen`
    names layers that do not train, `rate_factors` has a factor on the learning rate for some layers.
    """

    phase: PhaseName
    epochs: int
    rate: LearningRate
    training: Training
    seed: int
    regularizations: tuple[Regularization, ...] = ()
    distillation: Distillation | None = None
    mask_updates: Mapping[int, float] = field(default_factory=dict)
    regrow: Callable[[Network, float, Masks | None], Masks] | None = None
    frozen: frozenset[str] = frozenset()
    rate_factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """What happened since the last reading: means over `steps` steps ended before step `step` of the phase."""

    step: int
    steps: int
    rate: float
    losses: Mapping[str, float]  # "loss" is the cross-entropy; "l1", "l2", "distillation" where the recipe has them
    images_per_s: float


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch: `epoch` counts from 1. Without validation images the last two are None."""

    epoch: int
    loss: float
    accuracy: float | None
    validation_loss: float | None
    averaged: bool
    improved: bool


class Monitor(Protocol):
    """What a training calls: before each step, each time the losses are read, and after each epoch."""

    def before_step(self, fit: Fit) -> None:
        """React to the fit, which stands exactly between two steps; raise to leave it there."""

    def window(self, fit: Fit, window: Window) -> None:
        """Take the losses since the last window; all are finite."""

    def epoch_finished(self, fit: Fit, result: EpochResult) -> None:
        """Take the result of an epoch; the fit stands before the next one."""


@dataclass
class Position:
    """Where a fit stands: before batch `batch` of epoch `epoch` (both from 0), after `step` steps."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    losses_seen: int = 0


@dataclass
class Best:
    """The best epoch so far, by validation accuracy, then loss."""

    epoch: int
    accuracy: float
    loss: float
    tensors: dict[str, Tensor]


class Fit:
    """One phase of training in progress."""

    def __init__(
        self,
        network: Network,
        batches: Batches,
        recipe: Recipe,
        precision: Precision,
        *,
        validation: Batches | None = None,
        masks: Masks | None = None,
        teacher: nn.Module | None = None,
        micro_batches: int = 1,
    ) -> None:
        """Start a phase at its first step; `micro_batches` cuts each batch, for the gradient of a step in less memory.

        Batch norm takes its statistics from each piece, so that with it the gradient is not quite that of the whole.
        `teacher` is needed where the recipe distils, and takes the same images as the network; `masks` hold from the
        first step on.
        """
        assert (recipe.distillation is None) == (teacher is None), (
            "distillation needs a teacher, and only distillation does"
        )
        self.network = network
        self.recipe = recipe
        self.precision = precision
        self.masks = masks
        self.position = Position()
        self.best: Best | None = None
        self.stale_epochs = 0
        self.mark: float | None = None
        freeze(network, recipe.frozen)
        self.optimizer = build_optimizer(network, recipe.training.optimizer, recipe.rate_factors)
        decay = recipe.training.ema_decay
        self.average = Average(network, decay) if decay is not None else None
        self._batches = batches
        self._validation = validation
        self._teacher = teacher.eval() if teacher is not None else None
        self._micro_batches = micro_batches
        self.evaluating = False
        """Whether the epoch's validation is under way: what fails then is not a step."""
        self._penalty = Penalty(network, recipe.regularizations)
        self._decay = decoupled_decay(network, recipe.regularizations, recipe.rate_factors)
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.scales_gradients)
        self._losses = _Losses(precision.device)
        self.rate = recipe.rate(0.0)
        torch.manual_seed(recipe.seed)  # dropout; order and augmentation have seeds of their own

    @property
    def steps(self) -> int:
        """Steps of the whole phase, if it is not stopped early."""
        return self.recipe.epochs * len(self._batches)

    @property
    def unread_losses(self) -> bool:
        """Whether losses of steps wait on the device: `read_losses` has to come before a checkpoint."""
        return not self._losses.empty

    @property
    def finished(self) -> bool:
        """True when no further epoch will be trained."""
        stopping = self.recipe.training.early_stopping
        exhausted = stopping is not None and self._validation is not None and self.stale_epochs >= stopping.patience
        return self.position.epoch >= self.recipe.epochs or exhausted

    def run(self, monitor: Monitor) -> None:
        """Train from the present position to the end of the phase.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite; step and rate are those of the first such step.
            Whatever `monitor.before_step` raises: then the fit stands exactly before that step.
        """
        while not self.finished:
            train_mode(self.network, self.recipe.frozen)  # each time: evaluating leaves every layer in one mode
            self._losses.restart_clock()
            for images, labels_N in self._batches.epoch(self.position.epoch, start=self.position.batch):
                monitor.before_step(self)
                failpoint("step")
                self._step(images, labels_N)
                if self._losses.due(first=self.position.step == 1):
                    self.read_losses(monitor)
            self.read_losses(monitor)
            result = self._end_epoch()
            monitor.epoch_finished(self, result)

    def read_losses(self, monitor: Monitor) -> None:
        """Read the losses that gathered on the device and give them to the monitor. Raises NonFiniteLoss."""
        window = self._losses.read(self.position.step, self.rate)
        if window is not None:
            for loss in self._losses.last_losses:
                self.position.loss_sum += loss  # one by one: the sum is the same wherever the windows are cut
            self.position.losses_seen += window.steps
            monitor.window(self, window)

    def conclude(self) -> None:
        """Give the network the weights that are kept: the best epoch's, else the average's, else the last.

        All layers train again after it: criteria need gradients of all of them.
        """
        freeze(self.network, ())
        if self.best is not None:
            assign_tensors(self.network, self.best.tensors)
        elif self.average is not None:
            assign_tensors(self.network, self.average.tensors)
        if self.masks is not None:
            self.masks.apply(self.network)

    def progress(self) -> float:
        """The share of the phase's steps that are done (0 to 1)."""
        return self.position.step / max(1, self.steps)

    def _step(self, images: Tensor, labels_N: Tensor) -> None:
        if self.position.step in self.recipe.mask_updates:
            self._grow_masks(self.recipe.mask_updates[self.position.step])
        self.rate = self.recipe.rate(self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        losses = self._backward(images, labels_N)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        if self.masks is not None:
            self.masks.mask_gradients(self.network)
        if self.recipe.training.gradient_clipping is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.training.gradient_clipping)
        moved = self._move()
        if self.masks is not None:
            self.masks.apply(self.network)
        if self.average is not None and moved:
            self.average.update(self.position.step)
            if self.masks is not None:
                self.masks.mask_tensors(self.average.tensors)
        self._losses.add(losses, images=len(labels_N))
        self.position.step += 1
        self.position.batch += 1

    def _move(self) -> bool:
        """Decay the weights and step; False if the scaled gradients overflowed: then nothing moves."""
        if not self.scaler.is_enabled():
            self._decay_weights()
            self.optimizer.step()
            return True
        steps_before = self.optimizer.steps
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        self.scaler.update()
        moved = self.optimizer.steps > steps_before
        if moved:
            self._decay_weights()
        return moved

    @torch.no_grad()
    def _decay_weights(self) -> None:
        for decay, parameters in self._decay:
            torch._foreach_mul_(parameters, 1 - self.rate * decay)

    def _backward(self, images: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """The step's loss terms (detached scalars on the device); their gradients are in the parameters."""
        pieces = split_batch(images, labels_N, self._micro_batches)
        losses: dict[str, Tensor] = {}
        with norms_paced(self.network, len(pieces)):
            for images_part, labels_part in pieces:
                share = len(labels_part) / len(labels_N)
                total, terms = self._objective(images_part, labels_part)
                self.scaler.scale(total * share if len(pieces) > 1 else total).backward()  # type: ignore[no-untyped-call]
                for name, term in terms.items():
                    losses[name] = losses[name] + term * share if name in losses else term * share
        if self._penalty:
            penalties = self._penalty.terms()
            total = torch.stack(list(penalties.values())).sum()
            if total.requires_grad:  # else they are over frozen layers only
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            losses |= {name: term.detach() for name, term in penalties.items()}
        return losses

    def _objective(self, images: Tensor, labels_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some images, without penalties, and its parts. With a teacher there is no label smoothing."""
        with self.precision.autocast():
            logits_NK = self.network(images)
        recipe = self.recipe
        if recipe.distillation is None or self._teacher is None:
            loss = cross_entropy(logits_NK, labels_N, label_smoothing=recipe.training.label_smoothing)
            return loss, {"loss": loss.detach()}
        with torch.no_grad(), self.precision.autocast():
            teacher_NK = self._teacher(images)
        alpha = recipe.distillation.alpha
        own = cross_entropy(logits_NK, labels_N)
        distance = distillation(logits_NK, teacher_NK, temperature=recipe.distillation.temperature)
        return (1 - alpha) * own + alpha * distance, {"loss": own.detach(), "distillation": distance.detach()}

    def _grow_masks(self, sparsity: float) -> None:
        assert self.recipe.regrow is not None
        self.masks = self.recipe.regrow(self.network, sparsity, self.masks)
        self.masks.apply(self.network)
        self.masks.mask_optimizer(self.optimizer, self.network)
        if self.average is not None:
            self.masks.mask_tensors(self.average.tensors)

    def _end_epoch(self) -> EpochResult:
        position = self.position
        loss = position.loss_sum / max(1, position.losses_seen)
        self.position = Position(epoch=position.epoch + 1, step=position.step)
        if self._validation is None:
            return EpochResult(position.epoch + 1, loss, None, None, self.average is not None, improved=False)
        self.evaluating = True
        found, averaged = evaluate(self.network, self._validation.epoch(0), self.precision), False
        if self.average is not None:
            with self.average.inside(self.network):
                of_average = evaluate(self.network, self._validation.epoch(0), self.precision)
            if _rank(of_average.accuracy, of_average.loss) > _rank(found.accuracy, found.loss):
                found, averaged = of_average, True
        self.evaluating = False
        improved = self._keep_if_best(found.accuracy, found.loss, averaged)
        return EpochResult(position.epoch + 1, loss, found.accuracy, found.loss, averaged, improved)

    def _keep_if_best(self, accuracy: float, loss: float, averaged: bool) -> bool:
        """Keep this epoch's weights if they are the best; epochs in which masks still grow do not count."""
        if self.recipe.mask_updates and self.position.step <= max(self.recipe.mask_updates):
            return False
        stopping = self.recipe.training.early_stopping
        needed = 0.0 if stopping is None else stopping.min_delta
        if self.mark is None or accuracy > self.mark + needed:
            self.mark, self.stale_epochs = accuracy, 0
        else:
            self.stale_epochs += 1
        before = self.best
        if before is not None and _rank(accuracy, loss) <= _rank(before.accuracy, before.loss):
            return False
        tensors = snapshot(self.network)
        if averaged and self.average is not None:
            tensors = {name: tensor.clone() for name, tensor in self.average.tensors.items()}
        self.best = Best(self.position.epoch, accuracy, loss, tensors)
        return True


class _Losses:
    """Loss terms of the steps since the last reading, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._images = 0
        self._since = time.perf_counter()
        self.last_losses: list[float] = []

    @property
    def empty(self) -> bool:
        return not self._steps

    def restart_clock(self) -> None:
        self._since = time.perf_counter()

    def add(self, losses: Mapping[str, Tensor], *, images: int) -> None:
        self._names = tuple(losses)
        self._steps.append(torch.stack(list(losses.values())))
        self._images += images

    def due(self, *, first: bool) -> bool:
        return first or len(self._steps) >= WINDOW_STEPS or time.perf_counter() - self._since > WINDOW_S

    def read(self, step: int, rate: float) -> Window | None:
        """The window that ends before `step`; None if nothing happened. Raises NonFiniteLoss."""
        if not self._steps:
            return None
        rows = torch.stack(self._steps).double().cpu()
        count, images = len(self._steps), self._images
        self._steps, self._images = [], 0
        bad = (~rows.isfinite()).any(dim=1).nonzero()
        if len(bad):
            row = int(bad[0])
            value = next(float(loss) for loss in rows[row] if not torch.isfinite(loss))
            raise NonFiniteLoss(step - count + row, rate, value)
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        self.last_losses = rows[:, self._names.index("loss")].tolist()
        means = dict(zip(self._names, rows.mean(dim=0).tolist(), strict=True))
        return Window(step, count, rate, means, images / seconds)


def _rank(accuracy: float, loss: float) -> tuple[float, float]:
    return accuracy, -loss
