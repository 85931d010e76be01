"""Everything a job needs before its first step: plan, data, network, and where an earlier attempt left it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.datasets.packed.packed import read_manifest
from app.errors import DataInvalid, InvalidSpec, SourceUnavailable
from app.network.architecture import Preprocessing
from app.planning.plan import JobLimits, Plan, make_plan
from app.pruning.channel_classes import channel_classes
from app.pruning.group_limits import prunable_groups
from app.spec.job import JobSpec, Training, parse_job
from app.spec.optimizations import Compression, Distill, Regularization
from app.spec.prune import Distillation
from app.spec.quantize import Quantize
from app.spec.references import Reference, Source, references_in
from worker.checkpoint import CheckpointRefused, read_checkpoint, spec_digest
from worker.data.dataset import BatchLoader, Dataset, Splits, derive_seed, measure_preprocessing, split
from worker.evaluation import Scores, score
from worker.journal import Journal, Phase, Progress
from worker.network import Network, build_network, put
from worker.precision import Precision, choose_precision
from worker.pruning import schedules
from worker.run.checkpoint_writer import CheckpointWriter
from worker.run.monitor import JobMonitor
from worker.run.progress import PhaseEstimate, ProgressTracker, forward_seconds, training_seconds
from worker.run.record import RunRecord
from worker.run.references import job_network, put_weights, read_sources, start_notes
from worker.run.removal import RECALIBRATION_IMAGES, RemovalContext
from worker.run.state import Reached, restore
from worker.training.distillation import Teacher
from worker.verification.verification import compute_logits

PLAIN_BATCH = 256  # for statistics and choices: batch norm's variance is 0.014 off with batches of 16
MEASURING_S = 5.0  # the budget of the latencies
QUANTIZING_S = 2.0  # two tries of a small network
EXPORTING_S = 8.0  # two clean processes, of which one imports torch


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

    `table` evaluates every group of channels at several widths (kind sensitivity).
    """

    phase: Phase
    position: int | None = None
    removal: schedules.PruningRound | None = None
    table: bool = False


