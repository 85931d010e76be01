"""What each phase of a job does: train, evaluate, prune, retrain. `run_stages` runs them from where the job stands."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import torch

from app.errors import Diverged, OutOfMemory
from app.network.cost import SMALLEST_BATCH
from app.spec.job import retraining
from app.spec.optimizations import Compression
from app.spec.prune import Prune
from worker.data.dataset import derive_seed
from worker.network import Network, assign_tensors, snapshot
from worker.pruning.schedules import retrain_rates
from worker.pruning.weight_masks import joined_masks, pruned_part
from worker.run.handlers import compression_handler
from worker.run.job import Job, Stage, halved_batches, stage_name
from worker.run.monitor import Interrupted, at_most_every
from worker.run.record import StepRecord
from worker.run.removal import check_budget, recalibrate, repair
from worker.run.report import Row, measures
from worker.run.sensitivity import tabulate
from worker.training.learning_rate import LearningRate, learning_rate
from worker.training.loop import Fit, NonFiniteLoss, Recipe
from worker.training.masks import Masks
from worker.training.race import losses_of, winner
from worker.training.resume import restore_fit

LOOK_S = 0.5  # between two looks at the user's wishes in a repair
RACE_START = "race/start"  # weights that every try starts from
ALLOCATION_FAILED = (
    "can't allocate memory",
    "not enough memory",
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # of pinned memory
    "STATUS_ALLOC_FAILED",  # CUDNN_..., CUBLAS_..., CUSOLVER_...
)
SMALLER_NETWORK = "lower the network's width or the size of its input, or use a device with more memory"


def run_stages(job: Job) -> bool:
    """Run all stages that are left; True if the user stopped the job before the last.

    A loss that is no number is tried once more from the last checkpoint. Where memory runs out in a step, it is tried
    once more with each batch in two halves; in a choice (validation, statistics, criteria, curves) with half as many
    images at a time, down to two.

    Raises:
        Interrupted: the user cancelled or paused.
        Diverged: the loss was no number twice. OutOfMemory: smaller pieces did not fit either.
        BudgetMissed, LayerEmptied, DiskFull: as their docstrings say.
    """
    while True:
        try:
            while job.reached.stage < len(job.stages):
                _run_stage(job)
            return False
        except Interrupted as told:
            if told.wish != "stop":
                raise
            _stop(job)
            return True
        except NonFiniteLoss as found:
            _prepare_retry(job, found)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _ran_out_of_memory(error):
                raise
            smaller = _prepare_smaller_choices if _is_choosing(job) else _prepare_smaller_steps
            smaller(job, str(error))
        _return_to_checkpoint(job)


def _run_stage(job: Job) -> None:
    reached, number = job.reached, job.reached.stage
    stage = job.stages[number]
    resumed = reached.suspended is not None or bool(
        reached.record.curves or (stage.table and reached.record.sensitivity)
    )
    job.monitor.enter(stage_name(number), message=_announcement(job, stage), resumed=resumed)
    if all(later.phase == "evaluating" and not later.table for later in job.stages[number:]):
        job.monitor.check_cancel_or_pause()
    else:
        job.monitor.check_interrupts()
    ACTIONS[stage.phase](job, stage)
    job.monitor.add_elapsed()
    reached.finish_stage()
    job.monitor.checkpoint()


def _announcement(job: Job, stage: Stage) -> str:
    if stage.phase == "training":
        if job.training.epochs == 0:
            return "no training: the network came trained"
        return f"training for {job.training.epochs} epochs on {len(job.splits.train)} images"
    if stage.table:
        return "cutting each group of channels to several widths, without retraining"
    if stage.phase == "evaluating":
        return f"evaluating on {len(job.splits.test)} test images"
    assert stage.removal is not None
    of_rounds = f", round {stage.removal.number} of {stage.removal.count}" if stage.removal.count > 1 else ""
    if stage.phase == "retraining":
        rates = retrain_rates(job.compression(stage), job.training)
        if stage.attempt is not None:
            return f"retraining: trying the learning rate {rates[stage.attempt].name}{of_rounds}"
        return f"retraining for {stage.epochs} epochs{of_rounds}"
    step = job.compression(stage)
    return compression_handler(step).title(step) + of_rounds


# --- stages ----------------------------------------------------------------------------------------------------------


def _train(job: Job, stage: Stage) -> None:
    reached = job.reached
    if 0 in job.rewind_epochs and "rewind/0" not in reached.kept:
        reached.kept["rewind/0"] = snapshot(reached.network)
    fit = begin_fit(job, stage)
    fit.run(job.monitor)
    fit.conclude()
    reached.kept["baseline"] = snapshot(reached.network)


def _retrain(job: Job, stage: Stage) -> None:
    if stage.attempt is not None:
        _try_rate(job, stage, stage.attempt)
        return
    if RACE_START in job.reached.kept:
        _go_on_with_the_best(job, stage)
    fit = begin_fit(job, stage)
    fit.run(job.monitor)
    fit.conclude()
    record = job.reached.record.steps[-1]
    if recalibrate(job.reached.network, job.removal_context):
        record.rounds[-1]["recalibrated_after_retraining"] = True


def _try_rate(job: Job, stage: Stage, number: int) -> None:
    """Train with one of the rates for a short time, from where the removal left the network, and keep the weights."""
    reached = job.reached
    if reached.suspended is None:
        if number == 0:
            reached.kept[RACE_START] = snapshot(reached.network)
        assign_tensors(reached.network, reached.kept[RACE_START])
    fit = begin_fit(job, stage)
    try:
        fit.run(job.monitor)
        fit.conclude()
        reached.kept[f"race/{number}"] = snapshot(reached.network)
    except NonFiniteLoss as found:  # this rate is too high: the try has lost, the job has not failed
        message = f"{found.message}: this learning rate is out of the race"
        job.journal.event("warning", message, level="warn", step=found.step, lr=found.rate)


def _go_on_with_the_best(job: Job, stage: Stage) -> None:
    """Compare the tries that came to their end, note what was found, and give the network the weights of the best.

    Where every rate has diverged, the network goes on from before the race, at the lowest of them.
    """
    reached, all_rates = job.reached, retrain_rates(job.compression(stage), job.training)
    start, judging = reached.kept.pop(RACE_START), job.race_batches
    tries = {number: reached.kept.pop(f"race/{number}", None) for number in range(len(all_rates))}
    ended = [(all_rates[number], weights) for number, weights in tries.items() if weights is not None]
    losses = []
    for _, weights in ended:
        assign_tensors(reached.network, weights)
        losses.append(losses_of(reached.network, judging.epoch(0), job.precision))
    rates = [rate for rate, _ in ended] or [all_rates[-1]]
    best = winner(losses) if losses else 0
    assign_tensors(reached.network, ended[best][1] if ended else start)
    means = {rate.name: round(float(loss.mean()), 5) for (rate, _), loss in zip(ended, losses, strict=True)}
    by = "training images held out for it" if job.race.borrowed else "validation images"
    reached.record.steps[-1].rounds[-1]["race"] = {
        "chosen": rates[best].name,
        "losses": {name: loss if math.isfinite(loss) else None for name, loss in means.items()},
        "judged_by": by,
        "images": len(job.race.held_out),
    }
    message = f"the learning rate goes {rates[best].name}: best of {len(rates)} on {len(job.race.held_out)} {by}"
    job.journal.event("retraining.rate_chosen", message, **reached.record.steps[-1].rounds[-1]["race"])


def _evaluate(job: Job, stage: Stage) -> None:
    reached = job.reached
    if stage.table:
        tabulate(job)
        return
    reached.record.latest = job.score(reached.network)
    if stage.position is None:
        reached.record.baseline = reached.record.latest
        return
    step = job.compression(stage)
    measured = check_budget(reached.network, step, job.removal_context)
    _close_record(job, step, complete=True)
    if measured is not None:
        record = reached.record.steps[-1]
        record.met = measured.met
        if not measured.met:
            sentence = f"/optimizations/{record.position}: {measured.sentence()}; it is delivered as it is"
            reached.record.note(sentence)
            job.journal.event("warning", sentence, level="warn")


def _compress(job: Job, stage: Stage) -> None:
    assert stage.position is not None
    assert stage.removal is not None
    reached, step = job.reached, job.compression(stage)
    assert reached.record.latest is not None
    if all(record.position != stage.position for record in reached.record.steps):  # else a checkpoint has it
        reached.record.steps.append(
            StepRecord(
                position=stage.position,
                before=measures(reached.network, reached.record.latest),
                start=reached.network.graph.to_layers(),
                sparsity_before=pruned_part(reached.network, step, reached.masks) if isinstance(step, Prune) else 0.0,
            )
        )
    record, handler = reached.record.steps[-1], compression_handler(step)
    message, data = handler.planned(step)
    job.journal.event("prune.planned", message, **data, round=stage.removal.number, rounds=stage.removal.count)
    removed = handler.remove(job, step, stage.removal, record)
    after_cut = job.score(reached.network)
    reconstruction = None
    if removed is not None:
        look = at_most_every(LOOK_S, job.monitor.check_cancel_or_pause)
        reconstruction = repair(reached.network, removed, reached.masks, job.removal_context, look)
        record.reconstructed = dict(reconstruction.layers)
    recalibrated = recalibrate(reached.network, job.removal_context)
    reached.record.latest = job.score(reached.network) if recalibrated else after_cut
    found = measures(reached.network, reached.record.latest)
    record.rounds.append(
        {
            "round": stage.removal.number,
            "after_cut": after_cut.accuracy,
            "reconstruction": None if reconstruction is None else reconstruction.document(),
            "after_recalibration": reached.record.latest.accuracy,
            "params": found["params"],
            "nonzero_params": found["nonzero_params"],
            "macs": found["macs"],
        }
    )
    _report_removal(job, record, handler.done(step))


def _report_removal(job: Job, record: StepRecord, what: str) -> None:
    latest, before = record.rounds[-1], record.before
    job.journal.event(
        "prune.applied",
        f"{what}: {latest['nonzero_params']} of {before['params']} parameters and {latest['macs']} of "
        f"{before['macs']} MACs are left; accuracy {latest['after_cut']:.4f} after the cut, "
        f"{latest['after_recalibration']:.4f} recalibrated",
        **latest,
    )
    if job.reached.masks is not None:
        step_now = job.tracker.steps_before
        job.journal.metric("sparsity", step_now, _sparsity(job.reached.masks))
    chance = 1.5 / len(job.dataset.class_names)
    if latest["after_recalibration"] <= chance < before["accuracy"]:
        message = f"accuracy is at chance ({latest['after_recalibration']:.4f}) until the network is retrained"
        job.journal.event("warning", message, level="warn")


ACTIONS: dict[str, Callable[[Job, Stage], None]] = {
    "training": _train,
    "evaluating": _evaluate,
    "pruning": _compress,
    "retraining": _retrain,
}


# --- trainings -------------------------------------------------------------------------------------------------------


def begin_fit(job: Job, stage: Stage) -> Fit:
    """The training of a stage: at its start, or where a checkpoint left it."""
    reached = job.reached
    batches = job.training_batches(reached.stage)
    steps_per_epoch = len(batches)
    recipe = _recipe(job, stage, steps_per_epoch)
    fit = Fit(
        reached.network,
        batches,
        recipe,
        job.precision,
        validation=job.validation,
        masks=reached.masks,
        teacher=job.teacher(recipe.distillation) if recipe.distillation is not None else None,
        micro_batches=reached.micro_batches,
    )
    if reached.suspended is not None:
        restore_fit(fit, reached.suspended.tensors, reached.suspended.state)
        reached.suspended = None
        job.tracker.resume_at(fit.position.step / max(1, fit.steps))
    reached.fit = fit
    return fit


def _recipe(job: Job, stage: Stage, steps_per_epoch: int) -> Recipe:
    seed = derive_seed(job.training.seed, "fit", job.reached.stage - (stage.attempt or 0))
    if stage.position is None or stage.removal is None:
        return Recipe(
            phase="training",
            epochs=job.training.epochs,
            rate=learning_rate(job.training),
            training=job.training,
            seed=seed,
            regularizations=job.regularizations(job.reached.stage),
            distillation=job.distillation_of_training,
            frozen=job.plan.frozen,
            rate_factors=job.plan.rate_factors,
        )
    step = job.compression(stage)
    record = job.reached.record.steps[-1]
    # what replaces a layer is new and trains like any other: it has to recover what the product lost
    new = {name for past in job.reached.record.steps for name, outcome in past.outcomes.items() if "parts" in outcome}

    def regrow(network: Network, sparsity: float, previous: Masks | None) -> Masks:
        assert isinstance(step, Prune), "only masks grow during a retraining"
        return joined_masks(network, step, sparsity, previous, seed=job.training.seed)

    return Recipe(
        phase="retraining",
        epochs=stage.epochs,
        rate=_rate(job, stage),
        training=job.training,
        seed=seed,
        regularizations=job.regularizations(job.reached.stage),
        distillation=retraining(step, job.training).distillation,
        mask_updates=stage.removal.mask_updates(
            step.sparsity if isinstance(step, Prune) else None,
            stage.epochs * steps_per_epoch,
            initial=record.sparsity_before,
        ),
        regrow=regrow,
        frozen=job.plan.frozen - new,
        rate_factors={name: factor for name, factor in job.plan.rate_factors.items() if name not in new},
    )


def _rate(job: Job, stage: Stage) -> LearningRate:
    """The rate of a retraining: of a try its own, after a race the one that was chosen."""
    rates = retrain_rates(job.compression(stage), job.training)
    if stage.attempt is not None:
        return rates[stage.attempt].rate
    race = job.reached.record.steps[-1].rounds[-1].get("race")
    return rates[0].rate if race is None else next(rate.rate for rate in rates if rate.name == race["chosen"])


def _sparsity(masks: Masks | None) -> float:
    return 0.0 if masks is None else masks.zeros() / max(1, masks.sizes())


def _close_record(job: Job, step: Compression, *, complete: bool) -> None:
    reached = job.reached
    record = reached.record.steps[-1]
    job.monitor.add_elapsed()
    record.after = measures(reached.network, reached.record.latest)
    rows = compression_handler(step).layers(job, step, record)
    record.layers = [row | _reconstruction_of(row, record) for row in rows]
    record.complete = complete


def _reconstruction_of(row: Row, record: StepRecord) -> Row:
    """What a reconstruction did to the layer of this row; nothing where the step has none."""
    if not record.reconstructed or "shares" in row:
        return {}
    return record.reconstructed.get(row["name"], {})


# --- leaving and coming back -----------------------------------------------------------------------------------------


def _stop(job: Job) -> None:
    """End all training here: the best weights so far are the result; steps that were not reached stay undone."""
    reached = job.reached
    stage = job.stages[reached.stage]
    fit = reached.fit
    if fit is None and reached.suspended is not None:
        fit = begin_fit(job, stage)
    if fit is not None:
        fit.conclude()
        reached.masks, reached.fit = fit.masks, None
    if RACE_START in reached.kept:
        if fit is not None and not any(f"race/{number}" in reached.kept for number in range(stage.attempt or 0)):
            reached.kept[f"race/{stage.attempt}"] = snapshot(reached.network)  # nothing to compare it with
        _go_on_with_the_best(job, stage)
    reached.kept.setdefault("baseline", snapshot(reached.network))
    if reached.record.steps and not reached.record.steps[-1].rounds:
        reached.record.steps.pop()  # its first removal was not finished
    reached.record.latest = job.score(reached.network)
    if reached.record.baseline is None:
        reached.record.baseline = reached.record.latest
    if reached.record.steps and reached.record.steps[-1].after is None:
        step = job.plan.spec.optimizations[reached.record.steps[-1].position]
        assert isinstance(step, Compression)
        _close_record(job, step, complete=False)
    reached.record.note(f"stopped early, while {stage.phase}: the best weights so far are the result")
    job.journal.event("job.stopping", f"stopped while {stage.phase}: the best so far is kept", phase=stage.phase)


def _prepare_retry(job: Job, found: NonFiniteLoss) -> None:
    """Once more from the last checkpoint; the second time the job has diverged."""
    if job.retried:
        raise Diverged(f"{found.message}, and again after a retry from the last checkpoint") from found
    job.retried = True
    message = f"{found.message}: once more from the last checkpoint"
    job.journal.event("warning", message, level="warn", step=found.step, lr=found.rate)


def _is_choosing(job: Job) -> bool:
    """Whether the job stands outside of a training's steps: where it evaluates, scores, cuts or recalibrates."""
    fit = job.reached.fit
    if job.stages[job.reached.stage].phase not in ("training", "retraining") or fit is None:
        return True
    return fit.evaluating or fit.finished


