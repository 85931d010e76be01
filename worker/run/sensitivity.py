"""The table of a job of kind `sensitivity`: each group of channels cut alone, to several widths, without retraining.

Every cell is a real cut: the network of that width is built with the weights that are left and evaluated on the test
part, right after the cut and after batch norm has counted its statistics again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from app.network.cost import cost
from app.pruning.budget import choose_removals
from app.pruning.channel_classes import Classes, Group, channel_classes
from app.pruning.group_limits import prunable_groups, why_kept
from app.spec.sensitivity import Sensitivity
from worker.evaluation import score
from worker.network import Network
from worker.pruning.importance import channel_scores
from worker.pruning.surgery import shrink
from worker.run.job import Job
from worker.run.removal import recalibrate
from worker.training.losses import cross_entropy
from worker.verification.verification import compute_logits


def tabulate(job: Job) -> None:
    """Fill the table in the job's record, a row for each group, from where an earlier attempt left it.

    A checkpoint is saved after each row.

    Raises:
        Interrupted: the user asked for something; the rows so far stay.
        Diverged: a weight is not finite.
    """
    options = job.plan.spec.sensitivity
    assert options is not None
    reached, rows = job.reached, job.reached.record.sensitivity
    network = reached.network
    classes = channel_classes(network.graph)
    groups = prunable_groups(network.graph, classes, options.step(options.kept[-1]))
    scores = channel_scores(
        network,
        classes,
        options.criterion,
        seed=job.training.seed,
        batches=job.removal_context.plain(),
        loss=cross_entropy,
    )
    for group in groups[len(rows) :]:
        job.monitor.check_interrupts()
        rows.append(_row(job, network, classes, group, scores, options))
        reached.passed += 1
        job.journal.event("sensitivity.measured", _sentence(rows[-1]), **rows[-1])
        job.journal.progress(job.tracker.progress(len(rows) / len(groups)))
        job.monitor.checkpoint()


def table_document(job: Job) -> dict[str, Any]:
    """The report's `sensitivity`: the dense accuracy on the same images, a row for each group, and what stays whole."""
    options, run_record = job.plan.spec.sensitivity, job.reached.record
    assert options is not None
    assert run_record.baseline is not None
    graph = job.plan.baseline
    step = options.step(options.kept[-1])
    examples = len(_test_positions(job, options))
    seen_all = examples == len(job.splits.test.labels)
    whole = why_kept(graph, channel_classes(graph), step)
    return {
        "criterion": options.criterion,
        "examples": examples,
        "accuracy": run_record.baseline.accuracy if seen_all else _accuracy(job, job.reached.network, options),
        "groups": run_record.sensitivity,
        "whole": [{"name": name, "reason": reason} for name, reason in whole.items()],
    }


def _row(
    job: Job, network: Network, classes: Classes, group: Group, scores: dict[int, float], options: Sensitivity
) -> dict[str, Any]:
    points = []
    for kept in options.kept:
        removals = choose_removals(network.graph, classes, scores, options.step(kept), only=group.index)
        smaller = shrink(network, classes, removals.dropped)
        job.precision.to_device(smaller)
        after_cut = _accuracy(job, smaller, options)
        recalibrated = recalibrate(smaller, job.removal_context)
        found = cost(smaller.graph)
        points.append(
            {
                "kept": kept,
                "channels": (len(group.classes) - len(removals.dropped)) * group.channels,
                "macs": found.macs,
                "params": found.params,
                "after_cut": after_cut,
                "after_recalibration": _accuracy(job, smaller, options) if recalibrated else after_cut,
            }
        )
    width = len(group.classes) * group.channels
    return {"layers": list(classes.layers_of(group)), "channels": width, "points": points}


def _accuracy(job: Job, network: Network, options: Sensitivity) -> float:
    positions = _test_positions(job, options)
    images, labels = job.splits.test.images, job.splits.test.labels
    if len(positions) < len(labels):
        images, labels = images[positions], labels[positions]
    return score(compute_logits(network, images, job.preprocessing), labels).accuracy


def _test_positions(job: Job, options: Sensitivity) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which test images are used: all, or so many at equal distances."""
    count = len(job.splits.test.labels)
    return np.linspace(0, count - 1, min(count, options.images or count)).round().astype(np.int64)


def _sentence(row: dict[str, Any]) -> str:
    cells = ", ".join(f"{point['channels']}: {point['after_recalibration']:.4f}" for point in row["points"])
    return f"{row['layers'][0]} and what is tied to it, of {row['channels']} channels: {cells}"