@dataclass
class Job:
    """A job in work: what was asked, what it is made of, what was reached, and who watches."""

    task: Task
    journal: Journal
    plan: Plan
    dataset: Dataset
    splits: Splits
    preprocessing: Preprocessing
    precision: Precision
    stages: tuple[Stage, ...]
    checkpoints: CheckpointWriter
    monitor: JobMonitor
    sources: Mapping[str, Source]
    retried: bool = False
    micro_batches: int = 1

    @property
    def reached(self) -> Reached:
        """Where the job stands."""
        return self.monitor.reached

    @property
    def training(self) -> Training:
        """How it trains."""
        return self.plan.spec.training

    @property
    def regularizations(self) -> tuple[Regularization, ...]:
        """All terms against overfitting: they hold in every training of the job."""
        return tuple(part for part in self.plan.spec.optimizations if isinstance(part, Regularization))

    @property
    def lesson(self) -> Distillation | None:
        """How the first training is taught by another job's network; None: it is not."""
        taught = [part for part in self.plan.spec.optimizations if isinstance(part, Distill)]
        return taught[0].distillation() if taught else None

    @property
    def quantization(self) -> tuple[int, Quantize] | None:
        """The place among the optimizations, and the wish, of an 8-bit file; None: none is asked for."""
        wishes = [(at, part) for at, part in enumerate(self.plan.spec.optimizations) if isinstance(part, Quantize)]
        return wishes[0] if wishes else None

    def compression(self, stage: Stage) -> Compression:
        """The compression that a stage belongs to."""
        assert stage.position is not None
        step = self.plan.spec.optimizations[stage.position]
        assert isinstance(step, Compression)
        return step

    def training_batches(self, stage: int) -> BatchLoader:
        """Augmented batches for the training in the stage with this number, in an order of its own."""
        return BatchLoader(
            self.splits.train,
            self.preprocessing,
            batch_size=self.training.batch_size,
            device=self.precision.device,
            augmentation=self.training.augmentation,
            seed=derive_seed(self.training.seed, "batches", stage),
            channels_last=self.precision.channels_last,
        )

    @cached_property
    def validation(self) -> BatchLoader | None:
        """The validation part in batches; None if it is empty."""
        if not len(self.splits.validation):
            return None
        return BatchLoader(
            self.splits.validation,
            self.preprocessing,
            batch_size=PLAIN_BATCH,
            device=self.precision.device,
            channels_last=self.precision.channels_last,
            shuffle=False,
        )

    @cached_property
    def removal_context(self) -> RemovalContext:
        """What removals need: some training images, drawn by the seed, without augmentation, in equal batches."""
        train, seed = self.splits.train, self.training.seed
        generator = np.random.default_rng(derive_seed(seed, "plain"))
        chosen = np.sort(generator.permutation(len(train))[:RECALIBRATION_IMAGES])
        size = min(PLAIN_BATCH, len(chosen))
        batches = BatchLoader(
            train.take(chosen),
            self.preprocessing,
            batch_size=size,
            device=self.precision.device,
            seed=derive_seed(seed, "plain order"),  # classes of a folder lie one behind the other
            channels_last=self.precision.channels_last,
            drop_last=True,
        )

        def plain() -> Iterator[tuple[Tensor, Tensor]]:
            return batches.epoch(0)

        return RemovalContext(
            plain,
            seed,
            self.precision,
            self.plan.baseline_cost,
            self.dense_network,
            len(train),
            frozen=self.plan.frozen,
        )

    def score(self, network: Network) -> Scores:
        """A network on the test part."""
        return score(compute_logits(network, self.splits.test.images, self.preprocessing), self.splits.test.labels)

    def dense_network(self) -> Network:
        """The trained network before the first compression, on the device."""
        network = build_network(self.plan.baseline)
        put(network, self.reached.kept["baseline"])
        self.precision.place(network)
        return network

    def teacher(self, distillation: Distillation) -> nn.Module:
        """Who teaches: this job's own dense network, or another job's, which gets the images as it knows them."""
        if distillation.teacher is None:
            return self.dense_network()
        reference = Reference("job", distillation.teacher, distillation.artifact, "/optimizations")
        source = self.sources[reference.key]
        assert source.preprocessing is not None
        network = job_network(source, reference, self.task.sources, self.plan.baseline.input_shape)
        self.precision.place(network)
        own = replace(source.preprocessing, scale=self.preprocessing.scale)
        found = score(compute_logits(network, self.splits.test.images, own), self.splits.test.labels)
        self.reached.record.note(
            f"job {reference.id} ({reference.artifact}) taught: its accuracy on this job's test images is "
            f"{found.accuracy:.4f}"
        )
        teacher = Teacher(network, own=own, given=self.preprocessing)
        self.precision.place(teacher)
        return teacher

    def fresh_start(self) -> Reached:
        """Before the first step: new weights from the job's seed, or those of its source where it has one."""
        network = build_network(self.plan.baseline, seed=self.training.seed)
        run_record = RunRecord()
        if self.plan.start is not None:
            put_weights(network, self.plan.start.reference, self.task.sources, fresh=self.plan.start.fresh)
            for sentence in start_notes(self.plan.start, network):
                run_record.note(sentence)
        self.precision.place(network)
        return Reached(network, run_record, micro_batches=self.micro_batches)

    def take_up(self, folder: Path | None) -> Reached:
        """What the checkpoint in `folder` holds; a fresh start if there is none or, with an event, if it is refused."""
        if folder is None:
            return self.fresh_start()
        try:
            checkpoint = read_checkpoint(folder, spec_sha256=spec_digest(self.task.spec))
            if checkpoint.state.get("data_sha256") != self.dataset.sha256:
                raise CheckpointRefused("the checkpoint was made from other data")
            reached = restore(checkpoint, self.precision)
        except CheckpointRefused as refused:
            message = f"{refused.message}: the job starts from the beginning"
            self.journal.event("checkpoint.corrupt", message, level="warn", code=refused.code)
            return self.fresh_start()
        reached.micro_batches = max(reached.micro_batches, self.micro_batches)
        if reached.differs is not None:
            message = f"this is not the machine of the last attempt ({reached.differs}): the bits will differ"
            self.journal.event("warning", message, level="warn")
        return reached

    def close(self) -> None:
        """End what the job started."""
        self.checkpoints.close()


