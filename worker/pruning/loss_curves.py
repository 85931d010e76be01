"""What each group of channels costs when it alone is cut: how scope `sensitivity` shares the budget of a prune step.

The curves are measured inside the removal, with the step's own scores and floors, and go into `app/pruning/budget.py`.
The job of kind sensitivity, which measures a table for its user and removes nothing, is `worker/run/sensitivity.py`.

The cost is the rise of the cross-entropy on training images. Accuracy would need more images: it moves in steps, and
small cuts do not move it at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from app.pruning.budget import Curve, choose_removals
from app.pruning.channel_classes import Classes, Group
from app.pruning.group_limits import prunable_groups
from app.spec.prune import Prune
from worker.evaluation import evaluate
from worker.network import Network
from worker.precision import Precision
from worker.pruning.importance import LabelledBatches
from worker.pruning.recalibration import recalibrate_batch_norm
from worker.pruning.surgery import shrink

CURVE_PARTS = (0.75, 0.5, 0.25)  # and the floor of the step
MOST_IMAGES = 512  # more did not change what is removed
FEWEST_IMAGES = 64
FORWARDS = 2  # of each image and cut: to recalibrate, and to evaluate
EPOCH_FORWARDS = 3  # what a training epoch costs for each image; a backward pass is two forward passes


def loss_curves(
    network: Network,
    classes: Classes,
    step: Prune,
    scores: Mapping[int, float],
    plain: LabelledBatches,
    precision: Precision,
    *,
    images: int,
    frozen: Collection[str] = (),
) -> dict[int, Curve]:
    """For each group that shares the budget of `step`, by its index: (part kept, rise of the loss in nats), recalibrated.

    After Li et al., arXiv 1608.08710, section 3.2. Never on the test part: the result is measured on it. All cuts
    together cost about as much as one epoch of training at most.

    Args:
        network: Left as it is.
        classes: Of its graph.
        step: A prune step of channels; its floors end the curves.
        scores: By class: the weakest are removed first.
        plain: Batches of training images and labels, without augmentation; only the first few are read.
        precision: Where the network is evaluated.
        images: How many training images there are.
        frozen: Layers that keep their statistics.
    """
    step = step.model_copy(update={"round_to": step.round_to or 1})  # whatever blocks the removal will have
    groups = prunable_groups(network.graph, classes, step, shared=True)
    cuts = max(1, len(groups) * (len(CURVE_PARTS) + 1))
    affordable = images * EPOCH_FORWARDS // (FORWARDS * cuts)
    batches = list(_first_images(plain, min(MOST_IMAGES, max(FEWEST_IMAGES, affordable))))
    whole = evaluate(network, batches, precision).loss

    def loss_without(dropped: Collection[int]) -> float:
        smaller = shrink(network, classes, dropped)
        precision.to_device(smaller)
        recalibrate_batch_norm(smaller, _images(batches), frozen=frozen)
        return evaluate(smaller, batches, precision).loss

    curves = {}
    for group in groups:
        points: list[tuple[float, float]] = []
        for left, dropped in _cuts_of(network, classes, step, scores, group):
            points.append((left, max(0.0, loss_without(dropped) - whole)))
        curves[group.index] = Curve(tuple(points))
    return curves


def _cuts_of(
    network: Network, classes: Classes, step: Prune, scores: Mapping[int, float], group: Group
) -> Iterator[tuple[float, Collection[int]]]:
    """(part of the group that is kept, classes without which it is), by smaller and smaller parts."""
    smallest = 1.0
    for kept in (*CURVE_PARTS, 1 - step.max_sparsity):
        amount = {"budget": None, "sparsity": min(1 - kept, step.max_sparsity), "scope": "layer"}
        wanted = step.model_copy(update=amount)
        dropped = choose_removals(network.graph, classes, scores, wanted, only=group.index).dropped
        left = 1 - len(dropped) / len(group.classes)
        if left < smallest:
            smallest = left
            yield left, dropped


def _first_images(plain: LabelledBatches, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` images, as they come in batches."""
    for images_NCx, labels_N in plain:
        yield images_NCx[:count], labels_N[:count]
        count -= len(labels_N)
        if count <= 0:
            return


def _images(batches: LabelledBatches) -> Iterator[Tensor]:
    return (images_NCx for images_NCx, _ in batches)
