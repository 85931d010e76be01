"""A job in work: what was asked, what it is made of, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from app.network.architecture import Preprocessing
from app.network.cost import CHOICE_BATCH, SMALLEST_BATCH, choice_batch
from app.planning.phases import PhaseName
from app.planning.plan import Plan
from app.spec.job import Training
from app.spec.optimizations import Compression, Distill, Regularization
from app.spec.prune import Prune
from app.spec.quantize import Quantize
from app.spec.references import Reference, Source
from app.spec.retrain import Distillation
from worker.data.dataset import BatchLoader, Dataset, Split, Splits, derive_seed
from worker.data.race_images import RaceImages, race_images
from worker.evaluation import Scores, score
from worker.journal import Journal
from worker.network import Network, assign_tensors, build_network
from worker.precision import Precision
from worker.pruning import schedules
from worker.run.checkpoint_writer import CheckpointWriter
from worker.run.monitor import JobMonitor
from worker.run.progress import ProgressTracker
from worker.run.references import job_network
from worker.run.removal import RECALIBRATION_IMAGES, RemovalContext
from worker.run.state import Origin, Reached
from worker.training.distillation import Teacher
from worker.training.micro_batches import split_batch
from worker.verification.verification import compute_logits


@dataclass(frozen=True)
class Task:
    """One attempt of one job: `spec` is the stored document, `data` a packed data set, `scratch` an empty folder.

    `resume` has `checkpoint.safetensors` and `checkpoint.json` of an earlier attempt; `sources` has a folder for each
    network that the spec refers to (`worker/run/references.py`); `latency_s` is spent on latencies.
    """

    job_id: str
    attempt: int
    spec: dict[str, Any]
    data: Path
    scratch: Path
    resume: Path | None = None
    sources: Path | None = None
    threads: int | None = None
    device: str = "auto"
    checkpoint_interval_s: float = 60.0
    latency_s: float = 4.0


@dataclass(frozen=True)
class Stage:
    """One phase: train; evaluate; cut and retrain for the optimization at `position`, in its round `removal`.

    `epochs` are those of a training. A retraining that compares rates has a stage for each try, the `attempt`-th of
    its rates on the part `share` of the images, and one for the best of them. `table` evaluates every group of channels
    at several widths (kind sensitivity).
    """

    phase: PhaseName
    position: int | None = None
    removal: schedules.PruningRound | None = None
    table: bool = False
    epochs: int = 0
    attempt: int | None = None
    share: float = 1.0


QUANTIZING = "quantizing"  # the name of a phase that users see as evaluating


def stage_name(number: int) -> str:
    """Under which name the tracker has the stage with this number."""
    return f"stage {number}"


def halved_batches(job: Job) -> str:
    """What computing batches in two halves means for the job, for its log and its report."""
    what = "each batch is computed in two halves"
    if any(node.type == "batch_norm" for node in job.plan.baseline.nodes):
        return f"{what}, and batch norm normalises each by itself: the gradient is not quite that of the whole"
    return f"{what}, for the same gradient"


@dataclass
class Job:
    """A job in work: what was asked, what it is made of, and how far it has come (`reached`)."""

    task: Task
    journal: Journal
    plan: Plan
    dataset: Dataset
    splits: Splits
    preprocessing: Preprocessing
    precision: Precision
    stages: tuple[Stage, ...]
    sources: Mapping[str, Source]
    origin: Origin
    reached: Reached
    tracker: ProgressTracker
    checkpoints: CheckpointWriter
    rewind_epochs: frozenset[int]
    """Of the first training: the epochs whose weights a retraining with weight_rewind goes back to."""
    began: float
    """On the monotonic clock: from here on the seconds of this attempt count."""
    retried: bool = False
    micro_batches: int = 1
    """In how many pieces a batch is computed while training: 2 from where memory ran out on."""
    choice_parts: int = 1
    """By how much the batches of validation, statistics and criteria are smaller since memory ran out: 1, 2, 4, ..."""

    monitor: JobMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.monitor = JobMonitor(self, began=self.began)

    @property
    def training(self) -> Training:
        """How it trains."""
        return self.plan.spec.training

    def regularizations(self, stage: int) -> tuple[Regularization, ...]:
        """The terms of the loss in the training of this stage.

        Those that prepare a removal of channels are left out of a retraining that no such removal follows.
        """
        terms = tuple(part for part in self.plan.spec.optimizations if isinstance(part, Regularization))
        if self.stages[stage].position is None or any(map(self._cuts_channels, self.stages[stage:])):
            return terms
        return tuple(part.without_preparation() for part in terms)

    def _cuts_channels(self, stage: Stage) -> bool:
        if stage.phase != "pruning":
            return False
        step = self.compression(stage)
        return isinstance(step, Prune) and not step.zeros

    @property
    def distillation_of_training(self) -> Distillation | None:
        """How the first training learns from another job's network; None: it does not."""
        asked = [part for part in self.plan.spec.optimizations if isinstance(part, Distill)]
        return asked[0].distillation() if asked else None

    @property
    def quantization(self) -> Quantize | None:
        """The 8-bit file that is asked for; None: none is."""
        return next((part for part in self.plan.spec.optimizations if isinstance(part, Quantize)), None)

    def compression(self, stage: Stage) -> Compression:
        """The compression that a stage belongs to."""
        assert stage.position is not None
        step = self.plan.spec.optimizations[stage.position]
        assert isinstance(step, Compression)
        return step

    def training_batches(self, number: int) -> BatchLoader:
        """Augmented batches for the training in the stage with this number, in an order of its own.

        The tries of one race get the same.
        """
        stage, images = self.stages[number], self.splits.train
        if stage.attempt is not None:
            images = self.race.images(stage.share)
        return BatchLoader(
            images,
            self.preprocessing,
            batch_size=self.training.batch_size,
            device=self.precision.device,
            augmentation=self.training.augmentation,
            seed=derive_seed(self.training.seed, "batches", number - (stage.attempt or 0)),
            channels_last=self.precision.channels_last,
        )

    @cached_property
    def validation(self) -> BatchLoader | None:
        """The validation part in batches; None if it is empty."""
        if not len(self.splits.validation):
            return None
        return self._in_order(self.splits.validation)

    def _in_order(self, part: Split) -> BatchLoader:
        return BatchLoader(
            part,
            self.preprocessing,
            batch_size=self.images_at_a_time(),
            device=self.precision.device,
            channels_last=self.precision.channels_last,
            shuffle=False,
        )

    @cached_property
    def race(self) -> RaceImages:
        """What rates of a retraining are tried on, and compared by."""
        return race_images(self.splits, self.training.seed)

    @property
    def race_batches(self) -> BatchLoader:
        """The images by which rates are compared, in batches."""
        return self._in_order(self.race.held_out)

    @cached_property
    def removal_context(self) -> RemovalContext:
        """What removals need: some training images, drawn by the seed, without augmentation.

        In equal batches, which are computed in pieces where memory does not hold them.
        """
        train, seed = self.splits.train, self.training.seed
        generator = np.random.default_rng(derive_seed(seed, "plain"))
        chosen = np.sort(generator.permutation(len(train))[:RECALIBRATION_IMAGES])
        size = min(CHOICE_BATCH, len(chosen))
        batches = BatchLoader(
            train.take(chosen),
            self.preprocessing,
            batch_size=size,
            device=self.precision.device,
            seed=derive_seed(seed, "plain order"),  # a folder has its classes one after the other
            channels_last=self.precision.channels_last,
        )

        def whole() -> Iterator[tuple[Tensor, Tensor]]:
            return batches.epoch(0)

        def plain() -> Iterator[tuple[Tensor, Tensor]]:
            pieces = -(-size // self.images_at_a_time())
            for images_NCx, labels_N in whole():
                yield from split_batch(images_NCx, labels_N, pieces)

        return RemovalContext(
            plain,
            seed,
            self.precision,
            self.plan.baseline_cost,
            self.dense_network,
            len(train),
            frozen=self.plan.frozen,
            whole=whole,
            gradient_images=partial(self.images_at_a_time, backward=True),
            monitor=self.monitor,
            look=self.monitor.check_removal,
        )

    def images_at_a_time(self, *, backward: bool = False) -> int:
        """How many images validation, statistics and criteria compute at once; `backward`: with gradients."""
        step = -(-self.training.batch_size // self.reached.micro_batches)
        fitting = choice_batch(self.plan.baseline, step, backward=backward)
        return max(SMALLEST_BATCH, fitting // self.reached.choice_parts)

    def score(self, network: Network) -> Scores:
        """A network on the test part."""
        return score(compute_logits(network, self.splits.test.images, self.preprocessing), self.splits.test.labels)

    def dense_network(self) -> Network:
        """The trained network before the first compression, on the device."""
        network = build_network(self.plan.baseline)
        assign_tensors(network, self.reached.kept["baseline"])
        self.precision.to_device(network)
        return network

    def teacher(self, distillation: Distillation) -> nn.Module:
        """The network to learn from: this job's own dense one, or another job's with its own mean and standard deviation."""
        if distillation.teacher is None:
            return self.dense_network()
        reference = Reference("job", distillation.teacher, distillation.artifact, "/optimizations")
        source = self.sources[reference.key]
        assert source.preprocessing is not None
        network = job_network(source, reference, self.task.sources, self.plan.baseline.input_shape)
        self.precision.to_device(network)
        own = replace(source.preprocessing, scale=self.preprocessing.scale)
        found = score(compute_logits(network, self.splits.test.images, own), self.splits.test.labels)
        self.reached.record.note(
            f"job {reference.id} ({reference.artifact}) was the teacher: its accuracy on this job's test images is "
            f"{found.accuracy:.4f}"
        )
        teacher = Teacher(network, own=own, given=self.preprocessing)
        self.precision.to_device(teacher)
        return teacher

    def return_to_checkpoint(self) -> None:
        """Go back to where the last checkpoint was taken, or to the start where there is none."""
        folder = self.checkpoints.latest or self.task.resume
        self.reached = self.origin.resume(
            folder, self.journal, micro_batches=self.micro_batches, choice_parts=self.choice_parts
        )
        vars(self).pop("validation", None)  # its batches may be smaller from here on

    def close(self) -> None:
        """End what the job started."""
        self.checkpoints.close()