def prepare(task: Task, journal: Journal) -> Job:
    """The job, ready for its next stage.

    Raises:
        DataInvalid: the data are not what the spec was accepted for.
        InvalidSpec: the document is no job.
        SourceUnavailable, WeightsInvalid: a network that the job refers to is not there or cannot be used.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    message = "preparing: plan, data, network"
    resumed = task.resume is not None
    journal.event("phase.started", message, phase="preparing", epochs=0, steps=0, resumed=resumed)
    if not resumed:  # else what the last attempt said stays: a fraction never falls
        journal.progress(Progress("preparing", 0, 0, 0, 0, 0.0))
    spec = parse_job(task.spec)
    sources = read_sources(spec, task.sources)
    plan = _plan(spec, task, sources)
    training = plan.spec.training
    precision = choose_precision(training, task.device, spatial_axes=len(plan.baseline.input_shape) - 1)
    if precision.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes do not change from step to step
    dataset = Dataset.open(task.data, plan.baseline.input_shape)
    splits = split(dataset, plan.spec.data, training.seed)
    stages = lay_out(plan)
    identity = {
        "job_id": task.job_id,
        "spec_sha256": spec_digest(task.spec),
        "data_sha256": dataset.sha256,
    }
    checkpoints = CheckpointWriter(task.scratch, journal, interval_s=task.checkpoint_interval_s, identity=identity)
    tracker = ProgressTracker(_parts(plan, splits, stages))
    monitor = JobMonitor(journal, tracker, checkpoints)
    job = Job(
        task=task,
        journal=journal,
        plan=plan,
        dataset=dataset,
        splits=splits,
        preprocessing=_preprocessing(plan, splits, dataset.scale),
        precision=precision,
        stages=stages,
        checkpoints=checkpoints,
        monitor=monitor,
        sources=sources,
    )
    monitor.reached = job.take_up(task.resume)
    monitor.keep_epochs = frozenset(
        epoch
        for step in plan.spec.optimizations
        if isinstance(step, Compression) and (epoch := schedules.rewind_epoch(step, training)) is not None
    )
    return job


def lay_out(plan: Plan) -> tuple[Stage, ...]:
    """The stages of a job in order: train, evaluate, and for each pruning step its removals with their retraining."""
    stages = [Stage("training"), Stage("evaluating")]
    for position, step in enumerate(plan.spec.optimizations):
        if not isinstance(step, Compression):
            continue
        for removal in schedules.prune_stages(step, plan.spec.training):
            stages.append(Stage("pruning", position, removal))
            if removal.epochs:
                stages.append(Stage("retraining", position, removal))
        stages.append(Stage("evaluating", position))
    if plan.spec.sensitivity is not None:
        stages.append(Stage("evaluating", table=True))
    return tuple(stages)


def _plan(spec: JobSpec, task: Task, sources: Mapping[str, Source]) -> Plan:
    try:
        facts = read_manifest(task.data).facts()
    except (OSError, ValueError, KeyError) as error:
        raise DataInvalid(f"the packed data set cannot be read: {error}") from error
    try:
        return make_plan(spec, facts, limits=JobLimits.none(), sources=sources)
    except InvalidSpec as refused:
        first = refused.faults[0]
        if first.pointer in {reference.pointer for reference in references_in(spec)}:
            message = f"a network is not what the job was accepted with: {first.message}"
            raise SourceUnavailable(message, pointer=first.pointer) from refused
        raise DataInvalid(f"the job does not fit its data: {first.message}", pointer=first.pointer) from refused


def _preprocessing(plan: Plan, splits: Splits, scale: float) -> Preprocessing:
    """What the images go through: as the weights that the job starts from know it, else as the training part is."""
    if plan.start is not None and plan.start.mean is not None and plan.start.std is not None:
        return Preprocessing(scale, plan.start.mean, plan.start.std)
    return measure_preprocessing(splits.train, scale)


def _parts(plan: Plan, splits: Splits, stages: tuple[Stage, ...]) -> list[PhaseEstimate]:
    """The course: preparing, every stage, measuring, exporting."""
    images, held_out, test = len(splits.train), len(splits.validation), len(splits.test)
    steps_per_epoch = max(1, -(-images // plan.spec.training.batch_size))
    dense, pruned = plan.baseline_cost.macs, plan.planned_cost.macs
    parts = [PhaseEstimate("preparing", 0.0, 0.5)]
    for stage in stages:
        macs = dense if stage.position is None else pruned
        if stage.phase in ("training", "retraining"):
            epochs = plan.spec.training.epochs if stage.removal is None else stage.removal.epochs
            seconds = epochs * (training_seconds(images, macs) + forward_seconds(held_out, macs))
            parts.append(PhaseEstimate(stage.phase, seconds, 0.0, epochs, epochs * steps_per_epoch))
        elif stage.phase == "pruning":
            parts.append(PhaseEstimate("pruning", forward_seconds(2 * test + RECALIBRATION_IMAGES, dense), 0.2))
        elif stage.table:
            cuts = _cuts(plan)
            parts.append(
                PhaseEstimate("evaluating", cuts * forward_seconds(2 * test + RECALIBRATION_IMAGES, macs), 0.1)
            )
        else:
            parts.append(PhaseEstimate("evaluating", forward_seconds(test, macs), 0.1))
    for step in plan.spec.optimizations:
        if isinstance(step, Quantize):
            images = test + step.calibration_images + 2 * held_out
            parts.append(PhaseEstimate("evaluating", forward_seconds(images, pruned), QUANTIZING_S))
    parts.append(PhaseEstimate("measuring", 0.0, MEASURING_S))
    parts.append(PhaseEstimate("exporting", forward_seconds(3 * test, dense + pruned), EXPORTING_S))
    return parts


def _cuts(plan: Plan) -> int:
    """How many networks a table of sensitivities takes."""
    options, graph = plan.spec.sensitivity, plan.baseline
    assert options is not None
    groups = prunable_groups(graph, channel_classes(graph), options.step(options.kept[-1]))
    return len(groups) * len(options.kept)
