"""The table of a job of kind `sensitivity`: each group of channels cut alone, to several widths, without retraining.

Every cell is what a real cut gives: the network without those channels, right after the cut and after batch norm has
counted its statistics again. A person picks widths by it, and the job with these widths reports on the test part: the
table is measured on the validation part, or on training images where that is empty, never on the test part.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from app.network.cost import cost
from app.pruning.channel_classes import Classes, channel_classes, shrink_graph
from app.pruning.group_limits import GroupLimits, free_limits, why_kept
from app.spec.sensitivity import TRAINING_IMAGES, Sensitivity
from worker.data.dataset import Split, Splits
from worker.evaluation import score
from worker.network import Network
from worker.pruning.surgery import masked_in_place
from worker.run.job import Job
from worker.run.removal import recalibrate
from worker.verification.verification import compute_logits

Part = Literal["validation", "training"]


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
    groups = free_limits(network.graph, classes, options.step(options.kept[-1]))
    scores = job.removal_context.scores(network, classes, options.criterion)
    measured_on, _ = measured_split(job.splits, options)
    if measured_on == "training":
        reached.record.note("the table is measured on training images, which flatter the network: no image is held out")
    for limits in groups[len(rows) :]:
        job.monitor.check_interrupts()
        rows.append(_row(job, network, classes, limits, scores, options))
        reached.passed += 1
        job.journal.event("sensitivity.measured", _sentence(rows[-1]), **rows[-1])
        job.journal.progress(job.tracker.progress(len(rows) / len(groups)))
        job.monitor.checkpoint()


def table_document(job: Job) -> dict[str, Any]:
    """The report's `sensitivity`: the dense accuracy on the same images, a row for each group, and what stays whole."""
    options = job.plan.spec.sensitivity
    assert options is not None
    graph = job.plan.baseline
    whole = why_kept(graph, channel_classes(graph), options.step(options.kept[-1]))
    measured_on, part = measured_split(job.splits, options)
    return {
        "criterion": options.criterion,
        "measured_on": measured_on,
        "examples": len(part),
        "accuracy": _accuracy(job, job.reached.network, options),
        "groups": job.reached.record.sensitivity,
        "whole": [{"name": name, "reason": reason} for name, reason in whole.items()],
    }


def measured_split(splits: Splits, options: Sensitivity) -> tuple[Part, Split]:
    """Which part of the data the table is measured on, and its images: all, or so many at equal distances."""
    named: tuple[Part, Split] = ("validation", splits.validation)
    most = options.images or len(splits.validation)
    if not len(splits.validation):
        named, most = ("training", splits.train), options.images or TRAINING_IMAGES
    name, part = named
    if most >= len(part):
        return name, part
    return name, part.take(np.linspace(0, len(part) - 1, most).round().astype(np.int64))


def _row(
    job: Job, network: Network, classes: Classes, limits: GroupLimits, scores: dict[int, float], options: Sensitivity
) -> dict[str, Any]:
    group, points = limits.group, []
    for kept in options.kept:
        dropped = limits.weakest(scores, 1 - kept)
        found = cost(shrink_graph(network.graph, dropped, classes))
        with masked_in_place(network, classes, dropped):
            after_cut = _accuracy(job, network, options)
            recalibrated = recalibrate(network, job.removal_context)
            after_recalibration = _accuracy(job, network, options) if recalibrated else after_cut
        points.append(
            {
                "kept": kept,
                "channels": (len(group.classes) - len(dropped)) * group.channels,
                "macs": found.macs,
                "params": found.params,
                "after_cut": after_cut,
                "after_recalibration": after_recalibration,
            }
        )
    return {"layers": list(classes.layers_of(group)), "channels": limits.channels, "points": points}


def _accuracy(job: Job, network: Network, options: Sensitivity) -> float:
    _, part = measured_split(job.splits, options)
    return score(compute_logits(network, part.images, job.preprocessing), part.labels).accuracy


def _sentence(row: dict[str, Any]) -> str:
    cells = ", ".join(f"{point['channels']}: {point['after_recalibration']:.4f}" for point in row["points"])
    return f"{row['layers'][0]} and what is tied to it, of {row['channels']} channels: {cells}"