def _prepare_smaller_steps(job: Job, reason: str) -> None:
    batch = job.training.batch_size
    if batch < 2 * SMALLEST_BATCH:
        message = f"a step with {batch} images does not fit, and they are too few to be halved: {reason[:200]}"
        raise OutOfMemory(message, hint=SMALLER_NETWORK)
    if job.reached.micro_batches > 1 or job.micro_batches > 1:
        raise OutOfMemory(f"half a batch of {batch} images does not fit either: {reason[:200]}")
    job.micro_batches = 2
    message = f"the device ran out of memory: from here on {halved_batches(job)}"
    job.journal.event("warning", message, level="warn", code=OutOfMemory.code)


def _prepare_smaller_choices(job: Job, reason: str) -> None:
    images = job.images_at_a_time()
    if images <= SMALLEST_BATCH:
        message = (
            f"the network does not fit with {images} images at a time either, outside of its training (validation, "
            f"criteria, statistics of batch norm): {reason[:200]}"
        )
        raise OutOfMemory(message, hint=SMALLER_NETWORK)
    job.choice_parts = 2 * job.reached.choice_parts
    message = (
        f"the device ran out of memory: it evaluates and chooses on half of {images} images at a time from here on"
    )
    job.journal.event("warning", message, level="warn", code=OutOfMemory.code)


def _return_to_checkpoint(job: Job) -> None:
    """Stand where the last checkpoint was taken; what the failed training held is given back first."""
    job.reached.fit = None
    gc.collect()
    if job.precision.device.type == "cuda":
        torch.cuda.empty_cache()
    job.return_to_checkpoint()


def _ran_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ALLOCATION_FAILED)
