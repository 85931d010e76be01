"""Everything a job needs before its first step: plan, data, network, and where an earlier attempt left it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from app.datasets.packed.packed import read_manifest
from app.errors import DataInvalid, InvalidSpec, SourceUnavailable
from app.network.architecture import Preprocessing
from app.planning.phases import PlannedPhase, phases_of
from app.planning.plan import JobLimits, Plan, make_plan
from app.pruning.channel_classes import channel_classes
from app.pruning.group_limits import prunable_groups
from app.spec.job import JobSpec, parse_job, race_epochs, retraining
from app.spec.optimizations import Compression, Distill
from app.spec.prune import Prune
from app.spec.quantize import Quantize
from app.spec.references import Source, references_in
from worker.checkpoint import spec_digest
from worker.data.dataset import Dataset, Splits, measure_preprocessing, split_dataset
from worker.journal import Journal, Progress
from worker.precision import choose_precision
from worker.pruning import schedules
from worker.pruning.loss_curves import curve_effort
from worker.run.checkpoint_writer import CheckpointWriter
from worker.run.job import QUANTIZING, Job, Stage, Task, stage_name
from worker.run.progress import PhaseEstimate, ProgressTracker, forward_seconds, training_seconds
from worker.run.references import read_sources
from worker.run.removal import RECALIBRATION_IMAGES
from worker.run.sensitivity import measured_split
from worker.run.state import Origin

PREPARING_S = 0.5
MEASURING_S = 5.0  # the budget of the latencies
QUANTIZING_S = 2.0  # two tries of a small network
EXPORTING_S = 8.0  # two clean processes, of which one imports torch


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
    splits = split_dataset(dataset, plan.spec.data, training.seed)
    stages = lay_out(plan)
    digest = spec_digest(task.spec)
    origin = Origin(plan, task.sources, precision, digest, dataset.sha256)
    identity = {"job_id": task.job_id, "spec_sha256": digest, "data_sha256": dataset.sha256}
    checkpoints = CheckpointWriter(task.scratch, journal, interval_s=task.checkpoint_interval_s, identity=identity)
    began = time.monotonic()
    return Job(
        task=task,
        journal=journal,
        plan=plan,
        dataset=dataset,
        splits=splits,
        preprocessing=_preprocessing(plan, splits, dataset.scale),
        precision=precision,
        stages=stages,
        sources=sources,
        origin=origin,
        reached=origin.resume(task.resume, journal),
        tracker=ProgressTracker(_estimates(plan, splits, stages)),
        checkpoints=checkpoints,
        rewind_epochs=_rewind_epochs(plan),
        began=began,
    )


def _rewind_epochs(plan: Plan) -> frozenset[int]:
    steps = [step for step in plan.spec.optimizations if isinstance(step, Compression)]
    epochs = [schedules.rewind_epoch(step, plan.spec.training) for step in steps]
    return frozenset(epoch for epoch in epochs if epoch is not None)


def lay_out(plan: Plan) -> tuple[Stage, ...]:
    """The stages of a job in order: train, evaluate, and for each compression its rounds with their retraining."""
    return tuple(stage for phase in phases_of(plan.spec) if _is_stage(phase) for stage in _stages(phase, plan))


def _is_stage(phase: PlannedPhase) -> bool:
    """Whether `run_stages` carries it out; preparing, the 8-bit file, measuring and exporting come before or after."""
    return phase.phase not in ("preparing", "measuring", "exporting") and phase.subject != "int8"


def _stages(phase: PlannedPhase, plan: Plan) -> Iterator[Stage]:
    """One stage; of a retraining that compares rates also one for each try."""
    if phase.round is None:
        yield Stage(phase.phase, phase.position, table=phase.subject == "sensitivity", epochs=phase.epochs or 0)
        return
    assert phase.position is not None
    step, training = plan.spec.optimizations[phase.position], plan.spec.training
    assert isinstance(step, Compression)
    stage = Stage(phase.phase, phase.position, schedules.prune_stages(step, training)[phase.round - 1])
    for_race = race_epochs(step, training) if phase.phase == "retraining" else 0
    if for_race:
        tries = len(schedules.retrain_rates(step, training))
        epochs = -(-for_race // tries)  # of a try: each on a part of the images
        share = for_race / (tries * epochs)
        for number in range(tries):
            yield replace(stage, epochs=epochs, attempt=number, share=share)
    yield replace(stage, epochs=(phase.epochs or 0) - for_race)


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


def _estimates(plan: Plan, splits: Splits, stages: tuple[Stage, ...]) -> list[PhaseEstimate]:
    """All phases of a job in order, with their seconds."""
    numbered, estimates = iter(enumerate(stages)), []
    for phase in phases_of(plan.spec):
        if _is_stage(phase):
            for _ in _stages(phase, plan):
                estimates.append(_estimate_stage(*next(numbered), plan, splits))
        else:
            estimates.append(_estimate_other(phase, plan, splits))
    return estimates


def _estimate_other(phase: PlannedPhase, plan: Plan, splits: Splits) -> PhaseEstimate:
    """What comes before and after the stages."""
    test, dense, pruned = len(splits.test), plan.baseline_cost.macs, plan.planned_cost.macs
    if phase.phase == "preparing":
        return PhaseEstimate("preparing", 0.0, PREPARING_S)
    if phase.phase == "measuring":
        return PhaseEstimate("measuring", 0.0, MEASURING_S)
    if phase.phase == "exporting":
        return PhaseEstimate("exporting", forward_seconds(3 * test, dense + pruned), EXPORTING_S)
    assert phase.position is not None
    step = plan.spec.optimizations[phase.position]
    assert isinstance(step, Quantize)
    images = test + step.calibration_images + 2 * len(splits.validation)
    return PhaseEstimate("evaluating", forward_seconds(images, pruned), QUANTIZING_S, name=QUANTIZING)


def _estimate_stage(number: int, stage: Stage, plan: Plan, splits: Splits) -> PhaseEstimate:
    images, held_out, test = len(splits.train), len(splits.validation), len(splits.test)
    dense, name = plan.baseline_cost.macs, stage_name(number)
    macs = dense if stage.position is None else plan.planned_cost.macs
    if stage.phase in ("training", "retraining"):
        trained = max(1, round(stage.share * images))
        seconds = stage.epochs * (training_seconds(trained, macs) + forward_seconds(held_out, macs))
        seconds += stage.epochs * _teacher_seconds(stage, plan, trained)
        steps = stage.epochs * max(1, -(-trained // plan.spec.training.batch_size))
        return PhaseEstimate(stage.phase, seconds, 0.0, stage.epochs, steps, name=name)
    seconds_of_a_cut = forward_seconds(2 * test + RECALIBRATION_IMAGES, dense)
    if stage.phase == "pruning":
        curves = forward_seconds(_curve_forwards(stage, plan, images), dense)
        return PhaseEstimate("pruning", seconds_of_a_cut + curves, 0.2, name=name)
    if stage.table:
        return PhaseEstimate("evaluating", _table_seconds(plan, splits), 0.1, name=name)
    return PhaseEstimate("evaluating", forward_seconds(test, macs), 0.1, name=name)


def _teacher_seconds(stage: Stage, plan: Plan, images: int) -> float:
    """What the answers of a teacher, taken to be as large as the dense network, add to an epoch."""
    if stage.position is None:
        taught = any(isinstance(step, Distill) for step in plan.spec.optimizations)
    else:
        step = plan.spec.optimizations[stage.position]
        assert isinstance(step, Compression)
        taught = retraining(step, plan.spec.training).distillation is not None
    return forward_seconds(images, plan.baseline_cost.macs) if taught else 0.0


def _curve_forwards(stage: Stage, plan: Plan, images: int) -> int:
    """How many images go through the network for the loss curves of a removal; 0 where it needs none."""
    assert stage.position is not None
    step = plan.spec.optimizations[stage.position]
    if not isinstance(step, Prune) or step.scope != "sensitivity":
        return 0
    graph = plan.graphs[stage.position]
    step = step.model_copy(update={"round_to": step.round_to or 1})
    groups = len(prunable_groups(graph, channel_classes(graph), step, shared=True))
    return curve_effort(groups, images).forwards(groups)


def _table_seconds(plan: Plan, splits: Splits) -> float:
    """What a table of sensitivities takes: each cut is evaluated twice and recalibrated once."""
    options, graph = plan.spec.sensitivity, plan.baseline
    assert options is not None
    groups = prunable_groups(graph, channel_classes(graph), options.step(options.kept[-1]))
    images = 2 * len(measured_split(splits, options)[1]) + RECALIBRATION_IMAGES
    return len(groups) * len(options.kept) * forward_seconds(images, plan.baseline_cost.macs)
