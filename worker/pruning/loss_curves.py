"""What each group of channels costs when it alone is cut: scope `sensitivity` shares a budget out by it.

The cost is the rise of the cross-entropy on training images. Accuracy would need more images: it moves in steps, and
small cuts do not move it at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

from app.pruning.budget import Curve, choose_removals
from app.pruning.channel_classes import Classes
from app.pruning.group_limits import prunable_groups
from app.spec.prune import Prune
from worker.evaluation import evaluate
from worker.network import Network
from worker.precision import Precision
from worker.pruning.recalibration import recalibrate_batch_norm
from worker.pruning.surgery import shrink

PARTS_KEPT = (0.75, 0.5, 0.25)  # and the floor of the step
MOST_IMAGES = 512  # more did not change what leaves
FEWEST_IMAGES = 64
FORWARDS = 2  # of each image and cut: to recalibrate, and to evaluate
EPOCH_FORWARDS = 3  # what a training epoch costs for each image; a backward pass is two forward passes

Pairs = Iterable[tuple[Tensor, Tensor]]


def loss_curves(
    network: Network,
    classes: Classes,
    step: Prune,
    scores: Mapping[int, float],
    plain: Pairs,
    precision: Precision,
    *,
    images: int,
    frozen: Collection[str] = (),
) -> dict[int, Curve]:
    """For each group that shares the budget of `step`, by its index: (part kept, rise of the loss in nats), recalibrated.

    After Li et al., arXiv 1608.08710, section 3.2. The test part has no say: it is what the result is measured on. All
    cuts together cost about as much as one epoch of training at most.

    Args:
        network: Left as it is.
        classes: Of its graph.
        step: A prune step of channels; its floors end the curves.
        scores: By class: the weakest leave first.
        plain: Batches of training images and labels, without augmentation; a few are looked at.
        precision: Where the network is evaluated.
        images: How many training images there are.
        frozen: Layers that keep their statistics.
    """
    step = step.model_copy(update={"round_to": step.round_to or 1})  # whatever blocks the removal will have
    groups = prunable_groups(network.graph, classes, step, shared=True)
    cuts = max(1, len(groups) * (len(PARTS_KEPT) + 1))
    affordable = images * EPOCH_FORWARDS // (FORWARDS * cuts)
    batches = list(_first(plain, min(MOST_IMAGES, max(FEWEST_IMAGES, affordable))))
    whole = evaluate(network, batches, precision).loss
    curves = {}
    for group in groups:
        points: list[tuple[float, float]] = []
        for kept in (*PARTS_KEPT, 1 - step.max_sparsity):
            amount = {"budget": None, "sparsity": min(1 - kept, step.max_sparsity), "scope": "layer"}
            wanted = step.model_copy(update=amount)
            removals = choose_removals(network.graph, classes, scores, wanted, only=group.index)
            left = 1 - len(removals.dropped) / len(group.classes)
            if left >= (points[-1][0] if points else 1.0):
                continue
            smaller = shrink(network, classes, removals.dropped)
            precision.place(smaller)
            recalibrate_batch_norm(smaller, _images(batches), frozen=frozen)
            points.append((left, max(0.0, evaluate(smaller, batches, precision).loss - whole)))
        curves[group.index] = Curve(tuple(points))
    return curves


def _first(plain: Pairs, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` images, as they come in batches."""
    for images_NCx, labels_N in plain:
        yield images_NCx[:count], labels_N[:count]
        count -= len(labels_N)
        if count <= 0:
            return


def _images(batches: Pairs) -> Iterator[Tensor]:
    return (images_NCx for images_NCx, _ in batches)
